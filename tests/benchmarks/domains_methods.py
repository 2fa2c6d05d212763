"""One run of one method on one cohort, in the method's own environment.

    /path/to/its/python domains_methods.py METHOD COHORT_FOLDER OUTPUT.json --seed 0 [--limit_s 600]

Each method gets the slides as they lie on disk and the true number of domains, and says a domain for each cell.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RADIUS_UM = 80.0


class Slides:
    """What a method is given.

    Attributes
    ----------
    tables
        AnnData of each slide, with ``obs["sample"]`` and ``obsm["spatial"]`` in µm; the truth is taken out.
    kind
        ``counts`` or ``protein``.
    n_domains, seed, limit_s
        True number of domains, seed, and the processor time that open-ended training may take.
    notes
        What the method wants to be known of its run.
    """

    def __init__(self, folder: Path, seed: int, limit_s: float) -> None:
        import anndata

        about = json.loads((folder / "cohort.json").read_text())
        self.tables = [anndata.read_h5ad(folder / f"{name}.h5ad") for name in about["slides"]]
        for table in self.tables:
            del table.obs["domain_true"]
        self.kind: str = about["kind"]
        self.n_domains: int = about["n_domains"]
        self.seed, self.limit_s = seed, limit_s
        self.notes: dict[str, Any] = {}

    def shared(self) -> list[str]:
        """Genes of all panels, in the order of the first."""
        common = set.intersection(*[set(table.var_names) for table in self.tables])
        return [gene for gene in self.tables[0].var_names if gene in common]

    def scaled(self, table: Any, genes: list[str]) -> np.ndarray:
        """(n_cells, n_genes) logarithms of counts scaled to their median total, or arcsinh of intensities over five
        times their lower quintile; each gene with mean 0 and deviation 1 on the slide: novae's normalisation."""
        values = table.X.toarray() if hasattr(table.X, "toarray") else np.asarray(table.X)
        values = values.astype(np.float64)
        if self.kind == "counts":
            total = values.sum(axis=1, keepdims=True)
            values = np.log1p(values / np.maximum(total, 1) * np.median(total[total > 0]))
        else:
            values = np.arcsinh(values / np.maximum(5 * np.quantile(values, 0.2, axis=0), 1e-8))
        values = values[:, table.var_names.get_indexer(genes)]
        return (values - values.mean(axis=0)) / (values.std(axis=0) + 1e-8)

    def split(self, labels: np.ndarray) -> list[np.ndarray]:
        """Labels of all cells as those of each slide."""
        return np.split(labels, np.cumsum([table.n_obs for table in self.tables])[:-1])

    def apart(self) -> Any:
        """All slides in one table of the shared genes, side by side in space; `obs["sample"]` is categorical."""
        import anndata

        genes, tables, x = self.shared(), [], 0.0
        for table in self.tables:
            moved = table[:, genes].copy()
            xy = np.asarray(moved.obsm["spatial"], dtype=float)
            moved.obsm["spatial"] = xy - xy.min(axis=0) + [x, 0.0]
            x = moved.obsm["spatial"][:, 0].max() + 1000.0
            tables.append(moved)
        together = anndata.concat(tables)
        together.obs["sample"] = together.obs["sample"].astype(str).astype("category")
        return together


def adjacency(xy: np.ndarray) -> Any:
    """Cells joined in the Delaunay triangulation at most 80 µm apart, and each with itself: (n, n) CSR of ones."""
    from scipy.sparse import csr_matrix, eye
    from scipy.spatial import Delaunay

    corners = Delaunay(xy).simplices
    edges = np.vstack([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [0, 2]]])
    edges = edges[np.linalg.norm(xy[edges[:, 0]] - xy[edges[:, 1]], axis=1) <= RADIUS_UM]
    joined = csr_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(xy), len(xy)))
    joined = joined + joined.T + eye(len(xy), format="csr")
    joined.data[:] = 1
    return joined


def cellquilt(slides: Slides) -> list[Any]:
    """Ours, a model made of the cohort."""
    import cellquilt as cq

    cq.spatial_neighbors(slides.tables, radius=RADIUS_UM, slide_key="sample")
    model = cq.domains.Model.train(slides.tables, n_domains=slides.n_domains, seed=slides.seed)
    model.compute_representations(slides.tables)
    model.assign_domains(slides.tables, n_domains=slides.n_domains)
    return [table.obs["domain"].astype(object).to_numpy() for table in slides.tables]


def kmeans_2hop(slides: Slides) -> list[Any]:
    """k-means of the mean expression within two hops."""
    from sklearn.cluster import KMeans

    genes, features = slides.shared(), []
    for table in slides.tables:
        joined = adjacency(np.asarray(table.obsm["spatial"], dtype=float))
        near = joined @ joined
        near.data[:] = 1
        features.append((near @ slides.scaled(table, genes)) / np.asarray(near.sum(axis=1)))
    return slides.split(KMeans(slides.n_domains, n_init=10, random_state=slides.seed).fit_predict(np.vstack(features)))


def novae(slides: Slides) -> list[Any]:
    """novae from scratch, with its defaults."""
    return _novae(slides, False)


def novae_converged(slides: Slides) -> list[Any]:
    """novae from scratch, without its early stopping, until the entropy of an epoch is below 0.75 or time is up.

    The learning rate stays that of its default: a schedule would have to know the number of epochs.
    """
    return _novae(slides, True)


def _novae(slides: Slides, converge: bool) -> list[Any]:
    import lightning
    import novae as package
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    lightning.seed_everything(slides.seed, verbose=False)
    package.spatial_neighbors(slides.tables, slide_key="sample", radius=RADIUS_UM)
    if slides.kind == "protein":
        for table in slides.tables:
            package.quantile_scaling(table, per_slide=False)
    began = time.process_time()

    class Watch(lightning.Callback):
        def __init__(self) -> None:
            self.steps: list[float] = []
            self.epochs: list[tuple[float, float]] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.steps.append(float(trainer.callback_metrics["train/entropy"]))
            if converge and time.process_time() - began > slides.limit_s:
                trainer.should_stop = True

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            self.epochs.append((float(trainer.callback_metrics["train/loss_epoch"]), float(np.mean(self.steps))))
            self.steps = []
            if converge and self.epochs[-1][1] < 0.75:
                trainer.should_stop = True

    watch = Watch()
    model = package.Novae(slides.tables)
    more = {"max_epochs": 10_000, "patience": 10_000, "use_scheduler": False} if converge else {}
    model.fit(callbacks=[watch], enable_progress_bar=False, enable_model_summary=False, **more)
    trained_s = time.process_time() - began
    model.compute_representations()
    try:
        key = model.assign_domains(n_domains=slides.n_domains)
    except ValueError:
        # No level has just so many: the one that comes nearest.
        from novae.utils import unique_leaves_indices

        levels = model.swav_head.clusters_levels[:, unique_leaves_indices(model.adatas)]
        off = [abs(len(np.unique(levels[-level])) - slides.n_domains) for level in range(1, len(levels))]
        key = model.assign_domains(level=1 + int(np.argmin(off)))
    slides.notes = {
        "epochs": len(watch.epochs),
        "train_cpu_s": round(trained_s, 1),
        "loss": [round(loss, 4) for loss, _ in watch.epochs],
        "entropy": [round(entropy, 4) for _, entropy in watch.epochs],
    }
    if converge:
        slides.notes["stopped_by"] = "time" if watch.epochs[-1][1] >= 0.75 else "entropy"
    return [table.obs[key].astype(object).to_numpy() for table in slides.tables]


def banksy(slides: Slides) -> list[Any]:
    """BANKSY for domains: λ 0.8, 18 neighbours, first order; each slide scaled for itself; k-means of 20 components."""
    from banksy.embed_banksy import generate_banksy_matrix
    from banksy.initialize_banksy import initialize_banksy
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    together = slides.apart()
    genes = list(together.var_names)
    together.X = np.vstack([slides.scaled(table, genes) for table in slides.tables])
    for axis in range(2):
        together.obs[f"at_{axis}"] = together.obsm["spatial"][:, axis]
    weights = initialize_banksy(
        together, ("at_0", "at_1", "spatial"), 18, "scaled_gaussian", max_m=1, plt_edge_hist=False,
        plt_nbr_weights=False, plt_theta=False,
    )  # fmt: skip
    _, matrix = generate_banksy_matrix(together, weights, [0.8], max_m=1, verbose=False)
    values = matrix.X.toarray() if hasattr(matrix.X, "toarray") else np.asarray(matrix.X)
    reduced = PCA(20, random_state=slides.seed).fit_transform(values)
    slides.notes["clustering"] = "k-means with the true number; its Leiden has no number to be given"
    return slides.split(KMeans(slides.n_domains, n_init=10, random_state=slides.seed).fit_predict(reduced))


def cellcharter(slides: Slides) -> list[Any]:
    """CellCharter: scVI with slides as batches (proteins: 10 components of the scaled intensities), 3 layers of
    neighbours, Gaussian mixture."""
    import cellcharter as package
    import lightning
    import squidpy
    import torch
    from sklearn.decomposition import PCA

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    lightning.seed_everything(slides.seed, verbose=False)
    together = slides.apart()
    if slides.kind == "counts":
        import scvi

        scvi.settings.seed = slides.seed
        together.layers["counts"] = together.X.copy()
        scvi.model.SCVI.setup_anndata(together, layer="counts", batch_key="sample")
        model = scvi.model.SCVI(together)
        model.train(early_stopping=True, enable_progress_bar=False, accelerator="cpu")
        together.obsm["X_cells"] = model.get_latent_representation(together).astype(np.float32)
        slides.notes["epochs"] = len(model.history["elbo_train"])
    else:
        genes = list(together.var_names)
        scaled = np.vstack([slides.scaled(table, genes) for table in slides.tables])
        together.obsm["X_cells"] = PCA(10, random_state=slides.seed).fit_transform(scaled).astype(np.float32)
    squidpy.gr.spatial_neighbors(together, library_key="sample", coord_type="generic", delaunay=True)
    package.gr.remove_long_links(together)
    package.gr.aggregate_neighbors(together, n_layers=3, use_rep="X_cells", sample_key="sample")
    mixture = package.tl.Cluster(
        n_clusters=slides.n_domains, random_state=slides.seed, trainer_params={"accelerator": "cpu"}
    )
    mixture.fit(together, use_rep="X_cellcharter")
    return slides.split(np.asarray(mixture.predict(together, use_rep="X_cellcharter")))


def graphst(slides: Slides) -> list[Any]:
    """GraphST, sparse graphs, all slides side by side; Gaussian mixture of equal covariances (its mclust model EEE)."""
    import torch
    from GraphST.GraphST import GraphST
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    together = slides.apart()
    together.var["highly_variable"] = True  # of these small panels all genes; it then takes X as it is
    genes = list(together.var_names)
    together.X = np.vstack([slides.scaled(table, genes) for table in slides.tables])
    epochs = 600
    slides.notes["epochs"] = epochs
    model = GraphST(together, datatype="Slide", random_seed=slides.seed, epochs=epochs)
    embedded = PCA(20, random_state=42).fit_transform(model.train().obsm["emb"])
    mixture = GaussianMixture(slides.n_domains, covariance_type="tied", n_init=3, random_state=slides.seed)
    return slides.split(mixture.fit_predict(embedded))


def spaceflow(slides: Slides) -> list[Any]:
    """SpaceFlow with its defaults, all slides side by side; k-means of its embedding."""
    import torch
    from sklearn.cluster import KMeans
    from SpaceFlow.SpaceFlow import SpaceFlow

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    together = slides.apart()
    genes = list(together.var_names)
    together.X = np.vstack([slides.scaled(table, genes) for table in slides.tables])
    model = SpaceFlow(adata=together)
    model.adata_preprocessed = together  # in place of its log1p of counts, the same scaled input as for others
    model.spatial_graph = model.graph_alpha(np.asarray(together.obsm["spatial"]))
    with tempfile.TemporaryDirectory() as folder:
        model.train(embedding_save_filepath=f"{folder}/embedding.tsv", random_seed=slides.seed)
    slides.notes["clustering"] = "k-means with the true number; its Leiden has no number to be given"
    return slides.split(KMeans(slides.n_domains, n_init=10, random_state=slides.seed).fit_predict(model.embedding))


#: Method → packages whose versions are recorded, and the function.
METHODS: dict[str, tuple[tuple[str, ...], Callable[[Slides], list[Any]]]] = {
    "cellquilt": (("cellquilt", "torch"), cellquilt),
    "kmeans_2hop": (("scikit-learn",), kmeans_2hop),
    "novae": (("novae", "torch"), novae),
    "novae_converged": (("novae", "torch"), novae_converged),
    "banksy": (("pybanksy",), banksy),
    "cellcharter": (("cellcharter", "torch"), cellcharter),
    "graphst": (("graphst-modern", "torch"), graphst),
    "spaceflow": (("SpaceFlow", "torch"), spaceflow),
}


def main() -> None:
    """Run one method and write its labels; `null` is a cell without a domain."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit_s", type=float, default=600.0)
    given = parser.parse_args()
    packages, method = METHODS[given.method]
    random.seed(given.seed)
    np.random.seed(given.seed)  # noqa: NPY002 - methods draw from it
    slides = Slides(given.cohort, given.seed, given.limit_s)
    wall, cpu = time.perf_counter(), time.process_time()
    labels = method(slides)
    document = {
        "wall_s": round(time.perf_counter() - wall, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "versions": {name: version(name) for name in packages},
        "notes": slides.notes,
        "labels": [[None if label != label or label is None else str(label) for label in part] for part in labels],
    }
    given.output.write_text(json.dumps(document))


if __name__ == "__main__":
    main()
