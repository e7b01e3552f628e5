"""Do these models fit together? Findings from headers and configs, and from a small sample of values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_merge.errors import UserError, nearest
from lightning_merge.weights.source import INDEX_FILE, WeightSource
from lightning_merge.weights.tensor_info import TensorInfo
from lightning_merge.weights.vocabulary import (
    TOKENIZER_FILE,
    is_rebuilt,
    of_vocabulary,
    tied_name,
    tokenizers_differ,
    tokens_by_id,
)

# Independently initialised weights lie at a relative distance of about sqrt(2); fine-tuning stays far below 1.
UNRELATED_DISTANCE = 1.0
SAMPLED_TENSORS = 12
SAMPLED_ENTRIES = 1 << 14
COMPARED_ENTRIES = 1 << 20  # at a time, where two whole tensors must be equal
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


REMEDY = "Leave tensors out of the merge with --ignore REGEX."


@dataclass(frozen=True)
class Finding:
    """One thing to know before a merge: an ERROR stops it, a WARN may spoil it, an INFO reassures.

    ``about`` is ``base`` where a model's weights hardly are a fine-tuning of the base.
    """

    level: Literal["ERROR", "WARN", "INFO"]
    message: str
    about: Literal["", "base"] = ""

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
    """Return the name under which ``model`` stores a tensor of ``reference``: its own, or one it is tied to there.

    A model may be tied by its ``config.json`` alone: what it does not store is then found in its embedding.
    """
    names = [name, *(alias for alias, owner in reference.aliases.items() if owner == name)]
    stored = next((stored for known in names if (stored := model.stored_name(known)) is not None), None)
    return stored or next((tied for known in names if (tied := tied_name(model, known)) is not None), None)


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
            findings += _compare_tokenizers(reference, called, name, models[name])
    for name, model in {called: reference, **{f"model '{name}'": models[name] for name in names}}.items():
        findings += _compare_index(name, model)
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
    kinds = [(source.config or {}).get("model_type") for source in (reference, model)]
    if None not in kinds and kinds[0] != kinds[1] and set(reference.tensors) != set(model.tensors):
        return [
            Finding(
                "ERROR",
                f"Model '{name}' ({model.label}) has the architecture '{kinds[1]}' and {called} '{kinds[0]}'. "
                "Expected fine-tunings of one pretrained model.",
                about="base",
            )
        ]
    findings = _compare_names(reference, called, name, model, ignore)
    common = {
        key: (info, model.tensors[stored])
        for key, info in reference.tensors.items()
        if (stored := counterpart(reference, key, model)) is not None and not ignored(key, ignore)
    }
    findings += _compare_shapes(common, called, name, model)
    return findings + _compare_dtypes(reference, called, name, model, common, alone=not findings)


def _compare_names(
    reference: WeightSource, called: str, name: str, model: WeightSource, ignore: Sequence[str]
) -> list[Finding]:
    """Find the tensors that one of two models lacks, or has tied where the other has two."""
    findings, prefixed = [], ""
    missing = [
        key
        for key, info in reference.tensors.items()
        if not ignored(key, ignore) and not counterpart(reference, key, model) and not is_rebuilt(key, info)
    ]
    if missing:
        prefixed = _prefix_hint(missing[0], model)
        hint = prefixed or nearest(missing[0], model.tensors)
        findings.append(
            Finding(
                "ERROR",
                f"Model '{name}' ({model.label}) lacks the tensor '{missing[0]}' of {called} ({len(missing)} missing)."
                f"{hint} Its shape is {list(reference.tensors[missing[0]].shape)} in {called}. {REMEDY}",
            )
        )
    known = {reference.stored_name(key) for key in model.tensors} | set(reference.tensors)
    tied = {owner for alias, owner in model.aliases.items() if alias in reference.tensors}
    extra = [
        key
        for key, info in model.tensors.items()
        if key not in known and key not in reference.aliases and key not in tied and not ignored(key, ignore)
        if not is_rebuilt(key, info)
    ]
    # The owners of tensors that the reference has tied, by its aliases or by its config alone.
    owners = {alias: owner for alias, owner in reference.aliases.items() if alias in model.tensors}
    owners |= {key: owner for key in extra if (owner := tied_name(reference, key)) is not None}
    for alias, owner in owners.items():
        stored = counterpart(reference, owner, model)
        if stored is not None and not ignored(alias, ignore) and not _equal(model, alias, stored):
            findings.append(
                Finding(
                    "ERROR",
                    f"'{alias}' is tied to '{owner}' in {called} but differs from it in model '{name}' "
                    f"({model.label}), where they have the shapes {list(model.tensors[alias].shape)} and "
                    f"{list(model.tensors[stored].shape)}. Expected tied weights to stay equal: "
                    f"save {called} with tie_word_embeddings=False and an output layer of its own. {REMEDY}",
                )
            )
    extra = [key for key in extra if key not in owners]
    if extra and not prefixed:  # another prefix has been said already
        findings.append(
            Finding(
                "ERROR",
                f"Model '{name}' ({model.label}) holds the tensor '{extra[0]}', which {called} lacks "
                f"({len(extra)} extra).{nearest(extra[0], reference.tensors)} "
                f"Its shape is {list(model.tensors[extra[0]].shape)}. {REMEDY}",
            )
        )
    for key in reference.tensors:
        if not ignored(key, ignore) and model.stored_name(key) is None and (owner := tied_name(model, key)) is not None:
            findings.append(
                Finding(
                    "INFO",
                    f"'{key}' is a tensor of its own in {called}; model '{name}' ({model.label}) ties it to '{owner}' "
                    "by its config.json, and it is read from there.",
                )
            )
    return findings


def _compare_shapes(
    common: Mapping[str, tuple[TensorInfo, TensorInfo]], called: str, name: str, model: WeightSource
) -> list[Finding]:
    """Find tensors of other shapes, and say so where another vocabulary is the whole reason."""
    reshaped = {key: pair for key, pair in common.items() if pair[0].shape != pair[1].shape}
    if not reshaped:
        return []
    key, (info, other) = next(iter(reshaped.items()))
    sizes = {(info.shape[:1], other.shape[:1]) for info, other in reshaped.values()}
    first_axis = all(len(i.shape) == len(o.shape) > 0 and i.shape[1:] == o.shape[1:] for i, o in reshaped.values())
    shapes = (
        f"Tensor '{key}' has shape {list(other.shape)} in model '{name}' ({model.label}) and {list(info.shape)} in "
    )
    if first_axis and len(sizes) == 1 and all(map(of_vocabulary, reshaped)):
        others = "".join(f", and so does '{other_key}'" for other_key in list(reshaped)[1:])
        pattern = "|".join(re.escape(key) for key in reshaped)
        return [
            Finding(
                "ERROR",
                f"{shapes}{called} ({len(reshaped)} differ in shape{others}): their vocabularies have {other.shape[0]} "
                f"and {info.shape[0]} entries. Expected equal shapes: leave these tensors out of the merge with "
                f"--ignore '^({pattern})$', or give all models one vocabulary by a recipe with 'tokenizer: union'.",
            )
        ]
    advice = " The first axis differs: another vocabulary or number of classes?" if first_axis else ""
    return [
        Finding("ERROR", f"{shapes}{called} ({len(reshaped)} differ in shape). Expected equal shapes.{advice} {REMEDY}")
    ]


def _compare_dtypes(
    reference: WeightSource,
    called: str,
    name: str,
    model: WeightSource,
    common: Mapping[str, tuple[TensorInfo, TensorInfo]],
    alone: bool,
) -> list[Finding]:
    """Find tensors of another kind, and where ``alone`` (nothing worse was found) those of another precision."""
    for key, (info, other) in common.items():
        if other.dtype.is_floating_point != info.dtype.is_floating_point:
            return [
                Finding(
                    "ERROR",
                    f"Tensor '{key}' is {_listed({other.dtype})} in model '{name}' and {_listed({info.dtype})} in "
                    f"{called}. Expected both floating point or both integer.",
                )
            ]
    dtypes = {info.dtype for info in model.tensors.values() if info.dtype.is_floating_point}
    expected = {info.dtype for info in reference.tensors.values() if info.dtype.is_floating_point}
    other_dtype = [
        key for key, (info, other) in common.items() if info.dtype.is_floating_point and info.dtype != other.dtype
    ]
    if not alone or not other_dtype or model.computed:
        return []
    if len(dtypes) == len(expected) == 1:
        stored = f"Model '{name}' is stored in {_listed(dtypes)}, {called} in {_listed(expected)}"
    else:
        info, other = common[other_dtype[0]]
        stored = (
            f"Tensor '{other_dtype[0]}' is stored in {_listed({other.dtype})} in model '{name}' and in "
            f"{_listed({info.dtype})} in {called} ({len(other_dtype)} of {len(common)} tensors differ in dtype)"
        )
    return [Finding("WARN", f"{stored}: differences below the coarser rounding are lost.")]


def _equal(model: WeightSource, first: str, second: str) -> bool:
    """Tell whether two tensors of one model hold the same, piece by piece."""
    infos = model.tensors[first], model.tensors[second]
    return infos[0] == infos[1] and all(
        torch.equal(model.read_flat(first, start, stop), model.read_flat(second, start, stop))
        for start in range(0, infos[0].numel, COMPARED_ENTRIES)
        for stop in [min(start + COMPARED_ENTRIES, infos[0].numel)]
    )


def _compare_index(called: str, model: WeightSource) -> list[Finding]:
    """Find shards that lie in the folder, or belong to it by number, and that its index does not name."""
    if model.folder is None or not (model.folder / INDEX_FILE).is_file():
        return []
    numbered = [re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", file.name) for file in model.files]
    expected = {
        f"{found[1]}{number:0{len(found[2])}d}{found[3]}{found[4]}{found[5]}"
        for found in numbered
        if found is not None and int(found[4]) < 10**5
        for number in range(1, int(found[4]) + 1)
    }
    left_out = sorted(expected - {file.name for file in model.files})
    if not left_out:
        return []
    there = "lies there, too" if (model.folder / left_out[0]).is_file() else "is not there, either"
    return [
        Finding(
            "WARN",
            f"'{INDEX_FILE}' of {called} ({model.label}) names {len(model.files)} of {len(expected)} shards: "
            f"'{left_out[0]}' is missing from it ({there}). Expected an index of all shards.",
        )
    ]


def _compare_tokenizers(reference: WeightSource, called: str, name: str, model: WeightSource) -> list[Finding]:
    """Find two tokenizers that give one number to different tokens, though the vocabularies are of one size."""
    tables = [key for key in reference.tensors if of_vocabulary(key) and key in model.tensors]
    same_size = all(reference.tensors[key].shape == model.tensors[key].shape for key in tables)
    folders = reference.folder, model.folder
    if not same_size or folders[0] is None or folders[1] is None or not tokenizers_differ(*folders):
        return []
    expected, found = tokens_by_id(folders[0]), tokens_by_id(folders[1])
    other = sorted(number for number in expected.keys() & found.keys() if expected[number] != found[number])
    if not other:
        return []
    shape = f" Tensor '{tables[0]}' has shape {list(model.tensors[tables[0]].shape)} in both." if tables else ""
    return [
        Finding(
            "WARN",
            f"{TOKENIZER_FILE}: {len(other)} of {len(expected)} numbers stand for other tokens in model '{name}' "
            f"({model.label}) than in {called}; the first is {other[0]}, {found[other[0]]!r} there and "
            f"{expected[other[0]]!r} in {called}.{shape} Merging would mix the rows of different tokens: leave the "
            "embedding out with --ignore REGEX, or use a recipe with 'tokenizer: union'.",
        )
    ]


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
                about="base",
            )
        ]
    return [Finding("INFO", f"Model '{name}' plausibly shares {called}: {measured}.")]


def _listed(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
