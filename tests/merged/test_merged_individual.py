"""Individual models inside a live merge, and low precision around it: the merge comes back, to the byte."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_models import (
    MODELS,
    Case,
    autograd_gradient,
    contracted_gradient,
    entropy_of_logits,
    error,
    make_case,
    network,
    plain_case,
    rows,
    same,
    state,
    stored,
    with_scalars,
)
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.coefficients import Coefficients
from lightning_merge.directions import Directions, TaskDirections
from lightning_merge.errors import UserError
from lightning_merge.merged_weights import MergedWeights
from lightning_merge.methods import LwPTV


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return plain_case(tmp_path, network(), [rows(1), rows(2)], entropy_of_logits)


# --- individual models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"storage": "files", "keep_base": False}])
def test_individual_model_is_the_stored_one_and_the_merge_comes_back(case: Case, options: dict[str, Any]) -> None:
    merged = case.merged(**options)
    before = state(case.module)
    for model in MODELS:
        with merged.individual(model):
            inside, expected = state(case.module), stored(case.models[model])
            for name, value in expected.items():
                assert torch.equal(inside[name], value), name
        assert same(state(case.module), before)


def test_the_merge_comes_back_after_an_exception(case: Case) -> None:
    merged = case.merged()
    before = state(case.module)
    with pytest.raises(KeyboardInterrupt), merged.individual("sun"):
        raise KeyboardInterrupt
    assert same(state(case.module), before)
    with pytest.raises(UserError, match=r"Unknown model 'sum'.*'sun'"), merged.individual("sum"):
        pass
    assert same(state(case.module), before)


@pytest.mark.parametrize("writes", [0, 1])
def test_the_merge_comes_back_whole_after_coming_back_was_interrupted(
    case: Case, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Statistics, and what a transform has dropped, are no scalar's to write."""
    merged = case.merged(transforms=[LwPTV(eta=1.0)])
    assert len(merged.unchanged) > 1
    before = state(case.module)
    copy_back, count = merged._copy, 0

    def interrupted(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > writes:
            raise KeyboardInterrupt
        copy_back(*args)

    with pytest.raises(KeyboardInterrupt), merged.individual("sun"):
        assert not same(state(case.module), before)
        monkeypatch.setattr(merged, "_copy", interrupted)
    monkeypatch.undo()
    merged.materialise()
    assert same(state(case.module), before)


def test_individual_models_of_algebra(case: Case) -> None:
    task_vectors = case.task_vectors()
    both = TaskVectors.of(task_vectors, {"both": task_vectors["cars"] + task_vectors["sun"]})
    merged = MergedWeights(case.module, *with_scalars(both))
    with merged.individual("both"):
        parts = [stored(path)["out.weight"] for path in (case.models["cars"], case.models["sun"], case.base)]
        torch.testing.assert_close(case.module.out.weight.detach(), parts[0] + parts[1] - parts[2])


# --- autocast -----------------------------------------------------------------------------------------------------


def test_new_weights_are_seen_inside_one_autocast_context(case: Case) -> None:
    """Autocast remembers its bf16 copies of weights that take gradients until the outermost context ends."""
    merged = case.merged(initial=0.0)
    merged.attach()
    x = case.batches[0]["x"]
    ones = torch.ones_like(merged.scalars().detach())

    def fresh() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.module(x).logits

    expected = [fresh()]
    merged.materialise(ones)
    expected.append(fresh())
    with merged.individual("sun"):
        expected.append(fresh())
    with torch.autocast("cpu", torch.bfloat16):
        found = [case.module(x).logits]
        merged.materialise(ones)
        found.append(case.module(x).logits)
        with merged.individual("sun"):
            found.append(case.module(x).logits)
        found.append(case.module(x).logits)
    for one, other in zip(found, [*expected, expected[0]], strict=True):
        assert torch.equal(one, other)


class Products(Coefficients):
    """Scalars whose directions are summed by a product of matrices, which autocast would do in bf16."""

    def decompose(self, tensor: str, deltas: Tensor, rows: slice | None = None) -> Directions:
        class Sum(TaskDirections):
            def add_to(self, out: Tensor, values: Tensor) -> None:
                out += (values[None] @ self.deltas)[0]

            def contract(self, gradient: Tensor) -> Tensor:
                return (self.deltas @ gradient[:, None])[:, 0].double()

        return Sum(deltas.reshape(len(deltas), -1))


def test_autocast_does_not_reach_the_merge(case: Case) -> None:
    """Individual models are asked inside a training step, after which the merge is written there."""
    task_vectors = case.task_vectors()
    merged = MergedWeights(case.module, task_vectors, Products(task_vectors.names, task_vectors.tensor_names))
    before = state(case.module)
    expected = contracted_gradient(case, merged)
    merged.attach()
    merged.keep_gradients = True
    for batch in case.batches:
        entropy_of_logits(case.module, batch).backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert error(merged.gradient(), expected) < 1e-6
        with merged.individual("sun"):
            pass
        assert same(state(case.module), before)


def test_writing_between_forward_and_backward_is_an_error(case: Case) -> None:
    """Never a gradient of other weights than those of the forward pass."""
    merged = case.merged()
    merged.attach()
    loss = entropy_of_logits(case.module, case.batches[0])
    merged.materialise()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bf16_module_learns_from_bf16_gradients(tmp_path: Path) -> None:
    """A module whose parameters are bf16: W and ∂L/∂W are rounded to 8 bits, so the gradient agrees to about 1 %."""
    case = make_case("vit", tmp_path)
    exact = case.merged()
    expected = autograd_gradient(case, exact, exact.scalars())
    half = copy.deepcopy(case.module).bfloat16()
    merged = case.merged(half)
    for batch in case.batches:
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    found = contracted_gradient(case, merged, half)
    assert found.dtype == torch.float64
    assert error(found, expected) < 0.05
