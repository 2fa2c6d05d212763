"""Where torch computes."""

from typing import TYPE_CHECKING

from cellquilt.core import gpus
from cellquilt.core.errors import CellquiltError

if TYPE_CHECKING:
    import torch


def device_of(name: str, rank: int = 0) -> "torch.device":
    """A device by torch's name.

    Parameters
    ----------
    name
        ``cpu``, ``cuda``, ``cuda:1``, …; ``auto`` is a GPU where there is one. See `core.gpus` for which one it is, and
        what is done where there is none.
    rank
        Of several processes, the number of this one: with ``auto`` each takes a GPU in turn.

    Raises
    ------
    CellquiltError
        ``device-missing``, ``gpu-missing``, ``gpu-slots``.
    """
    import torch

    if name == "auto":
        name = f"cuda:{rank % torch.cuda.device_count()}" if gpus.find_gpus(torch.cuda.is_available) else "cpu"
    elif name.partition(":")[0] == "cuda":
        number = name.partition(":")[2]  # which one is somebody's own choice
        least = int(number) if number.isdecimal() else 0
        found = gpus.want_gpu(
            f'device "{name}"',
            gpus.about_torch(torch),
            lambda: torch.cuda.is_available() and torch.cuda.device_count() > least,
            "use cpu or auto",
            pin=not number,
        )
        name = name if found else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CellquiltError("device-missing", f'device "{name}" cannot be used: {error}', "cpu or auto") from None
    return device
