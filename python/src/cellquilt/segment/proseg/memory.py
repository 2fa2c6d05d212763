"""How much memory proseg takes, from what it is given.

Peak resident memory grows with the transcripts, with the cells and the width of their latent expression, and with the
voxels under tissue. The coefficients are measured: `tests/benchmarks/proseg_memory.py` runs the real binary on slides
that differ in one of the three, fits them, and says how far the estimate was off.
"""

from cellquilt.segment.proseg.transcripts import Contents

_BASE_BYTES = 60e6
_BYTES_A_TRANSCRIPT = 600.0
_BYTES_A_CELL_AND_DIMENSION = 20.0
_BYTES_A_VOXEL = 30.0
#: Proseg's latent expression: the most frequent genes by themselves, and factors for the others.
_MOST_DIMENSIONS = 400
#: A slide that is not looked at yet is taken to be sparse, which costs most for each transcript: transcripts a µm² and
#: transcripts a prior cell.
_SPARSE_PER_UM2, _SPARSE_PER_CELL = 0.2, 50.0


def estimate_gb(contents: Contents, voxel_um: float, layers: int) -> float:
    """Peak resident memory of a run in GB.

    Parameters
    ----------
    contents
        What the patch holds.
    voxel_um, layers
        Width of the voxels and layers of them.
    """
    layers = min(layers, max(contents.n_planes, 1))
    dimensions = min(contents.n_genes, _MOST_DIMENSIONS)
    per_cell = _BYTES_A_CELL_AND_DIMENSION * dimensions * contents.prior_cells.size
    voxels = contents.area_um2 / voxel_um**2 * layers
    return (_BASE_BYTES + _BYTES_A_TRANSCRIPT * contents.n + per_cell + _BYTES_A_VOXEL * voxels) / 1e9


def transcripts_that_fit(memory_gb: float, voxel_um: float, layers: int) -> int:
    """How many transcripts a run can hold in so much memory, if they are sparse."""
    a_cell = _BYTES_A_CELL_AND_DIMENSION * _MOST_DIMENSIONS / _SPARSE_PER_CELL
    voxels = _BYTES_A_VOXEL * layers / voxel_um**2 / _SPARSE_PER_UM2
    return max(int((memory_gb * 1e9 - _BASE_BYTES) / (_BYTES_A_TRANSCRIPT + a_cell + voxels)), 1000)
