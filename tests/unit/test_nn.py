"""The torch modules against the contract, the paper's formulas and diffusers' own behaviour."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from icportrait.contract import ENGINES, engine_specs
from icportrait.diffusion.masking import hide, reference_visibility
from icportrait.diffusion.randomness import canvas_noise
from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.errors import ContractError, InvalidRequest
from icportrait.nn import Checkpoint, ReferencePipeline, WarpingNetwork, engine_modules, random_checkpoint
from icportrait.nn.control_unet import ControlUNet
from icportrait.nn.engine_modules import VaeDecoder, VaeEncoder
from icportrait.nn.geometry import unet_from_preset, vae_from_preset
from icportrait.nn.matching import best_match, cost_volume, gather_features, join_canvas, split_canvas
from icportrait.nn.random_weights import SCHEDULER_CONFIG
from icportrait.presets import DEMO_128, SD15_512, Preset
from tests.tiny import TINY

TINY_SIDE = TINY.latent_size
pytestmark = pytest.mark.usefixtures("one_thread_and_one_seed")


@pytest.fixture
def tiny() -> Checkpoint:
    return random_checkpoint(TINY)


def weightless(preset: Preset) -> Checkpoint:
    """Make a checkpoint on the meta device: shapes and types without memory or arithmetic."""
    with torch.device("meta"):
        prompt = torch.zeros(1, preset.prompt_tokens, preset.cross_attention_dim)
        network = WarpingNetwork(preset.to_dict())
        return Checkpoint(
            preset, unet_from_preset(preset), vae_from_preset(preset), network, prompt, dict(SCHEDULER_CONFIG)
        )


def dummy_arguments(preset: Preset, engine: str, batch: int, precision: str = "fp32") -> list[Tensor]:
    spec = engine_specs(preset, precision)[engine]
    dummies = spec.dummy_inputs(batch)
    return [torch.from_numpy(dummies[tensor.name]) for tensor in spec.inputs]


def run(module: nn.Module, arguments: list[Tensor]) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        outputs = module(*arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_contract(outputs: tuple[Tensor, ...], preset: Preset, engine: str, batch: int, precision: str) -> None:
    for spec, output in zip(engine_specs(preset, precision)[engine].outputs, outputs, strict=True):
        assert tuple(output.shape) == spec.shape(batch=batch), spec.name
        assert str(output.dtype) == f"torch.{spec.dtype.numpy}", spec.name


# Engines and the contract


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("preset", [DEMO_128, SD15_512], ids=lambda preset: preset.name)
def test_engine_outputs_follow_the_contract(preset: Preset, precision: str) -> None:
    modules = engine_modules(weightless(preset))
    assert tuple(modules) == ENGINES
    for engine, module in modules.items():
        module = module.half() if precision == "fp16" else module
        arguments = [tensor.to("meta") for tensor in dummy_arguments(preset, engine, 2, precision)]
        assert_contract(run(module, arguments), preset, engine, 2, precision)


@pytest.mark.parametrize("engine", ENGINES)
def test_fp16_weights_compute_what_fp32_weights_do(engine: str) -> None:
    exact = engine_modules(random_checkpoint(TINY))[engine]
    half = engine_modules(random_checkpoint(TINY))[engine].half()
    arguments = dummy_arguments(TINY, engine, 1)
    expected = run(exact, arguments)
    got = run(half, [a.half() if i > 1 and engine == "unet" else a for i, a in enumerate(arguments)])
    assert_contract(got, TINY, engine, 1, "fp16")
    # The coarsest F_ref rests on few, well separated matches; at the finest, near-ties may fall otherwise in fp16.
    index = len(TINY.residuals) - 1 if engine == "warping_network" else 0
    largest = expected[index].float().abs().max()
    assert (got[index].float() - expected[index].float()).abs().max() < 0.02 * largest


def test_vae_encoder_scales_pixels_and_the_posterior_mean(tiny: Checkpoint) -> None:
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    images = pixels.permute(0, 3, 1, 2).double() / 255 * 2 - 1
    with torch.inference_mode():
        moments = tiny.vae.quant_conv(tiny.vae.encoder(images.float()))
    expected = moments[:, : TINY.latent_channels] * TINY.vae_scaling_factor
    torch.testing.assert_close(run(VaeEncoder(tiny.vae), [pixels])[0], expected, rtol=1e-4, atol=1e-5)


class StubVae(nn.Module):
    """Encodes to ``mean`` and decodes to ``images``, and keeps what it was asked to decode."""

    def __init__(self, mean: Tensor, images: Tensor, shift_factor: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.mean, self.images = mean, images
        self.config = dataclasses.make_dataclass("Config", ["scaling_factor", "shift_factor"])(0.5, shift_factor)

    def encode(self, images: Tensor) -> Any:
        stub = type("Posterior", (), {"mode": lambda _: self.mean})
        return type("Encoded", (), {"latent_dist": stub()})

    def decode(self, latent: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.decoded = latent
        return (self.images,)


@pytest.mark.parametrize(("shift_factor", "expected"), [(None, 2.0), (1.0, 1.5)])
def test_vae_modules_undo_each_others_scaling(shift_factor: float | None, expected: float) -> None:
    vae = StubVae(torch.full((1, 4, 1, 1), 4.0), torch.zeros(1, 3, 1, 1), shift_factor)
    (latent,) = run(VaeEncoder(vae), [torch.zeros(1, 1, 1, 3, dtype=torch.uint8)])
    assert latent.unique().tolist() == [expected]
    run(VaeDecoder(vae), [latent])
    assert vae.decoded.unique().tolist() == [4.0]


def test_vae_decoder_clamps_and_rounds() -> None:
    images = torch.tensor([-2.0, -1.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    vae = StubVae(torch.zeros(1), images, None)
    (pixels,) = run(VaeDecoder(vae), [torch.zeros(1, 4, 1, 1)])
    assert pixels[0, 0, :, 1].tolist() == [0, 0, 1, 0, 255, 255]


def test_unet_rows_have_their_own_timestep_and_f_ref(tiny: Checkpoint) -> None:
    unet = engine_modules(tiny)["unet"]
    canvas, _, *f_ref = dummy_arguments(TINY, "unet", 2)
    timestep = torch.tensor([3.0, 700.0])
    (together,) = run(unet, [canvas, timestep, *f_ref])
    for row in range(2):
        rows = [tensor[row : row + 1] for tensor in (canvas, timestep, *f_ref)]
        torch.testing.assert_close(run(unet, rows)[0], together[row : row + 1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(unet, [canvas, timestep.flip(0), *f_ref])[0], together, atol=1e-2)


@pytest.mark.parametrize("residual", range(len(TINY.residuals)))
def test_every_f_ref_reaches_the_prediction(tiny: Checkpoint, residual: int) -> None:
    unet = engine_modules(tiny)["unet"]
    arguments = dummy_arguments(TINY, "unet", 1)
    before = run(unet, arguments)[0]
    arguments[2 + residual] = torch.zeros_like(arguments[2 + residual])
    assert (run(unet, arguments)[0] - before).abs().max() > 1e-3


def test_the_prompt_reaches_every_network(tiny: Checkpoint) -> None:
    other = dataclasses.replace(tiny, prompt_embedding=tiny.prompt_embedding.flip(2))
    arguments = dummy_arguments(TINY, "unet", 1)
    first, second = (run(engine_modules(checkpoint)["unet"], arguments)[0] for checkpoint in (tiny, other))
    assert (first - second).abs().max() > 1e-3

    arguments = dummy_arguments(TINY, "warping_network", 1)
    before = run(tiny.warping_network, arguments)
    tiny.warping_network.prompt_embedding.copy_(other.prompt_embedding)
    after = run(tiny.warping_network, arguments)
    assert (before[-2 - TINY.levels] - after[-2 - TINY.levels]).abs().max() > 1e-3


# Matching


def test_identical_halves_match_themselves() -> None:
    features = torch.randn(2, 8, 5, 6)
    flow, confidence = best_match(cost_volume(features, features))
    assert flow.tolist() == [list(range(30))] * 2
    torch.testing.assert_close(confidence, torch.ones(2, 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_known_permutation_is_recovered_and_undone(dtype: torch.dtype) -> None:
    source = torch.randn(2, 16, 6, 6).mul(300).to(dtype)  # in half precision the squared norm would overflow
    permutation = torch.stack([torch.randperm(36) for _ in range(2)])
    target = torch.stack([row[:, order] for row, order in zip(source.flatten(2), permutation, strict=True)])
    target = target.view_as(source) * 2  # lengths don't count
    costs = cost_volume(source, target)
    assert costs.dtype == torch.float32
    flow, confidence = best_match(costs)
    assert torch.equal(flow, permutation)
    torch.testing.assert_close(confidence, torch.ones(2, 36))
    assert torch.equal(gather_features(source, flow) * 2, target)


def test_costs_are_cosines_of_target_by_source() -> None:
    source, target = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    costs = cost_volume(source, target)
    first, second = target[0, :, 0, 1], source[0, :, 1, 0]
    torch.testing.assert_close(costs[0, 1, 2], first @ second / first.norm() / second.norm())


def test_the_left_half_is_the_source() -> None:
    canvas = torch.arange(12.0).view(1, 1, 2, 6)
    source, target = split_canvas(canvas)
    assert source.flatten().tolist() == [0, 1, 2, 6, 7, 8]
    assert target.flatten().tolist() == [3, 4, 5, 9, 10, 11]
    assert torch.equal(join_canvas(source, target), canvas)


@pytest.mark.parametrize("shift", [0, 8])
def test_the_network_finds_where_the_profile_moved(shift: int) -> None:
    network = random_checkpoint(DEMO_128).warping_network
    side = DEMO_128.latent_size
    profile = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
    visible = torch.ones(1, 1, side, side)
    outputs = run(network, [profile, profile.roll((shift, shift), (2, 3)), visible])
    flows = outputs[len(DEMO_128.residuals) : -1]
    assert len(flows) == DEMO_128.levels
    for level, flow in enumerate(flows):
        size = DEMO_128.level_size(level)
        expected = torch.arange(size * size).view(size, size).roll((shift >> level, shift >> level), (0, 1))
        # Untrained features see the canvas's borders and its middle, coarse levels above all. Chance is 1 in 16 there.
        assert (flow[0] == expected).float().mean() > (0.9 if shift == 0 else 0.3)
    assert outputs[-1] > (0.9 if shift == 0 else 0.8)


# The warping network


def test_control_unet_gives_the_unets_own_skip_features() -> None:
    unet = random_checkpoint(TINY).unet
    control = ControlUNet(TINY)
    control.copy_encoder(unet)
    prompt = torch.randn(1, TINY.prompt_tokens, TINY.cross_attention_dim)
    latent = torch.randn(2, 4, TINY_SIDE, 2 * TINY_SIDE)
    canvas = torch.cat((latent, torch.rand(2, 1, TINY_SIDE, 2 * TINY_SIDE)), dim=1)
    expected: list[Tensor] = []
    unet.conv_in.register_forward_hook(lambda _module, _inputs, output: expected.append(output))
    for block in unet.down_blocks:
        block.register_forward_hook(lambda _module, _inputs, output: expected.extend(output[1]))
    unet.mid_block.register_forward_hook(lambda _module, _inputs, output: expected.append(output))
    with torch.inference_mode():
        unet(latent, 0, prompt.expand(2, -1, -1))
        features = control(canvas, prompt)
    assert [tuple(feature.shape[1:3]) for feature in features] == [
        (residual.channels, TINY.level_size(residual.level)) for residual in TINY.residuals
    ]
    for feature, own in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("net", ["matching_net", "appearance_net"])
def test_both_nets_see_the_canvas_and_its_visibility(tiny: Checkpoint, net: str) -> None:
    seen: list[Tensor] = []
    conv_in = getattr(tiny.warping_network, net).conv_in
    conv_in.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    profile, reference, _ = dummy_arguments(TINY, "warping_network", 1)
    visibility = (torch.rand(1, 1, TINY_SIDE, TINY_SIDE) > 0.5).float()
    run(tiny.warping_network, [profile, reference, visibility])
    left, right = split_canvas(seen[0])
    assert torch.equal(left, torch.cat((profile, torch.ones_like(visibility)), dim=1))
    assert torch.equal(right, torch.cat((reference, visibility), dim=1))


def test_each_resolution_is_matched_at_its_last_residual(tiny: Checkpoint) -> None:
    assert WarpingNetwork(DEMO_128.to_dict()).matching_residuals == [2, 5, 8, 12]
    features: list[list[Tensor]] = []
    network = tiny.warping_network
    network.matching_head.register_forward_hook(lambda _module, _inputs, output: features.append(output))
    outputs = run(network, dummy_arguments(TINY, "warping_network", 2))
    flows, confidence = outputs[-1 - TINY.levels : -1], outputs[-1]
    for level, halves in enumerate(features[0]):
        flow, best = best_match(cost_volume(*halves))
        assert torch.equal(flows[level].flatten(1).long(), flow)
        if level == 0:
            torch.testing.assert_close(confidence, best.mean(dim=1))


def test_inject_warps_the_source_onto_the_target(tiny: Checkpoint) -> None:
    network = tiny.warping_network
    for conv in network.zero_convs:
        nn.init.dirac_(conv.weight)
    sizes = [TINY.level_size(residual.level) for residual in TINY.residuals]
    appearance = [torch.randn(2, r.channels, s, 2 * s) for r, s in zip(TINY.residuals, sizes, strict=True)]
    flows = [torch.randint(0, size * size, (2, size * size)) for size in (TINY_SIDE, TINY_SIDE // 2)]
    with torch.inference_mode():
        f_ref = network.inject(appearance, flows)
    for residual, features, output in zip(TINY.residuals, appearance, f_ref, strict=True):
        source, target = split_canvas(features)
        flow = flows[residual.level]
        warped = torch.stack([rows[:, order] for rows, order in zip(source.flatten(2), flow, strict=True)])
        expected = join_canvas(source, warped.view_as(source) + target)
        torch.testing.assert_close(output, expected)


def test_zero_convolutions_start_at_zero() -> None:
    outputs = run(WarpingNetwork(TINY.to_dict()), dummy_arguments(TINY, "warping_network", 1))
    assert all(not output.any() for output in outputs[: len(TINY.residuals)])


def test_the_visibility_channel_starts_at_zero() -> None:
    network = WarpingNetwork(TINY.to_dict())
    for net in (network.matching_net, network.appearance_net):
        assert not net.conv_in.weight[:, -1].any()
        assert net.conv_in.weight[:, :-1].any()


def test_random_weights_use_the_visibility(tiny: Checkpoint) -> None:
    profile, reference, _ = dummy_arguments(TINY, "warping_network", 1)
    hidden, shown = torch.zeros(1, 1, TINY_SIDE, TINY_SIDE), torch.ones(1, 1, TINY_SIDE, TINY_SIDE)
    first, second = (run(tiny.warping_network, [profile, reference, visible]) for visible in (hidden, shown))
    assert (first[0] - second[0]).abs().max() > 0.1


# The reference pipeline


def picture(seed: int, side: int = TINY.image_size) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return coarse.repeat(side // 4, axis=0).repeat(side // 4, axis=1)


PROFILE, REFERENCE = picture(1), picture(2)


def portraits(checkpoint: Checkpoint, profile: np.ndarray = PROFILE, reference: np.ndarray = REFERENCE, **options: Any):
    arguments = {"seed": 7, "num_inference_steps": 3} | options
    return ReferencePipeline.of(checkpoint)(profile, reference, **arguments)


def difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(float) - second).mean())


def record_unet_calls(checkpoint: Checkpoint) -> list[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
    """Record every later call's canvas, timestep and ``F_ref`` that enters the checkpoint's UNet."""
    calls: list[tuple[Tensor, Tensor, tuple[Tensor, ...]]] = []

    def record(_module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        f_ref = (*options["down_block_additional_residuals"], options["mid_block_additional_residual"])
        calls.append((inputs[0].clone(), inputs[1].clone(), f_ref))

    checkpoint.unet.register_forward_pre_hook(record, with_kwargs=True)
    return calls


def test_the_same_request_gives_the_same_bytes(tiny: Checkpoint) -> None:
    first, second = portraits(tiny, num_portraits=2), portraits(random_checkpoint(TINY), num_portraits=2)
    assert first.portraits.shape == (2, 32, 32, 3) and first.portraits.dtype == np.uint8
    assert first.latents.shape == (2, 4, TINY_SIDE, TINY_SIDE)
    assert first.flow.shape == (TINY_SIDE, TINY_SIDE) and first.flow.dtype == np.int32
    assert 0 < first.match_confidence <= 1
    assert first.portraits.tobytes() == second.portraits.tobytes()
    assert first.latents.tobytes() == second.latents.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"profile": picture(3)},
        {"reference": picture(4)},
        {"mask_ratio": 0.3},
        {"guidance_scale": 3.0},
        {"scheduler": "ddim"},
        {"num_inference_steps": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_a_request_changes_shows_in_the_picture(tiny: Checkpoint, change: dict[str, Any]) -> None:
    assert difference(portraits(tiny).portraits, portraits(tiny, **change).portraits) > 1


def test_f_ref_shows_in_the_picture(tiny: Checkpoint) -> None:
    before = portraits(tiny).portraits
    for conv in tiny.warping_network.zero_convs:
        nn.init.zeros_(conv.weight)
    without = portraits(tiny).portraits
    assert difference(before, without) > 1
    # The reference reaches the picture through F_ref alone; the profile is on the canvas as well.
    assert np.array_equal(portraits(tiny, reference=picture(4)).portraits, without)
    assert difference(portraits(tiny, profile=picture(3)).portraits, without) > 0.1


def test_pictures_of_the_demo_preset_are_neither_flat_nor_saturated() -> None:
    profile, reference = picture(1, DEMO_128.image_size), picture(2, DEMO_128.image_size)
    result = portraits(random_checkpoint(DEMO_128), profile, reference, num_inference_steps=12)
    assert np.isfinite(result.latents).all()
    assert 30 < result.portraits.std() < 100
    assert np.isin(result.portraits, (0, 255)).mean() < 0.4


def test_without_guidance_each_step_runs_one_row(tiny: Checkpoint) -> None:
    calls = record_unet_calls(tiny)
    portraits(tiny, num_portraits=2)
    assert sum(canvas.shape[0] for canvas, _, _ in calls) == 2 * 3
    assert all(residual.any() for _, _, f_ref in calls for residual in f_ref)


def test_guidance_runs_an_unconditional_row_of_the_same_canvas(tiny: Checkpoint) -> None:
    calls = record_unet_calls(tiny)
    guided = portraits(tiny, guidance_scale=2.5)
    assert len(calls) == 2 * 3
    for conditional, unconditional in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(conditional[0], unconditional[0])
        assert torch.equal(conditional[1], unconditional[1])
        assert all(residual.any() for residual in conditional[2])
        assert not any(residual.any() for residual in unconditional[2])
    by_default = portraits(dataclasses.replace(tiny, guidance_scale=2.5))
    assert np.array_equal(by_default.portraits, guided.portraits)


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler"])
def test_the_left_half_is_held_at_every_step(tiny: Checkpoint, scheduler: str) -> None:
    calls = record_unet_calls(tiny)
    portraits(tiny, scheduler=scheduler, num_portraits=2)
    trajectory = NoiseSchedule.from_config(tiny.scheduler_config).trajectory(scheduler, 3)
    profile = run(VaeEncoder(tiny.vae), [torch.from_numpy(PROFILE)[None]])[0]
    for call, (canvas, timestep, _) in enumerate(calls):
        portrait, step = divmod(call, 3)
        left_noise, right_noise = split_canvas(torch.from_numpy(canvas_noise(TINY, 7 + portrait))[None])
        left, right = split_canvas(canvas)
        held = float(trajectory.signal_level[step]) * profile + float(trajectory.noise_level[step]) * left_noise
        torch.testing.assert_close(left, held, rtol=1e-4, atol=1e-5)
        assert timestep.tolist() == [trajectory.timesteps[step]]
        if step == 0:
            torch.testing.assert_close(right, trajectory.initial_scale * right_noise)


def test_the_samplers_updates_are_followed(tiny: Checkpoint) -> None:
    """Let the UNet find the noise of a fixed latent exactly. The canvas is then led there in a straight line."""
    tiny = dataclasses.replace(tiny, scheduler_config=tiny.scheduler_config | {"prediction_type": "epsilon"})
    calls = record_unet_calls(tiny)
    goal = torch.randn(1, 4, TINY_SIDE, 2 * TINY_SIDE)
    trajectory = NoiseSchedule.from_config(tiny.scheduler_config).trajectory("dpmpp_2m", 4)
    levels = list(zip(trajectory.signal_level.tolist(), trajectory.noise_level.tolist(), strict=True))

    def exact_noise(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Any) -> tuple[Tensor]:
        signal, noise = levels[trajectory.timesteps.tolist().index(inputs[1].item())]
        return ((inputs[0] - signal * goal) / noise,)

    tiny.unet.register_forward_hook(exact_noise)
    result = portraits(tiny, num_inference_steps=4)

    portrait = split_canvas(goal)[1]
    _, start = split_canvas(calls[0][0])
    direction = (start - levels[0][0] * portrait) / levels[0][1]
    for (canvas, _, _), (signal, noise) in zip(calls, levels, strict=True):
        torch.testing.assert_close(split_canvas(canvas)[1], signal * portrait + noise * direction, rtol=0, atol=1e-3)
    np.testing.assert_allclose(result.latents, portrait.numpy(), atol=1e-3)
    decoded = run(VaeDecoder(tiny.vae), [torch.from_numpy(result.latents)])[0]
    assert np.array_equal(result.portraits, decoded.numpy())


def test_what_is_hidden_comes_from_the_requests_seed(tiny: Checkpoint) -> None:
    result = portraits(tiny, num_portraits=2)
    visibility = reference_visibility(TINY, 0.8, 7)
    assert np.array_equal(result.visible_pixels, hide(REFERENCE, visibility))
    # Hidden pixels can't be told from the picture, however many portraits there are.
    changed = np.where(result.visible_pixels == 128, REFERENCE[::-1], REFERENCE)
    assert not np.array_equal(changed, REFERENCE)
    assert np.array_equal(portraits(tiny, reference=changed, num_portraits=2).portraits, result.portraits)


def test_portrait_i_draws_the_noise_of_seed_plus_i(tiny: Checkpoint) -> None:
    several = portraits(tiny, num_portraits=2, mask_ratio=0.0)
    second = portraits(tiny, seed=8, mask_ratio=0.0)
    assert np.array_equal(several.portraits[1], second.portraits[0])
    assert not np.array_equal(several.portraits[0], several.portraits[1])


@pytest.mark.parametrize("position", ["profile", "reference"])
@pytest.mark.parametrize("pixels", [PROFILE[:16], PROFILE.astype(np.float32), PROFILE[..., 0]])
def test_other_pictures_are_refused(tiny: Checkpoint, position: str, pixels: np.ndarray) -> None:
    with pytest.raises(ContractError, match="pixels"):
        portraits(tiny, **{position: pixels})


def test_unknown_schedulers_are_refused(tiny: Checkpoint) -> None:
    with pytest.raises(InvalidRequest, match="scheduler"):
        portraits(tiny, scheduler="heun")
