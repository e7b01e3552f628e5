"""What a recipe may say: every unknown key is an error that names its place and the nearest spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_merge.errors import UserError
from lightning_merge.mergekit.grammar import parse_documents
from lightning_merge.mergekit.values import Reference

PLAIN = "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1}\n"
SLICED = """
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [2, 4]}
"""


def test_a_whole_recipe() -> None:
    (recipe,) = parse_documents(
        """
# a comment
merge_method: ties
base_model: hub/base@v1
slices:
  - sources:
      - {model: hub/base@v1, layer_range: [0, 2]}
      - {model: a+adapter, layer_range: ["2", 4.0], parameters: {weight: 0.3}}
    base_model: other
    parameters: {density: [0.1, 0.2]}
parameters: {normalize: true}
dtype: torch.bfloat16
out_dtype: float16
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <x>: {source: a}
    <y>: {source: {kind: zero}, force: true}
    <z>: {source: {kind: model_token, model: a, token_id: 3}}
chat_template: chatml
"""
    )
    part = recipe.modules[""].slices[0]
    assert recipe.base == Reference("hub/base", "v1") and part.base == Reference("other")
    assert part.sources[1].model == Reference("a", adapter="adapter") and part.sources[1].layers == (2, 4)
    assert (recipe.dtype, recipe.out_dtype, recipe.chat_template) == ("bfloat16", "float16", "chatml")
    assert recipe.tokenizer is not None and recipe.tokenizer.pad_to_multiple_of == 64
    assert [row.zero for row in recipe.tokenizer.tokens.values()] == [False, True, False]
    assert recipe.tokenizer.tokens["<z>"].token_id == 3
    assert "# a comment" in recipe.text
    assert [str(model) for model in recipe.references] == ["hub/base@v1", "other", "a+adapter"]


def test_a_reference_as_a_mapping() -> None:
    (recipe,) = parse_documents(
        "merge_method: linear\nmodels: [{model: {model: {path: a, revision: v2}, lora: b}, parameters: {weight: 1}}]\n"
    )
    assert recipe.references == (Reference("a", "v2", "b"),)
    assert str(recipe.references[0]) == "a@v2+b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PLAIN + "dtyppe: float16\n", "unknown key 'dtyppe'.*Did you mean 'dtype'"),
        (PLAIN.replace("parameters", "paramters"), r"'models\[0\]' has the unknown key 'paramters'.*'parameters'"),
        (SLICED.replace("layer_range: [0", "layer_rnge: [0"), r"slices\[0\].sources\[0\]' has the unknown key"),
        (SLICED + "    paramters: {}\n", r"'slices\[0\]' has the unknown key 'paramters'.*Did you mean 'parameters'"),
        (PLAIN + "tokenizer: {sorce: union}\n", "'tokenizer' has the unknown key 'sorce'.*'source'"),
        (PLAIN + "tokenizer: {tokens: {x: {source: a, forse: true}}}\n", "unknown key 'forse'"),
        (PLAIN + "tokenizer: {tokens: {x: {source: {kind: zeero}}}}\n", "'zeero'.*Did you mean 'zero'"),
        (PLAIN + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}\n", "either token or token_id"),
        (PLAIN + "tokenizer: {pad_to_multiple_of: 0}\n", "pad_to_multiple_of is 0"),
        (PLAIN + "tokenizer: {source: base}\ntokenizer_source: base\n", "both tokenizer and tokenizer_source"),
        (PLAIN + "parameters: {weight: [{filtre: x, value: 1}]}\n", r"weight\[0\]' has the unknown key 'filtre'"),
        (PLAIN + "parameters: {weight: [{filter: x}]}\n", r"weight\[0\] has no value"),
        (PLAIN + "parameters: {weight: [{filter: x, value: 1}, 0.5]}\n", r"weight\[1\] is 0.5 among rules"),
        (PLAIN + "parameters: {weight: }\n", "weight is None"),
        (PLAIN + "parameters: {weight: []}\n", r"weight is \[\]"),
        (PLAIN + "dtype: bfloat\n", "dtype is 'bfloat'.*Did you mean 'bfloat16'"),
        (PLAIN + "merge_method: ties\n", "'merge_method' stands twice"),
        (PLAIN + "slices: []\n" + SLICED.split("base\n", 1)[1], "'slices' stands twice"),
        (PLAIN + SLICED.split("base\n", 1)[1], "models and slices. Expected exactly one"),
        ("merge_method: linear\n", "none of them. Expected exactly one"),
        ("models: [{model: a}]\n", "names no merge_method"),
        ("merge_method: linear\nmodels: [{model: a}, {model: a}]\n", "lists the model 'a' twice"),
        ("merge_method: linear\nmodels: [{model: a+b+c}]\n", "more than one '\\+'"),
        ("merge_method: linear\nmodels: [{model: a@b@c}]\n", "more than one '@'"),
        ("merge_method: linear\nmodels: [{model: {model: a, override_architecture: X}}]\n", "not supported"),
        ("merge_method: linear\nmodels: a\n", "'?models'? is a text. Expected a list"),
        (SLICED.replace("[0, 2]", "[0, 1]"), "different numbers of layers"),
        (SLICED.replace("[0, 2]", "[2, 2]"), "holds no layer"),
        (SLICED.replace("[0, 2]", "[0]"), r"layer_range is \[0\]"),
        (SLICED.replace("[0, 2]", "[0, 1.5]"), "layer_range is"),
        (SLICED.replace("[0, 2]", "[-1, 1]"), "Expected 0 <= first"),
        ("gate_mode: hidden\nexperts: []\n", "'gate_mode' of mergekit-moe, which is not supported"),
        ("genome: {}\ntasks: []\n", "mergekit-evolve"),
        (PLAIN + "allow_crimes: true\n", "'allow_crimes', an option of mergekit's command line"),
        ("- a\n- b\n", "The recipe is a list"),
        ("", "No recipe at ''"),
        ("# nothing\n", "is empty"),
        ("a: [\n", "is no YAML"),
        ("no/such/file.yml", "No recipe at 'no/such/file.yml'"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_documents(text)


def test_several_documents_keep_their_own_text() -> None:
    first, second = parse_documents("name: one\n" + PLAIN + "---\n" + PLAIN)
    assert (first.name, second.name) == ("one", None)
    assert first.text.startswith("name: one") and "---" not in first.text + second.text


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(PLAIN)
    assert parse_documents(tmp_path / "recipe.yml") == parse_documents(str(tmp_path / "recipe.yml"))


def test_modules() -> None:
    (recipe,) = parse_documents(
        "merge_method: linear\nmodules:\n  text_decoder: {models: [{model: a}], parameters: {weight: 2}}\n"
    )
    assert recipe.modules["text_decoder"].whole and recipe.modules["text_decoder"].parameters == {"weight": 2}
    with pytest.raises(UserError, match="either slices or models"):
        parse_documents("merge_method: linear\nmodules: {default: {parameters: {weight: 1}}}\n")
    with pytest.raises(UserError, match=r"'modules.default' has the unknown key 'slice'"):
        parse_documents("merge_method: linear\nmodules: {default: {slice: []}}\n")


def test_what_mergekit_reads_and_never_uses_is_noted() -> None:
    (recipe,) = parse_documents(SLICED + "    residual_weight: 0.1\n")
    assert recipe.notes == ("slices[0]: residual_weight has no effect, here as in mergekit.",)
