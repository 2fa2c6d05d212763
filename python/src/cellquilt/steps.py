"""Steps on SpatialData objects that have no module of their own: patches and aggregation."""

from typing import TYPE_CHECKING

from cellquilt.notebook import add_delta, keyword_settings, recall, remember, scratch, store_of

if TYPE_CHECKING:
    from spatialdata import SpatialData


def make_image_patches(
    sdata: "SpatialData",
    patch_width: int | None = None,
    patch_overlap: int | None = None,
    *,
    patch_width_um: float | None = None,
    patch_overlap_um: float | None = None,
    normalize: str | None = None,
    seed: int | None = None,
) -> None:
    """Cut the image into overlapping patches: the shapes element ``image_patches``.

    Optional: a segmentation does it by itself, with the defaults. What is said here holds for later segmentations.

    Parameters
    ----------
    sdata
        The slide.
    patch_width, patch_overlap
        Width and overlap in pixels.
    patch_width_um, patch_overlap_um
        The same in µm. Default: 2048 pixels, overlapping by four expected cell diameters.
    normalize
        ``field``, ``global`` or ``none``; see the parameters.
    seed
        Seed of everything that samples.

    Raises
    ------
    CellquiltError
        ``overlap-too-small`` and others if the patches cannot serve.
    """
    from cellquilt.segment.stages import patchify_image

    given = keyword_settings(
        "patch",
        {
            "patch_width_px": patch_width,
            "patch_overlap_px": patch_overlap,
            "patch_width_um": patch_width_um,
            "patch_overlap_um": patch_overlap_um,
            "normalize": normalize,
            "seed": seed,
        },
    )
    with scratch() as folder:
        patchify_image(store_of(sdata), settings=recall(sdata, given), output=folder / "patches.zarr")
        add_delta(sdata, folder / "patches.zarr")
    remember(sdata, given)


def aggregate(
    sdata: "SpatialData",
    *,
    average_intensities: bool | None = None,
    count_z: str | None = None,
    min_transcripts: int | None = None,
    min_cell_area_um2: float | None = None,
    max_cell_area_um2: float | None = None,
    drop_failed: bool | None = None,
) -> None:
    """Count transcripts and measure channels in cells: the table ``table``, and ``cell_id`` of each transcript.

    Parameters
    ----------
    sdata
        A slide with ``cell_boundaries``.
    average_intensities
        Measure mean, minimum and maximum of every channel in every cell (default yes).
    count_z
        ``all`` planes' transcripts, or those of the ``same`` plane that was segmented.
    min_transcripts, min_cell_area_um2, max_cell_area_um2
        Cells outside fail QC: they are marked in ``passes_qc`` and ``qc_reason``.
    drop_failed
        Remove them instead.

    Raises
    ------
    CellquiltError
        ``element-missing`` if there are no cells yet.
    """
    from cellquilt.aggregation.stage import aggregate_slide

    given = keyword_settings(
        "aggregate",
        {
            "average_intensities": average_intensities,
            "count_z": count_z,
            "min_transcripts": min_transcripts,
            "min_cell_area_um2": min_cell_area_um2,
            "max_cell_area_um2": max_cell_area_um2,
            "drop_failed": drop_failed,
        },
    )
    with scratch() as folder:
        aggregate_slide(store_of(sdata), settings=recall(sdata, given), output=folder / "table.zarr")
        add_delta(sdata, folder / "table.zarr")
