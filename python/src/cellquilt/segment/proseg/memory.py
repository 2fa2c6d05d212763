"""How much memory proseg takes, from what it is given.

Peak resident memory grows with the transcripts, with the cells and the width of their latent expression, and with the
voxels under tissue. The coefficients are measured: `tests/benchmarks/proseg_memory.py` runs the real binary on slides
that differ in one thing each, fits the coefficients, and says how far the estimate is off.
"""

from cellquilt.segment.proseg.transcripts import Contents

#: Bytes for each of the `terms`: what was fitted to 3.2.0, whose 14 runs it met within 14 %, and a third more, of which
#: many iterations take a part (13 % between 12 and 180 of them).
_BYTES = {"run": 70e6, "transcript": 410.0, "cell": 12e3, "cell and dimension": 36.0, "voxel": 34.0}
#: Proseg's latent expression of many genes: 200 of them by themselves, and 200 factors for the others.
FACTORED_DIMENSIONS = 400
#: A slide that is not looked at yet is taken to be sparse, which costs most for each transcript: transcripts a µm² and
#: transcripts a prior cell.
_SPARSE_PER_UM2, _SPARSE_PER_CELL = 0.2, 50.0


def terms(
    n_transcripts: float, n_cells: float, dimensions: int, area_um2: float, voxel_um: float, layers: int
) -> dict[str, float]:
    """What memory grows with, and how much of it there is.

    Parameters
    ----------
    n_transcripts, n_cells, dimensions
        Transcripts, prior cells, and the width of their latent expression.
    area_um2
        Area under transcripts.
    voxel_um, layers
        Width of the voxels and layers of them.
    """
    return {
        "run": 1.0,
        "transcript": n_transcripts,
        "cell": n_cells,
        "cell and dimension": n_cells * dimensions,
        "voxel": area_um2 / voxel_um**2 * layers,
    }


def terms_of(contents: Contents, voxel_um: float, layers: int) -> dict[str, float]:
    """The `terms` of a patch."""
    layers = min(layers, max(contents.n_planes, 1))
    dimensions = FACTORED_DIMENSIONS if contents.can_be_factored else contents.n_genes
    return terms(contents.n, contents.prior_cells.size, dimensions, contents.area_um2, voxel_um, layers)


def _gb(found: dict[str, float]) -> float:
    return sum(_BYTES[name] * value for name, value in found.items()) / 1e9


def estimate_gb(contents: Contents, voxel_um: float, layers: int) -> float:
    """Peak resident memory of a run in GB.

    Parameters
    ----------
    contents
        What the patch holds.
    voxel_um, layers
        Width of the voxels and layers of them.
    """
    return _gb(terms_of(contents, voxel_um, layers))


def transcripts_that_fit(memory_gb: float, voxel_um: float, layers: int) -> int:
    """How many transcripts a run can hold in so much memory, if they are sparse."""
    each = terms(1, 1 / _SPARSE_PER_CELL, FACTORED_DIMENSIONS, 1 / _SPARSE_PER_UM2, voxel_um, layers) | {"run": 0.0}
    run = _BYTES["run"] / 1e9
    return max(int((memory_gb - run) / _gb(each)), 1000)
