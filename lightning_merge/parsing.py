"""Command lines and YAML into objects, by jsonargparse; what it refuses becomes one sentence."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_merge.errors import UserError, unknown

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def keep_yaml_keys_as_text() -> None:
    """Make jsonargparse read ``{on: a, 1: b}`` with the keys 'on' and '1': they are names of models and tasks."""
    import yaml
    from jsonargparse import set_loader
    from jsonargparse._loaders_dumpers import get_yaml_default_loader, yaml_load

    class TextKeys(get_yaml_default_loader()):  # type: ignore[misc]
        """YAML whose mapping keys stay as they are written."""

    def mapping(loader: Any, node: yaml.MappingNode) -> Any:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag in _NOT_TEXT:
                key.tag = "tag:yaml.org,2002:str"
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

    available_methods()
    keep_yaml_keys_as_text()
    set_parsing_settings(subclasses_enabled=[MergeMethod])
    return ArgumentParser(prog=f"lightning-merge {verb}", description=description, exit_on_error=False)


def build(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Namespace, str]:
    """Parse and build the objects; also return the resolved options as YAML.

    What jsonargparse refuses becomes one sentence with the nearest spelling of a method or setting.

    Raises:
        UserError: Anything unknown, missing or out of range.
    """
    from argparse import ArgumentError

    try:
        parsed = parser.parse_args(list(arguments))
        resolved = parser.dump(parsed, skip_none=False)
        return parser.instantiate(parsed), resolved
    except UserError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise UserError(_explain(str(error))) from error


def _explain(message: str) -> str:
    """Turn jsonargparse's nested message into one sentence, with the nearest spelling of a method or setting."""
    from lightning_merge.methods import available_methods

    known = available_methods()
    path = re.search(r"Expected a dot import path string: (\S+)", message) or re.search(
        r"Unexpected import path format: (\S+)", message
    )
    if path and re.search(r'Parser key "[\w.]*(method|transforms)', message):
        return str(unknown("method", path.group(1), known))
    refused = re.search(r"Option '([\w.]+)' is not accepted", message)
    owner = re.search(r"class_path '[\w.]*?(\w+)'", message)
    if refused and owner and owner.group(1) in known:
        settings = [spec.name for spec in dataclasses.fields(known[owner.group(1)])]
        return str(unknown(f"setting of {owner.group(1)}", refused.group(1), settings))
    option = re.search(r"(?:unrecognized arguments|Unrecognized arguments): (.+)", message)
    if option:
        named = re.search(r"--(?:method|transforms)\.(?:init_args\.)?(\w+)", option.group(1))
        if named:
            return str(
                unknown("setting", named.group(1), {f.name for k in known.values() for f in dataclasses.fields(k)})
            )
        return f"Unknown option {option.group(1)}."
    return re.sub(r"\s*\n\s*", " ", message).strip()
