from __future__ import annotations

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
    assert "Did you mean 'layer.wieght'? Leave tensors out of the merge with --ignore REGEX." in found[0]
    assert "holds the tensor 'layer.wieght', which the base lacks (1 extra). Did you mean 'layer.weight'?" in found[1]
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


def test_shapes_must_agree_and_another_vocabulary_is_suggested() -> None:
    base = weights()
    larger = {**nudged(base, 1), "embedding.weight": torch.zeros(701, 400)}
    message = the_error(findings(base, larger))
    assert (
        "Tensor 'embedding.weight' has shape [701, 400] in model 'cars' (state dict) and [700, 400] in the base"
        in message
    )
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
    assert "(1 extra)" in the_error(findings(tmp_path / "base", copied))


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
