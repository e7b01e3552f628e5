"""mergekit's twenty names with their defaults, and the steps of ours that they become."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_merge.errors import UserError
from lightning_merge.mergekit.methods import METHODS, Settings, check_parameter_name, method_spec
from lightning_merge.mergekit.parameters import REQUIRED
from lightning_merge.methods import (
    ArceeFusion,
    Breadcrumbs,
    Dare,
    Della,
    Karcher,
    ModelStock,
    MultiSlerp,
    NearSwap,
    NuSlerp,
    Passthrough,
    Ram,
    RamPlus,
    Sce,
    Slerp,
    TaskArithmetic,
    Ties,
    WeightedAverage,
)

MK: Any = {"compat": "mergekit"}
HALF = {"a": 0.5, "b": 0.5}
# What each name is where a recipe gives no more than it must: weight 0.5, t 0.3.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "linear": (WeightedAverage(weights=HALF, **MK),),
    "slerp": (Slerp(t=0.3, **MK),),
    "nuslerp": (NuSlerp(weights=HALF, **MK),),
    "multislerp": (MultiSlerp(weights=HALF),),
    "karcher": (Karcher(10, 1e-5, **MK),),
    "task_arithmetic": (TaskArithmetic(1.0, 0.5, **MK),),
    "ties": (Ties(1.0, weights=0.5, **MK),),
    "dare_linear": (TaskArithmetic(1.0, 0.5, **MK), Dare(0.0, **MK)),
    "dare_ties": (Ties(1.0, operation="sum", weights=0.5, **MK), Dare(0.0, **MK)),
    "breadcrumbs": (TaskArithmetic(1.0, 0.5, **MK), Breadcrumbs(1.0, 0.01, **MK)),
    "breadcrumbs_ties": (Ties(1.0, operation="sum", weights=0.5, **MK), Breadcrumbs(1.0, 0.01, **MK)),
    "della": (Ties(1.0, weights=0.5, **MK), Della(1.0, 0.15, **MK)),
    "della_linear": (TaskArithmetic(1.0, 0.5, **MK), Della(1.0, 0.15, **MK)),
    "sce": (Sce(1.0, **MK),),
    "model_stock": (ModelStock(clamp=False, **MK),),
    "nearswap": (NearSwap(t=0.3),),
    "arcee_fusion": (ArceeFusion(),),
    "ram": (Ram(1e-5, **MK),),
    "ramplus_tl": (RamPlus(0.1, 0.2, 1e-5, **MK),),
    "passthrough": (Passthrough(),),
}


def built(name: str, **given: Any) -> tuple[Any, ...]:
    """The steps of a method whose other parameters are their defaults."""
    spec = METHODS[name]
    models = ("a",) if name == "passthrough" else ("a", "b")
    values = {p.name: given.get(p.name, p.default) for p in spec.parameters}
    required = {"weight": 0.5, "t": 0.3}
    values = {key: required[key] if value is REQUIRED else value for key, value in values.items()}
    shared = {p.name: values[p.name] for p in spec.parameters if p.scope == "shared"}
    by_model = {p.name: dict.fromkeys(models, values[p.name]) for p in spec.parameters if p.scope != "shared"}
    method, transforms = spec.build(Settings(shared, by_model))
    return (method, *transforms)


def test_there_are_twenty() -> None:
    assert set(DEFAULTS) == set(METHODS) and len(METHODS) == 20


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name: str) -> None:
    assert built(name) == DEFAULTS[name]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("linear", {"normalize": False}, (WeightedAverage(HALF, False, **MK),)),
        ("nuslerp", {"nuslerp_flatten": False}, (NuSlerp(HALF, "row", **MK),)),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, (NuSlerp(HALF, "column", **MK),)),
        ("nuslerp", {"nuslerp_row_wise": True}, (NuSlerp(HALF, **MK),)),
        ("multislerp", {"normalize_weights": False}, (MultiSlerp(HALF, False),)),
        ("task_arithmetic", {"normalize": True, "lambda": 2.0}, (TaskArithmetic(2.0, 0.5, True, **MK),)),
        ("task_arithmetic", {"density": 0.2, "rescale": True}, DEFAULTS["task_arithmetic"]),
        ("ties", {"density": 0.2, "rescale": True}, (Ties(0.2, weights=0.5, rescale=True, **MK),)),
        ("ties", {"density": 1.5, "normalize": False}, (Ties(1.0, operation="sum", weights=0.5, **MK),)),
        ("dare_linear", {"density": 0.25, "rescale": False}, (TaskArithmetic(1.0, 0.5, **MK), Dare(0.75, False, **MK))),
        (
            "breadcrumbs_ties",
            {"density": 0.5, "gamma": 0.1, "rescale": True, "lambda": 0.3},
            (
                Ties(1.0, 0.3, operation="sum", weights=0.5, **MK),
                Breadcrumbs(0.5, 0.1, rescale=True, **MK),
            ),
        ),
        (
            "della",
            {"density": 0.5, "epsilon": 0.1, "rescale": False},
            (Ties(1.0, weights=0.5, **MK), Della(0.5, 0.1, False, **MK)),
        ),
        ("sce", {"select_topk": 0.1}, (Sce(0.1, **MK),)),
        ("model_stock", {"filter_wise": True}, (ModelStock(False, True, **MK),)),
        ("passthrough", {"scale": 0.0}, (Passthrough(0.0),)),
    ],
)
def test_parameters(name: str, given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert built(name, **given) == expected


def test_models_keep_values_of_their_own() -> None:
    by_model = {"weight": {"a": 1.0, "b": 2.0}, "density": {"a": 0.5, "b": 0.5}}
    shared = {"lambda": 1.0, "normalize": True, "rescale": False, "int8_mask": True}
    method, _ = METHODS["ties"].build(Settings(shared, by_model))
    assert method == Ties(0.5, weights={"a": 1.0, "b": 2.0}, **MK)


def test_names_of_parameters() -> None:
    spec = method_spec("linear")
    assert check_parameter_name(spec, "weight", "parameters")
    assert not check_parameter_name(spec, "density", "parameters")
    with pytest.raises(UserError, match=r"parameters: unknown parameter 'wieght'. .* normalize, weight.*'weight'"):
        check_parameter_name(spec, "wieght", "parameters")
    with pytest.raises(UserError, match=r"Did you mean 'density'"):
        check_parameter_name(spec, "densities", "parameters")
