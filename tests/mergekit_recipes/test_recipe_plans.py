"""Plans of recipes: which tensors of which models with which settings, from headers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recipe_models as made
import torch
from safetensors.torch import load_file

from lightning_merge.errors import UserError
from lightning_merge.mergekit import RecipePlan, read_recipe
from lightning_merge.mergekit.models import PlannedWeights, as_bytes
from lightning_merge.merging import merge_parts
from lightning_merge.methods.schedule import ByTensor
from lightning_merge.weights import save_safetensors

Plan = Callable[[str], list[RecipePlan]]
LINEAR = """merge_method: linear
models:
  - {model: ROOT/llama/a, parameters: {weight: 1}}
  - {model: ROOT/llama/b, parameters: {weight: 3}}
"""
TIES = """merge_method: ties
base_model: ROOT/llama/base
models:
  - {model: ROOT/llama/a, parameters: {weight: 1, density: 0.5}}
  - {model: ROOT/llama/c, parameters: {weight: 0.5}}
"""


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config_of(plan: RecipePlan) -> dict[str, Any]:
    return json.loads(as_bytes(plan.companions["config.json"]))


def setting(plan: RecipePlan, field: str) -> Any:
    """What the first part's method has in a field, by tensor."""
    value = getattr(plan.parts[0].method, field)
    return value.values if isinstance(value, ByTensor) else dict.fromkeys(plan.tensors, value)


# --- what is planned -------------------------------------------------------------------------------------------------


def test_a_plain_average(plan: Plan, root: Path) -> None:
    (made_plan,) = plan(LINEAR)
    a, b = stored(root / "llama/a"), stored(root / "llama/b")
    assert set(made_plan.tensors) == set(a) and len(made_plan.parts) == 1 and not made_plan.findings
    merged = made_plan.merge()
    for name, value in merged.items():
        torch.testing.assert_close(value, 0.25 * a[name] + 0.75 * b[name])
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(made_plan.companions)


def test_levels_filters_and_depth(plan: Plan) -> None:
    """Per source before slice before module before recipe; filters on the input's own name; 0 outside of layers."""
    (made_plan,) = plan(
        """merge_method: task_arithmetic
base_model: ROOT/llama/base
slices:
  - sources:
      - {model: ROOT/llama/base, layer_range: [0, 3]}
      - model: ROOT/llama/a
        layer_range: [1, 4]
        parameters: {weight: [{filter: layers.2.mlp, value: 9}]}
      - {model: ROOT/llama/b, layer_range: [0, 3]}
    parameters: {weight: [{filter: self_attn, value: [0, 1]}]}
parameters: {weight: 5, lambda: [1, 3]}
"""
    )
    weights, scale = setting(made_plan, "weights"), setting(made_plan, "scale")
    (a, b) = made_plan.parts[0].task_vectors.names
    # Layer 1 of the result is layer 2 of a, whose rule names it so.
    assert weights["model.layers.1.mlp.up_proj.weight"] == {a: 9, b: 5}
    assert weights["model.layers.2.mlp.up_proj.weight"] == 5
    assert weights["model.layers.1.self_attn.q_proj.weight"] == 0.5
    assert weights["model.layers.2.self_attn.q_proj.weight"] == 1
    assert weights["lm_head.weight"] == 5
    assert [scale[f"model.layers.{i}.input_layernorm.weight"] for i in range(3)] == [1, 2, 3]
    assert scale["model.embed_tokens.weight"] == scale["lm_head.weight"] == scale["model.norm.weight"] == 1
    assert config_of(made_plan)["num_hidden_layers"] == 3


def test_a_slice_with_a_base_of_its_own(plan: Plan, root: Path) -> None:
    """And a slice's value before the module's before the recipe's."""
    (made_plan,) = plan(
        """merge_method: task_arithmetic
base_model: ROOT/bert/base
modules:
  default:
    parameters: {weight: 2}
    slices:
      - sources:
          - {model: ROOT/bert/base, layer_range: [0, 1]}
          - {model: ROOT/bert/a, layer_range: [0, 1]}
      - base_model: ROOT/bert/b
        sources:
          - {model: ROOT/bert/a, layer_range: [1, 3]}
          - {model: ROOT/bert/b, layer_range: [1, 3]}
        parameters: {weight: 0.25}
parameters: {weight: 3}
"""
    )
    base, a, b = (stored(root / "bert" / name) for name in ("base", "a", "b"))
    merged = made_plan.merge()
    for layer, start, weight in ((0, base, 2.0), (2, b, 0.25)):
        name = f"bert.encoder.layer.{layer}.output.dense.weight"
        torch.testing.assert_close(merged[name], start[name] + weight * (a[name] - start[name]))


def test_one_layer_lies_at_the_end(plan: Plan) -> None:
    (made_plan,) = plan(
        """merge_method: passthrough
slices:
  - sources: [{model: ROOT/llama/a, layer_range: [2, 3]}]
parameters: {scale: [0.5, 2]}
"""
    )
    scale = setting(made_plan, "scale")
    assert (scale["model.layers.0.mlp.up_proj.weight"], scale["lm_head.weight"]) == (2, 0.5)


def test_stacked_layers(plan: Plan, root: Path) -> None:
    (made_plan,) = plan(
        """merge_method: passthrough
slices:
  - sources: [{model: ROOT/gpt2/a, layer_range: [0, 3]}]
  - sources: [{model: ROOT/gpt2/b, layer_range: [1, 3]}]
"""
    )
    a, b = stored(root / "gpt2/a"), stored(root / "gpt2/b")
    merged = made_plan.merge()
    assert torch.equal(merged["transformer.h.2.ln_1.weight"], a["transformer.h.2.ln_1.weight"])
    assert torch.equal(merged["transformer.h.3.ln_1.weight"], b["transformer.h.1.ln_1.weight"])
    assert torch.equal(merged["transformer.h.4.ln_1.weight"], b["transformer.h.2.ln_1.weight"])
    assert torch.equal(merged["transformer.wte.weight"], a["transformer.wte.weight"])
    assert torch.equal(merged["transformer.ln_f.weight"], b["transformer.ln_f.weight"])
    assert config_of(made_plan)["n_layer"] == 5 and "lm_head.weight" not in merged


def test_what_a_config_lists_by_layer_is_stacked_too(plan: Plan, root: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(root / "llama" / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["layer_types"] = [f"{name}{i}" for i in range(4)]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (made_plan,) = plan(
        f"""merge_method: passthrough
slices:
  - sources: [{{model: {tmp_path}/a, layer_range: [0, 2]}}]
  - sources: [{{model: {tmp_path}/b, layer_range: [1, 4]}}]
"""
    )
    assert config_of(made_plan)["layer_types"] == ["a0", "a1", "b1", "b2", "b3"]


def test_dtypes(plan: Plan, root: Path, tmp_path: Path) -> None:
    """Computed in ``dtype``, or the smallest that holds the inputs; stored in ``out_dtype``, and the config says so."""
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float16)):
        made.save(made.llama(), tmp_path / name, dtype=dtype)
    text = (
        f"merge_method: linear\nmodels:\n  - model: {tmp_path}/a\n  - model: {tmp_path}/b\nparameters: {{weight: 1}}\n"
    )
    for entries, computed, written in (
        ("", torch.float32, torch.float32),
        ("dtype: bfloat16\n", torch.bfloat16, torch.bfloat16),
        ("dtype: float64\nout_dtype: float16\n", torch.float64, torch.float16),
    ):
        (made_plan,) = plan(text + entries)
        assert made_plan.parts[0].task_vectors.info("lm_head.weight").dtype == computed
        assert {info.dtype for info in made_plan.tensors.values()} == {written}
        assert made_plan.merge()["lm_head.weight"].dtype == written
        assert config_of(made_plan)["dtype"] == str(written).removeprefix("torch.")


def test_an_adapter_stands_for_a_model_of_its_base_dtype(plan: Plan, root: Path) -> None:
    (made_plan,) = plan(
        """merge_method: linear
models:
  - {model: ROOT/llama/base+ROOT/lora, parameters: {weight: 1}}
"""
    )
    base, merged = stored(root / "llama/base"), made_plan.merge()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4)}


def test_a_tied_and_an_untied_model(plan: Plan, root: Path, tmp_path: Path) -> None:
    """The tied model's head is its embedding; the result has a head of its own, and its config says so."""
    made.save(made.llama(tie_word_embeddings=True), tmp_path / "tied", made.tokenizer())
    models = f"models: [{{model: {tmp_path}/tied}}, {{model: ROOT/llama/a}}]\n"
    (made_plan,) = plan(f"merge_method: linear\n{models}parameters: {{weight: 1}}\n")
    tied, free = stored(tmp_path / "tied"), stored(root / "llama/a")
    assert "lm_head.weight" not in tied
    expected = (tied["model.embed_tokens.weight"] + free["lm_head.weight"]) / 2
    torch.testing.assert_close(made_plan.merge()["lm_head.weight"], expected)
    assert config_of(made_plan)["tie_word_embeddings"] is False


def test_integers_are_copied(plan: Plan, root: Path, tmp_path: Path) -> None:
    for name, numbers in (("base", [1, 2]), ("a", [3, 4])):
        values = {"layers.0.weight": torch.ones(2), "counter": torch.tensor(numbers)}
        (tmp_path / name).mkdir()
        save_safetensors(values, tmp_path / name / "model.safetensors")
    text = (
        f"merge_method: slerp\nbase_model: {tmp_path}/base\nmodels: [{{model: {tmp_path}/a}}]\nparameters: {{t: 0.5}}\n"
    )
    (made_plan,) = plan(text)
    assert made_plan.merge()["counter"].tolist() == [1, 2]


def test_modules_that_are_left_out_come_from_the_base(plan: Plan, tmp_path: Path) -> None:
    names = ["vision_tower.encoder.layers.0.w", "model.layers.0.w", "model.embed_tokens.weight", "projector.w"]
    for name, value in (("base", 1.0), ("a", 3.0)):
        (tmp_path / name).mkdir()
        save_safetensors({key: torch.full((2,), value) for key in names}, tmp_path / name / "model.safetensors")
    (made_plan,) = plan(
        f"""merge_method: slerp
base_model: {tmp_path}/base
modules:
  text_decoder:
    slices:
      - sources:
          - {{model: {tmp_path}/base, layer_range: [0, 1]}}
          - {{model: {tmp_path}/a, layer_range: [0, 1]}}
parameters: {{t: 0.5}}
"""
    )
    merged = {name: float(value[0]) for name, value in made_plan.merge().items()}
    assert merged == dict(zip(names, (1.0, 2.0, 2.0, 1.0), strict=True))
    assert [finding.message.split(":")[0] for finding in made_plan.findings] == [
        "The recipe leaves out the module 'vision_tower'",
        "The recipe leaves out the module 'multi_modal_projector'",
    ]
    with pytest.raises(UserError, match="so that slices need a module"):
        plan(f"merge_method: passthrough\nslices: [{{sources: [{{model: {tmp_path}/a, layer_range: [0, 1]}}]}}]\n")
    with pytest.raises(UserError, match=r"no module 'text_decodr'.*Did you mean 'text_decoder'"):
        plan(f"merge_method: passthrough\nmodules: {{text_decodr: {{models: [{{model: {tmp_path}/a}}]}}}}\n")


# --- several documents -----------------------------------------------------------------------------------------------


def test_documents_run_in_the_order_they_need(plan: Plan, root: Path, tmp_path: Path) -> None:
    last = TIES.replace("ROOT/llama/c", "average")
    plans = plan(last + "---\nname: average\n" + LINEAR)
    assert [one.name for one in plans] == ["average", None]
    with pytest.raises(UserError, match="'average' has to be made before its weights are read"):
        plans[1].merge()
    for one in plans:
        folder = tmp_path / (one.name or "last")
        merge_parts(one.parts, folder, {"recipe": one.recipe}, dtype=one.dtype, companions=one.companions)
        one.planned.written(folder)
        assert all(torch.equal(value, stored(folder)[name]) for name, value in one.merge().items())


def test_documents_that_cannot_run(plan: Plan) -> None:
    with pytest.raises(UserError, match=r"circle \(p -> q -> p\)"):
        one, two = (f"name: {name}\n" + LINEAR.replace("ROOT/llama/a", other) for name, other in ("pq", "qp"))
        plan(one + "---\n" + two)
    with pytest.raises(UserError, match="Two documents are called 'one'"):
        plan("name: one\n" + LINEAR + "---\nname: one\n" + LINEAR)
    with pytest.raises(UserError, match="Two documents have no name"):
        plan(LINEAR + "---\n" + LINEAR)


def test_a_plan_is_not_told_of_other_weights(plan: Plan, root: Path) -> None:
    (made_plan,) = plan(LINEAR)
    with pytest.raises(UserError, match="does not hold the merge"):
        made_plan.planned.written(root / "gpt2/a")
    assert isinstance(made_plan.planned, PlannedWeights)


# --- what is refused, before a weight is read ------------------------------------------------------------------------


ONE_MORE = "  - {model: ROOT/llama/c, parameters: {weight: 3}}\n"
SECOND = "  - {model: ROOT/llama/c, parameters: {weight: 0.5}}\n"
STACKED = "merge_method: passthrough\nslices: [{sources: [{model: ROOT/llama/a, layer_range: [2, 5]}]}]\n"
BASE_APART = """merge_method: ties
base_model: ROOT/llama/base
slices: [{sources: [{model: ROOT/llama/a, layer_range: [0, 4]}]}]
parameters: {weight: 1}
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TIES.replace("ties", "tise"), r"Unknown merge_method 'tise'.*Did you mean 'ties'"),
        (TIES.replace("density", "densty"), r"unknown parameter 'densty'.*Did you mean 'density'"),
        (TIES + "parameters: {lamda: 2}\n", r"unknown parameter 'lamda'.*Did you mean 'lambda'"),
        (TIES.replace("weight: 0.5", "density: 0.5"), "has no 'weight' for the tensor"),
        (TIES.replace("base_model: ROOT/llama/base\n", ""), "ties needs a base_model, and models has none"),
        (TIES.replace("density: 0.5", "density: few"), r"models\[0\].parameters.density is 'few'. Expected a number"),
        (TIES.replace("ties", "slerp"), "slerp takes exactly 2 models, the base included; models has 3"),
        (TIES.replace("ties", "model_stock").replace(SECOND, ""), "model_stock takes at least 3 models"),
        (LINEAR.replace("linear", "nuslerp") + ONE_MORE, "exactly 2 models beside the base; models has 3"),
        (
            LINEAR + "base_model: ROOT/llama/base\n",
            r"takes the base_model for one of the models: .*base' has no 'weight'",
        ),
        (LINEAR.replace("weight: 3", "weight: -1"), "weights sum to 0"),
        (TIES.replace("ties", "della").replace("0.5}", "0.9}"), r"density - epsilon and density \+ epsilon"),
        (TIES.replace("density: 0.5", "density: 0"), r"density must be in \(0, 1\], got 0"),
        (TIES.replace("ROOT/llama/c", "ROOT/gpt2/a"), "gpt2/a' has no tensor"),
        (LINEAR.replace("ROOT/llama/b", "ROOT/llama/z"), "Nothing is at"),
        (LINEAR.replace("ROOT/llama/b", "ROOT/llama/b+ROOT/llama/a"), "adapter"),
        (
            LINEAR.replace("ROOT/llama/b", "ROOT/words/a"),
            r"\[32, 16\] in .*\[35, 16\] in .*vocabularies.*source: union",
        ),
        (LINEAR + "chat_template: chatlm\n", r"chat_template 'chatlm' is neither.*Did you mean 'chatml'"),
        (
            STACKED,
            r"slices\[0\].sources\[0\].layer_range is \[2, 5\], but '.*' has 4 layers. Expected at most \[0, 4\]",
        ),
        (BASE_APART, r"base_model '.*' is none of the sources of slices\[0\]"),
    ],
)
def test_what_is_refused(plan: Plan, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan(text)


def test_models_that_lack_tensors(plan: Plan, root: Path, tmp_path: Path) -> None:
    for name in ("model.layers.2.mlp.up_proj.weight", "model.norm.weight"):
        folder = tmp_path / name
        folder.mkdir()
        save_safetensors(
            {key: v for key, v in stored(root / "llama/a").items() if key != name}, folder / "model.safetensors"
        )
        with pytest.raises(UserError, match=f"has no tensor '{name.removeprefix('model.layers.2.')}'"):
            plan(LINEAR.replace("ROOT/llama/a", str(folder)))


def test_what_has_no_effect_is_said(plan: Plan) -> None:
    (made_plan,) = plan(
        TIES.replace("models:\n", "models:\n  - {model: ROOT/llama/base, parameters: {weight: 1}}\n")
        + "parameters: {gamma: 0.1, density: [{filter: mpl, value: 1}, {value: 0.5}]}\n"
    )
    said = [str(finding) for finding in made_plan.findings]
    assert said[0] == "WARN: parameters: 'gamma' has no effect on ties, here as in mergekit."
    assert "'weight' has no effect on the base model" in said[1]
    assert said[2] == "WARN: parameters.density: the filter 'mpl' fits no tensor."
    (made_plan,) = plan(TIES.replace("ties", "task_arithmetic") + "parameters: {int8_mask: true}\n")
    said = [str(finding) for finding in made_plan.findings]
    assert "'int8_mask' has no effect" in said[0] and "'density' has no effect on task_arithmetic" in said[1]
    (made_plan,) = plan(TIES.replace("weight: 0.5", "weight: 0.5, normalize: false"))
    assert "'normalize' has no effect under a model" in str(made_plan.findings[0])
    assert made_plan.parts[0].method.operation == "mean"  # type: ignore[attr-defined]


def test_tokenizers_that_differ_are_noted(plan: Plan, root: Path, tmp_path: Path) -> None:
    words = [*made.WORDS[:-2], made.WORDS[-1], made.WORDS[-2]]
    made.save(made.llama(), tmp_path / "swapped", made.tokenizer(words))
    (made_plan,) = plan(LINEAR.replace("ROOT/llama/b", str(tmp_path / "swapped")))
    assert "differ in 2 tokens" in str(made_plan.findings[0])


def test_configs_that_differ_are_noted(plan: Plan, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "llama/b", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    (made_plan,) = plan(LINEAR.replace("ROOT/llama/b", f"{tmp_path}/other"))
    assert "'model_type' is 'mistral' in" in str(made_plan.findings[0])


def test_the_engine_writes_what_memory_holds(plan: Plan, tmp_path: Path) -> None:
    (made_plan,) = plan(
        """merge_method: dare_ties
base_model: ROOT/llama/base
slices:
  - sources:
      - {model: ROOT/llama/base, layer_range: [0, 2]}
      - {model: ROOT/llama/a, layer_range: [0, 2]}
  - sources:
      - {model: ROOT/llama/base, layer_range: [1, 4]}
      - {model: ROOT/llama/b, layer_range: [1, 4]}
      - {model: ROOT/llama/base+ROOT/lora, layer_range: [1, 4]}
parameters: {weight: [0.2, 1], density: 0.5}
dtype: bfloat16
"""
    )
    out = tmp_path / "out"
    merge_parts(made_plan.parts, out, {}, seed=3, dtype=made_plan.dtype, companions=made_plan.companions)
    merged, held = made_plan.merge(seed=3), stored(out)
    assert set(merged) == set(held) and all(torch.equal(value, held[name]) for name, value in merged.items())
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 5


def test_a_file_and_its_text(root: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(LINEAR.replace("ROOT", str(root)))
    assert read_recipe(tmp_path / "recipe.yml")[0].recipe == (tmp_path / "recipe.yml").read_text()
