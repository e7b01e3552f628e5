from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import nudged, save_bert, save_finetuned, tiny_gpt2, weights

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.weights import Finding, find_incompatibilities, open_weights, save_safetensors


def findings(base: Any, *models: Any, ignore: tuple[str, ...] = (), sample: bool = True) -> list[Finding]:
    opened = {name: open_weights(model) for name, model in zip(("cars", "sun"), models, strict=False)}
    return find_incompatibilities(None if base is None else open_weights(base), opened, ignore, sample)


def without(state_dict: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state_dict.items() if name not in names}


def the_error(found: list[Finding]) -> str:
    errors = [finding.message for finding in found if finding.level == "ERROR"]
    assert len(errors) == 1, found
    return errors[0]


def test_fine_tunings_of_one_base_are_recognised() -> None:
    base = weights()
    found = findings(base, nudged(base, 1, 0.05), {**nudged(base, 2, 0.05), "layer.weight": base["layer.weight"]})
    assert [finding.level for finding in found] == ["INFO", "INFO"]
    assert "Model 'cars' plausibly shares the base: median relative distance 0.05" in str(found[0])
    assert "over 2 sampled tensors, 1 of them untouched" in found[1].message


def test_a_missing_tensor_is_named_with_the_nearest() -> None:
    base = weights()
    renamed = {("layer.wieght" if name == "layer.weight" else name): value for name, value in base.items()}
    found = [finding.message for finding in findings(base, nudged(renamed, 1)) if finding.level == "ERROR"]
    assert "Model 'cars' (state dict) lacks the tensor 'layer.weight' of the base (1 missing)." in found[0]
    assert "Did you mean 'layer.wieght'? Its shape is [8, 16] in the base. Leave tensors out of the merge" in found[0]
    assert "holds the tensor 'layer.wieght', which the base lacks (1 extra). Did you mean 'layer.weight'?" in found[1]
    assert "Its shape is [8, 16]." in found[1]
    assert the_error(findings(base, without(base, "layer.bias", "temperature"))).count("(2 missing)") == 1
    assert the_error(findings(without(base, "layer.bias"), nudged(base, 1))).count("(1 extra)") == 1


def test_ignored_tensors_are_not_compared() -> None:
    base = weights()
    assert not any(
        f.level == "ERROR" for f in findings(base, without(nudged(base, 1), "layer.bias"), ignore=("bias$",))
    )
    other = {**nudged(base, 1), "layer.weight": torch.zeros(9, 16), "head.weight": torch.zeros(2)}
    assert not any(f.level == "ERROR" for f in findings(base, other, ignore=(r"^layer\.w", "^head")))
    with pytest.raises(UserError, match=r"The pattern '\(' to ignore is no regular expression \(missing \)"):
        findings(base, other, ignore=("(",))


def test_shapes_must_agree() -> None:
    base = weights()
    message = the_error(findings(base, {**nudged(base, 1), "layer.weight": torch.zeros(9, 16)}))
    assert message.startswith("Tensor 'layer.weight' has shape [9, 16] in model 'cars' (state dict) and [8, 16] in the")
    assert (
        "(1 differ in shape). Expected equal shapes. The first axis differs: another vocabulary or number of" in message
    )
    wider = {**nudged(base, 1), "layer.weight": torch.zeros(8, 17), "layer.bias": torch.zeros(8, 1)}
    message = the_error(findings(base, wider))  # one message for a model, however many tensors
    assert "'layer.weight' has shape [8, 17]" in message and "(2 differ in shape)" in message
    assert "vocabulary" not in message
    assert "'temperature' has shape [1]" in the_error(
        findings(base, {**nudged(base, 1), "temperature": torch.zeros(1)})
    )


def test_dtypes_may_differ_in_precision_but_not_in_kind() -> None:
    base = weights()
    halved = {name: value.bfloat16() if value.is_floating_point() else value for name, value in nudged(base, 1).items()}
    warning = findings(base, halved)[0]
    assert warning.level == "WARN"
    assert warning.message.startswith("Model 'cars' is stored in bfloat16, the base in float32: differences below")
    message = the_error(findings(base, {**nudged(base, 1), "layer.bias": torch.zeros(8, dtype=torch.int64)}))
    assert "Tensor 'layer.bias' is int64 in model 'cars' and float32 in the base. Expected both floating" in message


def test_a_checkpoint_with_one_more_prefix_is_told_the_option(tmp_path: Path) -> None:
    base = weights()
    prefixed = {f"model.{name}": value for name, value in nudged(base, 1).items()}
    torch.save({"state_dict": prefixed}, tmp_path / "cars.ckpt")
    assert "Its names begin with 'model.': try --prefix 'model.'." in the_error(findings(base, tmp_path / "cars.ckpt"))
    opened = {"cars": open_weights(tmp_path / "cars.ckpt", prefix="model.")}
    assert not any(f.level == "ERROR" for f in find_incompatibilities(open_weights(base), opened))
    # A prefix can be dropped from checkpoints only: elsewhere the advice would lead nowhere.
    save_safetensors(prefixed, tmp_path / "cars.safetensors")
    message = the_error(findings(base, tmp_path / "cars.safetensors"))
    assert "Its names begin with 'model.'" in message and "try --prefix" not in message


def test_another_architecture_is_one_message(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    message = the_error(findings(save_bert(tmp_path / "bert"), tmp_path / "gpt2"))
    assert message == (
        f"Model 'cars' ({tmp_path / 'gpt2'}) has the architecture 'gpt2' and the base 'bert'. "
        "Expected fine-tunings of one pretrained model."
    )


def test_configs_that_differ_without_a_trace_in_the_shapes_are_warned_about(tmp_path: Path) -> None:
    base = save_bert(tmp_path / "bert")
    tuned = save_finetuned(tmp_path / "tuned", base, 1)
    assert [finding.level for finding in findings(base, tuned)] == ["INFO"]
    config = tuned / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 4'))
    found = findings(base, tuned)
    assert str(found[0]) == "WARN: config.json: 'num_attention_heads' is 4 in model 'cars' and 2 in the base."


def test_tied_weights_may_be_stored_once_or_twice_but_must_agree(tmp_path: Path) -> None:
    base, tuned = tiny_gpt2(0), tiny_gpt2(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01)
    base.save_pretrained(tmp_path / "base")  # holds the embedding only
    torch.save({"state_dict": tuned.state_dict()}, tmp_path / "tuned.ckpt")  # holds both names
    tuned.save_pretrained(tmp_path / "tuned")
    for reference in (base, tmp_path / "base", tmp_path / "tuned.ckpt"):
        for model in (tuned, tmp_path / "tuned", tmp_path / "tuned.ckpt"):
            assert not any(finding.level == "ERROR" for finding in findings(reference, model)), (reference, model)
    copied = {name: value.clone() for name, value in tuned.state_dict().items()}
    assert not any(finding.level == "ERROR" for finding in findings(base, copied))
    copied["lm_head.weight"] += 1
    message = the_error(findings(base, copied))
    assert (
        "'lm_head.weight' is tied to 'transformer.wte.weight' in the base but differs from it in model 'cars'"
        in message
    )
    message = the_error(findings(tmp_path / "base", copied))  # which ties the two by its config alone
    assert "'lm_head.weight' is tied to 'transformer.wte.weight' in the base but differs from it in model" in message
    assert "shapes [24, 16] and [24, 16]" in message and "tie_word_embeddings=False" in message
    copied["lm_head.weight"] = copied["transformer.wte.weight"].clone()
    assert not any(finding.level == "ERROR" for finding in findings(tmp_path / "base", copied))


def test_tied_weights_merge_the_same_however_they_are_stored(tmp_path: Path) -> None:
    from lightning_merge.methods import TaskArithmetic

    base, tuned = tiny_gpt2(0), tiny_gpt2(0)
    with torch.no_grad():
        tuned.transformer.wte.weight.mul_(1.1)
    base.save_pretrained(tmp_path / "base")
    torch.save({"state_dict": tuned.state_dict()}, tmp_path / "tuned.ckpt")
    merged = TaskArithmetic(scale=0.5)(TaskVectors.open(base, {"a": tmp_path / "tuned.ckpt"}))
    assert merged["lm_head.weight"] is merged["transformer.wte.weight"]
    torch.testing.assert_close(merged["lm_head.weight"], 1.05 * base.lm_head.weight.detach())
    base.load_state_dict(merged, strict=True)
    once = TaskArithmetic(scale=0.5)(TaskVectors.open(tmp_path / "base", {"a": tmp_path / "tuned.ckpt"}))
    assert torch.equal(once["transformer.wte.weight"], merged["lm_head.weight"]) and "lm_head.weight" not in once


def test_models_of_another_origin_are_warned_about() -> None:
    found = findings(weights(0), weights(1))
    assert found[0].level == "WARN"
    assert "Model 'cars' hardly shares its weights with the base (median relative distance 1." in found[0].message


def test_a_model_equal_to_its_base_is_warned_about() -> None:
    found = findings(weights(), weights(), nudged(weights(), 1))
    assert [finding.level for finding in found] == ["WARN", "INFO"]
    assert "Model 'cars' equals the base in every sampled tensor: nothing to merge there?" in found[0].message


def test_without_a_base_models_are_compared_to_the_first_by_name() -> None:
    base = weights()
    found = findings(None, nudged(base, 1, 0.05), without(base, "layer.bias"))
    assert "Model 'sun' (state dict) lacks the tensor 'layer.bias' of model 'cars'" in the_error(found)
    assert "Model 'sun' plausibly shares model 'cars'" in findings(None, base, nudged(base, 1))[0].message


def test_values_are_sampled_only_where_asked_and_where_headers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = open_weights(weights()), open_weights(nudged(weights(), 1))
    broken = open_weights(without(nudged(weights(), 1), "layer.bias"))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was read")

    for source in (base, tuned, broken):
        monkeypatch.setattr(source, "read", refuse)
    assert find_incompatibilities(base, {"cars": tuned}, sample=False) == []
    assert find_incompatibilities(base, {"cars": tuned, "sun": broken})[0].level == "ERROR"
    with pytest.raises(AssertionError):
        find_incompatibilities(base, {"cars": tuned})


def test_opening_task_vectors_refuses_errors_and_keeps_the_other_findings() -> None:
    base = weights()
    with pytest.raises(UserError, match=r"lacks the tensor 'layer.bias'"):
        TaskVectors.open(base, {"cars": without(base, "layer.bias")})
    assert [finding.level for finding in TaskVectors.open(base, {"cars": weights(1)}).findings] == ["WARN"]


# --- vocabularies and what is tied to them -----------------------------------------------------------------------


def language_model(tied: bool, vocabulary: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict with the names of a decoder; when tied, without an output layer."""
    generator = torch.Generator().manual_seed(seed)
    head = {} if tied else {"lm_head.weight": torch.randn(vocabulary, 4, generator=generator)}
    return {
        "model.embed_tokens.weight": torch.randn(vocabulary, 4, generator=generator),
        "model.layers.0.mlp.weight": torch.randn(4, 4, generator=generator),
        **head,
    }


def saved(folder: Path, tensors: dict[str, torch.Tensor], tokens: list[str] | None = None, **config: Any) -> Path:
    folder.mkdir()
    save_safetensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if tokens is not None:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        content = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": [{"id": 99, "content": "<end>"}]}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_another_vocabulary_is_named_with_both_sizes_the_tensors_and_the_remedies(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", language_model(tied=False))
    larger = saved(tmp_path / "larger", language_model(tied=False, vocabulary=26))
    message = the_error(findings(base, larger))
    assert message == (
        f"Tensor 'lm_head.weight' has shape [26, 4] in model 'cars' ({larger}) and [24, 4] in the base (2 differ in "
        "shape, and so does 'model.embed_tokens.weight'): their vocabularies have 26 and 24 entries. Expected equal "
        "shapes: leave these tensors out of the merge with --ignore "
        r"'^(lm_head\.weight|model\.embed_tokens\.weight)$', "
        "or give all models one vocabulary by a recipe with 'tokenizer: union'."
    )
    pattern = message.split("--ignore '")[1].split("'")[0]  # the advice can be followed
    assert not any(finding.level == "ERROR" for finding in findings(base, larger, ignore=(pattern,)))


@pytest.mark.parametrize(
    ("shapes", "another"),
    [
        ({"model.embed_tokens.weight": (26, 4)}, True),
        ({"transformer.wte.weight": (26, 4), "lm_head.bias": (26,)}, True),
        ({"bert.embeddings.word_embeddings.weight": (26, 4), "cls.predictions.bias": (26,)}, True),
        # Other widths, other tensors, or tables that grew differently are no matter of a vocabulary alone.
        ({"model.embed_tokens.weight": (26, 5)}, False),
        ({"model.embed_tokens.weight": (26, 4), "model.layers.0.mlp.weight": (26, 4)}, False),
        ({"model.embed_tokens.weight": (26, 4), "lm_head.weight": (27, 4)}, False),
        ({"bert.embeddings.position_embeddings.weight": (26, 4)}, False),
        ({"bert.embeddings.token_type_embeddings.weight": (26, 4)}, False),
        ({"transformer.wpe.weight": (26, 4)}, False),
        ({"classifier.weight": (26, 4)}, False),
        ({"encoder.layer.0.output.dense.weight": (26, 4)}, False),
    ],
)
def test_only_tables_of_tokens_are_taken_for_a_vocabulary(shapes: dict[str, tuple[int, ...]], another: bool) -> None:
    base = {name: torch.zeros(24, *shape[1:2] and (4,)) for name, shape in shapes.items()}
    model = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert ("tokenizer: union" in the_error(findings(base, model))) is another


def test_an_output_layer_that_the_config_ties_is_found_in_the_embedding(tmp_path: Path) -> None:
    from lightning_merge.methods import TaskArithmetic

    separate = language_model(tied=False)
    base = saved(tmp_path / "base", separate, tie_word_embeddings=False)
    tied = nudged(language_model(tied=True), 1)
    model = saved(tmp_path / "tied", tied, tie_word_embeddings=True)
    found = findings(base, model)
    assert not any(finding.level == "ERROR" for finding in found)
    assert (
        f"'lm_head.weight' is a tensor of its own in the base; model 'cars' ({model}) ties it to "
        "'model.embed_tokens.weight' by its config.json, and it is read from there." in [f.message for f in found]
    )
    assert any("'tie_word_embeddings' is True in model 'cars' and False in the base" in str(f) for f in found)
    merged = TaskArithmetic(scale=1.0)(TaskVectors.open(base, {"a": model}))
    torch.testing.assert_close(merged["lm_head.weight"], tied["model.embed_tokens.weight"])
    untied = saved(tmp_path / "untied", tied, tie_word_embeddings=False)  # where it is simply missing
    assert "lacks the tensor 'lm_head.weight' of the base (1 missing)." in the_error(findings(base, untied))
    for number, config in enumerate([{"text_config": {"tie_word_embeddings": True}}, {}]):  # older files leave it out
        folder = saved(tmp_path / str(number), tied, **config)
        assert not any(finding.level == "ERROR" for finding in findings(base, folder))
    inner = saved(tmp_path / "inner", tied, text_config={"tie_word_embeddings": False})
    assert "lacks the tensor 'lm_head.weight'" in the_error(findings(base, inner))
    assert "lacks the tensor 'lm_head.weight'" in the_error(findings(base, dict(tied)))  # no config ties it


def test_an_output_layer_of_another_vocabulary_is_no_match_for_the_embedding(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", language_model(tied=False))
    model = saved(tmp_path / "tied", language_model(tied=True, vocabulary=26), tie_word_embeddings=True)
    assert "their vocabularies have 26 and 24 entries" in the_error(findings(base, model))


def test_an_output_layer_of_its_own_may_only_copy_what_the_base_ties(tmp_path: Path) -> None:
    shared = language_model(tied=True)
    base = saved(tmp_path / "base", shared, tie_word_embeddings=True)
    tuned = nudged(shared, 1)
    copy = saved(tmp_path / "copy", {**tuned, "lm_head.weight": tuned["model.embed_tokens.weight"].clone()})
    assert not any(finding.level == "ERROR" for finding in findings(base, copy))
    last = tuned["model.embed_tokens.weight"].clone()
    last[-1, -1] += 1
    message = the_error(findings(base, saved(tmp_path / "own", {**tuned, "lm_head.weight": last})))
    assert message.startswith(
        "'lm_head.weight' is tied to 'model.embed_tokens.weight' in the base but differs from it in model 'cars' "
        f"({tmp_path / 'own'}), where they have the shapes [24, 4] and [24, 4]. Expected tied weights to stay equal: "
    )
    assert not any(f.level == "ERROR" for f in findings(base, tmp_path / "own", ignore=("lm_head",)))
    # Between models without a base the same holds, whichever comes first.
    assert "differs from it in model 'sun'" in the_error(findings(None, base, tmp_path / "own"))


def test_what_models_make_themselves_may_be_missing_or_extra() -> None:
    base = weights()
    made = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "embeddings.position_ids": torch.arange(4),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    for reference, model in ((base, {**nudged(base, 1), **made}), ({**base, **made}, nudged(base, 1))):
        assert [finding.level for finding in findings(reference, model)] == ["INFO"]
    # A bias of an attention layer is a weight like any other.
    assert "lacks the tensor 'h.0.attn.bias'" in the_error(findings({**base, "h.0.attn.bias": torch.ones(4)}, base))


TOKENS = ["<pad>", "good", "bad", "film"]


def test_tokenizers_that_number_their_tokens_differently_are_warned_about(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", language_model(tied=True), TOKENS)
    tuned = nudged(language_model(tied=True), 1)
    assert [f.level for f in findings(base, saved(tmp_path / "same", tuned, TOKENS))] == ["INFO"]
    swapped = saved(tmp_path / "swapped", tuned, ["<pad>", "bad", "good", "film"])
    found = findings(base, swapped)
    assert [finding.level for finding in found] == ["WARN", "INFO"]
    assert found[0].message == (
        f"tokenizer.json: 2 of 5 numbers stand for other tokens in model 'cars' ({swapped}) than in the base; the "
        "first is 1, 'bad' there and 'good' in the base. Tensor 'model.embed_tokens.weight' has shape [24, 4] in both. "
        "Merging would mix the rows of different tokens: leave the embedding out with --ignore REGEX, or use a recipe "
        "with 'tokenizer: union'."
    )
    # Of two sizes the shapes have told already.
    larger = saved(tmp_path / "larger", language_model(tied=True, vocabulary=26), TOKENS[::-1])
    assert [finding.level for finding in findings(base, larger)] == ["ERROR"]
    # The same numbers in another file, a token more, or no tokenizer at all.
    for number, edit in enumerate(["spaces", "more", "none"]):
        folder = saved(tmp_path / str(number), tuned, [*TOKENS, "new"] if edit == "more" else TOKENS)
        file = folder / "tokenizer.json"
        file.unlink() if edit == "none" else file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
        assert [finding.level for finding in findings(base, folder)] == ["INFO"], edit
    (tmp_path / "0" / "tokenizer.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"0/tokenizer.json' cannot be read \(KeyError: 'model'\). Expected the tokenizer"
    ):
        findings(base, tmp_path / "0")


def test_equal_tokenizers_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_merge.weights import compatibility

    base = saved(tmp_path / "base", language_model(tied=True), TOKENS)
    model = saved(tmp_path / "same", nudged(language_model(tied=True), 1), TOKENS)
    monkeypatch.setattr(compatibility, "tokens_by_id", None)
    assert [finding.level for finding in findings(base, model)] == ["INFO"]


def test_tokenizers_that_list_their_tokens_are_read(tmp_path: Path) -> None:
    for name, order in (("base", 1), ("model", -1)):
        tensors = language_model(tied=True) if name == "base" else nudged(language_model(tied=True), 1)
        folder = saved(tmp_path / name, tensors)
        unigram = {"type": "Unigram", "vocab": [[token, -1.0] for token in TOKENS[::order]]}
        (folder / "tokenizer.json").write_text(json.dumps({"model": unigram, "added_tokens": None}))
    found = findings(tmp_path / "base", tmp_path / "model")
    assert (
        "4 of 4 numbers stand for other tokens" in found[0].message and "'film' there and '<pad>'" in found[0].message
    )


# --- shards and dtypes -------------------------------------------------------------------------------------------


def sharded(folder: Path) -> Path:
    """Three shards and their index."""
    folder.mkdir()
    weight_map = {}
    for number, names in enumerate([("embedding.weight",), ("layer.weight", "layer.bias"), ("temperature",)], start=1):
        shard = f"model-{number:05d}-of-00003.safetensors"
        save_safetensors({name: weights()[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("there", [True, False])
def test_shards_that_the_index_leaves_out_are_named(tmp_path: Path, there: bool) -> None:
    base = sharded(tmp_path / "base")
    model = tmp_path / "model"
    shutil.copytree(base, model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    last = index["weight_map"].pop("temperature")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    if not there:
        (model / last).unlink()
    found = [str(finding) for finding in findings(base, model)]
    assert "lacks the tensor 'temperature' of the base (1 missing). Its shape is [] in the base." in found[0]
    assert found[1] == (
        f"WARN: 'model.safetensors.index.json' of model 'cars' ({model}) names 2 of 3 shards: '{last}' is missing from "
        f"it ({'lies there, too' if there else 'is not there, either'}). Expected an index of all shards."
    )
    # The base is looked at, too.
    assert any("of the base" in str(finding) and "names 2 of 3" in str(finding) for finding in findings(model, base))


def test_damaged_shards_are_named_when_they_are_opened(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors' is truncated: its header announces \d+"):
        open_weights(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors"):
        open_weights(folder)


def test_a_mix_of_dtypes_names_a_tensor() -> None:
    base = weights()
    mixed = {**nudged(base, 1), "layer.weight": base["layer.weight"].half(), "layer.bias": base["layer.bias"].half()}
    found = findings(base, mixed)
    assert str(found[0]) == (
        "WARN: Tensor 'layer.weight' is stored in float16 in model 'cars' and in float32 in the base "
        "(2 of 5 tensors differ in dtype): differences below the coarser rounding are lost."
    )
    # Mixed alike is no mix.
    halved = {**base, "layer.weight": base["layer.weight"].half(), "layer.bias": base["layer.bias"].half()}
    assert [finding.level for finding in findings(halved, mixed)] == ["INFO"]
    # The same set of dtypes on other tensors is one.
    crossed = {**nudged(base, 1), "embedding.weight": base["embedding.weight"].half()}
    assert "Tensor 'embedding.weight' is stored in float16" in findings(halved, crossed)[0].message
