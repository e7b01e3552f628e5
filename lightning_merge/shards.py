"""What a process holds of a parameter that is spread over several (FSDP2): the only file that knows DTensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn

from lightning_merge.errors import UserError


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


def share(tensor: Tensor) -> float:
    """What a process's contraction counts in the sum over all processes.

    Shards add up; what several processes hold alike is averaged, gradients of their own data among it.
    """
    if not distributed():
        return 1.0
    world = torch.distributed.get_world_size()
    if not is_sharded(tensor):
        return 1.0 / world
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    parts = 1
    for axis, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        parts *= 1 if placement.is_replicate() else mesh.size(axis)
    return parts / world


def anywhere(here: bool, tensor: Tensor) -> bool:
    """Whether something holds in any process's shard: what is trained must be so in all of them."""
    if not is_sharded(tensor):
        return here
    flag = torch.tensor(float(here), device=local_part(tensor).device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def forget_gathered(module: nn.Module) -> None:
    """Have FSDP2 gather weights again before their next use.

    The outermost module keeps what it gathered from a forward to the backward; after a forward without one (validation,
    predictions) the next would still see the weights of before.
    """
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def flat_range(shape: Sequence[int], region: Sequence[slice]) -> tuple[int, int]:
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


def distributed() -> bool:
    """Whether there are other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
