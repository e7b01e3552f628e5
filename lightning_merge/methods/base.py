"""What every merge method declares, how its hyper-parameters are checked, and the three steps it is written in."""

from __future__ import annotations

import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeAlias, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from lightning_merge.errors import UserError, nearest
from lightning_merge.methods.schedule import depths, numbers_in, settle, varies
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.tensor_view import TensorView, add_delta
from lightning_merge.weights import TensorInfo

# What measuring a piece yields; tensors with the same key are added, over chunks, threads and ranks alike. What belongs
# to one grid block is a list under a key of its own: thousands of small tensors that stay would cut the freed buffers
# of later pieces into holes too small to use again (measured: 20 bytes for each parameter of the model).
Partial = dict[Hashable, Any]
MYPY = False  # what mypy takes for true, and jsonargparse, unlike TYPE_CHECKING, for what it is
if MYPY:
    # By the time a kernel runs, a setting is one number, or one for each model by name.
    PerModel: TypeAlias = float | dict[str, float]
    PerTensor: TypeAlias = float
else:
    # What a user may give: either may also vary over the tensors, see methods/schedule.py.
    PerModel = float | dict[str, Any] | list[Any]
    PerTensor = float | list[Any]


def hyperparameter(default: Any, allowed: str) -> Any:
    """Declare a numeric hyper-parameter with its default and allowed interval, such as ``"(0, 1]"``."""
    return field(default=default, metadata={"allowed": allowed})


@dataclass(frozen=True)
class Header:
    """What is known before values are read: the tensors in reach of a step, the models' names and the seed."""

    tensors: Mapping[str, TensorInfo]
    models: tuple[str, ...]
    seed: int = 0


@dataclass
class Context:
    """What a step has learned from measuring; ``complete`` ends the measuring passes."""

    complete: bool = True


@dataclass(frozen=True)
class Step(ABC):
    """A frozen set of typed hyper-parameters over pure kernels, written so that it streams.

    ``begin`` plans from headers; while the context is not complete, one pass over the pieces calls ``measure`` and the
    summed partials go to ``conclude``; a last pass calls ``apply``. Elementwise steps have only the last. The reach of
    a measuring pass is the step's ``scope``: one tensor, or the whole model.
    """

    paper: ClassVar[str] = ""
    needs_base: ClassVar[bool] = True
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    needs_statistics: ClassVar[bool] = False
    needs_score: ClassVar[bool] = False
    # Whether the step draws at random; each such step of a chain has draws of its own.
    draws: ClassVar[bool] = False
    # Whether ``apply`` is plain torch on the view's tensors, so that they may lie on an accelerator.
    device_ready: ClassVar[bool] = False
    # For plans: fp32 copies of a piece of all models that ``apply`` holds at once, and the share of the entries that
    # measuring keeps.
    tensor_copies: ClassVar[float] = 3.0
    kept_share: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in fields(self):
            value = getattr(self, spec.name)
            if get_origin(hints[spec.name]) is Literal and value not in get_args(hints[spec.name]):
                choices = [str(choice) for choice in get_args(hints[spec.name])]
                raise UserError(
                    f"{type(self).__name__}: {spec.name} must be one of {', '.join(choices)}, got {value!r}."
                    f"{nearest(str(value), choices)}"
                )
            if "allowed" in spec.metadata:
                for entry in numbers_in(type(self).__name__, spec.name, value):
                    check_interval(type(self).__name__, spec.name, entry, spec.metadata["allowed"])

    @property
    def reach(self) -> Literal["tensor", "model"]:
        """Over what one measuring pass goes."""
        return "tensor"

    @property
    def layout(self) -> Literal["pieces", "rows", "tensor"]:
        """What a view must hold: any piece, whole rows (slices along the first axis), or the whole tensor."""
        return "pieces"

    @property
    def elementwise(self) -> bool:
        """Whether an output entry depends on the same entry of the inputs only."""
        return type(self).measure is Step.measure

    @property
    def measuring_passes(self) -> float:
        """How many passes a step usually measures before it is applied, samples not counted; for plans."""
        return 0.0 if self.elementwise else 1.0

    @property
    def reads_base(self) -> bool:
        """Whether the base is read where there is one; for plans."""
        return True

    @property
    def reads_own_entries(self) -> bool:
        """Whether the models' own entries are read beside their task vectors when it is applied; for plans."""
        return False

    def check(self, task_vectors: TaskVectors) -> None:
        """Check the models against what the step can do, from headers alone.

        Raises:
            UserError: A missing base, too few or too many models, or a setting for a model that is not there.
        """
        if self.needs_base and task_vectors.base is None:
            raise UserError(
                f"{type(self).__name__} needs a base model (task vectors are θ − θ₀), and none is given. "
                "Expected --base REF."
            )
        for step in self.settled(task_vectors.tensor_names).values() if self.varying else [self]:
            step.check_models(task_vectors.names)

    @property
    def varying(self) -> tuple[str, ...]:
        """Names of the settings that differ from tensor to tensor."""
        return tuple(f.name for f in fields(self) if "allowed" in f.metadata and varies(getattr(self, f.name)))

    def settled(self, names: Sequence[str]) -> dict[str, Step]:
        """Return for each tensor this step with the numbers that hold for it.

        Raises:
            UserError: A setting varies that is ranked or measured over the whole model, or no rule fits a tensor.
        """
        name = type(self).__name__
        varying = self.varying
        # What a step measures over the model goes by one number; the scale only multiplies what came of it.
        whole = [field for field in varying if field != "scale"]
        if whole and self.reach == "model":
            raise UserError(
                f"{name}: {whole[0]} varies over the tensors, but goes by the whole model here. "
                "Expected one number, or a scope of 'tensor'."
            )
        at = depths(names)
        made: dict[str, Step] = {}
        steps = {}
        for tensor in names:
            values = {field: settle(f"{name}: {field}", getattr(self, field), tensor, at[tensor]) for field in varying}
            key = repr(values)
            if key not in made:
                made[key] = replace(self, **values)
            steps[tensor] = made[key]
        return steps

    def check_models(self, models: Sequence[str]) -> None:
        """Check what can be told from the models' names alone, before there are any weights.

        Args:
            models: Names, in the order of the task vectors.

        Raises:
            UserError: Too few or too many models, or a setting for a model that is not there.
        """
        name, count = type(self).__name__, len(models)
        if count < self.min_models or (self.max_models is not None and count > self.max_models):
            most = "" if self.max_models is None else f" and at most {self.max_models}"
            wanted = f"at least {self.min_models}{most} models"
            if self.min_models == self.max_models:
                wanted = f"exactly {self.min_models} model{'s' if self.min_models > 1 else ''}"
            raise UserError(f"{name} takes {wanted}, got {count}.")
        for spec in fields(self):
            value = getattr(self, spec.name)
            if "allowed" in spec.metadata and isinstance(value, dict):
                one_for_each(f"{name}: {spec.name}", value, models)

    def begin(self, header: Header) -> Context:
        """Plan from headers."""
        return Context()

    def measure(self, view: TensorView, context: Any) -> Partial:
        """Measure one piece."""
        return {}

    def conclude(self, partial: Partial, context: Any) -> Context:
        """Turn what was measured over the step's reach into the next context."""
        return context

    @abstractmethod
    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Compute one piece: merged weights ``(n,)`` for a method, task vectors ``(T, n)`` for a transform."""


@dataclass(frozen=True)
class MergeMethod(Step):
    """A merge of T models into one: call it on :class:`~lightning_merge.TaskVectors` to get a state dict."""

    def __call__(
        self,
        task_vectors: TaskVectors,
        transforms: Sequence[Transform] = (),
        seed: int = 0,
        dtype: torch.dtype | None = None,
        score: Callable[[dict[str, Tensor]], float] | None = None,
    ) -> dict[str, Tensor]:
        """Merge in memory.

        Args:
            task_vectors: The models, over their base.
            transforms: Transforms of the task vectors, applied in order before the merge.
            seed: Seed of the methods that draw at random.
            dtype: Floating-point dtype of the result; the base's by default.
            score: For methods that select by validation: a state dict to a score, higher is better.

        Returns:
            The merged weights under the base's names; tied names share one tensor.

        Raises:
            UserError: The models do not fit the method; see :meth:`check`.
        """
        from lightning_merge.methods.streaming import merge_in_memory

        return merge_in_memory(self, task_vectors, transforms, seed, dtype, score)


class TensorMerge(MergeMethod):
    """A merge with one output tensor for each input name."""


class ModelMerge(MergeMethod):
    """A merge that needs whole models between its steps; it reduces to a :class:`TensorMerge` over chosen models."""

    @abstractmethod
    def plan(
        self,
        task_vectors: TaskVectors,
        transforms: Sequence[Transform],
        score: Callable[[dict[str, Tensor]], float],
        seed: int,
    ) -> tuple[TensorMerge, TaskVectors]:
        """Return the merge and the models to which this method reduces, after asking ``score`` as often as needed."""

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Not reached: :meth:`plan` names the merge that is applied."""
        raise TypeError(f"{type(self).__name__} is applied through its plan.")


@dataclass(frozen=True)
class Transform(MergeMethod):
    """A change of task vectors before they are merged; used as a method, it means task arithmetic after it."""


@dataclass(frozen=True)
class Refinement(TensorMerge):
    """A correction of what another method has merged: ``apply`` finds its result in ``view.merged``.

    A concrete refinement has a field ``method``, the merge it corrects; transforms go before that.
    """

    method: MergeMethod


def per_model(what: str, value: PerModel, models: Sequence[str]) -> list[float]:
    """Spread a setting over the models, in their order.

    Raises:
        UserError: The setting names a model that is not there, or leaves one out.
    """
    if not isinstance(value, Mapping):
        return [float(value)] * len(models)
    one_for_each(what, value, models)
    return [float(value[name]) for name in models]


def one_for_each(what: str, value: Mapping[str, Any], models: Sequence[str]) -> None:
    """Check that a setting by model has one entry for each model.

    Raises:
        UserError: It names a model that is not there, or leaves one out.
    """
    for name in value:
        if name not in models:
            raise UserError(
                f"{what} names the model '{name}', which is not there. Known: {', '.join(models)}."
                f"{nearest(str(name), models)}"
            )
    missing = [name for name in models if name not in value]
    if missing:
        raise UserError(
            f"{what} has no value for the model '{missing[0]}'. Expected one for each of {', '.join(models)}."
        )


def check_interval(owner: str, name: str, value: Any, allowed: str) -> None:
    """Refuse a number outside an interval such as ``"(0, 1]"``, with the nearest sensible value.

    Raises:
        UserError: The value is no number, or lies outside.
    """
    low, high = (float(bound) for bound in re.findall(r"-?(?:inf|[\d.]+)", allowed))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)

    def inside(x: float) -> bool:
        above = x >= low if allowed.startswith("[") else x > low
        return above and (x <= high if allowed.endswith("]") else x < high)

    if not number or math.isnan(value) or math.isinf(value) or not inside(value):
        shown = f"{value:g}" if number else repr(value)
        meant = f" Did you mean {value / 100:g}?" if number and 1 < value <= 100 and inside(value / 100) else ""
        raise UserError(f"{owner}: {name} must be in {allowed}, got {shown}.{meant}")


def ordered_sum(values: Tensor) -> Tensor:
    """Sum ``(T, n)`` over the models one after another, so that neither chunks nor threads change a bit."""
    total = values[0].clone()
    for row in values[1:]:
        total += row
    return total


def take_selected(merged_delta: Tensor, view: TensorView, models: Sequence[int] | None = None) -> Tensor:
    """Return θ₀ + δ, but the very entry of model t where δ is exactly that model's τ_t.

    θ₀ + (θ_t − θ₀) rounds away up to 1.6 % of the entries where τ is much larger than θ₀.

    Args:
        merged_delta: δ, ``(n,)``.
        view: The piece it belongs to.
        models: Positions of the models that may be selected; all of them by default.
    """
    merged = add_delta(view.base, merged_delta)
    original = view.original
    for position in range(len(original.models)) if models is None else models:
        delta, own = original.deltas[position], original.finetuned[position]
        if merged.device.type != "cpu":
            merged = torch.where(merged_delta == delta, own, merged)
            continue
        # Few entries round: finding them, by their bits since −0 is not +0, costs less than a choice for each.
        integers = torch.int64 if merged.dtype == torch.float64 else torch.int32
        rounded = np.not_equal(merged.view(integers).numpy(), own.view(integers).numpy())
        rounded &= np.equal(merged_delta.numpy(), delta.numpy())
        if rounded.any():
            at = torch.from_numpy(np.flatnonzero(rounded))
            merged[at] = own[at]
    return merged


def kept_count(fraction: float, count: int) -> int:
    """Return how many of ``count`` entries a fraction means: rounded down, forgiving the fraction's own rounding."""
    return math.floor(fraction * count + 1e-6)


def summary(kind: type) -> str:
    """Return the first sentence of a class's docstring."""
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
