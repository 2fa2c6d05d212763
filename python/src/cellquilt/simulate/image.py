"""What the camera sees: a nuclear stain and a membrane and cytoplasm stain, as a widefield microscope would show them.

Light of the plane is blurred by the sharp part of the point spread function, and a part of it spreads widely (haze).
Nuclei out of focus are a wide blur. Illumination varies over the slide and inside every field of view. The camera
adds an offset, shot noise and read noise. Levels were chosen by eye and histogram after the real MERSCOPE images.
"""

import math

import numba
import numpy as np

from cellquilt.simulate.cells import IN_PLANE, OUT_OF_FOCUS, Cells
from cellquilt.simulate.masks import Masks, radius_at
from cellquilt.simulate.parameters import Parameters
from cellquilt.simulate.randomness import (
    STREAM_BACKGROUND,
    STREAM_CAMERA,
    STREAM_CELL_TEXTURE,
    STREAM_DEBRIS,
    STREAM_FOV,
    STREAM_NUCLEUS_TEXTURE,
    STREAM_SPOTS,
    cheap_normal,
    mix,
    normal,
    place_key,
    smooth_noise,
    start,
    uniform,
)
from cellquilt.simulate.transcripts import field_number, lost_below

CHANNELS = ("DAPI", "Cellbound")
COARSE = 4  # haze is computed on pixels of this many times the size
PAD_UM = 10.0  # light reaches no farther than this
HAZE_UM = 2.2
OUT_OF_FOCUS_UM = 1.1

# offset, background, signal (grey values), grey values an electron, read noise
CAMERA = {
    "DAPI": (2400.0, 1300.0, 13000.0, 18.0, 60.0),
    "Cellbound": (400.0, 180.0, 2100.0, 3.0, 15.0),
}


def pad_px(parameters: Parameters) -> int:
    """Margin in pixels around a window that light may come from; a multiple of 8."""
    return 8 * math.ceil(PAD_UM / parameters.pixel_size_um / 8)


def render(
    parameters: Parameters,
    seed: int,
    cells: Cells,
    masks: Masks,
    window: tuple[int, int, int, int],
    channels: tuple[str, ...] = CHANNELS,
    plane: int | None = None,
) -> np.ndarray:
    """The image of a window.

    Parameters
    ----------
    cells, masks
        Of the window and at least `pad_px` around it.
    window
        (y0, y1, x0, x1) in pixels, padded already: as large as the masks; its corner is a multiple of 8.
    channels
        Which of `CHANNELS`.
    plane
        z-plane of a stack: nuclei are brighter near their own plane; None for a single image.

    Returns
    -------
    numpy.ndarray
        (c, h - 2 pad, w - 2 pad) uint16, without the margin.
    """
    y0, y1, x0, x1 = window
    pixel = parameters.pixel_size_um
    shape = (y1 - y0, x1 - x0)
    pad = pad_px(parameters)
    focus = np.ones(len(cells)) if plane is None else _focus(cells, plane)
    sharp = np.zeros(shape, np.float32)
    blurred = np.zeros(shape, np.float32)
    _draw_nuclei(
        seed, cells.site, masks.nucleus, cells.nucleus_xy, cells.nucleus_outline, cells.brightness * focus, y0, x0,
        pixel, sharp, blurred,
    )  # fmt: skip
    images = []
    for channel in channels:
        offset, background, signal, grey, read = CAMERA[channel]
        if channel == "DAPI":
            _draw_debris(seed, masks.winner, cells.necrotic, y0, x0, pixel, blurred)
            light, haze_um, share = sharp, HAZE_UM, 0.4 * parameters.haze
            wide = share * _spread(light, haze_um / pixel) + 0.45 * _spread(blurred, OUT_OF_FOCUS_UM / pixel)
            # Cytoplasm glows a little in every channel.
            wide += 0.04 * _spread((masks.depth < 0).astype(np.float32), HAZE_UM / pixel)
        else:
            light = np.zeros(shape, np.float32)
            _draw_cells(
                seed, masks.winner, masks.depth, masks.second, cells.necrotic, sharp, blurred, y0, x0, pixel, light
            )
            wide = 0.15 * parameters.haze * _spread(light, HAZE_UM / pixel)
        light = blur(light, parameters.blur_um / pixel)
        out = np.empty((shape[0] - 2 * pad, shape[1] - 2 * pad), np.uint16)
        key = CHANNELS.index(channel) + len(CHANNELS) * (0 if plane is None else plane + 1)
        _expose(
            seed, key, light, wide, y0, x0, pad, pixel, parameters.width_px, offset, background * parameters.background,
            signal * parameters.contrast, grey, read, parameters.noise, parameters.illumination_gradient,
            parameters.fov_um, parameters.fov_spread, parameters.vignetting, lost_below(parameters, seed), out,
        )  # fmt: skip
        images.append(out)
    return np.stack(images)


def _focus(cells: Cells, plane: int) -> np.ndarray:
    """Brightness of nuclei in a plane: each has its own depth, between planes 1 and 5."""
    depth = 3.0 + 1.2 * np.sin(12.9898 * cells.site[:, 0] + 78.233 * cells.site[:, 1])
    return np.exp(-(((plane - depth) / 4.0) ** 2))


def blur(image: np.ndarray, sigma_px: float) -> np.ndarray:
    """Gaussian blur (σ in pixels, cut at 3 σ) of a (h, w) float32 image; pixels near its border see zeros outside."""
    reach = max(1, math.ceil(3 * sigma_px))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma_px) ** 2)
    return _convolve(image, (taps / taps.sum()).astype(np.float32))


@numba.njit(cache=True, nogil=True)
def _convolve(image, taps):
    height, width = image.shape
    reach = len(taps) // 2
    rows = np.zeros_like(image)
    for j in range(height):
        for t in range(len(taps)):
            source = j + t - reach
            if 0 <= source < height:
                weight = taps[t]
                for i in range(width):
                    rows[j, i] += weight * image[source, i]
    out = np.zeros_like(image)
    for j in range(height):
        for t in range(len(taps)):
            shift = t - reach
            weight = taps[t]
            for i in range(max(0, -shift), min(width, width - shift)):
                out[j, i] += weight * rows[j, i + shift]
    return out


def _spread(image: np.ndarray, sigma_px: float) -> np.ndarray:
    """Wide blur, computed on coarse pixels: (h, w) float32, h and w multiples of `COARSE`."""
    height, width = image.shape
    coarse = image.reshape(height // COARSE, COARSE, width // COARSE, COARSE).mean(axis=(1, 3), dtype=np.float32)
    return _refine(blur(coarse, sigma_px / COARSE))


@numba.njit(cache=True, nogil=True)
def _refine(coarse):
    """Bilinear enlargement by `COARSE`."""
    height, width = coarse.shape
    out = np.empty((height * COARSE, width * COARSE), np.float32)
    for j in range(height * COARSE):
        v = (j + 0.5) / COARSE - 0.5
        ja = math.floor(v)
        fv = np.float32(v - ja)
        jb = min(ja + 1, height - 1)
        ja = max(ja, 0)
        for i in range(width * COARSE):
            u = (i + 0.5) / COARSE - 0.5
            ia = math.floor(u)
            fu = np.float32(u - ia)
            ib = min(ia + 1, width - 1)
            ia = max(ia, 0)
            top = coarse[ja, ia] * (np.float32(1) - fu) + coarse[ja, ib] * fu
            bottom = coarse[jb, ia] * (np.float32(1) - fu) + coarse[jb, ib] * fu
            out[j, i] = top * (np.float32(1) - fv) + bottom * fv
    return out


@numba.njit(cache=True, nogil=True)
def _draw_nuclei(seed, site, state, xy, outline, brightness, y0, x0, pixel, sharp, blurred):
    """Add the light of nuclei: a dome with chromatin texture and a few bright spots; overlapping nuclei add up."""
    height, width = sharp.shape
    rng = np.empty(1, np.uint64)
    spots = np.empty((9, 4))
    for k in range(len(xy)):
        if state[k] != IN_PLANE and state[k] != OUT_OF_FOCUS:
            continue
        cx, cy = xy[k, 0], xy[k, 1]
        reach = outline[k].max()
        ja = max(0, math.floor((cy - reach) / pixel) - y0)
        jb = min(height, math.ceil((cy + reach) / pixel) + 1 - y0)
        ia = max(0, math.floor((cx - reach) / pixel) - x0)
        ib = min(width, math.ceil((cx + reach) / pixel) + 1 - x0)
        if ja >= jb or ia >= ib:
            continue
        start(rng, place_key(seed, STREAM_SPOTS, site[k, 0], site[k, 1]))
        mean = outline[k].mean()
        n_spots = 2 + int(uniform(rng) * 7)
        for s in range(n_spots):
            theta, part = 2.0 * math.pi * uniform(rng), 0.85 * math.sqrt(uniform(rng))
            spots[s, 0] = cx + part * mean * math.cos(theta)
            spots[s, 1] = cy + part * mean * math.sin(theta)
            spots[s, 2] = (0.09 + 0.07 * uniform(rng)) * mean
            spots[s, 3] = 0.12 + 0.3 * uniform(rng)
        for j in range(ja, jb):
            py = (j + y0 + 0.5) * pixel
            for i in range(ia, ib):
                px = (i + x0 + 0.5) * pixel
                dx, dy = px - cx, py - cy
                distance = math.sqrt(dx * dx + dy * dy)
                if distance > reach:
                    continue
                part = distance / radius_at(outline[k], dx, dy)
                if part >= 1.0:
                    continue
                value = 0.55 + 0.45 * math.sqrt(1.0 - part * part)
                if state[k] == OUT_OF_FOCUS:
                    blurred[j, i] += np.float32(value * brightness[k])
                    continue
                coarse = smooth_noise(seed, STREAM_NUCLEUS_TEXTURE, px, py, 1.7)
                fine = smooth_noise(seed, STREAM_NUCLEUS_TEXTURE + 50, px, py, 0.6)
                value *= 0.76 + 0.28 * coarse + 0.2 * fine
                for s in range(n_spots):
                    u = ((px - spots[s, 0]) ** 2 + (py - spots[s, 1]) ** 2) / (spots[s, 2] * spots[s, 2])
                    if u < 9.0:
                        value += spots[s, 3] * math.exp(-0.5 * u)
                sharp[j, i] += np.float32(value * brightness[k])


@numba.njit(cache=True, nogil=True)
def _draw_debris(seed, winner, necrotic, y0, x0, pixel, blurred):
    """Necrotic cells have no nucleus, but their remains glow unevenly."""
    height, width = winner.shape
    for j in range(height):
        for i in range(width):
            k = winner[j, i]
            if k > 0 and necrotic[k - 1]:
                value = smooth_noise(seed, STREAM_DEBRIS, (i + x0 + 0.5) * pixel, (j + y0 + 0.5) * pixel, 2.5)
                blurred[j, i] += np.float32(1.2 * value * value * value)


@numba.njit(cache=True, nogil=True)
def _draw_cells(seed, winner, depth, second, necrotic, sharp, blurred, y0, x0, pixel, light):
    """Cytoplasm, darker in the nucleus, and a bright line along free and shared borders."""
    height, width = winner.shape
    for j in range(height):
        for i in range(width):
            d = depth[j, i]
            if d >= 1.2:
                continue
            if d >= 0:
                light[j, i] = np.float32(0.55 * math.exp(-((d / 0.3) ** 2)))
                continue
            border = min(-d, 0.5 * (second[j, i] - d))
            px, py = (i + x0 + 0.5) * pixel, (j + y0 + 0.5) * pixel
            texture = 0.5 * smooth_noise(seed, STREAM_CELL_TEXTURE, px, py, 0.9)
            texture += 0.5 * smooth_noise(seed, STREAM_CELL_TEXTURE + 50, px, py, 4.0)
            inner = 0.3 + 0.5 * texture
            if sharp[j, i] > 0.2 or blurred[j, i] > 0.2:
                inner *= 0.5
            value = inner + 0.55 * math.exp(-((border / 0.45) ** 2))
            if necrotic[winner[j, i] - 1]:
                value *= 0.3
            light[j, i] = np.float32(value)


@numba.njit(cache=True, nogil=True)
def _expose(
    seed, key, light, wide, y0, x0, pad, pixel, canvas_width, offset, background, signal, grey, read, noise, gradient,
    fov_um, fov_spread, vignetting, below, out,
):  # fmt: skip
    height, width = out.shape
    rng = np.empty(1, np.uint64)
    slope = np.empty(width)
    for i in range(width):
        slope[i] = gradient ** ((i + x0 + pad + 0.5) / canvas_width - 0.5)
    for j in range(height):
        y = (j + y0 + pad + 0.5) * pixel
        fov_j = math.floor(y / fov_um)
        v = 2.0 * (y / fov_um - fov_j) - 1.0
        fov_before = -999999999
        gain = 1.0
        dark = False
        base = place_key(seed, STREAM_CAMERA + 16 * key, j + y0 + pad, 0)
        for i in range(width):
            x = (i + x0 + pad + 0.5) * pixel
            fov_i = math.floor(x / fov_um)
            if fov_i != fov_before:
                fov_before = fov_i
                start(rng, place_key(seed, STREAM_FOV, fov_i, fov_j))
                gain = math.exp(fov_spread * normal(rng))
                dark = field_number(seed, fov_i, fov_j) < below
            u = 2.0 * (x / fov_um - fov_i) - 1.0
            shade = gain * slope[i] * (1.0 - 0.5 * vignetting * (u * u + v * v))
            value = 0.0 if dark else light[j + pad, i + pad] + wide[j + pad, i + pad]
            glow = 0.8 + 0.4 * smooth_noise(seed, STREAM_BACKGROUND + key, x, y, 40.0)
            photons = shade * (background * glow + signal * value)
            deviation = noise * math.sqrt(grey * photons + read * read)
            value = offset + photons + deviation * cheap_normal(_pixel_bits(base, i + x0 + pad))
            out[j, i] = np.uint16(min(max(value + 0.5, 0.0), 65535.0))


@numba.njit(cache=True, nogil=True)
def _pixel_bits(base, i):
    return mix(base + np.uint64(i) * np.uint64(0x9E3779B97F4A7C15))
