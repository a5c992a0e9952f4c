"""``icportrait.diffusion.sampling`` against diffusers' own schedulers, and what in-flight batching asks of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

from icportrait.diffusion import sampling
from icportrait.diffusion.sampling import NoiseSchedule, Trajectory, advance, foreign_sampler, guide
from icportrait.errors import CheckpointError, InvalidRequest
from icportrait.request import SCHEDULERS

REFERENCE = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
SPACINGS = (None, "leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction")
SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SHAPE = (2, 4, 5, 9)


def make_config(spacing: str | None = None, **changes: Any) -> dict[str, Any]:
    return {**SD15, **changes, **({"timestep_spacing": spacing} if spacing else {})}


def make_noise(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stand_in_unet(latent: torch.Tensor, timestep: float) -> torch.Tensor:
    """Return numbers that are bounded, nonlinear, different at every timestep, and couple neighbouring columns."""
    return torch.tanh(1.3 * latent + np.cos(timestep / 40)) + 0.3 * torch.sin(2 * latent.roll(1, -1))


def rows_of(trajectory: Trajectory, step: int, rows: int = SHAPE[0]) -> torch.Tensor:
    return torch.from_numpy(np.repeat(trajectory.coefficients[step : step + 1], rows, axis=0))


def sample(trajectory: Trajectory, noise: torch.Tensor) -> torch.Tensor:
    latent, history = trajectory.initial_scale * noise, torch.zeros_like(noise)
    for step, timestep in enumerate(trajectory.timesteps):
        latent, history = advance(latent, stand_in_unet(latent, float(timestep)), history, rows_of(trajectory, step))
    return latent


def sample_with_diffusers(name: str, config: dict[str, Any], steps: int, noise: torch.Tensor) -> torch.Tensor:
    scheduler = REFERENCE[name].from_config(config)
    scheduler.set_timesteps(steps)
    latent = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        model_output = stand_in_unet(scheduler.scale_model_input(latent, timestep), float(timestep))
        latent = scheduler.step(model_output, timestep, latent).prev_sample
    return latent


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("steps", [2, 20])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_step_is_diffusers_step(name: str, prediction: str, spacing: str | None, steps: int) -> None:
    """Start every step of a trajectory from the same input, so that errors can't hide behind or feed on each other."""
    config = make_config(spacing, prediction_type=prediction)
    trajectory = NoiseSchedule.from_config(config).trajectory(name, steps)
    scheduler = REFERENCE[name].from_config(config)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(trajectory.timesteps, scheduler.timesteps.numpy().astype(np.float32))
    history = torch.zeros(SHAPE)
    for step, timestep in enumerate(scheduler.timesteps):
        z, noise, mistake = make_noise(step, (3, *SHAPE))
        signal, level = float(trajectory.signal_level[step]), float(trajectory.noise_level[step])
        latent = signal * z + level * noise
        truth = noise if prediction == "epsilon" else signal * noise - level * z
        model_output = truth + 0.1 * mistake
        theirs = latent / signal if name == "euler" else latent
        scheduler.scale_model_input(theirs, timestep)
        expected = scheduler.step(model_output, timestep, theirs).prev_sample
        if name == "euler" and step + 1 < steps:
            expected = expected * float(trajectory.signal_level[step + 1])
        found, history = advance(latent, model_output, history, rows_of(trajectory, step))
        assert relative_error(found, expected) < 1e-5, f"step {step}"


@pytest.mark.parametrize("steps", [1, 2, 10, 14, 15, 20, 50, 150])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_closed_loop_is_diffusers_loop(name: str, prediction: str, spacing: str | None, steps: int) -> None:
    config = make_config(spacing, prediction_type=prediction)
    expected = sample_with_diffusers(name, config, steps, make_noise())
    found = sample(NoiseSchedule.from_config(config).trajectory(name, steps), make_noise())
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.001 + 0.00001 * index for index in range(1000)]},
        {"num_train_timesteps": 400},
        {"steps_offset": 0},
        {"steps_offset": 3},
        {"set_alpha_to_one": True},
    ],
    ids=lambda changes: str(changes)[:60],
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_a_config_says_about_the_noise_is_heeded(name: str, changes: dict[str, Any]) -> None:
    # Leading spacing keeps clear of the cosine schedule's last timesteps: diffusers' Euler latents reach 2e4 there and
    # lose three digits in float32.
    config = make_config("leading", **changes)
    expected = sample_with_diffusers(name, config, 20, make_noise())
    found = sample(NoiseSchedule.from_config(config).trajectory(name, 20), make_noise())
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_of_every_training_timestep_is_diffusers(beta_schedule: str) -> None:
    config = make_config(beta_schedule=beta_schedule)
    expected = DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_allclose(NoiseSchedule.from_config(config).alphas_cumprod, expected, rtol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_count_has_a_plan(name: str, spacing: str | None) -> None:
    schedule = NoiseSchedule.from_config(make_config(spacing))
    scheduler = REFERENCE[name].from_config(make_config(spacing))
    for steps in range(1, 151):
        trajectory = schedule.trajectory(name, steps)
        scheduler.set_timesteps(steps)
        # For some counts diffusers' trailing spacing has one timestep more, -1.
        np.testing.assert_array_equal(trajectory.timesteps, scheduler.timesteps.numpy().astype(np.float32)[:steps])
        assert trajectory.coefficients.shape == (steps, 5)
        assert np.isfinite(trajectory.coefficients).all()
        np.testing.assert_allclose(trajectory.signal_level**2 + trajectory.noise_level**2, np.ones(steps), atol=3e-7)
        assert all(
            array.dtype == np.float32
            for array in (trajectory.timesteps, trajectory.signal_level, trajectory.coefficients)
        )


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_held_half_gets_the_noise_diffusers_adds(name: str, spacing: str | None) -> None:
    trajectory = NoiseSchedule.from_config(make_config(spacing)).trajectory(name, 12)
    scheduler = REFERENCE[name].from_config(make_config(spacing))
    scheduler.set_timesteps(12)
    z, noise = make_noise(1, (12, 3)), make_noise(2, (12, 3))
    expected = scheduler.add_noise(z, noise, scheduler.timesteps)
    signal, level = torch.tensor(trajectory.signal_level)[:, None], torch.tensor(trajectory.noise_level)[:, None]
    found = signal * z + level * noise
    torch.testing.assert_close(found, signal * expected if name == "euler" else expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_unet_leads_to_the_portrait(name: str, prediction: str) -> None:
    trajectory = NoiseSchedule.from_config(make_config(prediction_type=prediction, set_alpha_to_one=True)).trajectory(
        name, 10
    )
    z = make_noise(5).numpy()
    latent, history = trajectory.initial_scale * make_noise(6).numpy(), np.zeros(SHAPE, np.float32)
    for step in range(10):
        signal, level = trajectory.signal_level[step], trajectory.noise_level[step]
        noise = (latent - signal * z) / level
        model_output = noise if prediction == "epsilon" else signal * noise - level * z
        latent, history = advance(latent, model_output, history, rows_of(trajectory, step).numpy())
    np.testing.assert_allclose(latent, z, atol=1e-4)


def test_looking_back_pays() -> None:
    """Use data that are normal with deviation 0.5, because their exact trajectory keeps latent / deviation constant."""
    errors = {}
    for name in SCHEDULERS:
        trajectory = NoiseSchedule.from_config(make_config("trailing", set_alpha_to_one=True)).trajectory(name, 40)
        variance = trajectory.signal_level**2 * 0.25 + trajectory.noise_level**2
        latent, history = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
        for step in range(40):
            model_output = latent * trajectory.noise_level[step] / variance[step]
            latent, history = advance(latent, model_output, history, trajectory.coefficients[step : step + 1])
        errors[name] = abs(float(latent[0, 0]) * np.sqrt(variance[0]) / 0.5 - 1)
    assert errors["dpmpp_2m"] < 0.6 * min(errors["ddim"], errors["euler"])


def mixed_rows() -> tuple[np.ndarray, np.ndarray]:
    """Return rows of every sampler at different steps of different schedules, and latent, model output and history."""
    epsilon = NoiseSchedule.from_config(SD15)
    velocity = NoiseSchedule.from_config(make_config("trailing", prediction_type="v_prediction"))
    choices = [(epsilon, "ddim", 20, 3), (velocity, "euler", 10, 0), (epsilon, "dpmpp_2m", 15, 7)]
    choices += [(velocity, "dpmpp_2m", 4, 3), (epsilon, "euler", 50, 49), (velocity, "ddim", 1, 0)]
    coefficients = np.stack(
        [schedule.trajectory(name, steps).coefficients[step] for schedule, name, steps, step in choices]
    )
    return coefficients, make_noise(3, (3, len(choices), 4, 7, 13)).numpy()


@pytest.mark.parametrize("as_kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_a_row_does_not_depend_on_its_neighbours(as_kind: Any) -> None:
    coefficients, tensors = mixed_rows()
    latent, history = advance(*(as_kind(tensor) for tensor in tensors), as_kind(coefficients))
    assert latent.dtype == history.dtype == as_kind(coefficients).dtype
    for row in range(len(coefficients)):
        one = slice(row, row + 1)
        alone = advance(*(as_kind(tensor[one].copy()) for tensor in tensors), as_kind(coefficients[one].copy()))
        assert bytes(np.asarray(latent[one])) == bytes(np.asarray(alone[0]))
        assert bytes(np.asarray(history[one])) == bytes(np.asarray(alone[1]))


def test_numpy_and_torch_give_the_same_bits() -> None:
    coefficients, tensors = mixed_rows()
    ours = advance(*tensors, coefficients)
    theirs = advance(*(torch.from_numpy(tensor) for tensor in tensors), torch.from_numpy(coefficients))
    for ndarray, tensor in zip(ours, theirs, strict=True):
        assert ndarray.dtype == np.float32
        assert bytes(ndarray) == bytes(tensor.numpy())


@pytest.mark.parametrize("as_kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_guidance(as_kind: Any) -> None:
    conditional, unconditional = (make_noise(seed, (3, 4, 7)).numpy() for seed in (1, 2))
    scales = np.array([1, 0, 7.5], np.float32)
    guided = guide(as_kind(conditional), as_kind(unconditional), as_kind(scales))
    assert guided.dtype == as_kind(scales).dtype
    expected = unconditional + scales[:, None, None] * (conditional - unconditional)
    np.testing.assert_allclose(np.asarray(guided), expected, atol=1e-5)
    assert bytes(np.asarray(guided[0])) == bytes(conditional[0])
    one = guide(as_kind(conditional), as_kind(unconditional), 7.5)
    assert bytes(np.asarray(one[2])) == bytes(np.asarray(guided[2]))


def test_equal_requests_share_a_plan_that_nobody_can_change() -> None:
    trajectory = NoiseSchedule.from_config(SD15).trajectory("ddim", 20)
    assert NoiseSchedule.from_config(dict(SD15)).trajectory("ddim", 20) is trajectory
    assert NoiseSchedule.from_config(make_config(set_alpha_to_one=True)).trajectory("ddim", 20) is not trajectory
    with pytest.raises(ValueError, match="read-only"):
        trajectory.coefficients[0, 0] = 0


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("heun", 20, "scheduler: 'heun' is unknown, expected 'ddim' or 'euler' or 'dpmpp_2m'"),
        ("ddim", 0, "num_inference_steps: 0 steps of ddim"),
        ("ddim", 1000, "num_inference_steps: 1000 steps of ddim"),
        ("euler", -3, "num_inference_steps: -3 steps"),
        ("euler", 1001, "1001 steps of euler don't fit the checkpoint's 1000 training timesteps"),
        ("dpmpp_2m", 1000, "num_inference_steps: 1000 steps of dpmpp_2m"),
    ],
)
def test_impossible_plans_are_the_callers_mistake(name: str, steps: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        NoiseSchedule.from_config(SD15).trajectory(name, steps)


@pytest.mark.parametrize("writer", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("live", [False, True], ids=["file", "live"])
def test_configs_of_every_known_class_are_read(writer: Any, live: bool) -> None:
    """Read files, which name every key, and a live ``scheduler.config``, which also says which keys nobody set."""
    written = writer(beta_start=0.00085, beta_end=0.012, **({"clip_sample": False} if writer is DDIMScheduler else {}))
    config = dict(written.config) if live else json.loads(written.to_json_string())
    assert ("_use_default_values" in config) is live
    schedule = NoiseSchedule.from_config(config)
    for name in SCHEDULERS:
        expected = sample_with_diffusers(name, {**config, "clip_sample": False}, 7, make_noise())
        assert relative_error(sample(schedule.trajectory(name, 7), make_noise()), expected) < 1e-4


def test_clip_sample_may_be_absent_where_its_writer_never_clips() -> None:
    config = {key: value for key, value in SD15.items() if key != "clip_sample"}
    assert NoiseSchedule.from_config(config) == NoiseSchedule.from_config(SD15)
    with pytest.raises(CheckpointError, match="clip_sample is True, expected False"):
        NoiseSchedule.from_config({**config, "_class_name": "DDIMScheduler"})


@pytest.mark.parametrize("writer", sampling._FOREIGN)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_another_samplers_file_says_what_noise_the_model_knows(writer: str, spacing: str) -> None:
    """Read a file as diffusers writes it for each of them, with all that is its own."""
    ours = {**SD15, "timestep_spacing": spacing, "clip_sample": False}
    if writer == "LMSDiscreteScheduler":  # needs scipy, to be made
        written = {**ours, "_class_name": writer}
    else:
        written = json.loads(getattr(diffusers, writer).from_config(ours).to_json_string())
    assert written["_class_name"] == writer
    assert NoiseSchedule.from_config(written) == NoiseSchedule.from_config(ours)
    assert (foreign_sampler(written), foreign_sampler(ours)) == (writer, None)
    with pytest.raises(CheckpointError, match="use_karras_sigmas is True, expected False or None; with that"):
        NoiseSchedule.from_config({**written, "use_karras_sigmas": True})
    with pytest.raises(CheckpointError, match="prediction_type is 'sample'"):
        NoiseSchedule.from_config({**written, "prediction_type": "sample"})


def test_where_a_file_of_a_clipping_sampler_does_not_say_it_does() -> None:
    config = {key: value for key, value in SD15.items() if key != "clip_sample"}
    with pytest.raises(CheckpointError, match="DDPMScheduler clips where the key is absent"):
        NoiseSchedule.from_config({**config, "_class_name": "DDPMScheduler"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("algorithm_type", "sde-dpmsolver++"),
        ("beta_end", 1.5),
        ("beta_schedule", "sigmoid"),
        ("beta_start", "0.1"),
        ("clip_sample", True),
        ("_use_default_values", True),
        ("final_sigmas_type", "sigma_min"),
        ("interpolation_type", "log_linear"),
        ("lambda_min_clipped", -5.1),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 10**12),
        ("prediction_type", "sample"),
        ("rescale_betas_zero_snr", True),
        ("set_alpha_to_one", None),
        ("solver_order", 3),
        ("solver_type", "heun"),
        ("steps_offset", 1000),
        ("thresholding", True),
        ("timestep_spacing", "karras"),
        ("timestep_type", "continuous"),
        ("trained_betas", [0.5, 0.5]),
        ("trained_betas", 0.5),
        ("use_beta_sigmas", True),
        ("use_dynamic_shifting", True),
        ("use_exponential_sigmas", True),
        ("use_flow_sigmas", True),
        ("use_karras_sigmas", True),
        ("use_lu_lambdas", True),
        ("variance_type", "learned_range"),
    ],
)
def test_what_would_change_pictures_is_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as refusal:
        NoiseSchedule.from_config({**SD15, key: value})
    text = str(refusal.value)
    assert text.startswith(f"scheduler_config.json: {key} is {value!r}, expected "), text


def test_what_changes_nothing_is_ignored() -> None:
    extra = {"skip_prk_steps": False, "clip_sample_range": 2.0, "sigma_min": None, "_diffusers_version": "0.6.0"}
    off = {"use_karras_sigmas": None, "thresholding": False, "lower_order_final": False, "euler_at_final": True}
    assert NoiseSchedule.from_config({**SD15, **extra, **off}) == NoiseSchedule.from_config(SD15)


def test_serving_needs_neither_torch_nor_diffusers() -> None:
    check = "import sys, icportrait.diffusion.sampling; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_right_prediction_leaves_the_clean_latent_in_the_history(name: str, prediction_type: str) -> None:
    """Check the history's latent, because a preview shows it."""
    trajectory = NoiseSchedule.from_config(SD15 | {"prediction_type": prediction_type}).trajectory(name, 12)
    clean, noise = make_noise(8, (2, 1, 4, 3, 5)).numpy()
    for step in (0, 5, 11):
        signal, noise_level = trajectory.signal_level[step], trajectory.noise_level[step]
        latent = signal * clean + noise_level * noise
        right = noise if prediction_type == "epsilon" else signal * noise - noise_level * clean
        _, history = advance(latent, right, np.zeros_like(latent), trajectory.coefficients[step : step + 1])
        np.testing.assert_allclose(history, clean, atol=2e-4)
