"""How a model is built, told from the names and shapes of its tensors: layers, what comes before and after them.

The layer of a tensor is the first number in its name, after a component such as ``layers``, ``h`` or ``blocks``.
No list of architectures is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_merge.weights import TensorInfo

LAYER_WORDS = {"layers", "layer", "h", "blocks", "block", "stages"}
# What stands before the layers: embeddings of words, positions, types and patches, with their norms.
_BEFORE = re.compile(
    r"(^|\.)(\w*embed(ding)?s?|embed_(?!out)\w+|word_embeddings_\w+|wte|wpe|cls_token|class_token|position_\w+|"
    r"positional_\w+|patch_\w+|ln_pre|conv1|conv2|shared)(\.|$)",
    re.IGNORECASE,
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|predictions\.decoder|generator_lm_head|output)\.weight$")
_VOCABULARY = re.compile(r"(^|[._])(embed\w*|wte|word_embeddings|lm_head|predictions|decoder|shared|output)([._]|$)")
_NO_VOCABULARY = re.compile(r"position|token_type|patch|norm|transform\.|(^|[._])(wpe|ln\w*)[._]", re.IGNORECASE)
# What transformers computes again when it loads a model; old checkpoints hold it.
_RECOMPUTED = re.compile(r"(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|attention\.(masked_)?bias|position_ids)$")
_PROJECTOR = re.compile(r"projector|merger|connector|perceiver", re.IGNORECASE)
_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")


@dataclass(frozen=True)
class Stack:
    """A row of layers: ``prefix.0.…`` to ``prefix.{count − 1}.…``."""

    prefix: str
    count: int
    # The names inside each layer.
    inside: Mapping[int, frozenset[str]]

    def name(self, layer: int, inside: str) -> str:
        """Return the name of a tensor of one layer."""
        return f"{self.prefix}.{layer}.{inside}"


@dataclass(frozen=True)
class ModuleLayout:
    """One part of a model: its layers, if it has any, and the tensors before and after them."""

    name: str
    stack: Stack | None
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def aliases(self) -> set[str]:
        """All names by which a recipe may call the module."""
        names = {self.name}
        if self.stack is not None:
            names.add(self.stack.prefix)
        if self.name == "vision_tower":
            names.add("vision_model")
        return names


@dataclass(frozen=True)
class Layout:
    """A model's modules; most have one, called ``default``."""

    modules: tuple[ModuleLayout, ...]
    # The tensor that embeds the words, and heads that may be tied to it.
    embedding: str | None = None
    heads: tuple[str, ...] = field(default=())


def layout_of(tensors: Iterable[str]) -> Layout:
    """Tell the layout of a model from the names of its tensors."""
    names = sorted(tensors)
    stacks = _stacks(names)
    inside = {
        stack.prefix: {stack.name(i, rest) for i, layer in stack.inside.items() for rest in layer} for stack in stacks
    }
    loose = [name for name in names if not any(name in layered for layered in inside.values())]
    if len(stacks) < 2:
        modules = [_module("default", stacks[0] if stacks else None, loose)]
    else:
        modules = _several(stacks, loose)
    heads = tuple(name for name in loose if _HEAD.search(name))
    words = [name for name in loose if _VOCABULARY.search(name) and _BEFORE.search(name)]
    words = [name for name in words if not _NO_VOCABULARY.search(name) and name.endswith("weight")]
    return Layout(tuple(modules), words[0] if len(words) == 1 else None, heads)


def _stacks(names: Iterable[str]) -> list[Stack]:
    layers: dict[str, dict[int, set[str]]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit() and 0 < i < len(parts) - 1), None)
        if at is not None and parts[at - 1] in LAYER_WORDS:
            prefix, layer, rest = ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])
            layers.setdefault(prefix, {}).setdefault(layer, set()).add(rest)
    return [
        Stack(prefix, len(found), {layer: frozenset(rest) for layer, rest in found.items()})
        for prefix, found in sorted(layers.items())
        if sorted(found) == list(range(len(found)))
    ]


def _module(name: str, stack: Stack | None, loose: Iterable[str]) -> ModuleLayout:
    before = tuple(tensor for tensor in loose if _BEFORE.search(tensor))
    return ModuleLayout(name, stack, before, tuple(tensor for tensor in loose if tensor not in before))


def _several(stacks: list[Stack], loose: list[str]) -> list[ModuleLayout]:
    """Give every tensor outside of layers to the stack it shares most of its name with; projectors stay apart."""
    called = _names_of(stacks)
    owned: dict[str, list[str]] = {name: [] for name in called}
    for tensor in loose:
        if _PROJECTOR.search(tensor):
            owned.setdefault("multi_modal_projector", []).append(tensor)
            continue
        shared = {name: _common(tensor, stack.prefix) for name, stack in called.items()}
        best = max(shared.values())
        nearest = [name for name, count in shared.items() if count == best]
        if len(nearest) == 1 and best:
            owned[nearest[0]].append(tensor)
        elif "text_decoder" in called:
            owned["text_decoder"].append(tensor)
        else:
            owned.setdefault("shared", []).append(tensor)
    return [_module(name, called.get(name), tensors) for name, tensors in owned.items()]


def _names_of(stacks: list[Stack]) -> dict[str, Stack]:
    def role(prefix: str) -> str:
        if re.search(r"vis|image", prefix):
            return "vision_tower"
        if re.search(r"audio|speech", prefix):
            return "audio_tower"
        if "text" in prefix:
            return "text_model"
        return next((word for word in ("encoder", "decoder") if word in prefix.split(".")), "text_decoder")

    roles = [role(stack.prefix) for stack in stacks]
    # A decoder beside a tower that sees or hears is what mergekit calls text_decoder.
    if not any(name == "encoder" for name in roles):
        roles = ["text_decoder" if name == "decoder" else name for name in roles]
    return {name if roles.count(name) == 1 else stack.prefix: stack for name, stack in zip(roles, stacks, strict=True)}


def _common(name: str, prefix: str) -> int:
    count = 0
    for one, other in zip(name.split("."), prefix.split("."), strict=False):
        if one != other:
            break
        count += 1
    return count


def recomputed(name: str, info: TensorInfo) -> bool:
    """Tell whether a tensor is a buffer that is computed when a model is made, such as a causal mask."""
    found = _RECOMPUTED.search(name)
    if not found:
        return False
    # GPT-2 calls its causal mask attn.bias: it has four axes, a bias has one.
    return not found.group(0).endswith(".bias") or len(info.shape) == 4


def is_vocabulary(name: str, shapes: Iterable[tuple[tuple[int, ...], int | None]]) -> bool:
    """Tell whether the first axis of a tensor counts tokens.

    Args:
        name: A tensor outside of layers.
        shapes: For each model the tensor's shape and the size of the model's vocabulary.
    """
    if _NO_VOCABULARY.search(name) or not _VOCABULARY.search(name):
        return False
    return all(bool(shape) and shape[0] == size for shape, size in shapes)


# --- config.json -----------------------------------------------------------------------------------------------------


def config_entry(config: Mapping[str, Any], path: str) -> Any:
    """Return an entry of a config by its dotted path, or ``None``."""
    entry: Any = config
    for part in path.split("."):
        entry = entry.get(part) if isinstance(entry, Mapping) else None
    return entry


def with_config_entry(config: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a config with one entry set; sections on its path are copied."""
    first, _, rest = path.partition(".")
    return {**config, first: with_config_entry(config[first], rest, value) if rest else value}


def layer_count_key(config: Mapping[str, Any], module: ModuleLayout) -> str | None:
    """Return the dotted path of the entry that counts a module's layers, or ``None``."""
    if module.stack is None:
        return None
    sections = {
        "default": ("", "text_config."),
        "text_decoder": ("text_config.", "llm_config.", "language_config.", ""),
        "vision_tower": ("vision_config.",),
        "audio_tower": ("audio_config.", "encoder_config."),
    }.get(module.name, ("",))
    keys: tuple[str, ...] = _COUNT_KEYS
    if module.name in ("encoder", "decoder"):
        keys = (f"{module.name}_layers", f"num_{module.name}_layers", *keys)
    candidates = [section + key for section in sections for key in keys]
    return next((path for path in candidates if config_entry(config, path) == module.stack.count), None)


def vocabulary_key(config: Mapping[str, Any]) -> str | None:
    """Return the dotted path of the entry that states the size of the vocabulary, or ``None``."""
    candidates = ("vocab_size", "text_config.vocab_size", "llm_config.vocab_size")
    return next((path for path in candidates if isinstance(config_entry(config, path), int)), None)
