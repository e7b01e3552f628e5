"""Objectives against their definitions, and what individual models are asked and remembered for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_merge.adaptation import Individuals
from lightning_merge.errors import UserError
from lightning_merge.objectives import (
    Distillation,
    Entropy,
    FeatureDistance,
    MarginalEntropy,
    Outputs,
    Supervised,
    entropy,
    marginal_entropy,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_entropy_of_the_worked_example() -> None:
    """Logits (λ, 0) at λ = 0.3: H = 0.6820224894 and dH/dλ = −p (1 − p) λ = −0.0733374935."""
    scale = torch.tensor(0.3, requires_grad=True)
    value = Entropy()(Outputs("a", logits=torch.stack([scale, scale * 0])[None]))
    value.backward()
    assert value.item() == pytest.approx(0.6820224894, abs=1e-7)
    assert scale.grad is not None and scale.grad.item() == pytest.approx(-0.0733374935, abs=1e-7)


def test_entropy_is_that_of_scipy_and_finite_where_p_is_zero() -> None:
    from scipy.stats import entropy as reference

    logits = normal(6, 5)
    torch.testing.assert_close(
        entropy(logits), torch.tensor(reference(logits.double().softmax(-1).numpy(), axis=1)).float()
    )
    certain = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    value = entropy(certain).sum()
    value.backward()
    assert value == 0 and certain.grad is not None and certain.grad.isfinite().all()


def test_masked_classes_are_as_if_they_were_not_there() -> None:
    """A class with a logit of -inf, in some rows or in all, neither counts nor breaks the gradient."""
    kept = normal(6, 3)
    target = normal(6, 3, seed=1)

    def masked(values: Tensor) -> Tensor:
        return torch.cat([torch.full((6, 1), -math.inf), values, torch.full((6, 2), -math.inf)], dim=1)

    def distillation(logits: Tensor) -> Tensor:
        own = target if logits.shape == target.shape else masked(target)
        return Distillation()(Outputs("a", logits=logits, individual=Outputs("a", logits=own)))

    for measure in (lambda logits: entropy(logits).sum(), marginal_entropy, distillation):
        found = []
        for change in (lambda values: values, masked):
            values = kept.clone().requires_grad_(True)
            logits = change(values)
            value = measure(logits)
            value.backward()
            found.append((value.detach(), values.grad))
        torch.testing.assert_close(found[0], found[1])
    # In some rows only: the definition, with the convention 0 log 0 = 0.
    some = kept.clone()
    some[2:, 1] = -math.inf
    some.requires_grad_(True)
    mean = some.detach().softmax(-1).mean(0)
    marginal = marginal_entropy(some)
    torch.testing.assert_close(marginal.detach(), -(mean * mean.log()).sum())
    (marginal + entropy(some).sum()).backward()
    assert some.grad is not None and some.grad.isfinite().all() and not some.grad[2:, 1].any()
    assert entropy(torch.full((1, 3), -math.inf)).isnan().all()
    assert entropy(torch.tensor([[0.0, math.inf], [0.0, math.nan]])).isnan().all()


def test_low_precision_logits_are_summed_in_fp32() -> None:
    logits = normal(4, 1000).bfloat16()
    assert entropy(logits).dtype == torch.float32
    torch.testing.assert_close(entropy(logits), entropy(logits.float()))


def test_marginal_entropy_is_greatest_for_balanced_and_zero_for_collapsed_predictions() -> None:
    balanced = 50 * torch.eye(4).repeat(3, 1)
    assert marginal_entropy(balanced).item() == pytest.approx(math.log(4), abs=1e-6)
    assert MarginalEntropy()(Outputs("a", logits=balanced)).item() == pytest.approx(-math.log(4), abs=1e-6)
    collapsed = 50 * torch.eye(4)[[2, 2, 2]]
    assert marginal_entropy(collapsed).item() == pytest.approx(0, abs=1e-6)
    # Information of input and answer: the entropy of the mean less the mean entropy, never negative.
    logits = normal(16, 4)
    assert marginal_entropy(logits) >= entropy(logits).mean()
    mean = logits.softmax(-1).mean(0)
    torch.testing.assert_close(marginal_entropy(logits), -(mean * mean.log()).sum())


@pytest.mark.parametrize(("norm", "expected"), [("l1", 1.5), ("l2", 3.5)])
def test_distance_of_features(norm: Any, expected: float) -> None:
    mine = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    other = torch.tensor([[0.0, 0.0], [3.0, -3.0]])  # differences 1, 2, 0, 3
    outputs = Outputs("a", features=mine, individual=Outputs("a", features=other))
    assert FeatureDistance(norm=norm)(outputs).item() == expected


def test_distillation_is_least_at_the_individual_model_and_keeps_its_size_at_any_temperature() -> None:
    target = normal(5, 4)

    def gradient(logits: Tensor, temperature: float) -> Tensor:
        logits = logits.clone().requires_grad_(True)
        outputs = Outputs("a", logits=logits, individual=Outputs("a", logits=target))
        Distillation(temperature=temperature)(outputs).backward()
        assert logits.grad is not None
        return logits.grad

    assert gradient(target, 2.0).abs().max() < 1e-7
    # T² L has the gradient T (softmax(z / T) − softmax(v / T)) / B, which tends to differences of centred logits.
    moved = target + 0.1 * normal(5, 4, seed=1)
    difference = (moved - target) - (moved - target).mean(-1, keepdim=True)
    torch.testing.assert_close(gradient(moved, 1e3), difference / 4 / 5, rtol=2e-2, atol=2e-4)
    expected = torch.nn.functional.cross_entropy(moved, target.softmax(-1))
    found = Distillation()(Outputs("a", logits=moved, individual=Outputs("a", logits=target)))
    torch.testing.assert_close(found, expected)


def test_supervised_is_cross_entropy() -> None:
    logits, labels = normal(5, 4), torch.tensor([0, 1, 2, 3, 0])
    expected = -logits.log_softmax(-1)[torch.arange(5), labels].mean()
    torch.testing.assert_close(Supervised()(Outputs("a", logits=logits, labels=labels)), expected)


def test_names_needs_and_settings() -> None:
    assert [kind().name for kind in (Entropy, MarginalEntropy, FeatureDistance)] == [
        "entropy",
        "marginal_entropy",
        "feature_distance",
    ]
    assert Distillation().needs == {"logits", "individual"} and Supervised().needs == {"logits", "labels"}
    for make, message in (
        (lambda: Entropy(weight=math.nan), "weight must be a finite number"),
        (lambda: FeatureDistance(norm="l3"), "Unknown norm 'l3'"),  # type: ignore[arg-type]
        (lambda: Distillation(temperature=0), "temperature must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            make()


# --- individual answers -------------------------------------------------------------------------------------------


class Asked:
    """A model that counts how often it was asked, and whose individual ones are ten times as sure."""

    def __init__(self) -> None:
        self.scale, self.calls = 1.0, 0
        self.weight = normal(3, 4).requires_grad_(True)

    def answer(self, task: str, batch: Any) -> Outputs:
        self.calls += 1
        features = batch["x"] @ self.weight
        return Outputs(task, logits=self.scale * features, features=features, extra={"sums": features.sum(-1)})

    @contextmanager
    def individual(self, task: str) -> Iterator[None]:
        self.scale = 10.0
        yield
        self.scale = 1.0


def batch(*index: int) -> dict[str, Any]:
    return {"x": torch.stack([normal(3, seed=row) for row in index]), "index": torch.tensor(index)}


@pytest.mark.parametrize("remember", ["computed", "cached"])
def test_individual_answers_are_those_of_each_row(remember: Any) -> None:
    model = Asked()
    individuals = Individuals(model.answer, model.individual, remember)
    for rows in ((0, 1), (2, 3), (3, 0)):
        found = individuals("a", batch(*rows))
        assert found.logits is not None and found.features is not None
        assert not found.logits.requires_grad and not found.features.requires_grad
        torch.testing.assert_close(found.features, batch(*rows)["x"] @ model.weight.detach())
        torch.testing.assert_close(found.logits, 10 * found.features)
        torch.testing.assert_close(found.extra["sums"], found.features.sum(-1))
    assert model.calls == (3 if remember == "computed" else 2)
    individuals("b", batch(0))  # another task's row 0 is another row
    assert model.calls == (4 if remember == "computed" else 3)


def test_rows_must_be_known_to_be_remembered() -> None:
    model = Asked()
    with pytest.raises(UserError, match="no 'index'"):
        Individuals(model.answer, model.individual, "cached")("a", {"x": normal(2, 3)})
    with pytest.raises(UserError, match="Unknown way to remember"):
        Individuals(model.answer, model.individual, "kept")  # type: ignore[arg-type]
