"""The small values of a mergekit recipe (models, dtypes, numbers) and its YAML, read strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from lightning_merge.errors import UserError, nearest

DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it: ``path``, ``path@revision`` or ``path+adapter``."""

    path: str
    revision: str | None = None
    adapter: str | None = None

    @property
    def model(self) -> str:
        """The model without its adapter."""
        return f"{self.path}@{self.revision}" if self.revision else self.path

    def __str__(self) -> str:
        return f"{self.model}+{self.adapter}" if self.adapter else self.model


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, not the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key, str):
                if key in seen:
                    raise UserError(f"'{key}' stands twice in one mapping{key_node.start_mark}. Expected it once.")
                seen.add(key)
        return super().construct_mapping(node, deep)


def load_documents(text: str) -> Iterable[tuple[Any, str]]:
    """Yield each document of a YAML text, with the text it was made from."""
    loader = _StrictLoader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            written = text[node.start_mark.index : node.end_mark.index].rstrip() + "\n"
            yield loader.construct_document(node), written
    finally:
        loader.dispose()


def reference(value: Any, where: str) -> Reference:
    """Read ``path``, ``path@revision``, ``path+adapter``, or the same as a mapping of model and lora."""
    if isinstance(value, dict):
        known_keys(value, ("model", "lora", "override_architecture"), where)
        if value.get("override_architecture") is not None:
            raise UserError(f"{where}: override_architecture is not supported. Expected models of one architecture.")
        path, revision = _path(value.get("model"), f"{where}.model")
        adapter = None
        if value.get("lora") is not None:
            name, tag = _path(value["lora"], f"{where}.lora")
            adapter = f"{name}@{tag}" if tag else name
        return Reference(path, revision, adapter)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} is {value!r}. Expected a model: a folder, owner/name on the Hub, or model+adapter.")
    if value.count("+") > 1:
        raise UserError(f"{where} is '{value}', with more than one '+'. Expected model+adapter.")
    model, _, adapter_text = value.partition("+")
    path, revision = _path(model, where)
    return Reference(path, revision, adapter_text or None)


def _path(value: Any, where: str) -> tuple[str, str | None]:
    if isinstance(value, dict):
        known_keys(value, ("path", "revision"), where)
        revision = optional_text(value.get("revision"), f"{where}.revision")
        return _path(value.get("path"), f"{where}.path")[0], revision
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} is {value!r}. Expected a folder, or owner/name on the Hub.")
    if value.count("@") > 1:
        raise UserError(f"{where} is '{value}', with more than one '@'. Expected model@revision.")
    path, _, revision_text = value.partition("@")
    return path, revision_text or None


def optional_reference(value: Any, where: str) -> Reference | None:
    """Read a model where one may be missing."""
    return None if value is None else reference(value, where)


def optional_text(value: Any, where: str) -> str | None:
    """Read text where it may be missing."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where} is {value!r}. Expected text.")
    return value


def dtype_name(value: Any, where: str) -> str | None:
    """Read the name of a floating-point dtype, with or without ``torch.``."""
    text = optional_text(value, where)
    if not text:
        return None
    name = text.removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{where} is '{text}'. Expected one of {', '.join(DTYPES)}.{nearest(name, DTYPES)}")
    return name


def mapping(value: Any, where: str) -> dict[Any, Any]:
    """Require a mapping."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {kind_of(value)}. Expected a mapping.")
    return value


def sequence(value: Any, where: str) -> list[Any]:
    """Require a list that holds something."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {'an empty list' if value == [] else 'a ' + kind_of(value)}. Expected a list.")
    return value


def known_keys(content: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    """Refuse keys that mean nothing here."""
    for key in content:
        if key not in known:
            place = where if where.startswith("The recipe") else f"'{where}'"
            raise UserError(
                f"{place} has the unknown key '{key}'. Known: {', '.join(known)}.{nearest(str(key), known)}"
            )


def is_scalar(value: Any) -> bool:
    """Tell whether a value is a number, a truth value or text."""
    return isinstance(value, (bool, int, float, str))


def whole_number(value: Any) -> int | None:
    """Return the whole number that a value or text states, or ``None``."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
        return int(number) if number == int(number) else None
    except (TypeError, ValueError, OverflowError):
        return None


def kind_of(value: Any) -> str:
    """Name what YAML made of a value."""
    names = {dict: "mapping", list: "list", str: "text", type(None): "missing value", bool: "truth value"}
    return names.get(type(value), "number")
