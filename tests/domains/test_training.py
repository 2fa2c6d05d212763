"""Training of the published recipe: its parts by what they must be, its runs by what they leave."""

import logging

import anndata
import cellquilt as cq
import numpy as np
import pytest
import torch
from cellquilt.core.errors import CellquiltError
from cellquilt.domains.model import Model
from cellquilt.domains.neighbourhoods import make_batch, within
from cellquilt.domains.published.attention import Edges, Messages, Pooled, messages_by_torch, pooled_by_torch
from cellquilt.domains.published.swav import SlideQueue, sinkhorn, swav_loss
from cellquilt.domains.slides import Slides, slides_of_table, write_slide
from cellquilt.geometry.neighbours import neighbour_graph

SMALL = {
    "embedding_size": 16, "hidden_size": 16, "heads": 2, "num_layers": 2, "output_size": 8, "num_prototypes": 24,
    "batch_size": 64, "max_epochs": 4, "lr": 3e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def tables() -> list[anndata.AnnData]:
    found = cq.simulate.cell_tables(slides=2, n_cells=400, panels=2, seed=3)
    cq.spatial_neighbors(found)
    return found


def test_assignments_use_all_prototypes_alike():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(300, 20, generator=generator) * 2 - 1
    q = sinkhorn(similarity)
    np.testing.assert_allclose(q.sum(dim=1), 1, rtol=1e-5)
    assert float(q.sum(dim=0).std()) < 0.3 * float(torch.softmax(similarity / 0.05, dim=1).sum(dim=0).std())
    # What novae computes, whatever constant is added.
    plain = torch.exp(similarity / 0.05)
    for _ in range(3):
        plain = plain / plain.sum(dim=0, keepdim=True)
        plain = plain / plain.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(q, plain, rtol=1e-4, atol=1e-7)


def test_the_loss_is_chance_where_nothing_is_told_apart_and_small_where_views_agree():
    alike = torch.zeros(64, 32)
    loss, entropy = swav_loss(alike, alike)
    assert float(loss) == pytest.approx(np.log(32), rel=1e-5)
    assert float(entropy) == pytest.approx(1, rel=1e-3)
    apart = torch.eye(32).repeat(2, 1) * 2 - 1
    loss, entropy = swav_loss(apart, apart)
    assert float(loss) < 0.01
    assert float(entropy) < 0.01
    swapped, _ = swav_loss(apart, apart.roll(1, dims=0))
    assert float(swapped) > 10


def test_a_slide_leaves_prototypes_unused_that_are_nearer_to_others():
    queue = SlideQueue(2, 4, least=0.25)
    first = torch.tensor([[0.9, 0.8, -0.5, -0.6]]).repeat(5, 1)
    second = torch.tensor([[0.1, 0.795, 0.7, 0.8]]).repeat(5, 1)
    queue.prototypes_of(0, first)
    assert queue.prototypes_of(1, second).tolist() == [1, 2, 3]
    assert queue.prototypes_of(0, first).tolist() == [0, 1]
    poor = SlideQueue(2, 4, least=0.75)
    poor.prototypes_of(1, second)
    assert poor.prototypes_of(0, first).tolist() == [0, 1, 2]


@pytest.mark.parametrize("what", ["messages", "pooled"])
def test_attention_by_tensor_operations_is_that_of_our_kernels(what):
    rng = np.random.default_rng(0)
    graph = neighbour_graph(rng.uniform(0, 100, (80, 2)), radius_um=50)
    edges = Edges.of(make_batch(graph, within(graph, 1), np.array([3, 50, 60])))
    generator = torch.Generator().manual_seed(0)
    heads, size = 3, 6
    n, width = int(edges.ptr[-1]), heads * size
    last = width if what == "messages" else size
    parts = [torch.randn(shape, generator=generator) for shape in ((n, 2 * width), (width,), (width,), (last,))]
    ways = (Messages.apply, messages_by_torch) if what == "messages" else (Pooled.apply, pooled_by_torch)
    found = []
    for do in ways:
        own = [part.clone().requires_grad_() for part in parts]
        out = do(*own, heads, edges)
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
        found.append([out.detach(), *[part.grad for part in own]])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-4)


def weights(folder, model) -> bytes:
    return (model.save_pretrained(folder) / "model.safetensors").read_bytes()


def test_the_same_seed_the_same_bytes_and_the_loss_falls(tables, tmp_path):
    first, again = (Model.train(tables, recipe="published", seed=1, **SMALL) for _ in range(2))
    assert weights(tmp_path / "a", first) == weights(tmp_path / "b", again)
    other = Model.train(tables, recipe="published", seed=2, **SMALL)
    assert weights(tmp_path / "c", other) != (tmp_path / "a" / "model.safetensors").read_bytes()
    epochs = first.encoder.config["training"]["epochs"]
    assert len(epochs) == 4
    assert epochs[-1]["loss"] < epochs[0]["loss"] - 0.5
    first.compute_representations(tables)
    read = Model.from_pretrained(tmp_path / "a")
    copies = [table.copy() for table in tables]
    read.compute_representations(copies)
    for table, copy in zip(tables, copies, strict=True):
        assert np.array_equal(table.obsm["niche_latent"], copy.obsm["niche_latent"])


def test_a_training_goes_on_where_it_was_stopped(tables, tmp_path):
    """Two epochs, and then all four: the same as four at once."""
    whole = Model.train(tables, recipe="published", seed=1, **SMALL)
    state = tmp_path / "training.pt"

    class Stopped(Exception):
        pass

    from cellquilt.domains.published import training

    epoch = training._Training._epoch

    def stop(self, number):
        if number == 2:
            raise Stopped
        return epoch(self, number)

    training._Training._epoch = stop
    try:
        with pytest.raises(Stopped):
            Model.train(tables, recipe="published", seed=1, state=state, **SMALL)
    finally:
        training._Training._epoch = epoch
    resumed = Model.train(tables, recipe="published", seed=1, state=state, **SMALL)
    assert weights(tmp_path / "a", resumed) == weights(tmp_path / "b", whole)
    with pytest.raises(CellquiltError, match="another training") as caught:
        Model.train(tables, recipe="published", seed=2, state=state, **SMALL)
    assert caught.value.code == "training-state-invalid"
    state.write_bytes(b"x" * 100)
    with pytest.raises(CellquiltError) as caught:
        Model.train(tables, recipe="published", seed=1, state=state, **SMALL)
    assert caught.value.code == "training-state-invalid"


def test_two_processes_share_the_batches(tables, tmp_path):
    """Of twice the batches each takes half; the same bytes again; slides may lie on disk."""
    paths = []
    for number, table in enumerate(tables):
        (slide,) = slides_of_table(table)
        paths.append(write_slide(slide, tmp_path / f"{number}.zarr"))
    options = {**SMALL, "max_epochs": 3, "processes": 2}
    found = [
        weights(tmp_path / str(k), Model.train(Slides.of_stores(paths), recipe="published", seed=1, **options))
        for k in range(2)
    ]
    assert found[0] == found[1]
    alone = Model.train(Slides.of_stores(paths), recipe="published", seed=1, **{**options, "processes": 1})
    assert found[0] != weights(tmp_path / "alone", alone)
    epochs = Model.from_pretrained(tmp_path / "0").encoder.config["training"]["epochs"]
    assert epochs[2]["loss"] < epochs[0]["loss"] - 0.05


def test_fine_tuning_begins_with_the_slides_prototypes_and_keeps_the_rest(tables, tmp_path):
    model = Model.train(tables, recipe="published", seed=1, **SMALL)
    before = weights(tmp_path / "before", model)
    tuned = Model.train(tables[:1], start=model, seed=1, batch_size=64, max_epochs=1, lr=1e-6)
    assert weights(tmp_path / "again", model) == before
    assert tuned.vocabulary.names == model.vocabulary.names
    ours, theirs = tuned.encoder.network.encoder.state_dict(), model.encoder.network.encoder.state_dict()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)
    assert not np.allclose(tuned.prototypes, model.prototypes, atol=0.05)


def test_it_stops_early_and_says_what_went_wrong(tables, caplog):
    caplog.set_level(logging.WARNING)
    model = Model.train(tables, recipe="published", **{**SMALL, "max_epochs": 9, "min_delta": 100.0, "patience": 2})
    assert len(model.encoder.config["training"]["epochs"]) == 3
    caplog.clear()
    Model.train(tables, recipe="published", **{**SMALL, "max_epochs": 1, "lr": 0.0})
    assert "learned next to nothing" in caplog.text
    caplog.clear()
    Model.train(tables, recipe="published", **{**SMALL, "max_epochs": 1, "num_prototypes": 2})
    assert "collapsed" in caplog.text


def test_with_an_image(tables):
    rng = np.random.default_rng(0)
    seen = [table.copy() for table in tables]
    for table in seen:
        table.obsm["histo_embeddings"] = rng.normal(size=(table.n_obs, 5)).astype(np.float32)
    for recipe, options in (("factors", {}), ("published", {**SMALL, "max_epochs": 1, "histo_embedding_size": 5})):
        model = Model.train(seen, recipe=recipe, **options)
        model.compute_representations(seen)
        before = seen[0].obsm["niche_latent"].copy()
        changed = seen[0].copy()
        changed.obsm["histo_embeddings"] = changed.obsm["histo_embeddings"] + 3
        model.compute_representations(changed)
        assert not np.allclose(changed.obsm["niche_latent"], before, atol=1e-3)
        with pytest.raises(CellquiltError) as caught:
            model.compute_representations(tables)
        assert caught.value.code == "image-embeddings"


OPTIONS = {
    "unknown": ({"recipe": "published", "max_epoch": 3}, "options-unknown"),
    "negative": ({"recipe": "published", "lr": -1.0}, "option-invalid"),
    "no epoch": ({"recipe": "published", "max_epochs": 0}, "option-invalid"),
    "heads that do not divide": ({"recipe": "published", "hidden_size": 100, "heads": 8}, "option-invalid"),
    "no such device": ({"recipe": "published", "device": "cuda:99"}, "gpu-missing"),
    "an option of the other recipe": ({"recipe": "factors", "max_epochs": 3}, "options-unknown"),
    "no such recipe": ({"recipe": "factor"}, "recipe-unknown"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_there_are_not(tables, name):
    given, code = OPTIONS[name]
    with pytest.raises(CellquiltError) as caught:
        Model.train(tables, **given)
    assert caught.value.code == code
    assert "max_epochs" in caught.value.hint or name != "unknown"
