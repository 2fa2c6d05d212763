"""The stages of the way from the cell tables of a cohort to domains, each from files to files.

`prepare_slide` (a slide) → `train_model` (all slides) → `embed_slide` (a slide) → `assign_domains` (all slides) →
`annotate_table` (a slide). What is done for all slides has one of them in memory at a time, in the order of their
names.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt import __version__
from cellquilt.core import zarr_json
from cellquilt.core.atomic import atomic_path, refuse_existing
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.core.log import LOG
from cellquilt.core.privacy import scrub
from cellquilt.core.record import Record
from cellquilt.core.settings import SHIPPED_DOMAINS, Settings
from cellquilt.core.store import Store, consolidate
from cellquilt.core.transforms import MICRONS
from cellquilt.domains.checkpoint import COMPONENTS, checksum
from cellquilt.domains.hub import model_folder
from cellquilt.domains.results import (
    CONFIDENCE,
    DOMAIN,
    LATENT,
    LEAF,
    PROBABILITIES,
    STABILITY,
    CellDomains,
    LatentFiles,
    about_file,
    leaf_name,
    read_cells,
    sorted_by_name,
)
from cellquilt.domains.slides import IMAGE, IMAGE_ABOUT, SlideCells, Slides, read_slide, slides_of_table, write_slide
from cellquilt.readers.he_image import open_he_image
from cellquilt.spatial.files import read_tables
from cellquilt.spatial.tables import ABOUT, matrices_of, spatial_neighbors

if TYPE_CHECKING:
    from anndata import AnnData

    from cellquilt.domains.images.pca import ImagePca
    from cellquilt.domains.images.slide_image import SlideImage
    from cellquilt.domains.model import Model

#: Suffix of the file with a slide's domains, after its name.
DOMAINS_FILE = ".domains.parquet"
#: Of images alone, channels from which on they tell cells apart.
_LEAST_CHANNELS = 10
_LEAST_CELLS = 3
#: Domains beyond which a probability of each for each cell is no compact result.
_MOST_JUDGED = 64
#: Packages whose version may change the domains.
_NUMERICAL = ("numba", "numpy", "scikit-learn", "scipy")
#: Settings of training that change nothing of a model.
_NOT_OF_MODEL = ("domains_checkpoints", "domains_image_weights", "domains_model", "memory_mb")
#: What a slide of the pipeline may lack, without a mistake of anybody's.
_NOTHING_THERE = ("too-few-cells", "genes-missing")


def prepare_slide(
    table: Path,
    output: Path,
    *,
    settings: Settings,
    sample: str | None = None,
    slide: Path | None = None,
    he_image: Path | None = None,
    he_matrix: Path | None = None,
    image_weights: Path | None = None,
    refusal: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a slide's cells and their neighbours as a compact store, and if asked what an image shows around them.

    Parameters
    ----------
    table
        An ``.h5ad`` file, an AnnData ``.zarr`` folder, or a SpatialData store with a table ``table``.
    output
        The store to make.
    settings
        Groups ``domains_graph``, ``domains_image`` and ``resources``. With ``domains_image_model`` an image is looked
        at.
    sample
        The slide's name; None: the file's.
    slide
        The store with the slide's images; by default the table's own.
    he_image, he_matrix
        The image to look at; see `cellquilt.readers.he_image.open_he_image`. Else it is the element ``domains_image``.
    image_weights
        The network's weights, where they lie elsewhere than settings say.
    refusal
        Where to say why (JSON), instead of an error, if there are no cells or no genes to find domains from.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        `output` or `refusal`.

    Raises
    ------
    CellquiltError
        ``too-few-cells``, ``genes-missing``, ``expression-missing``, ``cells-twice``, ``domains-image-missing``, and
        what reading the table and the image, `spatial_neighbors`, `expression.kind_of` and `image_embeddings` refuse.
    """
    refuse_existing(output, overwrite)
    source = Path(table)
    name = sample or (Store(source).name if source.is_dir() and zarr_json.is_group(source) else source.stem)
    record = Record("domains_prepare", name, settings.of_stage("domains_prepare"))
    try:
        cells, about = _slide_of(source, name, settings)
    except CellquiltError as error:
        if refusal is None or error.code not in _NOTHING_THERE:
            raise
        LOG.warning("%s: no domains: %s", name, error.message)
        said = {**error.as_dict(), "sample": name, "stage": "DOMAINS_PREPARE"}
        with atomic_path(refusal, overwrite=overwrite) as aside:
            aside.write_text(json.dumps(scrub(said), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return refusal
    record.facts |= {"n_cells": len(cells), "n_genes": len(cells.genes), "kind": cells.kind}
    with atomic_path(output, overwrite=overwrite) as aside:
        if settings["domains_image_model"]:
            cells = replace(cells, image=None, patch_um=None)  # of the network that is asked for, and no other
        write_slide(cells, aside)
        if settings["domains_image_model"]:
            from cellquilt.domains.images.features import write_features

            with ExitStack() as resources:
                image = _image_of(name, slide or source, he_image, he_matrix, settings, resources)
                write_features(cells, image, aside, settings=settings, weights=image_weights)
        size = {"cells": len(cells)}
        known = {"sample": name, "records": [record.finish()], "graph": about, "size": size}
        zarr_json.update_attributes(aside, {"cellquilt": known})
    LOG.info("%s: %d cells, %d genes, %s", name, len(cells), len(cells.genes), cells.kind)
    return output


def _slide_of(path: Path, name: str, settings: Settings) -> tuple[SlideCells, dict[str, Any]]:
    import anndata
    import pandas as pd

    table: AnnData = read_tables([path], _table_name(path))[0]
    matrix, genes, kind = _measured(table, settings["domains_kind"])
    if table.n_obs < _LEAST_CELLS:
        raise CellquiltError("too-few-cells", f"{name} has {table.n_obs} cells", "leave the slide out")
    if not table.obs_names.is_unique:
        twice = table.obs_names[table.obs_names.duplicated()][0]
        raise CellquiltError("cells-twice", f'{name}: cell "{twice}" is there twice', "make obs_names unique")
    found = anndata.AnnData(
        matrix, obs=pd.DataFrame(index=table.obs_names), var=pd.DataFrame(index=pd.Index(genes, dtype=str)),
        obsm={key: table.obsm[key] for key in ("spatial", IMAGE) if key in table.obsm},
        uns={key: table.uns[key] for key in (IMAGE_ABOUT,) if key in table.uns},
    )  # fmt: skip
    # Our own tables are in µm, whatever the unit of others.
    scale = 1.0 if _is_own(path) else settings["domains_scale_to_um"]
    try:
        spatial_neighbors(found, settings["domains_radius"], mode=settings["domains_graph"], scale_to_um=scale)
        (slide,) = slides_of_table(found, kind)
    except CellquiltError as error:  # they do not know the slide's name
        raise CellquiltError(error.code, f"{name}: {error.message.removeprefix('table: ')}", error.hint) from None
    return replace(slide, name=name, xy_um=slide.xy_um * scale), dict(found.uns[ABOUT])


def _image_of(
    name: str,
    place: Path,
    he_image: Path | None,
    he_matrix: Path | None,
    settings: Settings,
    resources: ExitStack,
) -> "SlideImage":
    """The image to look at: one that was aligned with the slide, or an element of its store."""
    from cellquilt.domains.images.slide_image import SlideImage

    store = Store(place) if place.is_dir() and zarr_json.is_group(place) else None
    if he_image is not None:
        main = None
        if store is not None and store.names("images"):
            main = open_image(place).transforms[MICRONS]
        memory = settings["memory_mb"]
        source = open_he_image(he_image, he_matrix, main_to_um=main, resources=resources, memory_mb=memory)
        return SlideImage.of_source(source)
    element = settings["domains_image"]
    if not element or store is None:
        raise CellquiltError(
            "domains-image-missing", f"{name} has no image to look at",
            "give he_image in the sheet, or the name of an image of its store as domains_image",
        )  # fmt: skip
    return SlideImage(open_image(place, element))


def _table_name(path: Path) -> str:
    """The table of a SpatialData store: ``table``, or the only one that there is."""
    if path.is_dir() and zarr_json.is_group(path):
        names = Store(path).names("tables")
        if len(names) == 1:
            return names[0]
    return "table"


def _is_own(path: Path) -> bool:
    is_store = path.is_dir() and zarr_json.is_group(path)
    return is_store and any(record.get("stage") == "aggregate" for record in Store(path).records)


def _measured(table: "AnnData", kind: str) -> tuple[Any, list[str], str | None]:
    """What a model looks at: X, or of slides without genes the channels' intensities; its columns; its kind."""
    asked = None if kind == "auto" else kind
    if table.n_vars:
        if table.X is None:
            raise CellquiltError("expression-missing", "X is empty", "put counts there, which may be in a layer")
        return table.X, list(map(str, table.var_names)), asked
    channels: Any = table.obsm.get("intensities")
    n = 0 if channels is None else channels.shape[1]
    if n < _LEAST_CHANNELS:
        raise CellquiltError(
            "genes-missing",
            f"there are no genes, and too few channels of an image ({n}) to tell cells apart",
            f"domains need transcripts, or {_LEAST_CHANNELS} channels",
        )
    return np.asarray(channels, dtype=np.float32), list(map(str, channels.columns)), asked or "protein"


def train_model(
    graphs: Sequence[Path],
    output: Path,
    *,
    settings: Settings,
    weights: Path | None = None,
    checkpoints: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a model of a cohort, or go on from one.

    Parameters
    ----------
    graphs
        What `prepare_slide` wrote of all slides, in any order.
    output
        The model's folder to make.
    settings
        Groups ``domains``, ``domains_training``, ``domains_image`` and ``resources``. With ``domains_model`` that model
        is gone on from.
    weights
        The model to go on from, where it lies elsewhere.
    checkpoints
        Folder to which a published training writes its state after each epoch, and from which it goes on after it was
        interrupted; None: settings say. The state's name is a digest of the slides and of all that the training
        depends on, and it is removed when the training is done.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        `output`.

    Raises
    ------
    CellquiltError
        What `Model.from_pretrained` and `Model.train` raise; ``slide-twice``; where some slides have features of an
        image ``images-differ``, ``image-pca-differs``, ``image-constant``.
    """
    from cellquilt.domains.images.features import cohort_pca
    from cellquilt.domains.model import Model

    refuse_existing(output, overwrite)
    _, paths = sorted_by_name([(_name_of(path), path) for path in graphs])
    place = weights or settings["domains_model"]
    folder = model_folder(place) if place else None
    start = Model.from_pretrained(folder) if folder else None
    pca = _pca_of(folder) if folder else None
    if pca is None:
        pca = cohort_pca(paths, settings["domains_image_components"], settings["domains_seed"])
    recipe = start.encoder.recipe if start else settings["domains_recipe"]
    options: dict[str, Any] = {}
    if recipe == "published":
        named = {"max_epochs": settings["domains_max_epochs"], "processes": settings["domains_processes"]}
        options = {name: value for name, value in named.items() if value is not None}
        checkpoints = checkpoints or (Path(text) if (text := settings["domains_checkpoints"]) else None)
        if checkpoints is not None:
            checkpoints.mkdir(parents=True, exist_ok=True)
            options["state"] = checkpoints / f"{_training_key(paths, folder, settings)}.pt"
    model = Model.train(
        Slides.of_stores(paths, pca),
        recipe=recipe,
        start=start,
        n_domains=settings["domains_n"],
        seed=settings["domains_seed"],
        threads=settings["threads"],
        **options,
    )
    with atomic_path(output, overwrite=overwrite) as aside:
        model.save_pretrained(aside)
        if pca is not None:
            pca.save(aside)
    if "state" in options:
        options["state"].unlink(missing_ok=True)
    return output


def _training_key(graphs: Sequence[Path], start: Path | None, settings: Settings) -> str:
    """Digest of all that a training depends on: content, not names of files."""
    import hashlib

    values = {name: value for name, value in settings.of_stage("domains_train").items() if name not in _NOT_OF_MODEL}
    packages = {name: version(name) for name in (*_NUMERICAL, "torch")}
    said = [values, packages, __version__, checksum(start) if start else None]
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for graph in graphs:
        for path in sorted(graph.rglob("*")):
            # Its attributes hold the time that it took to make.
            if path.is_file() and path != graph / "zarr.json":
                with path.open("rb") as file:
                    found.update(path.relative_to(graph).as_posix().encode())
                    found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:32]


def _pca_of(model: Path) -> "ImagePca | None":
    """Components of images that a model was trained with."""
    from cellquilt.domains.images.pca import ImagePca

    return ImagePca.load(model) if (model / COMPONENTS).is_file() else None


def _name_of(graph: Path) -> str:
    """The name of a slide that was prepared, without reading it."""
    known = zarr_json.read_attributes(graph).get("cellquilt") if zarr_json.is_group(graph) else None
    return str(known["sample"]) if known else read_slide(graph).name


def embed_slide(
    graph: Path,
    output: Path,
    *,
    settings: Settings,
    weights: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the latents of a slide's cells.

    Parameters
    ----------
    graph
        What `prepare_slide` wrote.
    output
        Parquet file to write: ``cell_id`` and ``niche_latent``, NaN for cells that have none.
    settings
        Group ``resources``, and ``domains_model``; by default the shipped model is used.
    weights
        The model, where it lies elsewhere.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        `output`.

    Raises
    ------
    CellquiltError
        ``graph-store-invalid``, ``model-missing``, ``model-not-shipped``, ``genes-unknown``, ``kinds-differ``,
        ``image-embeddings``, ``image-pca-differs``.
    """
    from cellquilt.domains.model import threads_of

    refuse_existing(output, overwrite)
    model, about, pca = _model(settings, weights)
    slide = read_slide(graph, pca)
    with threads_of(settings["threads"]):
        latents = model.encoder.encode(slide)
    found = CellDomains(slide.name, np.asarray(slide.cells, dtype=object), latents, about={"model": about})
    without = int((~np.isfinite(latents).all(axis=1)).sum())
    LOG.info("%s: %d cells, %d of them without neighbours", slide.name, len(slide), without)
    return found.write(output, overwrite=overwrite)


def _model(settings: Settings, weights: Path | None) -> "tuple[Model, str, ImagePca | None]":
    """The model to use, its checksum, and the components of images that it takes."""
    from cellquilt.domains.model import Model

    folder = model_folder(weights or settings["domains_model"] or SHIPPED_DOMAINS)
    return Model.from_pretrained(folder), checksum(folder), _pca_of(folder)


def assign_domains(
    latents: Sequence[Path],
    output: Path,
    *,
    settings: Settings,
    weights: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Assign the cells of all slides to domains.

    Parameters
    ----------
    latents
        What `embed_slide` wrote of all slides, in any order.
    output
        Folder to make: ``<sample>.domains.parquet`` of each slide, ``domains.json``, and the model in ``model``, with
        the prototypes that were used.
    settings
        Groups ``domains``, ``domains_level`` and ``resources``. Zero-shot makes prototypes of a sample of all slides'
        latents; else the model's are used.
    weights
        The model that the latents are of, where it lies elsewhere than settings say.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        `output`.

    Raises
    ------
    CellquiltError
        ``latents-invalid``, ``latents-of-another-model``, ``slide-twice``, ``too-few-cells``,
        ``n-domains-impossible``.
    """
    from cellquilt.domains.model import threads_of

    refuse_existing(output, overwrite)
    files, seed = LatentFiles(latents), settings["domains_seed"]
    model, of, pca = _model(settings, weights)
    for path in files.paths:
        if about_file(path).get("model") != of:
            raise CellquiltError(
                "latents-of-another-model", f"{path.name} is of another model", "embed all slides with one model"
            )
    with threads_of(settings["threads"]):
        if settings["domains"] == "zeroshot" or not len(model.prototypes):
            model.make_prototypes(files, n_domains=settings["domains_n"], seed=seed)
        used = np.unique(np.concatenate([np.unique(model.leaves(part)) for part in files]))
        place, names, level = _domains(model, used[used >= 0], settings)
        with atomic_path(output, overwrite=overwrite) as aside:
            aside.mkdir()
            model.save_pretrained(aside / "model")
            if pca is not None:
                pca.save(aside / "model")
            about = _about(model, settings, level, used)
            about |= {} if pca is None else {"image": scrub(dict(pca.about))}
            about |= {"model_sha256": checksum(aside / "model"), "start_sha256": of}
            judge = None
            if len(names) <= _MOST_JUDGED:
                # Prototypes that no cell is nearest to say nothing of a domain.
                judge = model.judge(files, np.where(np.isin(np.arange(len(place)), used), place, -1), seed=seed)
            else:
                LOG.warning("how sure domains are is judged of up to %d, not of %d", _MOST_JUDGED, len(names))
            counts: dict[str, dict[str, int]] = {}
            without: dict[str, int] = {}
            for cells in files.cells():
                leaf = model.leaves(cells.latents)
                domain = np.append(place, -1)[leaf]
                sure = None if judge is None else judge.confidence(cells.latents, domain, len(names))
                found = replace(cells, leaf=leaf, domain=domain, names=names, confidence=sure, about=about)
                found.write(aside / f"{cells.sample}{DOMAINS_FILE}")
                counts[cells.sample] = found.counts
                without[cells.sample] = int((domain < 0).sum())
            shown = {**about, "domains": names, "n_cells": counts, "n_cells_without_domain": without}
            (aside / "domains.json").write_text(json.dumps(shown, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    total: Counter[str] = Counter()
    for each in counts.values():
        total.update(each)
    LOG.info("%d slides, %d domains: %s", len(files), len(names), ", ".join(f"{name} {total[name]}" for name in names))
    return output


def _domains(
    model: "Model", used: NDArray[np.int64], settings: Settings
) -> tuple[NDArray[np.int64], list[str], int | None]:
    """Domain of each prototype, the domains' names, and the level of the tree that they are at."""
    n, resolution, level = settings["domains_n"], settings["domains_resolution"], settings["domains_level"]
    if resolution is not None:
        return *model.domains_of(used, resolution=resolution), None
    if n is not None:
        level = model.hierarchy.level_of(n, used)
    elif level > model.hierarchy.n_prototypes:
        LOG.warning("level %d is asked for, and there are %d prototypes", level, model.hierarchy.n_prototypes)
        level = model.hierarchy.n_prototypes
    return *model.domains_of(used, level=level), level


def _about(model: "Model", settings: Settings, level: int | None, used: NDArray[np.int64]) -> dict[str, Any]:
    """How domains were found, as plain data without paths."""
    packages = (*_NUMERICAL, "torch") if model.encoder.recipe == "published" else _NUMERICAL
    return scrub(
        {
            "mode": settings["domains"],
            "recipe": model.encoder.recipe,
            "level_asked": settings["domains_level"],
            "level_used": level,
            "seed": settings["domains_seed"],
            "n_genes": len(model.vocabulary),
            "n_prototypes": len(model.prototypes),
            "n_prototypes_used": int((used >= 0).sum()),
            "parameters": settings.of_stage("domains_assign"),
            "versions": {"cellquilt": __version__, **{name: version(name) for name in packages}},
        }
    )


def annotate_table(
    table: Path,
    output: Path,
    *,
    domains: Path,
    graph: Path | None = None,
    sample: str | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a copy of a cell table with the domains of its cells.

    Parameters
    ----------
    table
        What `prepare_slide` was given.
    output
        The copy to make, of the same kind. It gets ``obs["domain"]``, ``obs["domain_leaf"]``,
        ``obsm["niche_latent"]`` (zeros for cells that have none), and what `Model.domain_confidence` gives.
    domains
        The slide's file of what `assign_domains` wrote.
    graph
        What `prepare_slide` wrote: the copy gets ``obsp["spatial_distances"]`` and ``obsp["spatial_connectivities"]``.
    sample
        The slide's name, for ``obs["sample"]``; what stood there before, if it is another, is in
        ``obs["table_sample"]``. None leaves it.
    metadata
        Columns of the sheet for `obs`; one that is there already becomes ``sheet_<name>``.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        `output`.

    Raises
    ------
    CellquiltError
        ``domains-mismatch`` if the domains are of other cells.
    """
    table, output = Path(table), Path(output)
    refuse_existing(output, overwrite)
    found = read_cells(domains)
    with atomic_path(output, overwrite=overwrite) as aside:
        if not table.is_dir():
            import h5py

            shutil.copyfile(table, aside)
            with h5py.File(aside, "r+") as file:
                _annotate(file, found, graph, sample, metadata or {})
            return output
        shutil.copytree(table, aside)
        inside = aside / "tables" / _table_name(table)
        _annotate_zarr(inside if inside.is_dir() else aside, found, graph, sample, metadata or {})
        if inside.is_dir():
            consolidate(aside)
    return output


def add_to_table(store: Store, delta: Store, *, domains: Path, graph: Path | None = None) -> None:
    """Add domains to a slide's ``table``: the table of a store that is being made.

    Parameters
    ----------
    store
        Where the table is.
    delta
        Where the table with domains shall be.
    domains, graph
        See `annotate_table`.

    Notes
    -----
    The record says how many domains and cells with one there are, and how they were found.
    """
    found = read_cells(domains)
    element = delta.new_element("tables", "table")
    shutil.copytree(store.element("tables", "table"), element)
    _annotate_zarr(element, found, graph)
    if graph is not None:
        for made in Store(graph).records:
            delta.add_record(made)
    about = dict(found.about or {})
    record = Record("domains", store.name, about.pop("parameters", {}))
    assert found.domain is not None
    used = about.pop("versions", {})
    record.facts |= {**about, "n_domains": len(found.counts), "n_cells_with_domain": int((found.domain >= 0).sum())}
    record.facts["checksums"] = {"domains_model": about.get("model_sha256", "")}
    delta.add_record({**record.finish(), "versions": used})


def _annotate_zarr(
    folder: Path,
    found: CellDomains,
    graph: Path | None,
    sample: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    import zarr

    _annotate(zarr.open_group(folder, mode="r+", use_consolidated=False), found, graph, sample, metadata or {})
    consolidate(folder)


def _annotate(
    group: Any, found: CellDomains, graph: Path | None, sample: str | None, metadata: Mapping[str, str]
) -> None:
    """Add columns to an open table of AnnData's layout."""
    import pandas as pd
    from anndata.io import read_elem, write_elem

    assert found.leaf is not None
    assert found.domain is not None
    obs: Any = read_elem(group["obs"])
    if not np.array_equal(obs.index.to_numpy().astype(str), found.cells.astype(str)):
        raise CellquiltError(
            "domains-mismatch",
            f"{found.sample}: the domains are of {len(found.cells)} cells, the table has other {len(obs)}",
            "find the domains of this table again",
        )
    leaves = np.unique(found.leaf[found.leaf >= 0])
    place = np.append(np.searchsorted(leaves, np.arange(leaves.max(initial=-1) + 1)), -1)
    obs[DOMAIN] = pd.Categorical.from_codes(found.domain, list(found.names))
    obs[LEAF] = pd.Categorical.from_codes(place[found.leaf], [leaf_name(number) for number in leaves.tolist()])
    if sample is not None:
        before = obs.get("sample")
        if before is not None and not (before.astype(str) == sample).all():
            obs["table_sample"] = before
        metadata = {**metadata, "sample": sample}
    for name, value in metadata.items():
        column = f"sheet_{name}" if name in obs and name != "sample" else name
        obs[column] = pd.Categorical.from_codes(np.zeros(len(obs), dtype=np.int8), [value])
    parts: dict[str, dict[str, Any]] = {"obsm": {LATENT: np.nan_to_num(found.latents)}}
    if found.confidence is not None:
        obs[CONFIDENCE], obs[STABILITY] = found.confidence.own, found.confidence.stability
        parts["obsm"][PROBABILITIES] = pd.DataFrame(
            found.confidence.probabilities, index=obs.index, columns=list(found.names)
        )
    if graph is not None:
        parts["obsp"] = matrices_of(read_slide(graph).graph)
        parts["uns"] = {ABOUT: zarr_json.read_attributes(graph)["cellquilt"]["graph"]}
    write_elem(group, "obs", obs)
    for part, elements in parts.items():
        if part not in group:
            write_elem(group, part, {})
        for name, element in elements.items():
            write_elem(group[part], name, element)
