"""The model in use: latents of the cells of slides, the nearest prototype of each, and domains."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG, progress
from cellquilt.domains.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from cellquilt.domains.expression import Expression, log_normalized, slide_expression, variable_genes
from cellquilt.domains.hierarchy import Hierarchy, communities
from cellquilt.domains.neighbourhoods import at, make_batch, within
from cellquilt.domains.tables import ABOUT, graph_of, slides_of, tables_of
from cellquilt.geometry.neighbours import SpatialGraph

if TYPE_CHECKING:
    from anndata import AnnData

LATENT, LEAF, DOMAIN, IMAGE = "niche_latent", "domain_leaf", "domain", "histo_embeddings"
_CELLS_AT_ONCE = 4096  # whose expression is dense at a time
#: Neighbourhoods at a time: few enough that their nodes stay in the processor's cache.
_BATCH = 128
#: Cells that zero-shot prototypes are made from, of all slides together.
_SAMPLE = 100_000
#: Cells that a prototype should have at least, where there are few.
_CELLS_A_PROTOTYPE = 4


class Model:
    """A model of spatial domains.

    Parameters
    ----------
    checkpoint
        Network, vocabulary and configuration.

    Examples
    --------
    >>> import cellquilt as cq                                              # doctest: +SKIP
    >>> cq.spatial_neighbors(adatas, radius=80)                             # doctest: +SKIP
    >>> model = cq.domains.Model.from_pretrained("my-model")                # doctest: +SKIP
    >>> model.compute_representations(adatas, zero_shot=True)               # doctest: +SKIP
    >>> model.assign_domains(adatas, n_domains=7)                           # doctest: +SKIP
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._hierarchy: Hierarchy | None = None

    @classmethod
    def from_pretrained(cls, path: Path | str) -> "Model":
        """Load a model from its folder: ours, or one saved by novae.

        Raises
        ------
        CellquiltError
            ``model-missing``, ``model-invalid``.
        """
        return cls(read_checkpoint(Path(path)))

    def save_pretrained(self, path: Path | str) -> Path:
        """Write the model's folder, ``config.json`` and ``model.safetensors``."""
        return write_checkpoint(self.checkpoint, Path(path))

    @property
    def prototypes(self) -> NDArray[np.float32]:
        """(n_prototypes, size) float32."""
        found: NDArray[np.float32] = self.checkpoint.network.prototypes.detach().numpy()
        return found

    @property
    def hierarchy(self) -> Hierarchy:
        """The tree of the prototypes."""
        if self._hierarchy is None:
            self._hierarchy = Hierarchy.of(self.prototypes)
        return self._hierarchy

    def compute_representations(
        self,
        adata: "AnnData | Sequence[AnnData]",
        *,
        zero_shot: bool = False,
        kind: str | None = None,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        """Latents and nearest prototypes of all cells.

        Parameters
        ----------
        adata
            One or several tables with a graph; see `cellquilt.spatial_neighbors`. They get ``obsm["niche_latent"]``
            (zeros for cells that no cell is two hops away from) and ``obs["domain_leaf"]`` (missing for these).
        zero_shot
            Make prototypes of these slides' latents first.
        kind
            What X holds, ``counts`` or ``log1p``; None looks at it.
        seed
            Of the sample and the clustering for zero-shot.
        threads
            Threads of the network.

        Raises
        ------
        CellquiltError
            ``graph-missing``, ``genes-unknown``, ``image-embeddings``, what `expression.kind_of` refuses, and
            ``too-few-cells`` for zero-shot.
        """
        tables = tables_of(adata)
        logs = [log_normalized(table, kind) for table in tables]
        with _threads(threads):
            for table, log, used in zip(tables, logs, variable_genes(logs), strict=True):
                self._represent(table, log, used)
        if zero_shot:
            latents = np.concatenate([np.asarray(table.obsm[LATENT])[_valid(table)] for table in tables])
            self._make_prototypes(latents, seed)
        for table in tables:
            self._nearest(table)

    def _represent(self, table: "AnnData", log: "AnnData", used: NDArray[np.bool_]) -> None:
        size = self.checkpoint.network.sizes.output_size
        latents = np.zeros((table.n_obs, size), dtype=np.float32)
        image = self._image(table)
        about: Any = table.uns.get(ABOUT, {})
        for slide in slides_of(table, about.get("slide_key")):
            graph = graph_of(table, slide.rows)
            whole = slide.rows.size == table.n_obs
            expression = slide_expression(log if whole else log[slide.rows], used, self.checkpoint.vocabulary)
            of_slide = None if image is None else image[slide.rows]
            latents[slide.rows] = encode_slide(self.checkpoint, graph, expression, of_slide, slide.name)
        table.obsm[LATENT] = latents

    def _image(self, table: "AnnData") -> NDArray[np.float32] | None:
        """What an image shows around each cell, where the model was trained with it."""
        wanted = bool((self.checkpoint.config.get("mode_kwargs") or {}).get("multimodal"))
        if wanted != (IMAGE in table.obsm):
            there = "has none" if wanted else "has some"
            raise CellquiltError(
                "image-embeddings",
                f'the model was trained {"with" if wanted else "without"} an image, and obsm["{IMAGE}"] {there}',
                "use a model of the same kind, or " + ("compute them" if wanted else "remove them"),
            )
        if not wanted:
            return None
        found: NDArray[np.float32] = np.asarray(table.obsm[IMAGE], dtype=np.float32)
        expected = self.checkpoint.network.sizes.histo_embedding_size
        if found.shape[1] != expected:
            raise CellquiltError(
                "image-embeddings", f'obsm["{IMAGE}"] has {found.shape[1]} numbers a cell, the model takes {expected}'
            )
        return found

    def _make_prototypes(self, latents: NDArray[np.float32], seed: int) -> None:
        from sklearn.cluster import MiniBatchKMeans

        rng = np.random.default_rng(seed)
        if len(latents) > _SAMPLE:
            latents = latents[np.sort(rng.choice(len(latents), _SAMPLE, replace=False))]
        n = min(self.checkpoint.network.sizes.num_prototypes, len(latents) // _CELLS_A_PROTOTYPE)
        if n < 2:
            raise CellquiltError(
                "too-few-cells", f"{len(latents)} cells are too few to make prototypes of", "use more slides"
            )
        unit = latents / np.maximum(np.linalg.norm(latents, axis=1, keepdims=True), 1e-8)
        found = MiniBatchKMeans(n, random_state=seed, n_init=3, batch_size=4096).fit(unit.astype(np.float64))
        centres = found.cluster_centers_ / np.maximum(np.linalg.norm(found.cluster_centers_, axis=1)[:, None], 1e-8)
        self.checkpoint.network.prototypes = torch.nn.Parameter(torch.from_numpy(centres.astype(np.float32)))
        self._hierarchy = None

    def _nearest(self, table: "AnnData") -> None:
        import pandas as pd

        valid = _valid(table)
        latents = torch.from_numpy(table.obsm[LATENT])
        with torch.no_grad():  # a block at a time: all cells × all prototypes would be large
            blocks = [self.checkpoint.network.project(block).argmax(dim=1) for block in latents.split(_CELLS_AT_ONCE)]
        nearest = torch.cat(blocks).numpy() if blocks else np.zeros(0, dtype=np.int64)
        leaves = [f"D{number}" for number in range(len(self.prototypes))]
        codes = np.where(valid, nearest, -1)
        table.obs[LEAF] = pd.Categorical.from_codes(codes, leaves)

    def assign_domains(
        self,
        adata: "AnnData | Sequence[AnnData]",
        level: int = 7,
        n_domains: int | None = None,
        resolution: float | None = None,
        key_added: str = DOMAIN,
    ) -> str:
        """Domains of all cells, in a column of `obs`.

        Parameters
        ----------
        adata
            Tables with latents.
        level
            Nodes of the tree that all prototypes are merged into: the domains in these slides may be fewer.
        n_domains
            How many domains these slides have together, instead.
        resolution
            Of a Leiden clustering of the prototypes, instead.
        key_added
            Name of the column.

        Returns
        -------
        str
            `key_added`.

        Raises
        ------
        CellquiltError
            ``latents-missing``, ``level-unknown``, ``n-domains-impossible``.
        """
        import pandas as pd

        tables = tables_of(adata)
        if any(LEAF not in table.obs for table in tables):
            raise CellquiltError(
                "latents-missing", f'obs has no "{LEAF}"', "run compute_representations on the tables first"
            )
        leaves = [table.obs[LEAF].cat.codes.to_numpy() for table in tables]
        used = np.unique(np.concatenate([codes[codes >= 0] for codes in leaves]))
        if resolution is not None:
            node, letter = communities(self.prototypes, resolution), "L"
        else:
            level = level if n_domains is None else self.hierarchy.level_of(n_domains, used)
            node, letter = self.hierarchy.nodes_at(level), "D"
        there = np.unique(node[used])
        place = np.append(np.searchsorted(there, node), -1)
        names = [f"{letter}{number}" for number in there.tolist()]
        for table, codes in zip(tables, leaves, strict=True):
            found = np.where(codes >= 0, place[codes], -1)
            table.obs[key_added] = pd.Categorical.from_codes(found, names)
        return key_added


def _valid(table: "AnnData") -> NDArray[np.bool_]:
    return np.asarray(table.obsm[LATENT]).any(axis=1)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Threads of torch and of our own kernels, set back at the end."""
    import numba

    before = torch.get_num_threads(), numba.get_num_threads()
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    torch.set_num_threads(number)
    numba.set_num_threads(min(number, most))
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


@torch.no_grad()
def encode_slide(
    checkpoint: Checkpoint,
    graph: SpatialGraph,
    expression: Expression,
    image: NDArray[np.float32] | None = None,
    name: str = "slide",
) -> NDArray[np.float32]:
    """Latents of all cells of a slide, exactly as each neighbourhood by itself would give them.

    The projections of the first layer are those of cells, whatever neighbourhood they are in: they are made once.

    Parameters
    ----------
    checkpoint
        The model.
    graph
        The slide's.
    expression
        Its cells'.
    image
        (n_cells, histo_embedding_size) for models with an image.
    name
        For the log.

    Returns
    -------
    numpy.ndarray
        (n_cells, output_size) float32; zeros for cells from which no cell is as many hops away as the model's views.
    """
    network, config = checkpoint.network, checkpoint.config
    near = within(graph, int(config["n_hops_local"]))
    far = at(graph, int(config.get("n_hops_view", config["n_hops_local"])))
    valid = np.flatnonzero(np.diff(far.indptr))
    out = np.zeros((len(graph), network.sizes.output_size), dtype=np.float32)
    if valid.size < 0.7 * len(graph):
        LOG.warning(
            "%s: %d of %d cells have a neighbourhood; a larger radius may be better", name, valid.size, len(graph)
        )
    assert network.cell_embedder is not None
    panel = network.cell_embedder.panel(torch.from_numpy(expression.genes))
    first = network.encoder.first
    left = torch.empty(len(graph), first.lin_l.out_features)
    right = torch.empty_like(left)
    for start in range(0, len(graph), _CELLS_AT_ONCE):
        stop = min(start + _CELLS_AT_ONCE, len(graph))
        embedded = torch.from_numpy(expression.rows(start, stop)) @ panel
        left[start:stop], right[start:stop] = first.lin_l(embedded), first.lin_r(embedded)
    for start in progress(range(0, valid.size, _BATCH), f"{name}: latents"):
        cells = valid[start : start + _BATCH]
        batch = make_batch(graph, near, cells)
        nodes = torch.from_numpy(batch.cells)
        seen = None if image is None else torch.from_numpy(image[cells])
        out[cells] = network.encoder(left[nodes], right[nodes], batch, seen).numpy()
    return out
