"""λ by task, layer, block, tensor and own groups: starts, constraints, priors, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_merge import TaskVectors
from lightning_merge.coefficients import Coefficients
from lightning_merge.errors import UserError
from lightning_merge.methods import TaskArithmetic
from lightning_merge.objectives import entropy

MODELS = ("a", "b")
NAMES = (
    "embeddings.weight",
    "encoder.layer.0.attention.query.weight",
    "encoder.layer.0.attention.query.bias",
    "encoder.layer.0.mlp.weight",
    "encoder.layer.1.attention.query.weight",
    "encoder.layer.1.norm.weight",
    "norm.weight",
    "norm.bias",
)


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("task", ["all"]),
        ("tensor", list(NAMES)),
        ("layer", ["embeddings", "encoder.layer.0", "encoder.layer.1", "norm"]),
        (
            "block",
            [
                "embeddings",
                "encoder.layer.0.attention",
                "encoder.layer.0.mlp",
                "encoder.layer.1.attention",
                "encoder.layer.1.norm",
                "norm",
            ],
        ),
        ({"attention": "attention", "rest": "."}, ["rest", "attention"]),
    ],
)
def test_what_shares_a_coefficient(by: Any, groups: list[str]) -> None:
    coefficients = Coefficients(MODELS, NAMES, by=by)
    assert list(coefficients.groups) == groups
    assert coefficients.raw.shape == (2, len(groups))
    # Each tensor's scalars are those of its group, and their gradients add up in it.
    with torch.no_grad():
        coefficients.raw.copy_(torch.arange(2.0 * len(groups)).reshape(2, -1))
    values = coefficients()
    assert values.shape == (2 * len(NAMES),)
    for name in NAMES:
        own = values[coefficients.span(name)].tolist()
        row = [own[0] + len(groups) * place for place in range(2)]
        assert own == row
        assert coefficients.table()["a"][groups[int(own[0])]] == own[0]
    values.sum().backward()
    assert coefficients.raw.grad is not None
    assert coefficients.raw.grad.sum() == 2 * len(NAMES)


def test_patterns_decide_in_their_order() -> None:
    coefficients = Coefficients(MODELS, NAMES, by={"first": r"layer\.0", "attention": "attention", "rest": "."})
    table = {name: coefficients.groups[int(coefficients._index[row])] for row, name in enumerate(NAMES)}
    assert table["encoder.layer.0.attention.query.weight"] == "first"
    assert table["encoder.layer.1.attention.query.weight"] == "attention"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "tensors"}, "Unknown grouping of coefficients 'tensors'.*Did you mean 'tensor'"),
        ({"by": {"attention": "attention"}}, r"No group fits the tensor 'embeddings\.weight'"),
        ({"by": {"rest": ".", "mlp": "mlp"}}, "The group 'mlp' .* fits no tensor"),
        ({"constraint": "clip"}, "Unknown constraint 'clip'"),
        ({"initial": {"a": 0.3}}, "lack the model 'b'"),
        ({"initial": {"a": 0.3, "b": 0.3, "c": 1.0}}, "'c'"),
        ({"initial": math.nan}, "finite"),
        ({"initial": 1.5, "constraint": "clamp"}, "cannot start at"),
        ({"initial": 0.0, "constraint": "softmax"}, "above 0"),
        ({"prior": -1.0}, "at least 0"),
        ({"prior": math.inf}, "at least 0"),
        ({"prior": {"nothing": 1.0}}, "Unknown group of a prior 'nothing'"),
        ({"zero": [("c", NAMES[0])]}, "'c'"),
        ({"zero": [("a", "weight")]}, "'weight'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Coefficients(MODELS, NAMES, **options)
    with pytest.raises(UserError, match="need models and tensors"):
        Coefficients([], NAMES)


# --- constraints --------------------------------------------------------------------------------------------------


def test_clamp_lets_gradients_through_at_the_bounds_only_from_inside() -> None:
    """Worked example: the gradient of clamp at −0.01, 0, 0.5, 1, 1.2 is 0, 1, 1, 1, 0."""
    coefficients = Coefficients([str(place) for place in range(5)], ["w"], constraint="clamp")
    with torch.no_grad():
        coefficients.raw.copy_(torch.tensor([-0.01, 0.0, 0.5, 1.0, 1.2])[:, None])
    assert coefficients().tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    coefficients().sum().backward()
    assert coefficients.raw.grad is not None
    assert coefficients.raw.grad.flatten().tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_softmax_is_a_convex_combination_for_each_group() -> None:
    coefficients = Coefficients(MODELS, NAMES, initial={"a": 0.2, "b": 0.6}, constraint="softmax")
    values = coefficients().reshape(-1, 2)
    torch.testing.assert_close(values, torch.tensor([0.25, 0.75]).expand(len(NAMES), 2))
    with torch.no_grad():
        coefficients.raw.normal_(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(coefficients().reshape(-1, 2).sum(1), torch.ones(len(NAMES)))


def test_what_was_pruned_stays_zero_and_is_not_learned() -> None:
    coefficients = Coefficients(MODELS, NAMES, by="layer", zero=[("b", name) for name in NAMES if "layer.0" in name])
    values = coefficients().reshape(-1, 2)
    for row, name in enumerate(NAMES):
        assert values[row, 1] == (0.0 if "layer.0" in name else values[row, 0])
    optimizer = torch.optim.Adam(coefficients.parameters(), lr=0.1)
    (coefficients() * torch.arange(1.0, 17.0)).sum().backward()
    optimizer.step()
    moved = coefficients().reshape(-1, 2)
    assert (moved[1:4, 1] == 0).all()
    assert (moved[:, 0] != 0.3).all()


# --- a step of AdaMerging -----------------------------------------------------------------------------------------


def test_first_step_of_adam_moves_each_coefficient_by_the_rate() -> None:
    """Worked example: logits (λ, 0) at λ = 0.3 have entropy 0.68202; one step of Adam at 1e-3 gives 0.301."""
    coefficients = Coefficients(["a"], ["w"])
    optimizer = torch.optim.Adam(coefficients.parameters(), lr=1e-3)
    value = entropy(torch.cat([coefficients(), torch.zeros(1)])[None]).mean()
    value.backward()
    assert value.item() == pytest.approx(0.6820224894, abs=1e-7)
    assert coefficients.raw.grad is not None
    assert coefficients.raw.grad.item() == pytest.approx(-0.0733374935, abs=1e-7)
    optimizer.step()
    assert coefficients().item() == pytest.approx(0.3009999999, abs=1e-7)
    assert coefficients.drift() == pytest.approx(1e-3, rel=1e-3)


def test_prior_draws_back_to_the_start() -> None:
    coefficients = Coefficients(MODELS, NAMES, by="layer", prior={r"layer\.1": 2.0})
    assert coefficients.penalty() == 0
    with torch.no_grad():
        coefficients.raw.add_(0.1)
    assert coefficients.penalty().item() == pytest.approx(0.5 * 2.0 * 2 * 0.01, rel=1e-4)  # two models, one group
    coefficients.penalty().backward()
    expected = torch.zeros(2, 4)
    expected[:, 2] = 0.2
    assert coefficients.raw.grad is not None
    torch.testing.assert_close(coefficients.raw.grad, expected)


# --- files --------------------------------------------------------------------------------------------------------


def learned(**options: Any) -> Coefficients:
    coefficients = Coefficients(MODELS, NAMES, **options)
    with torch.no_grad():
        coefficients.raw.uniform_(0.1, 0.9, generator=torch.Generator().manual_seed(0))
    return coefficients


@pytest.mark.parametrize("constraint", ["free", "clamp", "softmax"])
@pytest.mark.parametrize("by", ["task", "block", "tensor"])
def test_warm_start_goes_on_where_another_stopped(tmp_path: Path, by: Any, constraint: Any) -> None:
    first = learned(by=by, constraint=constraint)
    first.save(tmp_path / "coefficients.safetensors")
    # Whatever the order in which models and tensors are listed.
    again = Coefficients(
        MODELS[::-1], NAMES[::-1], by=by, constraint=constraint, initial=tmp_path / "coefficients.safetensors"
    )
    assert again.drift() == 0
    for model, row in first.table().items():
        for group, value in row.items():
            assert again.table()[model][group] == pytest.approx(value, abs=1e-6)


def test_warm_start_of_another_merge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "coefficients.safetensors"
    learned(by="layer").save(path)
    with pytest.raises(UserError, match="of other groups"):
        Coefficients(MODELS, NAMES, by="block", initial=path)
    with pytest.raises(UserError, match="of other models"):
        Coefficients(("a", "c"), NAMES, by="layer", initial=path)


def test_schedule_is_the_merge_that_was_learned_and_a_start() -> None:
    coefficients = learned(by="block")
    shapes = {name: torch.zeros(3) for name in NAMES}
    models = {"a": {n: v + 1 for n, v in shapes.items()}, "b": {n: v + 10 for n, v in shapes.items()}}
    merged = TaskArithmetic(scale=coefficients.schedule())(TaskVectors.open(shapes, models, check=False))
    values = coefficients().detach()
    for name in NAMES:
        own = values[coefficients.span(name)]
        torch.testing.assert_close(merged[name], (own @ torch.tensor([1.0, 10.0])).expand(3))
    again = Coefficients(MODELS, NAMES, initial=coefficients.schedule())
    torch.testing.assert_close(again(), values)
    with pytest.raises(UserError, match="differs within the group"):
        Coefficients(MODELS, NAMES, by="task", initial=coefficients.schedule())
