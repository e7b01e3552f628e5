"""From a mergekit recipe to merges of ours: parts over disjoint tensors of the result, and the files beside them.

Everything is checked from headers; no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.execution import Part
from lightning_merge.mergekit.architectures import is_vocabulary
from lightning_merge.mergekit.companions import companions_of_merge
from lightning_merge.mergekit.grammar import Recipe, parse_documents
from lightning_merge.mergekit.methods import (
    MethodSpec,
    Settings,
    Steps,
    check_parameter_name,
    method_spec,
)
from lightning_merge.mergekit.models import Companions, Model, Models, PlannedWeights
from lightning_merge.mergekit.outputs import Output, planned_modules
from lightning_merge.mergekit.parameters import all_levels, filters, resolve
from lightning_merge.mergekit.tokenizer import Alignment, align, differing_vocabularies
from lightning_merge.mergekit.values import Reference
from lightning_merge.methods.base import Step
from lightning_merge.methods.schedule import ByTensor
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights import Finding, TensorInfo
from lightning_merge.weights.compatibility import CONFIG_KEYS
from lightning_merge.weights.views import CastTensor, LazyTensor, ViewSource

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class RecipePlan:
    """What one document of a recipe makes.

    Attributes:
        name: The document's ``name``, by which later documents call its result.
        recipe: The document as it was written.
        parts: The merges; each covers tensors of its own.
        companions: Files beside the weights, by name: text or bytes to write, or a file to copy.
        dtype: Floating-point dtype of the result; ``None`` keeps that of the models.
        findings: What is worth knowing before it runs.
        planned: Stands for the result in the plans of later documents; tell it where the result was written.
    """

    name: str | None
    recipe: str
    parts: tuple[Part, ...]
    companions: Companions
    dtype: torch.dtype | None
    findings: tuple[Finding, ...]
    planned: PlannedWeights = field(repr=False)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor of the result."""
        return self.planned.tensors

    def merge(self, seed: int = 0) -> dict[str, Tensor]:
        """Merge in memory; see :meth:`lightning_merge.methods.MergeMethod.__call__`."""
        merged: dict[str, Tensor] = {}
        for part in self.parts:
            merged |= part.method(part.task_vectors, transforms=part.transforms, seed=seed, dtype=self.dtype)
        return {name: merged[name] for name in self.tensors}


def read_recipe(source: str | Path) -> list[RecipePlan]:
    """Plan a recipe of mergekit, unchanged, from headers alone.

    Args:
        source: A YAML file, or its text; several documents are several merges, and one may use another's ``name``.

    Returns:
        A plan for each document; each comes after those it uses.

    Raises:
        UserError: An unknown key, method or parameter, models that do not fit, or something that is not supported.

    Cost: headers, configs and, where the recipe has a tokenizer entry, tokenizers.
    """
    plans: list[RecipePlan] = []
    planned: dict[str, PlannedWeights] = {}
    for recipe in _in_order(parse_documents(source)):
        plan = _Planner(recipe, Models(planned)).plan()
        plans.append(plan)
        if recipe.name is not None:
            planned[recipe.name] = plan.planned
    return plans


def _in_order(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Sort documents so that each comes after those it uses."""
    by_name: dict[str | None, Recipe] = {}
    for recipe in recipes:
        if recipe.name in by_name:
            what = f"are called '{recipe.name}'" if recipe.name else "have no name"
            raise UserError(f"Two documents {what}. Expected a name of its own for each but the last merge.")
        by_name[recipe.name] = recipe
    ordered: list[Recipe] = []
    entered: list[Recipe] = []

    def visit(recipe: Recipe) -> None:
        if recipe in ordered:
            return
        if recipe in entered:
            names = " -> ".join(str(one.name) for one in [*entered[entered.index(recipe) :], recipe])
            raise UserError(f"The documents use each other in a circle ({names}). Expected an order in which they run.")
        entered.append(recipe)
        for reference in recipe.dependencies:
            if reference.path in by_name:
                visit(by_name[reference.path])
        entered.remove(recipe)
        ordered.append(recipe)

    for recipe in recipes:
        visit(recipe)
    return ordered


@dataclass
class _Group:
    """Tensors that one part merges: equal models, base and steps, up to numbers."""

    base: Reference | None
    models: tuple[Reference, ...]
    steps: dict[str, Steps] = field(default_factory=dict)
    entries: dict[Reference, dict[str, LazyTensor]] = field(default_factory=dict)


class _Planner:
    def __init__(self, recipe: Recipe, models: Models) -> None:
        self.recipe, self.models = recipe, models
        self.spec: MethodSpec = method_spec(recipe.method)
        self.findings = [Finding("WARN", note) for note in recipe.notes]
        self.names: set[str] = set()
        self._steps: dict[str, Steps] = {}

    def plan(self) -> RecipePlan:
        recipe = self.recipe
        self._check_parameters()
        references = recipe.references
        donor = self.models.open(references[0])
        modules = list(planned_modules(recipe, self.models, donor))
        self.findings += [
            Finding(
                "WARN", f"The recipe leaves out the module '{module.layout.name}': it comes from the base as it is."
            )
            for module in modules
            if module.copied
        ]
        every = [self.models.open(reference) for reference in references]
        for model in every[1:]:
            self._compare_configs(donor, model)
        alignment = align(recipe, every, self.models.open)
        if alignment is None:
            self.findings += differing_vocabularies(every)
        else:
            self.findings += alignment.findings
        groups: dict[Any, _Group] = {}
        for module in modules:
            for output in module.outputs:
                self._add(output, groups, alignment)
        self._check_filters()
        name = recipe.out_dtype or recipe.dtype
        dtype = DTYPES[name] if name else None
        parts = tuple(self._part(group) for group in groups.values())
        tensors = {
            name: TensorInfo(info.shape, dtype) if dtype and info.dtype.is_floating_point else info
            for part in parts
            for name, info in part.task_vectors.template.tensors.items()
        }
        companions = companions_of_merge(recipe, donor, every, modules, alignment, tensors)
        planned = PlannedWeights(recipe.name or "the merge", dict(sorted(tensors.items())), companions)
        return RecipePlan(recipe.name, recipe.text, parts, companions, dtype, tuple(self.findings), planned)

    def _compare_configs(self, donor: Model, model: Model) -> None:
        """Note what shapes do not show; sizes of vocabularies and tied weights are dealt with."""
        for key in CONFIG_KEYS:
            one, other = donor.config.get(key), model.config.get(key)
            if None not in (one, other) and one != other and key not in ("vocab_size", "tie_word_embeddings"):
                self._warn(
                    f"config.json: '{key}' is {other!r} in '{model.reference}' and {one!r} in '{donor.reference}'."
                )

    # --- parameters --------------------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        known = {parameter.name: parameter for parameter in self.spec.parameters}
        for place, parameters, level in all_levels(self.recipe):
            for name in parameters:
                if not check_parameter_name(self.spec, name, place):
                    self._warn(f"{place}: '{name}' has no effect on {self.spec.name}, here as in mergekit.")
                elif level == "source" and known[name].scope == "shared":
                    self._warn(
                        f"{place}: '{name}' has no effect under a model, here as in mergekit. Expected it under "
                        "parameters of the slice or of the recipe."
                    )
                elif known[name].note:
                    self._warn(f"{place}: '{name}' {known[name].note}.")

    def _check_filters(self) -> None:
        for place, parameters, _ in all_levels(self.recipe):
            for name, setting in parameters.items():
                for pattern in filters(setting):
                    if not any(pattern in tensor for tensor in self.names):
                        self._warn(f"{place}.{name}: the filter '{pattern}' fits no tensor.")

    def _warn(self, message: str) -> None:
        finding = Finding("WARN", message)
        if finding not in self.findings:
            self.findings.append(finding)

    def _settings(self, output: Output) -> Settings:
        shared, by_model = {}, {}
        for parameter in self.spec.parameters:
            if parameter.scope == "shared":
                shared[parameter.name] = resolve(parameter, output.levels, output.name, output.t, self.spec.name)
                continue
            values = {}
            for entry in output.inputs:
                reference = entry.model.reference
                levels = [entry.parameters, *output.levels]
                if parameter.scope == "non_base" and reference == output.base:
                    if parameter.name in entry.parameters[1]:
                        self._warn(f"{entry.parameters[0]}: '{parameter.name}' has no effect on the base model.")
                    continue
                note = ", which takes the base_model for one of the models" if reference == output.base else ""
                owner = f"{self.spec.name}{note}: the model '{reference}'"
                values[str(reference)] = resolve(parameter, levels, entry.name, output.t, owner)
            by_model[parameter.name] = values
        return Settings(shared, by_model)

    def _steps_for(self, output: Output) -> Steps:
        if output.copied:
            return method_spec("passthrough").build(Settings({}, {"scale": {"": None}}))
        settings = self._settings(output)
        key = repr(settings)
        if key not in self._steps:
            try:
                self._steps[key] = self.spec.build(settings)
            except UserError as error:
                raise UserError(f"{self.spec.name} for the tensor '{output.name}': {error}") from error
        return self._steps[key]

    # --- tensors -----------------------------------------------------------------------------------------------------

    def _add(self, output: Output, groups: dict[Any, _Group], alignment: Alignment | None) -> None:
        """Put a tensor into the group of those merged alike."""
        output = self._copied(output)
        references = tuple(entry.model.reference for entry in output.inputs)
        ignored = output.copied or self.spec.base == "ignored"
        base = None if ignored or output.base not in references else output.base
        if not output.copied:
            self.spec.check_inputs([str(ref) for ref in references], str(output.base or "") or None, output.where)
        self.names |= {output.name, *(entry.name for entry in output.inputs)}
        tensors = {}
        for entry in output.inputs:
            tensor = entry.model.tensor(entry.name)
            assert tensor is not None
            tensors[entry.model.reference] = tensor
        words = output.kind != "layer" and is_vocabulary(
            output.name,
            [(tensors[entry.model.reference].info.shape, entry.model.vocabulary_size) for entry in output.inputs],
        )
        if words and alignment is not None:
            tensors = alignment.gather(tensors, output.base)
        _check_shapes(output, tensors, words)
        steps = self._steps_for(output)
        models = tuple(reference for reference in references if reference != base)
        if not models:
            raise UserError(f"{output.where} has only the base_model '{base}'. Expected a model to merge into it.")
        group = groups.setdefault((base, models, _signature(steps)), _Group(base, models))
        group.steps[output.name] = steps
        for reference, tensor in tensors.items():
            group.entries.setdefault(reference, {})[output.name] = tensor

    @staticmethod
    def _copied(output: Output) -> Output:
        """Integers are copied: from the base, or from the first model that has them."""
        first = output.inputs[0]
        tensor = first.model.tensor(first.name)
        if output.copied or tensor is None or tensor.info.dtype.is_floating_point:
            return output
        based = [entry for entry in output.inputs if entry.model.reference == output.base]
        return replace(output, inputs=tuple(based[:1] or [first]), copied=True)

    def _part(self, group: _Group) -> Part:
        views = {reference: ViewSource(str(reference), entries) for reference, entries in group.entries.items()}
        models: dict[str, Any] = {str(reference): views[reference] for reference in group.models}
        base = views[group.base] if group.base is not None else None
        first = base if base is not None else models[min(models)]
        dtypes = {name: self._compute_dtype([view.entries[name] for view in views.values()]) for name in first.tensors}
        template = ViewSource(first.label, {name: CastTensor(e, dtypes[name]) for name, e in first.entries.items()})
        task_vectors = TaskVectors(base, template, models=models)
        method = _varying([steps[0] for steps in group.steps.values()], list(group.steps))
        count = len(next(iter(group.steps.values()))[1])
        transforms = tuple(
            _varying([steps[1][i] for steps in group.steps.values()], list(group.steps)) for i in range(count)
        )
        for step in (*transforms, method):
            step.check(task_vectors)
        return Part(method, task_vectors, transforms)

    def _compute_dtype(self, entries: Sequence[LazyTensor]) -> torch.dtype:
        """What mergekit computes in: the recipe's dtype, or the smallest that holds all inputs."""
        promoted = reduce(torch.promote_types, [entry.nominal for entry in entries])
        return DTYPES[self.recipe.dtype] if self.recipe.dtype and promoted.is_floating_point else promoted


def _check_shapes(output: Output, tensors: Mapping[Reference, LazyTensor], words: bool) -> None:
    shapes = {reference: tensor.info.shape for reference, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{list(shape)} in '{reference}'" for reference, shape in shapes.items())
        advice = "Expected equal shapes."
        if words:
            advice = (
                "Their vocabularies differ in size; expected an entry that says how tokens are matched, such as "
                "tokenizer: {source: union} or {source: base}."
            )
        raise UserError(f"The tensor '{output.name}' has different shapes: {listed}. {advice}")
    floating = {reference: tensor.info.dtype.is_floating_point for reference, tensor in tensors.items()}
    if len(set(floating.values())) > 1:
        odd = next(reference for reference, is_floating in floating.items() if not is_floating)
        raise UserError(
            f"The tensor '{output.name}' holds integers in '{odd}' and floating-point numbers elsewhere. "
            "Expected the same kind everywhere."
        )


# --- one step for many tensors ---------------------------------------------------------------------------------------


def _signature(steps: Steps) -> tuple[Any, ...]:
    """What must be equal for steps to be one step whose numbers vary."""
    return tuple(
        (type(step), *(repr(getattr(step, spec.name)) for spec in fields(step) if "allowed" not in spec.metadata))
        for step in (steps[0], *steps[1])
    )


def _varying(steps: Sequence[Any], names: Sequence[str]) -> Any:
    """Return one step with the numbers that each tensor has."""
    first: Step = steps[0]
    changed = {}
    for spec in fields(first):
        values = [getattr(step, spec.name) for step in steps]
        if any(value != values[0] for value in values):
            changed[spec.name] = ByTensor(dict(zip(names, values, strict=True)))
    return replace(first, **changed)
