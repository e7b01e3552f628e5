"""What a recipe's parameters are for one tensor: precedence, filters, and values that change over the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_merge.errors import UserError
from lightning_merge.mergekit.grammar import Parameters, Recipe
from lightning_merge.mergekit.values import is_scalar

Scope = Literal["shared", "input", "non_base"]
REQUIRED = object()
_TRUE, _FALSE = {"true", "yes", "on", "1", "t", "y"}, {"false", "no", "off", "0", "f", "n"}


@dataclass(frozen=True)
class Parameter:
    """A parameter of one of mergekit's methods.

    Attributes:
        name: Its key.
        kind: What its values are.
        scope: One value for a tensor (``shared``), for each input, or for each input but the base.
        default: What it is where a recipe does not say; :data:`REQUIRED` where it must.
        note: What a recipe that sets it should know.
    """

    name: str
    kind: type[float] | type[int] | type[bool] = float
    scope: Scope = "shared"
    default: Any = REQUIRED
    note: str = ""

    def read(self, value: Any, where: str) -> float | int | bool:
        """Read a value of the parameter's kind, which may be written as text.

        Raises:
            UserError: It is none.
        """
        try:
            if self.kind is bool:
                return _truth(value)
            number = float(value)
            if self.kind is int:
                if number != int(number):
                    raise ValueError
                return int(number)
            return number
        except (TypeError, ValueError, OverflowError) as error:
            kinds = {bool: "true or false", int: "a whole number", float: "a number"}
            raise UserError(f"{where} is {value!r}. Expected {kinds[self.kind]}.") from error


def _truth(value: Any) -> bool:
    text = str(value).strip().lower()
    if isinstance(value, float):
        text = f"{value:g}"
    if text not in _TRUE | _FALSE:
        raise ValueError
    return text in _TRUE


def evaluate(setting: Any, parameter: Parameter, tensor: str, t: float, where: str) -> Any:
    """Return what a setting says for one tensor, or ``None`` where none of its rules fits.

    Args:
        setting: A value, values over the layers, or rules of ``filter`` (found in the tensor's name) and ``value``.
        parameter: What is read.
        tensor: The tensor's name.
        t: Where its layer lies between the first (0) and the last (1) of its slice.
        where: The setting's place, for messages.
    """
    if is_scalar(setting):
        return parameter.read(setting, where)
    if isinstance(setting, Mapping):
        setting = [setting]
    if all(is_scalar(entry) for entry in setting):
        values = [parameter.read(entry, where) for entry in setting]
        at = t * (len(values) - 1)
        left = int(at)
        if parameter.kind is bool:
            return values[left]
        right = min(left + 1, len(values) - 1)
        return parameter.read((1 - (at - left)) * values[left] + (at - left) * values[right], where)
    for rule in setting:
        pattern = rule.get("filter")
        if pattern is None or pattern == "*" or pattern in tensor:
            return evaluate(rule["value"], parameter, tensor, t, where)
    return None


def resolve(parameter: Parameter, levels: Sequence[tuple[str, Parameters]], tensor: str, t: float, owner: str) -> Any:
    """Return a parameter's value for one tensor: of the first level that has one, or its default.

    Args:
        parameter: What is looked for.
        levels: Name and parameters of each level, the strongest first.
        tensor: The tensor's name.
        t: Its depth in the slice; see :func:`evaluate`.
        owner: The method, or the model, that the value is for.

    Raises:
        UserError: There is none, and the parameter has no default.
    """
    for place, parameters in levels:
        if parameter.name in parameters:
            setting = parameters[parameter.name]
            value = evaluate(setting, parameter, tensor, t, f"{place}.{parameter.name}".removeprefix("."))
            if value is not None:
                return value
    if parameter.default is REQUIRED:
        raise UserError(
            f"{owner} has no '{parameter.name}' for the tensor '{tensor}'. "
            f"Expected one among its parameters, or parameters: {{{parameter.name}: NUMBER}} for all."
        )
    return parameter.default


def all_levels(recipe: Recipe) -> Iterator[tuple[str, Parameters, str]]:
    """Yield place, content and level (``global``, ``module``, ``slice`` or ``source``) of all parameters."""
    yield "parameters", recipe.parameters, "global"
    for name, module in recipe.modules.items():
        inside = f"modules.{name}." if name else ""
        yield f"{inside}parameters", module.parameters, "module"
        for index, part in enumerate(module.slices):
            place = inside if module.whole else f"{inside}slices[{index}]."
            yield f"{place}parameters", part.parameters, "slice"
            for number, source in enumerate(part.sources):
                listed = "models" if module.whole else "sources"
                yield f"{place}{listed}[{number}].parameters", source.parameters, "source"


def filters(setting: Any) -> Iterator[str]:
    """Yield the filters of a setting."""
    for rule in [setting] if isinstance(setting, Mapping) else setting if isinstance(setting, list) else []:
        if isinstance(rule, Mapping) and rule.get("filter") not in (None, "*"):
            yield rule["filter"]
