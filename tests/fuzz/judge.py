"""Is an answer a good picture, or one clear refusal under its right code? Each fault is a sentence."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from google.protobuf.message import DecodeError
from PIL import Image, UnidentifiedImageError
from tritonclient.grpc import service_pb2

from icportrait.pictures.imaging import DIGITAL_SOURCE_TYPE
from tests.fuzz.callers import Answer
from tests.fuzz.cases import GONE, GRPC_REFUSALS, GRPC_VERDICTS, WAITS, Case
from tests.fuzz.control_cases import leases

MAX_TEXT = 700
INTERNALS = re.compile(
    r"Traceback|File \"|line \d+, in |site-packages|\.py\b|<class '|object at 0x|"
    r"\b[A-Z]\w*(Error|Exception)\(|(?<![0-9a-f])0x[0-9a-f]{8}"
)
"""Signs of the server's inside in a text for a caller."""
CODE = re.compile(r"([A-Z_]+): ")
"""Beginning of an error's text on a stream, unless the error is the caller's own mistake."""
NAMING = ("INVALID_ARGUMENT", "400", "RESOURCE_EXHAUSTED", "429", "PERMISSION_DENIED", "403")
"""Codes of refusals that name what is wrong."""
WITHOUT_TEXT = ("DEADLINE_EXCEEDED", GONE, WAITS)


class Judge:
    """Judges answers, and remembers the bytes of requests that come again."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.pictures = 0
        """Good pictures so far."""
        self._first: dict[str, tuple[bytes, ...]] = {}
        self._served: Counter[str] = Counter()

    def faults(self, case: Case, answer: Answer) -> list[str]:
        """Return what is wrong with an answer; nothing where it is right."""
        faults = list(answer.faults)
        if answer.code not in case.expects:
            return [*faults, f"answered {answer.code} {answer.text[:300]!r}, expected {' or '.join(case.expects)}"]
        if answer.code in ("OK", "200"):
            self._served[case.kind] += 1
            if case.at_most and self._served[case.kind] > case.at_most:
                faults.append(f"{self._served[case.kind]} were served, expected {case.at_most} at most")
            return faults + (
                self._stream(case, answer) if case.path.endswith("/ModelStreamInfer") else self._good(case, answer)
            )
        # A HEAD has no body to say it in.
        if answer.code not in WITHOUT_TEXT and not (case.door == "http" and case.messages[0].startswith(b"HEAD ")):
            faults += refusal_faults(answer.text, case.names if answer.code in NAMING else "")
        if answer.bodies and case.door in ("grpc", "frames") and not case.path.endswith("/ModelStreamInfer"):
            faults.append("a refusal came beside an answer")
        return faults

    def _good(self, case: Case, answer: Answer) -> list[str]:
        if case.expects == ("OK",) and case.door == "control":
            leased = sum(json.loads(said)["op"] == "leased" for said in answer.bodies)
            return [] if leased == leases(case) else [f"{leased} of {leases(case)} leases were answered"]
        if case.door in ("grpc", "frames"):
            if not case.path.endswith("/ModelInfer"):
                return []
            try:
                made = service_pb2.ModelInferResponse.FromString(answer.bodies[0])
                return self._pictures(case, images_of(made), metadata_of(made))
            except (DecodeError, ValueError, IndexError) as error:
                return [f"the answer can't be read: {error!r}"]
        if case.door == "http" and case.kind not in ("another route", "control line", "a damaged request"):
            try:
                return self._over_http(case, answer)
            except (ValueError, KeyError, TypeError, DecodeError) as error:
                return [f"the answer can't be read: {error!r}: {answer.bodies[0][:200] if answer.bodies else None!r}"]
        return []

    def _over_http(self, case: Case, answer: Answer) -> list[str]:
        if not answer.bodies:
            return ["the answer is shorter than its length says"]
        (body,) = answer.bodies
        kind = answer.headers.get("content-type", "")
        if kind == "text/event-stream":
            return self._events(case, body)
        if kind.startswith("image/"):
            return self._pictures(case, (body,), json.loads(answer.headers["icportrait-metadata"]))
        if "inference-header-content-length" in answer.headers:
            at = int(answer.headers["inference-header-content-length"])
            head, tensors = json.loads(body[:at]), {}
            for output in head["outputs"]:
                size = output.get("parameters", {}).get("binary_data_size", 0)
                tensors[output["name"]] = tuple(elements(body[at : at + size]))
                at += size
            metadata = json.loads(tensors["metadata"][0]) if tensors.get("metadata") else None
            faults = self._pictures(case, tensors.get("image", ()), metadata)
            return faults + ([] if at == len(body) else ["bytes follow the last tensor"])
        made = json.loads(body)
        return self._pictures(case, images_of_json(made), metadata_of_json(made))

    def _events(self, case: Case, body: bytes) -> list[str]:
        events = [event for event in body.decode().split("\n\n") if event]
        read = [
            json.loads("".join(line[6:] for line in event.split("\n") if line.startswith("data: "))) for event in events
        ]
        errors = [event for event in read if "error" in event]
        if errors:
            faults = [] if len(errors) == 1 and read[-1] is errors[0] else ["events follow an error"]
            # Where a stream ends with an error, its status was sent before.
            if "400" in case.expects or "503" in case.expects:
                return faults + refusal_faults(errors[0]["error"], case.names)
            return [*faults, f"a stream ended with {errors[0]['error'][:200]!r}"]
        if not read or "metadata" not in read[-1]:
            return ["a stream ended without portraits"]
        return self._pictures(case, images_of_json(read[-1]), metadata_of_json(read[-1]))

    def _stream(self, case: Case, answer: Answer) -> list[str]:
        """Judge a gRPC stream: each request has one end, and nothing after it."""
        faults, ended = [], []
        try:
            for body in answer.bodies:
                message = service_pb2.ModelStreamInferResponse.FromString(body)
                response = message.infer_response
                if response.id in ended and case.kind == "a stream":
                    faults.append(f"request {response.id!r} was answered after its end")
                index = int(response.id) if case.verdicts else None
                expects = ("OK", *GRPC_REFUSALS) if index is None else GRPC_VERDICTS[case.verdicts[index]]
                is_end = response.parameters["triton_final_response"].bool_param
                if text := message.error_message:
                    faults += refusal_faults(text, case.names)
                    code = found[1] if (found := CODE.match(text)) else "INVALID_ARGUMENT"
                    is_late = text.startswith("UNAVAILABLE: deadline_ms: ")
                    if code not in expects or (code == "UNAVAILABLE") != is_late:
                        faults.append(f"refused: {text[:200]!r}, expected {' or '.join(expects)}")
                elif is_end:
                    if "OK" not in expects:
                        faults.append(f"request {response.id!r} was served, expected a refusal")
                    faults += self._pictures(case, images_of(response), metadata_of(response), index or 0)
                if is_end:
                    ended.append(response.id)
        except (DecodeError, ValueError, IndexError) as error:
            return [f"an answer can't be read: {error!r}"]
        if case.kind == "a stream" and len(ended) != len(case.messages):
            faults.append(f"{len(ended)} ends for {len(case.messages)} requests")
        return faults

    def _pictures(
        self, case: Case, images: tuple[bytes, ...], metadata: dict[str, Any] | None, index: int = 0
    ) -> list[str]:
        """Judge the portraits of a case's request, by its index on a stream."""
        faults = [fault for image in images for fault in self._picture_faults(image, case.output_format)]
        if case.portraits and len(images) != case.portraits:
            faults.append(f"{len(images)} portraits, expected {case.portraits}")
        if not images and case.kind not in ("a damaged message", "a damaged body"):
            faults.append("an answer without a picture")
        # The engines of the fuzz make one picture for all requests: an answer's metadata tell whose the answer is.
        seed = case.seeds[index] if case.seeds else None
        if seed is not None and (metadata or {}).get("seed") != seed:
            faults.append(f"the answer's metadata are {str(metadata)[:100]}, expected seed {seed}")
        if metadata and metadata["num_portraits"] != len(images):
            faults.append(f"{len(images)} portraits, but the metadata say {metadata['num_portraits']}")
        if case.same_as and images != self._first.setdefault(case.same_as, images):
            faults.append(f"{case.same_as}: other bytes than the first time")
        self.pictures += len(images)
        return faults

    def _picture_faults(self, image: bytes, output_format: str) -> list[str]:
        try:
            with Image.open(io.BytesIO(image)) as picture:
                picture.load()
                found, size = (picture.format or "").lower(), picture.size
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            return [f"a portrait can't be read: {error!r}"]
        faults = [] if size == (self.image_size,) * 2 else [f"a portrait of {size} pixels"]
        if output_format and found != output_format:
            faults.append(f"a portrait is a {found}, expected {output_format}")
        if DIGITAL_SOURCE_TYPE.encode() not in image:
            faults.append("a portrait isn't marked as generated")
        return faults


def refusal_faults(text: str, names: str) -> list[str]:
    """Judge a refusal's text: one clear sentence for a caller, that names what is wrong."""
    faults = []
    if not text:
        faults.append("a refusal says nothing")
    if text.startswith(("INTERNAL", "UNKNOWN")):
        faults.append(f"a refusal as if the server were at fault: {text[:200]!r}")
    if len(text) > MAX_TEXT:
        faults.append(f"a refusal of {len(text)} characters: {text[:200]!r}")
    if found := INTERNALS.search(text):
        faults.append(f"a refusal tells of the server's inside ({found[0]!r}): {text[:300]!r}")
    if names and names not in text:
        faults.append(f"a refusal doesn't name {names!r}: {text[:300]!r}")
    return faults


def images_of(response: Any) -> tuple[bytes, ...]:
    """Return the pictures of a ``ModelInferResponse``; base64's are decoded."""
    for output, data in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == "image":
            return tuple(map(_decoded, elements(data)))
    return ()


def metadata_of(response: Any) -> dict[str, Any] | None:
    """Return the metadata of a ``ModelInferResponse``; None where the answer has none."""
    for output, data in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == "metadata":
            return dict(json.loads(next(elements(data))))
    return None


def images_of_json(answer: Any) -> tuple[bytes, ...]:
    """Return the pictures of an answer in JSON."""
    if "outputs" in answer:
        texts = [text for output in answer["outputs"] if output["name"] == "image" for text in output["data"]]
    else:
        found = answer.get("images", answer.get("image", []))
        texts = found if isinstance(found, list) else [found]
    return tuple(base64.b64decode(text, validate=True) for text in texts)


def metadata_of_json(answer: Any) -> dict[str, Any] | None:
    """Return the metadata of an answer in JSON; None where the answer has none."""
    named = {output["name"]: output["data"][0] for output in answer.get("outputs", ())}
    found = named.get("metadata", answer.get("metadata"))
    return json.loads(found) if isinstance(found, str) else found


def elements(data: bytes) -> Iterator[bytes]:
    """Split a BYTES tensor into its elements."""
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        yield data[at + 4 : at + 4 + length]
        at += 4 + length


def _decoded(image: bytes) -> bytes:
    # A damaged request may ask for base64.
    try:
        return base64.b64decode(image, validate=True)
    except ValueError:
        return image
