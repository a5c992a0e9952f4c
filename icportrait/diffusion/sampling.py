"""Deterministic samplers for in-flight batching: each row of a batch has its own schedule, step and timestep.

Every latent here is variance preserving, ``x = signal * z + noise_level * n`` with ``signal^2 + noise_level^2 = 1``
and ``sigma = noise_level / signal``; k-diffusion's latents, which diffusers' Euler scheduler keeps, are ``x / signal``.
The UNet thus takes a latent as it is, and DDIM (eta 0), Euler and DPM-Solver++(2M) become the same affine map with
five numbers per step, worked out in float64 when a trajectory is made (``Trajectory.coefficients``):

    latent'  = c0 * latent + c2 * history + c1 * model_output
    history' = c3 * latent + c4 * model_output                 the predicted z: a preview; 2M alone looks back at it

A sampler's trajectory is what diffusers' scheduler of that name makes of the same configuration, quirks included:
``DDIMScheduler``, ``EulerDiscreteScheduler`` or ``DPMSolverMultistepScheduler``, each ``.from_config(config)``. Two
things differ on purpose: an absent ``clip_sample`` (``NoiseSchedule.from_config``) and timestep -1 (``_timesteps``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icportrait.errors import CheckpointError, InvalidRequest
from icportrait.request import SCHEDULERS

_CLASSES = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
_FOREIGN = (
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
"""Samplers that aren't ours. Their files tell the noise that a model was trained with, which holds for any sampler."""
_CLIPPING = ("DDIMScheduler", "DDPMScheduler")
"""They clip where ``clip_sample`` is absent."""
_DEFAULT_SPACING = {"ddim": "leading", "euler": "linspace", "dpmpp_2m": "linspace"}
_OFF = ("clip_sample", "thresholding", "rescale_betas_zero_snr", "use_flow_sigmas", "use_dynamic_shifting")
_OFF_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "set_alpha_to_one": (True, False),
    "final_sigmas_type": ("zero",),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "variance_type": (None,),
    "lambda_min_clipped": (-math.inf,),
    **dict.fromkeys(_OFF + _OFF_SIGMAS, (False, None)),
}
"""Values that a key may have where it is present. A key neither here nor read by name below can't change a picture."""
_OF_SAMPLERS = (
    "final_sigmas_type",
    "algorithm_type",
    "solver_order",
    "solver_type",
    "interpolation_type",
    "timestep_type",
    "variance_type",
    "lambda_min_clipped",
)
"""Keys of ``_SUPPORTED`` that say how a foreign sampler works, and not how a model was trained."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One sampler's n steps. The arrays are read-only, because equal requests share one trajectory."""

    scheduler: str
    timesteps: NDArray[np.float32]
    """``[n]``, what the UNet is told at each step; fractional for Euler with linspace spacing."""
    signal_level: NDArray[np.float32]
    """``[n]``, at each step's input: the canvas's held half enters as ``signal_level * z + noise_level * noise``."""
    noise_level: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    """``[n, 5]``: c0 to c4 of each step, rows for ``advance``."""
    initial_scale: float
    """The first latent is this times unit noise; Euler starts a little below 1 where diffusers' does."""

    @cached_property
    def settings(self) -> NDArray[np.float32]:
        """Return ``[n, 8]``: timestep, signal level, noise level, c0 to c4 of each step."""
        return np.column_stack((self.timesteps, self.signal_level, self.noise_level, self.coefficients))


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise that a checkpoint was trained with, and how its authors want timesteps chosen."""

    alphas_cumprod: tuple[float, ...] = field(repr=False)
    """``signal_level^2`` at each training timestep, falling."""
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    """None takes each sampler's default in diffusers: leading for DDIM, linspace for the others."""
    steps_offset: int = 0
    """Added to every timestep of leading spacing."""
    set_alpha_to_one: bool = True
    """DDIM ends without noise; else at the first training timestep's level. Euler and 2M always end without."""

    def __hash__(self) -> int:
        # Not of all levels, because that takes longer than to look a trajectory up.
        return hash((self.alphas_cumprod[-1], self.prediction_type, self.timestep_spacing))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers ``scheduler_config.json``, whichever class wrote it: one of our samplers' or another.

        An absent key takes the default of the scheduler that is asked for, as ``from_config`` of diffusers has it, not
        of the class that wrote the file. ``clip_sample`` is the exception: its absence means True in a file of
        ``DDIMScheduler`` or ``DDPMScheduler`` and is refused there, but False elsewhere, since the others don't clip.

        Raises:
            CheckpointError: a key asks for something that would change pictures and isn't supported.
        """
        # A live scheduler.config lists here the keys that nobody set; diffusers drops them when it converts.
        unset = config.get("_use_default_values", [])
        if not isinstance(unset, list):
            raise _refusal("_use_default_values", unset, "a list of keys")
        config = {key: value for key, value in config.items() if key not in unset}
        writer = config.get("_class_name")
        if writer is not None and writer not in _CLASSES + _FOREIGN:
            raise _refusal("_class_name", writer, _one_of(_CLASSES + _FOREIGN))
        for key, supported in _SUPPORTED.items():
            if writer in _FOREIGN and key in _OF_SAMPLERS:
                continue
            if key in config and config[key] not in supported:
                advice = ""
                if key in _OFF_SIGMAS:
                    advice = "; with that, steps lie at other noise levels, and portraits come out a little different"
                raise _refusal(key, config[key], _one_of(supported) + advice)
        if writer in _CLIPPING and "clip_sample" not in config:
            raise _refusal("clip_sample", True, f"False ({writer} clips where the key is absent)")
        betas = _betas(config)
        offset = config.get("steps_offset", 0)
        if not isinstance(offset, int) or not 0 <= offset < len(betas):
            raise _refusal("steps_offset", offset, f"a whole number from 0 to {len(betas) - 1}")
        # diffusers works out 1 - beta in float32, and so do we: over a thousand factors that moves a picture by 1e-5.
        alphas = (1 - betas.astype(np.float32)).astype(np.float64)
        options = {option.name: config[option.name] for option in fields(cls)[1:] if option.name in config}
        return cls(tuple(np.cumprod(alphas).tolist()), **options)

    def trajectory(self, scheduler: str, num_inference_steps: int) -> Trajectory:
        """Return the trajectory of ``num_inference_steps`` UNet calls under one of ``SCHEDULERS``; cached.

        Raises:
            InvalidRequest: the sampler is unknown, or the training timesteps don't hold that many steps.
        """
        return _trajectory(self, scheduler, num_inference_steps)


def foreign_sampler(config: Mapping[str, Any]) -> str | None:
    """Return the class that wrote a ``scheduler_config.json``, None where one of our samplers is of that class."""
    writer = config.get("_class_name")
    return writer if writer in _FOREIGN else None


def advance(latent: Any, model_output: Any, history: Any, coefficients: Any) -> tuple[Any, Any]:
    """Advance every row by one step, elementwise, so that no row's bits depend on the rows beside it.

    All four are numpy arrays, or all are torch tensors on one device.

    Args:
        latent: ``[rows, ...]`` float32.
        model_output: like ``latent``: the UNet's prediction at each row's timestep, after guidance.
        history: like ``latent``: what the last call returned; zeros at a request's first step (0 * nan is nan).
        coefficients: ``[rows, 5]`` float32, each row taken from its own trajectory and step.

    Returns:
        The next latent and history, shaped like ``latent``.
    """
    columns = coefficients.reshape(tuple(coefficients.shape) + (1,) * (latent.ndim - 1))
    c0, c1, c2, c3, c4 = (columns[:, index] for index in range(5))
    return c0 * latent + c2 * history + c1 * model_output, c3 * latent + c4 * model_output


def guide(conditional: Any, unconditional: Any, guidance_scale: Any) -> Any:
    """Guide a prediction without a classifier: equation 6 of arXiv 2207.12598 with ``w = guidance_scale - 1``.

    Written from the conditional side, so that a scale of 1 gives back ``conditional`` to the bit.

    Args:
        conditional: ``[rows, ...]`` float32, numpy or torch.
        unconditional: like ``conditional``.
        guidance_scale: one number, or ``[rows]`` float32 of the same kind.
    """
    weight = guidance_scale - 1
    if getattr(weight, "ndim", 0):
        weight = weight.reshape((-1,) + (1,) * (conditional.ndim - 1))
    return conditional + weight * (conditional - unconditional)


_MAX_TRAIN_TIMESTEPS = 100_000
"""A hundred times Stable Diffusion's; the schedule has a number for each."""


def _betas(config: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return the variance added at each training timestep, ``[num_train_timesteps]``."""
    total, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if not isinstance(total, int) or not 1 <= total <= _MAX_TRAIN_TIMESTEPS:
        raise _refusal("num_train_timesteps", total, f"a positive whole number of at most {_MAX_TRAIN_TIMESTEPS}")
    if betas is not None:
        numbers = betas if isinstance(betas, list) else []
        if len(numbers) != total or not all(isinstance(beta, float) and 0 < beta < 1 for beta in numbers):
            raise _refusal("trained_betas", betas, f"a list of {total} (num_train_timesteps) numbers between 0 and 1")
        return np.array(numbers)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    for key, beta in (("beta_start", start), ("beta_end", end)):
        if not isinstance(beta, float) or not 0 < beta < 1:
            raise _refusal(key, beta, "a number between 0 and 1")
    schedule = config.get("beta_schedule", "linear")
    if schedule == "linear":  # arXiv 2006.11239, section 4
        betas = np.linspace(start, end, total)
    elif schedule == "scaled_linear":  # latent diffusion's (2112.10752): linear in the square root
        betas = np.linspace(math.sqrt(start), math.sqrt(end), total) ** 2
    elif schedule == "squaredcos_cap_v2":  # 2102.09672, equation 17
        signal = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * math.pi / 2)
        betas = np.minimum(1 - (signal[1:] / signal[:-1]) ** 2, 0.999)
    else:
        raise _refusal("beta_schedule", schedule, _one_of(("linear", "scaled_linear", "squaredcos_cap_v2")))
    return np.asarray(betas, np.float64)


def _timesteps(total: int, spacing: str, offset: int, scheduler: str, steps: int) -> NDArray[np.float32]:
    """Return the training timesteps ``[steps]``, falling, by the rules of arXiv 2305.08891, table 2."""
    points = steps + 1 if scheduler == "dpmpp_2m" else steps  # 2M spaces its end point too, and then drops it
    if spacing == "linspace":
        grid = np.linspace(0, total - 1, points)[::-1]
        grid = grid if scheduler == "euler" else grid.round()
    elif spacing == "leading":
        grid = np.arange(points)[::-1] * (total // points) + float(offset)
    else:
        grid = np.arange(total, 0, -total / steps).round() - 1
    # Rounding can hand arange one element too many (61 trailing steps of 1000), which diffusers runs at timestep -1.
    return grid[:steps].astype(np.float32)


@lru_cache(maxsize=512)
def _trajectory(schedule: NoiseSchedule, scheduler: str, steps: int) -> Trajectory:
    if scheduler not in SCHEDULERS:
        raise InvalidRequest(f"scheduler: {scheduler!r} is unknown, expected {_one_of(SCHEDULERS)}")
    total, spacing = len(schedule.alphas_cumprod), schedule.timestep_spacing or _DEFAULT_SPACING[scheduler]
    timesteps = _timesteps(total, spacing, schedule.steps_offset, scheduler, min(max(steps, 1), total))
    if len(timesteps) != steps or timesteps[0] > total - 1 or not (np.diff(timesteps) < 0).all():
        raise InvalidRequest(
            f"num_inference_steps: {steps} steps of {scheduler} don't fit the checkpoint's {total} training timesteps"
        )
    sigmas = np.sqrt(1 / np.array(schedule.alphas_cumprod) - 1)
    sigma = np.interp(timesteps, np.arange(total), sigmas)
    target = np.append(sigma[1:], 0.0)
    if scheduler == "ddim":
        # A fixed stride back, which with linspace and trailing spacing isn't always where the next step starts.
        back, final = timesteps - total // steps, 0.0 if schedule.set_alpha_to_one else sigmas[0]
        target = np.where(back >= 0, np.interp(back, np.arange(total), sigmas), final)

    # Equation 12 of DDIM (arXiv 2010.02502) at eta 0 is x' = signal' z + noise' eps with eps = (x - signal z) / noise.
    # Euler's step in sigma (2206.00364, algorithm 1 without its correction) is the same line in VP coordinates, and
    # so is DPM-Solver++ of first order. 2M (2211.01095, algorithm 2) puts (1 + q) z - q z_before for z, q = 1 / (2 r).
    signal, signal_next = 1 / np.sqrt(1 + sigma**2), 1 / np.sqrt(1 + target**2)
    noise, noise_next = sigma * signal, target * signal_next
    q = np.zeros(steps)
    if scheduler == "dpmpp_2m":  # its first step has nothing to look back at, and its last ends at an infinite lambda
        h = np.log(sigma[:-1] / sigma[1:])  # each step's way in lambda = -log(sigma), the last one's left out
        q[1:-1] = h[1:] / (2 * h[:-1])
    if schedule.prediction_type == "epsilon":
        from_latent, from_output = 1 / signal, -noise / signal
    else:  # v = signal eps - noise z: 2202.00512, appendix D
        from_latent, from_output = signal, -noise
    toward_z = signal_next - noise_next * signal / noise
    pull = toward_z * (1 + q)
    columns = (noise_next / noise + pull * from_latent, pull * from_output, -toward_z * q, from_latent, from_output)
    coefficients = np.stack(columns, axis=1)
    scale = float(noise[0]) if scheduler == "euler" and spacing != "leading" else 1.0
    return Trajectory(scheduler, _frozen(timesteps), _frozen(signal), _frozen(noise), _frozen(coefficients), scale)


def _frozen(array: NDArray[Any]) -> NDArray[np.float32]:
    array = array.astype(np.float32)
    array.setflags(write=False)
    return array


def _one_of(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)


def _refusal(key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"scheduler_config.json: {key} is {value!r:.80}, expected {expected}")
