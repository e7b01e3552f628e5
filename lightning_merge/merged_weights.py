"""A live model whose parameters are θ₀ + Σ λ τ: written before the forward pass, contracted after the backward.

One mechanism works in every trainer: the merged weights are written into the model's own parameters, the user's
ordinary forward and backward run under any strategy, and ∂L/∂λ_i = ⟨∂L/∂W, D_i⟩. Substituting weights
(``functional_call``, ``parametrize``) fails in silence under sharding, gradient checkpointing and tied weights.

Under FSDP2 each process reads, merges and contracts its own shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
import torch.distributed
from torch import Tensor, nn

from lightning_merge.correspondence import parameter_names
from lightning_merge.directions import Directions
from lightning_merge.errors import UserError, unknown
from lightning_merge.merged_pieces import Piece, PieceReader, Storage, statistics
from lightning_merge.methods.base import Transform
from lightning_merge.shards import distributed, forget_gathered, is_sharded, local_part, share
from lightning_merge.task_vectors import TaskVectors

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
        _check_scalars(scalars, task_vectors)
        self.module, self.task_vectors, self.scalars = module, task_vectors, scalars
        self.storage, self.keep_base = storage, keep_base
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        follows = statistics(task_vectors)
        if names is None:
            shapes = {name: task_vectors.shape(name) for name in [*task_vectors.tensor_names, *follows]}
            names = parameter_names(module, shapes, prefix)
        self.names = dict(names)
        # While this is true, hooks leave gradients where they are: several backward passes, contracted once.
        self.keep_gradients = False
        self._handles: list[Any] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._gradient: Tensor | None = None
        self._reader = PieceReader(task_vectors, scalars, storage, self.dtype, keep_base)
        with torch.no_grad():
            self._pieces = self._reader.read(module, self.names, transforms, seed)
            buffers = dict(module.named_buffers())
            self._statistics = {name: buffers[self.names[name]] for name in follows if name in self.names}
            merged = {name: task_vectors.unmerged(name) for name in self._statistics}
            # Everything has been read: what is refused has not touched the module.
            self._reader.write_base(module, self.names, self._pieces)
            for name, buffer in self._statistics.items():
                buffer.copy_(merged[name])
        self.sharded = any(is_sharded(piece.parameter) for piece in self._pieces)
        # A transform may leave nothing of what a model changed; the model itself has it all the same.
        self._transformed = bool(transforms)
        # While the module is an individual model, the statistics to come back to.
        self._away: dict[str, Tensor] | None = None
        self.materialise()

    # --- writing --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def materialise(self, values: Tensor | None = None) -> None:
        """Write θ₀ + Σ λ τ into the module's parameters; after an individual model, everything else that was its.

        Args:
            values: All scalars, flat; by default what the learned ones are now.
        """
        self._come_back()
        values = (self.scalars() if values is None else values).detach().float()
        with self._full_precision():
            for piece in self._pieces:
                if piece.directions is not None:
                    self._write(piece, values[piece.span].to(piece.local.device))
        self._forget_copies()

    @contextmanager
    def individual(self, model: str) -> Iterator[None]:
        """Inside, the module is one of the fine-tuned models, as stored; afterwards it is the merge again.

        Cost: reads that model once and materialises once; nothing is kept.
        """
        if model not in self.task_vectors:
            raise unknown("model", model, self.task_vectors)
        if self._away is None:
            self._away = {name: buffer.clone() for name, buffer in self._statistics.items()}
        try:
            with torch.no_grad():
                for piece in self._pieces:
                    if piece.directions is None and not self._transformed:
                        continue
                    self._copy(piece, self._reader.part(piece.name, piece.region, model))
                if model in self.task_vectors.models:
                    for name, buffer in self._statistics.items():
                        buffer.copy_(self._reader.whole(name, model).reshape(buffer.shape))
            self._forget_copies()
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
            total = self._zeros()
        if distributed():
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
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._pieces[0].local.device if self._pieces else torch.device("cpu")

    @property
    def unchanged(self) -> list[str]:
        """Tensors that no model changed: they are the base's, take no gradient and hold nothing."""
        return [piece.name for piece in self._pieces if piece.directions is None]

    # --- inside ---------------------------------------------------------------------------------------------------

    def _hook(self, piece: Piece) -> Any:
        def contract_at_once(_: Tensor) -> None:
            if not self.keep_gradients:
                self._contract(piece)

        return contract_at_once

    @torch.no_grad()
    def _contract(self, piece: Piece) -> None:
        gradient = piece.parameter.grad
        assert gradient is not None and piece.directions is not None
        flat = local_part(gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)
        if self._gradient is None:
            self._gradient = self._zeros()
        with self._full_precision():
            found = piece.directions.contract(flat) * share(piece.parameter)
        self._gradient[piece.span] += found.to(self._gradient.device)
        piece.parameter.grad = None

    def _zeros(self) -> Tensor:
        """Where contractions come together: on the device of the weights, over which processes are connected."""
        return torch.zeros(self.scalars().numel(), dtype=torch.float64, device=self.device)

    def _full_precision(self) -> torch.autocast:
        """Products of weights are never autocast's, wherever an individual model is asked or a backward pass runs."""
        return torch.autocast(self.device.type, enabled=False)

    def _write(self, piece: Piece, values: Tensor) -> None:
        """Write one piece, in the parameter's own memory where its dtype and layout allow."""
        assert piece.directions is not None
        local = piece.local
        direct = local.is_contiguous() and local.dtype in (torch.float32, torch.float64)
        out = local.view(-1) if direct else torch.empty(local.numel(), dtype=torch.float32, device=local.device)
        base = piece.base if piece.base is not None else self._reader.part(piece.name, piece.region)
        out.copy_(base.reshape(-1), non_blocking=True)
        piece.directions.add_to(out, values)
        if not direct:
            local.copy_(out.view(local.shape))

    def _come_back(self) -> None:
        """Put back what no scalar writes; once more, if this was interrupted."""
        if self._away is None:
            return
        for piece in self._pieces:
            if piece.directions is None and self._transformed:
                self._copy(piece, self._reader.part(piece.name, piece.region))
        for name, buffer in self._statistics.items():
            buffer.copy_(self._away[name])
        self._away = None

    def _copy(self, piece: Piece, values: Tensor) -> None:
        piece.local.copy_(values.reshape(piece.local.shape))

    def _forget_copies(self) -> None:
        """Drop what others have made of the weights as they were."""
        # Autocast keeps low-precision copies of weights for as long as its context lasts, a test step for example.
        torch.clear_autocast_cache()
        if self.sharded:
            forget_gathered(self.module)


def _check_scalars(scalars: Scalars, task_vectors: TaskVectors) -> None:
    """Scalars stand in the order of the models; another order would pair them wrongly in silence."""
    if tuple(scalars.models) != tuple(task_vectors.names):
        raise UserError(
            f"The coefficients are of the models {', '.join(scalars.models)}, the task vectors of "
            f"{', '.join(task_vectors.names)}. Expected Coefficients(task_vectors.names, ...)."
        )
    known = set(scalars.tensor_names)
    missing = [name for name in task_vectors.tensor_names if name not in known]
    if missing:
        raise UserError(
            f"The coefficients have none for the tensor '{missing[0]}' ({len(missing)} such). "
            "Expected Coefficients(..., task_vectors.tensor_names)."
        )
