"""Slides as a model takes them: a graph and what was measured in its cells, from tables or from stores on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.domains.expression import kind_of
from cellquilt.geometry.neighbours import SpatialGraph
from cellquilt.spatial.tables import ABOUT, DISTANCES, graph_of, slides_of

if TYPE_CHECKING:
    from anndata import AnnData

    from cellquilt.domains.images.pca import ImagePca

IMAGE = "histo_embeddings"
#: What is known of these, in `uns`.
IMAGE_ABOUT = f"{IMAGE}_about"
_STORE = "cellquilt_graph"


@dataclass(frozen=True)
class SlideCells:
    """A slide's cells.

    Attributes
    ----------
    name
        The user's name of the slide.
    graph
        Neighbours.
    matrix
        (n_cells, n_genes) what X holds, CSR or dense; never changed.
    genes
        Names of the columns.
    kind
        What was measured, see `expression.KINDS`.
    xy_um
        (n_cells, 2) float64.
    cells
        Names of the rows.
    image
        (n_cells, size) float32 what an image shows around each cell, or None.
    patch_um
        Width of what is seen of the image around a cell, where that is known.
    target
        Total that the published recipe scales cells to, where it is that of a table of several slides.
    used
        (n_genes,) bool: the genes chosen for a cohort, where they were.
    """

    name: str
    graph: SpatialGraph
    matrix: Any
    genes: list[str]
    kind: str
    xy_um: NDArray[np.float64]
    cells: list[str]
    image: NDArray[np.float32] | None = None
    patch_um: float | None = None
    target: float | None = None
    used: NDArray[np.bool_] | None = field(default=None)

    def __len__(self) -> int:
        return len(self.graph)


class Slides(Sequence[SlideCells]):
    """The slides of a cohort, in the order in which they were given; those on disk are read when they are asked for.

    Of slides on disk the latest is kept: memory does not grow with their number.
    """

    def __init__(
        self,
        slides: Sequence[SlideCells | Path],
        used: "Sequence[NDArray[np.bool_]] | None" = None,
        pca: "ImagePca | None" = None,
    ) -> None:
        self._slides = list(slides)
        self._used, self._pca = used, pca
        self._latest: tuple[int, SlideCells] | None = None

    @classmethod
    def of_tables(cls, tables: "Sequence[AnnData]", kind: str | None = None) -> "Slides":
        """The slides of tables with a graph; see `cellquilt.spatial_neighbors`."""
        return cls([slide for table in tables for slide in slides_of_table(table, kind)])

    @classmethod
    def of_stores(cls, paths: Sequence[Path | str], pca: "ImagePca | None" = None) -> "Slides":
        """Slides that `write_slide` wrote; with `pca` what images show around their cells, too."""
        return cls([Path(path) for path in paths], pca=pca)

    @property
    def in_memory(self) -> bool:
        """Whether none is on disk."""
        return all(isinstance(slide, SlideCells) for slide in self._slides)

    def __len__(self) -> int:
        return len(self._slides)

    def __getitem__(self, number):  # type: ignore[no-untyped-def]
        slide = self._slides[number]
        if not isinstance(slide, SlideCells):
            if self._latest is None or self._latest[0] != number:
                self._latest = None  # let it go before the next is read
                self._latest = (number, read_slide(slide, self._pca))
            slide = self._latest[1]
        return slide if self._used is None else replace(slide, used=self._used[number])

    def with_used(self, used: "Sequence[NDArray[np.bool_]]") -> "Slides":
        """These slides, of each only the genes that were chosen, (n_genes,) bool."""
        return Slides(self._slides, used, self._pca)


def slides_of_table(table: "AnnData", kind: str | None = None) -> list[SlideCells]:
    """The slides of one table, in the order of their names.

    Parameters
    ----------
    table
        With a graph.
    kind
        What X holds; None looks at it, and says what it took it for.

    Raises
    ------
    CellquiltError
        ``graph-missing``, what `expression.kind_of` refuses.
    """
    about: Any = table.uns.get(ABOUT, {})
    found = list(slides_of(table, about.get("slide_key")))
    if DISTANCES not in table.obsp:
        graph_of(table, found[0].rows)  # says what lacks
    what = kind_of(table, kind)
    LOG.info("table of %d cells: X is taken for %s", table.n_obs, what)
    image: Any = np.asarray(table.obsm[IMAGE], dtype=np.float32) if IMAGE in table.obsm else None
    target = _median_total(table.X) if what == "counts" else None
    everything: Any = table.X
    out = []
    for slide in found:
        whole = slide.rows.size == table.n_obs
        matrix = everything if whole else everything[slide.rows]
        out.append(
            SlideCells(
                name=slide.name,
                graph=graph_of(table, slide.rows),
                matrix=matrix.tocsr() if hasattr(matrix, "tocsr") else np.asarray(matrix),
                genes=[str(gene) for gene in table.var_names],
                kind=what,
                xy_um=np.asarray(table.obsm["spatial"], dtype=np.float64)[slide.rows],
                cells=[str(cell) for cell in table.obs_names[slide.rows]],
                image=None if image is None else image[slide.rows],
                patch_um=dict(table.uns.get(IMAGE_ABOUT, {})).get("patch_um"),
                target=target,
            )
        )
    return out


def _median_total(matrix: Any) -> float | None:
    total = np.asarray(matrix.sum(axis=1)).ravel()
    some = total[total > 0]
    return float(np.median(some)) if some.size else None


def write_slide(slide: SlideCells, output: Path | str) -> Path:
    """Write a slide as a compact store, which is a plain AnnData Zarr store: counts, coordinates and graph.

    Returns
    -------
    pathlib.Path
        `output`.
    """
    import anndata
    import pandas as pd
    from scipy.sparse import csr_matrix

    matrix = csr_matrix(slide.matrix)
    if slide.kind == "counts":
        most = matrix.data.max(initial=0)
        matrix = matrix.astype(np.uint16 if most < 2**16 else np.uint32)
    table = anndata.AnnData(
        matrix,
        obs=pd.DataFrame(index=pd.Index(slide.cells, dtype=str)),
        var=pd.DataFrame(index=pd.Index(slide.genes, dtype=str)),
        obsm={"spatial": slide.xy_um},  # type: ignore[dict-item]
        obsp={DISTANCES: slide.graph.to_csr()},
        uns={_STORE: {"slide": slide.name, "kind": slide.kind}},
    )
    if slide.patch_um is not None:
        table.uns[_STORE]["patch_um"] = slide.patch_um
    if slide.image is not None:
        table.obsm[IMAGE] = slide.image
    if slide.used is not None:
        table.var["highly_variable"] = slide.used
    output = Path(output)
    with atomic_path(output) as part:
        table.write_zarr(part)
    return output


def read_slide(path: Path | str, pca: "ImagePca | None" = None) -> SlideCells:
    """Read a slide that `write_slide` wrote.

    Parameters
    ----------
    path
        Its store.
    pca
        Components that the features of its image, if it has some, are brought to; None leaves the features.

    Raises
    ------
    CellquiltError
        ``graph-store-invalid``, ``image-pca-differs``.
    """
    import anndata

    try:
        table = anndata.read_zarr(path)
        about: Any = table.uns[_STORE]
        graph = SpatialGraph.from_csr(table.obsp[DISTANCES])
    except Exception as error:
        raise CellquiltError(
            "graph-store-invalid", f"{path} is no graph store: {error}", "write it again with cellquilt domains prepare"
        ) from error
    image: Any = np.asarray(table.obsm[IMAGE]) if IMAGE in table.obsm else None
    patch_um = about.get("patch_um")
    if pca is not None:
        from cellquilt.domains.images.features import FeatureFile

        features = FeatureFile.find(Path(path))
        if features is not None:
            image, patch_um = features.embeddings(pca), pca.about.get("patch_um")
    return SlideCells(
        name=str(about["slide"]),
        graph=graph,
        matrix=table.X,
        genes=list(table.var_names),
        kind=str(about["kind"]),
        xy_um=np.asarray(table.obsm["spatial"]),
        cells=list(table.obs_names),
        image=image,
        patch_um=None if patch_um is None else float(patch_um),
        used=np.asarray(table.var["highly_variable"]) if "highly_variable" in table.var else None,
    )
