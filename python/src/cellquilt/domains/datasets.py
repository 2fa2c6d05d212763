"""Slides of a catalogue, a folder or a dataset of a model hub: `load_dataset`."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cellquilt.core.errors import CellquiltError, did_you_mean, did_you_mean_file
from cellquilt.core.log import LOG
from cellquilt.domains.hub import Hub, is_hub_id
from cellquilt.spatial.files import TableFiles
from cellquilt.spatial.slides import SAMPLE

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

#: The public dataset of novae's authors.
PUBLIC = "prism-oncology/novae"
CATALOGUE = "metadata.csv"
_COLUMNS = ("species", "tissue", "technology")
#: Parts of a slide's path; the catalogue may come from elsewhere, and must not lead out of its folder.
_PART = re.compile(r"[^/\\\0]+")


def load_dataset(
    *,
    tissue: str | Sequence[str] | None = None,
    species: str | Sequence[str] | None = None,
    technology: str | Sequence[str] | None = None,
    pattern: str | None = None,
    path: Path | str | None = None,
    top_k: int | None = None,
    revision: str | None = None,
    dry_run: bool = False,
) -> "list[AnnData] | pd.DataFrame":
    """Load slides of a catalogue.

    A catalogue is a folder with ``metadata.csv``, whose first column names the slides and which has columns
    ``species``, ``tissue`` and ``technology``, and with files ``<species>/<tissue>/<slide>.h5ad``. The public dataset
    of novae's authors has this layout.

    Parameters
    ----------
    tissue, species, technology
        Only slides with this value, or one of these.
    pattern
        Only slides whose name begins with what this regular expression matches, or the slide of just this name.
    path
        Folder of the catalogue, or ``owner/name`` of a dataset on a hub, which needs the package huggingface_hub; by
        default the public dataset.
    top_k
        Only so many of these, the first in the catalogue.
    revision
        Branch, tag or commit on the hub.
    dry_run
        Read the catalogue only.

    Returns
    -------
    list of anndata.AnnData, or pandas.DataFrame
        Tables in the catalogue's order with the slide's name in ``obs["sample"]``; the chosen rows of the catalogue,
        index the names, for `dry_run`.

    Raises
    ------
    CellquiltError
        ``catalogue-missing``, ``catalogue-invalid``, ``dataset-value-unknown``, ``pattern-invalid``,
        ``top-k-invalid``, ``dataset-empty``, ``table-missing``, ``table-unreadable``, ``revision-unused``, and what
        `Hub.file` raises.
    """
    file = _files(PUBLIC if path is None else path, revision)
    chosen = _chosen(
        _read(file(CATALOGUE)), {"species": species, "tissue": tissue, "technology": technology}, pattern, top_k
    )
    if dry_run:
        return chosen
    places = [f"{row.species}/{row.tissue}/{row.Index}.h5ad" for row in chosen.itertuples()]
    tables = list(TableFiles([file(place) for place in places]))
    for table, name in zip(tables, chosen.index, strict=True):
        _name(table, name)
    return tables


def _files(path: Path | str, revision: str | None) -> Callable[[str], Path]:
    """From the path of a file in a catalogue to where it is."""
    if is_hub_id(path):
        return Hub(str(path), "dataset", revision).file
    if revision is not None:
        raise CellquiltError(
            "revision-unused",
            f"{path} has no revision {revision}",
            "only datasets of a hub (owner/name) have revisions",
        )
    folder = Path(path)
    if not (folder / CATALOGUE).is_file():
        what = f"{folder} has no {CATALOGUE}" if folder.is_dir() else f"there is no folder {folder}"
        hint = did_you_mean_file(folder / CATALOGUE if folder.is_dir() else folder)
        raise CellquiltError("catalogue-missing", what, hint or "name the folder of the catalogue")
    return folder.__truediv__


def _read(path: Path) -> "pd.DataFrame":
    """The catalogue, index the names."""
    import pandas as pd

    hint = "its first column names the slides; species, tissue and technology are columns of it"
    try:
        # An empty field is nothing; "NA" and the like are names as others are.
        found = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8")
    except (ValueError, OSError) as error:  # of pandas' parsers and of decoding too
        raise CellquiltError("catalogue-invalid", f"{path} is no CSV table: {error}", hint) from error
    absent = [name for name in _COLUMNS if name not in found.columns[1:]]
    if absent:
        known = ", ".join(map(str, found.columns))
        raise CellquiltError("catalogue-invalid", f"{path} has no column {', '.join(absent)}; it has {known}", hint)
    found = found.set_index(found.columns[0])
    for what, values in (("name", found.index), ("species", found["species"]), ("tissue", found["tissue"])):
        for line, value in enumerate(values, 2):
            if not isinstance(value, str) or value in (".", "..") or not _PART.fullmatch(value):
                raise CellquiltError("catalogue-invalid", f"{path}, row {line}: {value!r} is no {what}", hint)
    twice = found.index[found.index.duplicated()]
    if len(twice):
        raise CellquiltError("catalogue-invalid", f'{path} has the slide "{twice[0]}" twice', "name each slide once")
    return found


def _chosen(
    catalogue: "pd.DataFrame", wanted: Mapping[str, str | Sequence[str] | None], pattern: str | None, top_k: int | None
) -> "pd.DataFrame":
    if top_k is not None and top_k < 1:
        raise CellquiltError("top-k-invalid", f"top_k is {top_k}; a number of slides above 0 was expected")
    found, said = catalogue, []
    for column, values in wanted.items():
        if values is None:
            continue
        values = [values] if isinstance(values, str) else list(values)
        known = catalogue[column].dropna().unique().tolist()
        for value in values:
            if value not in known:
                raise CellquiltError(
                    "dataset-value-unknown", f'no slide has {column} "{value}"', did_you_mean(str(value), known)
                )
        found = found[found[column].isin(values)]
        said.append(f"{column} {' or '.join(values)}")
    if pattern is not None:
        try:
            match = re.compile(pattern).match
        except re.error as error:
            raise CellquiltError(
                "pattern-invalid", f'pattern "{pattern}" is no regular expression: {error}', 'such as "xenium_.*_lung"'
            ) from None
        found = found[[name == pattern or match(name) is not None for name in found.index]]
        said.append(f'a name like "{pattern}"')
    if found.empty:
        raise CellquiltError(
            "dataset-empty",
            f"none of {len(catalogue)} slides has {' and '.join(said)}" if said else "the catalogue names no slides",
            "ask for less; dry_run=True without the others shows what there is",
        )
    return found if top_k is None else found.head(top_k)


def _name(table: "AnnData", name: str) -> None:
    import pandas as pd

    before = table.obs[SAMPLE].astype(str).unique() if SAMPLE in table.obs else []
    if len(before) > 1:
        LOG.warning('%s: obs["%s"] named %d slides, now this one', name, SAMPLE, len(before))
    table.obs[SAMPLE] = pd.Categorical.from_codes([0] * table.n_obs, [name])
