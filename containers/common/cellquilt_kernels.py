"""Where numba finds the kernels that were compiled when an image was built.

numba uses a folder of compiled code only if it may write to it, and a task may not: it runs as any user, often on a
read-only file system. Such a process gets a folder of its own with links to the image's kernels; what else it has to
compile (for another CPU, if NUMBA_CPU_NAME asks for one) goes there and is gone when it ends.

NUMBA_CACHE_LOCATOR_CLASSES names the class.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from numba.core.caching import UserProvidedCacheLocator


class ImageKernels(UserProvidedCacheLocator):
    """The folder that NUMBA_CACHE_DIR names, also where it cannot be written to."""

    def ensure_cache_path(self) -> None:
        try:
            super().ensure_cache_path()
        except OSError:
            self._cache_path = _linked(self._cache_path)


@functools.cache
def _linked(folder: str) -> str:
    """A private folder with links to all files of another."""
    private = Path(_private(), Path(folder).name)
    private.mkdir()
    if os.path.isdir(folder):
        for kernel in os.scandir(folder):
            (private / kernel.name).symlink_to(kernel.path)
    return str(private)


@functools.cache
def _private() -> str:
    folder, owner = tempfile.mkdtemp(prefix="kernels-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked worker shares its parent's
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
