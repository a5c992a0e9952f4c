"""The manifest of an export: what the engines were made from and by, and what a server must know to run them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from icportrait.contract import contract_hash
from icportrait.errors import CheckpointError
from icportrait.presets import Preset

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class EngineFile:
    """One exported graph; ``sha256`` covers the graph and, where there is one, its external data."""

    file: str
    sha256: str
    size_bytes: int
    precision: str
    """Precision of the graph's convolutions and linears; some engines have another than the export's."""
    external_data: str | None = None


@dataclass(frozen=True)
class EngineMemory:
    """The memory that an engine takes on a CPU, in bytes of float32."""

    weights_bytes: int
    run_bytes: dict[int, int]
    """The most that one run's tensors take at once, by its rows: 1, 2, 4 and so on to the largest batch."""

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EngineMemory:
        return cls(fields["weights_bytes"], {int(rows): count for rows, count in fields["run_bytes"].items()})


@dataclass(frozen=True)
class Manifest:
    """Everything a server needs beside the graphs themselves."""

    preset: Preset
    precision: str
    opset: int
    contract_hash: str
    engines: dict[str, EngineFile]
    scheduler_config: dict[str, Any]
    defaults: dict[str, Any]
    """The checkpoint's ``guidance_scale`` and ``num_inference_steps`` for a request that doesn't name them."""
    source: dict[str, Any]
    """``{"checkpoint": path}`` or ``{"random_weights": seed}``."""
    versions: dict[str, str]
    memory: dict[str, EngineMemory] = field(default_factory=dict)
    """Memory by engine. A repository's manifest has it where engines run on a CPU; an export's manifest has none."""

    @property
    def model_version(self) -> str:
        """Return a name of the exported weights and graphs: equal exactly when every graph's hash is."""
        text = "".join(engine.sha256 for _, engine in sorted(self.engines.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def files(self, name: str, directory: Path) -> list[Path]:
        """Return engine ``name``'s files, the graph first, where the export lies in ``directory``."""
        engine = self.engines[name]
        return [directory / file for file in (engine.file, engine.external_data) if file]

    def check_files(self, name: str, directory: Path) -> None:
        """Compare engine ``name``'s files with what was exported.

        Raises:
            CheckpointError: one is missing or was changed.
        """
        files = self.files(name, directory)
        if missing := [path for path in files if not path.is_file()]:
            raise CheckpointError(f"{missing[0]} is missing, but {MANIFEST_NAME} names it; export again")
        if (found := file_sha256(*files)) != (expected := self.engines[name].sha256):
            raise CheckpointError(
                f"{files[0]}: hash is {found[:12]}, {MANIFEST_NAME} says {expected[:12]}; export again"
            )

    def write(self, directory: Path) -> Path:
        path = directory / MANIFEST_NAME
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read ``directory/manifest.json``.

        Raises:
            CheckpointError: there is none, or it was written for another contract than this code's.
        """
        path = directory / MANIFEST_NAME
        if not path.is_file():
            raise CheckpointError(f'{path} is missing; make it with "python -m export"')
        try:
            fields = json.loads(path.read_text())
            fields["preset"] = Preset.from_dict(fields["preset"])
            fields["engines"] = {name: EngineFile(**engine) for name, engine in fields["engines"].items()}
            memory = fields.get("memory", {})
            fields["memory"] = {name: EngineMemory.from_dict(need) for name, need in memory.items()}
            manifest = cls(**fields)
            expected = contract_hash(manifest.preset, manifest.precision)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a manifest of this version ({error}); export again") from error
        if manifest.contract_hash != expected:
            raise CheckpointError(
                f"{path}: exported for contract {manifest.contract_hash}, this code's is {expected}; export again"
            )
        return manifest


def file_sha256(*paths: Path) -> str:
    """Return one hash over the files' contents, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
