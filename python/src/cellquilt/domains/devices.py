"""Where torch computes."""

from typing import TYPE_CHECKING

from cellquilt.core.errors import CellquiltError

if TYPE_CHECKING:
    import torch


def device_of(name: str, rank: int = 0) -> "torch.device":
    """A device by torch's name.

    Parameters
    ----------
    name
        ``cpu``, ``cuda``, ``cuda:1``, …; ``auto`` is a GPU where there is one.
    rank
        Of several processes, the number of this one: with ``auto`` each takes a GPU in turn.

    Raises
    ------
    CellquiltError
        ``device-missing``.
    """
    import torch

    if name == "auto":
        name = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CellquiltError("device-missing", f'device "{name}" cannot be used: {error}', "cpu or auto") from None
    return device
