"""The optimizers, which turn gradients into steps: AdamW, or Muon for everything that is a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from training.recipe import Recipe

MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic (Jordan et al., "Muon", 2024), as ``torch.optim.Muon`` has them."""


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` with steps of AdamW's size, in the weights' own type.

    torch's works in bfloat16, which a CPU without instructions for it emulates: there it took half of a training step.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # Together where they are alike: a GPU is done with one before the next is launched.
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append((matrix, matrix.grad))
            for shape, alike in by_shape.items():
                matrices, gradients = (list(tensors) for tensors in zip(*alike, strict=True))
                momenta = [self.state[matrix].setdefault("momentum", torch.zeros_like(matrix)) for matrix in matrices]
                torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
                directions = orthogonalised(torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM)))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, directions.unbind(), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonalised(matrices: Tensor) -> Tensor:
    """Move the singular values of matrices ``[N, rows, columns]`` near to 1 by Newton-Schulz iterations."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    result = matrices.mT if tall else matrices
    result = result / result.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = result @ result.mT
        result = torch.baddbmm(result, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.mT if tall else result


class RecipeOptimizer:
    """The recipe's optimizer and its falling learning rate.

    Muon (arXiv 2502.16982) orthogonalises each matrix's step; a convolution is the matrix of its output channels by all
    that they look at. Biases and norms stay with AdamW at the same learning rate.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], recipe: Recipe) -> None:
        """Take parameters whose convolutions are in channels-last layout: Muon's matrices are views of them."""
        parameters = list(parameters)
        self._weights = [weight for weight in parameters if recipe.optimizer == "muon" and weight.ndim >= 2]
        self._matrices = [
            nn.Parameter(_channels_last(weight.detach()).view(len(weight), -1)) for weight in self._weights
        ]
        muon = {id(weight) for weight in self._weights}
        rest = [parameter for parameter in parameters if id(parameter) not in muon]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
        ]
        if self._matrices:
            self._optimizers.append(Muon(self._matrices, recipe.learning_rate, recipe.weight_decay))
        self._schedules = [LambdaLR(optimizer, lambda step: _rate(step, recipe)) for optimizer in self._optimizers]

    def step(self) -> None:
        """Move the parameters by their gradients, and forget these."""
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.grad = None if weight.grad is None else _channels_last(weight.grad).flatten(1)
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        for weight in self._weights:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "schedules": [schedule.state_dict() for schedule in self._schedules],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for schedule, saved in zip(self._schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)


def _channels_last(weight: Tensor) -> Tensor:
    """Return a linear layer's or a convolution's weight with the input channels last."""
    return weight.permute(0, *range(2, weight.ndim), 1)


def _rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate's factor: a linear start, then half a cosine down to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
