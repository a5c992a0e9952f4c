"""The stages of the Triton ensemble as plain objects that are tested without Triton.

A stage takes tensors by name and gives tensors by name. What a stage wants to tell the caller travels as a small JSON
report beside the tensors; ``PostprocessStage`` joins the reports into the answer's metadata. Times in the reports are
``time.monotonic_ns`` readings, which all processes of a machine share, so that a stage's time includes the way to it.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from icportrait.batching import CANCELLED, Batcher, DenoiseResult, Ticket, check_slots
from icportrait.contract import Array
from icportrait.errors import Cancelled, IcPortraitError
from icportrait.faces import crop_to_square, find_crop
from icportrait.imaging import check_file_bytes, decode_base64, decode_picture, encode_picture
from icportrait.manifest import Manifest
from icportrait.masking import hide, reference_visibility
from icportrait.policy import ServingPolicy
from icportrait.presets import Preset
from icportrait.request import PortraitRequest, parse_request
from icportrait.sampling import NoiseSchedule
from icportrait.slot_table import DenoiseJob

Tensors = dict[str, Array]
_CANCELLED_KEPT = 1024


def bytes_tensor(*values: bytes) -> Array:
    """A BYTES tensor of shape [len(values)]."""
    return np.array(values, dtype=np.object_)


class FrontStage:
    """The public inputs to the ensemble's: everything that can be refused without looking into the pictures."""

    def __init__(self, manifest: Manifest, policy: ServingPolicy) -> None:
        self._defaults = manifest.defaults
        self._schedule = NoiseSchedule.from_config(manifest.scheduler_config)
        self._slots = min(policy.slots, manifest.preset.max_unet_batch)

    def __call__(self, tensors: Mapping[str, Array], key: str = "") -> Tensors:
        """The public inputs by name -> ``profile``, ``reference`` and ``request``, each [1].

        Args:
            tensors: the public inputs.
            key: by which the request can be cancelled.

        Raises:
            InvalidRequest: an input is missing, unknown, too large or out of range, or the checkpoint's schedule or
                the server's slots can't hold the request.
        """
        request, profile, reference = parse_request(tensors, self._defaults, key)
        for name, data in (("profile", profile), ("reference", reference)):
            # Base64 with its line ends is less than twice the file; the exact check comes when it is decoded.
            check_file_bytes(len(data) if request.encoding == "binary" else (len(data) + 1) // 2, name)
        self._schedule.plan(request.scheduler, request.num_inference_steps)
        check_slots(request, self._slots)
        return {
            "profile": bytes_tensor(profile),
            "reference": bytes_tensor(reference),
            "request": bytes_tensor(request.to_json()),
        }


class PreprocessStage:
    """Pictures to pixels: decoded, upright, cropped; the reference mostly hidden."""

    def __init__(self, preset: Preset) -> None:
        self._preset = preset

    def __call__(self, tensors: Mapping[str, Array]) -> Tensors:
        """``profile``, ``reference``, ``request`` [1] -> what ``contract.stage_specs`` lists for ``preprocess``.

        Raises:
            InvalidRequest: a picture can't be read or is too large, or a crop box is invalid.
        """
        started_ns = time.monotonic_ns()
        request = PortraitRequest.from_json(tensors["request"][0])
        size = self._preset.image_size
        crops, pixels = {}, {}
        for name, box in (("profile", request.profile_box), ("reference", request.reference_box)):
            data = tensors[name][0]
            picture = decode_picture(decode_base64(data, name) if request.encoding == "base64" else data, name)
            crop = find_crop(picture, box, f"{name}_box")
            crops[name] = crop.to_dict()
            pixels[name] = crop_to_square(picture, crop, size)
        visibility = reference_visibility(self._preset, request.mask_ratio, request.seed)
        report = {
            "request": tensors["request"][0].decode(),
            "crops": crops,
            "started_ns": started_ns,
            "ended_ns": time.monotonic_ns(),
        }
        return {
            "profile_pixels": pixels["profile"][None],
            "reference_pixels": hide(pixels["reference"], visibility)[None],
            "visibility": visibility,
            "preprocess_report": bytes_tensor(json.dumps(report).encode()),
        }


class DenoiseStage:
    """The denoising loop as an asynchronous stage: answers arrive by callback."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._tickets: dict[str, Ticket] = {}
        # Of requests that are still on their way here, or have ended.
        self._cancelled: deque[str] = deque(maxlen=_CANCELLED_KEPT)
        self._lock = threading.Lock()

    def submit(self, tensors: Mapping[str, Array], answer: Callable[[Tensors | IcPortraitError], None]) -> None:
        """Queue one request; ``answer`` is called once, from the loop's thread.

        Raises:
            Cancelled: its caller has gone already.
        """
        preprocess = json.loads(tensors["preprocess_report"][0])

        def on_done(result: DenoiseResult | IcPortraitError) -> None:
            with self._lock:
                self._tickets.pop(request.key, None)
            answer(result if isinstance(result, IcPortraitError) else self._outputs(result, preprocess))

        job = DenoiseJob(
            PortraitRequest.from_json(preprocess["request"]),
            tensors["profile_latent"],
            tensors["reference_latent"],
            tensors["visibility"],
        )
        request = job.request
        with self._lock:
            if request.key in self._cancelled:
                raise Cancelled(CANCELLED)
            ticket = self._batcher.submit(job, on_done, priority=request.priority, deadline_s=request.deadline_s)
            if request.key:
                self._tickets[request.key] = ticket

    def cancel(self, key: str) -> None:
        """Drop the request with this key before the next step; from any thread."""
        with self._lock:
            if ticket := self._tickets.get(key):
                ticket.cancel()
            else:
                self._cancelled.append(key)

    def close(self) -> None:
        self._batcher.close()

    def _outputs(self, result: DenoiseResult, preprocess: dict[str, Any]) -> Tensors:
        report = {
            "preprocess": preprocess,
            "conditioned_ns": result.conditioned_ns,
            "denoised_ns": result.denoised_ns,
            "match_confidence": result.match_confidence,
            "engine": self._batcher.engine_version,
        }
        return {
            "portrait_latent": result.portrait_latent,
            "denoise_report": bytes_tensor(json.dumps(report).encode()),
        }


class PostprocessStage:
    """Pixels to files, and the metadata."""

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

    def __call__(self, tensors: Mapping[str, Array]) -> Tensors:
        """``portrait_pixels`` [n, S, S, 3] and ``denoise_report`` [1] -> ``image`` [n], ``metadata`` [1]."""
        started_ns = time.monotonic_ns()
        denoise = json.loads(tensors["denoise_report"][0])
        preprocess = denoise["preprocess"]
        request = PortraitRequest.from_json(preprocess["request"])
        images = [encode_picture(pixels, request.output_format) for pixels in tensors["portrait_pixels"]]
        if request.encoding == "base64":
            images = [base64.b64encode(image) for image in images]
        metadata: dict[str, Any] = {
            **self._label,
            "seed": request.seed,
            "num_portraits": request.num_portraits,
            "steps": request.num_inference_steps,
            "scheduler": request.scheduler,
            "guidance_scale": request.guidance_scale,
            "mask_ratio": request.mask_ratio,
            "size": [self._size, self._size],
            "output_format": request.output_format,
            "crops": preprocess["crops"],
            "match_confidence": denoise["match_confidence"],
            "stage_ms": _stage_ms(
                preprocess=preprocess["ended_ns"] - preprocess["started_ns"],
                conditioning=denoise["conditioned_ns"] - preprocess["ended_ns"],
                denoise=denoise["denoised_ns"] - denoise["conditioned_ns"],
                decode=started_ns - denoise["denoised_ns"],
                postprocess=time.monotonic_ns() - started_ns,
            ),
            "versions": {**self._versions, "engine": denoise["engine"]},
        }
        return {"image": bytes_tensor(*images), "metadata": bytes_tensor(json.dumps(metadata).encode())}


def _stage_ms(**stages_ns: int) -> dict[str, float]:
    return {stage: round(duration / 1e6, 3) for stage, duration in stages_ns.items()}
