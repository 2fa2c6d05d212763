"""The model in use: latents of the cells of slides, the nearest prototype of each, and domains."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.domains.checkpoint import needs_torch, read_checkpoint
from cellquilt.domains.expression import Vocabulary
from cellquilt.domains.hierarchy import Hierarchy, communities
from cellquilt.domains.hub import model_folder
from cellquilt.domains.prototypes import Metric, Prototypes
from cellquilt.domains.slides import SlideCells, Slides
from cellquilt.domains.stability import Judge, Levels, stable_levels
from cellquilt.spatial.tables import ABOUT, slides_of, tables_of

if TYPE_CHECKING:
    from anndata import AnnData

LATENT, LEAF, DOMAIN = "niche_latent", "domain_leaf", "domain"
RECIPES = ("factors", "published")
#: Cells that prototypes are made from, of all slides together.
_SAMPLE = 100_000


class Encoder(Protocol):
    """What both kinds of models are to the rest: slides in, latents out."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The genes that it knows."""

    @property
    def recipe(self) -> str:
        """One of `RECIPES`."""

    @property
    def metric(self) -> Metric:
        """How latents are compared."""

    @property
    def size(self) -> int:
        """Numbers of a latent."""

    @property
    def n_prototypes(self) -> int:
        """Most prototypes that are made."""

    def prepare(self, slides: Slides) -> Slides:
        """What is chosen for a cohort in memory as a whole."""

    def encode(self, slide: SlideCells) -> NDArray[np.float32]:
        """(n_cells, size) latents; NaN for cells that have none."""

    def save(self, folder: Path, prototypes: Prototypes) -> Path:
        """Write the model's folder."""


class Model:
    """A model of spatial domains.

    Parameters
    ----------
    encoder
        From slides to latents.
    prototypes
        What latents are assigned to.

    Examples
    --------
    >>> import cellquilt as cq                                              # doctest: +SKIP
    >>> cq.spatial_neighbors(adatas, radius=80)                             # doctest: +SKIP
    >>> model = cq.domains.Model.train(adatas)                              # doctest: +SKIP
    >>> model.compute_representations(adatas)                               # doctest: +SKIP
    >>> model.assign_domains(adatas, n_domains=7)                           # doctest: +SKIP
    """

    def __init__(self, encoder: Encoder, prototypes: Prototypes) -> None:
        self.encoder, self._prototypes = encoder, prototypes

    @classmethod
    def from_pretrained(cls, path: Path | str, *, revision: str | None = None) -> "Model":
        """Load a model: ours, or one saved by novae.

        Parameters
        ----------
        path
            Its folder; ``default``, the model that comes with the package; or ``owner/name`` on a model hub, which
            needs the package huggingface_hub.
        revision
            Branch, tag or commit on the hub.

        Raises
        ------
        CellquiltError
            ``model-missing``, ``model-invalid``, and from a hub ``package-missing``, ``hub-unreachable``,
            ``hub-file-missing``; ``revision-unused``.
        """
        return cls(*read_checkpoint(model_folder(path, revision)))

    @classmethod
    def train(
        cls,
        adata: "AnnData | Sequence[AnnData] | Slides",
        *,
        recipe: str = "factors",
        start: "Model | None" = None,
        n_domains: int | None = None,
        kind: str | None = None,
        seed: int = 0,
        threads: int = 1,
        **options: Any,
    ) -> "Model":
        """Make a model of slides, or go on from one.

        Parameters
        ----------
        adata
            Tables with a graph, or slides on disk.
        recipe
            ``factors``, in closed form (see `cellquilt.domains.factors`), or ``published``: graph attention trained by
            swapped assignments (see `cellquilt.domains.published.training`).
        start
            Fine-tune this model; its recipe is used.
        n_domains
            How many domains are wanted, if that is known: the tree of the prototypes is best there.
        kind
            What X holds; None looks at it.
        seed
            Of everything that is drawn.
        threads
            Threads of the model.
        **options
            Of the published recipe, see `published.training.TrainingOptions`.

        Raises
        ------
        CellquiltError
            ``recipe-unknown``, ``options-unknown``, ``too-few-cells``, ``genes-unknown``, ``kinds-differ`` and what the
            tables are refused for.
        """
        recipe = start.encoder.recipe if start else recipe
        if recipe not in RECIPES:
            raise CellquiltError("recipe-unknown", f'unknown recipe "{recipe}"', f"one of {', '.join(RECIPES)}")
        slides = adata if isinstance(adata, Slides) else Slides.of_tables(tables_of(adata), kind)
        if not len(slides):
            raise CellquiltError("too-few-cells", "there are no slides", "give tables with cells")
        with threads_of(threads):
            if recipe == "published":
                with needs_torch():
                    from cellquilt.domains.published.training import train_published

                return cls(*train_published(slides, start=start, seed=seed, **options))
            if options:
                raise CellquiltError(
                    "options-unknown", f'recipe "factors" has no {", ".join(sorted(options))}', "leave them out"
                )
            from cellquilt.domains.factors import FactorEncoder, fit_factors

            old = start.encoder if start else None
            assert old is None or isinstance(old, FactorEncoder)
            encoder = fit_factors(slides, start=old, seed=seed)
            nothing = Prototypes(np.zeros((0, encoder.size), dtype=np.float32), encoder.metric)
            model = cls(encoder, nothing)
            model.make_prototypes_of(slides, n_domains=n_domains, seed=seed)
            return model

    def save_pretrained(self, path: Path | str) -> Path:
        """Write the model's folder, ``config.json`` and ``model.safetensors``."""
        return self.encoder.save(Path(path), self._prototypes)

    @property
    def vocabulary(self) -> Vocabulary:
        """The genes that the model knows."""
        return self.encoder.vocabulary

    @property
    def prototypes(self) -> NDArray[np.float32]:
        """(n_prototypes, size) float32."""
        return self._prototypes.vectors

    @property
    def hierarchy(self) -> Hierarchy:
        """The tree of the prototypes."""
        return self._prototypes.hierarchy

    def compute_representations(
        self,
        adata: "AnnData | Sequence[AnnData]",
        *,
        zero_shot: bool = False,
        n_domains: int | None = None,
        kind: str | None = None,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        """Latents and nearest prototypes of all cells.

        Parameters
        ----------
        adata
            One or several tables with a graph; see `cellquilt.spatial_neighbors`. They get ``obsm["niche_latent"]``
            (zeros for cells that have none) and ``obs["domain_leaf"]`` (missing for these).
        zero_shot
            Make prototypes of these slides' latents first.
        n_domains
            How many domains are wanted of them, if that is known: the tree of the prototypes is best there.
        kind
            What X holds, one of `expression.KINDS`; None looks at it.
        seed
            Of the sample and the clustering for zero-shot.
        threads
            Threads of the model.

        Raises
        ------
        CellquiltError
            ``graph-missing``, ``genes-unknown``, ``kinds-differ``, ``image-embeddings``, what `expression.kind_of`
            refuses, and ``too-few-cells`` for zero-shot.
        """
        tables = tables_of(adata)
        slides = self.encoder.prepare(Slides.of_tables(tables, kind))
        with threads_of(threads):
            latents = [self.encoder.encode(slide) for slide in slides]
            if zero_shot:
                self.make_prototypes(latents, n_domains=n_domains, seed=seed)
        rest = iter(latents)
        for table in tables:
            about: Any = table.uns.get(ABOUT, {})
            together = np.full((table.n_obs, self.encoder.size), np.nan, dtype=np.float32)
            for slide in slides_of(table, about.get("slide_key")):
                together[slide.rows] = next(rest)
            self._write(table, together)

    def make_prototypes(
        self, latents: Sequence[NDArray[np.float32]], *, n_domains: int | None = None, seed: int = 0
    ) -> None:
        """Prototypes of the latents at hand, by k-means of a sample of all slides.

        Parameters
        ----------
        latents
            Of each slide (n_cells, size); NaN for cells that have none.
        n_domains
            How many domains are wanted, if that is known.
        seed
            Of the sample and the clustering.

        Raises
        ------
        CellquiltError
            ``too-few-cells``.
        """
        sample = sample_of(latents, seed)
        given = {} if n_domains is None else {"n_domains": n_domains}
        self._prototypes = Prototypes.of_latents(sample, self.encoder.metric, self.encoder.n_prototypes, seed, **given)

    def make_prototypes_of(self, slides: Slides, *, n_domains: int | None = None, seed: int = 0) -> None:
        """Prototypes of slides; of each only a sample of its latents is kept. See `make_prototypes`."""
        share = max(_SAMPLE // len(slides), 100)
        sample = [sample_of([self.encoder.encode(slide)], seed, share) for slide in slides]
        self.make_prototypes(sample, n_domains=n_domains, seed=seed)

    def leaves(self, latents: NDArray[np.float32]) -> NDArray[np.int64]:
        """(n_cells,) nearest prototype of each latent, -1 for cells that have none."""
        valid = np.isfinite(latents).all(axis=1)
        found = np.full(len(latents), -1, dtype=np.int64)
        found[valid] = self._prototypes.nearest(latents[valid])[0]
        return found

    def _write(self, table: "AnnData", latents: NDArray[np.float32]) -> None:
        import pandas as pd

        codes = self.leaves(latents)
        table.obsm[LATENT] = np.nan_to_num(latents)
        table.obs[LEAF] = pd.Categorical.from_codes(codes, [f"D{number}" for number in range(len(self.prototypes))])

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
        node, names = self.domains_of(used, level=level, n_domains=n_domains, resolution=resolution)
        place = np.append(node, -1)
        for table, codes in zip(tables, leaves, strict=True):
            table.obs[key_added] = pd.Categorical.from_codes(place[codes], names)
        return key_added

    def stable_levels(
        self,
        adata: "AnnData | Sequence[AnnData]",
        *,
        levels: Sequence[int] = tuple(range(2, 21)),
        bootstraps: int = 8,
        seed: int = 0,
    ) -> Levels:
        """Numbers of domains and how surely each is found again; see `stability.stable_levels`."""
        sample = sample_of([_latents(table) for table in tables_of(adata)], seed)
        return stable_levels(sample, self.encoder.metric, levels=levels, bootstraps=bootstraps, seed=seed)

    def domain_confidence(
        self,
        adata: "AnnData | Sequence[AnnData]",
        *,
        domain_key: str = DOMAIN,
        bootstraps: int = 8,
        seed: int = 0,
    ) -> None:
        """How sure the domain of each cell is.

        Tables get ``obsm["{domain}_probabilities"]``, a column a domain; ``obs["{domain}_confidence"]``, that of the
        cell's own domain; and ``obs["{domain}_stability"]``, the share of bootstrap samples by which the cell gets it
        again. Cells without a domain have NaN.

        Raises
        ------
        CellquiltError
            ``latents-missing``.
        """
        import pandas as pd

        tables = tables_of(adata)
        latents = [_latents(table) for table in tables]
        if any(domain_key not in table.obs for table in tables):
            raise CellquiltError("latents-missing", f'obs has no "{domain_key}"', "run assign_domains on the tables")
        columns: list[Any] = [table.obs[domain_key] for table in tables]
        names = sorted({str(name) for column in columns for name in column.dropna().unique()}, key=_by_number)
        codes = [pd.Categorical(table.obs[domain_key].astype("object"), names).codes for table in tables]
        domain = np.full(len(self.prototypes), -1, dtype=np.int64)
        for table, code in zip(tables, codes, strict=True):
            leaf = table.obs[LEAF].cat.codes.to_numpy()
            domain[leaf[code >= 0]] = code[code >= 0]
        judge = self.judge(latents, domain, bootstraps=bootstraps, seed=seed)
        for table, part, code in zip(tables, latents, codes, strict=True):
            found = judge.confidence(part, code, len(names))
            table.obsm[f"{domain_key}_probabilities"] = pd.DataFrame(
                found.probabilities, index=table.obs_names, columns=names
            )
            table.obs[f"{domain_key}_confidence"] = found.own
            table.obs[f"{domain_key}_stability"] = found.stability

    def judge(
        self, latents: Sequence[NDArray[np.float32]], domain: NDArray[np.int64], *, bootstraps: int = 8, seed: int = 0
    ) -> Judge:
        """What says how sure domains are, of a sample of all slides' latents.

        Parameters
        ----------
        latents
            Of each slide (n_cells, size); NaN for cells that have none.
        domain
            (n_prototypes,) the domain of each, -1 for those that no cell has.
        bootstraps, seed
            See `domain_confidence`.
        """
        return Judge.of(self._prototypes, domain, sample_of(latents, seed), bootstraps=bootstraps, seed=seed)

    def domains_of(
        self,
        used: NDArray[np.integer],
        *,
        level: int = 7,
        n_domains: int | None = None,
        resolution: float | None = None,
    ) -> tuple[NDArray[np.int64], list[str]]:
        """Domains of prototypes; see `assign_domains`.

        Parameters
        ----------
        used
            Numbers of the prototypes that cells are assigned to, ascending.

        Returns
        -------
        domain, names
            (n_prototypes,) int64 the domain of each prototype, -1 for those of domains that no cell has; and the names
            of the domains.
        """
        if resolution is not None:
            node, letter = communities(self.prototypes, resolution), "L"
        else:
            level = level if n_domains is None else self.hierarchy.level_of(n_domains, np.asarray(used))
            node, letter = self.hierarchy.nodes_at(level), "D"
        there = np.unique(node[used])
        place = np.where(np.isin(node, there), np.searchsorted(there, node), -1)
        return place, [f"{letter}{number}" for number in there.tolist()]


def sample_of(latents: Sequence[NDArray[np.float32]], seed: int, most: int = _SAMPLE) -> NDArray[np.float32]:
    """(n, size) some of the latents of slides, of each the same share; those that are NaN are left out."""
    valid = [np.isfinite(part).all(axis=1) for part in latents]
    share = min(1.0, most / max(sum(int(part.sum()) for part in valid), 1))
    found = []
    for number, (part, there) in enumerate(zip(latents, valid, strict=True)):
        rows = np.flatnonzero(there)
        n = round(share * rows.size)
        if n < rows.size:
            rows = np.sort(np.random.default_rng([seed, number]).choice(rows, n, replace=False))
        found.append(part[rows])
    return np.concatenate(found)


def _latents(table: "AnnData") -> NDArray[np.float32]:
    """(n_cells, size) of a table, NaN for cells that have none."""
    if LATENT not in table.obsm:
        raise CellquiltError(
            "latents-missing", f'obsm has no "{LATENT}"', "run compute_representations on the tables first"
        )
    found = np.array(table.obsm[LATENT], dtype=np.float32)
    found[~found.any(axis=1)] = np.nan
    return found


def _by_number(name: str) -> tuple[str, int]:
    return name.rstrip("0123456789"), int("0" + name.lstrip("DL"))


@contextmanager
def threads_of(number: int) -> Iterator[None]:
    """Threads of torch, where it is in use, of our own kernels and of all other libraries; set back at the end.

    Sums depend on how many there are; and clustering that takes all processors of a busy machine waits for them.
    """
    import sys

    import numba
    import sklearn.cluster  # noqa: F401  only the libraries that are loaded are limited
    from threadpoolctl import threadpool_limits

    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0, numba.get_num_threads()
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    if torch:
        torch.set_num_threads(number)
    numba.set_num_threads(min(number, most))
    try:
        with threadpool_limits(number):
            yield
    finally:
        if torch:
            torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
