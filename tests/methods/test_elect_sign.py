"""AdaMerging++'s task vectors: worked by hand, and against the TIES merge that they add up to."""

from __future__ import annotations

import pytest
import torch
from contract import grid_models, opened
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.methods import ElectSign, TaskArithmetic, Ties
from lightning_merge.methods.elect_sign import keep_agreeing
from lightning_merge.methods.streaming import Chain

A = [0.5, -0.25, 0.0, 0.125, 0.5, -1.0]
B = [-0.25, 0.5, 0.0625, 0.125, -0.5, -0.5]


def deltas(vectors: TaskVectors, transform: ElectSign) -> dict[str, Tensor]:
    """What the transform makes of the task vectors, by tensor, ``(T, n)``."""
    pieces: dict[str, list[Tensor]] = {}
    for name, _, values in Chain([transform], vectors).run():
        pieces.setdefault(name, []).append(values)
    return {name: torch.cat(values, dim=1) for name, values in pieces.items()}


def two() -> TaskVectors:
    return opened({"w": torch.zeros(6)}, {"a": {"w": torch.tensor(A)}, "b": {"w": torch.tensor(B)}})


def test_worked_example() -> None:
    """Untrimmed: the sums are .25 .25 .0625 .25 0 -1.5, so + wins four entries and the tie, and − the last."""
    kept = deltas(two(), ElectSign(density=1.0))["w"]
    assert kept.tolist() == [[0.5, 0.0, 0.0, 0.125, 0.5, -1.0], [0.0, 0.5, 0.0625, 0.125, 0.0, -0.5]]


def test_signs_are_elected_among_what_the_trim_leaves() -> None:
    """Half: a keeps entries 0, 4, 5 and b 1, 4, 5. Entry 0 is a's alone; a tie stays at entry 4, where + and − are
    elected by two entries and one: +."""
    kept = deltas(two(), ElectSign(density=0.5))["w"]
    assert kept.tolist() == [[0.5, 0.0, 0.0, 0.0, 0.5, -1.0], [0.0, 0.5, 0.0, 0.0, 0.0, -0.5]]


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.1, 0.2, 0.7, 1.0])
def test_the_sum_is_the_merge_of_ties(density: float, scope: str) -> None:
    base, models = grid_models()
    vectors = opened(base, models)
    expected = Ties(density=density, scope=scope, operation="sum", scale=0.5)(vectors)
    found = TaskArithmetic(scale=0.5)(vectors, transforms=[ElectSign(density=density, scope=scope)])
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    kept = deltas(vectors, ElectSign(density=density, scope=scope))
    assert not any(((rows > 0).any(0) & (rows < 0).any(0)).any() for rows in kept.values()), "two signs at one entry"


def test_every_kept_entry_is_the_models_own() -> None:
    base, models = grid_models()
    vectors = opened(base, models)
    for name, rows in deltas(vectors, ElectSign()).items():
        own = torch.stack([(models[t][name] - base[name]).reshape(-1) for t in vectors.names])
        assert torch.equal(torch.where(rows != 0, own, 0.0), rows), name


def test_without_a_conflict_and_without_a_trim_nothing_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(-1, 2, (40, 3), generator=generator).float()
    models = {t: {"w": sign * torch.rand(40, 3, generator=generator)} for t in "abc"}
    kept = deltas(opened({"w": torch.zeros(40, 3)}, models), ElectSign(density=1.0))["w"]
    assert torch.equal(kept, torch.stack([models[t]["w"].reshape(-1) for t in "abc"]))


def test_what_is_dropped_is_plus_zero() -> None:
    """A −0 would turn up in files, and in the bytes of merges that copy what is kept."""
    kept = keep_agreeing(torch.tensor([[-1.0, 2.0], [3.0, -4.0]]), torch.tensor([1.0, -1.0]))
    assert torch.equal(kept, torch.tensor([[0.0, 0.0], [3.0, -4.0]]))
    assert not torch.signbit(kept[0]).any()
