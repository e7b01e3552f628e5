"""Task vectors: what fine-tuning changed, τ_t = θ_t − θ₀, for T aligned models over one base (arXiv 2212.04089).

Nothing is held in memory: a task vector is a rule that reads a piece of a tensor when asked. Sums, differences and
multiples of task vectors are such rules too, so arithmetic on models of any size costs nothing until it is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_merge.errors import UserError, unknown
from lightning_merge.task_vector import TaskVector
from lightning_merge.tensor_view import CHUNK, TensorView
from lightning_merge.weights import Finding, TensorInfo, WeightSource, find_incompatibilities, open_weights
from lightning_merge.weights.compatibility import counterpart, ignored
from lightning_merge.weights.vocabulary import is_rebuilt


class TaskVectors(Mapping[str, TaskVector]):
    """T aligned task vectors over one base; a mapping from model name to :class:`TaskVector`.

    Attributes:
        base: The pretrained model, or ``None`` where only methods without a base are meant.
        template: What the merged model looks like: the base, or else the first model by name.
        names: The models, sorted: the order in which sums are taken.
        tensor_names: The floating-point tensors that are merged.
        averaged_names: Float buffers (BatchNorm statistics), averaged over the models if so chosen.
        copied_names: Everything else (integers, ignored tensors), copied from the template.
        findings: What was noted when the models were compared.

    Use :meth:`open`; algebra gives new sets through :meth:`of`.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> a = {"weight": torch.tensor([1.5, 2.0, 3.25, 3.0])}
        >>> b = {"weight": torch.tensor([0.75, 3.0, 3.5, 4.0])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> task_vectors["a"].delta("weight")
        tensor([ 0.5000,  0.0000,  0.2500, -1.0000])
        >>> (task_vectors["a"] + task_vectors["b"]).delta("weight")
        tensor([ 0.2500,  1.0000,  0.7500, -1.0000])
        >>> round(task_vectors["a"].cosine(task_vectors["b"]), 6)
        0.0
    """

    def __init__(
        self,
        base: WeightSource | None,
        template: WeightSource,
        vectors: Mapping[str, TaskVector] | None = None,
        models: Mapping[str, WeightSource] | None = None,
        ignore: Sequence[str] = (),
        batch_norm: Literal["average", "base"] = "average",
    ) -> None:
        if isinstance(ignore, str):
            # A string is a sequence too: of one-letter patterns, which would ignore nearly everything.
            raise UserError(f"ignore must be a list of patterns, got '{ignore}'. Expected ['{ignore}'].")
        if batch_norm not in ("average", "base"):
            raise UserError(f"batch_norm must be 'average' or 'base', got '{batch_norm}'.")
        self.base, self.template = base, template
        self.ignore, self.batch_norm = tuple(ignore), batch_norm
        self.models = dict(models or {})
        self.findings: list[Finding] = []
        self.tensor_names, self.averaged_names, self.copied_names = self._classify()
        if vectors is None:
            vectors = {name: self._from_model(model) for name, model in self.models.items()}
        self._vectors = {name: vectors[name] for name in sorted(vectors)}
        self.names = tuple(self._vectors)

    @classmethod
    def open(
        cls,
        base: Any = None,
        models: Mapping[str, Any] | None = None,
        ignore: Sequence[str] = (),
        prefix: str = "",
        batch_norm: Literal["average", "base"] = "average",
        check: bool = True,
        strict: bool = True,
    ) -> TaskVectors:
        """Open a base and its fine-tuned models, lazily and memory-mapped.

        Args:
            base: Anything :func:`lightning_merge.weights.open_weights` opens; ``None`` for plain averages.
            models: The fine-tuned models by name; a PEFT adapter is read as the full model over the base.
            ignore: Patterns of tensors that stay as the base has them: task heads, for example.
            prefix: For checkpoints, the part of the names to keep and drop (``model.``).
            batch_norm: ``"average"`` BatchNorm statistics over the models, or keep the ``"base"``'s.
            check: Also judge from a sample of values whether the models share the base (a finding, never an error).
            strict: Raise what speaks against a merge; otherwise it stands among the ``findings`` as an ERROR.

        Raises:
            UserError: No model, or models whose keys, shapes or dtypes do not fit; before any tensor is merged.
        """
        if models and "" in map(str, models):
            raise UserError("A model has an empty name. Expected a name for each, for example '{cars: path/to/cars}'.")
        if not models:
            raise UserError("No models to merge. Expected at least one, for example --models '{cars: path/to/cars}'.")
        opened_base = open_weights(base, prefix) if base is not None else None
        opened = {str(name): _open_model(ref, opened_base, prefix) for name, ref in models.items()}
        findings = find_incompatibilities(opened_base, opened, ignore, sample=check)
        findings += [Finding("INFO", f"Model '{n}': {note}") for n, model in opened.items() for note in model.notes]
        errors = [finding.message for finding in findings if finding.level == "ERROR"]
        if errors and strict:
            raise UserError("\n".join(errors))
        template = opened_base if opened_base is not None else opened[min(opened)]
        for pattern in [ignore] if isinstance(ignore, str) else ignore:
            if not any(ignored(name, [pattern]) for source in (template, *opened.values()) for name in source.tensors):
                findings.append(Finding("WARN", f"The pattern '{pattern}' to ignore fits no tensor."))
        vectors = cls(opened_base, template, models=opened, ignore=ignore, batch_norm=batch_norm)
        vectors.findings = findings
        return vectors

    @classmethod
    def of(cls, space: TaskVectors, vectors: Mapping[str, TaskVector]) -> TaskVectors:
        """Build a set from task vectors that algebra made, over the base of ``space``."""
        if not vectors:
            raise UserError("No task vectors to merge. Expected at least one.")
        for vector in vectors.values():
            TaskVector(space, vector.read)._require_same_base(vector)
        # A vector under its own name is still that of a file; any other is what algebra made of it.
        models = {name: space.models[name] for name, vector in vectors.items() if space._vectors.get(name) is vector}
        whole = set(models) == set(vectors)
        return cls(space.base, space.template, vectors, models, space.ignore, space.batch_norm if whole else "base")

    # --- a mapping -----------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> TaskVector:
        if name not in self._vectors:
            raise unknown("model", name, self._vectors)
        return self._vectors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def __contains__(self, name: object) -> bool:
        return name in self._vectors

    @property
    def sources(self) -> list[WeightSource]:
        """The base, if any, and the models."""
        return [*([self.base] if self.base else []), *self.models.values()]

    def __reduce__(self) -> tuple[Any, ...]:
        # Task vectors of files are rules that are made again elsewhere; those of algebra are closures.
        if any(vector.finetuned is None for vector in self.values()) or set(self) != set(self.models):
            raise TypeError("task vectors that were computed in Python hold no files to open elsewhere")
        return _reopened, (self.base, self.template, self.models, self.ignore, self.batch_norm)

    def subset(self, names: Sequence[str]) -> TaskVectors:
        """Return the set of the named models only."""
        models = {name: self.models[name] for name in names if name in self.models}
        return TaskVectors(
            self.base, self.template, {name: self[name] for name in names}, models, self.ignore, self.batch_norm
        )

    def analogy(self, a: str, b: str, c: str) -> TaskVector:
        """Return τ_c + (τ_b − τ_a): "a is to b as c is to ..." (arXiv 2212.04089)."""
        return self[c] + (self[b] - self[a])

    # --- tensors -------------------------------------------------------------------------------------------------

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor in the merged model."""
        return self.template.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.info(name).shape

    def compute_dtype(self, name: str) -> torch.dtype:
        """fp32, or fp64 where the base is stored in fp64."""
        return torch.float64 if self.info(name).dtype == torch.float64 else torch.float32

    @property
    def numel(self) -> int:
        """Number of merged entries."""
        return sum(self.info(name).numel for name in self.tensor_names)

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[tuple[int, int]]:
        """Yield the flat ranges in which a tensor is handled, aligned to the grid of 2¹⁶ entries."""
        numel = self.info(name).numel
        for start in range(0, numel, size):
            yield start, min(start + size, numel)

    def row_chunks(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield flat ranges of whole rows (slices along the first axis), about as long as the chunks."""
        info = self.info(name)
        row = info.numel // info.shape[0] if info.shape and info.shape[0] else info.numel
        stops = [stop for _, stop in self.chunks(name)]
        start = 0
        for stop in stops:
            end = info.numel if stop == info.numel or not row else max(start + row, stop // row * row)
            if stop > start:
                yield start, end
                start = end

    def view(self, name: str, start: int = 0, stop: int | None = None) -> TensorView:
        """Return a piece of a tensor in all models."""
        return TensorView(self, name, start, self.info(name).numel if stop is None else stop)

    def delta(self, model: str, name: str) -> Tensor:
        """Return one model's τ of one tensor, in its own shape and the computing dtype."""
        return self[model].delta(name)

    def base_tensor(self, name: str) -> Tensor:
        """Return θ₀ of one tensor, in its own shape and the computing dtype."""
        return self.read_base(name, 0, self.info(name).numel).reshape(self.shape(name))

    def read_base(self, name: str, start: int, stop: int) -> Tensor:
        """Return a flat piece of θ₀ in the computing dtype.

        Raises:
            UserError: There is no base, or the piece holds NaN or infinity.
        """
        values = self.read_base_unchecked(name, start, stop)
        if not math.isfinite(values.sum().item()):
            assert self.base is not None
            self._values(self.base, name, start, stop)
        return values

    def read_finetuned(self, model: str, name: str, start: int, stop: int) -> Tensor:
        """Return a flat piece of a model's weights in the computing dtype, exactly as stored where that is possible."""
        vector = self[model]
        if vector.finetuned is not None:
            return vector.finetuned(name, start, stop)
        return self.read_base(name, start, stop) + vector.read(name, start, stop)

    def read_delta_into(self, out: Tensor, model: str, name: str, start: int, stop: int, base: Tensor) -> None:
        """Write a flat piece of τ into ``out``, given the base's piece, which is then not read again.

        Entries that are not finite go through; :meth:`refuse_infinite` names them.
        """
        vector, source = self[model], self.models.get(model)
        if vector.finetuned is None or source is None:
            out.copy_(vector.read(name, start, stop))
        else:
            source.read_into(out, self._stored_name(source, name), start)
            out.sub_(base)

    def read_finetuned_into(self, out: Tensor, model: str, name: str, start: int, stop: int) -> None:
        """Write a flat piece of a model's weights into ``out``; see :meth:`read_delta_into`."""
        vector, source = self[model], self.models.get(model)
        if vector.finetuned is None or source is None:
            out.copy_(self.read_finetuned(model, name, start, stop))
        else:
            source.read_into(out, self._stored_name(source, name), start)

    def read_base_unchecked(self, name: str, start: int, stop: int) -> Tensor:
        """Return a flat piece of θ₀ whose entries may not be finite."""
        if self.base is None:
            raise UserError("Task vectors need a base (τ = θ − θ₀), and none is given. Expected base=... (--base ...).")
        return self._read(self.base, name, start, stop)

    def refuse_infinite(self, values: Tensor, name: str, start: int, stop: int) -> None:
        """Check that what was made of a piece of all models is finite; if not, say which model is to blame.

        Raises:
            UserError: The base or a model holds NaN or infinity in the piece.
        """
        # The sum is not finite if an entry is not; only then are the entries looked at (a sum may overflow).
        if math.isfinite(values.sum().item()) or values.isfinite().all():
            return
        for source in self.sources:
            self._values(source, name, start, stop)
        raise UserError(
            f"Tensor '{name}' differs by more than {self.compute_dtype(name)} holds between the base and a model "
            f"(among its entries {start} to {stop}). Expected weights of a like size, or --ignore REGEX."
        )

    def sample_delta(self, model: str, name: str, start: int, stop: int, stride: int) -> Tensor:
        """Return every ``stride``-th entry of a flat piece of τ, reading no more than those where that is possible."""
        source = self.models.get(model)
        if source is None or self.base is None or self[model].finetuned is None:
            return self[model].read(name, start, stop)[::stride]
        ends = [held.read(self._stored_name(held, name)).reshape(-1)[start:stop:stride] for held in (source, self.base)]
        return ends[0].to("cpu", self.compute_dtype(name)) - ends[1].to("cpu", self.compute_dtype(name))

    def unmerged(self, name: str) -> Tensor:
        """Return a tensor that is not merged: averaged BatchNorm statistics, or the template's own values."""
        info = self.info(name)
        if name in self.averaged_names and set(self.models) == set(self.names):
            total = torch.zeros(info.numel, dtype=torch.float64)
            for model in self.names:
                total += self._values(self.models[model], name, 0, info.numel)
            return (total / len(self.names)).reshape(info.shape).to(info.dtype)
        return self.template.read(name).to("cpu", copy=True)

    def with_tied_names(self, merged: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the tied names, each pointing to the very tensor it is tied to."""
        return {**merged, **{alias: merged[owner] for alias, owner in self.template.aliases.items()}}

    # --- inside --------------------------------------------------------------------------------------------------

    def _from_model(self, model: WeightSource) -> TaskVector:
        def finetuned(name: str, start: int, stop: int) -> Tensor:
            return self._values(model, name, start, stop)

        def read(name: str, start: int, stop: int) -> Tensor:
            return finetuned(name, start, stop) - self.read_base(name, start, stop)

        return TaskVector(self, read, finetuned)

    def _values(self, source: WeightSource, name: str, start: int, stop: int) -> Tensor:
        values = self._read(source, name, start, stop)
        # The sum is not finite if an entry is not; only then are the entries looked at (a sum may overflow).
        if not math.isfinite(values.sum().item()) and not values.isfinite().all():
            what = "NaN" if values.isnan().any() else "infinity"
            raise UserError(
                f"Tensor '{name}' of '{source.label}' holds {what} (among its entries {start} to {stop}). "
                "Expected finite weights; leave a tensor out of the merge with --ignore REGEX."
            )
        return values

    def _read(self, source: WeightSource, name: str, start: int, stop: int) -> Tensor:
        """A flat piece in the computing dtype, whichever of its tied names the source uses."""
        values = torch.empty(stop - start, dtype=self.compute_dtype(name))
        source.read_into(values, self._stored_name(source, name), start)
        return values

    def _stored_name(self, source: WeightSource, name: str) -> str:
        if name in source.tensors:
            return name
        stored = counterpart(self.template, name, source)
        if stored is None:
            raise UserError(f"'{source.label}' lacks the tensor '{name}'. Expected it in every model.")
        return stored

    def _classify(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        merged: list[str] = []
        averaged: list[str] = []
        copied: list[str] = []
        for name, info in self.template.tensors.items():
            statistics = name.endswith((".running_mean", ".running_var")) or name in {"running_mean", "running_var"}
            if not info.dtype.is_floating_point or ignored(name, self.ignore) or is_rebuilt(name, info):
                copied.append(name)
            elif statistics or name in self.template.buffers:
                (averaged if self.batch_norm == "average" else copied).append(name)
            else:
                merged.append(name)
        return tuple(merged), tuple(averaged), tuple(copied)


def _open_model(ref: Any, base: WeightSource | None, prefix: str) -> WeightSource:
    """Open a model, or an adapter over the base."""
    from lightning_merge.weights.adapters import is_adapter, open_adapter

    return open_adapter(ref, base) if base is not None and is_adapter(ref) else open_weights(ref, prefix)


def _reopened(
    base: WeightSource | None,
    template: WeightSource,
    models: Mapping[str, WeightSource],
    ignore: Sequence[str],
    batch_norm: Literal["average", "base"],
) -> TaskVectors:
    return TaskVectors(base, template, models=models, ignore=ignore, batch_norm=batch_norm)
