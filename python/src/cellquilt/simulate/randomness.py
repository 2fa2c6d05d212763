"""Random numbers that belong to a place, not to an order of events.

Every number is a hash of (seed, purpose, place), so any tile of a slide can be made alone, in any order and with any
tile size, and always comes out the same. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014); a sequence of numbers for one place is SplitMix64 itself,
started there.
"""

import math

import numba
import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_TO_UNIT = 1.0 / 9007199254740992.0  # 2**-53

# One number a purpose: two purposes at one place must not share their numbers.
STREAM_CELL = 1
STREAM_SPOTS = 2
STREAM_TRANSCRIPTS = 3
STREAM_AMBIENT = 4
STREAM_FOV = 5
STREAM_CAMERA = 6
STREAM_NUCLEUS_TEXTURE = 7
STREAM_CELL_TEXTURE = 8
STREAM_EMPTY = 10
STREAM_NECROSIS = 11
STREAM_DOMAIN = 12
STREAM_OUTLINE = 13
STREAM_DEBRIS = 14
STREAM_PAIR = 15
STREAM_NICHE = 20  # and the following, one a niche
STREAM_BACKGROUND = 15000


@numba.njit(cache=True, nogil=True)
def mix(value):
    """SplitMix64's finaliser: uint64 → uint64, every bit of the input moves half the bits of the output."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def place_key(seed, stream, a, b):
    """uint64 key of a place (two int64 coordinates) for one purpose."""
    key = mix(np.uint64(seed) + _GOLDEN * np.uint64(stream))
    key = mix(key ^ (np.uint64(a) * _MIX_1 + _GOLDEN))
    return mix(key ^ (np.uint64(b) * _MIX_2 + _GOLDEN))


@numba.njit(cache=True, nogil=True)
def unit(bits):
    """uint64 → float64 in [0, 1)."""
    return np.float64(bits >> np.uint64(11)) * _TO_UNIT


@numba.njit(cache=True, nogil=True)
def start(rng, key):
    """Start the generator `rng` ((1,) uint64) at a key."""
    rng[0] = key


@numba.njit(cache=True, nogil=True)
def uniform(rng):
    """Next number in [0, 1)."""
    rng[0] += _GOLDEN
    return unit(mix(rng[0]))


@numba.njit(cache=True, nogil=True)
def normal(rng):
    """Next standard normal number (Box and Muller; one of the pair)."""
    radius = math.sqrt(-2.0 * math.log(1.0 - uniform(rng)))
    return radius * math.cos(2.0 * math.pi * uniform(rng))


@numba.njit(cache=True, nogil=True)
def poisson(rng, mean):
    """Next Poisson number; exact by multiplication below 30, the rounded normal approximation above."""
    if mean <= 0.0:
        return 0
    if mean > 30.0:
        return max(0, math.floor(mean + math.sqrt(mean) * normal(rng) + 0.5))
    limit = math.exp(-mean)
    count = 0
    product = uniform(rng)
    while product > limit:
        count += 1
        product *= uniform(rng)
    return count


@numba.njit(cache=True, nogil=True)
def cheap_normal(bits):
    """uint64 → about standard normal: the sum of its four 16-bit parts (within ±3.46), for camera noise."""
    mask = np.uint64(0xFFFF)
    total = (
        np.float64(bits & mask)
        + np.float64((bits >> np.uint64(16)) & mask)
        + np.float64((bits >> np.uint64(32)) & mask)
        + np.float64(bits >> np.uint64(48))
    )
    return (total / 65535.0 - 2.0) * 1.7320508075688772


@numba.njit(cache=True, nogil=True)
def _lattice(seed, stream, i, j):
    return unit(place_key(seed, stream, i, j))


@numba.njit(cache=True, nogil=True)
def smooth_noise(seed, stream, x, y, length):
    """Value noise in [0, 1): random numbers on a lattice of the given length, smoothly interpolated.

    Parameters
    ----------
    seed, stream
        Which noise field.
    x, y, length
        Position and lattice length in the same unit.
    """
    u, v = x / length, y / length
    i, j = math.floor(u), math.floor(v)
    fx, fy = u - i, v - j
    i, j = int(i), int(j)
    fx = fx * fx * (3.0 - 2.0 * fx)
    fy = fy * fy * (3.0 - 2.0 * fy)
    top = _lattice(seed, stream, i, j) * (1.0 - fx) + _lattice(seed, stream, i + 1, j) * fx
    bottom = _lattice(seed, stream, i, j + 1) * (1.0 - fx) + _lattice(seed, stream, i + 1, j + 1) * fx
    return top * (1.0 - fy) + bottom * fy


@numba.njit(cache=True, nogil=True)
def two_octaves(seed, stream, x, y, length):
    """Value noise with finer noise of a third of its length and a third of its height on top; in [0, 1)."""
    coarse = smooth_noise(seed, stream, x, y, length)
    fine = smooth_noise(seed, stream + 100, x, y, length / 3.0)
    return 0.75 * coarse + 0.25 * fine
