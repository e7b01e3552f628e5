"""Run transforms and a merge over task vectors piece by piece: measure, conclude, apply."""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import (
    Context,
    Header,
    MergeMethod,
    ModelMerge,
    Partial,
    Refinement,
    Step,
    Transform,
)
from lightning_merge.methods.random import seed_of_step, uniform
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.tensor_view import TensorView

Item = TypeVar("Item")
Result = TypeVar("Result")
# From what one process has measured of the model to what all of them have.
Exchange = Callable[[Partial], Partial]


class Chain:
    """Transforms, then a method, over task vectors; yields merged pieces in a fixed order.

    Steps that reach over the model measure it in passes of their own, seeing what the steps before them made of it.
    Steps that reach over one tensor measure that tensor just before it is used, so that nothing is kept.

    Args:
        steps: Transforms, a method, and refinements of what it merged.
        task_vectors: The models.
        seed: Of the steps that draw at random.
        threads: How many work side by side; as many as there are cores by default.
        device: Where steps that are ``device_ready`` compute; the others, and all reading, stay on the host, which is
            what ``None`` means for all.

    Cost: one reading pass over all models for each measuring pass of a model-wide step, and one to apply; memory holds
    a few pieces of 2¹⁷ entries of T models for each thread.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        task_vectors: TaskVectors,
        seed: int = 0,
        threads: int | None = None,
        device: str | None = None,
    ) -> None:
        self.device = torch.device(device) if device else None
        self.steps, self.task_vectors, self.seed = list(steps), task_vectors, seed
        self.threads = threads or os.cpu_count() or 1
        drawing = [step.draws for step in self.steps]
        self._seeds = [seed_of_step(seed, sum(drawing[:position])) for position in range(len(self.steps))]
        self._passes = 0
        self._tensor_passes = [0] * len(self.steps)
        self._model_contexts: dict[int, Context] = {}
        self._settled = [step.settled(task_vectors.tensor_names) if step.varying else None for step in self.steps]
        # One step that needs rows or whole tensors has all steps work on those.
        wanted = {step.layout for step in self.steps}
        self.layout = next(layout for layout in ("tensor", "rows", "pieces") if layout in {*wanted, "pieces"})

    @property
    def passes(self) -> int:
        """How often the weights were gone over; of passes over single tensors, the most that one needed."""
        return self._passes + sum(self._tensor_passes)

    def step(self, position: int, name: str) -> Step:
        """Return a step with the settings that hold for one tensor."""
        settled = self._settled[position]
        return self.steps[position] if settled is None else settled[name]

    def pieces(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield the flat ranges in which one tensor is handled."""
        if self.layout == "tensor":
            return iter([(0, self.task_vectors.info(name).numel)])
        return self.task_vectors.row_chunks(name) if self.layout == "rows" else self.task_vectors.chunks(name)

    def run(
        self,
        names: Sequence[str] | None = None,
        measured: Sequence[str] | None = None,
        exchange: Exchange | None = None,
    ) -> Iterator[tuple[str, int, Tensor]]:
        """Yield ``(name, start, merged piece)``.

        Args:
            names: The tensors to merge; all by default.
            measured: The tensors over which model-wide steps are measured here; all by default.
            exchange: Where several processes measure a part of the tensors each: from what one has measured to what
                all have.
        """
        names = self.task_vectors.tensor_names if names is None else names
        for index, step in enumerate(self.steps):
            if step.reach == "model":
                self._measure_model(index, step, measured, exchange)
        self._passes += 1
        yield from self._over_pieces(len(self.steps) - 1, names, self._apply_last)

    def _apply_last(self, view: TensorView, contexts: dict[int, Context]) -> tuple[str, int, Tensor]:
        last = len(self.steps) - 1
        return view.name, view.start, self._apply(last, view, contexts)

    def _apply(self, position: int, view: TensorView, contexts: dict[int, Context]) -> Tensor:
        step = self.step(position, view.name)
        if self.device is None or not step.device_ready:
            return step.apply(view, contexts[position])
        return step.apply(view.on(self.device), contexts[position]).cpu()

    def _measure_model(self, index: int, step: Step, measured: Sequence[str] | None, exchange: Exchange | None) -> None:
        every = self.task_vectors.tensor_names
        tensors = {name: self.task_vectors.info(name) for name in every}
        context = step.begin(Header(tensors, self.task_vectors.names, self._seeds[index]))
        while not context.complete:
            self._passes += 1
            measuring = context
            total: Partial = {}

            # Each thread adds up what it measures: sums over keys do not depend on which thread took which piece.
            threads = threading.local()
            subtotals: list[Partial] = []

            def measure(view: TensorView, _: dict[int, Context], context: Context = measuring) -> None:
                if not hasattr(threads, "subtotal"):  # noqa: B023 - used within this pass only
                    threads.subtotal = {}  # noqa: B023
                    subtotals.append(threads.subtotal)  # noqa: B023
                add_partial(threads.subtotal, step.measure(view, context))  # noqa: B023

            for _ in self._over_pieces(index, every if measured is None else measured, measure):
                pass
            for subtotal in subtotals:
                add_partial(total, subtotal)
            context = step.conclude(exchange(total) if exchange else total, context)
        self._model_contexts[index] = context

    def _over_pieces(
        self, index: int, names: Sequence[str], work: Callable[[TensorView, dict[int, Context]], Result]
    ) -> Iterator[Result]:
        """Do ``work`` on every piece as step ``index`` sees it."""

        def measured(name: str) -> tuple[str, dict[int, Context]]:
            return name, self._tensor_contexts(name, index)

        def piece(at: tuple[str, tuple[int, int], dict[int, Context]]) -> Result:
            name, where, contexts = at
            return work(self._seen_by(name, where, index, contexts), contexts)

        # Tensors are measured a few ahead of the pieces that need them; results are held piece by piece.
        measuring = any(self._measures_tensors(position) for position in range(index + 1))
        ready = in_order(measured, sorted(names), self.threads if measuring else 1)
        pieces = ((name, at, contexts) for name, contexts in ready for at in self.pieces(name))
        yield from in_order(piece, pieces, self.threads)

    def _measures_tensors(self, position: int) -> bool:
        step = self.steps[position]
        return step.reach == "tensor" and not step.elementwise

    def _tensor_contexts(self, name: str, index: int) -> dict[int, Context]:
        """Conclude every step up to ``index`` for one tensor."""
        contexts: dict[int, Context] = {}
        for position in range(index + 1):
            if position in self._model_contexts:
                contexts[position] = self._model_contexts[position]
                continue
            if self.steps[position].reach == "model":
                continue  # the step that is being measured right now
            step = self.step(position, name)
            header = Header({name: self.task_vectors.info(name)}, self.task_vectors.names, self._seeds[position])
            context = step.begin(header)
            passes = 0
            while not context.complete:
                passes += 1
                total: Partial = {}
                for at in self.pieces(name):
                    add_partial(total, step.measure(self._seen_by(name, at, position, contexts), context))
                context = step.conclude(total, context)
            self._tensor_passes[position] = max(self._tensor_passes[position], passes)
            contexts[position] = context
        return contexts

    def _seen_by(self, name: str, at: tuple[int, int], index: int, contexts: dict[int, Context]) -> TensorView:
        view = self.task_vectors.view(name, *at)
        for position in range(index):
            step = self.step(position, name)
            values = self._apply(position, view, contexts)
            view = view.with_deltas(values) if isinstance(step, Transform) else view.with_merged(values)
        return view


def add_partial(total: Partial, partial: Partial) -> None:
    """Add a partial to ``total`` in place, key by key; the partial's tensors then belong to ``total``."""
    for key, value in partial.items():
        if key in total:
            total[key] += value
        else:
            total[key] = value


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Map ``work`` over ``items`` on threads, results in order, only a few ahead of their reader."""
    if workers == 1:
        yield from map(work, items)
        return
    threads = torch.get_num_threads()
    pool = _pool(workers)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        # What the new threads set for themselves must not become the default of later ones.
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that live as long as the process: new ones for every pass would each keep freed memory of their own.

    Pieces are small and already run side by side: threads inside an operation would only wait for each other.
    """
    return ThreadPoolExecutor(workers, "lightning_merge", initializer=lambda: torch.set_num_threads(1))


# A forked process has the pool's memory but none of its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)


def resolve(
    method: MergeMethod,
    task_vectors: TaskVectors,
    transforms: Sequence[Transform] = (),
    seed: int = 0,
    score: Callable[[dict[str, Tensor]], float] | None = None,
) -> tuple[list[Step], TaskVectors]:
    """Check a merge from headers and reduce it to a list of steps over some of the models.

    Raises:
        UserError: Something does not fit, or the method needs a ``score`` and none is given.
    """
    from lightning_merge.methods.task_arithmetic import TaskArithmetic

    for step in transforms:
        if not isinstance(step, Transform):
            raise UserError(
                f"{type(step).__name__} is a merge method, not a transform of task vectors. "
                f"Accepted transforms: {', '.join(sorted(kind.__name__ for kind in Transform.__subclasses__()))}."
            )
        step.check(task_vectors)
    method.check(task_vectors)
    if isinstance(method, Transform):
        return [*transforms, method, TaskArithmetic()], task_vectors
    if isinstance(method, Refinement):
        steps, chosen = resolve(method.method, task_vectors, transforms, seed, score)
        return [*steps, method], chosen
    if isinstance(method, ModelMerge):
        if score is None:
            raise UserError(
                f"{type(method).__name__} selects by validation and needs a score. Expected score=... in Python, "
                "or a merge of 'lightning-merge run', which scores on validation rows."
            )
        reduced, chosen = method.plan(task_vectors, transforms, score, seed)
        return [*transforms, reduced], chosen
    return [*transforms, method], task_vectors


Rounding = Literal["nearest", "stochastic"]


def rounded(
    values: Tensor, dtype: torch.dtype, name: str, start: int = 0, rounding: Rounding = "nearest", seed: int = 0
) -> Tensor:
    """Round merged values once, into the dtype they are kept in.

    Args:
        values: A flat piece, fp32 or fp64.
        dtype: Of the output.
        name: Of the tensor, for messages and draws.
        start: First flat index of the piece.
        rounding: To the ``nearest`` number, or ``stochastic``: to one of the two neighbours, to the nearer one with
            the greater probability, so that the expectation is the value itself. bf16 only; the rest is exact anyway
            or has bits enough.
        seed: Of the stochastic rounding.

    Raises:
        UserError: A value lies beyond what fp16 holds.
    """
    if rounding == "nearest" or dtype != torch.bfloat16:
        return round_to(values, dtype, name)
    # bf16 is the upper half of fp32: a random number below the lower half's range carries with the right probability.
    bits = values.to(torch.float32).view(torch.int32)
    # A plane of its own: no model's draws, whatever its name.
    words = uniform(seed, "", name, start, start + values.numel(), plane=2).mul_(1 << 16).to(torch.int32)
    carried = (bits + words).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    # Beyond the largest bf16 the carry would reach infinity.
    return torch.where(carried.isfinite(), carried, values.to(dtype))


def round_to(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round merged values once, into the dtype they are kept in.

    Raises:
        UserError: A value lies beyond what fp16 holds.
    """
    rounded = values.to(dtype)
    if dtype == torch.float16 and not rounded.isfinite().all():
        raise UserError(
            f"Tensor '{name}' overflows float16 when merged (up to {values.abs().max():.3g}). "
            "Expected --dtype bfloat16 or float32, or a smaller scale."
        )
    return rounded


def merge_in_memory(
    method: MergeMethod,
    task_vectors: TaskVectors,
    transforms: Sequence[Transform] = (),
    seed: int = 0,
    dtype: torch.dtype | None = None,
    score: Callable[[dict[str, Tensor]], float] | None = None,
) -> dict[str, Tensor]:
    """Merge into a state dict; see :meth:`MergeMethod.__call__`."""
    steps, chosen = resolve(method, task_vectors, transforms, seed, score)
    merged: dict[str, Tensor] = {}
    merges = set(chosen.tensor_names)
    for name, info in chosen.template.tensors.items():
        floating = dtype is not None and info.dtype.is_floating_point
        if name in merges:
            merged[name] = torch.empty(info.numel, dtype=dtype if floating else info.dtype)
        else:
            values = chosen.unmerged(name)
            merged[name] = round_to(values, dtype, name) if floating and dtype else values
    for name, start, values in Chain(steps, chosen, seed).run():
        merged[name][start : start + values.numel()] = round_to(values, merged[name].dtype, name)
    shaped = {name: values.reshape(chosen.shape(name)) for name, values in merged.items()}
    return chosen.with_tied_names(shaped)
