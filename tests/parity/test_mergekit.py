"""The same merges by mergekit 0.1.5, in memory (``pip install -e '.[parity]'``; skipped without it).

Where we differ on purpose, a test says so and shows by how much; where we agree, it is to fp32's rounding, because
mergekit computes in the stored dtype and we in fp32 with one rounding at the end.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.methods import Breadcrumbs, Dare, MergeMethod, SimpleAverage, TaskArithmetic, Ties, WeightedAverage

pytest.importorskip("mergekit")
from mergekit.merge_methods.api import merge_state_dicts

State = dict[str, Tensor]
SHAPES = {"embed.weight": (300, 64), "block.0.weight": (40, 25), "block.0.bias": (37,), "block.1.weight": (30, 4, 3)}


def draw(seed: int, scale: float) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def base() -> State:
    return draw(0, 1.0)


@pytest.fixture
def models(base: State) -> dict[str, State]:
    """Magnitudes are all distinct here, so that no set of largest entries depends on how ties are broken."""
    return {
        name: {key: base[key] + change for key, change in draw(seed, 0.1).items()} for seed, name in enumerate("abc", 1)
    }


def theirs(base: State | None, models: dict[str, State], method: str, **parameters: Any) -> State:
    every = models if base is None else {"base": base, **models}
    return merge_state_dicts(every, method, parameters=parameters, base=None if base is None else "base")


def ours(base: State | None, models: dict[str, State], method: MergeMethod, **options: Any) -> State:
    return method(TaskVectors.open(base=base, models=models, check=False), **options)


def agree(one: State, other: State, atol: float = 1e-6) -> None:
    assert set(one) == set(other)
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol)


def test_linear(models: dict[str, State]) -> None:
    agree(ours(None, models, SimpleAverage()), theirs(None, models, "linear", weight=1.0, normalize=True))
    weights = {"a": 0.5, "b": 0.2, "c": 1.1}
    for normalize in (True, False):
        found = ours(None, models, WeightedAverage(weights=weights, normalize=normalize))
        agree(found, theirs(None, models, "linear", weight=weights, normalize=normalize))


def test_weights_that_sum_to_zero_are_refused_by_us_and_infinite_there(models: dict[str, State]) -> None:
    weights = {"a": 1.0, "b": -1.0, "c": 0.0}
    assert not theirs(None, models, "linear", weight=weights, normalize=True)["block.0.bias"].isfinite().all()
    with pytest.raises(ValueError, match="weights sum to 0"):
        ours(None, models, WeightedAverage(weights=weights))


@pytest.mark.parametrize("scale", [0.3, 1.0, -0.5])
def test_task_arithmetic(base: State, models: dict[str, State], scale: float) -> None:
    reference = theirs(base, models, "task_arithmetic", weight=1.0, **{"lambda": scale})
    agree(ours(base, models, TaskArithmetic(scale=scale)), reference)


def test_task_arithmetic_with_a_weight_each(base: State, models: dict[str, State]) -> None:
    weights = {"a": 0.5, "b": -0.2, "c": 1.1}
    found = ours(base, models, TaskArithmetic(scale=weights))
    agree(found, theirs(base, models, "task_arithmetic", weight={"base": 0.0, **weights}))


def test_task_arithmetic_in_bf16_differs_by_their_rounding(base: State, models: dict[str, State]) -> None:
    """There differences and the factor are rounded to bf16 before they are used; here once, at the end."""
    base16 = {name: value.bfloat16() for name, value in base.items()}
    models16 = {model: {name: value.bfloat16() for name, value in state.items()} for model, state in models.items()}
    found = ours(base16, models16, TaskArithmetic(scale=0.3))
    reference = theirs(base16, models16, "task_arithmetic", weight=0.3)
    error = {"ours": 0.0, "theirs": 0.0}
    for name in SHAPES:
        exact = base16[name].double() + 0.3 * sum(
            state[name].double() - base16[name].double() for state in models16.values()
        )
        error["ours"] += float((found[name].double() - exact).abs().sum())
        error["theirs"] += float((reference[name].double() - exact).abs().sum())
        # fp32's own rounding tips a few entries that lie almost in the middle between two bf16 numbers.
        assert (found[name] != exact.bfloat16()).double().mean() < 0.01
    assert error["ours"] < 0.99 * error["theirs"]


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_ties_trimmed_tensor_by_tensor(base: State, models: dict[str, State], density: float, scale: float) -> None:
    """There trimming is always per tensor; with equal weights, ``normalize`` makes it the mean of those that agree."""
    found = ours(base, models, Ties(density=density, scale=scale, scope="tensor"))
    agree(found, theirs(base, models, "ties", weight=1.0, density=density, normalize=True, **{"lambda": scale}))
    summed = ours(base, models, Ties(density=density, scale=scale, scope="tensor", operation="sum"))
    agree(summed, theirs(base, models, "ties", weight=1.0, density=density, normalize=False, **{"lambda": scale}))


def test_ties_over_the_whole_model_is_the_papers_and_not_theirs(base: State, models: dict[str, State]) -> None:
    """One tensor that moved ten times as far takes the whole budget; per tensor each keeps its share."""
    for state in models.values():
        state["embed.weight"] = base["embed.weight"] + 10 * (state["embed.weight"] - base["embed.weight"])
    whole = ours(base, models, Ties(density=0.2))
    reference = theirs(base, models, "ties", weight=1.0, density=0.2, normalize=True)
    assert torch.equal(whole["block.0.weight"], base["block.0.weight"])
    assert not torch.equal(reference["block.0.weight"], base["block.0.weight"])


def test_ties_zero_sums_take_the_majority_here_and_plus_there() -> None:
    """The authors' code elects the sign of the majority of entries where the sum is 0; mergekit always elects +."""
    base = {"w": torch.zeros(4)}
    models = {"a": {"w": torch.tensor([0.5, -1.0, -2.0, -3.0])}, "b": {"w": torch.tensor([-0.5, 0.0, 0.0, 0.0])}}
    assert ours(base, models, Ties(density=1.0))["w"].tolist() == [-0.5, -1, -2, -3]
    assert theirs(base, models, "ties", weight=1.0, density=1.0, normalize=True)["w"].tolist() == [0.5, -1, -2, -3]


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.143, 0.05), (0.9, 0.1), (0.8, 0.0)])
def test_breadcrumbs(base: State, models: dict[str, State], density: float, gamma: float) -> None:
    """Both drop the ⌊γ n⌋ largest entries of each tensor and keep the next ⌊density · n⌋."""
    found = ours(base, models, TaskArithmetic(scale=0.7), transforms=[Breadcrumbs(density=density, gamma=gamma)])
    parameters = {"weight": 1.0, "density": density, "gamma": gamma, "lambda": 0.7}
    agree(found, theirs(base, models, "breadcrumbs", **parameters))


def test_breadcrumbs_density_one_with_outliers_is_refused_here_and_keeps_them_there(
    base: State, models: dict[str, State]
) -> None:
    kept = theirs(base, models, "breadcrumbs", weight=1.0, density=1.0, gamma=0.1)
    agree(kept, ours(base, models, TaskArithmetic(scale=1.0)))
    with pytest.raises(ValueError, match="at most 1"):
        Breadcrumbs(density=1.0, gamma=0.1)


def test_dare_divides_by_the_keep_rate_here_and_matches_the_l1_norm_there(
    base: State, models: dict[str, State]
) -> None:
    """1 / (1 − p) is the paper's and unbiased; matching norms depends on which entries happened to stay."""
    drop_rate = 0.6
    one = {"a": models["a"]}

    def factors(merged: State) -> Tensor:
        """By how much what stayed of the task vector has grown, away from entries where rounding shows."""
        tau, change = (state["embed.weight"] - base["embed.weight"] for state in (models["a"], merged))
        chosen = (change != 0) & (tau.abs() > 0.05)
        return (change / tau)[chosen]

    mine = factors(ours(base, one, TaskArithmetic(scale=1.0), transforms=[Dare(drop_rate=drop_rate)]))
    torch.testing.assert_close(mine, torch.full_like(mine, 1 / (1 - drop_rate)), rtol=2e-5, atol=0)
    torch.manual_seed(0)
    other = factors(theirs(base, one, "dare_linear", weight=1.0, density=1 - drop_rate))
    # The share that stays, and the factor on it, agree on average only.
    assert other.mean().item() == pytest.approx(1 / (1 - drop_rate), rel=0.05)
    assert abs(other.mean().item() - 1 / (1 - drop_rate)) > 1e-4
    assert mine.numel() == pytest.approx(other.numel(), rel=0.05)
