"""podman with the project's images, for tests."""

import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.search(r"^ *version *= *'(.+)'", (ROOT / "nextflow.config").read_text(), flags=re.M)[1]
#: Those that are built here if they are not there; the others are tested where they are.
BUILT = ("core", "proseg", "cellpose")
OTHERS = ("domains", "cellpose4", "stardist")


class Engine:
    """podman with the project's own store."""

    def __init__(self, version: str) -> None:
        self.version = version

    def image(self, stage: str) -> str:
        return f"localhost/cellquilt-{stage}:{self.version}"

    def call(self, *arguments: str, **options) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([ROOT / "scripts" / "podman", *arguments], capture_output=True, text=True, **options)

    def facts(self, stage: str) -> dict:
        said = self.call("image", "inspect", self.image(stage))
        return json.loads(said.stdout)[0] if said.returncode == 0 else {}

    def run(self, stage: str, *command: str, user: str = "54321:54321", options: tuple[str, ...] = ()) -> str:
        """What a command says in a container without network, as a user that it does not know."""
        strict = ("--rm", "--network=none", "--read-only", "--read-only-tmpfs=false", "--cap-drop=all")
        work = ("--tmpfs=/work:rw,mode=1777", "--workdir=/work", f"--volume={ROOT / 'containers'}:/containers:ro")
        said = self.call("run", *strict, *work, f"--user={user}", *options, self.image(stage), *command, timeout=300)
        assert said.returncode == 0, said.stdout + said.stderr
        return said.stdout
