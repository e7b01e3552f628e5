"""One step of AdaMerging over plain forward and backward passes, in CPU time and in memory; several processes; a GPU.

    python benchmarks/adaptation.py [--sizes 2.7M,21M] [--parts speed,memory,models,processes] [--rounds 5] [--tasks 8]
        [--folder FOLDER] [--output results/adaptation]
    python benchmarks/adaptation.py --device cuda [--sizes B/32,L/14] [--counts 8,20]

Vision transformers with random weights, T models base + N(0, 0.01²), 16 images for each task. The *plain* step is the
supervised forward and backward pass over the same T batches, gradients accumulated. A step of adaptation is forward and
backward of the entropy over them, the contraction ⟨∂L/∂W, τ⟩ in the last backward pass, Adam, and writing the new
weights. Rounds alternate between the two, on one thread, in process CPU time; ratios are of neighbours, medians of the
rounds. Memory counts the tensors made in a step that are alive at once, beside what stays: parameters, θ₀ and τ.
On a GPU contraction and writing are compared with reading τ once each at the bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from adaptation_models import (
    SIZES,
    Tasks,
    adaptation_step,
    batches,
    learn,
    live_merge,
    make_files,
    plain_step,
    task_vectors,
    transient_bytes,
)

from lightning_merge import TaskVectors
from lightning_merge.merged_weights import MergedWeights

MIB = 1 << 20


def mib(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / MIB:.1f}"


class Setting:
    """A module for each of the two steps, and the same batches."""

    def __init__(self, size: str, tasks: int, folder: Path, device: str = "cpu", **options: Any) -> None:
        vectors = task_vectors(size, tasks, folder / size.replace("/", "_"))
        self._make(size, tasks, vectors, device, None, options)

    def _make(
        self,
        size: str,
        tasks: int,
        vectors: TaskVectors,
        device: str,
        autocast: torch.dtype | None,
        options: dict[str, Any],
    ) -> None:
        self.data, self.autocast = batches(size, tasks, device), autocast
        self.module, self.trained = Tasks(size, tasks).to(device), Tasks(size, tasks).to(device)
        self.merged = live_merge(self.module, vectors, **options)
        self.merged.attach()
        self.optimizer = torch.optim.Adam([self.merged.scalars.raw], lr=1e-3)  # type: ignore[attr-defined]

    def plain(self) -> None:
        plain_step(self.trained, self.data, self.autocast)

    def forget(self) -> None:
        self.trained.zero_grad(set_to_none=True)

    def adapt(self) -> None:
        adaptation_step(self.module, self.merged, self.data, self.autocast)
        learn(self.merged, self.optimizer)


class SettingInMemory(Setting):
    """T task vectors that are multiples of one: nothing of T models is written to a disk."""

    def __init__(
        self, size: str, tasks: int, folder: Path, device: str, autocast: torch.dtype | None, **options: Any
    ) -> None:
        one = TaskVectors.open(*make_files(size, 1, folder / size.replace("/", "_")), check=False)
        multiples = {f"task_{place:02}": one["task_00"] * (1 + place / 8) for place in range(tasks)}
        self._make(size, tasks, TaskVectors.of(one, multiples), device, autocast, options)


# --- one process --------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_speed(size: str, tasks: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Interleave plain steps and steps of adaptation."""
    row: dict[str, Any] = {"size": size, "tasks": tasks}
    for dtype in ("float32", "bfloat16"):
        setting = Setting(size, tasks, folder, dtype=dtype)
        row["parameters"] = sum(parameter.numel() for parameter in setting.merged.parameters.values())
        setting.plain(), setting.forget(), setting.adapt()
        times: list[tuple[float, float]] = []
        for _ in range(rounds):
            plain = seconds(setting.plain)
            setting.forget()
            times.append((plain, seconds(setting.adapt)))
        row[dtype] = {
            "plain": statistics.median(plain for plain, _ in times),
            "adapt": statistics.median(adapt for _, adapt in times),
            "ratio": statistics.median(adapt / plain for plain, adapt in times),
            "materialise": statistics.median(seconds(setting.merged.materialise) for _ in range(3)),
        }
    return row


def measure_memory(size: str, tasks: int, folder: Path) -> dict[str, Any]:
    """What steps make and what stays, for τ in fp32 and bf16, and how far the bf16 gradient is off."""
    row: dict[str, Any] = {"size": size, "tasks": tasks}
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        setting = Setting(size, tasks, folder, dtype=dtype)
        adaptation_step(setting.module, setting.merged, setting.data)
        gradients[dtype] = setting.merged.gradient()
        setting.adapt()  # Adam's state is made
        row[dtype] = {**setting.merged.nbytes, "adapt": transient_bytes(setting.adapt)}
        row["plain"] = transient_bytes(setting.plain)
    row["gradient_error"] = _error(gradients["bfloat16"], gradients["float32"])
    return row


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# --- two processes ------------------------------------------------------------------------------------------------


def worker(rank: int, world: int, layout: str, size: str, tasks: int, folder: Path) -> dict[str, Any]:
    """Three steps of Adam on this process's rows; the first gradient, the coefficients, bytes."""
    if world > 1:
        rendezvous = f"file://{folder}/rendezvous_{layout}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    setting = Setting(size, tasks, folder)
    rows = len(setting.data[0][0]) // world
    setting.data = [(x[rank * rows :][:rows], y[rank * rows :][:rows]) for x, y in setting.data]
    if layout == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        setting.merged.detach()
        for layer in setting.module.encoder.layers:
            fully_shard(layer)
        fully_shard(setting.module.encoder)
        setting.merged = live_merge(setting.module, setting.merged.task_vectors)
        setting.merged.attach()
        setting.optimizer = torch.optim.Adam([setting.merged.scalars.raw], lr=1e-3)  # type: ignore[attr-defined]
    adaptation_step(setting.module, setting.merged, setting.data)
    gradient = setting.merged.gradient()
    for _ in range(3):
        setting.adapt()
    scalars: Any = setting.merged.scalars
    found = {"gradient": gradient.tolist(), "coefficients": scalars().tolist(), "bytes": setting.merged.nbytes}
    found["names"] = [name for name in scalars.tensor_names for _ in scalars.models]
    (folder / f"{layout}_{rank}.json").write_text(json.dumps(found))
    if world > 1:
        torch.distributed.destroy_process_group()
    return found


def measure_processes(size: str, tasks: int, folder: Path) -> dict[str, Any]:
    """Compare one process with two that hold half the rows each."""
    alone = worker(0, 1, "alone", size, tasks, folder)
    row: dict[str, Any] = {"size": size, "tasks": tasks, "alone": alone["bytes"]}
    # A key's bias shifts all scores of a query alike: its gradient is rounding, of which Adam makes whole steps.
    kept = [place for place, name in enumerate(alone["names"]) if not name.endswith(("key.bias", "k_proj.bias"))]
    for layout in ("ddp", "fsdp2"):
        (folder / f"rendezvous_{layout}").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--folder", str(folder), "--worker"]
        processes = [subprocess.Popen([*command, f"{rank},2,{layout},{size},{tasks}"]) for rank in range(2)]
        if any(process.wait(600) for process in processes):
            raise RuntimeError(f"a process of {layout} has failed")
        found = [json.loads((folder / f"{layout}_{rank}.json").read_text()) for rank in range(2)]
        gradients, coefficients = (
            [torch.tensor(result[key], dtype=torch.float64) for result in (alone, *found)]
            for key in ("gradient", "coefficients")
        )
        row[layout] = {
            "gradient": max(_error(other, gradients[0]) for other in gradients[1:]),
            "coefficients": max(_error(other[kept], coefficients[0][kept]) for other in coefficients[1:]),
            "bytes": [result["bytes"] for result in found],
        }
    return row


# --- an accelerator -----------------------------------------------------------------------------------------------


def measure_device(size: str, tasks: int, rounds: int, folder: Path, device: str, precision: str) -> dict[str, Any]:
    """Wall time of both steps, and of moving τ twice at the bandwidth of a copy."""
    autocast = torch.bfloat16 if precision == "bfloat16" else None
    setting = SettingInMemory(size, tasks, folder, device, autocast, dtype=precision)
    merged = setting.merged

    def timed(work: Callable[[], object]) -> float:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - start

    setting.plain(), setting.forget(), setting.adapt()
    times = []
    for _ in range(rounds):
        plain = timed(setting.plain)
        setting.forget()
        times.append((plain, timed(setting.adapt)))
    row: dict[str, Any] = {"size": size, "tasks": tasks, "precision": precision, **merged.nbytes}
    row["plain"] = statistics.median(plain for plain, _ in times)
    row["adapt"] = statistics.median(adapt for _, adapt in times)
    row["ratio"] = statistics.median(adapt / plain for plain, adapt in times)
    row["materialise"] = statistics.median(timed(merged.materialise) for _ in range(rounds))
    row["contract"] = _contraction(setting, merged, timed)
    row["floor"] = merged.nbytes["task_vectors"] / _bandwidth(device, timed)
    for key, work in (("plain_bytes", setting.plain), ("adapt_bytes", setting.adapt)):
        row[key] = _peak(work, device)
        setting.forget()
    return row


def _contraction(setting: Setting, merged: MergedWeights, timed: Callable[[Callable[[], object]], float]) -> float:
    merged.attach()
    for task, (pixels, _) in enumerate(setting.data[:1]):
        merged.keep_gradients = True
        setting.module(pixels, task).float().square().mean().backward()
    return timed(merged.contract)


def _bandwidth(device: str, timed: Callable[[Callable[[], object]], float]) -> float:
    """Bytes read or written in a second by a copy."""
    source = torch.empty((1 << 30 if device != "cpu" else 1 << 27) // 4, device=device).normal_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() * 4 / min(timed(lambda: target.copy_(source)) for _ in range(10))


def _peak(work: Callable[[], object], device: str) -> int:
    if device == "cpu":
        return transient_bytes(work)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# --- the report ---------------------------------------------------------------------------------------------------


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(result: dict[str, Any]) -> str:
    """All that was measured, in Markdown."""
    parts = [" · ".join(f"{key} {value}" for key, value in result["machine"].items()) + "\n"]
    if result.get("speed"):
        heads = ["model", "T", "τ", "plain step, s", "step of adaptation, s", "ratio", "of it writing W, s"]
        columns = ("plain", "adapt", "ratio", "materialise")
        rows = [
            [r["size"], r["tasks"], dtype, *(f"{r[dtype][column]:.3f}" for column in columns)]
            for r in result["speed"]
            for dtype in ("float32", "bfloat16")
        ]
        parts.append(table(heads, rows))
    if result.get("memory"):
        heads = ["model", "T", "τ MiB, fp32", "bf16", "θ₀ MiB", "plain step makes, MiB", "adaptation", "ratio"]
        heads += ["with θ₀ over plain + θ₀", "bf16: error of the gradient"]
        rows = []
        for r in result["memory"]:
            exact, base = r["float32"], r["float32"]["base"]
            row = [r["size"], r["tasks"], mib(exact["task_vectors"]), mib(r["bfloat16"]["task_vectors"]), mib(base)]
            row += [mib(r["plain"]), mib(exact["adapt"]), f"{exact['adapt'] / r['plain']:.2f}"]
            row += [f"{(exact['adapt'] + base) / (r['plain'] + base):.2f}", f"{100 * r['gradient_error']:.2f} %"]
            rows.append(row)
        parts.append(table(heads, rows))
    if result.get("processes"):
        heads = ["model", "T", "processes", "gradient differs by", "coefficients after 3 steps"]
        heads += ["τ MiB of each", "of one alone"]
        rows = []
        for r in result["processes"]:
            for layout in ("ddp", "fsdp2"):
                held = " and ".join(mib(each["task_vectors"]) for each in r[layout]["bytes"])
                row = [r["size"], r["tasks"], f"2, {layout}", f"{r[layout]['gradient']:.1e}"]
                rows.append([*row, f"{r[layout]['coefficients']:.1e}", held, mib(r["alone"]["task_vectors"])])
        parts.append(table(heads, rows))
    if result.get("device"):
        heads = ["model", "T", "precision", "τ GiB", "plain step, ms", "adaptation, ms", "ratio", "writing W, ms"]
        heads += ["contraction, ms", "τ once at the bandwidth of a copy, ms", "makes, MiB: plain", "adaptation"]
        rows = []
        for r in result["device"]:
            row = [r["size"], r["tasks"], r["precision"], f"{r['task_vectors'] / (1 << 30):.2f}"]
            row += [f"{1e3 * r['plain']:.1f}", f"{1e3 * r['adapt']:.1f}", f"{r['ratio']:.3f}"]
            row += [f"{1e3 * r[key]:.2f}" for key in ("materialise", "contract", "floor")]
            rows.append([*row, mib(r["plain_bytes"]), mib(r["adapt_bytes"])])
        parts.append(table(heads, rows))
    return "\n".join(parts)


def machine(device: str) -> dict[str, Any]:
    """What this ran on."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    models = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")]
    facts: dict[str, Any] = {"CPU": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    facts |= {"threads": torch.get_num_threads(), "Python": platform.python_version(), "torch": torch.__version__}
    return facts | ({} if device == "cpu" else {"GPU": torch.cuda.get_device_name()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help=f"some of {', '.join(SIZES)}")
    parser.add_argument("--parts", default="speed,memory,models,processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--counts", default="", help="numbers of tasks of the growth table, or on a GPU")
    parser.add_argument("--device", default="cpu", help="cuda, or cpu:device for a trial of that table")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lightning_merge_adaptation")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rank, world, layout, size, tasks = options.worker.split(",")
        worker(int(rank), int(world), layout, size, int(tasks), options.folder)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    device = options.device.removesuffix(":device")
    result: dict[str, Any] = {"machine": machine(device)}
    if options.device != "cpu":
        sizes, counts = (options.sizes or "B/32,L/14").split(","), options.counts or "8,20"
        result["device"] = [
            measure_device(size, int(count), options.rounds, options.folder, device, precision)
            for size in sizes
            for count in counts.split(",")
            for precision in ("float32", "bfloat16")
        ]
    else:
        sizes, parts = (options.sizes or "2.7M,21M").split(","), options.parts.split(",")
        counts = [int(count) for count in (options.counts or "2,4,8,16").split(",")]
        each: dict[str, Callable[[], list[Any]]] = {
            "speed": lambda: [measure_speed(size, options.tasks, options.rounds, options.folder) for size in sizes],
            "memory": lambda: [measure_memory(size, options.tasks, options.folder) for size in sizes],
            "models": lambda: [measure_memory(sizes[0], count, options.folder) for count in counts],
            "processes": lambda: [measure_processes(sizes[0], options.tasks, options.folder)],
        }
        for part in parts:
            key = "memory" if part == "models" else part
            result[key] = result.get(key, []) + each[part]()
    print(report(result))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(report(result), encoding="utf-8")


if __name__ == "__main__":
    main()
