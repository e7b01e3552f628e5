"""Settings that vary over models, depth and names: every tensor gets the number that was meant for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.methods import ByTensor, Dare, SimpleAverage, Svc, TaskArithmetic, Ties, WeightedAverage, WiseFT
from lightning_merge.methods.schedule import depths
from lightning_merge.recipe import as_config

NAMES = ["wte.weight", *(f"h.{layer}.{part}.weight" for layer in range(5) for part in ("attn", "mlp")), "ln_f.weight"]


@pytest.fixture
def vectors() -> TaskVectors:
    """Every task vector is 1 everywhere, so that a tensor of the merge shows its scale."""
    base = {name: torch.zeros(3) for name in NAMES}
    models = {model: {name: torch.ones(3) for name in NAMES} for model in ("cars", "sun")}
    return TaskVectors.open(base, models, check=False)


def shown(merged: dict[str, torch.Tensor]) -> dict[str, float]:
    assert all((value == value[0]).all() for value in merged.values())
    return {name: round(float(value[0]), 6) for name, value in merged.items()}


def test_a_list_is_linear_over_depth(vectors: TaskVectors) -> None:
    found = shown(Ties(density=1.0, scale=[0.2, 1.0])(vectors))
    assert [found[f"h.{layer}.mlp.weight"] for layer in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert found["wte.weight"] == 0.2, "embeddings lie before the first layer"
    assert found["ln_f.weight"] == 1.0, "the final norm lies behind the last"


def test_a_list_may_bend(vectors: TaskVectors) -> None:
    found = shown(Ties(density=1.0, scale=[0.0, 1.0, 0.0])(vectors))
    assert [found[f"h.{layer}.attn.weight"] for layer in range(5)] == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_the_first_rule_that_fits_counts(vectors: TaskVectors) -> None:
    rules = [{"tensors": r"^h\.1\.", "value": 0.1}, {"tensors": "attn", "value": [0.0, 0.8]}, {"value": 0.5}]
    found = shown(WiseFT(alpha=rules)(vectors.subset(["sun"])))
    assert (found["h.1.attn.weight"], found["h.1.mlp.weight"]) == (0.1, 0.1)
    assert (found["h.4.attn.weight"], found["h.4.mlp.weight"], found["wte.weight"]) == (0.8, 0.5, 0.5)


def test_models_vary_each_in_its_own_way(vectors: TaskVectors) -> None:
    scale = {"cars": [0.0, 4.0], "sun": [{"tensors": "mlp", "value": 10}, {"value": 0}]}
    found = shown(TaskArithmetic(scale=scale)(vectors))
    assert [found[f"h.{layer}.mlp.weight"] for layer in range(5)] == [10, 11, 12, 13, 14]
    assert [found[f"h.{layer}.attn.weight"] for layer in range(5)] == [0, 1, 2, 3, 4]


def test_by_tensor_names_each(vectors: TaskVectors) -> None:
    values = {name: float(number) for number, name in enumerate(NAMES)}
    assert shown(Ties(density=1.0, scale=ByTensor(values))(vectors)) == values
    with pytest.raises(UserError, match=r"Ties: scale has no value for the tensor 'ln_f.weight'"):
        Ties(scale=ByTensor(dict.fromkeys(NAMES[:-1], 1.0)))(vectors)


def test_transforms_and_methods_inside_others_vary_too(vectors: TaskVectors) -> None:
    dropped = [Dare(drop_rate=[{"tensors": "attn", "value": 0.0}, {"value": 0.999999}], rescale=False)]
    found = TaskArithmetic(scale=0.5)(vectors, transforms=dropped)
    assert all(float(found[name][0]) == (1.0 if "attn" in name else 0.0) for name in NAMES)
    inner = Svc(method=WeightedAverage(weights={"cars": [1.0, 0.0], "sun": [0.0, 1.0]}))(vectors)
    assert shown(inner) == dict.fromkeys(NAMES, 1.0)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (Ties, {"density": [0.1, 20]}, r"Ties: density must be in \(0, 1\], got 20. Did you mean 0.2"),
        (Ties, {"scale": []}, "Ties: scale is an empty list"),
        (Ties, {"scale": [{"tensor": "h", "value": 1}]}, r"unknown key 'tensor'.* Did you mean 'tensors'\?"),
        (Ties, {"scale": [{"tensors": "h"}]}, "Ties: scale has a rule without a value"),
        (Ties, {"scale": [{"tensors": "h[", "value": 1}]}, r"the pattern 'h\[', which is no regular expression"),
        (TaskArithmetic, {"scale": {"cars": ["x"], "sun": 1}}, "TaskArithmetic: scale must be in .*, got 'x'"),
    ],
)
def test_what_is_no_setting_is_refused_at_once(method: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**settings)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Ties(density=[0.1, 0.2]), "Ties: density varies over the tensors, but goes by the whole model here.*scope"),
        (Ties(scale=[{"tensors": "^h", "value": 1}]), "Ties: scale has no rule for the tensor 'wte.weight'.*last one"),
        (TaskArithmetic(scale={"car": [1, 2], "sun": 1}), "names the model 'car'.* Did you mean 'cars'"),
        (WeightedAverage(weights={"cars": [1, 1], "sun": [1, -1]}), "the weights sum to 0"),
    ],
)
def test_what_does_not_fit_the_models_is_refused_before_any_weight_is_read(
    method: Any, message: str, vectors: TaskVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TaskVectors, "view", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(UserError, match=message):
        method(vectors)


def test_depth_is_counted_for_each_stack_of_layers() -> None:
    names = ["encoder.layer.0.w", "encoder.layer.2.w", "decoder.block.0.w", "decoder.block.4.w", "lm_head.w", "embed.w"]
    assert depths(names) == dict(zip(names, [0.0, 1.0, 0.0, 1.0, 1.0, 0.0], strict=True))
    assert depths(["vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"]) == {
        "vit.embeddings.patch_embeddings.projection.weight": 0.0,
        "classifier.weight": 1.0,
    }
    assert depths(["only.0.w"]) == {"only.0.w": 0.0}


def test_depth_in_the_names_of_other_families() -> None:
    resnet = ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer3.1.conv2.weight", "layer4.0.conv1.weight"]
    assert list(depths([*resnet, "fc.weight"]).values()) == [0.0, 0.0, 0.25, 0.75, 1.0, 1.0]
    assert depths(["gpt_neox.embed_in.weight", "gpt_neox.layers.1.w", "embed_out.weight"]) == {
        "gpt_neox.embed_in.weight": 0.0,
        "gpt_neox.layers.1.w": 1.0,
        "embed_out.weight": 1.0,
    }
    clip = ["visual.ln_pre.weight", "visual.conv1.weight", "visual.transformer.resblocks.2.w", "visual.ln_post.weight"]
    assert list(depths(clip).values()) == [0.0, 0.0, 1.0, 1.0]
    assert depths(["shared.weight", "encoder.block.0.w"])["shared.weight"] == 0.0


def test_a_schedule_survives_its_recipe(vectors: TaskVectors) -> None:
    method = Ties(density=1.0, scale=ByTensor({name: 0.1 * number for number, name in enumerate(NAMES)}))
    again = Ties(**as_config(method)["init_args"])
    assert shown(again(vectors)) == shown(method(vectors))
    assert as_config(SimpleAverage()) == {"class_path": "SimpleAverage", "init_args": {}}
