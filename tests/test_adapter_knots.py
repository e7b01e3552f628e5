"""Adapters merged in a basis they share, and settings that vary over the depth of their base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.adapters import merge_adapters
from lightning_merge.errors import UserError
from lightning_merge.methods import ByTensor, Dare, LwPTV, SimpleAverage, Svc, TaskArithmetic, Ties
from lightning_merge.weights import open_weights
from lightning_merge.weights.adapters import open_adapter

LAYERS = {"q_proj": 4, "o_proj": 6}
WIDTH = 8


def name_of(layer: int, end: str = "q_proj") -> str:
    return f"layers.{layer}.{end}.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Four layers with a q_proj, six with an o_proj: what adapters of q_proj update ends before the base does."""
    generator = torch.Generator().manual_seed(0)
    names = [name_of(layer, end) for end, count in LAYERS.items() for layer in range(count)]
    tensors = {name: torch.randn(WIDTH, WIDTH, generator=generator) for name in names}
    save_file(tensors, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def adapters(tmp_path: Path, base: Path) -> dict[str, Path]:
    """Two adapters of q_proj; what layer 0 and 1 learned is small."""
    made = {}
    for seed, model in enumerate(("a", "b"), start=1):
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for layer in range(LAYERS["q_proj"]):
            module = f"base_model.model.layers.{layer}.q_proj"
            size = (0.01, 0.02, 1.0, 2.0)[layer]
            factors[f"{module}.lora_A.weight"] = torch.randn(2, WIDTH, generator=generator)
            factors[f"{module}.lora_B.weight"] = size * torch.randn(WIDTH, 2, generator=generator)
        made[model] = tmp_path / model
        made[model].mkdir()
        save_file(factors, made[model] / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
        (made[model] / "adapter_config.json").write_text(json.dumps(config))
    return made


def updates(adapter: Path, base: Path) -> dict[str, Tensor]:
    source = open_adapter(adapter, base)
    return {name: source.delta(name) for name in source.modules}


def coordinates(base: Path, adapters: dict[str, Path]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """By the definition, from full matrices: U S, and each adapter's V_tᵀ, of every matrix."""
    parts = {model: updates(adapter, base) for model, adapter in adapters.items()}
    bases: dict[str, Tensor] = {}
    models: dict[str, dict[str, Tensor]] = {model: {} for model in adapters}
    for name in parts["a"]:
        left, values, right = torch.linalg.svd(torch.cat([part[name] for part in parts.values()], dim=1))
        kept = int((values > 1e-9 * values[0]).sum())
        bases[name] = left[:, :kept] * values[:kept]
        for model, held in zip(models, right[:kept].split(WIDTH, dim=1), strict=True):
            models[model][name] = held
    return bases, models


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6 * max(value.norm().item(), 1e-3))


# --- settings that vary over depth --------------------------------------------------------------------------------

OVER_DEPTH = [0.0, 1.0]
VARYING: dict[str, tuple[Any, list[Any], dict[str, Any]]] = {
    "exact": (TaskArithmetic(scale=OVER_DEPTH), [], {}),
    "truncated": (TaskArithmetic(scale=OVER_DEPTH), [], {"rank": 10}),
    "streamed": (TaskArithmetic(scale={"a": OVER_DEPTH, "b": 1.0}), [Dare(drop_rate=0)], {"rank": 10}),
    "ties": (Ties(scope="tensor", density=0.5, scale=OVER_DEPTH), [], {"rank": 10}),
    "ties-density": (Ties(scope="tensor", density=[0.1, 1.0]), [], {"rank": 10}),
    "transform": (TaskArithmetic(scale=0.5), [Dare(drop_rate=[0.0, 0.9])], {"rank": 10}),
    "refinement": (Svc(method=TaskArithmetic(scale=OVER_DEPTH)), [], {"rank": 10}),
}


@pytest.mark.parametrize("case", VARYING)
def test_a_setting_over_depth_goes_by_the_depth_of_the_whole_base(
    case: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Whichever of its tensors the adapters update: as the same merge of the full models, in fp64."""
    method, transforms, options = VARYING[case]
    merge_adapters(base, adapters, tmp_path / "out", method, transforms, seed=3, **options)
    source = open_weights(base)
    held = {name: source.read(name).double() for name in source.tensors}
    models = {
        model: {**held, **{name: held[name] + change for name, change in updates(adapter, base).items()}}
        for model, adapter in adapters.items()
    }
    full = method(TaskVectors.open(held, models, check=False), transforms, seed=3)
    found = updates(tmp_path / "out", base)
    check(found, {name: full[name] - held[name] for name in found})


def test_knots_too_goes_by_the_depth_of_the_whole_base(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    merge_adapters(base, adapters, tmp_path / "out", TaskArithmetic(scale=OVER_DEPTH), knots=True)
    parts = [updates(adapter, base) for adapter in adapters.values()]
    sums = {name_of(layer): layer / 5 * (parts[0][name_of(layer)] + parts[1][name_of(layer)]) for layer in range(4)}
    # o_proj has layers up to 5, and both number their layers together.
    check(updates(tmp_path / "out", base), sums)


@pytest.mark.parametrize("knots", [False, True])
def test_rules_need_only_fit_what_is_adapted(
    knots: bool, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    scales = {name_of(layer): 0.5 * layer for layer in range(4)}
    parts = [updates(adapter, base) for adapter in adapters.values()]
    expected = {name: scale * (parts[0][name] + parts[1][name]) for name, scale in scales.items()}
    merge_adapters(base, adapters, tmp_path / "named", TaskArithmetic(scale=ByTensor(scales)), knots=knots)
    check(updates(tmp_path / "named", base), expected)
    rules = [{"tensors": f"layers.{layer}.q_proj", "value": 0.5 * layer} for layer in range(4)]
    merge_adapters(base, adapters, tmp_path / "rules", TaskArithmetic(scale=rules), knots=knots)
    check(updates(tmp_path / "rules", base), expected)
    with pytest.raises(UserError, match=r"no rule for the tensor 'layers\.3\.q_proj"):
        merge_adapters(base, adapters, tmp_path / "none", TaskArithmetic(scale=rules[:3]), knots=knots)
    assert not (tmp_path / "none").exists()


# --- KnOTS --------------------------------------------------------------------------------------------------------


def test_knots_of_the_mean_is_the_mean(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    report = merge_adapters(base, adapters, tmp_path / "out", SimpleAverage(), knots=True)
    assert report.errors == {}
    parts = [updates(adapter, base) for adapter in adapters.values()]
    check(updates(tmp_path / "out", base), {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]})
    with pytest.raises(UserError, match="no rank"):
        merge_adapters(base, adapters, tmp_path / "both", knots=True, rank=3)


STEPS: dict[str, tuple[Any, list[Any]]] = {
    "ties-tensor": (Ties(density=0.3, scope="tensor", scale=1.0), []),
    "ties-model": (Ties(density=0.3, scope="model", scale=1.0), []),
    "pruned": (TaskArithmetic(scale=1.0), [LwPTV(eta=0.5)]),
    "refined": (Svc(method=Ties(density=0.3, scope="model")), []),
    "alone": (LwPTV(eta=0.5), []),
}


@pytest.mark.parametrize("case", STEPS)
def test_knots_merges_the_coordinates_in_all_matrices(
    case: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """A step that reaches over the model ranks over all of them, not in each matrix."""
    method, transforms = STEPS[case]
    merge_adapters(base, adapters, tmp_path / "out", method, transforms, knots=True)
    bases, models = coordinates(base, adapters)
    zeros = {name: torch.zeros_like(held) for name, held in models["a"].items()}
    merged = method(TaskVectors.open(zeros, models, check=False), transforms)
    check(updates(tmp_path / "out", base), {name: bases[name] @ merged[name] for name in bases})


def test_layers_are_pruned_under_knots(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Matrix by matrix there is one layer, of which none is half."""
    merge_adapters(base, adapters, tmp_path / "all", TaskArithmetic(scale=1.0), knots=True)
    merge_adapters(base, adapters, tmp_path / "half", TaskArithmetic(scale=1.0), [LwPTV(eta=0.5)], knots=True)
    whole, pruned = updates(tmp_path / "all", base), updates(tmp_path / "half", base)
    assert sum(not torch.allclose(whole[name], pruned[name], rtol=1e-5) for name in whole) >= 2


def test_adapters_that_read_one_square_matrix_in_two_ways_are_refused(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    path = adapters["b"] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": True}))
    with pytest.raises(UserError, match=r"'layers\.0\.q_proj' is ambiguous: .*differ in fan_in_fan_out.*model_type"):
        merge_adapters(base, adapters, tmp_path / "out")
