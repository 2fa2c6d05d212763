"""Train the model of spatial domains that comes with the package: the same bytes again for the same versions.

    python python/training/train_domains.py python/src/cellquilt/domains/models/default

It knows the genes of the simulator, which are those of a liver panel, and has seen simulated slides only: enough to try
zero-shot without a network, and no more. A cohort's own model takes seconds (`cellquilt domains train`).
"""

import argparse
import copy
import sys
from pathlib import Path

import cellquilt as cq
import numpy as np
from cellquilt.core.atomic import atomic_path
from sklearn.metrics import adjusted_rand_score

COHORT = {"n_cells": 2500, "panels": 3, "thin_layers": 1, "rare_niches": 1, "batch_effect": 0.3, "seed": 0}
N_DOMAINS, SLIDES, HELD_OUT = 8, 9, 3


def main() -> None:
    """Train, and say what it is worth on slides that it has not seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    tables = cq.simulate.cell_tables(slides=SLIDES, **COHORT)
    cq.spatial_neighbors(tables)
    seen, others = tables[HELD_OUT:], tables[:HELD_OUT]
    model = cq.domains.Model.train(seen, n_domains=N_DOMAINS)
    own = copy.copy(model)  # zero-shot gives it other prototypes
    model.compute_representations(others, zero_shot=True, n_domains=N_DOMAINS)
    model.assign_domains(others, n_domains=N_DOMAINS)
    truth, found = (np.concatenate([t.obs[key].astype(str) for t in others]) for key in ("domain_true", "domain"))
    print(f"zero-shot on {HELD_OUT} other slides: adjusted Rand index {adjusted_rand_score(truth, found):.3f}")
    own.encoder.config["training"] = {"slides": len(seen), "simulated": {**COHORT, "slides": SLIDES}}
    with atomic_path(output, overwrite=True) as part:
        own.save_pretrained(part)


if __name__ == "__main__":
    sys.exit(main())
