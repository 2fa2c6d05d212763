"""What a simulated slide is made of: one table of numbers, three presets."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from cellquilt.core.errors import CellquiltError, SeveralErrors, did_you_mean


@dataclass(frozen=True)
class Parameters:
    """Everything that shapes a simulated slide. Lengths in µm, shares in 0..1.

    Attributes
    ----------
    width_px, height_px, pixel_size_um
        The canvas.
    seed
        Seed of everything.
    n_genes
        Genes of the whole panel; None takes the calibrated ones (259).
    n_domains
        Tissue domains, 1 to 8.
    domain_um
        Typical width of a domain.
    domain_shares
        Share of the canvas of every domain; None makes all layers equal. A domain of share 0 is absent.
    domain_contrast
        How strongly domains differ in their mix of cell types (its log) and in their programmes of genes.
    n_niches, niche_um
        How many of the domains, the last ones, are islands within the others, and the typical width of an island. Of
        equal shares each has 4 %.
    tissue_fraction
        Share of the canvas inside the tissue's outline; the rest is glass.
    empty_fraction, necrotic_fraction
        Share of the tissue that is empty (vessels, tears) and necrotic (no nuclei, faint, little RNA).
    density
        Share of the places for cells that hold one; 1 packs the tissue densely.
    overlap
        0: neighbouring cells press against each other; 1: they are squeezed to about half their size and nuclei
        overlap.
    pairing
        Share of pairs of nearest neighbours whose nuclei lie against their common border, and so touch.
    size
        Factor on all cell and nucleus diameters.
    no_nucleus
        Share of cells whose nucleus lies out of the plane; half of them show a faint blur of it.
    brightness_spread
        Standard deviation of the log of the brightness of nuclei.
    contrast
        Factor on the signal of nuclei and membranes over background.
    background, haze
        Factors on the background and on the out-of-focus light.
    blur_um
        Standard deviation of the point spread function.
    noise
        Factor on shot and read noise.
    illumination_gradient
        Brightness at the right edge over that at the left edge; 5 means a fivefold rise across the slide.
    fov_um, fov_spread, vignetting, fov_dropout
        Width of a field of view, standard deviation of the log of its gain, loss of light in its corners, share of
        fields that were lost.
    density_factor
        Factor on the number of transcripts.
    ambient
        Share of transcripts that belong to no cell.
    diffusion, diffusion_um
        Share of transcripts that left their place and how far (standard deviation).
    control_rate
        Share of transcripts that are controls (``Blank-*``); None takes the calibrated one.
    cell_type_contrast
        How strongly cell types differ in expression.
    """

    width_px: int = 2048
    height_px: int = 2048
    pixel_size_um: float = 0.2125
    seed: int = 0
    n_genes: int | None = None
    n_domains: int = 4
    domain_um: float = 150.0
    domain_shares: tuple[float, ...] | None = None
    domain_contrast: float = 1.0
    n_niches: int = 0
    niche_um: float = 60.0
    tissue_fraction: float = 1.0
    empty_fraction: float = 0.06
    necrotic_fraction: float = 0.02
    density: float = 1.0
    overlap: float = 0.0
    pairing: float = 0.3
    size: float = 1.0
    no_nucleus: float = 0.08
    brightness_spread: float = 0.22
    contrast: float = 1.0
    background: float = 1.0
    haze: float = 1.0
    blur_um: float = 0.35
    noise: float = 1.0
    illumination_gradient: float = 1.0
    fov_um: float = 200.0
    fov_spread: float = 0.03
    vignetting: float = 0.08
    fov_dropout: float = 0.002
    density_factor: float = 1.0
    ambient: float = 0.03
    diffusion: float = 0.06
    diffusion_um: float = 1.5
    control_rate: float | None = None
    cell_type_contrast: float = 1.0


#: Differences to the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Few cells, apart, bright and even: what every method should solve.
    "easy": {
        "density": 0.45,
        "pairing": 0.0,
        "no_nucleus": 0.0,
        "empty_fraction": 0.0,
        "necrotic_fraction": 0.0,
        "haze": 0.3,
        "noise": 0.5,
        "fov_spread": 0.0,
        "vignetting": 0.0,
        "fov_dropout": 0.0,
        "ambient": 0.01,
        "diffusion": 0.0,
    },
    # Squeezed, overlapping, dim and uneven, RNA everywhere: thresholds and nearest nuclei fail.
    "hard": {
        "overlap": 0.6,
        "pairing": 0.6,
        "no_nucleus": 0.2,
        "empty_fraction": 0.1,
        "necrotic_fraction": 0.08,
        "brightness_spread": 0.6,
        "contrast": 0.3,
        "background": 2.0,
        "haze": 2.5,
        "blur_um": 0.6,
        "noise": 1.5,
        "illumination_gradient": 4.0,
        "fov_spread": 0.15,
        "vignetting": 0.35,
        "fov_dropout": 0.06,
        "ambient": 0.12,
        "diffusion": 0.3,
        "diffusion_um": 3.0,
    },
}

_SHARES = (
    "tissue_fraction", "empty_fraction", "necrotic_fraction", "density", "overlap", "pairing", "no_nucleus",
    "vignetting", "fov_dropout", "ambient", "diffusion", "control_rate",
)  # fmt: skip
_POSITIVE = ("pixel_size_um", "domain_um", "size", "contrast", "blur_um", "illumination_gradient", "fov_um", "niche_um")
_NOT_NEGATIVE = (
    "brightness_spread", "background", "haze", "noise", "fov_spread", "density_factor", "diffusion_um",
    "cell_type_contrast", "domain_contrast",
)  # fmt: skip


def make_parameters(preset: str = "default", **given: Any) -> Parameters:
    """The parameters of a preset with the given ones over it.

    Raises
    ------
    CellquiltError
        ``simulate-preset`` for an unknown preset, ``simulate-parameter`` for an unknown name, and ``simulate-value``
        with all values that are out of range.
    """
    if preset not in PRESETS:
        raise CellquiltError("simulate-preset", f'unknown preset "{preset}"', did_you_mean(preset, PRESETS))
    known = {field.name for field in dataclasses.fields(Parameters)}
    for name in given:
        if name not in known:
            raise CellquiltError("simulate-parameter", f'unknown parameter "{name}"', did_you_mean(name, known))
    values = {**PRESETS[preset], **given}
    if "height_px" not in values and "width_px" in values:
        values["height_px"] = values["width_px"]
    parameters = Parameters(**values)
    errors = _mistakes(parameters)
    if errors:
        raise SeveralErrors("simulate-value", "The simulation's parameters have mistakes:", errors)
    return parameters


def _mistakes(parameters: Parameters) -> list[CellquiltError]:
    ranges: dict[str, tuple[float, float]] = dict.fromkeys(_SHARES, (0.0, 1.0))
    ranges |= dict.fromkeys(_POSITIVE, (1e-06, 1000000000.0))
    ranges |= dict.fromkeys(_NOT_NEGATIVE, (0.0, 1000000000.0))
    ranges |= {"width_px": (16, 2**20), "height_px": (16, 2**20), "n_domains": (1, 8), "n_genes": (10, 100_000)}
    ranges |= {"seed": (0, 2**62), "overlap": (0.0, 1.0), "size": (0.3, 3.0)}
    errors = []
    for name, (low, high) in ranges.items():
        value = getattr(parameters, name)
        if value is not None and not low <= value <= high:
            message = f"{name} is {value}; expected a number from {low:g} to {high:g}"
            errors.append(CellquiltError("simulate-value", message))
    return errors + _domain_mistakes(parameters)


def _domain_mistakes(parameters: Parameters) -> list[CellquiltError]:
    n, niches, shares = parameters.n_domains, parameters.n_niches, parameters.domain_shares
    errors = []
    if not 0 <= niches < n:
        errors.append(f"n_niches is {niches}; expected 0 to {n - 1}, as one of the {n} domains lies around them")
    elif shares is not None:
        if len(shares) != n:
            errors.append(f"domain_shares has {len(shares)} numbers; expected {n}, one for each domain")
        elif min(shares) < 0 or sum(shares[: n - niches]) <= 0 or sum(shares[n - niches :]) >= 0.9:
            errors.append(
                f"domain_shares is {shares}; expected no negative number, a layer above 0, niches below 0.9 together"
            )
    return [CellquiltError("simulate-value", message) for message in errors]
