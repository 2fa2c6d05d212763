"""Files of a model hub, through the huggingface_hub package where it is installed: models and catalogues of slides.

That package keeps what it fetched in its own cache, and fetches nothing where ``HF_HUB_OFFLINE=1`` is set.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Literal

from cellquilt.core.atomic import atomic_path, refuse_existing
from cellquilt.core.errors import CellquiltError, did_you_mean_file
from cellquilt.core.log import LOG
from cellquilt.core.settings import SHIPPED_DOMAINS as SHIPPED
from cellquilt.domains.checkpoint import COMPONENTS, CONFIG, WEIGHTS, checksum, shipped_model

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_id(name: "Path | str") -> bool:
    """Whether this is ``owner/name``, and no folder that is there; a `Path` is always a folder."""
    return isinstance(name, str) and _ID.fullmatch(name) is not None and not Path(name).exists()


class Hub:
    """A repository of a hub.

    Parameters
    ----------
    name
        ``owner/name``.
    kind
        What it holds.
    revision
        Branch, tag or commit; the default branch if None.
    """

    def __init__(self, name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> None:
        self.name, self.kind, self.revision = name, kind, revision

    def file(self, path: str) -> Path:
        """A file of it on this machine, fetched if it is not there yet; all files come from the commit of the first.

        Raises
        ------
        CellquiltError
            ``package-missing``, ``hub-unreachable``, ``hub-file-missing``.
        """
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
        except ModuleNotFoundError as error:
            raise CellquiltError(
                "package-missing",
                f"{self.name} is no folder here, and to read a {self.kind} from a hub needs the package {error.name}",
                f"install huggingface_hub, or name a folder{self._beside()}",
            ) from None
        try:
            found = hf_hub_download(self.name, path, repo_type=self.kind, revision=self.revision)
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise CellquiltError(
                "hub-unreachable",
                f"{path} of {self._said()} is not in the cache of huggingface_hub, and the hub cannot be reached",
                "fetch it where there is a network and give its folder, or set HF_HOME to the cache that has it"
                + self._beside(),
            ) from error
        except Exception as error:  # the package has many: no such repository, file or revision, no right to read it
            raise CellquiltError(
                "hub-file-missing",
                f"{path} of {self._said()} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}",
                f"check the name and the revision, and that you may read it{self._beside()}",
            ) from error
        commit = Path(found).parents[path.count("/")].name
        if commit != self.revision:
            LOG.info("%s, commit %s", self._said(), commit)
            self.revision = commit
        return Path(found)

    def _said(self) -> str:
        return f"{self.kind} {self.name}" + (f" ({self.revision})" if self.revision else "")

    def _beside(self) -> str:
        """Where a folder was meant: the one whose name is nearest."""
        near = did_you_mean_file(Path(self.name))
        return f"; {near}" if near else ""


def model_folder(name: "Path | str", revision: str | None = None) -> Path:
    """The folder of a model.

    Parameters
    ----------
    name
        A folder; ``default``, the model that comes with the package; or ``owner/name`` on a hub, of which only
        ``config.json`` and ``model.safetensors`` are fetched. A `Path` is a folder.
    revision
        Branch, tag or commit on the hub.

    Raises
    ------
    CellquiltError
        ``model-missing``, ``model-not-shipped``, ``revision-unused``, and what `Hub.file` raises.
    """
    if is_hub_id(name):
        hub = Hub(str(name), "model", revision)
        folder = hub.file(CONFIG).parent
        hub.file(WEIGHTS)
        return folder
    if revision is not None:
        raise CellquiltError(
            "revision-unused", f"{name} has no revision {revision}", "only models of a hub (owner/name) have revisions"
        )
    if name == SHIPPED:
        return shipped_model()
    folder = Path(name)
    if not folder.is_dir():
        near = did_you_mean_file(folder)
        raise CellquiltError(
            "model-missing",
            f"there is no folder {folder}",
            near or f'name the folder with {CONFIG} and {WEIGHTS}, "{SHIPPED}", or owner/name on a hub',
        )
    return folder


def fetch_model(name: "Path | str", output: Path, *, revision: str | None = None, overwrite: bool = False) -> Path:
    """Put a model into a folder of one's own, for tasks, which fetch nothing.

    Parameters
    ----------
    name, revision
        See `model_folder`.
    output
        The folder to make: ``config.json``, ``model.safetensors`` and, of a model that looks at images,
        ``image_pca.safetensors``.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        `output`.

    Raises
    ------
    CellquiltError
        ``output-exists``, ``model-missing``, and what `model_folder` raises.
    """
    refuse_existing(output, overwrite)
    folder = model_folder(name, revision)
    absent = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if absent:
        raise CellquiltError("model-missing", f"{folder} has no {' and no '.join(absent)}", "name a model's folder")
    if is_hub_id(name):
        try:  # of the same commit, which is the snapshot's name
            Hub(str(name), "model", folder.name).file(COMPONENTS)
        except CellquiltError:
            LOG.debug("%s looks at no images", name)
    with atomic_path(output, overwrite=overwrite) as aside:
        os.makedirs(aside)
        for file in (CONFIG, WEIGHTS, COMPONENTS):
            if (folder / file).is_file():
                shutil.copyfile(folder / file, aside / file)
    LOG.info("%s: SHA-256 %s", name, checksum(output))
    return output
