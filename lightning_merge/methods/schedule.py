"""Settings that vary over the tensors of a model, and the one number that each tensor gets.

A numeric setting is a number, or one for each model by name (``{cars: 0.3, sun: 0.5}``), and each of those may vary:

- ``[0.2, 1.0]``: linear over depth, between any number of anchors. Layers are numbered by the first number in a name
  (``h.3``, ``layer4``), the first at depth 0 and the last at 1; embeddings and stems, known by their names, lie at 0,
  all else (a final norm, a head) at 1.
- ``[{tensors: "self_attn", value: 0.3}, {value: 0.5}]``: the first rule whose pattern is found in the tensor's name;
  a rule without a pattern fits every tensor.
- :class:`ByTensor`: a value for each tensor by its name, from Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_merge.errors import UserError, nearest

_RULE_KEYS = ("tensors", "value")
# What comes before the layers, by the names that models give it; everything else without a number comes behind.
_BEFORE_LAYERS = re.compile(
    r"(^|[._])(embed(?!_out)|embeddings?|wte|wpe|tok_embeddings|shared|patch|cls_token|position|stem|ln_pre|"
    r"norm_pre|conv1|bn1)",
    re.I,
)
# A layer's number stands alone, or behind the word for a layer (ResNet's layer4).
_LAYER = re.compile(r"(?:^|\.)(?:layer|stage|block)?(\d+)(?:\.|$)")


@dataclass(frozen=True)
class ByTensor:
    """A setting for each tensor by name; each value is a number or one for each model."""

    values: Mapping[str, Any]


def varies(value: Any) -> bool:
    """Tell whether a setting differs from tensor to tensor."""
    if isinstance(value, Mapping):
        return any(varies(entry) for entry in value.values())
    return isinstance(value, (ByTensor, list, tuple))


def numbers_in(owner: str, field: str, value: Any) -> Iterator[Any]:
    """Yield every number of a setting, so that its interval can be checked.

    Raises:
        UserError: A rule or an anchor is not written as it should be.
    """
    if isinstance(value, ByTensor):
        value = value.values
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from numbers_in(owner, field, entry)
    elif isinstance(value, (list, tuple)):
        if not value:
            raise UserError(f"{owner}: {field} is an empty list. Expected numbers over depth, or rules with patterns.")
        for entry in value:
            if isinstance(entry, Mapping):
                _check_rule(owner, field, entry)
                yield from numbers_in(owner, field, entry["value"])
            else:
                yield entry
    else:
        yield value


def _check_rule(owner: str, field: str, rule: Mapping[str, Any]) -> None:
    for key in rule:
        if key not in _RULE_KEYS:
            raise UserError(
                f"{owner}: {field} has a rule with the unknown key '{key}'. "
                f"Known: {', '.join(_RULE_KEYS)}.{nearest(str(key), _RULE_KEYS)}"
            )
    if "value" not in rule:
        raise UserError(f"{owner}: {field} has a rule without a value. Expected {{tensors: PATTERN, value: NUMBER}}.")
    try:
        re.compile(str(rule.get("tensors", "")))
    except re.error as error:
        raise UserError(
            f"{owner}: {field} has the pattern '{rule['tensors']}', which is no regular expression ({error})."
        ) from error


def unused_patterns(value: Any, names: Iterable[str]) -> Iterator[str]:
    """Yield the patterns of a setting that are found in no tensor's name."""
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from unused_patterns(entry, names)
    elif isinstance(value, (list, tuple)):
        for rule in value:
            if isinstance(rule, Mapping):
                pattern = str(rule.get("tensors", ""))
                if not any(re.search(pattern, name) for name in names):
                    yield pattern
                yield from unused_patterns(rule["value"], names)


def settle(what: str, value: Any, name: str, depth: float) -> Any:
    """Return the number, or the numbers by model, that a setting has for one tensor.

    Args:
        what: The setting, for messages.
        value: The setting in any of its forms.
        name: The tensor's name.
        depth: Where the tensor lies, from 0 to 1; see :func:`depths`.

    Raises:
        UserError: No rule fits the tensor.
    """
    if isinstance(value, ByTensor):
        if name not in value.values:
            raise UserError(f"{what} has no value for the tensor '{name}'.{nearest(name, list(value.values))}")
        return value.values[name]
    if isinstance(value, Mapping):
        return {model: settle(what, entry, name, depth) for model, entry in value.items()}
    if isinstance(value, (list, tuple)):
        if all(not isinstance(entry, Mapping) for entry in value):
            return _between(value, depth)
        for rule in value:
            if not isinstance(rule, Mapping):
                return settle(what, rule, name, depth)
            if re.search(str(rule.get("tensors", "")), name):
                return settle(what, rule["value"], name, depth)
        raise UserError(
            f"{what} has no rule for the tensor '{name}'. Expected a last one without a pattern: {{value: NUMBER}}."
        )
    return value


def _between(anchors: Sequence[float], depth: float) -> float:
    """Interpolate linearly between equally spaced anchors."""
    if len(anchors) == 1:
        return anchors[0]
    position = depth * (len(anchors) - 1)
    left = min(int(position), len(anchors) - 2)
    share = position - left
    return anchors[left] * (1 - share) + anchors[left + 1] * share


def depths(names: Iterable[str]) -> dict[str, float]:
    """Return where each tensor lies between the first layer (0) and the last (1).

    The layer of a tensor is the first number in its name; layers are counted apart for each part of the model that
    numbers its own (an encoder and a decoder).
    """
    names = list(names)
    layers: dict[str, tuple[str, int]] = {}
    for name in names:
        found = _LAYER.search(name)
        if found:
            layers[name] = (name[: found.start()], int(found.group(1)))
    last: dict[str, int] = {}
    for part, layer in layers.values():
        last[part] = max(layer, last.get(part, 0))
    # The longest numbering is the depth of the model; a short one (a head with two layers) has its own.
    return {
        name: (layers[name][1] / last[layers[name][0]] if last[layers[name][0]] else 0.0)
        if name in layers
        else (0.0 if _BEFORE_LAYERS.search(name) else 1.0)
        for name in names
    }
