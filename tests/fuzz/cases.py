"""A case: the bytes that go to a door, and the answers that are right."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GRPC_REFUSALS = ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")
HTTP_REFUSALS = ("400", "401", "404", "405", "408", "413", "415", "431", "501")
GRPC_VERDICTS = {
    "good": ("OK",),
    "wrong": ("INVALID_ARGUMENT",),
    "either": ("OK", "INVALID_ARGUMENT"),
    "deadline": ("OK", "UNAVAILABLE"),
}
"""Right ends of a request over gRPC by a wish's verdict; ``UNAVAILABLE`` only for its deadline."""
GONE = "GONE"
"""The connection or the call ended without an answer."""
WAITS = "WAITS"
"""The control line stays open, and the loop waits for the rest of a message."""


@dataclass(frozen=True)
class Case:
    """Bytes for a door, and how its answer is judged."""

    name: str
    """``<seed>-<number>``."""
    door: str
    """``grpc``, by a library; ``frames``, HTTP/2 by hand; ``http``; ``control``."""
    kind: str
    """Row of the table at the end."""
    expects: tuple[str, ...]
    """Right answers: gRPC's codes, HTTP's status; ``GONE`` where no answer is right as well."""
    path: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    messages: tuple[bytes, ...] = ()
    """Messages of gRPC, one for each request; of the other doors, pieces that are sent one after another."""
    names: str = ""
    """Word that a refusal's text must have in it, such as the input that is wrong."""
    verdicts: tuple[str, ...] = ()
    """Verdicts on a stream's requests: ``good``, ``wrong``, ``either`` or ``deadline``."""
    seeds: tuple[int | None, ...] = ()
    """Seeds of the requests, which their answers' metadata must tell; None where the server draws one."""
    same_as: str = ""
    """Requests with the same text here get the same pictures' bytes."""
    portraits: int = 0
    """Pictures that a good answer has; 0 where any number is right."""
    output_format: str = ""
    timeout_s: float | None = None
    """The call's own deadline."""
    leaves_after_s: float | None = None
    """Seconds after which the caller hangs up; None stays."""
    compression: str = ""
    at_most: int = 0
    """Requests of this kind that a run may serve; 0 where all of them may be."""

    def write(self, path: Path, **more: Any) -> None:
        """Write the case, and ``more`` for people, as JSON."""
        fields = asdict(self)
        fields["messages"] = [base64.b85encode(message).decode() for message in self.messages]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**more, "case": fields}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Case:
        """Read what ``write`` wrote."""
        fields = json.loads(path.read_text())["case"]
        fields["messages"] = tuple(base64.b85decode(text) for text in fields["messages"])
        fields["expects"], fields["verdicts"] = tuple(fields["expects"]), tuple(fields["verdicts"])
        fields["seeds"] = tuple(fields["seeds"])
        fields["headers"] = tuple((name, value) for name, value in fields["headers"])
        return cls(**fields)


def is_case(path: Path) -> bool:
    """Tell whether a file of a corpus is a case."""
    return path.suffix == ".json" and '"case"' in path.read_text(errors="replace")
