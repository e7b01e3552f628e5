"""The files beside the weights of a merge: the config of its new layers and words, its tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_merge.errors import UserError
from lightning_merge.mergekit.architectures import layer_count_key, vocabulary_key, with_config_entry
from lightning_merge.mergekit.chat_templates import chat_template_files
from lightning_merge.mergekit.grammar import Recipe
from lightning_merge.mergekit.models import Companions, Model
from lightning_merge.mergekit.outputs import ModulePlan
from lightning_merge.mergekit.tokenizer import Alignment
from lightning_merge.weights import TensorInfo


def companions_of_merge(
    recipe: Recipe,
    donor: Model,
    models: Sequence[Model],
    modules: Sequence[ModulePlan],
    alignment: Alignment | None,
    tensors: Mapping[str, TensorInfo],
) -> Companions:
    """Return the files that stand beside the weights.

    Args:
        recipe: The document.
        donor: The model whose files the result takes: the base, or the first.
        models: All models.
        modules: What each module of the result is made of.
        alignment: Its tokenizer, where the recipe makes one.
        tensors: Shapes and dtypes of the result.

    Raises:
        UserError: The config does not say where it counts layers whose number changes.
    """
    companions = dict(donor.companions)
    if alignment is not None:
        companions = {**alignment.without_tokenizer(companions), **alignment.files}
    companions |= chat_template_files(recipe, models, companions)
    if "config.json" in companions:
        config = donor.config
        for module in modules:
            config = _with_layers(config, module, donor)
        if alignment is not None:
            config = with_config_entry(config, vocabulary_key(config) or "vocab_size", alignment.size)
        if config.get("tie_word_embeddings") and _untied(donor, models, tensors):
            config = {**config, "tie_word_embeddings": False}
        floating = [info.dtype for info in tensors.values() if info.dtype.is_floating_point]
        if floating:
            stored = str(max(set(floating), key=floating.count)).removeprefix("torch.")
            config = {key: stored if key in ("dtype", "torch_dtype") else value for key, value in config.items()}
        companions["config.json"] = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return companions


def _untied(donor: Model, models: Sequence[Model], tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether the result has a head of its own that the donor, which ties it to its embedding, has not."""
    heads = {head for model in models for head in model.layout.heads}
    return not donor.layout.heads and any(head in tensors for head in heads)


def _with_layers(config: Mapping[str, Any], module: ModulePlan, donor: Model) -> dict[str, Any]:
    """State the new number of layers, and stack what the config lists for each layer as the layers are stacked."""
    stack, count = module.layout.stack, len(module.layers)
    if stack is None or (count == stack.count and all(at == i for i, (_, at) in enumerate(module.layers))):
        return dict(config)
    key = layer_count_key(config, module.layout)
    if key is None:
        raise UserError(
            f"config.json of '{donor.reference}' does not say where it counts its {stack.count} layers, so that it "
            f"cannot state {count}. Expected an entry such as num_hidden_layers."
        )
    config = with_config_entry(config, key, count)
    section, _, _ = key.rpartition(".")
    for name, value in list((config[section] if section else config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == stack.count:
            taken = []
            for model, at in module.layers:
                own: Any = model.config.get(section, {}) if section else model.config
                listed = own.get(name, value)
                taken.append(listed[at] if at < len(listed) else value[at])
            config = with_config_entry(config, f"{section}.{name}" if section else name, taken)
    return dict(config)
