"""The pipeline's stages but the engines' and the loop, as plain objects that are tested without Triton.

The gateway runs them in its processes; in the standalone pipeline, ``preprocess`` and ``postprocess`` do so in Triton.
A stage takes tensors by name and gives tensors by name. What a stage wants to tell the caller travels as a small JSON
report beside the tensors; ``AnswerMetadata`` joins the reports into the answer's metadata. Times in the reports are
``time.monotonic_ns`` readings, which all processes of a machine share, so that a stage's time includes the way to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from icportrait.contract import Array, Tensors, bytes_tensor
from icportrait.diffusion.masking import hide, reference_visibility
from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.errors import InvalidRequest
from icportrait.manifest import Manifest
from icportrait.pictures import finder
from icportrait.pictures.faces import Crop
from icportrait.pictures.imaging import check_file_bytes, encode_picture
from icportrait.pictures.prepare import Box, Kept, prepare
from icportrait.policy import ServingPolicy
from icportrait.presets import Preset
from icportrait.request import PortraitRequest, check_slots, parse_options, parse_request

PICTURES_KEPT = 128
"""Prepared pictures: 100 MB at 512 px."""


class FrontStage:
    """The public inputs to the stages': everything that can be refused without looking into the pictures."""

    def __init__(self, manifest: Manifest, policy: ServingPolicy, is_stream: bool) -> None:
        """Take what requests are checked against.

        Args:
            manifest: the export's.
            policy: the server's.
            is_stream: its callers get more than one answer.
        """
        self._defaults = manifest.defaults
        self._schedule = NoiseSchedule.from_config(manifest.scheduler_config)
        self._slots = min(policy.slots, manifest.preset.max_unet_batch)
        self._is_stream = is_stream

    def check(self, tensors: Mapping[str, Array], key: str = "") -> tuple[PortraitRequest, bytes, bytes]:
        """Check the public inputs by name, and return the request, and the profile's and the reference's files.

        Args:
            tensors: the public inputs.
            key: by which the request is known beside the ensemble.

        Raises:
            InvalidRequest: an input is missing, unknown, too large or out of range, or the checkpoint's schedule or
                the server's slots can't hold the request.
        """
        request, profile, reference = parse_request(tensors, self._defaults, key, self._is_stream)
        for name, data in (("profile", profile), ("reference", reference)):
            # A base64 file takes a third more, line breaks apart; its own size is checked once it is decoded.
            check_file_bytes(len(data) * 3 // 4 if request.encoding == "base64" else len(data), name)
        if request.preview_every and not self._is_stream:
            raise InvalidRequest(
                f"preview_every: {request.preview_every}, expected 0: ic_portrait answers once; ic_portrait_stream has "
                "previews"
            )
        self._schedule.trajectory(request.scheduler, request.num_inference_steps)
        check_slots(request, self._slots)
        return request, profile, reference

    def __call__(self, tensors: Mapping[str, Array], key: str = "") -> tuple[PortraitRequest, Tensors]:
        """Run ``check``, and return ``profile``, ``reference`` and ``request`` as tensors, each [1]."""
        request, profile, reference = self.check(tensors, key)
        return request, {
            "profile": bytes_tensor(profile),
            "reference": bytes_tensor(reference),
            "request": bytes_tensor(request.to_json()),
        }


class PreprocessStage:
    """Pictures to pixels: decoded, upright, cropped; the reference mostly hidden."""

    def __init__(self, preset: Preset) -> None:
        self._preset = preset
        # A request's two pictures are prepared side by side: to look for a face is what takes time.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="picture")
        self._kept = Kept(PICTURES_KEPT, math.inf)
        finder.load()

    def __call__(self, tensors: Mapping[str, Array]) -> Tensors:
        """Make ``contract.pipeline_spec``'s inputs but one and a report of ``profile``, ``reference``, ``request`` [1].

        Raises:
            InvalidRequest: a picture can't be read or is too large, or a crop box is invalid.
        """
        started_ns = time.monotonic_ns()
        request = PortraitRequest.from_json(tensors["request"][0])
        files = [tensors["profile"][0], tensors["reference"][0]]
        boxes = request.profile_box, request.reference_box
        prepared = self._threads.map(
            self._prepare, ("profile", "reference"), files, boxes, [request.encoding == "base64"] * 2
        )
        (profile_crop, profile), (reference_crop, reference) = prepared
        visibility = reference_visibility(self._preset, request.mask_ratio, request.seed)
        report = {
            "crops": {"profile": profile_crop.to_dict(), "reference": reference_crop.to_dict()},
            "started_ns": started_ns,
            "ended_ns": time.monotonic_ns(),
        }
        return {
            "profile_pixels": profile[None],
            "reference_pixels": hide(reference, visibility)[None],
            "visibility": visibility,
            "preprocess_report": bytes_tensor(json.dumps(report).encode()),
        }

    def _prepare(self, name: str, data: bytes, box: Box | None, is_base64: bool) -> tuple[Crop, Array]:
        """Prepare a picture's crop and its pixels, [S, S, 3]. A picture that came lately isn't decoded again."""
        key = hashlib.sha256(data).digest(), box, is_base64
        if kept := self._kept.get(key):
            return kept
        prepared = prepare(data, name, box, is_base64, self._preset.image_size)
        self._kept.put(key, prepared)
        return prepared


class StandalonePreprocessStage:
    """Two picture files and a JSON object of public options to pixels, the options checked first."""

    def __init__(self, manifest: Manifest, policy: ServingPolicy) -> None:
        self._check, self._prepare = FrontStage(manifest, policy, is_stream=False), PreprocessStage(manifest.preset)

    def __call__(self, tensors: Mapping[str, Array]) -> Tensors:
        """Return the outputs that ``contract.stage_specs`` lists for ``preprocess``.

        Raises:
            InvalidRequest: an option or a picture isn't what it should be.
        """
        pictures = {name: tensors[name] for name in ("profile", "reference")}
        _, checked = self._check(parse_options(tensors["request"][0]) | pictures)
        return {**self._prepare(checked), "checked_request": checked["request"]}


class AnswerMetadata:
    """Metadata of an answer."""

    def __init__(self, manifest: Manifest, policy: ServingPolicy) -> None:
        self._size = manifest.preset.image_size
        # Present only where it is so: a label that nobody has to read out of the engine's version.
        self._label = {"simulated": True} if policy.is_simulated else {}
        self._versions = {
            "preset": manifest.preset.name,
            "precision": manifest.precision,
            "model_version": manifest.model_version,
            "weights": "random" if "random_weights" in manifest.source else "checkpoint",
        }

    def __call__(
        self, request: PortraitRequest, prepared: Mapping[str, Any], denoised: Mapping[str, Any], decoded_ns: int
    ) -> dict[str, Any]:
        """Return the metadata as of now, when the pictures are encoded.

        Args:
            request: the one that is answered.
            prepared: ``crops``, ``started_ns`` and ``ended_ns`` of its pictures' preparation, and ``waited_ns``, in
                which they and its portraits waited for a process, where that is known.
            denoised: the pipeline's ``denoise_report``.
            decoded_ns: when its portraits' pixels were there.
        """
        return {
            **self._label,
            "seed": request.seed,
            "num_portraits": request.num_portraits,
            "steps": request.num_inference_steps,
            "scheduler": request.scheduler,
            "guidance_scale": request.guidance_scale,
            "guidance_interval": list(request.guidance_interval),
            "mask_ratio": request.mask_ratio,
            "size": [self._size, self._size],
            "output_format": request.output_format,
            "crops": prepared["crops"],
            "match_confidence": denoised["match_confidence"],
            "stage_ms": _milliseconds(
                preprocess=prepared["ended_ns"] - prepared["started_ns"],
                conditioning=denoised["conditioned_ns"] - prepared["ended_ns"],
                denoise=denoised["denoised_ns"] - denoised["conditioned_ns"],
                decode=decoded_ns - denoised["denoised_ns"],
                postprocess=time.monotonic_ns() - decoded_ns,
            ),
            **_milliseconds(
                encode_ms=denoised["arrived_ns"] - prepared["ended_ns"],
                queue_ms=denoised["joined_ns"] - denoised["arrived_ns"] + prepared.get("waited_ns", 0),
            ),
            **{name: denoised[name] for name in ("warp_ms", "rows_shared", "engine_ms", "numerics_id")},
            "versions": {**self._versions, "engine": denoised["engine"]},
        }


class PostprocessStage:
    """Pixels to files, and the metadata."""

    def __init__(self, manifest: Manifest, policy: ServingPolicy) -> None:
        self._metadata = AnswerMetadata(manifest, policy)

    def __call__(self, tensors: Mapping[str, Array]) -> Tensors:
        """Make ``image`` [n], ``metadata`` [1] of ``portrait_pixels`` [n, S, S, 3], ``request`` and the reports [1]."""
        decoded_ns = time.monotonic_ns()
        request = PortraitRequest.from_json(tensors["request"][0])
        prepared, denoised = (json.loads(tensors[name][0]) for name in ("preprocess_report", "denoise_report"))
        images = [encode_picture(pixels, request.output_format) for pixels in tensors["portrait_pixels"]]
        if request.encoding == "base64":
            images = [base64.b64encode(image) for image in images]
        metadata = self._metadata(request, prepared, denoised, decoded_ns)
        return {"image": bytes_tensor(*images), "metadata": bytes_tensor(json.dumps(metadata).encode())}


def _milliseconds(**durations_ns: int) -> dict[str, float]:
    return {name: round(duration / 1e6, 3) for name, duration in durations_ns.items()}
