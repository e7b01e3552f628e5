"""A live model whose parameters are θ₀ + Σ λ τ: written before the forward pass, contracted after the backward.

One mechanism works in every trainer: the merged weights are written into the model's own parameters, the user's
ordinary forward and backward run under any strategy, and ∂L/∂λ_i = ⟨∂L/∂W, D_i⟩. Substituting weights
(``functional_call``, ``parametrize``) fails in silence under sharding, gradient checkpointing and tied weights.

This is the only file that knows DTensor: under FSDP2 each process reads, merges and contracts its own shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed
from torch import Tensor, nn

from lightning_merge.correspondence import parameter_names
from lightning_merge.directions import Directions, FileDirections, chunks
from lightning_merge.errors import UserError, unknown
from lightning_merge.methods.base import Transform
from lightning_merge.methods.streaming import Chain
from lightning_merge.task_vectors import TaskVectors

Storage = Literal["device", "host", "files"]
StoredDtype = Literal["float32", "bfloat16"]


class Scalars(Protocol):
    """The learned scalars of a merge: :class:`lightning_merge.coefficients.Coefficients`, or rank masks."""

    models: tuple[str, ...]
    tensor_names: tuple[str, ...]
    needs_whole_tensors: bool

    def __call__(self) -> Tensor:
        """All scalars, flat, differentiable in what is learned."""

    def span(self, tensor: str) -> slice:
        """Where those of one tensor stand."""

    def decompose(self, tensor: str, deltas: Tensor, rows: slice | None = None) -> Directions:
        """The directions that they multiply."""


@dataclass
class _Piece:
    """One merged parameter, or this process's shard of it."""

    name: str
    parameter: nn.Parameter
    region: tuple[slice, ...]
    span: slice
    share: float
    base: Tensor | None
    directions: Directions | None

    @property
    def local(self) -> Tensor:
        """The numbers that this process holds."""
        return local_part(self.parameter)


class MergedWeights:
    """The merged parameters of a live module.

    After construction the module holds θ₀ + Σ λ τ; :meth:`materialise` writes it again after λ has changed. Between
    :meth:`attach` and :meth:`detach` the gradients of the merged parameters are contracted and freed during the
    backward pass, tensor by tensor; :meth:`gradient` gives what has come together.

    Args:
        module: The live module, already sharded where it will be; its parameters are overwritten.
        task_vectors: The models, over their pretrained base.
        scalars: The learned scalars, on the device where they are trained.
        names: The module's parameter for each tensor, as :func:`parameter_names` finds it by default.
        prefix: See :func:`lightning_merge.correspondence.parameter_names`.
        transforms: Applied to the task vectors first, in order (``Ties``-like pre-processing, ``LwPTV``).
        seed: Of transforms that draw at random.
        storage: Where τ lives: on the parameters' ``device``, on the ``host``, or in the models' ``files``.
        dtype: What τ is kept in; ``bfloat16`` halves it, at a relative error of the λ-gradient below 1 %.
        keep_base: Keep θ₀ in memory; otherwise it is read again from its file each time.

    Raises:
        UserError: There is no base, a tensor has no counterpart, a setting cannot be combined.

    Cost: T numbers of τ and, with ``keep_base``, one of θ₀ for each merged entry this process holds; tensors that no
    model changed hold nothing. Materialising is one pass over τ, contracting another.
    """

    def __init__(
        self,
        module: nn.Module,
        task_vectors: TaskVectors,
        scalars: Scalars,
        names: Mapping[str, str] | None = None,
        prefix: str | None = None,
        transforms: Sequence[Transform] = (),
        seed: int = 0,
        storage: Storage = "device",
        dtype: StoredDtype = "float32",
        keep_base: bool = True,
    ) -> None:
        if task_vectors.base is None:
            raise UserError("Learned merges move from a base. Expected TaskVectors.open(base=..., models=...).")
        if storage not in ("device", "host", "files"):
            raise unknown("storage", str(storage), ("device", "host", "files"))
        if dtype not in ("float32", "bfloat16"):
            raise unknown("dtype of task vectors", str(dtype), ("float32", "bfloat16"))
        if storage == "files" and (transforms or scalars.needs_whole_tensors):
            raise UserError(
                "Task vectors that are transformed cannot be read from the models' files again and again. "
                "Expected storage 'device' or 'host'."
            )
        self.module, self.task_vectors, self.scalars = module, task_vectors, scalars
        self.storage, self.keep_base = storage, keep_base
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        shapes = {name: task_vectors.shape(name) for name in task_vectors.tensor_names}
        self.names = dict(parameter_names(module, shapes, prefix) if names is None else names)
        # While this is true, hooks leave gradients where they are: several backward passes, contracted once.
        self.keep_gradients = False
        self._handles: list[Any] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._pieces = self._read(list(transforms), seed)
        self._gradient: Tensor | None = None
        self._load_averaged_buffers()
        self.materialise()

    # --- writing --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def materialise(self, values: Tensor | None = None) -> None:
        """Write θ₀ + Σ λ τ into the module's parameters.

        Args:
            values: All scalars, flat; by default what the learned ones are now.
        """
        values = (self.scalars() if values is None else values).detach().float()
        for piece in self._pieces:
            if piece.directions is None:
                continue
            mine = values[piece.span].to(piece.local.device)
            self._write(piece, mine)
        # Autocast keeps low-precision copies of weights for as long as its context lasts, a test step for example.
        torch.clear_autocast_cache()

    @contextmanager
    def individual(self, model: str) -> Iterator[None]:
        """Inside, the module is one of the fine-tuned models, as stored; afterwards it is the merge again.

        Cost: reads that model once and materialises once; nothing is kept.
        """
        if model not in self.task_vectors:
            raise unknown("model", model, self.task_vectors)
        try:
            with torch.no_grad():
                for piece in self._pieces:
                    if piece.directions is not None:
                        self._copy(piece, self._read_region(piece.name, piece.region, model))
            torch.clear_autocast_cache()
            yield
        finally:
            self.materialise()

    # --- gradients ------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Let gradients flow to the merged parameters, and contract them as they come."""
        self.detach()
        for piece in self._pieces:
            self._flags.append((piece.parameter, piece.parameter.requires_grad))
            piece.parameter.requires_grad_(piece.directions is not None)
            if piece.directions is not None and not is_sharded(piece.parameter):
                self._handles.append(piece.parameter.register_post_accumulate_grad_hook(self._hook(piece)))

    def detach(self) -> None:
        """Remove the hooks and give each parameter its ``requires_grad`` back; the merged weights stay."""
        for handle in self._handles:
            handle.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        self._handles, self._flags, self._gradient = [], [], None

    def contract(self) -> None:
        """Contract the gradients that hooks have left: of shards, and of backward passes before the last."""
        for piece in self._pieces:
            if piece.directions is not None and piece.parameter.grad is not None:
                self._contract(piece)

    def gradient(self) -> Tensor:
        """Return ∂L/∂ of all scalars, flat, summed over shards and averaged over data-parallel processes; then forget.

        Every process gets the same numbers: one all-reduce of as many numbers as there are scalars.
        """
        self.contract()
        total = self._gradient
        self._gradient = None
        if total is None:
            total = torch.zeros_like(self.scalars().detach(), dtype=torch.float64)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return total

    def backward(self) -> None:
        """Add the gradient to that of the learned parameters, through their constraints and groups."""
        values = self.scalars()
        values.backward(self.gradient().to(values.device, values.dtype))

    # --- facts ----------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes that this process holds: of the ``task_vectors`` and of the ``base``."""
        return {
            "task_vectors": sum(piece.directions.nbytes for piece in self._pieces if piece.directions is not None),
            "base": sum(p.base.numel() * p.base.element_size() for p in self._pieces if p.base is not None),
        }

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The merged parameters by the names of their tensors; those that no model changed among them."""
        return {piece.name: piece.parameter for piece in self._pieces}

    @property
    def unchanged(self) -> list[str]:
        """Tensors that no model changed: they are the base's, take no gradient and hold nothing."""
        return [piece.name for piece in self._pieces if piece.directions is None]

    # --- inside ---------------------------------------------------------------------------------------------------

    def _hook(self, piece: _Piece) -> Any:
        def contract_at_once(_: Tensor) -> None:
            if not self.keep_gradients:
                self._contract(piece)

        return contract_at_once

    @torch.no_grad()
    def _contract(self, piece: _Piece) -> None:
        gradient = piece.parameter.grad
        assert gradient is not None and piece.directions is not None
        flat = local_part(gradient).reshape(-1)
        found = piece.directions.contract(flat) * piece.share
        if self._gradient is None:
            size = self.scalars().numel()
            self._gradient = torch.zeros(size, dtype=torch.float64, device=found.device)
        self._gradient[piece.span] += found.to(self._gradient.device)
        piece.parameter.grad = None

    def _write(self, piece: _Piece, values: Tensor) -> None:
        """Write one piece, in the parameter's own memory where its dtype and layout allow."""
        assert piece.directions is not None
        local = piece.local
        direct = local.is_contiguous() and local.dtype in (torch.float32, torch.float64)
        out = local.view(-1) if direct else torch.empty(local.numel(), dtype=torch.float32, device=local.device)
        self._copy_base(piece, out)
        piece.directions.add_to(out, values)
        if not direct:
            local.copy_(out.view(local.shape))

    def _copy_base(self, piece: _Piece, out: Tensor) -> None:
        base = piece.base if piece.base is not None else self._read_region(piece.name, piece.region)
        out.copy_(base.reshape(-1), non_blocking=True)

    def _copy(self, piece: _Piece, values: Tensor) -> None:
        piece.local.copy_(values.reshape(piece.local.shape))

    def _read_region(self, name: str, region: tuple[slice, ...], model: str | None = None) -> Tensor:
        """Read this process's part of θ₀ or θ_t, flat where whole rows are held."""
        shape = self.task_vectors.shape(name)
        start, stop = _flat_range(shape, region)
        if stop < start:  # a shard along another axis than the first
            whole = self._values(name, 0, self.task_vectors.info(name).numel, model)
            return whole.reshape(shape)[region].reshape(-1)
        return self._values(name, start, stop, model)

    def _values(self, name: str, start: int, stop: int, model: str | None) -> Tensor:
        if model is None:
            return self.task_vectors.read_base(name, start, stop)
        return self.task_vectors.read_finetuned(model, name, start, stop)

    def _read(self, transforms: list[Transform], seed: int) -> list[_Piece]:
        """Read θ₀ and τ of every tensor, this process's part of it."""
        named = dict(self.module.named_parameters(remove_duplicate=False))
        transformed = self._transformed(transforms, seed)
        pieces: list[_Piece] = []
        owners: dict[int, str] = {}
        for name in sorted(self.task_vectors.tensor_names):
            if self.names[name] not in named:
                raise UserError(f"'{self.names[name]}' is a buffer, which cannot be merged by a gradient.")
            parameter = named[self.names[name]]
            changed = next(transformed) if transforms else None
            if id(parameter) in owners:
                self._refuse_untied(name, owners[id(parameter)])
                continue
            owners[id(parameter)] = name
            region = local_region(parameter)
            local = local_part(parameter)
            base = self._read_region(name, region)
            local.copy_(base.reshape(local.shape))
            directions = self._directions(name, parameter, region, changed)
            kept: Tensor | None = None
            if directions is not None and self.keep_base:
                kept = base.to("cpu" if self.storage == "host" else local.device)
            span = self.scalars.span(name)
            pieces.append(_Piece(name, parameter, region, span, _share(parameter), kept, directions))
        return pieces

    def _transformed(self, transforms: list[Transform], seed: int) -> Iterator[Tensor]:
        """Yield each tensor's transformed task vectors ``(T, n)``, in the sorted order of names."""
        if not transforms:
            return
        for transform in transforms:
            transform.check(self.task_vectors)
        names = sorted(self.task_vectors.tensor_names)
        steps = Chain(transforms, self.task_vectors, seed).run(names)
        held: list[Tensor] = []
        position = 0
        for name, _, values in steps:
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
        start, stop = _flat_range(self.task_vectors.shape(name), region)
        if self.storage == "files" and start <= stop:
            read = FileDirections(self.task_vectors, name, start)
            moved = any(bool(read.read(*at).any()) for at in chunks(stop - start, "cpu"))
            return read if _anywhere(moved, parameter) else None
        device = local_part(parameter).device if self.storage == "device" else torch.device("cpu")
        deltas = self._deltas(name, region, transformed).to(device, self.dtype)
        if not _anywhere(bool(deltas.any()), parameter):
            return None
        return self.scalars.decompose(name, deltas, region[0] if region else None)

    def _deltas(self, name: str, region: tuple[slice, ...], transformed: Tensor | None) -> Tensor:
        """Return τ of this process's part, ``(T, n)``, or of the whole tensor where the scalars need that."""
        shape, tasks = self.task_vectors.shape(name), len(self.task_vectors)
        start, stop = _flat_range(shape, region)
        whole = self.scalars.needs_whole_tensors
        if transformed is None and not whole and start <= stop:
            deltas = torch.empty(tasks, stop - start, dtype=self.dtype)
            for a, b in chunks(stop - start, "cpu"):
                deltas[:, a:b] = self.task_vectors.view(name, start + a, start + b).deltas
            return deltas
        numel = self.task_vectors.info(name).numel
        values = self.task_vectors.view(name, 0, numel).deltas if transformed is None else transformed
        values = values.reshape(tasks, *shape)
        every_task = (slice(None), *region)
        return values if whole else values[every_task].reshape(tasks, -1)

    def _refuse_untied(self, name: str, owner: str) -> None:
        """Two tensors of the files go to one parameter: every model must hold them alike."""
        for model in [None, *self.task_vectors.names]:
            numel = self.task_vectors.info(name).numel
            if not torch.equal(self._values(name, 0, numel, model), self._values(owner, 0, numel, model)):
                raise UserError(
                    f"The tensors '{owner}' and '{name}' are one tied parameter in {type(self.module).__name__}, but "
                    f"differ in {'the base' if model is None else repr(model)}. Expected the same weights in both."
                )

    @torch.no_grad()
    def _load_averaged_buffers(self) -> None:
        """BatchNorm statistics take no part in λ: they are averaged over the models, or the base's."""
        buffers = dict(self.module.named_buffers())
        averaged = {n: self.task_vectors.shape(n) for n in self.task_vectors.averaged_names}
        if not averaged:
            return
        for name, target in parameter_names(self.module, averaged).items():
            if target in buffers:
                buffers[target].copy_(self.task_vectors.unmerged(name))


# --- shards -------------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes (DTensor)."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that this process holds, sharing memory, without gradient."""
    if is_sharded(tensor):
        return tensor._local_tensor.detach()  # type: ignore[attr-defined] # to_local() would record a gradient
    return tensor.detach()


def local_region(tensor: Tensor) -> tuple[slice, ...]:
    """Return which part of the whole tensor this process holds, one slice an axis.

    Axes are cut as ``torch.chunk`` cuts them, once for each dimension of the mesh, as DTensor's ``Shard`` does.

    Raises:
        UserError: A placement that is neither ``Shard`` nor ``Replicate``.
    """
    bounds = [(0, size) for size in tensor.shape]
    if is_sharded(tensor):
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        coordinate = mesh.get_coordinate()
        for axis, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            if placement.is_replicate():
                continue
            if type(placement).__name__ != "Shard":
                raise UserError(
                    f"A parameter is laid out as {placement} over processes, which learned merges do not support. "
                    "Expected fully_shard over the data-parallel processes (tensor_parallel_size=1)."
                )
            start, stop = bounds[placement.dim]
            step = -(-(stop - start) // mesh.size(axis))
            first = min(start + coordinate[axis] * step, stop)
            bounds[placement.dim] = (first, min(first + step, stop))
    return tuple(slice(start, stop) for start, stop in bounds)


def _share(parameter: Tensor) -> float:
    """What a process's contraction counts in the sum over all processes.

    Shards add up; what several processes hold alike is averaged, gradients of their own data among it.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1.0
    world = torch.distributed.get_world_size()
    if not is_sharded(parameter):
        return 1.0 / world
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    placements = parameter.placements  # type: ignore[attr-defined]
    parts = 1
    for axis, placement in enumerate(placements):
        parts *= 1 if placement.is_replicate() else mesh.size(axis)
    return parts / world


def _anywhere(here: bool, parameter: Tensor) -> bool:
    """Whether something holds in any process's shard: what is trained must be so in all of them."""
    if not is_sharded(parameter):
        return here
    flag = torch.tensor(float(here), device=local_part(parameter).device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def _flat_range(shape: Sequence[int], region: Sequence[slice]) -> tuple[int, int]:
    """Return the flat range of a region of whole rows; an empty range the wrong way round where it is none."""
    whole = all(part == slice(0, size) for part, size in zip(region[1:], shape[1:], strict=True))
    if not whole:
        return 0, -1
    if not shape:
        return 0, 1
    row = 1
    for size in shape[1:]:
        row *= size
    return region[0].start * row, region[0].stop * row
