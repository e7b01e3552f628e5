"""mergekit 0.1.5's sparsifying and sign-electing methods, and ours in ``compat="mergekit"``, in memory.

In fp32 they agree to rounding. Where both draw at random, mergekit is given our draws. In bf16 mergekit also computes
in bf16, and breaks ties at a threshold in an order of its own: there only what does not depend on that is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.methods import (
    Breadcrumbs,
    Dare,
    Della,
    MergeMethod,
    Sce,
    TaskArithmetic,
    Ties,
    Transform,
)
from lightning_merge.methods.random import keep_mask, uniform

pytest.importorskip("mergekit")
import mergekit.sparsify
from mergekit.merge_methods.api import merge_state_dicts

State = dict[str, Tensor]
SHAPES = {"embed.weight": (300, 64), "conv.weight": (8, 6, 3, 2), "norm.bias": (37,), "block.weight": (30, 45)}
SEED = 5
WEIGHTS = {"a": 0.4, "b": 1.1, "c": -0.3}
THEIRS: dict[str, Any] = {"compat": "mergekit"}


def draw(seed: int, scale: float) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def base() -> State:
    return draw(0, 1.0)


@pytest.fixture
def models(base: State) -> dict[str, State]:
    """Magnitudes are all distinct here, so that no set of largest entries depends on how ties are broken."""
    return {t: {key: base[key] + change for key, change in draw(n, 0.1).items()} for n, t in enumerate("abc", 1)}


def agree(
    base: State,
    models: dict[str, State],
    name: str,
    parameters: dict[str, Any],
    method: MergeMethod,
    *transforms: Transform,
    atol: float = 1e-6,
) -> None:
    theirs = merge_state_dicts({"base": base, **models}, name, parameters=parameters, base="base")
    vectors = TaskVectors.open(base=base, models=models, check=False)
    ours = method(vectors, transforms=transforms, seed=SEED)
    changed = undecided = 0
    for key in SHAPES:
        apart = (ours[key] - theirs[key]).abs() > atol
        if isinstance(method, Ties) and apart.any():
            # Where the votes cancel but for rounding, either sign may be elected.
            votes = TaskArithmetic(scale=1.0, weights=method.weights, **THEIRS)
            total = votes(vectors, transforms=transforms, seed=SEED)[key] - base[key]
            assert (total[apart].abs() < 1e-6).all()
            undecided += int(apart.sum())
        else:
            assert not apart.any()
        changed += int((ours[key] != base[key]).sum())
    assert undecided <= 2
    assert changed > 1000, "a comparison of nothing"


def given(draws: Callable[[str, str, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch, models: str = "abc") -> None:
    """Have mergekit draw what we draw; it asks tensor by tensor, model by model."""
    asked: dict[str, int] = {}
    by_size = {torch.Size(shape).numel(): name for name, shape in SHAPES.items()}

    def bernoulli(chances: Tensor) -> Tensor:
        name = by_size[chances.numel()]
        model = models[asked.get(name, 0)]
        asked[name] = asked.get(name, 0) + 1
        return draws(model, name, chances)

    monkeypatch.setattr(mergekit.sparsify.torch, "bernoulli", bernoulli)


def kept_alike(model: str, name: str, chances: Tensor) -> Tensor:
    chance = round(float(chances.flatten()[0]), 6)  # fp32 there
    mask = keep_mask(chance, SEED, model, name, 0, chances.numel())
    return mask.reshape(chances.shape).to(chances.dtype)


def kept_by_rank(model: str, name: str, chances: Tensor) -> Tensor:
    """Our draws go from the likeliest entry of a row to the least likely one; rows lie along the second axis."""
    across = chances.movedim(1, -1)
    rows = across.reshape(-1, across.shape[-1])
    draws = uniform(SEED, model, name, 0, chances.numel()).reshape(rows.shape)
    order = rows.argsort(1, descending=True)
    kept = torch.zeros_like(rows).scatter_(1, order, (draws < rows.gather(1, order)).to(rows.dtype))
    return kept.reshape(across.shape).movedim(-1, 1)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [0.7, WEIGHTS, {"a": 1.0, "b": -1.0, "c": 0.0}], ids=["one", "each", "balanced"])
def test_task_arithmetic(base: State, models: dict[str, State], weights: Any, normalize: bool) -> None:
    parameters = {"weight": weights, "normalize": normalize, "lambda": 0.6}
    agree(
        base, models, "task_arithmetic", parameters,
        TaskArithmetic(scale=0.6, weights=weights, normalize=normalize, **THEIRS),
    )  # fmt: skip


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [0.7, WEIGHTS, {"a": 1.0, "b": -1.0, "c": 2.0}], ids=["one", "each", "cancelling"])
@pytest.mark.parametrize("density", [0.2, {"a": 0.1, "b": 1.0, "c": 0.53}, 1.0], ids=["0.2", "each", "1"])
def test_ties(
    base: State, models: dict[str, State], density: Any, weights: Any, normalize: bool, rescale: bool
) -> None:
    parameters = {"weight": weights, "density": density, "normalize": normalize, "rescale": rescale, "lambda": 0.8}
    operation: Any = "mean" if normalize else "sum"
    method = Ties(density=density, weights=weights, scale=0.8, operation=operation, rescale=rescale, **THEIRS)
    agree(base, models, "ties", parameters, method)


def test_ties_on_frozen_tensors(base: State, models: dict[str, State]) -> None:
    """Zero task vectors, and entries that cancel exactly, where + is elected."""
    for t, state in models.items():
        state["norm.bias"] = base["norm.bias"].clone()
        base["embed.weight"][0] = torch.arange(64.0)
        state["embed.weight"][0] = base["embed.weight"][0] + {"a": 1.0, "b": -1.0, "c": 0.0}[t]
    agree(base, models, "ties", {"weight": 1.0, "density": 1.0}, Ties(density=1.0, **THEIRS))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("density", [0.5, 0.2])
def test_dare(
    base: State, models: dict[str, State], monkeypatch: pytest.MonkeyPatch, density: float, rescale: bool
) -> None:
    dare = Dare(drop_rate=1 - density, rescale=rescale, **THEIRS)
    parameters = {"weight": WEIGHTS, "density": density, "rescale": rescale, "lambda": 0.7}
    given(kept_alike, monkeypatch)
    agree(base, models, "dare_linear", parameters, TaskArithmetic(scale=0.7, weights=WEIGHTS, **THEIRS), dare)
    given(kept_alike, monkeypatch)
    method = Ties(density=1.0, scale=0.7, weights=WEIGHTS, operation="sum", **THEIRS)
    agree(base, models, "dare_ties", parameters, method, dare, atol=2e-6)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    ("density", "gamma"),
    [
        (0.5, 0.1),
        (0.143, 0.05),
        (0.9, 0.2),
        (1.0, 0.1),
        ({"a": 0.1, "b": 1.0, "c": 0.6}, {"a": 0.0, "b": 0.3, "c": 0.5}),
    ],
)
def test_breadcrumbs(base: State, models: dict[str, State], density: Any, gamma: Any, rescale: bool) -> None:
    crumbs = Breadcrumbs(density=density, gamma=gamma, rescale=rescale, **THEIRS)
    parameters = {"weight": WEIGHTS, "density": density, "gamma": gamma, "rescale": rescale, "lambda": 0.7}
    agree(base, models, "breadcrumbs", parameters, TaskArithmetic(scale=0.7, weights=WEIGHTS, **THEIRS), crumbs)
    method = Ties(density=1.0, scale=0.7, weights=WEIGHTS, operation="sum", **THEIRS)
    agree(base, models, "breadcrumbs_ties", parameters, method, crumbs, atol=2e-6)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("density", "epsilon"), [(0.4, 0.15), (0.7, 0.25), (0.5, {"a": 0.1, "b": 0.4, "c": 0.01})])
def test_della(
    base: State, models: dict[str, State], monkeypatch: pytest.MonkeyPatch, density: Any, epsilon: Any, rescale: bool
) -> None:
    della = Della(density=density, epsilon=epsilon, rescale=rescale, **THEIRS)
    parameters = {"weight": WEIGHTS, "density": density, "epsilon": epsilon, "rescale": rescale, "lambda": 0.7}
    given(kept_by_rank, monkeypatch)
    agree(base, models, "della_linear", parameters, TaskArithmetic(scale=0.7, weights=WEIGHTS, **THEIRS), della)
    given(kept_by_rank, monkeypatch)
    agree(base, models, "della", parameters, Ties(density=1.0, scale=0.7, weights=WEIGHTS, **THEIRS), della, atol=2e-6)


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["usual", "tiny"])
@pytest.mark.parametrize("share", [0.1, 0.55, 1.0])
def test_sce(base: State, models: dict[str, State], share: float, size: float) -> None:
    """Tiny task vectors fall under the constant below which all models count alike."""
    models = {t: {key: base[key] + size * (state[key] - base[key]) for key in SHAPES} for t, state in models.items()}
    agree(base, models, "sce", {"select_topk": share}, Sce(density=share, **THEIRS), atol=2e-6)


def test_sce_of_models_that_agree_on_most_entries(base: State, models: dict[str, State]) -> None:
    """The count goes by the entries whose variance is not 0."""
    for state in models.values():
        state["embed.weight"][10:] = models["a"]["embed.weight"][10:]
    agree(base, models, "sce", {"select_topk": 0.5}, Sce(density=0.5, **THEIRS), atol=2e-6)


def test_one_bf16_model_to_the_last_bit(base: State, models: dict[str, State]) -> None:
    """With one model and factors of 1 only the rounded difference and one addition are left."""
    base = {name: value.bfloat16() for name, value in base.items()}
    one = {"a": {name: value.bfloat16() for name, value in models["a"].items()}}
    agree(base, one, "task_arithmetic", {"weight": 1.0}, TaskArithmetic(scale=1.0, **THEIRS), atol=0)
    agree(base, one, "ties", {"weight": 1.0, "density": 1.0}, Ties(density=1.0, **THEIRS), atol=0)
    vectors = TaskVectors.open(base=base, models=one, check=False)
    for density in (0.1, 0.5):
        ours = Ties(density=density, **THEIRS)(vectors)
        theirs = merge_state_dicts(
            {"base": base, **one}, "ties", parameters={"weight": 1.0, "density": density}, base="base"
        )
        for name in SHAPES:
            delta = (one["a"][name] - base[name]).abs()
            threshold = delta.flatten().sort(descending=True).values[max(1, int(density * delta.numel())) - 1]
            clear = delta != threshold
            assert torch.equal(ours[name][clear], theirs[name][clear])
            assert int((ours[name] != base[name]).sum()) == int((theirs[name] != base[name]).sum())


def test_bf16_models_within_their_rounding(base: State, models: dict[str, State]) -> None:
    base = {name: value.bfloat16() for name, value in base.items()}
    rounded = {t: {name: value.bfloat16() for name, value in state.items()} for t, state in models.items()}
    parameters = {"weight": 1.0, "density": 1.0, "lambda": 0.5}
    agree(base, rounded, "ties", parameters, Ties(density=1.0, scale=0.5, **THEIRS), atol=0.04)
