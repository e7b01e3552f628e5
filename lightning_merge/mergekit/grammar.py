"""The grammar of a mergekit recipe: YAML in, checked and typed documents out. No model is looked at here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_merge.errors import UserError, nearest
from lightning_merge.mergekit.values import (
    Reference,
    dtype_name,
    is_scalar,
    kind_of,
    known_keys,
    load_documents,
    mapping,
    optional_reference,
    optional_text,
    reference,
    sequence,
    whole_number,
)

Parameters = Mapping[str, Any]

TOP_KEYS = (
    "name",
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
)
# Keys of mergekit's other tools, and of its command line.
OTHER_TOOLS = {
    "experts": "mergekit-moe",
    "gate_mode": "mergekit-moe",
    "shared_experts": "mergekit-moe",
    "residual_scale": "mergekit-moe",
    "noise_scale": "mergekit-moe",
    "source_model": "mergekit-moe",
    "genome": "mergekit-evolve",
    "tasks": "mergekit-evolve",
    "smooth": "mergekit-evolve",
}
TOKEN_KINDS = ("zero", "model_token")
OPTIONS = (
    "allow_crimes",
    "unsafe_truncate_embeddings",
    "trust_remote_code",
    "lora_merge_cache",
    "lora_merge_dtype",
    "transformers_cache",
    "clone_tensors",
    "lazy_unpickle",
    "random_seed",
    "cuda",
    "device",
    "low_cpu_memory",
    "out_shard_size",
)


@dataclass(frozen=True)
class Source:
    """One model of a slice, with the layers it gives (``None``: all of them) and its own parameters."""

    model: Reference
    layers: tuple[int, int] | None
    parameters: Parameters


@dataclass(frozen=True)
class Slice:
    """Layers of the output and the models they are merged from."""

    sources: tuple[Source, ...]
    base: Reference | None
    parameters: Parameters


@dataclass(frozen=True)
class Module:
    """One module of the output; ``whole`` where it lists models instead of slices."""

    slices: tuple[Slice, ...]
    parameters: Parameters
    whole: bool


@dataclass(frozen=True)
class TokenRow:
    """Where the embedding of one token comes from: a model (by the same token, another token, or an id), or zeros."""

    model: Reference | None = None
    token: str | None = None
    token_id: int | None = None
    zero: bool = False
    force: bool = False


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer of the output: ``union``, ``base`` or a model's."""

    source: str | Reference
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One document."""

    method: str
    base: Reference | None
    # By module name; models and slices outside of modules stand under "".
    modules: Mapping[str, Module]
    parameters: Parameters
    dtype: str | None
    out_dtype: str | None
    tokenizer: TokenizerChoice | None
    chat_template: str | None
    name: str | None
    # The document as it was written.
    text: str
    notes: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[Reference, ...]:
        """Every model, in the order in which they are named, the base first."""
        found = [self.base] if self.base else []
        for module in self.modules.values():
            for part in module.slices:
                found += [*([part.base] if part.base else []), *(source.model for source in part.sources)]
        return tuple(dict.fromkeys(found))

    @property
    def dependencies(self) -> tuple[Reference, ...]:
        """Every model that is read: also one that only gives a tokenizer, or the row of a token."""
        if self.tokenizer is None:
            return self.references
        rows = [row.model for row in self.tokenizer.tokens.values() if row.model is not None]
        source = [self.tokenizer.source] if isinstance(self.tokenizer.source, Reference) else []
        return (*self.references, *source, *rows)


def parse_documents(source: str | Path) -> list[Recipe]:
    """Read a recipe of one or several documents.

    Args:
        source: A file, or the YAML itself.

    Raises:
        UserError: It is no YAML, a key is unknown, or a value is not what its key means.
    """
    text, where = _text_of(source)
    try:
        documents = list(load_documents(text))
        if len(documents) == 1:  # with its comments
            documents = [(documents[0][0], text)]
    except yaml.YAMLError as error:
        raise UserError(f"{where} is no YAML ({' '.join(str(error).split())}). Expected a mergekit recipe.") from error
    if not documents:
        raise UserError(f"{where} is empty. Expected a mergekit recipe.")
    return [_recipe(document, content) for document, content in documents]


def _text_of(source: str | Path) -> tuple[str, str]:
    if isinstance(source, str) and ("\n" in source or ": " in source):
        return source, "The recipe"
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"No recipe at '{source}'. Expected a YAML file, or its text.")
    try:
        return path.read_text(encoding="utf-8"), f"'{source}'"
    except UnicodeDecodeError as error:
        raise UserError(f"'{source}' is no text ({error}). Expected a YAML file.") from error


def _recipe(document: Any, text: str) -> Recipe:
    where = "The recipe"
    if not isinstance(document, dict):
        raise UserError(f"{where} is a {kind_of(document)}. Expected a mapping with merge_method and models or slices.")
    if isinstance(document.get("name"), str):
        where = f"The recipe '{document['name']}'"
    for key in document:
        if key in OTHER_TOOLS and key not in TOP_KEYS:
            raise UserError(f"{where} has the key '{key}' of {OTHER_TOOLS[key]}, which is not supported.")
        if key in OPTIONS:
            raise UserError(
                f"{where} has the key '{key}', an option of mergekit's command line that is not supported. "
                "Expected recipes of models that fit together."
            )
    known_keys(document, TOP_KEYS, where)
    method = document.get("merge_method")
    if not isinstance(method, str):
        raise UserError(f"{where} names no merge_method. Expected one, such as merge_method: linear.")
    shapes = [key for key in ("models", "slices", "modules") if document.get(key)]
    if len(shapes) != 1:
        given = " and ".join(shapes) if shapes else "none of them"
        raise UserError(f"{where} has {given}. Expected exactly one of models, slices, modules.")
    notes: list[str] = []
    if shapes[0] == "modules":
        modules = {
            str(name): _module(content, f"modules.{name}", notes)
            for name, content in mapping(document["modules"], "modules").items()
        }
    else:
        content = {shapes[0]: document[shapes[0]]}
        modules = {"": _module(content, "", notes)}
    if document.get("tokenizer") is not None and document.get("tokenizer_source") is not None:
        raise UserError(f"{where} has both tokenizer and tokenizer_source. Expected one of them.")
    return Recipe(
        method=method,
        base=optional_reference(document.get("base_model"), "base_model"),
        modules=modules,
        parameters=_parameters(document.get("parameters"), "parameters"),
        dtype=dtype_name(document.get("dtype"), "dtype"),
        out_dtype=dtype_name(document.get("out_dtype"), "out_dtype"),
        tokenizer=_tokenizer(document),
        chat_template=optional_text(document.get("chat_template"), "chat_template"),
        name=optional_text(document.get("name"), "name"),
        text=text,
        notes=tuple(notes),
    )


def _module(content: Any, where: str, notes: list[str]) -> Module:
    content = mapping(content, where)
    inside = f"{where}." if where else ""
    known_keys(content, ("slices", "models", "parameters"), where)
    if bool(content.get("slices")) == bool(content.get("models")):
        raise UserError(f"{where} must have either slices or models.")
    parameters = _parameters(content.get("parameters"), f"{inside}parameters")
    if content.get("slices"):
        slices = [
            _slice(entry, f"{inside}slices[{index}]", notes)
            for index, entry in enumerate(sequence(content["slices"], f"{inside}slices"))
        ]
        return Module(tuple(slices), parameters, whole=False)
    sources = []
    for index, entry in enumerate(sequence(content["models"], f"{inside}models")):
        place = f"{inside}models[{index}]"
        entry = mapping(entry, place)
        known_keys(entry, ("model", "parameters"), place)
        sources.append(
            Source(reference(entry.get("model"), f"{place}.model"), None, _parameters(entry.get("parameters"), place))
        )
    _no_duplicates(sources, f"{inside}models")
    return Module((Slice(tuple(sources), None, {}),), parameters, whole=True)


def _slice(content: Any, where: str, notes: list[str]) -> Slice:
    content = mapping(content, where)
    known_keys(content, ("sources", "base_model", "parameters", "residual_weight"), where)
    if content.get("residual_weight") is not None:
        notes.append(f"{where}: residual_weight has no effect, here as in mergekit.")
    sources = []
    for index, entry in enumerate(sequence(content.get("sources"), f"{where}.sources")):
        place = f"{where}.sources[{index}]"
        entry = mapping(entry, place)
        known_keys(entry, ("model", "layer_range", "parameters"), place)
        sources.append(
            Source(
                reference(entry.get("model"), f"{place}.model"),
                _layer_range(entry.get("layer_range"), f"{place}.layer_range"),
                _parameters(entry.get("parameters"), place),
            )
        )
    counts = {source.layers[1] - source.layers[0] for source in sources if source.layers}
    if len(counts) > 1:
        listed = ", ".join(f"{source.model} {list(source.layers or ())}" for source in sources)
        raise UserError(f"{where}: the sources give different numbers of layers ({listed}). Expected the same number.")
    _no_duplicates(sources, where)
    return Slice(
        tuple(sources),
        optional_reference(content.get("base_model"), f"{where}.base_model"),
        _parameters(content.get("parameters"), f"{where}.parameters"),
    )


def _layer_range(value: Any, where: str) -> tuple[int, int]:
    pair = [whole_number(entry) for entry in value] if isinstance(value, (list, tuple)) else []
    if len(pair) != 2 or None in pair:
        raise UserError(f"{where} is {value!r}. Expected [first layer, one past the last], such as [0, 16].")
    start, stop = (int(number) for number in pair if number is not None)
    if not 0 <= start < stop:
        raise UserError(f"{where} is [{start}, {stop}], which holds no layer. Expected 0 <= first < one past the last.")
    return start, stop


def _no_duplicates(sources: list[Source], where: str) -> None:
    seen = set()
    for source in sources:
        if source.model in seen:
            raise UserError(f"{where} lists the model '{source.model}' twice. Expected each model once.")
        seen.add(source.model)


def _parameters(value: Any, where: str) -> Parameters:
    where = where if where.endswith("parameters") else f"{where}.parameters"
    content = {} if value is None else mapping(value, where)
    for name, setting in content.items():
        _check_setting(setting, f"{where}.{name}")
    return {str(name): setting for name, setting in content.items()}


def _check_setting(setting: Any, where: str) -> None:
    """A setting is a scalar, a list of scalars over the layers, or rules with an optional filter."""
    if is_scalar(setting):
        return
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list) or not setting:
        raise UserError(
            f"{where} is {setting!r}. Expected a value, a list of values over the layers, or rules of filter and value."
        )
    if all(is_scalar(entry) for entry in setting):
        return
    for index, rule in enumerate(setting):
        if not isinstance(rule, dict):
            raise UserError(f"{where}[{index}] is {rule!r} among rules. Expected {{filter: TEXT, value: VALUE}}.")
        known_keys(rule, ("filter", "value"), f"{where}[{index}]")
        if "value" not in rule:
            raise UserError(f"{where}[{index}] has no value. Expected {{filter: TEXT, value: VALUE}}.")
        optional_text(rule.get("filter"), f"{where}[{index}].filter")
        value = rule["value"]
        if not (is_scalar(value) or (isinstance(value, list) and value and all(map(is_scalar, value)))):
            raise UserError(f"{where}[{index}].value is {value!r}. Expected a value, or values over the layers.")


def _tokenizer(document: Mapping[str, Any]) -> TokenizerChoice | None:
    if document.get("tokenizer_source") is not None:
        return TokenizerChoice(_tokenizer_source(document["tokenizer_source"], "tokenizer_source"))
    if document.get("tokenizer") is None:
        return None
    content = mapping(document["tokenizer"], "tokenizer")
    known_keys(content, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
    tokens = mapping(content.get("tokens") or {}, "tokenizer.tokens")
    given = content.get("pad_to_multiple_of")
    multiple = whole_number(given)
    if given is not None and (multiple is None or multiple < 1):
        raise UserError(f"tokenizer.pad_to_multiple_of is {given!r}. Expected a number from 1 on.")
    return TokenizerChoice(
        _tokenizer_source(content.get("source", "union"), "tokenizer.source"),
        {str(token): _token_row(entry, f"tokenizer.tokens.{token}") for token, entry in tokens.items()},
        multiple,
    )


def _tokenizer_source(value: Any, where: str) -> str | Reference:
    return value if value in ("union", "base") else reference(value, where)


def _token_row(content: Any, where: str) -> TokenRow:
    content = mapping(content or {}, where)
    known_keys(content, ("source", "force"), where)
    force = content.get("force", False)
    if not isinstance(force, bool):
        raise UserError(f"{where}.force is {force!r}. Expected true or false.")
    source = content.get("source")
    if source is None:
        raise UserError(f"{where} names no source. Expected a model, or {{kind: zero}} or {{kind: model_token, ...}}.")
    if not isinstance(source, dict) or "kind" not in source:
        return TokenRow(model=reference(source, f"{where}.source"), force=force)
    kind = source["kind"]
    if kind == "zero":
        known_keys(source, ("kind",), f"{where}.source")
        return TokenRow(zero=True, force=force)
    if kind != "model_token":
        hint = nearest(str(kind), TOKEN_KINDS)
        raise UserError(f"{where}.source.kind is {kind!r}. Expected 'zero' or 'model_token'.{hint}")
    known_keys(source, ("kind", "model", "token", "token_id"), f"{where}.source")
    if (source.get("token") is None) == (source.get("token_id") is None):
        raise UserError(f"{where}.source must have either token or token_id.")
    number = whole_number(source.get("token_id"))
    if source.get("token_id") is not None and (number is None or number < 0):
        raise UserError(f"{where}.source.token_id is {source['token_id']!r}. Expected a number from 0 on.")
    token = None if source.get("token") is None else str(source["token"])
    return TokenRow(reference(source.get("model"), f"{where}.source.model"), token, number, force=force)
