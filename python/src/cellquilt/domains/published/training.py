"""Training of the published recipe: views of a place two hops apart, changed at random, get the same prototypes."""

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.gpus import find_gpus
from cellquilt.core.log import LOG, progress
from cellquilt.domains.devices import device_of
from cellquilt.domains.expression import Expression, Vocabulary
from cellquilt.domains.neighbourhoods import Hops, at, make_batch, within
from cellquilt.domains.prototypes import Prototypes
from cellquilt.domains.published.encoder import PublishedEncoder
from cellquilt.domains.published.expression import GeneChoice, published_expression, with_variable_genes
from cellquilt.domains.published.network import Architecture, Network
from cellquilt.domains.published.swav import SlideQueue, swav_loss
from cellquilt.domains.slides import SlideCells, Slides
from cellquilt.geometry.neighbours import SpatialGraph

if TYPE_CHECKING:
    from cellquilt.domains.model import Model

#: Cells of a slide that an epoch goes through: all of small ones, a share of large ones.
_LEAST_CELLS, _SHARE = 50_000, 0.02
#: Slides on disk that are in memory together, so that an epoch's order is not that of the slides.
_SLIDES_AT_ONCE = 4
_WARM_UP, _FIRST_LR, _LAST_LR = 2, 0.1, 0.01
#: The losses of chance are near ln(prototypes); above this share of it nothing was learned.
_CHANCE = 0.9
#: Of assignments that tell nothing apart the entropy is 1.
_CONVERGED_ENTROPY = 0.75


@dataclass(frozen=True)
class TrainingOptions:
    """How the published recipe trains; the defaults are those of the article and of novae 1.1.2, where they agree.

    They do not about what is added to a gene in a view: 0.125 on average in the article, 1.25 in novae 1.1.2. As
    expression has the deviation 1, 1.25 drowns it: with it the loss stays at chance (see docs/domains.md).

    Attributes
    ----------
    max_epochs, lr, patience, min_delta
        At most so many epochs with this learning rate, which rises for two epochs and then falls; fewer if the loss has
        not fallen by `min_delta` for `patience` epochs.
    batch_size
        Places in a batch, all of one slide.
    panel_share
        Share of a panel's genes that a view sees.
    background, sensitivity_std
        Additions to a gene in a view are exponential with this mean, factors are normal around 1 with this deviation.
    min_prototypes_ratio
        Share of the prototypes that every slide uses at least.
    n_hops_local, n_hops_view
        Radius of a place, and how far apart two views are, in edges.
    embedding_size, hidden_size, heads, num_layers, output_size, num_prototypes, histo_embedding_size
        See `network.Architecture`; the last is by default that of the slides' embeddings of images.
    device
        ``cpu``, ``cuda``, ``cuda:1``, …, or ``auto``.
    mixed_precision
        On a GPU.
    processes
        Processes, or GPUs, that share every epoch's batches.
    state
        A file that is written after every epoch and gone on from where it exists.
    """

    max_epochs: int = 20
    lr: float = 5e-4
    patience: int = 4
    min_delta: float = 0.05
    batch_size: int = 256
    panel_share: float = 0.8
    background: float = 0.125
    sensitivity_std: float = 0.05
    min_prototypes_ratio: float = 0.3
    n_hops_local: int = 2
    n_hops_view: int = 2
    embedding_size: int = 100
    hidden_size: int = 128
    heads: int = 8
    num_layers: int = 10
    output_size: int = 64
    num_prototypes: int = 512
    histo_embedding_size: int = 50
    device: str = "auto"
    mixed_precision: bool = True
    processes: int = 1
    state: Path | None = None

    @classmethod
    def of(cls, **given: Any) -> "TrainingOptions":
        """Check names and values.

        Raises
        ------
        CellquiltError
            ``options-unknown``, ``option-invalid``.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise CellquiltError("options-unknown", f'unknown option "{name}"', did_you_mean(name, known))
        made = cls(**given)
        for name, value in asdict(made).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
                raise CellquiltError("option-invalid", f"{name} is {value}; a number above 0 was expected")
        for name in ("max_epochs", "batch_size", "heads", "num_layers", "num_prototypes", "processes", "n_hops_local"):
            if getattr(made, name) < 1:
                raise CellquiltError("option-invalid", f"{name} is {getattr(made, name)}; 1 or more was expected")
        if made.hidden_size % made.heads:
            raise CellquiltError(
                "option-invalid", f"hidden_size is {made.hidden_size}, which {made.heads} heads do not divide"
            )
        return made

    @property
    def architecture(self) -> Architecture:
        """Sizes of the network."""
        return Architecture(**{name: getattr(self, name) for name in Architecture.__dataclass_fields__})


@dataclass(frozen=True)
class _Views:
    """A slide ready for training."""

    name: str
    graph: SpatialGraph
    near: Hops
    far: Hops
    valid: NDArray[np.int64]
    expression: Expression
    image: NDArray[np.float32] | None


def train_published(
    slides: Slides, *, start: "Model | None" = None, seed: int = 0, **options: Any
) -> tuple[PublishedEncoder, Prototypes]:
    """Train, or go on from a model.

    Parameters
    ----------
    slides
        In memory or on disk.
    start
        A published model to fine-tune; its sizes are kept, and its prototypes made anew of these slides.
    seed
        Of everything that is drawn.
    **options
        See `TrainingOptions`.

    Returns
    -------
    encoder, prototypes
        What a `Model` is made of; ``encoder.config["training"]`` holds the loss, the entropy and the prototypes in use
        of every epoch.
    """
    seen = slides[0].image
    given = TrainingOptions.of(**({} if seen is None else {"histo_embedding_size": seen.shape[1]}) | options)
    torch.manual_seed(seed)
    choice = GeneChoice.of(slides)
    slides = with_variable_genes(slides, choice)
    encoder = _start(slides, start, given, seed)
    encoder.config.pop("variable_genes", None)  # of the model that was gone on from
    if choice is not None and len(choice.genes) < len(slides[0].genes):
        encoder.config |= choice.to_config()
    if given.processes > 1:
        return _train_together(encoder, slides, given, seed)
    return _Training(encoder, slides, given, seed).run()


def _start(slides: Slides, start: "Model | None", options: TrainingOptions, seed: int) -> PublishedEncoder:
    if start is None:
        names = sorted({gene.lower() for slide in slides for gene in _used(slide)})
        network = Network(len(names), options.architecture)
        config = {"n_hops_local": options.n_hops_local, "n_hops_view": options.n_hops_view}
        encoder = PublishedEncoder(network, Vocabulary(names), config)
        _initial_genes(encoder, slides)
        multimodal = slides[0].image is not None
    else:
        from cellquilt.domains.model import Model

        assert isinstance(start.encoder, PublishedEncoder)
        old = start.encoder
        network = Network(len(old.vocabulary), old.network.sizes)
        network.load_state_dict(old.network.state_dict())
        encoder = PublishedEncoder(network.eval(), old.vocabulary, dict(old.config))
        multimodal = bool((old.config.get("mode_kwargs") or {}).get("multimodal"))
        model = Model(encoder, encoder.prototypes)
        model.make_prototypes_of(slides, seed=seed)
        network.set_prototypes(torch.from_numpy(model.prototypes))
    encoder.config["fine_tuned"] = start is not None
    encoder.config["mode_kwargs"] = {**(encoder.config.get("mode_kwargs") or {}), "multimodal": multimodal}
    return encoder


def _used(slide: SlideCells) -> list[str]:
    return (
        slide.genes
        if slide.used is None
        else [gene for gene, used in zip(slide.genes, slide.used, strict=True) if used]
    )


@torch.no_grad()
def _initial_genes(encoder: PublishedEncoder, slides: Slides) -> None:
    """Genes that vary together begin alike: principal components of the slide with most genes."""
    assert encoder.network.cell_embedder is not None
    embedding = encoder.network.cell_embedder.embedding.weight
    largest = max(range(len(slides)), key=lambda number: len(slides[number].genes))
    expression = published_expression(slides[largest], encoder.vocabulary)
    rows = np.linspace(0, len(expression) - 1, min(len(expression), 10_000)).astype(np.int64)
    x = expression.rows(rows).astype(np.float64)
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    size = min(embedding.shape[1], len(values))
    vectors = vectors[:, ::-1][:, :size]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(size)])
    embedding.mul_(0.1)
    embedding[torch.from_numpy(expression.genes), :size] += torch.from_numpy(vectors * np.sqrt(len(values))).float()


class _Training:
    """One process's part of a training."""

    def __init__(
        self, encoder: PublishedEncoder, slides: Slides, options: TrainingOptions, seed: int, rank: int = 0
    ) -> None:
        self.encoder, self.slides, self.options, self.seed, self.rank = encoder, slides, options, seed, rank
        self.device = device_of(options.device, rank)
        self.network = encoder.network.to(self.device).train()
        self.pretrained = bool(encoder.config.get("fine_tuned"))
        self.queue = (
            SlideQueue(len(slides), len(self.network.prototypes), options.min_prototypes_ratio)
            if len(slides) > 1 and options.min_prototypes_ratio < 1
            else None
        )
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=options.lr)
        self.scheduler = _schedule(self.optimizer, options)
        self.scaler = torch.amp.GradScaler(enabled=options.mixed_precision and self.device.type == "cuda")
        self.history: list[dict[str, float]] = []
        self._kept: dict[int, _Views] = {}

    def run(self) -> tuple[PublishedEncoder, Prototypes]:
        """All epochs, or those that a state file has not."""
        self._resume()
        while len(self.history) < self.options.max_epochs and not self._stopped():
            number = len(self.history)
            found = self._epoch(number)
            self.history.append(found)
            self.scheduler.step()
            LOG.info(
                "epoch %d: loss %.3f, entropy %.2f, %d prototypes in use",
                number + 1, found["loss"], found["entropy"], found["prototypes_used"],
            )  # fmt: skip
            self._save()
        self._judge()
        self.network.to("cpu").eval()
        self.encoder.config["training"] = {"epochs": self.history, "seed": self.seed}
        return self.encoder, self.encoder.prototypes

    def _epoch(self, number: int) -> dict[str, float]:
        # The prototypes stay as they are until latents have found to something.
        self.network.prototypes.requires_grad_(number > 0 or self.pretrained)
        losses, entropies = [], []
        used = torch.zeros(len(self.network.prototypes), dtype=torch.int64)
        batches = list(self._batches(number))
        own = batches[self.rank :: self.options.processes][: len(batches) // self.options.processes] or batches
        for step, (slide, cells) in enumerate(progress(own, f"epoch {number + 1}")):
            rng = np.random.default_rng([self.seed, number, step, self.rank])
            loss, entropy, nearest = self._step(slide, cells, rng)
            losses.append(loss)
            entropies.append(entropy)
            used.index_add_(0, nearest, torch.ones_like(nearest))
        together = torch.tensor([np.sum(losses), np.sum(entropies), float(len(losses))], dtype=torch.float64)
        if self.options.processes > 1:
            torch.distributed.all_reduce(together)
            torch.distributed.all_reduce(used)
        # A prototype is in use where it has a tenth of its part.
        in_use = int((used > 0.1 * used.sum() / len(used)).sum())
        most = float(used.max() / max(int(used.sum()), 1))
        return {
            "loss": float(together[0] / together[2]), "entropy": float(together[1] / together[2]),
            "prototypes_used": in_use, "largest_share": most,
        }  # fmt: skip

    def _step(self, slide: int, cells: NDArray[np.int64], rng: np.random.Generator) -> tuple[float, float, Tensor]:
        views = self._views(slide)
        first, last = views.far.indptr[cells], views.far.indptr[cells + 1]
        partners = views.far.indices[first + (rng.random(cells.size) * (last - first)).astype(np.int64)]
        mixed = self.options.mixed_precision and self.device.type == "cuda"
        with torch.autocast(self.device.type) if mixed else nullcontext():
            latents = [self._encode(views, part, rng) for part in (cells, partners.astype(np.int64))]
        with torch.no_grad():
            self.network.prototypes.data = torch.nn.functional.normalize(self.network.prototypes.data, dim=1)
        similar = [self.network.project(part.float()) for part in latents]
        nearest = similar[0].detach().argmax(dim=1).cpu()
        if self.queue is not None:
            numbers = self.queue.prototypes_of(slide, similar[0].detach())
            similar = [part[:, numbers] for part in similar]
        loss, entropy = swav_loss(*similar)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.options.processes > 1:
            _average_gradients(self.network, self.options.processes)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(loss.detach()), float(entropy), nearest

    def _encode(self, views: _Views, cells: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        batch = make_batch(views.graph, views.near, cells)
        n_genes = views.expression.genes.size
        genes = np.sort(rng.permutation(n_genes)[: max(1, int(n_genes * self.options.panel_share))])
        nodes, place = np.unique(batch.cells, return_inverse=True)
        seen = views.expression.rows(nodes)[:, genes][place]
        part = np.repeat(np.arange(cells.size), np.diff(batch.ptr))
        shape = (cells.size, genes.size)
        factor = np.clip(1 + self.options.sensitivity_std * rng.standard_normal(shape, dtype=np.float32), 0, 2)
        added = rng.standard_exponential(shape, dtype=np.float32) * np.float32(self.options.background)
        x = torch.from_numpy(seen * factor[part] + added[part]).to(self.device)
        assert self.network.cell_embedder is not None
        embedded = self.network.cell_embedder(x, torch.from_numpy(views.expression.genes[genes]).to(self.device))
        first = self.network.encoder.first
        image = None if views.image is None else torch.from_numpy(views.image[cells]).to(self.device)
        return self.network.encoder(first.sides(embedded), batch, image)  # type: ignore[no-any-return]

    def _batches(self, number: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Slides and cells of an epoch's batches; slides on disk some at a time."""
        rng = np.random.default_rng([self.seed, number])
        size = self.options.batch_size
        order = rng.permutation(len(self.slides))
        at_once = len(order) if self.slides.in_memory else _SLIDES_AT_ONCE
        for start in range(0, len(order), at_once):
            together = order[start : start + at_once].tolist()
            batches: list[tuple[int, NDArray[np.int64]]] = []
            for slide in together:
                valid = rng.permutation(self._views(slide, together).valid)
                wanted = min(valid.size, max(_LEAST_CELLS, int(_SHARE * valid.size)))
                n_batches = max(1, wanted // size)
                if valid.size < size:
                    valid = rng.choice(valid, size)
                batches += [(slide, valid[k * size : (k + 1) * size]) for k in range(n_batches)]
            yield from (batches[k] for k in rng.permutation(len(batches)))

    def _views(self, number: int, together: list[int] | None = None) -> _Views:
        if number not in self._kept:
            if together is not None and not self.slides.in_memory:
                self._kept = {key: value for key, value in self._kept.items() if key in together}
            slide = self.slides[number]
            graph = slide.graph
            far = at(graph, self.encoder.hops_view)
            valid = np.flatnonzero(np.diff(far.indptr))
            if not valid.size:
                raise CellquiltError(
                    "too-few-cells", f"{slide.name}: no cell is {self.encoder.hops_view} hops from another",
                    "use a larger radius, or leave the slide out",
                )  # fmt: skip
            self._kept[number] = _Views(
                slide.name, graph, within(graph, int(self.encoder.config["n_hops_local"])), far, valid,
                published_expression(slide, self.encoder.vocabulary), self.encoder.image_of(slide),
            )  # fmt: skip
        return self._kept[number]

    def _stopped(self) -> bool:
        """Whether the loss has not fallen lately."""
        losses = [epoch["loss"] for epoch in self.history]
        best, since = np.inf, 0
        for loss in losses:
            best, since = (loss, 0) if loss < best - self.options.min_delta else (best, since + 1)
        return since >= self.options.patience

    def _judge(self) -> None:
        """Say what a reader of the numbers should know."""
        last = self.history[-1]
        chance = np.log(len(self.network.prototypes))
        if last["loss"] > _CHANCE * chance:
            LOG.warning(
                "the training has learned next to nothing: loss %.2f, chance %.2f. Fewer prototypes, more epochs or "
                'the recipe "factors" may do better',
                last["loss"], chance,
            )  # fmt: skip
        elif not self._stopped() and len(self.history) >= self.options.max_epochs:
            LOG.warning("the training was still improving after %d epochs: allow more", len(self.history))
        if last["prototypes_used"] < 3 or last["largest_share"] > 0.5:
            LOG.warning(
                "the training has collapsed: %d prototypes are in use, one has %.0f %% of the cells",
                last["prototypes_used"], 100 * last["largest_share"],
            )  # fmt: skip
        elif last["entropy"] > _CONVERGED_ENTROPY:
            LOG.warning("prototypes are not told apart well: entropy %.2f, below 0.75 is usual", last["entropy"])

    def _save(self) -> None:
        if self.options.state is None or self.rank:
            return
        queue = None if self.queue is None else self.queue.seen
        state = {
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict(),
            "queue": queue, "history": self.history, "seed": self.seed, "genes": self.encoder.vocabulary.names,
        }  # fmt: skip
        with atomic_path(Path(self.options.state), overwrite=True) as part:
            torch.save(state, part)

    def _resume(self) -> None:
        path = self.options.state
        if path is None or not Path(path).exists():
            return
        try:
            state = torch.load(path, weights_only=True, map_location=self.device)
            if state["seed"] != self.seed or state["genes"] != self.encoder.vocabulary.names:
                raise ValueError("it is of another training")
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
        except Exception as error:
            raise CellquiltError(
                "training-state-invalid", f"{path} cannot be gone on from: {error}", "remove it to begin anew"
            ) from error
        if self.queue is not None:
            self.queue.seen = state["queue"]
        self.history = state["history"]
        LOG.info("going on after epoch %d of %s", len(self.history), path)


def _schedule(optimizer: torch.optim.Optimizer, options: TrainingOptions) -> torch.optim.lr_scheduler.LambdaLR:
    rest = max(options.max_epochs - _WARM_UP, 1)

    def factor(epoch: int) -> float:
        if epoch < _WARM_UP:
            return _FIRST_LR + (1 - _FIRST_LR) * epoch / _WARM_UP
        turned = (1 + np.cos(np.pi * min((epoch - _WARM_UP) / rest, 1))) / 2
        return float(_LAST_LR + (1 - _LAST_LR) * turned)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _average_gradients(network: Network, processes: int) -> None:
    """The gradients of all processes, as one vector: parameters that a batch left out count as 0."""
    parts = [part for part in network.parameters() if part.requires_grad]
    flat = torch.cat([(torch.zeros_like(part) if part.grad is None else part.grad).reshape(-1) for part in parts])
    torch.distributed.all_reduce(flat)
    for part, mean in zip(parts, (flat / processes).split([part.numel() for part in parts]), strict=True):
        part.grad = mean.view_as(part).clone()


def _train_together(
    encoder: PublishedEncoder, slides: Slides, options: TrainingOptions, seed: int
) -> tuple[PublishedEncoder, Prototypes]:
    """Several processes, each with its part of an epoch's batches; the first one's model is all of theirs."""
    import tempfile

    from cellquilt.domains.published.checkpoint import read_published

    if options.device in ("auto", "cuda"):
        find_gpus(torch.cuda.is_available, options.processes)  # for all: they see what this process has taken
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        encoder.save(work / "start", encoder.prototypes)
        torch.multiprocessing.spawn(
            _one_of_many, args=(work, slides, options, seed), nprocs=options.processes, join=True
        )
        config = json.loads((work / "end" / "config.json").read_text())
        found = read_published(work / "end", config)
    return found, found.prototypes


def _one_of_many(rank: int, work: Path, slides: Slides, options: TrainingOptions, seed: int) -> None:
    from cellquilt.domains.published.checkpoint import read_published

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    own = options.device != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() >= options.processes
    backend = "nccl" if own else "gloo"  # which also knows processes that share a GPU
    torch.distributed.init_process_group(
        backend, init_method=f"file://{work / 'meet'}", rank=rank, world_size=options.processes
    )
    torch.set_num_threads(1)
    config = json.loads((work / "start" / "config.json").read_text())
    encoder = read_published(work / "start", config)
    encoder, prototypes = _Training(encoder, slides, options, seed, rank).run()
    if rank == 0:
        encoder.save(work / "end", prototypes)
    torch.distributed.destroy_process_group()
