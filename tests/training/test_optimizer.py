"""The optimizer and its learning rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.optimizer import Muon, RecipeOptimizer, orthogonalised
from training.recipe import MatchingRecipe

RATE = 0.5


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    return model.to(memory_format=torch.channels_last)


def recipe(**settings: object) -> MatchingRecipe:
    return MatchingRecipe(**{"learning_rate": RATE, "warmup_steps": 0, "weight_decay": 0.0, **settings})  # type: ignore[arg-type]


def moved(model: nn.Sequential, optimizer: RecipeOptimizer) -> list[torch.Tensor]:
    """Return how far one step moves each parameter."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.arange(27.0).sin().view(1, 3, 3, 3)).square().sum().backward()
    optimizer.step()
    return [parameter.detach() - old for parameter, old in zip(model.parameters(), before, strict=True)]


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = RecipeOptimizer(model.parameters(), recipe(steps=12, warmup_steps=4))
    steps = []
    for _ in range(13):
        before = model.weight.item()
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        steps.append(before - model.weight.item())
    assert steps[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5], rel=1e-3)
    assert steps[4:] == sorted(steps[4:], reverse=True)
    assert steps[8] == pytest.approx(0.25, rel=1e-3) and steps[12] == pytest.approx(0, abs=1e-6)


def test_muon_moves_convolutions_as_matrices_and_adamw_the_rest() -> None:
    model, plain = layers(), layers()
    moved_by_muon = moved(model, RecipeOptimizer(model.parameters(), recipe(optimizer="muon")))
    moved_by_adamw = moved(plain, RecipeOptimizer(plain.parameters(), recipe()))
    reference = layers()
    reference(torch.arange(27.0).sin().view(1, 3, 3, 3)).square().sum().backward()
    for index in (0, 2):
        weight = list(reference.parameters())[index]
        matrix = nn.Parameter(weight.detach().flatten(1))
        matrix.grad = weight.grad.flatten(1)
        start = matrix.detach().clone()
        Muon([matrix], RATE, weight_decay=0).step()
        expected = (matrix.detach() - start).view_as(weight)
        torch.testing.assert_close(moved_by_muon[index], expected, rtol=0, atol=0.02 * expected.abs().max().item())
        assert not torch.allclose(moved_by_adamw[index], expected, rtol=0, atol=0.2 * expected.abs().max().item())
    for index in (1, 3):
        torch.testing.assert_close(moved_by_muon[index], moved_by_adamw[index])


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_muon_orthogonalises_as_torch_does(shape: tuple[int, int]) -> None:
    """Compare steps with momentum and decay, but for the rounding of torch's bfloat16, whatever else is trained."""
    torch.manual_seed(1)
    starts = [torch.randn(shape), torch.randn(4, 3), torch.randn(shape)]
    ours, torchs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = (
        Muon(ours, 0.02, weight_decay=0.1),
        torch.optim.Muon(torchs, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        gradients = [torch.randn_like(start) for start in starts]
        for weights, optimizer in zip((ours, torchs), optimizers, strict=True):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for our, torch_s, start in zip(ours, torchs, starts, strict=True):
        moved = (torch_s - start).detach()
        torch.testing.assert_close((our - start).detach(), moved, rtol=0, atol=0.03 * moved.abs().max().item())
    singular = torch.linalg.svdvals(orthogonalised(torch.randn(3, *shape)))
    assert singular.min() > 0.5 and singular.max() < 1.3


def test_adamw_moves_every_number_alike_at_first() -> None:
    model = layers()
    moves = moved(model, RecipeOptimizer(model.parameters(), recipe()))
    numbers = torch.cat([move.flatten() for move in moves]).abs()
    assert numbers[numbers > 0].tolist() == pytest.approx([RATE] * int((numbers > 0).sum()), rel=1e-2)


def test_gradients_are_forgotten_after_a_step() -> None:
    model = layers()
    optimizer = RecipeOptimizer(model.parameters(), recipe(optimizer="muon"))
    moved(model, optimizer)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_weight_that_is_not_channels_last_is_refused() -> None:
    with pytest.raises(RuntimeError, match="view"):
        RecipeOptimizer(nn.Conv2d(3, 8, 3).parameters(), recipe(optimizer="muon"))
