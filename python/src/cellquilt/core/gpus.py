"""GPUs: one task on each, what becomes of a task that finds none, and batches that fit into their memory.

Nothing here loads torch or TensorFlow: what asks for a GPU has its library loaded, and hands in how to look for one.
The environment says how GPUs are used, so that it is the same for tasks of the pipeline, the command line and Python:

``CELLQUILT_GPUS``
    How many GPUs of this machine tasks share out among themselves. Unset, GPUs are used as they are: schedulers give
    each task its own.
``CELLQUILT_GPU_LOCKS``
    The folder by which they do so; by default one of this user's below /tmp.
``CELLQUILT_GPU_FALLBACK``
    ``true``: where a GPU is asked for and there is none, the CPU is used.
``CUDA_VISIBLE_DEVICES``
    Which there are, as everywhere; set for a task that has taken one.
"""

import errno
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG

GPUS = "CELLQUILT_GPUS"
LOCKS = "CELLQUILT_GPU_LOCKS"
FALLBACK = "CELLQUILT_GPU_FALLBACK"
VISIBLE = "CUDA_VISIBLE_DEVICES"

#: Schedulers give jobs GPUs of their own, which each job may count from 0: jobs do not wait for each other.
_JOBS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID")
_WAIT_S = 0.5
_FREE_SHARE = 0.6
_MOST_ITEMS = 64

#: GPUs that this process has taken → descriptors of their locks.
_held: dict[str, int] = {}
#: What the environment said before.
_before: dict[str, str | None] = {}


# --- which GPUs


def pin_gpus(count: int = 1) -> tuple[str, ...]:
    """Take GPUs for this process and its children alone; it sees no others from then on.

    Waits until as many are free. They are free again when the process ends, however it does. To be called before CUDA
    is used. Does nothing where ``CELLQUILT_GPUS`` is not set, and nothing the second time.

    Parameters
    ----------
    count
        How many; fewer where there are not as many.

    Returns
    -------
    tuple of str
        Their names as in ``CUDA_VISIBLE_DEVICES``.

    Raises
    ------
    CellquiltError
        ``gpu-slots``.
    """
    given = os.environ.get(GPUS)
    if not given or _held:
        return tuple(_held)
    if not given.isdecimal():
        raise CellquiltError("gpu-slots", f"{GPUS} is {given!r}; a number was expected", f"mend or unset {GPUS}")
    names = _visible_devices()
    names = [str(number) for number in range(int(given))] if names is None else names[: int(given)]
    if not names:
        return ()
    _held.update(_wait_for(_lock_folder(), names, min(count, len(names))))
    for name, value in ((VISIBLE, ",".join(_held)), (GPUS, None)):  # children use what their parent has taken
        _before[name] = os.environ.get(name)
        _set(name, value)
    LOG.info("using GPU %s", ", ".join(_held))
    return tuple(_held)


def release_gpus() -> None:
    """Give back what `pin_gpus` took."""
    for descriptor in _held.values():
        os.close(descriptor)
    for name, value in _before.items():
        _set(name, value)
    _held.clear()
    _before.clear()


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _visible_devices() -> list[str] | None:
    """What ``CUDA_VISIBLE_DEVICES`` names, up to the first that is none, as CUDA reads it; None if it is not set."""
    given = os.environ.get(VISIBLE)
    if given is None:
        return None
    names = [name.strip() for name in given.split(",")]
    end = next((k for k, name in enumerate(names) if not name or name.startswith("-")), len(names))
    return names[:end]


def _lock_folder() -> Path:
    given = os.environ.get(LOCKS)
    job = next((os.environ[name] for name in _JOBS if os.environ.get(name)), "")
    # Not TMPDIR, which may differ from task to task.
    shared = "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()
    name = "-".join(["cellquilt-gpus", str(os.getuid()), *([_plain(job)] if job else [])])
    folder = Path(given) if given else Path(shared) / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not given and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
            raise PermissionError(errno.EPERM, "it belongs to somebody else")
    except OSError as error:
        raise _no_slots(folder, error) from error
    return folder


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _no_slots(folder: Path, error: OSError) -> CellquiltError:
    return CellquiltError(
        "gpu-slots",
        f"tasks cannot share out GPUs by locks in {folder}: {error.strerror}",
        f"set {LOCKS} to a folder that all tasks of this machine can write to, or unset {GPUS}",
    )


def _wait_for(folder: Path, names: Sequence[str], count: int) -> dict[str, int]:
    waiting = False
    while True:
        try:
            held = _take(folder, names, count)
        except OSError as error:
            raise _no_slots(folder, error) from error
        if held:
            return held
        if not waiting:
            LOG.info("waiting for %d of the GPUs %s: other tasks have them", count, ", ".join(names))
            waiting = True
        # Two that want several and each got some of them try again at different times.
        time.sleep(_WAIT_S * (1 + os.getpid() % 7 / 7))


def _take(folder: Path, names: Sequence[str], count: int) -> dict[str, int]:
    """Locks of so many GPUs, or none at all: who holds some while waiting for others may wait for ever."""
    held: dict[str, int] = {}
    try:
        for name in names:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(folder / f"gpu-{_plain(name)}.lock", flags, 0o600)
            held[name] = descriptor
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.utime(descriptor)  # what clears old files away leaves it
            except OSError as error:
                os.close(held.pop(name))
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            if len(held) == count:
                return held
    except OSError:
        _close(held)
        raise
    _close(held)
    return {}


def _close(held: dict[str, int]) -> None:
    for descriptor in held.values():
        os.close(descriptor)


# --- whether there is one


def find_gpus[T](look: Callable[[], T], count: int = 1) -> T:
    """Look for GPUs that may be used, among those that `pin_gpus` takes; nothing stays taken where there are none.

    Parameters
    ----------
    look
        Asks the library; anything that is true is a GPU.
    count
        How many are wanted.
    """
    pin_gpus(count)
    found = look()
    if not found:
        release_gpus()
    return found


def want_gpu(asked: str, library: str, look: Callable[[], object], hint: str, *, pin: bool = True) -> bool:
    """Whether to use a GPU that somebody asked for.

    Parameters
    ----------
    asked
        What asks for it, for the message: ``--cellpose_gpu``.
    library
        What looks for it, for the message: ``torch 2.7.0``.
    look
        Asks the library; anything that is true is a GPU.
    hint
        How to ask for none.
    pin
        Whether the GPU is taken from those that tasks share out.

    Returns
    -------
    bool
        False where there is none and the CPU may be used in its place; that is logged.

    Raises
    ------
    CellquiltError
        ``gpu-missing``, ``gpu-slots``.
    """
    if pin:
        pin_gpus()
    if look():
        return True
    among = f" ({VISIBLE} is {os.environ[VISIBLE]!r})" if VISIBLE in os.environ else ""
    problem = f"a GPU is asked for by {asked}, and {library} sees none{among}"
    release_gpus()
    if fallback():
        LOG.warning("%s; running on the CPU", problem)
        return False
    raise CellquiltError(
        "gpu-missing", problem, f"{hint}, or go on without: --gpu_fallback, or {FALLBACK}=true in the environment"
    )


def about_torch(torch: object) -> str:
    """Torch's name for messages about GPUs: version, and whether it could use one at all."""
    version = f"torch {torch.__version__}"  # type: ignore[attr-defined]
    return version if torch.version.cuda or torch.version.hip else f"{version}, built without CUDA,"  # type: ignore[attr-defined]


def fallback() -> bool:
    """Whether the CPU may be used where a GPU was asked for."""
    return os.environ.get(FALLBACK, "").lower() in ("1", "true", "yes")


# --- batches that fit


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch's or TensorFlow's says that the GPU's memory is full."""
    if type(error).__name__ in ("OutOfMemoryError", "ResourceExhaustedError"):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(r"out of memory|ALLOC_FAILED", str(error)))


def fitting_items(free_bytes: int, peak_bytes: int, n_items: int) -> int:
    """How many items a batch may have: what fits into 60 % of the free memory, 1 to 64.

    Parameters
    ----------
    free_bytes
        Free memory of the GPU.
    peak_bytes
        Most memory that a batch of `n_items` took.
    n_items
        Items of that batch.
    """
    return int(min(max(_FREE_SHARE * free_bytes * n_items / max(peak_bytes, 1), 1), _MOST_ITEMS))


def shrinking[R](
    size: int,
    run: Callable[[int], R],
    *,
    is_oom: Callable[[BaseException], bool],
    release: Callable[[], object],
    least: int = 1,
    unit: str = "items",
    instead: Callable[[], R] | None = None,
) -> tuple[R, int]:
    """Run something of a size that memory limits, of half the size after each time that it does not fit.

    Parameters
    ----------
    size
        To begin with.
    run
        From a size to a result.
    is_oom
        Whether an error says that memory was full; others go through.
    release
        Called after such an error, when nothing refers to what was allocated any more.
    least
        Smallest size.
    unit
        Of what it is a size, for the log.
    instead
        Makes the result of the smallest size where even that does not fit.

    Returns
    -------
    result : R
        What `run` made, or `instead`.
    size : int
        Of which size.

    Raises
    ------
    CellquiltError
        ``gpu-out-of-memory`` where the smallest size does not fit and there is nothing to be done instead.
    """
    while True:
        try:
            return run(size), size
        except Exception as error:  # whatever the library raises
            if not is_oom(error):
                raise
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
        # Behind the clause: until its end the error holds the frames, and they what was allocated.
        release()
        if size > least:
            half = max(least, size // 2)
            LOG.warning("the memory of the GPU is too small for %d %s: trying %d", size, unit, half)
            size = half
        elif instead is not None:
            LOG.warning("the memory of the GPU is too small for %d %s: running them on the CPU", size, unit)
            return instead(), size
        else:
            raise CellquiltError(
                "gpu-out-of-memory",
                f"the memory of the GPU is too small for {size} {unit}: {said}",
                "free it of other programs, take a larger one, or use the CPU for what does not fit: --gpu_fallback, "
                f"or {FALLBACK}=true in the environment",
            )


def in_batches[I, R](
    items: Sequence[I],
    size: int,
    run: Callable[[Sequence[I]], R],
    *,
    is_oom: Callable[[BaseException], bool] = out_of_memory,
    release: Callable[[], object],
    unit: str = "items",
    instead: Callable[[Sequence[I]], R] | None = None,
) -> Iterator[tuple[Sequence[I], R, int]]:
    """Run items in batches, each once and in order; a batch that does not fit is halved, and so are those behind it.

    Parameters
    ----------
    items
        What to run.
    size
        Most items of a batch.
    run
        From the items of a batch to its result. It may be called again with fewer of them.
    is_oom, release, unit
        See `shrinking`.
    instead
        Makes the result of a batch of one that does not fit.

    Yields
    ------
    batch : Sequence[I]
        Its items.
    result : R
        Of `run`, or `instead`.
    size : int
        Most items of the next batch.

    Raises
    ------
    CellquiltError
        ``gpu-out-of-memory``.
    """
    start = 0
    while start < len(items):
        part = items[start : start + size]

        def some(n_items: int, part: Sequence[I] = part) -> R:
            return run(part[:n_items])

        def one(part: Sequence[I] = part) -> R:
            assert instead is not None
            return instead(part[:1])

        result, taken = shrinking(
            len(part), some, is_oom=is_oom, release=release, unit=unit, instead=one if instead else None
        )
        if taken < len(part):
            size = taken
        yield part[:taken], result, size
        start += taken
