"""Command lines and YAML into objects, by jsonargparse; what it refuses becomes one sentence."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_merge.errors import UserError, nearest, unknown

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


MANY_OPTIONS = 30


def keep_yaml_keys_as_text() -> None:
    """Make jsonargparse read ``{on: a, 1: b}`` with the keys 'on' and '1': they are names of models and tasks."""
    import yaml
    from jsonargparse import set_loader
    from jsonargparse._loaders_dumpers import get_yaml_default_loader, yaml_load

    class TextKeys(get_yaml_default_loader()):  # type: ignore[misc]
        """YAML whose mapping keys stay as they are written."""

    def mapping(loader: Any, node: yaml.MappingNode) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag in _NOT_TEXT:
                key.tag = "tag:yaml.org,2002:str"
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise UserError(f"'{key.value}' stands twice in one mapping. Expected each name once.")
            seen.add(getattr(key, "value", None) if isinstance(key, yaml.ScalarNode) else None)
        return yaml.SafeLoader.construct_yaml_map(loader, node)

    TextKeys.add_constructor("tag:yaml.org,2002:map", mapping)

    def load(stream: Any) -> Any:
        loaded = yaml.load(stream, Loader=TextKeys)  # a safe loader: it derives from SafeLoader
        # A lone '{a, b}' or 'a:' is text to jsonargparse, which decides so in its own loader.
        return loaded if isinstance(loaded, dict) and any(v is not None for v in loaded.values()) else yaml_load(stream)

    set_loader("yaml", load, exceptions=(yaml.YAMLError,))


_NOT_TEXT = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:null"}


def make_parser(verb: str, description: str | None) -> ArgumentParser:
    from jsonargparse import ArgumentParser, set_parsing_settings

    from lightning_merge.methods import MergeMethod, available_methods
    from lightning_merge.objectives import Objective

    available_methods()
    keep_yaml_keys_as_text()
    set_parsing_settings(subclasses_enabled=[MergeMethod, Objective])
    return ArgumentParser(prog=f"lightning-merge {verb}", description=description, exit_on_error=False)


def build(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Namespace, str]:
    """Parse and build the objects; also return the resolved options as YAML.

    What jsonargparse refuses becomes one sentence with the nearest spelling of a method or setting.

    Raises:
        UserError: Anything unknown, missing or out of range.
    """
    from argparse import ArgumentError

    _refuse_repeated(arguments)
    try:
        parsed = parser.parse_args(list(arguments))
        resolved = parser.dump(parsed, skip_unset=False)
        return parser.instantiate(parsed), resolved
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"The file given as --config is no text ({error}). Expected YAML.") from error
    except (ArgumentError, ValueError, TypeError) as error:
        raise refusal(error, [text for action in parser._actions for text in action.option_strings]) from error


def _refuse_repeated(arguments: Sequence[str]) -> None:
    """Refuse a list that is given twice: one would expect both to count, and only the last does."""
    count = sum(argument.partition("=")[0] == "--ignore" for argument in arguments)
    if count > 1:
        raise UserError(f"--ignore is given {count} times. Expected it once, with several patterns as '[a, b]'.")


def refusal(error: BaseException, options: Sequence[str] = ()) -> UserError:
    """Return what a user is told of an error in parsing: the UserError below it, or one sentence on what was refused.

    Args:
        error: As it came.
        options: The parser's options, such as ``--output``, among which the nearest spelling is looked for.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return UserError(_explain(str(error), options))


def _explain(message: str, options: Sequence[str]) -> str:
    """Turn jsonargparse's nested message into one sentence, with the nearest spelling of what is unknown."""
    from lightning_merge.methods import available_methods

    known = available_methods()
    path = re.search(r"Expected a dot import path string: (\S+)", message) or re.search(
        r"Unexpected import path format: (\S+)", message
    )
    if path and re.search(r'Parser key "[\w.]*(method|transforms)', message):
        return str(unknown("method", path.group(1), known))
    if path and re.search(r'Parser key "[\w.]*objectives', message):
        from lightning_merge import objectives

        kinds = [kind.__name__ for kind in objectives.Objective.__subclasses__()]
        return str(unknown("objective", path.group(1), kinds))
    rooms = _classes()
    key = re.search(r'Parser key "(?:[\w.]*\.)?(data|model|callbacks)(?:\.\d+)?"', message)
    if path and key:
        return str(unknown("class", path.group(1), [name for name, (room, _) in rooms.items() if room == key.group(1)]))
    refused = re.search(r"Option '([\w.]+)' is not accepted", message)
    owner = re.search(r"class_path '[\w.]*?(\w+)'", message)
    if refused and owner and owner.group(1) in known:
        settings = [spec.name for spec in dataclasses.fields(known[owner.group(1)])]
        return str(unknown(f"setting of {owner.group(1)}", refused.group(1), settings))
    if refused and owner and owner.group(1) in rooms:
        settings = list(inspect.signature(rooms[owner.group(1)][1]).parameters)
        return str(unknown(f"setting of {owner.group(1)}", refused.group(1), settings))
    option = re.search(r"(?:unrecognized arguments|Unrecognized arguments): (.+)", message)
    if option:
        named = re.search(r"--(?:method|transforms)\.(?:init_args\.)?(\w+)", option.group(1))
        if named:
            return str(
                unknown("setting", named.group(1), {f.name for k in known.values() for f in dataclasses.fields(k)})
            )
        return _explain_option(option.group(1).split("=")[0].split()[0], options)
    if refused:
        return _explain_option(refused.group(1), [name.removeprefix("--") for name in options])
    required = re.search(r"the following arguments are required: (.+)", message)
    if required:
        missing = ", ".join(f"--{name.strip()}" for name in required.group(1).split(","))
        other = " (or --recipe)" if missing == "--method" and "--recipe" in options else ""
        return f"Missing: {missing}{other}. See --help."
    flat = re.sub(r"\s*\n\s*", " ", message).strip()
    return _explain_type(message) or re.sub(r'Parser key "([\w.]+)"', r"--\1", flat)


def _explain_option(given: str, options: Sequence[str]) -> str:
    """Name an unknown option and the nearest; list all where they are few, but not those of the parser's own."""
    plain = [name for name in options if re.fullmatch(r"(--)?(?!print_)\w+", name)]
    if len(options) > MANY_OPTIONS:
        return f"Unknown option '{given}'. See --help.{nearest(given, options)}"
    return str(unknown("option", given, plain))


_IN_WORDS = {
    "float": "a number",
    "int": "an integer",
    "bool": "true or false",
    "str": "text",
    "list": "a list such as '[a, b]'",
    "dict": "a mapping such as '{cars: A, sun: B}'",
}


def _explain_type(message: str) -> str | None:
    """Say which option or setting has a value of the wrong type, and which types it takes."""
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    if not keys or not values:
        return None
    owner = re.findall(r"class_path '[\w.]*?(\w+)'", message)
    place = f"{owner[-1]}: {keys[-1]}" if owner and len(keys) > 1 else f"--{keys[-1]}"
    choices = re.findall(r"Expected a typing\.Literal\[(.*?)\]", message)
    if choices:
        accepted = f"one of {choices[-1]}"
        hint = nearest(values[-1], re.findall(r"'(.*?)'", choices[-1]))
    else:
        union = re.search(r"Subtypes: \[(.*?)\]\s", message, re.DOTALL)
        named = re.findall(r"<class '(\w+)'>|(dict|list)\[", union.group(1) if union else message)
        kinds = dict.fromkeys(_IN_WORDS[kind] for pair in named if (kind := pair[0] or pair[1]) in _IN_WORDS)
        accepted, hint = " or ".join(kinds), ""
    return f"{place} must be {accepted}, got {values[-1]!r}.{hint}" if accepted else None


def _classes() -> dict[str, tuple[str, type]]:
    """Classes that go by their short names besides methods, with the kind of option they belong to.

    Of modules that are imported already: who does not use them does not wait for them either.
    """
    found = {}
    for module in ("lightning_merge.data", "lightning_merge.modules"):
        for name in getattr(sys.modules.get(module), "__all__", ()):
            value = getattr(sys.modules[module], name)
            for parent in getattr(value, "__mro__", ()):
                kind = _KINDS.get(parent.__name__)
                if kind and not inspect.isabstract(value):
                    found[name] = (kind, value)
    return found


_KINDS = {"LightningDataModule": "data", "LightningModule": "model", "Callback": "callbacks"}
