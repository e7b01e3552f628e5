"""What a merge will take, from headers alone: passes, bytes read and written, memory and disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_merge.execution import Job
from lightning_merge.methods.base import Step
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.tensor_view import CHUNK
from lightning_merge.weights import Finding, WeightSource

# Entries held of one piece for each model and step, in multiples of the piece: read, computed, and on their way out.
_COPIES = 3.0
# What the interpreter, torch and this package hold before any piece (private memory), measured.
_START = 170 << 20


@dataclass(frozen=True)
class Plan:
    """What a merge will take.

    Attributes:
        passes: What the weights are read for, in words.
        pass_count: How often they are read, small samples not counted.
        bytes_read: Of all inputs together, over all passes.
        bytes_written: Of the weights.
        peak_memory_bytes: Private memory of all processes together; pages of the files that the system keeps in its
            cache come on top and go when they are needed.
        disk_free: At the output's place, if it can be told.
        findings: What was noted about the models and the plan.
    """

    passes: list[str]
    pass_count: int
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    disk_free: int | None
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"pass {number}: {text}" for number, text in enumerate(self.passes, 1)]
        free = "" if self.disk_free is None else f" ({self.disk_free / 1e6:,.1f} MB are free)"
        return "\n".join(
            [
                *lines,
                f"reads {self.bytes_read / 1e6:,.1f} MB, writes {self.bytes_written / 1e6:,.1f} MB{free}",
                f"peak memory about {self.peak_memory_bytes / 1e6:,.0f} MB",
            ]
        )


def plan(job: Job, output: Path, threads: int, workers: int, findings: Sequence[Finding]) -> Plan:
    """Foresee a merge; see :class:`Plan`."""
    passes: list[str] = []
    read = 0
    count = held = 0.0
    for number, (steps, vectors) in enumerate(job.parts):
        where = f" (part {number + 1} of {len(job.parts)})" if len(job.parts) > 1 else ""
        models = sum(_merged_bytes(source, vectors) for source in vectors.models.values())
        base = _merged_bytes(vectors.base, vectors) if vectors.base and any(s.reads_base for s in steps) else 0
        for step in steps:
            if not step.measuring_passes:
                continue
            measured = round(step.measuring_passes * (base + models))
            reach = "the whole model" if step.reach == "model" else "each tensor, just before it is used"
            times = f"{step.measuring_passes:g} × " if step.measuring_passes != 1 else ""
            passes.append(f"{type(step).__name__} measures {reach}: {times}{(base + models) / 1e6:,.1f} MB read{where}")
            read += measured
        merged = base + models * (1 + any(step.reads_own_entries for step in steps))
        passes.append(f"merge and write: {merged / 1e6:,.1f} MB read{where}")
        read += merged
        count = max(count, 1 + sum(step.measuring_passes for step in steps))
        held = max(held, _held(steps, vectors, threads * workers))
    copied = sum(
        vectors.info(name).nbytes
        for _, vectors in job.parts
        for name in (*vectors.averaged_names, *vectors.copied_names)
    )
    free = _free(output)
    if free is not None:
        free += job.output.reserved  # by an earlier process, whose work goes on
    # A checkpoint is written from the merged tensors, so both stand there for a while.
    needed = job.output.nbytes * (2 if output.suffix == ".ckpt" else 1)
    found = list(findings)
    if free is not None and needed > free:
        found.append(
            Finding(
                "ERROR",
                f"The output takes {needed / 1e6:,.1f} MB and the disk of '{output}' has "
                f"{free / 1e6:,.1f} MB left. Expected another place, or a smaller dtype.",
            )
        )
    return Plan(
        passes,
        round(count),
        read + copied,
        job.output.nbytes,
        round(held) + _START * (workers + (workers > 1)),
        free,
        found,
    )


def _merged_bytes(source: WeightSource, vectors: TaskVectors) -> int:
    """Bytes of the tensors of one model that are merged."""
    stored = (source.stored_name(name) for name in vectors.tensor_names)
    return sum(source.tensors[name].nbytes for name in stored if name is not None)


def _held(steps: Sequence[Step], vectors: TaskVectors, threads: int) -> float:
    """Bytes of pieces and of what measuring keeps."""
    largest = max((vectors.info(name).numel for name in vectors.tensor_names), default=0)
    layouts = {step.layout for step in steps}
    row = max(
        (vectors.info(n).numel // (vectors.shape(n) or (1,))[0] for n in vectors.tensor_names if vectors.info(n).numel),
        default=0,
    )
    piece = largest if "tensor" in layouts else min(largest, max(CHUNK, row if "rows" in layouts else 0))
    copies = max([_COPIES * len(steps), *(step.tensor_copies for step in steps)])
    pieces = 4.0 * piece * (len(vectors) + 1) * copies * threads + 4.0 * piece * (2 * threads + 1)
    kept = sum(step.kept_share * (vectors.numel if step.reach == "model" else largest * threads) for step in steps)
    return pieces + 4.0 * kept * len(vectors)


def _free(output: Path) -> int | None:
    """Bytes left on the disk on which the output will stand."""
    place = next((parent for parent in [output.absolute(), *output.absolute().parents] if parent.exists()), None)
    return shutil.disk_usage(place).free if place else None
