"""One of two processes of a live merge that is sharded, replicated or both; leaves what it found in a file.

python sharded_worker.py RANK WORLD FOLDER
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from merged_models import Case, contracted_gradient, plain_case, vit
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from lightning_merge.coefficients import Coefficients
from lightning_merge.correspondence import parameter_names
from lightning_merge.directions import Directions, TaskDirections
from lightning_merge.errors import UserError
from lightning_merge.merged_weights import MergedWeights


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Uneven(nn.Module):
    """Sizes that two processes cannot halve, one row among them, and an output tied to the embedding."""

    def __init__(self, width: int = 7, words: int = 11) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.words = nn.Embedding(words, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.out = nn.Linear(width, words, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.token
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    p = module(batch["ids"]).softmax(-1)
    return -(p * p.log()).sum(-1).mean()


def make(folder: Path, width: int = 7, words: int = 11) -> Case:
    """The same model and files wherever it is called: rank 0 and the test itself write and read alike."""
    torch.manual_seed(0)
    module = Uneven(width, words)
    batches = [{"ids": torch.randint(words, (8, 5))} for _ in range(2)]
    return plain_case(folder, module, batches, loss)


class WholeTensors(Coefficients):
    """Scalars that are given whole task vectors, as masks over singular components are, and the rows held here."""

    needs_whole_tensors = True

    def decompose(self, tensor: str, deltas: Tensor, rows: slice | None = None) -> Directions:
        assert rows is not None
        seen[tensor] = (tuple(deltas.shape), rows)
        held = deltas[:, rows] if deltas.ndim > 1 else deltas
        return TaskDirections(held.reshape(len(deltas), -1))


seen: dict[str, tuple[tuple[int, ...], slice]] = {}


def halves(case: Case, rank: int, world: int) -> list[dict[str, Tensor]]:
    size = 8 // world
    return [{"ids": batch["ids"][rank * size : (rank + 1) * size]} for batch in case.batches]


def shard(module: nn.Module, **options: Any) -> nn.Module:
    for block in module.blocks:
        fully_shard(block, **options)
    return fully_shard(module, **options)


def facts(case: Case, module: nn.Module, rank: int, world: int, **options: Any) -> dict[str, Any]:
    """What one process holds and finds, twice: fresh, and after λ has moved."""
    merged = case.merged(module, **options)
    mine = halves(case, rank, world)
    found: dict[str, Any] = {"bytes": merged.nbytes, "unchanged": merged.unchanged}
    found["first"] = contracted_gradient(case, merged, module, batches=mine)
    with torch.no_grad():
        module(mine[0]["ids"])  # a forward without backward leaves gathered weights behind
        merged.scalars.raw.add_(0.25)  # type: ignore[attr-defined]
        merged.materialise()
        found["logits"] = module(case.batches[0]["ids"])
        with merged.individual("sun"):
            found["sun"] = module(case.batches[0]["ids"])
        found["back"] = module(case.batches[0]["ids"])
    found["second"] = contracted_gradient(case, merged, module, batches=mine)
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results: dict[str, Any] = {}

    case = make(folder / f"files_{rank}")
    pristine = copy.deepcopy(case.module)

    def fresh() -> nn.Module:
        return copy.deepcopy(pristine)

    mesh = init_device_mesh("cpu", (world,))
    results["data_parallel"] = facts(case, fresh(), rank, world)
    results["fsdp"] = facts(case, shard(fresh(), mesh=mesh), rank, world)
    for storage in ("host", "files"):
        results[storage] = facts(case, shard(fresh(), mesh=mesh), rank, world, storage=storage, keep_base=False)
    results["bf16"] = facts(case, shard(fresh(), mesh=mesh), rank, world, dtype="bfloat16")
    replicated = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))
    results["hsdp"] = facts(case, shard(fresh(), mesh=replicated), rank, world)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results["mixed"] = facts(case, shard(fresh(), mesh=mesh, mp_policy=policy), rank, world)

    def whole() -> dict[str, Any]:
        task_vectors = case.task_vectors()
        scalars = WholeTensors(task_vectors.names, task_vectors.tensor_names)
        module = shard(fresh(), mesh=mesh)
        merged = MergedWeights(module, task_vectors, scalars)
        gradient = contracted_gradient(case, merged, module, batches=halves(case, rank, world))
        plain = Coefficients(task_vectors.names, task_vectors.tensor_names)
        module = shard(fresh(), mesh=mesh)
        reference = MergedWeights(module, task_vectors, plain)
        expected = contracted_gradient(case, reference, module, batches=halves(case, rank, world))
        return {"gradient": gradient, "expected": expected, "seen": dict(seen)}

    results["whole"] = whole()

    even = make(folder / f"even_{rank}", width=8, words=12)

    def columns() -> nn.Module:
        def last(parameter: nn.Parameter) -> Shard:
            return Shard(parameter.ndim - 1 if parameter.shape[-1] % world == 0 else 0)

        return shard(copy.deepcopy(even.module), mesh=mesh, shard_placement_fn=last)

    results["columns"] = facts(even, columns(), rank, world)

    def refused() -> str:
        task_vectors = even.task_vectors()
        try:
            MergedWeights(columns(), task_vectors, WholeTensors(task_vectors.names, task_vectors.tensor_names))
        except UserError as error:
            return str(error)
        return ""

    results["refused"] = refused()
    # transformers has only the first of several processes save, which is how names of files are found out.
    names = {"vit.encoder.layer.0.attention.attention.query.weight": (16, 16)}
    results["names"] = parameter_names(vit(), names)
    torch.save(results, folder / f"found_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
