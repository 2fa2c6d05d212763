"""The one table of settings.

The pipeline's schema (`nextflow_schema.json`), its parameter defaults (`conf/params.config`), the options of the
command line and the page `docs/parameters.md` are generated from `SETTINGS`; the API's signatures are compared with it
by a test. Nothing else states a default.

Lengths end in ``_um`` (microns, the default way) or ``_px`` (pixels of the main image, beside them); areas in ``_um2``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cellquilt import __version__
from cellquilt.core.errors import CellquiltError, SeveralErrors, did_you_mean

Kind = Literal["int", "float", "str", "bool", "list"]
Value = int | float | str | bool | list[str] | None

#: Cell tables made elsewhere: they are not segmented, and enter where domains are found.
TABLES = ("anndata", "spatialdata")
TECHNOLOGIES = (
    *TABLES,
    "bioio",
    "cosmx",
    "hyperion",
    "macsima",
    "merscope",
    "molecular_cartography",
    "ome_tif",
    "phenocycler",
    "transcripts",
    "visium_hd",
    "xenium",
)
#: Technologies without an image; their rows of the sheet need no path, for the transcripts are all there is.
WITHOUT_IMAGE = ("transcripts",)
METHODS = ("cellpose", "generic", "stardist", "vendor")
#: Methods that segment transcripts, with or without prior cells.
TRANSCRIPT_METHODS = ("baysor", "proseg")
#: How spatial domains are found: not at all, by a model as it is, by one made of the cohort, or by one that goes on
#: from another.
DOMAINS = ("none", "zeroshot", "train", "finetune")
#: Name of the model of domains that comes with the package.
SHIPPED_DOMAINS = "default"
#: Programs that cells are written for.
EXPORTS = ("xeniumranger", "vpt", "qupath")
#: What ``segmentation`` may be: one method, or one whose cells are the prior of a method for transcripts.
CHAINS = (
    *METHODS,
    *TRANSCRIPT_METHODS,
    *(f"{prior},{method}" for prior in METHODS for method in TRANSCRIPT_METHODS),
)

#: Group of settings → what it is about, and the pipeline stages that are handed its values.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": ("Input, output and how the run behaves", ()),
    "site": ("Where tasks run", ()),
    "preview": ("Try parameters on a few windows", ("preview",)),
    "convert": ("Reading the machine's output", ("convert",)),
    "regions": ("Splitting a slide into regions", ("convert", "split")),
    "tissue": ("Finding the tissue", ("tissue",)),
    "patch": ("Cutting the slide into patches", ("patchify", "preview")),
    "transcripts": ("Cutting transcripts into patches; prior cells", ("patchify_transcripts",)),
    "segmentation": (
        "Choice of the segmentation method",
        (
            *("patchify", "segment", "resolve"),
            *("patchify_transcripts", "segment_transcripts", "resolve_transcripts", "preview"),
        ),
    ),
    "cellpose": ("Cellpose", ("patchify", "segment", "preview")),
    "stardist": ("StarDist", ("patchify", "segment", "preview")),
    "generic": ("Any Python function as segmenter", ("patchify", "segment", "preview")),
    "baysor": ("Baysor", ("patchify_transcripts", "segment_transcripts")),
    "proseg": ("Proseg", ("patchify_transcripts", "segment_transcripts")),
    "resolve": ("Putting patches together, nuclei to cells", ("resolve", "resolve_transcripts", "preview")),
    "aggregate": ("Counting transcripts and measuring channels", ("aggregate", "preview")),
    "compare": ("Comparing methods", ("compare",)),
    "domains_graph": ("Spatial domains: a slide's cells and their neighbours", ("domains_prepare",)),
    "domains_image": ("Spatial domains: what an image shows around cells", ("domains_prepare", "domains_train")),
    "domains": ("Spatial domains: the model", ("domains_train", "domains_assign")),
    "domains_training": ("Spatial domains: training of the published recipe", ("domains_train",)),
    "domains_level": ("Spatial domains: how many", ("domains_assign",)),
    "cluster": ("Clusters of a slide's cells", ("cluster",)),
    "annotate": ("Types of a slide's cells, by markers or from a reference", ("annotate",)),
    "stats": ("Spatial statistics of a slide's cells", ("stats",)),
    "report": ("Quality control and reports", ("report", "compare")),
    "export": ("Files for other programs", ("export",)),
    "explorer": ("Xenium Explorer", ("explorer",)),
    "resources": (
        "Limits",
        (
            *("convert", "tissue", "patchify", "segment", "resolve"),
            *("patchify_transcripts", "segment_transcripts", "resolve_transcripts", "aggregate", "compare", "report"),
            *("export", "explorer", "domains_prepare", "domains_train", "domains_embed", "domains_assign"),
            *("stats", "cluster", "annotate", "split"),
        ),
    ),
}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes
    ----------
    name
        Name as pipeline parameter and sheet column; ``<step>_<keyword>`` where a step has its own.
    group
        Key of `GROUPS`.
    kind
        Type of the value; ``list`` is a comma-separated list of strings.
    default
        Value where the user says nothing; None means that it is decided from the data or another setting.
    help
        One sentence, with the unit.
    keyword
        Name as keyword of the API and option of the command line, where it differs from `name`.
    aliases
        Other names that are understood.
    choices, minimum, maximum, pattern
        What is allowed.
    per_sample
        Whether a column of the sheet may override it.
    is_file
        Whether the value is the path of a file: relative to where the run starts, or to the sheet whose column it is.
    is_folder
        Whether it is the path of a folder.
    file_pattern
        What such a path looks like, where the value may be something else.
    early
        Whether Nextflow's configuration itself depends on it. Such a setting is left out of the defaults in
        ``conf/params.config``: Nextflow 25.04's strict parser would take them for what was given.
    """

    name: str
    group: str
    kind: Kind
    default: Value
    help: str
    keyword: str = ""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    pattern: str = ""
    per_sample: bool = True
    required: bool = False
    hidden: bool = False
    is_file: bool = False
    is_folder: bool = False
    file_pattern: str = ""
    early: bool = False

    @property
    def api_name(self) -> str:
        """Keyword in the API, and (with dashes) option on the command line."""
        return self.keyword or self.name


def _run(name: str, kind: Kind, default: Value, text: str, **rest: Any) -> Setting:
    return Setting(name, "run", kind, default, text, per_sample=False, **rest)


def _site(name: str, kind: Kind, default: Value, text: str, **rest: Any) -> Setting:
    return Setting(name, "site", kind, default, text, per_sample=False, **rest)


SETTINGS: tuple[Setting, ...] = (
    # --- run
    _run("input", "str", None, "Sample sheet (CSV or TSV): one row a slide.", required=True),
    _run("outdir", "str", None, "Folder for the results.", required=True, early=True),
    _run(
        "publish_dir_mode",
        "str",
        "copy",
        "How results are published; anything but copies lets an edit of the results corrupt the work folder.",
        choices=("copy", "copyNoFollow", "move", "link", "rellink", "symlink"),
        hidden=True,
    ),
    _run("help", "bool", False, "Show the parameters and stop."),
    _run("help_full", "bool", False, "Show all parameters, hidden ones too, and stop.", hidden=True),
    Setting(
        "preset",
        "run",
        "str",
        None,
        "Usual values for a machine's slides, where you give none.",
        choices=("cosmx", "hyperion", "merscope", "molecular_cartography", "visium_hd", "xenium"),
    ),
    _run("estimate", "bool", False, "Say what the run will take, from the headers of its input, and stop."),
    _run(
        "prices",
        "str",
        None,
        "Prices for the estimate (YAML); default: the examples in assets/prices.yml.",
        is_file=True,
    ),
    _run(
        "disk_check",
        "str",
        "error",
        "What it means if the disks seem too small for the run: error, warn or none.",
        choices=("error", "warn", "none"),
    ),
    _run(
        "cleanup",
        "bool",
        False,
        "Delete what no task needs any more while the run goes on, and publish stores by hard links.",
    ),
    _run("max_retries", "int", 2, "How often a task is tried again after running out of memory or time.", minimum=0),
    _run(
        "on_sample_error",
        "str",
        "skip",
        "When a sample fails: go on with the others, or stop the run once the tasks that run have ended.",
        choices=("skip", "stop"),
    ),
    _run("email_on_fail", "str", None, "Where to send the summary of a run that failed.", pattern=r"^[^@\s]+@[^@\s]+$"),
    # --- site
    _site(
        "container_registry", "str", "localhost/", "Where the images are, up to their names.", pattern=r"^([^\s]+/)?$"
    ),
    _site("container_version", "str", __version__, "Tag of the images.", pattern=r"^(?!latest$)[\w][\w.-]*$"),
    _site(
        "queue",
        "str",
        None,
        "Queue, partition or pool of the scheduler for tasks without a GPU; default: its own.",
        early=True,
    ),
    _site(
        "gpu_queue",
        "str",
        None,
        "Queue, partition or pool for tasks with a GPU; default: that of the others.",
        early=True,
    ),
    _site(
        "gpu_options",
        "str",
        None,
        "What a scheduler is told for a GPU; default: '--gres=gpu:1' (Slurm), '-gpu num=1' (LSF), ngpus=1 (PBS).",
        early=True,
    ),
    _site(
        "gpu_type",
        "str",
        None,
        "Type of GPU on clouds that have several; default: the cloud's cheapest common one.",
        early=True,
    ),
    _site(
        "domains_gpu",
        "bool",
        False,
        "Ask for a GPU for training by the published recipe, and for networks of images.",
    ),
    _site("gpus", "int", None, "GPUs of this machine to use, one task on each; default: one.", minimum=1, early=True),
    _site(
        "gpu_fallback",
        "bool",
        False,
        "Where a GPU is asked for and there is none, or its memory is too small: use the processor, and say so.",
        early=True,
    ),
    _site("project", "str", None, "Account or project that is charged (Slurm, LSF, PBS, Google).", early=True),
    _site("region", "str", None, "Region of the cloud.", early=True),
    _site(
        "workdir_bucket",
        "str",
        None,
        "Folder of an object store for the work of cloud runs: s3://bucket/work, gs://bucket/work, az://container/work.",
        pattern=r"^(s3|gs|az)://[^/\s]+/[^\s]+$",
        early=True,
    ),
    _site(
        "spot", "bool", True, "On clouds: use machines that may be taken back; their tasks are tried again.", early=True
    ),
    _site("storage_claim", "str", None, "Kubernetes: the persistent volume claim that all pods share.", early=True),
    _site(
        "custom_config_base",
        "str",
        None,
        "Folder or address of institutional configurations; default: nf-core's.",
        hidden=True,
        early=True,
    ),
    _site(
        "custom_config_version",
        "str",
        "master",
        "Version of nf-core's institutional configurations.",
        hidden=True,
        early=True,
    ),
    # --- preview
    Setting(
        "preview",
        "preview",
        "int",
        0,
        "Try N windows of every slide instead of a full run.",
        minimum=0,
        per_sample=False,
    ),
    Setting(
        "preview_grid",
        "preview",
        "str",
        None,
        "Parameters to try: 'cellpose_diameter_um=8,10,12;expand_um=3,5'.",
        per_sample=False,
    ),
    Setting(
        "preview_size_um", "preview", "float", 100.0, "Width of a preview window in µm.", minimum=10, per_sample=False
    ),
    Setting("preview_seed", "preview", "int", 0, "Seed of the choice of windows.", minimum=0, per_sample=False),
    # --- convert
    Setting(
        "pixel_size_um", "convert", "float", None, "Pixel size in µm, where the file does not say it.", minimum=1e-6
    ),
    Setting(
        "z",
        "convert",
        "str",
        "max",
        "Plane to segment: a plane index, or the projection max, mean or middle.",
        pattern=r"^(max|mean|middle|\d+)$",
    ),
    Setting(
        "z_step_um", "convert", "float", 1.5, "Distance of z-planes in µm, where the file does not say it.", minimum=0
    ),
    Setting("x_column", "convert", "str", None, "Column of the transcript table with x."),
    Setting("y_column", "convert", "str", None, "Column of the transcript table with y."),
    Setting("z_column", "convert", "str", None, "Column of the transcript table with z."),
    Setting("gene_column", "convert", "str", None, "Column of the transcript table with the gene."),
    Setting("transcripts_unit", "convert", "str", "um", "Unit of x and y in a transcript table.", choices=("um", "px")),
    Setting(
        "prior_cells_unit",
        "convert",
        "str",
        "um",
        "Unit of the outlines in prior_cells; px are pixels of the main image.",
        choices=("um", "px"),
    ),
    Setting(
        "xenium_image",
        "convert",
        "str",
        "focus",
        "Image of a Xenium bundle: best focus (all stains), maximum projection or stack of DAPI, or none.",
        choices=("focus", "mip", "stack", "none"),
    ),
    Setting(
        "cosmx_image",
        "convert",
        "str",
        "auto",
        "Image of a CosMx slide: stains and, where there are, proteins (auto), stains alone, the composite, or none.",
        choices=("auto", "morphology", "composite", "none"),
    ),
    Setting(
        "visium_hd_bin_um",
        "convert",
        "int",
        2,
        "Width in µm of the bins of a Visium HD slide: 2, or one that Space Ranger added up, such as 8 or 16.",
        minimum=1,
        maximum=999,
    ),
    Setting(
        "visium_hd_counts",
        "convert",
        "str",
        "filtered",
        "Bins of a Visium HD slide: filtered are those in the tissue, raw are all.",
        choices=("filtered", "raw"),
    ),
    Setting(
        "visium_hd_image",
        "convert",
        "str",
        "fullres",
        "Image of a Visium HD slide: the microscope's, Space Ranger's small one (hires), or none.",
        choices=("fullres", "hires", "none"),
    ),
    Setting(
        "visium_hd_transcripts",
        "convert",
        "bool",
        False,
        "Write each count of a Visium HD slide as a transcript in its bin, too: for proseg and baysor.",
    ),
    Setting(
        "fullres_image",
        "convert",
        "str",
        None,
        "Microscope's image of a Visium HD slide; default: what lies in its folder.",
        is_file=True,
    ),
    Setting(
        "vendor_region",
        "convert",
        "str",
        None,
        "Region of a folder that holds several (MACSima, Hyperion, Molecular Cartography): one row of the sheet each.",
    ),
    Setting("bioio_scene", "convert", "str", None, "Scene of an image read by bioio: its name or its number from 0."),
    Setting("bioio_timepoint", "convert", "int", 0, "Time point of an image read by bioio, from 0.", minimum=0),
    Setting("chunk_px", "convert", "int", 2048, "Chunk width of the stored image in pixels.", minimum=64, hidden=True),
    # --- regions
    Setting(
        "regions_unit",
        "regions",
        "str",
        "px",
        "Unit of the coordinates of regions: px (of the main image, as QuPath has them) or um (Xenium Explorer).",
        keyword="unit",
        choices=("px", "um"),
    ),
    # --- tissue
    Setting(
        "tissue_mode",
        "tissue",
        "str",
        "auto",
        "How tissue is found: by staining, by saturation (H&E), or none (the whole image).",
        keyword="mode",
        choices=("auto", "staining", "saturation", "none"),
    ),
    # --- patch
    Setting("patch_width_um", "patch", "float", None, "Width of a patch in µm; default: 2048 pixels.", minimum=1),
    Setting(
        "patch_width_px",
        "patch",
        "int",
        None,
        "Width of a patch in pixels.",
        aliases=("patch_width", "patch_width_pixel"),
        minimum=64,
    ),
    Setting(
        "patch_overlap_um",
        "patch",
        "float",
        None,
        "Overlap of patches in µm; default: four expected diameters, a halo of two on either side.",
        minimum=0,
    ),
    Setting(
        "patch_overlap_px",
        "patch",
        "int",
        None,
        "Overlap of patches in pixels.",
        aliases=("patch_overlap", "patch_overlap_pixel"),
        minimum=0,
    ),
    Setting(
        "patches_per_task",
        "patch",
        "int",
        8,
        "Patches in one segmentation task; start-up and model loading are paid once a task.",
        minimum=1,
    ),
    Setting(
        "normalize",
        "patch",
        "str",
        "field",
        "Intensity normalisation: percentiles of the tissue, by field or one pair for the slide, or none.",
        choices=("field", "global", "none"),
    ),
    Setting("normalize_low", "patch", "float", 1.0, "Lower percentile that becomes 0.", minimum=0, maximum=100),
    Setting("normalize_high", "patch", "float", 99.0, "Upper percentile that becomes 1.", minimum=0, maximum=100),
    Setting("normalize_field_um", "patch", "float", 500.0, "Spacing of the normalisation grid in µm.", minimum=10),
    Setting("seed", "patch", "int", 0, "Seed of everything that samples.", minimum=0),
    # --- transcripts
    Setting(
        "transcripts_per_patch",
        "transcripts",
        "int",
        None,
        "Most transcripts in a patch, all about the same number; default: what the method can hold, or a million.",
        minimum=1000,
    ),
    Setting(
        "transcripts_patch_width_um",
        "transcripts",
        "float",
        None,
        "Width of a patch of transcripts in µm, instead of patches of about equal numbers; 0 or -1: one patch.",
        keyword="patch_width_um",
        aliases=("patch_width_microns",),
        minimum=-1,
    ),
    Setting(
        "transcripts_patch_overlap_um",
        "transcripts",
        "float",
        50.0,
        "Overlap of patches of transcripts in µm.",
        keyword="patch_overlap_um",
        aliases=("patch_overlap_microns",),
        minimum=1,
    ),
    Setting(
        "min_transcripts_per_patch",
        "transcripts",
        "int",
        4000,
        "Patches with fewer transcripts are sparse: joined to a neighbour where patches are of one width, else named.",
        aliases=("min_points_per_patch",),
        minimum=0,
    ),
    Setting(
        "transcripts_patches_per_task",
        "transcripts",
        "int",
        1,
        "Patches of transcripts in one segmentation task.",
        keyword="patches_per_task",
        minimum=1,
    ),
    Setting(
        "prior",
        "transcripts",
        "str",
        "auto",
        "Prior cells: auto, none, a shapes or labels element, a column of the transcripts, or a label image (TIFF).",
        aliases=("prior_shapes_key",),
        is_file=True,
        file_pattern=r"\.[tT][iI][fF]{1,2}$",
    ),
    Setting(
        "prior_unassigned",
        "transcripts",
        "list",
        None,
        "Values of the prior's column that mean no cell; default: UNASSIGNED, -1, 0 and nothing.",
        aliases=("unassigned_value",),
    ),
    # --- segmentation
    Setting(
        "segmentation",
        "segmentation",
        "str",
        "cellpose",
        "Segmentation method; or two, the cells of the first being the prior of the second, which takes transcripts.",
        choices=CHAINS,
    ),
    Setting(
        "on_patch_error",
        "segmentation",
        "str",
        "fail",
        "What an engine's error on one patch does: fail the slide, or skip the patch and say so.",
        choices=("fail", "skip"),
    ),
    Setting(
        "min_area_um2",
        "segmentation",
        "float",
        0.0,
        "Segmented objects below this area (µm²) are not cells.",
        keyword="min_area_um2",
        minimum=0,
    ),
    # --- cellpose
    Setting(
        "cellpose_model",
        "cellpose",
        "str",
        "nuclei",
        "The shipped model 'nuclei', or the path of a model file.",
        keyword="model",
    ),
    Setting(
        "cellpose_generation",
        "cellpose",
        "str",
        "3",
        "Generation of the library: 3 (CPnet models) or 4 (SAM).",
        keyword="generation",
        choices=("3", "4"),
    ),
    Setting(
        "cellpose_channels",
        "cellpose",
        "list",
        None,
        "Channels to segment: one, or cytoplasm then nucleus; default: the nuclear stain.",
        keyword="channels",
    ),
    Setting(
        "cellpose_diameter_um",
        "cellpose",
        "float",
        None,
        "Expected diameter in µm; default: estimated once a slide.",
        keyword="diameter_um",
        minimum=0.1,
    ),
    Setting(
        "cellpose_diameter_px",
        "cellpose",
        "float",
        None,
        "Expected diameter in pixels.",
        keyword="diameter",
        aliases=("cellpose_diameter",),
        minimum=1,
    ),
    Setting(
        "cellpose_flow_threshold",
        "cellpose",
        "float",
        0.4,
        "Largest flow error of a mask; 0 keeps all.",
        keyword="flow_threshold",
        minimum=0,
    ),
    Setting(
        "cellpose_cellprob_threshold",
        "cellpose",
        "float",
        0.0,
        "Smallest cell log-probability of a pixel.",
        keyword="cellprob_threshold",
    ),
    Setting("cellpose_gpu", "cellpose", "bool", False, "Use a GPU.", keyword="gpu"),
    Setting(
        "cellpose_batch_size",
        "cellpose",
        "int",
        None,
        "Network tiles in one batch on a GPU; default: as many as its free memory holds.",
        keyword="batch_size",
        minimum=1,
        hidden=True,
    ),
    # --- stardist
    Setting(
        "stardist_model_type",
        "stardist",
        "str",
        "nuclei",
        "The shipped model 'nuclei', the folder of a model, or a name of StarDist's registry such as 2D_versatile_he.",
        keyword="model_type",
        aliases=("stardist_model", "local_model"),
    ),
    Setting(
        "stardist_channels",
        "stardist",
        "list",
        None,
        "Channels to segment, as many as the model takes; default: the nuclear stain, or all three colours.",
        keyword="channels",
    ),
    Setting(
        "stardist_prob_thresh",
        "stardist",
        "float",
        None,
        "Smallest object probability; default: the model's own.",
        keyword="prob_thresh",
        minimum=0,
        maximum=1,
    ),
    Setting(
        "stardist_nms_thresh",
        "stardist",
        "float",
        None,
        "Objects that overlap by more than this are one; default: the model's own.",
        keyword="nms_thresh",
        minimum=0,
        maximum=1,
    ),
    Setting(
        "stardist_diameter_um",
        "stardist",
        "float",
        None,
        "Expected diameter in µm, for the overlap of patches and, where the model's is known, the scale.",
        keyword="diameter_um",
        minimum=0.1,
    ),
    Setting(
        "stardist_diameter_px",
        "stardist",
        "float",
        None,
        "Expected diameter in pixels; default: estimated once a slide for the shipped model, 9 µm for others.",
        keyword="diameter",
        aliases=("stardist_diameter",),
        minimum=1,
    ),
    Setting(
        "stardist_scale",
        "stardist",
        "float",
        None,
        "Scale of the image that the network sees; default: from the diameters, or 1 where the model's is not known.",
        keyword="scale",
        minimum=0.05,
        maximum=20,
    ),
    Setting("stardist_gpu", "stardist", "bool", False, "Use a GPU.", keyword="gpu"),
    # --- generic
    Setting(
        "generic_function",
        "generic",
        "str",
        None,
        "Importable segmenter 'module:function', (C, Y, X) image to (Y, X) labels.",
        keyword="function",
        pattern=r"^[\w.]+:[\w.]+$",
    ),
    Setting("generic_kwargs", "generic", "str", "{}", "Keyword arguments of the function as JSON.", keyword="kwargs"),
    Setting(
        "generic_channels",
        "generic",
        "list",
        None,
        "Channels given to the function; default: the nuclear stain.",
        keyword="channels",
    ),
    Setting(
        "generic_diameter_um",
        "generic",
        "float",
        10.0,
        "Expected diameter in µm; sets the halo.",
        keyword="diameter_um",
        minimum=0.1,
    ),
    # --- baysor
    Setting(
        "baysor_scale_um",
        "baysor",
        "float",
        None,
        "Expected radius of a cell in µm; default: estimated from the prior cells.",
        keyword="scale_um",
        minimum=0.01,
    ),
    Setting(
        "baysor_min_molecules_per_cell",
        "baysor",
        "int",
        None,
        "Fewest transcripts of a cell; default: 10.",
        keyword="min_molecules_per_cell",
        minimum=1,
    ),
    Setting(
        "baysor_prior_confidence",
        "baysor",
        "float",
        None,
        "Confidence in the prior cells, from 0 (ignored) to 1 (never contradicted); default: 0.8.",
        keyword="prior_confidence",
        minimum=0,
        maximum=1,
    ),
    Setting(
        "baysor_n_clusters",
        "baysor",
        "int",
        None,
        "Clusters of molecules, about the number of main cell types; default: Baysor's.",
        keyword="n_clusters",
        minimum=1,
    ),
    Setting(
        "baysor_iterations",
        "baysor",
        "int",
        None,
        "Iterations, each time the same number; default: Baysor's.",
        keyword="iterations",
        minimum=1,
    ),
    Setting(
        "baysor_force_2d",
        "baysor",
        "bool",
        None,
        "Ignore z; default: only where z is the same everywhere.",
        keyword="force_2d",
    ),
    Setting(
        "baysor_config",
        "baysor",
        "str",
        None,
        "Further settings of Baysor: its TOML file, or the same as JSON; the parameters here win over it.",
        keyword="config",
        is_file=True,
        file_pattern=r"^\s*[^\s{]",
    ),
    Setting(
        "baysor_via",
        "baysor",
        "str",
        "auto",
        "The way to Baysor: its executable, Julia in the same process (0.7), or the executable where there is one.",
        keyword="via",
        choices=("auto", "executable", "julia"),
    ),
    Setting(
        "baysor_executable",
        "baysor",
        "str",
        None,
        "The executable (0.6 or 0.7); default: baysor on PATH or in ~/.julia/bin.",
        keyword="executable",
        per_sample=False,
    ),
    Setting(
        "baysor_timeout_min",
        "baysor",
        "float",
        None,
        "Stop the executable on a patch after so many minutes; default: never.",
        keyword="timeout_min",
        minimum=0.001,
    ),
    # --- proseg
    Setting(
        "proseg_burnin_samples",
        "proseg",
        "int",
        200,
        "Iterations with large voxels before the result is sampled.",
        keyword="burnin_samples",
        minimum=1,
    ),
    Setting(
        "proseg_samples",
        "proseg",
        "int",
        200,
        "Iterations with small voxels; expected counts are means over the last 100.",
        keyword="samples",
        minimum=1,
    ),
    Setting(
        "proseg_voxel_size_um",
        "proseg",
        "float",
        1.0,
        "Width of the voxels that cells are made of in µm.",
        keyword="voxel_size_um",
        minimum=0.1,
        maximum=20,
    ),
    Setting(
        "proseg_voxel_layers",
        "proseg",
        "int",
        4,
        "Layers of voxels; at most one for each z that occurs.",
        keyword="voxel_layers",
        minimum=1,
        maximum=256,
    ),
    Setting(
        "proseg_max_transcripts",
        "proseg",
        "int",
        None,
        "Most transcripts in one run; a slide with more is cut into tiles. Default: as many as proseg_memory_gb holds.",
        keyword="max_transcripts",
        minimum=1000,
    ),
    Setting(
        "proseg_memory_gb",
        "proseg",
        "float",
        10.0,
        "Memory that one run may take in GB, from which the number of tiles follows.",
        keyword="memory_gb",
        minimum=0.1,
    ),
    Setting(
        "proseg_args",
        "proseg",
        "str",
        None,
        "Further options of proseg as on its command line, for example '--prior-weight 2 --enforce-connectivity'.",
        keyword="args",
    ),
    Setting(
        "proseg_executable",
        "proseg",
        "str",
        None,
        "The executable (3.x); default: proseg on PATH, in ~/.cargo/bin or in the cache of `make setup`.",
        keyword="executable",
        aliases=("proseg_binary",),
        per_sample=False,
    ),
    Setting(
        "proseg_timeout_min",
        "proseg",
        "float",
        None,
        "Stop the executable on a patch after so many minutes; default: never.",
        keyword="timeout_min",
        minimum=0.001,
    ),
    # --- resolve
    Setting(
        "resolve_threshold",
        "resolve",
        "float",
        0.5,
        "Two cells of different patches are the same from this overlap / smaller area on.",
        keyword="threshold",
        minimum=0.01,
        maximum=1,
    ),
    Setting(
        "resolve_rule",
        "resolve",
        "str",
        "choose",
        "Choose one of several copies, or merge them (union, as Sopa).",
        keyword="rule",
        choices=("choose", "union"),
    ),
    Setting(
        "expand_um",
        "resolve",
        "float",
        None,
        "Growth of nuclei to cells in µm; default: 5 for nuclear models, 0 for others.",
        minimum=0,
    ),
    # --- aggregate
    Setting(
        "count_z",
        "aggregate",
        "str",
        "all",
        "Count transcripts of all planes, or of the segmented plane only.",
        choices=("all", "same"),
    ),
    Setting(
        "average_intensities",
        "aggregate",
        "bool",
        True,
        "Measure mean, minimum and maximum of every channel in every cell.",
        aliases=("aggregate_channels",),
    ),
    Setting(
        "bins_key",
        "aggregate",
        "str",
        None,
        "Table of bins to count instead of transcripts; default: bins, where the slide has no transcripts.",
    ),
    Setting(
        "bins_rule",
        "aggregate",
        "str",
        "centre",
        "The cell of a bin: the one that its centre lies in, or the one that covers most of it.",
        choices=("centre", "overlap"),
    ),
    Setting(
        "bins_expand_um",
        "aggregate",
        "float",
        0.0,
        "Bins in no cell are counted in the nearest one within this distance in µm, from centre to centre of bins.",
        aliases=("expand_radius_um",),
        minimum=0,
    ),
    Setting("min_transcripts", "aggregate", "int", 0, "Cells with fewer counted transcripts fail QC.", minimum=0),
    Setting("min_cell_area_um2", "aggregate", "float", 0.0, "Cells smaller than this (µm²) fail QC.", minimum=0),
    Setting("max_cell_area_um2", "aggregate", "float", None, "Cells larger than this (µm²) fail QC.", minimum=0),
    Setting("drop_failed", "aggregate", "bool", False, "Remove cells that fail QC instead of marking them."),
    Setting(
        "min_qv",
        "convert",
        "float",
        20.0,
        "Transcripts below this quality value are not counted (where the machine gives one).",
        minimum=0,
    ),
    # --- compare
    Setting(
        "compare",
        "compare",
        "list",
        None,
        "Methods to compare with the chosen one, by commas; in a chain the methods are joined by a plus.",
        keyword="methods",
        choices=tuple(chain.replace(",", "+") for chain in CHAINS),
    ),
    Setting(
        "compare_markers",
        "compare",
        "str",
        None,
        "File of pairs of genes that no cell expresses together (CSV: gene_a, gene_b); default: found on the slide.",
        keyword="markers",
        aliases=("marker_pairs",),
        is_file=True,
    ),
    Setting(
        "compare_reference",
        "compare",
        "str",
        None,
        "Mean expression of cell types (CSV or h5ad) to take pairs of exclusive genes from, without compare_markers.",
        keyword="reference",
        aliases=("marker_reference",),
        is_file=True,
    ),
    # --- domains
    Setting(
        "domains_radius",
        "domains_graph",
        "float",
        80.0,
        "Cells farther apart than this (µm) are no neighbours.",
        keyword="radius",
        aliases=("domains_radius_um",),
        minimum=0.1,
    ),
    Setting(
        "domains_graph",
        "domains_graph",
        "str",
        "auto",
        "Who is whose neighbour: by Delaunay triangulation, the nearest cells, or the grid of spots; auto looks at it.",
        keyword="mode",
        choices=("auto", "delaunay", "knn", "grid"),
    ),
    Setting(
        "domains_kind",
        "domains_graph",
        "str",
        "auto",
        "What a table holds: counts, their logarithms, or intensities of proteins; auto looks at it.",
        keyword="kind",
        choices=("auto", "counts", "log1p", "protein"),
    ),
    Setting(
        "domains_scale_to_um",
        "domains_graph",
        "float",
        1.0,
        "Length in µm of a unit of the coordinates of a cell table that was made elsewhere.",
        keyword="scale_to_um",
        minimum=1e-6,
    ),
    Setting(
        "domains_image_model",
        "domains_image",
        "str",
        None,
        "Network that looks at an aligned image around each cell: torchvision/NAME, timm/NAME, or module:function.",
        per_sample=False,
    ),
    Setting(
        "domains_image_weights",
        "domains_image",
        "str",
        None,
        "File with the weights of domains_image_model, .safetensors or what torch saved.",
        keyword="weights",
        per_sample=False,
        is_file=True,
    ),
    Setting(
        "domains_image",
        "domains_image",
        "str",
        None,
        "Name of the image of the slide's own store to look at, where the sheet has no he_image.",
    ),
    Setting(
        "domains_patch_um",
        "domains_image",
        "float",
        30.0,
        "Width in µm of what is seen around a cell.",
        keyword="patch_um",
        minimum=0.1,
        per_sample=False,
    ),
    Setting(
        "domains_um_per_px",
        "domains_image",
        "float",
        0.5,
        "Width in µm of its pixels: the magnification that the network was trained at (0.5 is 20×).",
        keyword="um_per_px",
        minimum=0.01,
        per_sample=False,
    ),
    Setting(
        "domains_image_components",
        "domains_image",
        "int",
        10,
        "Principal components, of all slides together, that are kept of what the network says.",
        keyword="n_components",
        minimum=1,
        per_sample=False,
    ),
    Setting(
        "domains",
        "domains",
        "str",
        "none",
        "Find spatial domains that all slides share: by a model as it is, or one trained on these slides.",
        choices=DOMAINS,
        per_sample=False,
    ),
    Setting(
        "domains_recipe",
        "domains",
        "str",
        "factors",
        "Model to train: factors in closed form, or the published graph attention.",
        keyword="recipe",
        choices=("factors", "published"),
        per_sample=False,
    ),
    Setting(
        "domains_model",
        "domains",
        "str",
        None,
        "Folder of a model to use or to go on from, ours or one saved by novae; `default` is the shipped one.",
        keyword="model",
        per_sample=False,
        is_folder=True,
    ),
    Setting(
        "domains_n",
        "domains",
        "int",
        None,
        "How many domains all slides have together, instead of domains_level.",
        keyword="n_domains",
        minimum=1,
        per_sample=False,
    ),
    Setting(
        "domains_seed",
        "domains",
        "int",
        0,
        "Seed of training, and of the choice of cells that domains are made from.",
        keyword="seed",
        minimum=0,
        per_sample=False,
    ),
    Setting(
        "domains_max_epochs",
        "domains_training",
        "int",
        None,
        "Most epochs of training of a published model; default: 20.",
        keyword="max_epochs",
        minimum=1,
        per_sample=False,
    ),
    Setting(
        "domains_processes",
        "domains_training",
        "int",
        1,
        "Processes, or GPUs, that share the work of an epoch; part of the result's identity.",
        keyword="processes",
        minimum=1,
        per_sample=False,
    ),
    Setting(
        "domains_checkpoints",
        "domains_training",
        "str",
        None,
        "Folder that keeps the state of an unfinished training, so that one that is tried again goes on from it.",
        keyword="checkpoints",
        per_sample=False,
        is_folder=True,
    ),
    Setting(
        "domains_level",
        "domains_level",
        "int",
        7,
        "Level of the tree of domains: so many there are, of which the slides may show fewer.",
        keyword="level",
        minimum=1,
        per_sample=False,
    ),
    Setting(
        "domains_resolution",
        "domains_level",
        "float",
        None,
        "Resolution of a Leiden clustering that makes the domains instead.",
        keyword="resolution",
        minimum=1e-6,
        per_sample=False,
    ),
    # --- cluster
    Setting(
        "cluster",
        "cluster",
        "bool",
        False,
        "Cluster the cells of each slide (Leiden), and find the markers of the clusters.",
    ),
    Setting(
        "cluster_resolution",
        "cluster",
        "float",
        1.0,
        "Resolution of Leiden: more, more clusters.",
        keyword="resolution",
        minimum=1e-6,
    ),
    Setting(
        "cluster_n_neighbors",
        "cluster",
        "int",
        15,
        "Most similar cells that a cell is joined to.",
        keyword="n_neighbors",
        minimum=2,
    ),
    Setting(
        "cluster_n_pcs", "cluster", "int", 50, "Principal components, at most.", keyword="n_pcs", minimum=1, maximum=500
    ),
    Setting(
        "cluster_n_top_genes",
        "cluster",
        "int",
        None,
        "Most variable genes to look at; default: all of a panel of up to 5000, else 3000.",
        keyword="n_top_genes",
        minimum=2,
    ),
    Setting("cluster_n_markers", "cluster", "int", 10, "Markers of a cluster to list.", keyword="n_markers", minimum=1),
    Setting("cluster_seed", "cluster", "int", 0, "Seed of clusters.", keyword="seed", minimum=0, hidden=True),
    # --- annotate
    Setting(
        "annotate_markers",
        "annotate",
        "str",
        None,
        "File with the markers of cell types to name cells by (CSV or JSON).",
        keyword="markers",
        is_file=True,
    ),
    Setting(
        "annotate_reference",
        "annotate",
        "str",
        None,
        "Reference whose cells have types, to name cells by (.h5ad).",
        keyword="reference",
        is_file=True,
    ),
    Setting(
        "annotate_label",
        "annotate",
        "str",
        None,
        "Column of the reference's obs with the types.",
        keyword="label",
    ),
    Setting(
        "annotate_min_score",
        "annotate",
        "float",
        0.5,
        "By markers: cells whose best type scores less, from 0 to 1, are unknown.",
        keyword="min_score",
        minimum=0,
        maximum=1,
    ),
    Setting(
        "annotate_min_margin",
        "annotate",
        "float",
        0.1,
        "By markers: cells whose two best types score so alike are unknown.",
        keyword="min_margin",
        minimum=0,
        maximum=1,
    ),
    Setting(
        "annotate_min_confidence",
        "annotate",
        "float",
        0.5,
        "By a reference: cells of which a smaller share of neighbours agrees are unknown.",
        keyword="min_confidence",
        minimum=0,
        maximum=1,
    ),
    Setting(
        "annotate_min_genes",
        "annotate",
        "int",
        20,
        "By a reference: genes that it must share with a slide.",
        keyword="min_genes",
        minimum=2,
    ),
    Setting(
        "annotate_n_neighbors",
        "annotate",
        "int",
        15,
        "By a reference: its nearest cells that vote.",
        keyword="n_neighbors",
        minimum=1,
    ),
    Setting(
        "annotate_n_pcs",
        "annotate",
        "int",
        50,
        "By a reference: principal components, at most.",
        keyword="n_pcs",
        minimum=1,
        maximum=500,
    ),
    Setting(
        "annotate_scaling",
        "annotate",
        "str",
        "reference",
        "By a reference: scale genes of both by the reference's cells, or each by its own.",
        keyword="scaling",
        choices=("reference", "each"),
    ),
    Setting("annotate_seed", "annotate", "int", 0, "Seed of annotation.", keyword="seed", minimum=0, hidden=True),
    # --- stats
    Setting(
        "stats",
        "stats",
        "bool",
        False,
        "Measure each slide's cells in space: neighbourhoods, distances, niches; compare conditions over all slides.",
        per_sample=False,
    ),
    Setting(
        "stats_cell_type",
        "stats",
        "str",
        None,
        "Column of obs with the cell types; default: the first of cell_type, cluster and leiden that is there.",
        keyword="cell_type",
    ),
    Setting(
        "stats_domain",
        "stats",
        "str",
        None,
        "Column of obs with the domains; default: domain, if it is there.",
        keyword="domain",
    ),
    Setting(
        "stats_radius",
        "stats",
        "float",
        80.0,
        "Longest edge in µm between neighbours, where the cells have no graph of domains.",
        keyword="radius",
        aliases=("stats_radius_um",),
        minimum=0.001,
    ),
    Setting(
        "stats_reach_um",
        "stats",
        "float",
        100.0,
        "Largest distance of the co-occurrence, in ten rings; time grows with its square.",
        keyword="reach_um",
        minimum=0.001,
    ),
    Setting("stats_min_cells", "stats", "int", 10, "Cells that make a niche.", keyword="min_cells", minimum=1),
    Setting(
        "stats_permutations",
        "stats",
        "int",
        200,
        "Random orders of the cells' groups that p-values are from.",
        keyword="permutations",
        minimum=0,
    ),
    Setting("stats_seed", "stats", "int", 0, "Seed of the permutations.", keyword="seed", minimum=0, hidden=True),
    # --- report
    Setting(
        "qc_thresholds",
        "report",
        "str",
        None,
        "File with the limits of the QC verdict (YAML); default: assets/qc_thresholds.yml.",
        per_sample=False,
        is_file=True,
    ),
    Setting(
        "report_truth",
        "report",
        "bool",
        True,
        "Score against the truth where a simulated slide brings it.",
        hidden=True,
    ),
    # --- export
    Setting(
        "export",
        "export",
        "list",
        None,
        "Programs to write the cells for, by commas.",
        keyword="formats",
        choices=EXPORTS,
    ),
    # --- explorer
    Setting(
        "explorer",
        "explorer",
        "bool",
        True,
        "Write each slide as a folder for Xenium Explorer.",
    ),
    Setting(
        "explorer_compression",
        "explorer",
        "str",
        "deflate",
        "Compression of the folder's image; jpeg2000 is smaller and takes many times as long.",
        keyword="compression",
        choices=("deflate", "jpeg2000"),
    ),
    Setting(
        "explorer_max_vertices",
        "explorer",
        "int",
        25,
        "Most corners of a polygon in the viewer, the first repeated as last.",
        keyword="max_vertices",
        minimum=5,
        maximum=255,
    ),
    Setting(
        "explorer_tables",
        "explorer",
        "bool",
        False,
        "Write the tables of a Xenium bundle too (Parquet), for programs that read bundles.",
        keyword="tables",
    ),
    # --- resources
    Setting(
        "memory_mb",
        "resources",
        "int",
        1500,
        "Memory a task may use for data in MB; work is cut to fit.",
        minimum=200,
        per_sample=False,
        hidden=True,
    ),
    Setting(
        "threads",
        "resources",
        "int",
        1,
        "Threads of engines and numerical libraries in a task; part of the result's identity.",
        minimum=1,
        per_sample=False,
        hidden=True,
    ),
)

#: What a preset brings: setting → value. What the user gives for the run or for a sample wins.
PRESETS: dict[str, dict[str, Value]] = {
    "cosmx": {"z_step_um": 0.8, "min_transcripts": 10},
    "hyperion": {"pixel_size_um": 1.0},
    "merscope": {"z": "middle", "min_transcripts": 10},
    "molecular_cartography": {"pixel_size_um": 0.138, "min_transcripts": 10},
    "visium_hd": {
        "segmentation": "stardist",
        "stardist_model_type": "2D_versatile_he",
        "normalize_high": 99.8,
        "proseg_voxel_size_um": 2.0,
        "min_transcripts": 20,
    },
    "xenium": {"min_qv": 20.0, "min_transcripts": 10},
}

BY_NAME: dict[str, Setting] = {setting.name: setting for setting in SETTINGS}
ALIASES: dict[str, str] = {alias: setting.name for setting in SETTINGS for alias in setting.aliases}


def default(name: str) -> Any:
    """The default of a setting."""
    return BY_NAME[name].default


def methods_of(values: Mapping[str, Any]) -> list[str]:
    """The methods of a slide, the chosen one first, then those compared with it; a chain's are joined by a plus.

    Examples
    --------
    >>> methods_of({"segmentation": "cellpose,proseg", "compare": ["vendor", "cellpose"]})
    ['cellpose+proseg', 'vendor', 'cellpose']
    """
    chosen = values["segmentation"].replace(",", "+")
    return list(dict.fromkeys([chosen, *(values["compare"] or [])]))


def element_name(method: str) -> str:
    """A method's name as part of an element's name, ``cellpose_proseg`` for ``cellpose+proseg``."""
    return method.replace("+", "_")


def method_of_stage(segmentation: str, stage: str) -> str | None:
    """The method of a chain that a stage is about; None if it has none of the kind.

    Examples
    --------
    >>> method_of_stage("cellpose,proseg", "segment_transcripts")
    'proseg'
    """
    kind = TRANSCRIPT_METHODS if stage.endswith("_transcripts") else METHODS
    return next((method for method in segmentation.split(",") if method in kind), None)


def of_stage(stage: str) -> list[Setting]:
    """The settings that a pipeline stage is handed."""
    return [setting for setting in SETTINGS if stage in GROUPS[setting.group][1]]


def check(setting: Setting, value: Any) -> Value:
    """A value as the setting's type, from text or from JSON.

    Raises
    ------
    CellquiltError
        ``parameter-type``, ``parameter-range``, ``parameter-choice`` or ``parameter-twice``.
    """
    if value is None:
        return None
    typed = _typed(setting, value)
    if setting.choices:
        _check_choices(setting, typed, value)
    if setting.pattern:
        import re

        if not re.search(setting.pattern, str(typed)):
            raise CellquiltError("parameter-choice", f"{setting.name} is {_show(value)}; expected {setting.help}")
    if isinstance(typed, int | float) and not isinstance(typed, bool):
        below = setting.minimum is not None and typed < setting.minimum
        above = setting.maximum is not None and typed > setting.maximum
        if below or above:
            raise CellquiltError("parameter-range", f"{setting.name} is {_show(value)}; expected {_range(setting)}")
    return typed


def _check_choices(setting: Setting, typed: Value, value: Any) -> None:
    verb, how_many, chosen = ("names", "some", typed) if isinstance(typed, list) else ("is", "one", [typed])
    for choice in chosen:
        if choice not in setting.choices:
            shown = choice if isinstance(typed, list) else value
            raise CellquiltError(
                "parameter-choice",
                f"{setting.name} {verb} {_show(shown)}; expected {how_many} of {', '.join(setting.choices)}",
                did_you_mean(str(shown), setting.choices),
            )
        if chosen.count(choice) > 1:
            raise CellquiltError("parameter-twice", f"{setting.name} names {_show(choice)} twice")


def _range(setting: Setting) -> str:
    low = "" if setting.minimum is None else f"at least {setting.minimum:g}"
    high = "" if setting.maximum is None else f"at most {setting.maximum:g}"
    return " and ".join(part for part in (low, high) if part) or "a number"


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


_KIND_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "text"}


def _typed(setting: Setting, value: Any) -> Value:
    wrong = CellquiltError("parameter-type", f"{setting.name} is {_show(value)}; expected {_KIND_NAMES[setting.kind]}")
    match setting.kind:
        case "bool":
            if isinstance(value, bool):
                return value
            if str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
            raise wrong
        case "int" | "float":
            if isinstance(value, bool):
                raise wrong
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise wrong from None
            if not math.isfinite(number):
                raise wrong
            if setting.kind == "float":
                return number
            if number != int(number):
                raise wrong
            return int(number)
        case "list":
            parts = value if isinstance(value, list | tuple) else str(value).split(",")
            return [str(part).strip() for part in parts if str(part).strip()]
        case _:
            if isinstance(value, bool | dict | list):
                raise wrong
            return str(value)


def resolve_name(name: str) -> str:
    """The setting's name for a name or alias, in snake or kebab case.

    Raises
    ------
    CellquiltError
        ``parameter-unknown`` with the nearest known name.
    """
    snake = name.replace("-", "_")
    found = ALIASES.get(snake, snake)
    if found in BY_NAME:
        return found
    hint = did_you_mean(snake, BY_NAME)
    raise CellquiltError(
        "parameter-unknown",
        f'unknown parameter "{name}"',
        "--help lists them" if hint.startswith("known:") else hint,
    )


def check_all(values: Mapping[str, Any]) -> dict[str, Value]:
    """Check many settings; all mistakes in one error.

    Returns
    -------
    dict
        Name → typed value, without those that are None.
    """
    errors: list[CellquiltError] = []
    checked: dict[str, Value] = {}
    for name, value in values.items():
        try:
            setting = BY_NAME[resolve_name(name)]
            typed = check(setting, value)
            if typed is not None:
                checked[setting.name] = typed
        except CellquiltError as error:
            errors.append(error)
    if errors:
        raise SeveralErrors("parameters-invalid", "The parameters have mistakes:", errors)
    return checked


class Settings(Mapping[str, Any]):
    """The values in force: what the user gave, over those of the preset, over the table's defaults.

    Parameters
    ----------
    given
        Name or alias → value; checked.

    Examples
    --------
    >>> Settings(expand_um="3")["expand_um"]
    3.0
    >>> Settings(preset="merscope")["z"]
    'middle'
    """

    def __init__(self, given: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        checked = check_all({**(given or {}), **more})
        self.given = {**PRESETS.get(str(checked.get("preset")), {}), **checked}

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, BY_NAME[name].default)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(BY_NAME)

    def __len__(self) -> int:
        return len(BY_NAME)

    def of_stage(self, stage: str) -> dict[str, Any]:
        """The values a stage depends on, for its record; of a chain of methods the stage's own."""
        values = {setting.name: self[setting.name] for setting in of_stage(stage)}
        if "segmentation" in values:
            values["segmentation"] = method_of_stage(values["segmentation"], stage)
        return values

    def to_json(self, stage: str) -> str:
        """The values a stage depends on as one line of JSON that is safe between single quotes in a shell."""
        return json.dumps(self.of_stage(stage), sort_keys=True).replace("'", "\\u0027")
