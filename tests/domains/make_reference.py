"""What novae 1.1.2 says, for the tests of equality: checkpoints that it saves, and latents and leaves that they give.

    /path/to/python/with/novae tests/domains/make_reference.py tests/domains/data

Weights are those of a short training or of none: what is compared is the arithmetic. Each folder has the model's two
files and ``cells_<k>.npz``, one for each table.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

#: Name → (arguments of novae.Novae, genes and slides of the tables, whether to train).
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "default": ({"num_prototypes": 64}, {"n_panels": 2, "n_slides_per_panel": 1}, True),
    "small": (
        {"embedding_size": 16, "heads": 4, "hidden_size": 32, "num_layers": 3, "output_size": 24, "num_prototypes": 32,
         "n_hops_local": 1, "n_hops_view": 3},
        {"n_panels": 1, "n_slides_per_panel": 2},
        False,
    ),
    "wide": (
        {"embedding_size": 20, "heads": 2, "hidden_size": 16, "num_layers": 2, "output_size": 16, "num_prototypes": 16},
        {"n_panels": 1, "n_slides_per_panel": 1, "n_vars": 160, "n_drop": 0},
        False,
    ),
    "image": (
        {"embedding_size": 16, "heads": 4, "hidden_size": 32, "num_layers": 2, "output_size": 16, "num_prototypes": 32,
         "histo_embedding_size": 6},
        {"n_panels": 1, "n_slides_per_panel": 1},
        True,
    ),
}  # fmt: skip


def main(output: Path) -> None:
    """Write all cases."""
    import novae
    import torch

    for name, (arguments, tables, train) in CASES.items():
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - novae draws from it
        rng = np.random.default_rng(0)
        given = {"n_vars": 60, "n_drop": 10, "n_domains": 3, "xmax": 200, **tables}
        adatas = novae.toy_dataset(**given)
        for adata in adatas:
            counts = adata.layers["counts"]  # its X is processed already
            counts = counts.toarray() if scipy.sparse.issparse(counts) else np.asarray(counts)
            adata.X = scipy.sparse.csr_matrix(np.round(counts))
            adata.obsm["spatial"] = adata.obsm["spatial"] + rng.uniform(-5, 5, adata.obsm["spatial"].shape)
            if name == "image":
                adata.obsm["histo_embeddings"] = rng.normal(size=(adata.n_obs, 6)).astype(np.float32)
        key = "slide_key" if "slide_key" in adatas[0].obs else None
        novae.spatial_neighbors(adatas, radius=80, slide_key=key)
        given_counts = [np.asarray(adata.X.todense()) for adata in adatas]
        model = novae.Novae(adatas, **arguments)
        model.mode.trained = True
        if train:
            model.fit(max_epochs=1)
        model.init_prototypes(adatas)  # of these cells: many leaves
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            used = novae.Novae.from_pretrained(folder)
            used.compute_representations(adatas)
            used.assign_domains(adatas, level=5)
            place = output / name
            place.mkdir(parents=True, exist_ok=True)
            for file in ("config.json", "model.safetensors"):
                (place / file).write_bytes((Path(folder) / file).read_bytes())
        for number, (adata, counts) in enumerate(zip(adatas, given_counts, strict=True)):
            more = {"image": adata.obsm["histo_embeddings"]} if name == "image" else {}
            graph = adata.obsp["spatial_distances"].sorted_indices()
            np.savez_compressed(
                place / f"cells_{number}.npz",
                counts=counts.astype(np.uint16),
                genes=np.asarray(adata.var_names, dtype=str),
                xy=np.asarray(adata.obsm["spatial"]),
                slide=adata.obs[key].astype(str).to_numpy().astype(str) if key else np.repeat("s", adata.n_obs),
                used=adata.var["novae_use_gene"].to_numpy(dtype=bool),
                distances=graph.data.astype(np.float32),
                neighbours=graph.indices.astype(np.int32),
                latent=adata.obsm["novae_latent"],
                leaf=adata.obs["novae_leaves"].astype(str).to_numpy().astype(str),
                domain=adata.obs["novae_domains_5"].astype(str).to_numpy().astype(str),
                **more,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
