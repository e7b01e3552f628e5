"""Do these models fit together? Findings from headers and configs, and from a small sample of values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_merge.errors import UserError, nearest
from lightning_merge.weights.source import WeightSource

# Independently initialised weights lie at a relative distance of about sqrt(2); fine-tuning stays far below 1.
UNRELATED_DISTANCE = 1.0
SAMPLED_TENSORS = 12
SAMPLED_ENTRIES = 1 << 14
# Entries of config.json that say what a tensor means without changing its shape.
CONFIG_KEYS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rope_theta",
    "vocab_size",
    "layer_norm_eps",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Finding:
    """One thing to know before a merge: an ERROR stops it, a WARN may spoil it, an INFO reassures."""

    level: Literal["ERROR", "WARN", "INFO"]
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.message}"


def ignored(name: str, ignore: Sequence[str]) -> bool:
    """Tell whether one of the patterns is found in ``name``.

    Raises:
        UserError: A pattern is no regular expression.
    """
    for pattern in ignore:
        try:
            if re.search(pattern, name):
                return True
        except re.error as error:
            raise UserError(
                f"The pattern '{pattern}' to ignore is no regular expression ({error}). "
                "Expected one such as 'classifier' or 'head[.]weight'."
            ) from error
    return False


def counterpart(reference: WeightSource, name: str, model: WeightSource) -> str | None:
    """Return the name under which ``model`` stores a tensor of ``reference``: its own, or one it is tied to there."""
    names = [name, *(alias for alias, owner in reference.aliases.items() if owner == name)]
    return next((stored for known in names if (stored := model.stored_name(known)) is not None), None)


def find_incompatibilities(
    base: WeightSource | None, models: Mapping[str, WeightSource], ignore: Sequence[str] = (), sample: bool = True
) -> list[Finding]:
    """List what speaks against merging these models, most serious first.

    Args:
        base: The pretrained model, or ``None`` for methods that need none; the first model by name is then compared to.
        models: The fine-tuned models by name.
        ignore: Patterns of tensors that stay out of the merge.
        sample: Also read a few thousand entries of some tensors, to judge whether the models share the base.

    Cost: headers and configs; with ``sample`` at most 12 x 16,384 entries a model.
    """
    names = sorted(models)
    reference, called = (base, "the base") if base is not None else (models[names[0]], f"model '{names[0]}'")
    findings: list[Finding] = []
    for name in names:
        if models[name] is not reference:
            findings += _compare_headers(reference, called, name, models[name], ignore)
            findings += _compare_configs(reference, called, name, models[name])
    if sample and not any(finding.level == "ERROR" for finding in findings):
        for name in names:
            if models[name] is not reference:
                findings += _compare_values(reference, called, name, models[name], ignore)
    order = {"ERROR": 0, "WARN": 1, "INFO": 2}
    return sorted(findings, key=lambda finding: order[finding.level])


def _compare_headers(
    reference: WeightSource, called: str, name: str, model: WeightSource, ignore: Sequence[str]
) -> list[Finding]:
    """Compare names, shapes, dtypes and tied weights of one model with the reference."""
    findings = []
    remedy, prefixed = "Leave tensors out of the merge with --ignore REGEX.", ""
    kinds = [(source.config or {}).get("model_type") for source in (reference, model)]
    if None not in kinds and kinds[0] != kinds[1] and set(reference.tensors) != set(model.tensors):
        return [
            Finding(
                "ERROR",
                f"Model '{name}' ({model.label}) has the architecture '{kinds[1]}' and {called} '{kinds[0]}'. "
                "Expected fine-tunings of one pretrained model.",
            )
        ]
    missing = [key for key in reference.tensors if not ignored(key, ignore) and not counterpart(reference, key, model)]
    if missing:
        prefixed = _prefix_hint(missing[0], model)
        hint = prefixed or nearest(missing[0], model.tensors)
        findings.append(
            Finding(
                "ERROR",
                f"Model '{name}' ({model.label}) lacks the tensor '{missing[0]}' of {called} "
                f"({len(missing)} missing).{hint} {remedy}",
            )
        )
    known = {reference.stored_name(key) for key in model.tensors} | set(reference.tensors)
    tied = {owner for alias, owner in model.aliases.items() if alias in reference.tensors}
    extra = [
        key
        for key in model.tensors
        if key not in known and key not in reference.aliases and key not in tied and not ignored(key, ignore)
    ]
    if extra and not prefixed:  # another prefix has been said already
        findings.append(
            Finding(
                "ERROR",
                f"Model '{name}' ({model.label}) holds the tensor '{extra[0]}', which {called} lacks "
                f"({len(extra)} extra).{nearest(extra[0], reference.tensors)} {remedy}",
            )
        )
    common = {
        key: (info, model.tensors[stored])
        for key, info in reference.tensors.items()
        if (stored := counterpart(reference, key, model)) is not None and not ignored(key, ignore)
    }
    reshaped = [key for key, (info, other) in common.items() if other.shape != info.shape]
    if reshaped:
        info, other = common[reshaped[0]]
        advice = ""
        if info.shape and other.shape and info.shape[1:] == other.shape[1:]:
            advice = " The first axis differs: another vocabulary or number of classes?"
        findings.append(
            Finding(
                "ERROR",
                f"Tensor '{reshaped[0]}' has shape {list(other.shape)} in model '{name}' ({model.label}) and "
                f"{list(info.shape)} in {called} ({len(reshaped)} differ in shape). "
                f"Expected equal shapes.{advice} {remedy}",
            )
        )
    for key, (info, other) in common.items():
        if other.dtype.is_floating_point != info.dtype.is_floating_point:
            findings.append(
                Finding(
                    "ERROR",
                    f"Tensor '{key}' is {_listed({other.dtype})} in model '{name}' and {_listed({info.dtype})} in "
                    f"{called}. Expected both floating point or both integer.",
                )
            )
            break
    dtypes = {info.dtype for info in model.tensors.values() if info.dtype.is_floating_point}
    reference_dtypes = {info.dtype for info in reference.tensors.values() if info.dtype.is_floating_point}
    if dtypes != reference_dtypes and not findings:
        findings.append(
            Finding(
                "WARN",
                f"Model '{name}' is stored in {_listed(dtypes)}, {called} in {_listed(reference_dtypes)}: "
                "differences below the coarser rounding are lost.",
            )
        )
    untied = [alias for alias in reference.aliases if alias in model.tensors and not ignored(alias, ignore)]
    for alias in untied:
        owner = model.stored_name(reference.aliases[alias])
        if owner is not None and not torch.equal(model.read(alias), model.read(owner)):
            findings.append(
                Finding(
                    "ERROR",
                    f"'{alias}' is tied to '{reference.aliases[alias]}' in {called} but differs from it in "
                    f"model '{name}'. Expected tied weights to stay equal. {remedy}",
                )
            )
    return findings


def _prefix_hint(missing: str, model: WeightSource) -> str:
    """Recognise a model whose names carry one more prefix; only those of checkpoints can be dropped while reading."""
    for key in model.tensors:
        if key.endswith("." + missing):
            prefix = model.prefix + key.removesuffix(missing)
            checkpoint = any(file.suffix != ".safetensors" for file in model.files)
            return f" Its names begin with '{prefix}'" + (f": try --prefix '{prefix}'." if checkpoint else ".")
    return ""


def _compare_configs(reference: WeightSource, called: str, name: str, model: WeightSource) -> list[Finding]:
    """Compare the entries of config.json that shapes do not show."""
    expected, found = reference.config, model.config
    if expected is None or found is None:
        return []
    return [
        Finding(
            "WARN",
            f"config.json: '{key}' is {found.get(key)!r} in model '{name}' and {expected.get(key)!r} in {called}.",
        )
        for key in CONFIG_KEYS
        if key in expected and key in found and expected[key] != found[key]
    ]


def _compare_values(
    reference: WeightSource, called: str, name: str, model: WeightSource, ignore: Sequence[str]
) -> list[Finding]:
    """Judge from a sample whether a model plausibly was fine-tuned from the reference."""
    candidates = [
        key
        for key, info in reference.tensors.items()
        if info.dtype.is_floating_point and len(info.shape) >= 2 and info.numel and not ignored(key, ignore)
    ]
    if not candidates:
        return []
    step = max(1, len(candidates) // SAMPLED_TENSORS)
    distances, untouched = [], 0
    for key in candidates[::step][:SAMPLED_TENSORS]:
        stored = counterpart(reference, key, model)
        if stored is None:
            continue
        expected = reference.read(key).reshape(-1)[:SAMPLED_ENTRIES].cpu().double()
        difference = model.read(stored).reshape(-1)[:SAMPLED_ENTRIES].cpu().double() - expected
        untouched += int(not difference.any())
        scale = expected.norm().item()
        distances.append(difference.norm().item() / scale if scale else 0.0)
    distance = sorted(distances)[len(distances) // 2]
    measured = (
        f"median relative distance {distance:.2g} over {len(distances)} sampled tensors, {untouched} of them untouched"
    )
    if untouched == len(distances):
        return [Finding("WARN", f"Model '{name}' equals {called} in every sampled tensor: nothing to merge there?")]
    if not distance <= UNRELATED_DISTANCE:
        return [
            Finding(
                "WARN",
                f"Model '{name}' hardly shares its weights with {called} ({measured}). "
                "Expected fine-tunings of one pretrained model.",
            )
        ]
    return [Finding("INFO", f"Model '{name}' plausibly shares {called}: {measured}.")]


def _listed(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
