"""The verb ``methods``: every merge method from what its class declares, as a list, a page, or the README's table."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_merge.errors import unknown

if TYPE_CHECKING:
    from lightning_merge.methods import MergeMethod


def methods(arguments: Sequence[str]) -> int:
    """List every merge method, or explain one: ``lightning-merge methods Ties``."""
    from lightning_merge.methods import available_methods

    known = available_methods()
    if arguments and arguments[0] in {"-h", "--help"}:
        print("usage: lightning-merge methods [NAME | --markdown]\n\n" + (methods.__doc__ or ""))
    elif not arguments:
        print(_method_table(known))
    elif arguments[0] == "--markdown":
        print(method_markdown(known))
    elif arguments[0] in known:
        print(_method_page(known[arguments[0]]))
    else:
        raise unknown("method", arguments[0], known)
    return 0


def _facts(kind: type[MergeMethod]) -> dict[str, str]:
    """What a method declares, as short texts."""
    from lightning_merge.methods import Refinement, Transform

    kinds = {"transform": Transform, "refinement": Refinement}
    return {
        "kind": next((name for name, parent in kinds.items() if issubclass(kind, parent)), "method"),
        "base": "needed" if kind.needs_base else "not needed",
        "reach": _plain(kind).reach,
        "data": "validation" if kind.needs_score else "statistics" if kind.needs_statistics else "none",
        "paper": kind.paper,
    }


def _plain(kind: type[MergeMethod]) -> MergeMethod:
    """A method with its defaults; settings without one get something that fits."""
    from lightning_merge.methods import SimpleAverage

    needed = [spec.name for spec in dataclasses.fields(kind) if _default(spec) == "required"]
    return kind(**{name: SimpleAverage() if name == "method" else "" for name in needed})


def _default(spec: dataclasses.Field[Any]) -> str:
    """The default of a setting, as Python writes it."""
    if spec.default is not dataclasses.MISSING:
        return repr(spec.default)
    return "required" if spec.default_factory is dataclasses.MISSING else repr(spec.default_factory())


def _settings(kind: type[MergeMethod]) -> list[tuple[str, str, str, str]]:
    """Name, type, default and allowed interval of every hyper-parameter."""
    rows = []
    for spec in dataclasses.fields(kind):
        default = _default(spec)
        kind_of = str(spec.type).replace("PerModel", "number | by model | varying")
        kind_of = kind_of.replace("PerTensor", "number | varying")
        rows.append((spec.name, kind_of, default, spec.metadata.get("allowed", "")))
    return rows


def _method_table(known: dict[str, type[MergeMethod]]) -> str:
    """One line a method."""
    from lightning_merge.methods.base import summary

    lines = []
    for name, kind in known.items():
        settings = ", ".join(f"{setting}={default}" for setting, _, default, _ in _settings(kind))
        lines += [f"{name:<16}{summary(kind)}", f"{'':<16}{_facts(kind)['paper']}", f"{'':<16}({settings})", ""]
    return "\n".join([*lines, "Explain one: lightning-merge methods NAME. A transform composes before any method."])


def method_markdown(known: dict[str, type[MergeMethod]]) -> str:
    """Return the methods as the Markdown table of the README."""
    from lightning_merge.methods.base import summary

    lines = [
        "| method | what it does | kind | base | data | settings (default) | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, kind in known.items():
        facts = _facts(kind)
        settings = ", ".join(f"`{setting}={default}`" for setting, _, default, _ in _settings(kind)) or "none"
        cells = [f"`{name}`", summary(kind).rstrip("."), facts["kind"], facts["base"], facts["data"], settings]
        lines.append("| " + " | ".join([*cells, facts["paper"]]) + " |")
    return "\n".join(lines)


def _method_page(kind: type[MergeMethod]) -> str:
    """Everything a method declares."""
    lines = [kind.__name__, "", inspect.getdoc(kind) or "", "", "Facts:"]
    lines += [f"  {name:<8}{value}" for name, value in _facts(kind).items()]
    lines += ["", "Settings:"]
    lines += [f"  {name} ({kind_of}) = {default}   {allowed}" for name, kind_of, default, allowed in _settings(kind)]
    return "\n".join(lines)
