"""Which tensors a recipe makes, of which tensors of which models, and where each lies in its slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_merge.errors import UserError, nearest
from lightning_merge.mergekit.architectures import Layout, ModuleLayout, Stack
from lightning_merge.mergekit.grammar import Module, Parameters, Recipe, Slice, Source
from lightning_merge.mergekit.models import Model, Models
from lightning_merge.mergekit.values import Reference

Kind = Literal["before", "layer", "after"]


@dataclass(frozen=True)
class Input:
    """One model's part in a tensor: its name there, and the model's own parameters."""

    model: Model
    name: str
    parameters: tuple[str, Parameters]


@dataclass(frozen=True)
class Output:
    """One tensor of the result.

    Attributes:
        name: Its name in the result.
        kind: Whether it stands before the layers, in one, or after them.
        t: Depth of its layer in the slice, from 0 to 1; 0 outside of layers.
        base: The base model, where there is one.
        inputs: The models it is made of.
        levels: Parameters of slice, module and recipe, the strongest first, each with its place.
        where: The slice, for messages.
        copied: Whether the recipe leaves its module out, so that it comes from the base as it is.
    """

    name: str
    kind: Kind
    t: float
    base: Reference | None
    inputs: tuple[Input, ...]
    levels: tuple[tuple[str, Parameters], ...]
    where: str
    copied: bool = False


@dataclass(frozen=True)
class ModulePlan:
    """A module of the result: its layout in the donor of config.json, and the layer that each of its layers is from."""

    layout: ModuleLayout
    layers: tuple[tuple[Model, int], ...]
    outputs: tuple[Output, ...]
    copied: bool = False


def planned_modules(recipe: Recipe, models: Models, donor: Model) -> Iterator[ModulePlan]:
    """Yield what each module of the result is made of.

    Args:
        recipe: The document.
        models: Opens its models.
        donor: The model whose config the result takes: the base, or the first.

    Raises:
        UserError: A layer range goes beyond a model, or models differ in their layers or tensors.
    """
    layout = donor.layout
    if "" in recipe.modules:
        module = recipe.modules[""]
        if not module.whole and len(layout.modules) > 1:
            raise UserError(
                f"'{donor.reference}' has the modules {_called(layout)}, so that slices need a module. "
                "Expected modules: {NAME: {slices: [...]}}."
            )
        chosen = {part.name: module for part in layout.modules}
    else:
        chosen = _by_module(recipe.modules, layout, donor)
    for part in layout.modules:
        yield _ModulePlanner(recipe, models, part, chosen.get(part.name)).plan()


def _by_module(modules: Mapping[str, Module], layout: Layout, donor: Model) -> dict[str, Module]:
    chosen: dict[str, Module] = {}
    for name, module in modules.items():
        found = [part for part in layout.modules if name in part.aliases]
        if not found and name == "default" and len(layout.modules) == 1:
            found = [layout.modules[0]]
        if not found:
            known = [alias for part in layout.modules for alias in sorted(part.aliases)]
            raise UserError(
                f"'{donor.reference}' has no module '{name}'. Known: {', '.join(known)}.{nearest(name, known)}"
            )
        chosen[found[0].name] = module
    return chosen


def _called(layout: Layout) -> str:
    return ", ".join(part.name for part in layout.modules)


class _ModulePlanner:
    def __init__(self, recipe: Recipe, models: Models, part: ModuleLayout, module: Module | None) -> None:
        self.recipe, self.models, self.part = recipe, models, part
        inside = f"modules.{part.name}." if "" not in recipe.modules else ""
        if module is None:
            # What a recipe leaves out of its modules comes from the base as it is.
            base = recipe.base or recipe.references[0]
            module = Module((Slice((Source(base, None, {}),), base, {}),), {}, whole=True)
            self.copied = True
        else:
            self.copied = False
        self.module, self.inside = module, inside

    def plan(self) -> ModulePlan:
        slices = [self._with_base(part) if self.module.whole else part for part in self.module.slices]
        outputs: list[Output] = []
        outputs += self._outside("before", slices[0], 0)
        layers: list[tuple[Model, int]] = []
        for index, part in enumerate(slices):
            for output, origin in self._layers(part, index, len(layers)):
                outputs += output
                layers.append(origin)
        outputs += self._outside("after", slices[-1], len(slices) - 1)
        return ModulePlan(self.part, tuple(layers), tuple(outputs), self.copied)

    def _with_base(self, part: Slice) -> Slice:
        """A base that is not listed among the models takes part too."""
        base = self.recipe.base
        if base is None or any(source.model == base for source in part.sources):
            return part
        return Slice((*part.sources, Source(base, None, {})), part.base, part.parameters)

    def _layers(self, part: Slice, index: int, made: int) -> Iterator[tuple[list[Output], tuple[Model, int]]]:
        where = self._where(index)
        stacks = {source.model: self._stack(self.models.open(source.model)) for source in part.sources}
        ranges: dict[Reference, tuple[int, int]] = {}
        for number, source in enumerate(part.sources):
            stack = stacks[source.model]
            held = stack.count if stack else 0
            start, stop = source.layers or (0, held)
            if stack is None and source.layers:
                raise UserError(
                    f"{where}: no layers are found in '{source.model}'. "
                    "Expected names with a number, such as model.layers.0.mlp.up_proj.weight."
                )
            if stop > held:
                what = "models" if self.module.whole else "sources"
                raise UserError(
                    f"{where}.{what}[{number}].layer_range is [{start}, {stop}], but '{source.model}' has {held} "
                    f"layers. Expected at most [0, {held}]."
                )
            ranges[source.model] = start, stop
        counts = {stop - start for start, stop in ranges.values()}
        if len(counts) > 1:
            listed = ", ".join(f"'{model}' {stop - start}" for model, (start, stop) in ranges.items())
            raise UserError(f"{where}: the models have different numbers of layers ({listed}). Expected equal ones.")
        count = counts.pop()
        for i in range(count):
            t = i / (count - 1) if count > 1 else 1.0
            places = [(source, stacks[source.model], ranges[source.model][0] + i) for source in part.sources]
            yield (
                self._layer(part, index, made + i, t, places),
                (self.models.open(part.sources[0].model), places[0][2]),
            )

    def _layer(
        self, part: Slice, index: int, layer: int, t: float, places: Sequence[tuple[Source, Stack | None, int]]
    ) -> list[Output]:
        assert self.part.stack is not None
        held = {source.model: stack.inside[at] for source, stack, at in places if stack is not None}
        inside = sorted(set().union(*held.values()))
        for model, names in held.items():
            missing = [name for name in inside if name not in names]
            if missing:
                at = next(at for source, _, at in places if source.model == model)
                having = next(other for other, theirs in held.items() if missing[0] in theirs)
                raise UserError(
                    f"'{model}' has no tensor '{missing[0]}' in layer {at} ({len(missing)} missing), "
                    f"as '{having}' has. Expected models of one architecture."
                )
        return [
            self._output(
                self.part.stack.name(layer, name),
                "layer",
                t,
                part,
                index,
                {source.model: stack.name(at, name) for source, stack, at in places if stack is not None},
            )
            for name in inside
        ]

    def _outside(self, kind: Kind, part: Slice, index: int) -> Iterator[Output]:
        """The tensors before or after the layers, of all models of a slice."""
        names: dict[str, Model] = {}
        for source in part.sources:
            model = self.models.open(source.model)
            for other in model.layout.modules:
                if other.name == self.part.name:
                    for name in other.before if kind == "before" else other.after:
                        names.setdefault(name, model)
        for name in sorted(names):
            absent = [source.model for source in part.sources if self.models.open(source.model).tensor(name) is None]
            floating = names[name].source.tensors[name].dtype.is_floating_point
            if absent and floating:
                raise UserError(
                    f"'{absent[0]}' has no tensor '{name}', as '{names[name].reference}' has. "
                    "Expected models of one architecture."
                )
            present = {source.model: name for source in part.sources if source.model not in absent}
            yield self._output(name, kind, 0.0, part, index, present)

    def _output(
        self, name: str, kind: Kind, t: float, part: Slice, index: int, names: Mapping[Reference, str]
    ) -> Output:
        inside = "" if self.module.whole else f"slices[{index}]."
        listed = "models" if self.module.whole else "sources"
        inputs = tuple(
            Input(
                self.models.open(source.model),
                names[source.model],
                (f"{self.inside}{inside}{listed}[{number}].parameters", source.parameters),
            )
            for number, source in enumerate(part.sources)
            if source.model in names
        )
        levels = (
            (f"{self.inside}{inside}parameters", part.parameters),
            (f"{self.inside}parameters", self.module.parameters),
            ("parameters", self.recipe.parameters),
        )
        base = part.base or self.recipe.base
        return Output(name, kind, t, base, inputs, levels, self._where(index), self.copied)

    def _where(self, index: int) -> str:
        return f"{self.inside}{'models' if self.module.whole else f'slices[{index}]'}".removesuffix(".")

    def _stack(self, model: Model) -> Stack | None:
        return next((part.stack for part in model.layout.modules if part.name == self.part.name), None)
