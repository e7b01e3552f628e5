"""Which row of which model's embedding each token gets, against a plain loop over the tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import recipe_models as made
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from lightning_merge.errors import UserError
from lightning_merge.mergekit import RecipePlan
from lightning_merge.mergekit.models import as_bytes

Plan = Callable[[str], list[RecipePlan]]
Vocabulary = dict[str, int]
EMBEDDING = "model.embed_tokens.weight"


def held(root: Path, names: str) -> dict[str, tuple[Vocabulary, Tensor]]:
    """Vocabulary and embedding of each model."""
    folders = {name: root / "words" / name for name in names.split()}
    return {
        name: (AutoTokenizer.from_pretrained(path).get_vocab(), load_file(path / "model.safetensors")[EMBEDDING])
        for name, path in folders.items()
    }


def written(plan: RecipePlan, folder: Path) -> Vocabulary:
    """Write the tokenizer of a plan and read it again."""
    folder.mkdir()
    for name, content in plan.companions.items():
        (folder / name).write_bytes(as_bytes(content))
    return AutoTokenizer.from_pretrained(folder).get_vocab()


def expected_row(token: str, models: dict[str, tuple[Vocabulary, Tensor]], name: str, base: str | None) -> Tensor:
    """A model's own row; else the base's, its sole owner's, the mean of its owners', or zeros."""
    owners = {other: rows[words[token]] for other, (words, rows) in models.items() if token in words}
    if name in owners:
        return owners[name]
    if len(owners) > 1 and base in owners:
        return owners[base]
    return torch.stack(list(owners.values())).mean(0) if owners else torch.zeros(16)


RECIPE = """merge_method: linear
models:
  - {model: ROOT/words/a, parameters: {weight: 1}}
  - {model: ROOT/words/b, parameters: {weight: 2}}
"""
WITH_BASE = """merge_method: task_arithmetic
base_model: ROOT/words/base
models:
  - {model: ROOT/words/a, parameters: {weight: 1}}
  - {model: ROOT/words/b, parameters: {weight: 2}}
"""
THREE = RECIPE + "  - {model: ROOT/words/base, parameters: {weight: 3}}\n"


def test_a_union_without_a_base(plan: Plan, root: Path, tmp_path: Path) -> None:
    (made_plan,) = plan(THREE + "tokenizer: {source: union, pad_to_multiple_of: 16}\n")
    models, words = held(root, "a b base"), written(made_plan, tmp_path / "out")
    assert set(words) == {word for vocabulary, _ in models.values() for word in vocabulary}
    # The first model's numbers stay; new tokens follow, special ones last.
    assert all(words[token] == number for token, number in models["a"][0].items())
    assert sorted(words, key=lambda token: words[token])[-2:] == ["y1", "<|im_start|>"]
    merged = made_plan.merge()[EMBEDDING]
    assert merged.shape == (48, 16) and len(words) == 37
    for token, number in words.items():
        rows = [expected_row(token, models, name, None) for name in models]
        torch.testing.assert_close(merged[number], (rows[0] + 2 * rows[1] + 3 * rows[2]) / 6)
    torch.testing.assert_close(merged[37:], merged[:37].mean(0).expand(11, 16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 48


def test_a_base_fills_what_others_lack(plan: Plan, root: Path, tmp_path: Path) -> None:
    (made_plan,) = plan(WITH_BASE + "tokenizer_source: union\n")
    models, words = held(root, "a b base"), written(made_plan, tmp_path / "out")
    merged = made_plan.merge()[EMBEDDING]
    for token, number in words.items():
        a, b, base = (expected_row(token, models, name, "base") for name in models)
        torch.testing.assert_close(merged[number], base + (a - base) + 2 * (b - base))


def test_the_tokens_of_the_base(plan: Plan, root: Path) -> None:
    """The tokenizer's files are copied, byte for byte."""
    (made_plan,) = plan(WITH_BASE + "tokenizer: {source: base}\n")
    folder = root / "words" / "base"
    assert made_plan.companions["tokenizer.json"] == folder / "tokenizer.json"
    models = held(root, "a b base")
    merged = made_plan.merge()["model.embed_tokens.weight"]
    assert merged.shape == models["base"][1].shape
    a, b, base = (expected_row("w7", models, name, "base") for name in models)
    torch.testing.assert_close(merged[models["base"][0]["w7"]], base + (a - base) + 2 * (b - base))


def test_another_models_tokens(plan: Plan, root: Path) -> None:
    (made_plan,) = plan(RECIPE + "tokenizer: {source: ROOT/words/base}\n")
    models = held(root, "a b base")
    merged = made_plan.merge()[EMBEDDING]
    assert merged.shape == (32, 16)
    rows = [models[name][1][models[name][0]["w3"]] for name in "ab"]
    torch.testing.assert_close(merged[models["base"][0]["w3"]], (rows[0] + 2 * rows[1]) / 3)


def test_rows_that_the_recipe_names(plan: Plan, root: Path, tmp_path: Path) -> None:
    (made_plan,) = plan(
        THREE
        + """tokenizer:
  source: ROOT/words/a
  tokens:
    x1: {source: {kind: zero}}
    w3: {source: {kind: model_token, model: ROOT/words/base, token: w4}, force: true}
    "<|im_end|>": {source: {kind: model_token, model: ROOT/words/b, token_id: 5}}
    new: {source: {kind: model_token, model: ROOT/words/a, token: w7}}
"""
    )
    models, words = held(root, "a b base"), written(made_plan, tmp_path / "out")
    merged = made_plan.merge()[EMBEDDING]
    a, b, base = (models[name][1] for name in ("a", "b", "base"))
    ids = models["a"][0]
    torch.testing.assert_close(merged[words["x1"]], a[ids["x1"]] / 6)  # the others lack it
    torch.testing.assert_close(merged[words["w3"]], base[models["base"][0]["w4"]])  # forced on all
    torch.testing.assert_close(merged[words["<|im_end|>"]], (a[ids["<|im_end|>"]] + 5 * b[5]) / 6)
    torch.testing.assert_close(merged[words["new"]], a[ids["w7"]])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("source: ROOT/words/a\n  tokens: {q: {source: ROOT/llama/a}}", "has no part in the embedding"),
        (
            "tokens: {q: {source: {kind: model_token, model: ROOT/words/a, token: w33}}}",
            r"'ROOT/words/a' has no token 'w33'. Did you mean 'w23'",
        ),
        (
            "tokens: {q: {source: {kind: model_token, model: ROOT/words/a, token_id: 35}}}",
            "has 35 rows, none with the number 35",
        ),
    ],
)
def test_rows_that_are_not_there(plan: Plan, root: Path, entry: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("ROOT", str(root)).replace("'w23'", r"'w\d+'")):
        plan(THREE + f"tokenizer:\n  {entry}\n")


def test_equal_vocabularies_pass_through(plan: Plan, root: Path) -> None:
    (made_plan,) = plan(RECIPE.replace("words", "llama") + "tokenizer: {source: union}\n")
    view = made_plan.parts[0].task_vectors.models[f"{root}/llama/a"]
    assert type(view.entries[EMBEDDING]).__name__ == "StoredTensor"
    assert made_plan.companions["tokenizer.json"] == root / "llama" / "a" / "tokenizer.json"


def test_a_tied_head_follows_its_embedding(plan: Plan, root: Path, tmp_path: Path) -> None:
    words = [*made.WORDS[:3], *Random(1).sample(made.WORDS[3:], 29)]
    made.save(made.gpt2(), tmp_path / "mixed", made.tokenizer(words))
    (made_plan,) = plan(
        "merge_method: linear\nmodels:\n  - {model: ROOT/gpt2/base, parameters: {weight: 0}}\n"
        f"  - {{model: {tmp_path}/mixed, parameters: {{weight: 1}}}}\ntokenizer: {{source: ROOT/gpt2/base}}\n"
    )
    rows = load_file(tmp_path / "mixed" / "model.safetensors")["transformer.wte.weight"]
    merged = made_plan.merge()["transformer.wte.weight"]
    assert torch.equal(merged[made.WORDS.index("w5")], rows[words.index("w5")])


def test_tokens_without_rows_are_left_out_of_a_union(plan: Plan, root: Path, tmp_path: Path) -> None:
    """A token that was added to a tokenizer, but to no embedding."""
    made.save(made.llama(), tmp_path / "padded", made.tokenizer(special=["[PAD]"]))
    recipe = RECIPE.replace("ROOT/words/a", str(tmp_path / "padded"))
    (made_plan,) = plan(recipe + "tokenizer: {source: union}\n")
    words = written(made_plan, tmp_path / "out")
    assert "[PAD]" not in words and len(words) == 35
    assert made_plan.merge()[EMBEDDING].shape == (35, 16)


def test_pairs_without_rows_are_left_out_too(plan: Plan, root: Path, tmp_path: Path) -> None:
    """A vocabulary of byte pairs that goes beyond the rows loses the pairs that would make those tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *"abc", *(f"w{i}" for i in range(25)), "ab", "abc"]
    pairs = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("a", "b"), ("ab", "c")], unk_token="<unk>")
    )
    made.save(made.llama(), tmp_path / "long", PreTrainedTokenizerFast(tokenizer_object=pairs, unk_token="<unk>"))
    recipe = RECIPE.replace("ROOT/words/a", str(tmp_path / "long")).replace("ROOT/words/b", "ROOT/llama/a")
    (made_plan,) = plan(recipe + "tokenizer: {source: union}\n")
    assert "abc" not in written(made_plan, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("abc") == ["ab", "c"]
    made.save(made.llama(vocabulary=31), tmp_path / "whole", made.tokenizer())
    with pytest.raises(
        UserError, match=r"The WordLevel tokenizer of '.*' has 1 tokens \('w28', ...\) beyond the model's 31"
    ):
        plan(RECIPE.replace("ROOT/words/a", str(tmp_path / "whole")) + "tokenizer: {source: union}\n")


def test_tokens_that_nobody_has_get_zeros(plan: Plan, root: Path, tmp_path: Path) -> None:
    made.save(made.llama(), tmp_path / "padded", made.tokenizer(special=["[PAD]"]))
    (made_plan,) = plan(RECIPE + f"tokenizer: {{source: {tmp_path}/padded}}\n")
    assert "1 tokens ('[PAD]') are in no model" in str(made_plan.findings[0])
    assert not made_plan.merge()[EMBEDDING][32].any()


def test_a_model_without_a_tokenizer(plan: Plan, root: Path, tmp_path: Path) -> None:
    made.save(made.llama(1), tmp_path / "bare")
    recipe = RECIPE.replace("words", "llama").replace("ROOT/llama/b", f"{tmp_path}/bare")
    (made_plan,) = plan(recipe + "tokenizer_source: union\n")
    assert "holds no tokenizer" in str(made_plan.findings[0])
    with pytest.raises(UserError, match="holds no tokenizer, which the recipe's tokenizer entry needs"):
        plan(RECIPE.replace("ROOT/words/a", f"{tmp_path}/bare") + "tokenizer_source: union\n")


def test_the_template_of_most_models(plan: Plan, root: Path) -> None:
    (made_plan,) = plan(WITH_BASE + "tokenizer_source: base\nchat_template: auto\n")
    assert "message['content']" in as_bytes(made_plan.companions["chat_template.jinja"]).decode()
    (made_plan,) = plan(WITH_BASE + "tokenizer_source: base\nchat_template: '{{ messages }}'\n")
    assert made_plan.companions["chat_template.jinja"] == "{{ messages }}"
    (made_plan,) = plan(WITH_BASE + "tokenizer_source: base\n")
    assert "chat_template.jinja" not in made_plan.companions
