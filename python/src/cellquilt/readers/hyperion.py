"""Standard BioTools Hyperion (imaging mass cytometry): a TIFF a channel, or one OME-TIFF of all channels.

The machine's ``.mcd`` and ``.txt`` files are not read: MCD Viewer and ``readimc`` export them as TIFF. Programs name
channels in many ways (``141Pr_CD3``, ``CD3(Pr141Di)``, ``141Pr_141Pr_CD3``, ``ROI001_Pr141-CD3``); in all of them
there is an isotope, and the marker is what is left. Channels of a folder are in the order of masses, then of markers.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from cellquilt.core.errors import CellquiltError
from cellquilt.readers.base import Reader, Request, Slide
from cellquilt.readers.channels import (
    ChannelFile,
    choose_region,
    contents_of,
    distinct_names,
    natural_key,
    no_images,
    open_tiff,
    refuse_transcripts,
    same_size,
    stack_files,
    stem_of,
    tiff_files,
    whole_file,
)
from cellquilt.readers.tiff import TiffImage

IMAGE = "image"
#: Elements that tags are made of or that tissue and gas hold, and the lightest and heaviest of their isotopes.
_ISOTOPES = {
    "Ar": (36, 40), "ArAr": (72, 80), "Se": (74, 82), "Br": (79, 81), "Y": (89, 89), "Mo": (92, 100), "Ru": (96, 104),
    "Rh": (103, 103), "Pd": (102, 110), "Ag": (107, 109), "Cd": (106, 116), "In": (113, 115), "Sn": (112, 124),
    "Sb": (121, 123), "Te": (120, 130), "I": (127, 127), "Xe": (124, 136), "Cs": (133, 133), "Ba": (130, 138),
    "La": (138, 139), "Ce": (136, 142), "Pr": (141, 141), "Nd": (142, 150), "Sm": (144, 154), "Eu": (151, 153),
    "Gd": (152, 160), "Tb": (159, 159), "Dy": (156, 164), "Ho": (165, 165), "Er": (162, 170), "Tm": (169, 169),
    "Yb": (168, 176), "Lu": (175, 176), "Hf": (174, 180), "Ta": (180, 181), "W": (180, 186), "Os": (184, 192),
    "Ir": (191, 193), "Pt": (190, 198), "Au": (197, 197), "Hg": (196, 204), "Tl": (203, 205), "Pb": (204, 208),
    "Bi": (209, 209), "BCKG": (190, 190),
}  # fmt: skip
_ELEMENTS = "|".join(sorted(_ISOTOPES, key=lambda element: (-len(element), element)))
# "Di" and "Dd" are the machine's endings for single and double counts.
_ISOTOPE = re.compile(
    rf"(?<![A-Za-z0-9])(?:(?P<mass>\d{{2,3}})(?P<element>{_ELEMENTS})"
    rf"|(?P<element2>{_ELEMENTS})(?P<mass2>\d{{2,3}}))(?:D[id])?(?![A-Za-z0-9])"
)


@dataclass(frozen=True)
class Tag:
    """A channel's isotope and marker.

    Attributes
    ----------
    mass
        Of the isotope; None if the name holds none.
    element
        Its symbol, "" without one.
    marker
        What it is bound to; the isotope where there is nothing else.
    before
        Whether the marker stood before the isotope: then it may have a sample's name in front.
    """

    mass: int | None
    element: str
    marker: str
    before: bool = False


def parse_channel(text: str) -> Tag:
    """Isotope and marker of a channel's name.

    Examples
    --------
    >>> [parse_channel(name).marker for name in ("141Pr_CD3", "CD3(Pr141Di)", "141Pr_141Pr_CD3", "ROI001_Pr141-CD3")]
    ['CD3', 'CD3', 'CD3', 'CD3']
    >>> parse_channel("191Ir")
    Tag(mass=191, element='Ir', marker='191Ir', before=False)
    >>> parse_channel("E-cadherin")
    Tag(mass=None, element='', marker='E-cadherin', before=False)
    """
    found = []
    for match in _ISOTOPE.finditer(text):
        element, mass = match["element"] or match["element2"], int(match["mass"] or match["mass2"])
        low, high = _ISOTOPES[element]
        if low <= mass <= high:
            found.append((match.start(), match.end(), mass, element))
    if not found:
        return Tag(None, "", _trim(text) or text)
    ends = [0, *(end for _, end, _, _ in found)]
    starts = [*(start for start, _, _, _ in found), len(text)]
    pieces = [_trim(text[a:b]) for a, b in zip(ends, starts, strict=True)]
    behind = [piece for piece in pieces[1:] if piece]
    _, _, mass, element = found[-1]
    if behind:
        return Tag(mass, element, behind[-1])
    return Tag(mass, element, pieces[0] or f"{mass}{element}", before=bool(pieces[0]))


def _trim(piece: str) -> str:
    """A piece of a name without what stands between pieces; brackets that belong to each other stay."""
    piece = piece.strip(" _-.,;:")
    while piece and (piece[0] in ")]}" or (piece[0] in "([{" and not re.search(r"[)\]}]", piece))):
        piece = piece[1:].strip(" _-.,;:")
    while piece and (piece[-1] in "([{" or (piece[-1] in ")]}" and not re.search(r"[(\[{]", piece))):
        piece = piece[:-1].strip(" _-.,;:")
    return piece


def open_hyperion(request: Request) -> Slide:
    """Open a region's folder or file; see `Reader`."""
    refuse_transcripts(request, "Hyperion")
    slide = Slide()
    if request.path.is_file():
        return _one_file(request, slide, request.path, open_tiff(request, request.path))
    paths = tiff_files(request.path)
    if not paths:
        raise no_images(request, "*.tiff or *.tif", _without_tiffs(request.path))
    files = [(path, open_tiff(request, path)) for path in paths]
    stacks = [path for path, image in files if image.shape[0] > 1]
    if len(stacks) == len(files):  # a file of all channels for each region
        region = choose_region(
            request.settings["vendor_region"], [stem_of(path) for path in paths], request, "files of many channels"
        )
        if len(paths) > 1:
            slide.facts["vendor_region"] = region
        path, image = next((path, image) for path, image in files if stem_of(path) == region)
        return _one_file(request, slide, path, image)
    channels = sorted(
        _tags(files), key=lambda entry: (entry[0].mass or 1 << 30, natural_key(entry[0].marker), entry[1])
    )
    _refuse_twice(channels, request)
    opened = dict(files)
    stack = [ChannelFile(tag.marker, opened[path]) for tag, path in channels]
    slide.images[IMAGE] = stack_files(stack, request, slide)
    same_size(stack)
    slide.facts["isotopes"] = _isotopes([tag for tag, _ in channels])
    return slide


READER = Reader("hyperion", "Hyperion", open_hyperion)


def _without_tiffs(folder: Path) -> str:
    raw = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".mcd", ".txt"))
    if raw:
        return f"export {raw[0]} as OME-TIFF with MCD Viewer, or with readimc"
    below = sorted(path.name for path in folder.iterdir() if path.is_dir() and tiff_files(path))
    return f"name a region's own folder: {', '.join(below[:3])}" if below else "complete the folder"


def _one_file(request: Request, slide: Slide, path: Path, image: TiffImage) -> Slide:
    tags = [parse_channel(name) for name in image.channel_names]
    names = distinct_names([tag.marker for tag in tags], slide, image.name)
    slide.inputs.append(path)
    slide.images[IMAGE] = whole_file(image, names, request, slide)
    slide.facts["isotopes"] = _isotopes(tags)
    return slide


def _isotopes(tags: list[Tag]) -> list[str | None]:
    return [None if tag.mass is None else f"{tag.mass}{tag.element}" for tag in tags]


def _tags(files: list[tuple[Path, TiffImage]]) -> list[tuple[Tag, Path]]:
    """Isotope and marker of every file, by its name; by its OME-XML where the name holds no isotope."""
    tags = []
    for path, image in files:
        tag = parse_channel(stem_of(path))
        named = image.channel_names[0] if image.shape[0] == 1 else "channel_0"
        if tag.mass is None and named != "channel_0":
            tag = parse_channel(named)
        tags.append(tag)
    loose = [k for k, tag in enumerate(tags) if tag.before or (tag.mass is None and tag.marker == stem_of(files[k][0]))]
    front = _common_front([tags[k].marker for k in loose])
    for k in loose:
        tags[k] = Tag(tags[k].mass, tags[k].element, tags[k].marker[front:], tags[k].before)
    return [(tag, path) for tag, (path, _) in zip(tags, files, strict=True)]


def _common_front(markers: list[str]) -> int:
    """Length of what several names begin with, up to and with its last underscore: a sample's or a region's name.

    Examples
    --------
    >>> _common_front(["ROI_1_CD3", "ROI_1_CD4"]), _common_front(["CD3", "CD4"]), _common_front(["ROI_1_CD3"])
    (6, 0, 0)
    """
    if len(markers) < 2:
        return 0
    low, high = min(markers), max(markers)  # what these share, all share
    shared = next((k for k, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    front = low[:shared].rfind("_") + 1
    return front if all(len(marker) > front for marker in markers) else 0


def _refuse_twice(channels: list[tuple[Tag, Path]], request: Request) -> None:
    seen: dict[tuple[int, str], Path] = {}
    for tag, path in channels:
        if tag.mass is None:
            continue
        other = seen.setdefault((tag.mass, tag.marker), path)
        if other != path:
            raise CellquiltError(
                "hyperion-channel-twice",
                f"{request.source}: {other.name} and {path.name} are both {tag.mass}{tag.element} {tag.marker}; "
                f"{contents_of(request.path)}",
                "keep the files of one region in a folder",
            )
