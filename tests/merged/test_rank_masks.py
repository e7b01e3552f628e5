"""Masks over singular components and factors of output rows: their weights and gradients, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from component_models import SHAPES, TASKS, Bag, State, backward, loss_of, perturbed, vectors
from torch import Tensor, nn

from lightning_merge import TaskVectors
from lightning_merge.coefficients import Coefficients
from lightning_merge.components import Components
from lightning_merge.merged_weights import MergedWeights
from lightning_merge.methods import TaskArithmetic
from lightning_merge.rank_masks import RankMasks, singular_factors


def by_svd(tau: Tensor) -> list[Tensor]:
    """The components of one task vector, each a whole tensor, the largest first; the task vector where it is none."""
    if tau.dim() < 2 or min(tau.shape[0], tau[0].numel()) == 1:
        return [tau]
    u, sigma, vh = torch.linalg.svd(tau.reshape(len(tau), -1), full_matrices=False)
    return [(sigma[i] * torch.outer(u[:, i], vh[i])).reshape(tau.shape) for i in range(len(sigma))]


def by_svd_and_rest(tau: Tensor) -> list[Tensor]:
    """Two components and what they leave."""
    parts = by_svd(tau)
    return parts if len(parts) < 3 else [*parts[:2], sum(parts[3:], parts[2])]


def explicit(scalars: Components, values: Tensor, components: Callable[[Tensor], list[Tensor]]) -> State:
    """θ₀ + Σ value · component, each written out, in fp64 and differentiable in the values."""
    base, models, _ = vectors()
    out: State = {}
    for name in SHAPES:
        mine = values[scalars.span(name)].reshape(len(TASKS), -1)
        out[name] = base[name].double()
        for row, task in zip(mine, TASKS, strict=True):
            parts = components((models[task][name] - base[name]).double())
            for value, part in zip(row, parts, strict=False):
                out[name] = out[name] + value.double() * part
    return out


@pytest.mark.parametrize(
    ("make", "components"),
    [
        (lambda tv: RankMasks.of(tv), by_svd),
        (lambda tv: RankMasks.of(tv, mode="soft", rank=0.5, keep=0.4), by_svd),
        (lambda tv: RankMasks.of(tv, rank=2, coefficients=Coefficients(TASKS, sorted(SHAPES), by="task")), by_svd),
        (lambda tv: RankMasks.of(tv, rank=2, rest=True, mode="soft"), by_svd_and_rest),
    ],
    ids=["hard", "soft", "rank-2-by-task", "rank-2-and-rest"],
)
def test_weights_and_gradients_are_those_of_the_explicit_sum(
    make: Callable[[TaskVectors], Components], components: Callable[[Tensor], list[Tensor]]
) -> None:
    *_, task_vectors = vectors()
    scalars = perturbed(make(task_vectors))
    module = Bag()
    merged = MergedWeights(module, task_vectors, scalars)
    written = explicit(scalars, scalars(), components)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.double(), written[name], rtol=0, atol=2e-6)

    found = backward(scalars, module, merged)
    scalars.zero_grad()
    loss_of(explicit(scalars, scalars(), components)).backward()
    assert set(found) == {"raw", "coefficients.raw"}
    for name, parameter in scalars.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any()
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_passes_a_mask_as_a_sigmoids() -> None:
    masks = RankMasks(["a"], {"w": (2, 2)}, margin=0.2, initial=2.0)
    with torch.no_grad():
        masks.raw.copy_(torch.tensor([0.2, -0.1]))
    values = masks()
    assert values.tolist() == [2.0, 0.0], "exactly λ or exactly 0"
    values.sum().backward()
    s = torch.tensor([1.0, -0.5]).sigmoid()
    torch.testing.assert_close(masks.raw.grad, 2.0 * s * (1 - s) / 0.2)
    assert masks.coefficients.raw.grad is not None
    assert masks.coefficients.raw.grad.item() == 1.0, "one of two components is merged"


@pytest.mark.parametrize(("kind", "settings"), [(RankMasks, {}), (RankMasks, {"rank": 1, "rest": True})])
def test_with_all_factors_one_it_is_task_arithmetic(kind: type[Components], settings: dict[str, Any]) -> None:
    _, _, task_vectors = vectors()
    module = Bag()
    MergedWeights(module, task_vectors, kind.of(task_vectors, **settings, initial={"a": 0.2, "b": 0.5, "c": -0.1}))
    expected = TaskArithmetic(scale={"a": 0.2, "b": 0.5, "c": -0.1})(task_vectors)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-6)


def test_keep_takes_the_leading_components() -> None:
    base, models, task_vectors = vectors()
    module = Bag()
    masks = RankMasks.of(task_vectors, keep=0.5, initial=1.0, whole=["^embed"])
    MergedWeights(module, task_vectors, masks)
    for name, parameter in module.named_parameters():
        expected = base[name].double()
        for task in TASKS:
            tau = (models[task][name] - base[name]).double()
            parts = [tau] if name.startswith("embed") else by_svd(tau)
            expected = expected + sum(parts[: -(-len(parts) // 2)])
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=3e-6)
    assert masks.kept()["b"] == {"tall.weight": 2, "wide.weight": 2, "conv.weight": 3}
    table = masks.table()
    assert table["a"]["tall.weight"] == pytest.approx(0.5) and table["a"]["norm.weight"] == pytest.approx(1.0)


def test_factors_of_a_matrix_without_full_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, 2, generator=generator) @ torch.randn(2, 20, generator=generator)
    for each in (matrix, matrix.mT, torch.zeros(3, 4)):
        left, right = singular_factors(each, min(each.shape))
        torch.testing.assert_close(left @ right, each.double(), rtol=0, atol=1e-12)
        sizes = left.norm(dim=0) * right.norm(dim=1)
        assert (sizes.diff() <= 1e-6).all(), "the largest first"
        torch.testing.assert_close(sizes, torch.linalg.svdvals(each.double()), rtol=1e-6, atol=1e-6)


def test_a_component_that_harms_is_masked_and_the_others_stay() -> None:
    """τ = 3 u₁v₁ᵀ + 2 u₂v₂ᵀ + 1 u₃v₃ᵀ, and the wanted weights lack the second: no rank fits, a mask does."""
    generator = torch.Generator().manual_seed(4)
    u, v = (torch.linalg.qr(torch.randn(6, 3, generator=generator))[0] for _ in range(2))
    sigma = torch.tensor([3.0, 2.0, 1.0])
    tau, wanted = (u * sigma) @ v.mT, (u * sigma * torch.tensor([1.0, 0.0, 1.0])) @ v.mT
    module = nn.Linear(6, 6, bias=False)
    task_vectors = TaskVectors.open({"weight": torch.zeros(6, 6)}, {"a": {"weight": tau}})
    masks = RankMasks.of(task_vectors, rank=3, initial=1.0, learn_coefficients=False, margin=0.045)
    merged = MergedWeights(module, task_vectors, masks)
    # Against eps the rounding in the gradients of the other two, which are 0, is nothing.
    optimizer = torch.optim.Adam(masks.parameters(), lr=0.01, eps=1e-3)
    merged.attach()
    for step in range(12):
        (module.weight - wanted).square().sum().backward()
        optimizer.zero_grad()
        merged.backward()
        optimizer.step()
        merged.materialise()
        assert masks().tolist() == ([1.0, 1.0, 1.0] if step < 4 else [1.0, 0.0, 1.0]), "flips after margin / rate"
    torch.testing.assert_close(module.weight.detach(), wanted, rtol=0, atol=1e-6)
    assert masks.kept() == {"a": {"weight": 2}}
    assert masks.drift() == pytest.approx(3**-0.5)
    assert masks.coefficients.raw.item() == 1.0


def test_bf16_halves_what_is_held_and_keeps_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"weight": torch.randn(96, 64, generator=generator)}
    models = {t: {"weight": base["weight"] + 0.1 * torch.randn(96, 64, generator=generator)} for t in TASKS}
    task_vectors = TaskVectors.open(base, models)
    goal = torch.randn(96, 64, generator=generator)
    found: dict[str, tuple[Tensor, int]] = {}
    for dtype in ("float32", "bfloat16"):
        masks = RankMasks.of(task_vectors, mode="soft")
        module = nn.Linear(64, 96, bias=False)
        merged = MergedWeights(module, task_vectors, masks, dtype=dtype)
        merged.attach()
        (module.weight * goal).sum().backward()
        merged.backward()
        found[dtype] = masks.raw.grad.clone(), merged.nbytes["task_vectors"]
    exact, size = found["float32"]
    rounded, half = found["bfloat16"]
    assert size == 4 * 3 * 64 * (96 + 64) and half * 2 == size
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_leading_components_and_rest_are_the_task_vector_whatever_they_are_rounded_to() -> None:
    """The rest takes up what bf16 loses of the factors, so that a merge starts where task arithmetic does."""
    generator = torch.Generator().manual_seed(0)
    column, row = torch.randn(24, 1, generator=generator), torch.randn(1, 16, generator=generator)
    tau = (10 * column @ row + 0.01 * torch.randn(24, 16, generator=generator)).bfloat16()
    masks = RankMasks(["a"], {"w": (24, 16)}, rank=1, rest=True, initial=1.0)
    found = torch.zeros(24 * 16)
    masks.decompose("w", tau[None]).add_to(found, masks().detach())
    assert (found.view(24, 16) - tau.float()).norm() < 2**-13 * tau.float().norm()
