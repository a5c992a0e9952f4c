"""The memory that a server needs on a CPU, and the choice of a size that fits, before anything is loaded.

Needs are computed from the graphs (``graph_memory``) and the constants below, rounded up from measurements. On a GPU
the runner looks at the device's memory itself (``runtime/tensorrt/loading``).
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace

from icportrait.contract import ENGINES, MODEL_ENGINES, DType, engine_specs, stage_specs
from icportrait.deploy.machine_memory import Room
from icportrait.errors import NotEnoughMemory
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime.load import buckets_at_once

PROCESS_BYTES = {"onnxruntime": 150 * 10**6, "openvino": 150 * 10**6, "torch": 400 * 10**6}
"""A model's process with its runtime and no engine: torch brings diffusers along."""
SERVER_BYTES = 600 * 10**6
"""Tritonserver, the gateway and its pictures' processes, with pictures under way."""
ADDRESS_BYTES = 1200 * 10**6
"""Address space that a process takes beyond its memory: libraries, threads, allocators' reserves."""
PYTHON_MODELS = 1 + len(MODEL_ENGINES)
THREADS_A_MODEL = 32
"""Threads of Triton's pool."""
REGION_BYTES = 4 * 2**20
"""Shared between Triton and a model's process beyond its tensors."""
WEIGHTS_HELD = {"onnxruntime": 2, "torch": 1}
"""Number of times that a runtime holds weights."""
LEAST_SLOTS = 2
"""A guided portrait takes two."""
SPARE = 1.25
"""Factor on the size of a run's tensors, for a runtime's own buffers and the holes between them."""
GB = 1e9


@dataclass(frozen=True)
class Need:
    """The needs of one process, in bytes."""

    model: str
    memory: int
    address_space: int


def needs(manifest: Manifest, policy: ServingPolicy, keeps_compiled: bool = True) -> list[Need]:
    """Return the most that each process needs, by a repository's manifest.

    Where no engine runs on a CPU, that is Triton's need alone.

    Args:
        manifest: the repository's manifest.
        policy: the policy that it is to be served by.
        keeps_compiled: whether OpenVINO's engines are read back from files. An engine that is compiled in the process
            itself holds its weights twice.
    """
    if not manifest.memory:
        return [_server_need(policy)]
    owned = {name: [name] for name in MODEL_ENGINES} | {"denoise": [e for e in ENGINES if e not in MODEL_ENGINES]}
    specs = engine_specs(manifest.preset, manifest.precision)
    found = [_server_need(policy)]
    for model, engines in owned.items():
        memory, mapped, largest = PROCESS_BYTES[policy.runtime], 0, 0
        for name in engines:
            known, spec = manifest.memory[name], specs[name]
            buckets = buckets_at_once(spec, policy)
            if policy.runtime == "openvino":
                held = known.weights_bytes * (1 if keeps_compiled else 2)
                memory += sum(held + int(SPARE * known.run_bytes[rows]) for rows in buckets)
                mapped += known.weights_bytes * len(buckets)
                # While it is compiled for the first time, an engine holds its weights twice.
                largest = max(largest, known.weights_bytes) if keeps_compiled else 0
            else:
                memory += WEIGHTS_HELD[policy.runtime] * known.weights_bytes + int(SPARE * known.run_bytes[buckets[-1]])
            mapped += manifest.engines[name].size_bytes
        if policy.runtime == "torch":
            # Each process holds the whole checkpoint.
            memory += sum(known.weights_bytes for name, known in manifest.memory.items() if name not in engines)
        if model == "denoise":
            f_ref = [tensor for tensor in specs["unet"].inputs if tensor.name.startswith("f_ref_")]
            memory += sum(tensor.nbytes(min(policy.slots, manifest.preset.max_unet_batch)) for tensor in f_ref)
        if model == "vae_encoder":
            memory += policy.cache_bytes
        found.append(Need(model, memory + largest, memory + largest + mapped + ADDRESS_BYTES))
    return found


def _server_need(policy: ServingPolicy) -> Need:
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    stacks = PYTHON_MODELS * THREADS_A_MODEL * (8 * 2**20 if stack == resource.RLIM_INFINITY else stack)
    return Need("tritonserver", SERVER_BYTES, stacks + ADDRESS_BYTES)


def shared_memory(manifest: Manifest, policy: ServingPolicy) -> int:
    """Bound the bytes in /dev/shm: a batch of either VAE engine, and the crops' latents of all admitted requests."""
    specs = engine_specs(manifest.preset, manifest.precision)
    batches = sum(
        tensor.nbytes(specs[name].batch.max)
        for name in MODEL_ENGINES
        for tensor in (*specs[name].inputs, *specs[name].outputs)
    )
    denoise = stage_specs(manifest.preset)["denoise"]
    latents = sum(tensor.nbytes(1) for tensor in denoise.inputs if tensor.dtype is not DType.BYTES)
    portraits = specs["vae_decoder"].inputs[0].nbytes(policy.slots)
    requests = policy.slots + policy.max_queued_slots
    return PYTHON_MODELS * REGION_BYTES + batches + requests * latents + portraits


def fit(
    manifest: Manifest, policy: ServingPolicy, room: Room, keeps_compiled: bool = True
) -> tuple[ServingPolicy, list[Need]]:
    """Return the policy with as many rows at once, and then as many slots, as memory allows, and what the policy needs.

    Raises:
        NotEnoughMemory: not even the least fits; the text has both numbers.
    """
    for candidate in _candidates(policy):
        found = needs(manifest, candidate, keeps_compiled)
        if _fits(found, room):
            return candidate, found
    total = sum(need.memory for need in found)
    largest = max(found, key=lambda need: need.address_space)
    what = f"{manifest.preset.name} on {policy.runtime}"
    if room.address_bytes is not None and largest.address_space > room.address_bytes:
        raise NotEnoughMemory(
            f"{what}: {largest.model} needs {largest.address_space / GB:.1f} GB of address space, and ulimit -v allows "
            f"{room.address_bytes / GB:.1f} GB; lift it with: ulimit -v unlimited"
        )
    parts = ", ".join(f"{need.model} {need.memory / GB:.1f}" for need in found)
    raise NotEnoughMemory(
        f"{what} needs {total / GB:.1f} GB of memory ({parts}), and {room.owner} has {room.free_bytes / GB:.1f} GB "
        "left; end other programs, allow it more, or serve a smaller preset"
    )


def _candidates(policy: ServingPolicy) -> Iterator[ServingPolicy]:
    rows = policy.rows_at_once
    while rows:
        yield replace(policy, rows_at_once=rows)
        rows //= 2
    slots = policy.slots // 2
    while slots >= LEAST_SLOTS:
        yield replace(policy, rows_at_once=1, slots=slots)
        slots //= 2


def _fits(found: list[Need], room: Room) -> bool:
    if room.address_bytes is not None and any(need.address_space > room.address_bytes for need in found):
        return False
    return sum(need.memory for need in found) <= room.free_bytes


def summary(policy: ServingPolicy, found: list[Need], room: Room) -> str:
    """Return a line for the operator: the chosen settings, the memory that they need, and the memory that there is."""
    row_by_row = policy.rows_at_once == 1 or (policy.deterministic and policy.runtime != "onnxruntime")
    rows = "1 row at once" if row_by_row else f"{policy.rows_at_once} rows at once"
    total = sum(need.memory for need in found)
    return (
        f"{policy.runtime} with {policy.slots} slots, {rows}: needs up to {total / GB:.1f} GB of the "
        f"{room.free_bytes / GB:.1f} GB that {room.owner} has left"
    )
