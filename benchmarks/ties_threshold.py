"""Whole-model TIES without sorting, against ``torch.kthvalue`` over the concatenated vector, in one run.

    python benchmarks/ties_threshold.py [--parameters 25_000_000] [--tasks 8] [--rounds 3]

Prints, as medians over the rounds: the time to find the exact thresholds of all tasks (both ways start from the models'
weights), the time of the whole merge, and the extra memory of each, measured in processes of their own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.methods import Ties
from lightning_merge.methods.base import Header
from lightning_merge.methods.streaming import Chain, add_partial

DENSITY = 0.2
ROWS = 512


def make(parameters: int, tasks: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A base and models with the scales of fine-tuning, in 64 matrices."""
    generator = torch.Generator().manual_seed(0)
    columns = parameters // (64 * ROWS)
    base = {f"block.{i}.weight": torch.randn(ROWS, columns, generator=generator) * 0.02 for i in range(64)}
    models = {
        f"task_{t}": {name: w + torch.randn(w.shape, generator=generator) * 1e-3 for name, w in base.items()}
        for t in range(tasks)
    }
    return base, models


def flat(state_dict: dict[str, Tensor]) -> Tensor:
    """The concatenated vector."""
    return torch.cat([state_dict[name].reshape(-1) for name in sorted(state_dict)])


def sorted_thresholds(base: dict[str, Tensor], models: dict[str, dict[str, Tensor]]) -> list[float]:
    """The plain way: concatenate, subtract, kthvalue."""
    start = flat(base)
    found = []
    for model in models.values():
        magnitude = (flat(model) - start).abs()
        found.append(magnitude.kthvalue(magnitude.numel() - int(DENSITY * magnitude.numel()) + 1).values.item())
    return found


def streamed_thresholds(vectors: TaskVectors) -> list[float]:
    """Ours: a sample, and one pass."""
    method = Ties(density=DENSITY)
    chain = Chain([method], vectors)
    tensors = {name: vectors.info(name) for name in vectors.tensor_names}
    context = method.begin(Header(tensors, vectors.names))
    while context.largest.groups[""].bits is None:  # type: ignore[attr-defined]
        total: dict = {}
        for partial in chain._over_pieces(0, lambda view, _: method.measure(view, context)):  # noqa: B023
            add_partial(total, partial)
        context = method.conclude(total, context)
    bits = context.largest.groups[""].bits[:, 0]  # type: ignore[attr-defined]
    return bits.contiguous().view(torch.float32).tolist()


def sorted_merge(base: dict[str, Tensor], models: dict[str, dict[str, Tensor]]) -> Tensor:
    """TIES as it is usually written: all task vectors in one matrix."""
    start = flat(base)
    deltas = torch.stack([flat(model) - start for model in models.values()])
    for delta in deltas:
        threshold = delta.abs().kthvalue(delta.numel() - int(DENSITY * delta.numel()) + 1).values
        delta[delta.abs() < threshold] = 0
    sign = torch.sign(deltas.sum(0))
    agree = (torch.sign(deltas) == sign) & (deltas != 0)
    return start + (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)


def resident() -> int:
    """Bytes of memory this process holds right now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def extra_memory(which: str, parameters: int, tasks: int, answer: multiprocessing.Queue) -> None:
    """Peak of resident memory above what the models themselves take."""
    base, models = make(parameters, tasks)
    vectors = TaskVectors.open(base, models, check=False)
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    if which == "streamed":
        for _ in Chain([Ties(density=DENSITY)], vectors).run():
            pass
    else:
        sorted_merge(base, models)
    done.set()
    watcher.join()
    answer.put(peak[0] - before)


def timed(work: Callable[[], object]) -> float:
    """Seconds of wall time."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=25_000_000)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    base, models = make(options.parameters, options.tasks)
    vectors = TaskVectors.open(base, models, check=False)
    assert streamed_thresholds(vectors) == sorted_thresholds(base, models), "the thresholds differ"
    rows: dict[str, list[tuple[float, float]]] = {"thresholds": [], "whole merge": []}
    for _ in range(options.rounds):
        rows["thresholds"].append(
            (timed(lambda: sorted_thresholds(base, models)), timed(lambda: streamed_thresholds(vectors)))
        )
        rows["whole merge"].append(
            (
                timed(lambda: sorted_merge(base, models)),
                timed(lambda: [None for _ in Chain([Ties(density=DENSITY)], vectors).run()]),
            )
        )
    size = sum(w.numel() for w in base.values()) * 4
    print(f"{size // 4:,} parameters, {options.tasks} tasks, {torch.get_num_threads()} threads, medians")
    for name, pairs in rows.items():
        plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name:<12} kthvalue {plain:6.2f} s   streamed {ours:6.2f} s   ratio {ratio:5.1f}")
    context = multiprocessing.get_context("spawn")
    for which in ("sorted", "streamed"):
        answer = context.Queue()
        process = context.Process(target=extra_memory, args=(which, options.parameters, options.tasks, answer))
        process.start()
        extra = answer.get()
        process.join()
        print(f"extra memory, {which:<9} {extra / 1e6:7.0f} MB = {extra / size:.2f} models")


if __name__ == "__main__":
    main()
