"""The arithmetic of merging adapters: factors concatenated, or what a method makes of ΔW, truncated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.low_rank import LowRank, compress, shared_basis, truncate
from lightning_merge.methods import ByTensor, MergeMethod, Refinement, SimpleAverage, TaskArithmetic, Transform
from lightning_merge.methods.average import WeightedAverage
from lightning_merge.methods.base import Step
from lightning_merge.methods.schedule import depths, settle
from lightning_merge.methods.streaming import Chain, resolve
from lightning_merge.recipe import describe
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights import TensorInfo, WeightSource
from lightning_merge.weights.adapter_layout import OF_KNOWN_LAYOUT, AdaptedModule
from lightning_merge.weights.adapter_writer import Factors, as_matrix
from lightning_merge.weights.adapters import AdapterSource

AnyStep = TypeVar("AnyStep", bound=Step)

OR_FULL_WEIGHTS = "or a merge into full weights (lightning-merge merge --base BASE)"


@dataclass
class MergedAdapters:
    """What a merge of adapters comes to.

    Attributes:
        factors: Updates by the modules' names.
        vectors: For (IA)³, vectors by the modules' names.
        whole: Tensors held whole, by the base's names.
        truncated: What truncation took of each matrix, by module; empty where the merge is exact.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    truncated: dict[str, LowRank] = field(default_factory=dict)


class AdapterMerge:
    """One merge of opened adapters, checked when it is made.

    Args:
        adapters: By name, over one base.
        method: The merge.
        transforms: Transforms before it.
        rank: Of the result; none for an exact one.
        seed: Of the methods that draw at random.
        knots: Merge in a basis that the adapters share.

    Raises:
        UserError: The result cannot be written as asked.
    """

    def __init__(
        self,
        adapters: Mapping[str, AdapterSource],
        method: MergeMethod,
        transforms: Sequence[Transform] = (),
        rank: int | None = None,
        seed: int = 0,
        knots: bool = False,
    ) -> None:
        self.adapters = {name: adapters[name] for name in sorted(adapters)}
        self.method, self.transforms, self.rank, self.seed, self.knots = method, transforms, rank, seed, knots
        self.base = next(iter(adapters.values())).base
        for step in [*transforms, method]:
            if not step.varying:  # settings that vary are checked tensor by tensor, later
                step.check_models(tuple(self.adapters))
        self.modules = self._one_layout()
        updated = {name for source in adapters.values() for name in source.layout.updated}
        self.whole = sorted(updated - set(self.modules))
        held = [module for source in adapters.values() for module in source.modules.values()]
        self.is_ia3 = rank is None and bool(held) and all(module.kind == "ia3" for module in held)
        self.is_factored = all(module.kind != "ia3" and not module.is_dora for module in held)
        self.is_linear = not transforms and isinstance(method, (SimpleAverage, WeightedAverage, TaskArithmetic))
        self._refuse_what_no_adapter_holds()
        # Settings that vary over depth go by the depth of the base, however few of its tensors are merged at a time.
        names = (*self.modules, *self.whole)
        at = depths(dict.fromkeys((*TaskVectors(self.base, self.base, {}).tensor_names, *names)))
        at = {name: at[name] for name in names}
        self._method, self._transforms = settled_at(method, at), [settled_at(step, at) for step in transforms]
        self._coefficients = self._linear_coefficients() if self.is_linear else {}

    def _one_layout(self) -> dict[str, AdaptedModule]:
        """Every adapted module by the base's tensor, which must go by one name and be of one kind in all adapters."""
        modules: dict[str, AdaptedModule] = {}
        for model, source in self.adapters.items():
            for weight, module in source.modules.items():
                known = modules.setdefault(weight, module)
                if (known.name, known.feedforward) != (module.name, module.feedforward):
                    raise UserError(
                        f"The adapters update '{weight}' in two ways: as '{known.name}', and in '{model}' as "
                        f"'{module.name}'. Expected adapters over one class of model, {OR_FULL_WEIGHTS}."
                    )
                if known.transposed != module.transposed:
                    raise UserError(
                        f"How '{self.base.label}' stores the square matrix of '{module.name}' is ambiguous: the "
                        f"adapters' configs differ in fan_in_fan_out. Expected a base {OF_KNOWN_LAYOUT}."
                    )
                if weight in source.replaced and not self._is_the_base_own(source, weight):
                    raise UserError(
                        f"The adapter '{model}' updates '{weight}' and also holds it whole, with other values than the "
                        f"base. Expected the base it was trained over, {OR_FULL_WEIGHTS}."
                    )
        return modules

    def _is_the_base_own(self, source: AdapterSource, weight: str) -> bool:
        """Tell whether the copy of an adapted embedding that PEFT wrote beside its update is the base's."""
        copy = source.adapter.read(source.replaced[weight]).to("cpu")
        return torch.equal(copy, self.base.read(weight).to("cpu", copy.dtype))

    def _refuse_what_no_adapter_holds(self) -> None:
        or_rank = f"Expected a rank to truncate to (--rank 16), {OR_FULL_WEIGHTS}."
        if self.knots:
            if self.rank is not None or not self.is_factored:
                raise UserError(
                    "KnOTS merges the factors of LoRA adapters, and exactly. Expected LoRA adapters and no rank."
                )
        elif self.rank is None:
            for model, source in self.adapters.items():
                dora = next((module.name for module in source.modules.values() if module.is_dora), None)
                if dora is not None:
                    raise UserError(
                        f"The adapter '{model}' is a DoRA: its update of '{dora}' has no low rank. {or_rank}"
                    )
            if not self.is_linear:
                steps = describe(self.method, self.transforms)
                raise UserError(f"What {steps} makes of adapters has no low rank. {or_rank}")
            if not self.is_factored and not self.is_ia3:
                raise UserError(f"LoRA and (IA)³ adapters make no exact adapter together. {or_rank}")

    def _linear_coefficients(self) -> dict[str, list[float]]:
        """By what the method multiplies each adapter's change of each tensor, asked of the method itself.

        It merges unit vectors over a base of zeros; one entry more, 1 in the base and in all models, must stay 1.

        Raises:
            UserError: The method's settings do not fit the models, or scale the base as well.
        """
        count = len(self.adapters)
        base = torch.zeros(count + 1, dtype=torch.float64)
        base[count] = 1
        models = {name: base.clone() for name in self.adapters}
        for position, values in enumerate(models.values()):
            values[position] = 1
        names = (*self.modules, *self.whole)
        space = TaskVectors.open(
            {name: base.clone() for name in names},
            {model: {name: values.clone() for name in names} for model, values in models.items()},
            check=False,
        )
        found = {name: values.tolist() for name, values in self._method(space).items()}
        for name in names:
            if abs(found[name][count] - 1) > 1e-6:
                raise UserError(
                    f"{type(self.method).__name__} multiplies the base by {found[name][count]:g} here, and no adapter "
                    "does that. Expected weights that sum to 1 (normalize: true), or TaskArithmetic."
                )
        return {name: values[:count] for name, values in found.items()}

    def run(self) -> MergedAdapters:
        """Merge."""
        merged = MergedAdapters()
        streamed: list[str] = [] if self.is_linear else list(self.whole)
        if self.is_linear:
            merged.whole = {name: self._linear(name) for name in self.whole}
        if self.is_ia3:
            merged.vectors = {module.name: self._vector(weight) for weight, module in self.modules.items()}
        elif self.knots or (self.is_linear and self.is_factored):
            products = self._in_shared_bases() if self.knots else self._concatenations()
            for weight, up, down in products:
                module = self.modules[weight]
                if self.rank is not None:
                    merged.truncated[module.name] = low = compress(up, down, self.rank)
                    up, down = low.up, low.down
                merged.factors[module.name] = self._factors(module, up, down)
        else:
            streamed += self.modules
        for name, change in self._changes(streamed) if streamed else ():
            if name not in self.modules:
                merged.whole[name] = self.base.read(name).to("cpu", torch.float64) + change
                continue
            module = self.modules[name]
            matrix = as_matrix(change, module.kind, module.transposed)
            merged.truncated[module.name] = low = truncate(matrix, self.rank or 1)
            merged.factors[module.name] = self._factors(module, low.up, low.down)
        return merged

    def _factors(self, module: AdaptedModule, up: Tensor, down: Tensor) -> Factors:
        shape = self.base.tensors[module.weight].shape
        kind = module.kind if module.kind != "ia3" else "conv" if len(shape) > 2 else "linear"
        return Factors(kind, up, down, shape)

    def _concatenations(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for weight in self.modules:
            yield weight, *self._concatenated(weight)

    def _concatenated(self, weight: str) -> tuple[Tensor, Tensor]:
        """``[w_1 s_1 B_1 … w_T s_T B_T]`` and ``[A_1; …; A_T]``, of the adapters that update this tensor."""
        parts = [
            (coefficient, *source.factors(weight))
            for coefficient, source in zip(self._coefficients[weight], self.adapters.values(), strict=True)
            if weight in source.modules
        ]
        # An adapter of rank 0 is none: what sums to nothing keeps one direction, of zeros.
        used = [part for part in parts if part[0]] or [(0.0, parts[0][1][:, :1], parts[0][2][:1])]
        return torch.cat([w * up for w, up, _ in used], dim=1), torch.cat([down for _, _, down in used])

    def _in_shared_bases(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Let the method merge the adapters' coordinates in one basis for each matrix; without an update they are 0.

        Steps that reach over the model see the coordinates in all matrices at once, others one matrix at a time.
        """
        steps = [self._method, *self._transforms]
        while isinstance(steps[0], Refinement):
            steps.insert(0, steps[0].method)
        weights = list(self.modules)
        for group in [weights] if any(step.reach == "model" for step in steps) else [[weight] for weight in weights]:
            bases: dict[str, Tensor] = {}
            nothing: dict[str, Tensor] = {}
            models: dict[str, dict[str, Tensor]] = {name: {} for name in self.adapters}
            for weight in group:
                holders = [name for name, source in self.adapters.items() if weight in source.modules]
                bases[weight], parts = shared_basis([self.adapters[name].factors(weight) for name in holders])
                nothing[weight] = torch.zeros_like(parts[0])
                coordinates = dict(zip(holders, parts, strict=True))
                for name, held in models.items():
                    held[weight] = coordinates.get(name, nothing[weight])
            space = TaskVectors.open(nothing, models, check=False)
            merged = self._method(space, self._transforms, seed=self.seed)
            yield from ((weight, bases[weight], merged[weight]) for weight in group)

    def _vector(self, weight: str) -> Tensor:
        """l = 1 + Σ w_t (l_t − 1): the vector whose change of the weights is Σ w_t ΔW_t."""
        change: Tensor | None = None
        for coefficient, source in zip(self._coefficients[weight], self.adapters.values(), strict=True):
            if weight in source.modules:
                vector = source.adapter.read(source.modules[weight].keys["ia3_l"]).to("cpu", torch.float64)
                part = coefficient * (vector - 1)
                change = part if change is None else change + part
        assert change is not None  # some adapter has this module
        return 1 + change

    def _linear(self, name: str) -> Tensor:
        """θ₀ + Σ w_t (θ_t − θ₀) of a tensor that is no adapted matrix."""
        total = self.base.read(name).to("cpu", torch.float64)
        for coefficient, source in zip(self._coefficients[name], self.adapters.values(), strict=True):
            if coefficient and name in source.layout.updated:
                total = total + coefficient * source.delta(name)
        return total

    def _changes(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield what the method makes of each tensor, less the base: in fp64, so that small changes stay exact."""
        base = _InDouble(self.base, names)
        space = TaskVectors.open(base, {name: s.over(base) for name, s in self.adapters.items()}, check=False)
        steps, chosen = resolve(self._method, space, self._transforms, self.seed)
        begun: dict[str, tuple[Tensor, int]] = {}
        for name, start, values in Chain(steps, chosen, self.seed).run():
            whole, filled = begun.pop(name, (torch.empty(space.info(name).numel, dtype=torch.float64), 0))
            whole[start : start + values.numel()] = values
            begun[name] = whole, filled + values.numel()
            if begun[name][1] == whole.numel():
                del begun[name]
                yield name, whole.reshape(space.shape(name)) - base.read(name)


def settled_at(step: AnyStep, at: Mapping[str, float]) -> AnyStep:
    """Return a step whose varying settings are named tensor by tensor, so that it may run over any of these alone.

    Args:
        step: A method or a transform.
        at: The tensors, each with its depth in the whole model.

    Raises:
        UserError: A setting has no value for one of the tensors.
    """
    values: dict[str, Step | ByTensor] = {}
    for spec in fields(step):
        value = getattr(step, spec.name)
        if isinstance(value, Step):
            values[spec.name] = settled_at(value, at)
        elif spec.name in step.varying:
            what = f"{type(step).__name__}: {spec.name}"
            values[spec.name] = ByTensor({name: settle(what, value, name, depth) for name, depth in at.items()})
    return replace(step, **values)


class _InDouble(WeightSource):
    """Some tensors of a source, read in fp64."""

    def __init__(self, source: WeightSource, names: Sequence[str]) -> None:
        self.label, self.source, self.folder = source.label, source, source.folder
        self.aliases, self.inner = {}, (source,)
        self.tensors = {name: TensorInfo(source.tensors[name].shape, torch.float64) for name in sorted(names)}

    def read(self, name: str) -> Tensor:
        """Return a tensor in fp64."""
        return self.source.read(name).to("cpu", torch.float64)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return a piece in fp64."""
        return self.source.read_flat(name, start, stop).to("cpu", torch.float64)
