"""The steps of a Dockerfile in bare Debians, without a container engine; a process within one as in a container.

A stage is a folder. Its steps run by ``chroot`` in namespaces of their own, which takes root's rights.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

SUITE = "bookworm"
"""Debian 12, as debian:12-slim."""
HOST_FILES = ("/etc/resolv.conf", "/etc/hosts")
NOTED = ("COMMENT", "EXPOSE", "LABEL", "STOPSIGNAL")
"""Instructions that run nothing while an image is built."""
OF_PIP = ("PIP_DEFAULT_TIMEOUT", "PIP_DISABLE_PIP_VERSION_CHECK", "PIP_INDEX_URL", "PIP_RETRIES")
HOST_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class StepError(Exception):
    """A step failed; the text has its output."""


def debian(folder: Path) -> Path:
    """Make a bare Debian, unless the folder has one."""
    root = folder / SUITE
    if not root.is_dir():
        made = folder / f"{SUITE}.part"
        shutil.rmtree(made, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["debootstrap", "--variant=minbase", SUITE, made], check=True, stdout=subprocess.DEVNULL)
        made.rename(root)
    return root


@dataclass
class Stage:
    """A stage of a Dockerfile."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    """Command that succeeds while the server is ready."""

    def run(self, script: str) -> None:
        """Run a step's shell script as root.

        Raises:
            StepError: it failed.
        """
        mounts = ["mount -t proc proc $0/proc", "mount --rbind /dev $0/dev"]
        # What this machine needs to reach its registries, and no part of an image.
        pip = {name: os.environ[name] for name in OF_PIP if name in os.environ}
        if Path(HOST_CERTIFICATES).is_file():
            (self.root / "host-certificates").touch()
            mounts.append(f"mount --bind {HOST_CERTIFICATES} $0/host-certificates")
            pip["PIP_CERT"] = "/host-certificates"
        variables = [f"{name}={value}" for name, value in (self.environment | pip).items()]
        inside = ["chroot", self.root, "env", "-i", *variables, "/bin/sh", "-c", script]
        done = subprocess.run(_in_namespaces(self.root, mounts, inside), capture_output=True, text=True)
        (self.root / "host-certificates").unlink(missing_ok=True)
        if done.returncode:
            raise StepError(f"status {done.returncode}: {script}\n{done.stdout}\n{done.stderr}")

    def start(self, models: Path, command: list[str], **flags: object) -> subprocess.Popen[str]:
        """Start a command as Kubernetes would: as the stage's user, under a root that can't be written."""
        mounts = [
            "mount --bind $0 $0",
            "mount -t proc proc $0/proc",
            "mount --rbind /dev $0/dev",
            "mount -t tmpfs -o size=256m,mode=1777 shm $0/dev/shm",
            "mount -t tmpfs -o size=1g,mode=1777 tmp $0/tmp",
            f"mount --bind {models} $0/models",
            "mount -o remount,ro,bind $0",
        ]
        (self.root / "models").mkdir(exist_ok=True)
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        inside = ["chroot", f"--userspec={self.user}", self.root, "env", "-i", *variables, *command]
        return subprocess.Popen(_in_namespaces(self.root, mounts, inside), text=True, **flags)  # type: ignore[call-overload, no-any-return]


def _in_namespaces(root: Path, mounts: list[str], inside: list[str | Path]) -> list[str | Path]:
    # The mounts end with the process. A shell that is process 1 of its namespace passes no signal on: hence exec.
    script = "; ".join(["set -e", *mounts, 'exec "$@"'])
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child=TERM", "sh", "-c", script, root, *inside]


def build(dockerfile: Path, context: Path, base: Path, folder: Path) -> Stage:
    """Take the steps of a Dockerfile.

    Args:
        dockerfile: its path.
        context: what COPY copies from.
        base: a bare Debian that stands for every FROM's image.
        folder: for the stages.

    Returns:
        The last stage.
    """
    stages: dict[str, Stage] = {}
    stage = Stage(folder)
    for step in DockerfileParser(fileobj=io.BytesIO(dockerfile.read_bytes())).structure:
        instruction, value = step["instruction"], step["value"]
        if instruction == "FROM":
            _, _, name = value.partition(" AS ")
            stage = stages[name] = Stage(folder / f"stage-{len(stages)}")
            subprocess.run(["cp", "--archive", base, stage.root], check=True)
            for path in HOST_FILES:
                shutil.copy(path, stage.root / path.removeprefix("/"))
        elif instruction == "RUN":
            stage.run(value)
        elif instruction == "COPY":
            *words, target = value.split()
            origin, inside = context, stage.root / target.removeprefix("/")
            if words[0].startswith("--from="):
                origin = stages[words.pop(0).removeprefix("--from=")].root
            for source in words:
                _copy(origin / source.removeprefix("/"), inside, is_folder=target.endswith("/"))
        elif instruction == "ENV":
            stage.environment |= dict(word.split("=", 1) for word in shlex.split(value))
        elif instruction == "USER":
            stage.user = value
        elif instruction == "HEALTHCHECK":
            stage.health = json.loads(value.partition(" CMD ")[2])
        elif instruction == "ENTRYPOINT":
            stage.entrypoint = json.loads(value)
        elif instruction not in NOTED:
            raise NotImplementedError(f"{dockerfile}:{step['startline'] + 1}: {instruction}")
    return stage


def _copy(source: Path, target: Path, is_folder: bool) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        return
    (target if is_folder else target.parent).mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
