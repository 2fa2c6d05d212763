"""``experiment.xenium``: what is in the folder; the viewer opens it."""

import json
import uuid
from pathlib import Path
from typing import Any

from cellquilt.core.xenium import ANALYSIS, CELLS, EXPERIMENT, IMAGE, MATRIX, TRANSCRIPTS
from cellquilt.explorer.slide import ViewedSlide

#: Layout of the files: that of this version of the machine's software.
SOFTWARE = "xenium-3.0.0.0"
_FILES = {
    "transcripts_zarr_filepath": TRANSCRIPTS,
    "cells_zarr_filepath": CELLS,
    "cell_features_zarr_filepath": MATRIX,
    "analysis_zarr_filepath": ANALYSIS,
}


def write_manifest(slide: ViewedSlide, folder: Path, *, run_name: str | None = None) -> None:
    """Write the manifest of the files that lie in a folder.

    Parameters
    ----------
    slide
        The slide.
    folder
        Where the files are.
    run_name
        What the viewer calls the run; default: the sample.
    """
    from cellquilt import __version__
    from cellquilt.core.points import count_points

    name = slide.store.name
    n_cells = 0 if slide.cells is None else len(slide.cells)
    height, width = slide.size_um
    n_transcripts = 0 if slide.points is None else count_points(slide.points)
    document: dict[str, Any] = {
        "major_version": 6,
        "minor_version": 0,
        "patch_version": 0,
        "run_name": run_name or name,
        "run_start_time": "N/A",
        "region_name": name,
        "preservation_method": "N/A",
        "num_cells": n_cells,
        "transcripts_per_cell": n_transcripts / max(n_cells, 1),
        "transcripts_per_100um": 100.0 * n_transcripts / (height * width),
        "cassette_name": name,
        "slide_id": name,
        "panel_design_id": "N/A",
        "panel_name": "N/A",
        "panel_organism": "N/A",
        "panel_tissue_type": "N/A",
        "panel_num_targets_predesigned": 0,
        "panel_num_targets_custom": 0,
        "pixel_size": slide.pixel_um,
        "z_step_size": 3.0,
        "instrument_sn": "N/A",
        "instrument_sw_version": f"cellquilt-{__version__}",
        "analysis_sw_version": SOFTWARE,
        "experiment_uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, f"cellquilt-explorer/{name}")),
        "cassette_uuid": "",
        "roi_uuid": "",
        "well_uuid": "",
        "calibration_uuid": "N/A",
        "images": {"morphology_filepath": IMAGE} if (folder / IMAGE).exists() else {},
        "xenium_explorer_files": {key: file for key, file in _FILES.items() if (folder / file).exists()},
    }
    (folder / EXPERIMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
