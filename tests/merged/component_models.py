"""Small models for scalars that are finer than coefficients: every shape of tensor, and a loss that bends in all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_merge import TaskVectors
from lightning_merge.components import Components
from lightning_merge.merged_weights import MergedWeights

# Tall, wide, a convolution, an embedding, one column, and what is no matrix. Uneven over two processes.
SHAPES = {
    "tall.weight": (7, 4),
    "wide.weight": (3, 8),
    "conv.weight": (5, 2, 2, 2),
    "embed.weight": (9, 3),
    "column.weight": (6, 1),
    "norm.weight": (7,),
    "one.bias": (1,),
}
TASKS = ("a", "b", "c")
State = dict[str, Tensor]


class Bag(nn.Module):
    """The tensors as parameters of submodules, and a loss that bends in all of them."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            owner, kind = name.split(".")
            child = nn.Module()
            child.register_parameter(kind, nn.Parameter(torch.zeros(shape)))
            setattr(self, owner, child)


def loss_of(tensors: State) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=next(iter(tensors.values())).dtype)
    for name in sorted(SHAPES):
        weight = torch.randn(SHAPES[name], generator=generator).to(total.dtype)
        total = total + (weight * tensors[name]).sum().tanh() + 0.3 * tensors[name].square().sum()
    return total


def vectors() -> tuple[State, dict[str, State], TaskVectors]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    models = {t: {n: v + 0.3 * torch.randn(v.shape, generator=generator) for n, v in base.items()} for t in TASKS}
    return base, models, TaskVectors.open(base, models)


def perturbed(scalars: Components) -> Components:
    """Away from the start, so that no two scalars are alike; masks of both kinds."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in scalars.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return scalars


def backward(scalars: Components, module: Bag, merged: MergedWeights) -> dict[str, Tensor]:
    merged.attach()
    loss_of(dict(module.named_parameters())).backward()
    merged.backward()
    merged.detach()
    return {name: p.grad.clone() for name, p in scalars.named_parameters() if p.grad is not None}
