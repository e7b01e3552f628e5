"""Reading what a live merge consists of: for each merged parameter, this process's part of θ₀ and of the directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_merge.directions import Directions, FileDirections, ranges
from lightning_merge.errors import UserError
from lightning_merge.methods.base import Transform
from lightning_merge.methods.streaming import Chain
from lightning_merge.shards import anywhere, flat_range, local_part, local_region
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights.compatibility import ignored

Storage = Literal["device", "host", "files"]


@dataclass
class Piece:
    """One merged parameter, or this process's shard of it.

    Attributes:
        name: The tensor.
        parameter: The live parameter.
        region: Which part of the whole this process holds.
        span: Where its scalars stand.
        base: θ₀, where it is kept in memory.
        directions: What the scalars multiply; ``None`` where the merge never leaves θ₀.
    """

    name: str
    parameter: nn.Parameter
    region: tuple[slice, ...]
    span: slice
    base: Tensor | None
    directions: Directions | None

    @property
    def local(self) -> Tensor:
        """The numbers that this process holds."""
        return local_part(self.parameter)


class PieceReader:
    """Reads pieces from the models' files.

    Args:
        task_vectors: The models, over their base.
        scalars: The learned scalars.
        storage: Where τ is kept.
        dtype: What it is kept in.
        keep_base: Whether θ₀ is kept.
    """

    def __init__(
        self, task_vectors: TaskVectors, scalars: Any, storage: Storage, dtype: torch.dtype, keep_base: bool
    ) -> None:
        self.task_vectors, self.scalars = task_vectors, scalars
        self.storage, self.dtype, self.keep_base = storage, dtype, keep_base

    def read(
        self, module: nn.Module, names: Mapping[str, str], transforms: Sequence[Transform], seed: int
    ) -> list[Piece]:
        """Read every piece; nothing is written.

        Args:
            module: The live module.
            names: Its parameters (or buffers) by tensor name.
            transforms: Of the task vectors, in order.
            seed: Of those that draw at random.
        """
        owners = self._owners(module, names)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        transformed = self._transformed(transforms, seed)
        pieces: list[Piece] = []
        for name in sorted(self.task_vectors.tensor_names):
            changed = next(transformed) if transforms else None
            if owners.get(name) == name:
                pieces.append(self._piece(name, parameters[names[name]], changed))
        return pieces

    def write_base(self, module: nn.Module, names: Mapping[str, str], pieces: Sequence[Piece]) -> None:
        """Write θ₀ where no scalar will: into buffers, and into parameters that no model has changed.

        Args:
            module: The live module.
            names: Its parameters (or buffers) by tensor name.
            pieces: What :meth:`read` gave.
        """
        for piece in pieces:
            if piece.directions is None:
                piece.local.copy_(self.part(piece.name, piece.region).reshape(piece.local.shape))
        parameters = dict(module.named_parameters(remove_duplicate=False))
        buffers = dict(module.named_buffers())
        for name in self.task_vectors.tensor_names:
            if names[name] not in parameters:
                buffers[names[name]].copy_(self.task_vectors.base_tensor(name))

    def part(self, name: str, region: tuple[slice, ...], model: str | None = None) -> Tensor:
        """Read this process's part of θ₀, or of one model's weights."""
        shape = self.task_vectors.shape(name)
        start, stop = flat_range(shape, region)
        if stop < start:  # a shard along another axis than the first
            return self.whole(name, model).reshape(shape)[region].reshape(-1)
        if model is None:
            return self.task_vectors.read_base(name, start, stop)
        return self.task_vectors.read_finetuned(model, name, start, stop)

    def whole(self, name: str, model: str | None) -> Tensor:
        """Read a whole tensor of the base or of a model, flat."""
        numel = self.task_vectors.info(name).numel
        if model is None:
            return self.task_vectors.read_base(name, 0, numel)
        return self.task_vectors.read_finetuned(model, name, 0, numel)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _piece(self, name: str, parameter: nn.Parameter, transformed: Tensor | None) -> Piece:
        region, local = local_region(parameter), local_part(parameter)
        directions = self._directions(name, parameter, region, transformed)
        kept: Tensor | None = None
        if directions is not None and self.keep_base:
            base = self.part(name, region)
            # As stored: half the bytes of a base in bf16, and the same numbers.
            stored = base.to(self.task_vectors.info(name).dtype)
            kept = stored if torch.equal(stored.to(base.dtype), base) else base
            kept = kept.to("cpu" if self.storage == "host" else local.device)
        return Piece(name, parameter, region, self.scalars.span(name), kept, directions)

    def _owners(self, module: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
        """Name, for each tensor that is a parameter, the tensor whose scalars it follows: its own, or a tied one's."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        owners: dict[str, str] = {}
        for name in sorted(self.task_vectors.tensor_names):
            if names[name] not in parameters:
                self._refuse_changed_buffer(name)
                continue
            owner = first.setdefault(id(parameters[names[name]]), name)
            owners[name] = owner
            if owner != name:
                self._refuse_untied(name, owner, type(module).__name__)
                # What is written from these scalars must be tied again.
                if hasattr(self.scalars, "tie"):
                    self.scalars.tie(name, owner)
        return owners

    def _refuse_changed_buffer(self, name: str) -> None:
        base = self.whole(name, None)
        for model in self.task_vectors.names:
            if not torch.equal(self.whole(name, model), base):
                raise UserError(
                    f"'{name}' is a buffer of the module, and the model '{model}' has changed it: no gradient merges "
                    f"it. Expected TaskVectors.open(..., ignore=['{name}']), which keeps the base's."
                )

    def _refuse_untied(self, name: str, owner: str, kind: str) -> None:
        """Two tensors of the files go to one parameter: every model must hold them alike."""
        for model in [None, *self.task_vectors.names]:
            if not torch.equal(self.whole(name, model), self.whole(owner, model)):
                raise UserError(
                    f"The tensors '{owner}' and '{name}' are one tied parameter in {kind}, but "
                    f"differ in {'the base' if model is None else repr(model)}. Expected the same weights in both."
                )

    def _transformed(self, transforms: Sequence[Transform], seed: int) -> Iterator[Tensor]:
        """Yield each tensor's transformed task vectors ``(T, n)``, in the sorted order of names."""
        if not transforms:
            return
        for transform in transforms:
            transform.check(self.task_vectors)
        names = sorted(self.task_vectors.tensor_names)
        held: list[Tensor] = []
        position = 0
        for name, _, values in Chain(transforms, self.task_vectors, seed).run(names):
            while names[position] != name:
                yield torch.cat(held, dim=1) if held else torch.zeros(len(self.task_vectors), 0)
                held, position = [], position + 1
            held.append(values)
        for _ in names[position:]:
            yield torch.cat(held, dim=1) if held else torch.zeros(len(self.task_vectors), 0)
            held = []

    def _directions(
        self, name: str, parameter: nn.Parameter, region: tuple[slice, ...], transformed: Tensor | None
    ) -> Directions | None:
        """Make the directions of one tensor; ``None`` where no model changed it."""
        start, stop = flat_range(self.task_vectors.shape(name), region)
        if self.storage == "files" and start <= stop:
            read = FileDirections(self.task_vectors, name, start)
            moved = any(bool(read.read(*at).any()) for at in ranges(stop - start))
            return read if anywhere(moved, parameter) else None
        whole = self.scalars.needs_whole_tensors
        if whole and stop < start:
            raise UserError(
                f"The parameter of '{name}' is sharded along another axis than the first, and these scalars need rows. "
                "Expected fully_shard as it is by default."
            )
        device = local_part(parameter).device if self.storage == "device" else torch.device("cpu")
        deltas = self._deltas(name, region, transformed).to(device, self.dtype)
        if not anywhere(bool(deltas.any()), parameter):
            return None
        return self.scalars.decompose(name, deltas, (region[0] if region else slice(0, 1)) if whole else None)

    def _deltas(self, name: str, region: tuple[slice, ...], transformed: Tensor | None) -> Tensor:
        """Return τ of this process's part, ``(T, n)``, or ``(T, *shape)`` where the scalars need the whole tensor."""
        shape, tasks = self.task_vectors.shape(name), len(self.task_vectors)
        start, stop = flat_range(shape, region)
        whole = self.scalars.needs_whole_tensors
        if transformed is None and not whole and start <= stop:
            deltas = torch.empty(tasks, stop - start, dtype=self.dtype)
            for a, b in ranges(stop - start):
                deltas[:, a:b] = self.task_vectors.view(name, start + a, start + b).deltas
            return deltas
        values = self.task_vectors.view(name).deltas if transformed is None else transformed
        values = values.reshape(tasks, *shape)
        every_task = (slice(None), *region)
        return values if whole else values[every_task].reshape(tasks, -1)


def statistics(task_vectors: TaskVectors) -> list[str]:
    """Name the BatchNorm statistics, which follow no scalar: averaged over the models, or the base's."""
    base = [
        name
        for name in task_vectors.copied_names
        if name.endswith((".running_mean", ".running_var")) and not ignored(name, task_vectors.ignore)
    ]
    return [*task_vectors.averaged_names, *base]
