"""One of two processes that learn a merge, the second without a batch of one task: ``uneven_job.py FOLDER RANK``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adamerging_job as job
import torch
from adamerging_helpers import forward, weights_of
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.adaptation import Individuals
from lightning_merge.callbacks.learning import Learning
from lightning_merge.coefficients import Coefficients
from lightning_merge.errors import UserError
from lightning_merge.merged_weights import MergedWeights
from lightning_merge.objectives import Entropy, Outputs, entropy

# By process and task; the second has none of "odd", and nobody has one of "small".
ROWS = ({"even": slice(0, 8), "odd": slice(0, 8)}, {"even": slice(8, 24)})


def batches(rank: int) -> dict[str, Tensor]:
    return {task: job.rows(task)[0][rows] for task, rows in ROWS[rank].items()}


def main(folder: Path, rank: int) -> None:
    checkpoints = job.fine_tuned()
    task_vectors = TaskVectors.open(*checkpoints)
    scalars, module = Coefficients(task_vectors.names, sorted(task_vectors.tensor_names)), job.UsersModule().eval()
    merged = MergedWeights(module, task_vectors, scalars)
    merged.attach()

    def answer(task: str, batch: Any) -> Outputs:
        return Outputs(task, logits=module(batch))

    individuals = Individuals(answer, merged.individual)
    learning = Learning(merged, job.TASKS, [Entropy()], answer, individuals, "forward", 1)
    learning.losses(batches(rank)).backward()
    assert learning.gradient() and scalars.raw.grad is not None
    found: dict[str, Any] = {"gradient": scalars.raw.grad.clone(), "last": learning.last}
    try:
        learning.losses(batches(rank) if rank == 0 else {})
    except UserError as error:
        found["refused"] = str(error)
    merged.sharded = True
    try:
        learning.losses(batches(rank))
    except UserError as error:
        found["sharded"] = str(error)
    torch.save(found, folder / f"{rank}.pt")

    if rank == 0:
        own = Coefficients(task_vectors.names, sorted(task_vectors.tensor_names))
        weights = weights_of(checkpoints, own)
        having = {task: [batches(r)[task] for r in (0, 1) if task in batches(r)] for task in ("even", "odd")}
        losses = {
            task: torch.stack([entropy(forward(weights, x)).mean() for x in parts]).mean()
            for task, parts in having.items()
        }
        torch.stack(list(losses.values())).mean().backward()
        last = {task: loss.item() for task, loss in losses.items()}
        torch.save({"gradient": own.raw.grad, "last": last}, folder / "expected.pt")


if __name__ == "__main__":
    where, number = Path(sys.argv[1]), int(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{where}/group", rank=number, world_size=2)
    main(where, number)
    torch.distributed.destroy_process_group()
