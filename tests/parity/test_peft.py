"""The same primitives by peft (``peft.utils.merge_utils``), which work on task tensors without a base.

Where we differ on purpose: peft trims per tensor (the paper over the whole model, our default), breaks zero sums
towards + (the authors' code: towards the majority), and draws DARE's masks from the global generator.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.methods import Breadcrumbs, MergeMethod, TaskArithmetic, Ties
from lightning_merge.methods.dare import drop_and_rescale
from lightning_merge.methods.task_arithmetic import combine
from lightning_merge.methods.ties import disjoint_merge, elect_sign
from lightning_merge.methods.top_k import LargestEntries, magnitude_bits

merge_utils = pytest.importorskip("peft.utils.merge_utils")

SHAPES = [(50, 20), (999,), (4, 5, 6)]


def draw(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> list[Tensor]:
    """Task tensors without two equal magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def opened(taus: list[Tensor]) -> TaskVectors:
    """Over a base of zeros, so that what is merged is the task tensors themselves."""
    models = {str(number): {"w": tau} for number, tau in enumerate(taus)}
    return TaskVectors.open(base={"w": torch.zeros_like(taus[0])}, models=models, check=False)


def merged(method: MergeMethod, taus: list[Tensor]) -> Tensor:
    return method(opened(taus))["w"]


@pytest.mark.parametrize("shape", SHAPES)
def test_task_arithmetic(shape: tuple[int, ...]) -> None:
    taus, weights = draw(shape), [0.3, -0.2, 1.0]
    expected = merge_utils.task_arithmetic(taus, torch.tensor(weights))
    torch.testing.assert_close(combine(torch.stack(taus), weights), expected, rtol=0, atol=1e-6)
    by_name = {str(number): weight for number, weight in enumerate(weights)}
    torch.testing.assert_close(merged(TaskArithmetic(scale=by_name), taus), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.93])
def test_magnitude_pruning(shape: tuple[int, ...], density: float) -> None:
    (tau,) = draw(shape, 1)
    expected = merge_utils.magnitude_based_pruning(tau, density)
    vectors = opened([tau])
    largest = LargestEntries(
        tensors={"w": vectors.info("w")}, ranks=lambda count: [int(density * count)], group=lambda name: ""
    )
    view = vectors.view("w")
    while not largest.complete:
        largest = largest.conclude(
            largest.measure(
                view,
            )
        )
    found = torch.where(largest.mask(view, magnitude_bits(view.deltas)), view.deltas, 0.0).reshape(shape)
    assert torch.equal(found, expected)
    crumbs = TaskArithmetic(scale=1.0)(vectors, transforms=[Breadcrumbs(density=density, gamma=0.0)])["w"]
    assert torch.equal(crumbs, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_ties(shape: tuple[int, ...], density: float) -> None:
    taus = draw(shape)
    expected = merge_utils.ties(taus, torch.ones(3), density)
    torch.testing.assert_close(merged(Ties(density=density, scope="tensor"), taus), expected, rtol=0, atol=1e-6)


def test_sign_election_and_disjoint_merge() -> None:
    stacked = torch.stack(draw((7, 30)))
    mask = merge_utils.calculate_majority_sign_mask(stacked, method="total")
    sign = elect_sign(stacked)
    assert torch.equal(stacked.sign() == sign, mask)
    expected = merge_utils.disjoint_merge(stacked, mask)
    torch.testing.assert_close(disjoint_merge(stacked, sign, "mean"), expected, rtol=0, atol=1e-6)


def test_zero_sums_take_the_majority_here_and_plus_there() -> None:
    taus = [torch.tensor([0.5, -1.0, -2.0]), torch.tensor([-0.5, 0.0, 0.0])]
    assert merged(Ties(density=1), taus).tolist() == [-0.5, -1.0, -2.0]
    stacked = torch.stack(taus)
    theirs = merge_utils.disjoint_merge(stacked, merge_utils.calculate_majority_sign_mask(stacked))
    assert theirs.tolist() == [0.5, -1.0, -2.0]


def test_dare() -> None:
    """Given the mask that peft drew, dropping and rescaling is the same."""
    (tau,) = draw((60, 40), 1)
    torch.manual_seed(0)
    theirs = merge_utils.random_pruning(tau, density=0.3, rescale=True)
    torch.testing.assert_close(drop_and_rescale(tau, theirs != 0, 0.7), theirs, rtol=1e-6, atol=0)
    torch.manual_seed(0)
    assert torch.equal(drop_and_rescale(tau, theirs != 0, 0.0), merge_utils.random_pruning(tau, 0.3, rescale=False))
