"""CPU seconds of merges over those of reading and writing alone, beside mergekit's, and what merges need in memory.

    python benchmarks/merge_speed.py [--sizes 134M,374M] [--methods linear,ties] [--rounds 3] [--output results/speed]
        [--mergekit_python PATH] [--mergekit_rounds 1] [--parts speed,memory,tensors,startup] [--readme]

Synthetic bf16 checkpoints in the layout of Llama: a base and three fine-tunes, base + N(0, 1e-3). The *floor* reads
every tensor of every input once and writes one output: ``safe_open(...).get_tensor(name).clone()``, ``save_file``.
Everything runs on one thread with warm page caches. Each measurement, and right before it a floor of its own, runs in a
fork of one process, so that imports are done and no memory is left over from others; each is called twice there. The
first call is what a command pays. The second finds the memory that the first has given back, which helps the floor most
(it does little but fill new pages), so both ratios are shown and judged; medians over the rounds of one run.
Ours is ``merge()`` from files to a file, the hashes of the sources known already; mergekit's is ``run_merge``, in this
process where it can be imported, else in a child of ``--mergekit_python``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import torch
from merge_speed_cases import ALL, CASES, SIZES, Case, checkpoints

TENSORS = 4_000


class NotHereError(Exception):
    """A merge that cannot be measured here."""


# --- what is measured ---------------------------------------------------------------------------------------------


def floor(places: Iterable[Path], output: Path) -> None:
    """Read every tensor of every input, write one output."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for place in places:
        with safe_open(place / "model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, output)


def run_ours(method: Any, base: Path | None, models: Mapping[str, Path], output: Path, **options: Any) -> Any:
    """Call our engine on one thread."""
    from lightning_merge import TaskVectors, merge

    return merge(method, TaskVectors.open(base, models), output, overwrite=True, threads=1, **options)


def our_method(case: Case) -> Any:
    """Build the method, however its class spells its name.

    Raises:
        NotHereError: The installed package does not have it.
    """
    from lightning_merge.methods import available_methods

    wanted = case.method.lower()
    known = {name.lower(): kind for name, kind in available_methods().items()}
    name = wanted if wanted in known else next((name for name in known if name.startswith(wanted)), None)
    if name is None:
        raise NotHereError(f"no method {case.method} in this version")
    try:
        return known[name](**case.settings)
    except (TypeError, ValueError) as error:
        raise NotHereError(str(error)) from error


def ours(case: Case, places: Mapping[str, Path], output: Path, **options: Any) -> Any:
    """Merge by ourselves."""
    method = our_method(case)
    # Without a base, a method of two or more models takes both of two inputs as models.
    base = places["base"] if case.over_base and (method.needs_base or len(case.inputs) > 2) else None
    models = {name: places[name] for name in case.inputs if base is None or name != "base"}
    return run_ours(method, base, models, output, **options)


def theirs(case: Case, places: Mapping[str, Path], output: Path) -> None:
    """Merge by mergekit, from files to files."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    listed = [name for name in case.inputs if name != "base" or not case.over_base]
    recipe: dict[str, Any] = {"merge_method": case.theirs, "dtype": "bfloat16", "parameters": dict(case.shared)}
    recipe["models"] = [{"model": str(places[name]), "parameters": dict(case.each)} for name in listed]
    if case.over_base:
        recipe["base_model"] = str(places["base"])
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
    run_merge(MergeConfiguration.model_validate(recipe), str(output), options)


def remove(output: Path) -> None:
    """Take away what a measurement has written, outside its time."""
    shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    output.with_name(output.name + ".merge.json").unlink(missing_ok=True)


def cpu_seconds(work: Callable[[], object]) -> float:
    """User and system time of this process, all its threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


def in_fork(work: Callable[[], object], output: Path, calls: int = 2) -> list[float]:
    """CPU seconds of a first call, and a second, in a process that has nothing behind it but imports.

    Raises:
        NotHereError: It fails.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        try:
            found: Any = []
            for _ in range(calls):
                found.append(cpu_seconds(work))
                remove(output)
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        found = json.loads(stream.read() or '"it was killed"')
    os.waitpid(process, 0)
    if isinstance(found, str):
        raise NotHereError(found)
    return found


def over_floor(case: Case, places: Mapping[str, Path], merge: Callable[..., object], output: Path) -> dict[str, Any]:
    """CPU seconds of the floor and, right after it, of one merge; first and second calls."""
    beside = output.with_name("floor.safetensors")
    least = in_fork(lambda: floor([places[name] for name in case.inputs], beside), beside)
    calls = 1 if merge is theirs else 2
    return {"floor": least, "merge": in_fork(lambda: merge(case, places, output), output, calls)}


def know_hashes(places: Mapping[str, Path]) -> None:
    """Hash the sources once; the engine remembers."""
    from lightning_merge.weights import open_weights, sha256_of_source

    for place in places.values():
        sha256_of_source(open_weights(place))


# --- parts --------------------------------------------------------------------------------------------------------


def measure_mergekit(cases: Iterable[Case], size: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Time mergekit in this process; ``{label: [{"floor": ..., "merge": ...}, ...]}``."""
    places = checkpoints(folder, size)
    theirs(CASES[0], checkpoints(folder, "tiny"), folder / "theirs")  # imports are no part of a merge
    found: dict[str, Any] = {case.label: [] for case in cases if case.theirs}
    for _ in range(rounds):
        for case in (case for case in cases if case.theirs):
            found[case.label].append(over_floor(case, places, theirs, folder / "theirs"))
            print(size, case.label, "mergekit", found[case.label][-1], file=sys.stderr)
    return found


def measure_speed(options: argparse.Namespace, cases: list[Case], size: str) -> dict[str, Any]:
    """Time ours, and mergekit where there is one."""
    places, output = checkpoints(options.folder, size), options.folder / "ours.safetensors"
    know_hashes(places)
    rows: dict[str, dict[str, Any]] = {case.label: {"ours": [], "theirs": [], "note": ""} for case in cases}
    ours(CASES[0], checkpoints(options.folder, "tiny"), output)  # imports are no part of a merge
    remove(output)
    over_floor(CASES[0], places, ours, output)  # a machine that was idle is slow to hand out memory
    for _ in range(options.rounds):
        for case in (case for case in cases if not rows[case.label]["note"]):
            row = rows[case.label]
            try:
                our_method(case)
                row["ours"].append(over_floor(case, places, ours, output))
            except NotHereError as error:
                row["note"] = str(error)
            print(size, case.label, row["ours"][-1:] or row["note"], file=sys.stderr)
    if options.mergekit_rounds and options.mergekit != "none":
        done = [case for case in cases if rows[case.label]["ours"]]
        if options.mergekit == "in process":
            found = measure_mergekit(done, size, options.mergekit_rounds, options.folder)
        else:
            labels = ",".join(case.label for case in done)
            rounds = str(options.mergekit_rounds)
            found = child(options, "mergekit", size, labels, rounds, python=options.mergekit_python)
        for label, measured in found.items():
            rows[label]["theirs"] = measured
    return rows


def anonymous_memory() -> int:
    """Bytes of private memory this process holds right now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def measure_memory(case: Case, places: Mapping[str, Path], output: Path) -> dict[str, Any]:
    """Peak of private memory above that of this process, which has imported torch only so far."""
    before, peak, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_memory())

    try:
        planned = ours(case, places, output, dry_run=True)
    except (NotHereError, ValueError) as error:
        return {"note": str(error)}
    watcher = threading.Thread(target=watch)
    watcher.start()
    report = ours(case, places, output)
    done.set()
    watcher.join()
    facts = ("peak_memory_bytes", "bytes_read", "bytes_written", "passes")
    result: dict[str, Any] = {"private": peak[0] - before, "whole": peak[0], "file": output.stat().st_size}
    result["planned"] = {name: getattr(planned, name, 0) for name in facts}
    result["reported"] = {name: getattr(report, name, 0) for name in facts}
    remove(output)
    return result


def measure_tensors(folder: Path, rounds: int) -> dict[str, Any]:
    """Merge many small tensors: the cost of a tensor, not of its entries."""
    from safetensors.torch import save_file

    from lightning_merge.methods import WeightedAverage

    generator = torch.Generator().manual_seed(0)
    models = {name: folder / f"tensors_{name}.safetensors" for name in "ab"}
    for path in models.values():
        save_file({f"layer.{i}.weight": torch.randn(16, generator=generator) for i in range(TENSORS)}, path)
    output, walls, cpus = folder / "tensors.safetensors", [], []
    for _ in range(rounds):
        started = time.perf_counter()
        cpus.append(cpu_seconds(lambda: run_ours(WeightedAverage(), None, models, output)))
        walls.append(time.perf_counter() - started)
        remove(output)
    return {"wall": walls, "cpu": cpus}


def measure_startup(rounds: int) -> list[float]:
    """CPU seconds of ``lightning-merge merge --help`` above those of importing torch."""
    from startup import COMMANDS, cpu_seconds

    return [cpu_seconds(COMMANDS["merge --help"]) - cpu_seconds(COMMANDS["import torch"]) for _ in range(rounds)]


def child(options: argparse.Namespace, *what: str, python: str = sys.executable) -> Any:
    """Run a part of this script in a fresh process; its last line is its answer."""
    command = [python, __file__, "--folder", str(options.folder), "--child", *what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def answer(options: argparse.Namespace) -> None:
    """What a child does."""
    part, size, label, *rest = options.child
    places = {name: options.folder / size / name for name in ALL}
    cases = [case for case in CASES if case.label in label.split(",")]
    if part == "memory":
        print(json.dumps(measure_memory(cases[0], places, options.folder / "memory.safetensors")))
    else:
        print(json.dumps(measure_mergekit(cases, size, int(rest[0]), options.folder)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(tempfile.gettempdir()) / "lightning_merge_speed"
    parser.add_argument("--folder", type=Path, default=folder, help="where the checkpoints stand or are made")
    parser.add_argument("--sizes", default="134M,374M", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--methods", default="", help=f"of {', '.join(case.label for case in CASES)}; by default all")
    parser.add_argument("--parts", default="speed,memory,tensors,startup")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit_python", default="", help="a Python that has mergekit, if this one has not")
    parser.add_argument("--mergekit_rounds", type=int, default=1, help="0 leaves mergekit out")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--readme", action="store_true", help="writes the tables into the README")
    parser.add_argument("--child", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.child:
        return answer(options)
    from merge_speed_report import fill, markdown

    here = importlib.util.find_spec("mergekit") is not None
    options.mergekit = "in process" if here else "in a child process" if options.mergekit_python else "none"
    labels = [label.strip() for label in options.methods.split(",") if label.strip()]
    if unknown := set(labels) - {case.label for case in CASES}:
        parser.error(f"unknown methods {sorted(unknown)}; known: {[case.label for case in CASES]}")
    cases = [case for case in CASES if not labels or case.label in labels]
    parts, sizes = options.parts.split(","), options.sizes.split(",")
    result: dict[str, Any] = {"machine": machine(options), "sizes": {}, "memory": {}}
    for size in sizes:
        if "speed" in parts:
            result["sizes"][size] = measure_speed(options, cases, size)
        if "memory" in parts:
            checkpoints(options.folder, size)
            result["memory"][size] = {case.label: child(options, "memory", size, case.label) for case in cases}
    if "tensors" in parts:
        result["tensors"] = measure_tensors(options.folder, options.rounds)
    if "startup" in parts:
        result["startup"] = measure_startup(options.rounds)
    result["machine"]["load after"] = round(os.getloadavg()[0], 1)
    text = markdown(result, CASES)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    if options.readme:
        fill(text)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Hardware and versions."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    models = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")]
    facts: dict[str, Any] = {"CPU": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    facts |= {"Python": platform.python_version(), "torch": torch.__version__}
    facts |= {"lightning_merge": version("lightning-merge"), "rounds": options.rounds}
    facts["mergekit"] = f"{options.mergekit}, {options.mergekit_rounds} rounds" if options.mergekit_rounds else "none"
    return facts | {"load before": round(os.getloadavg()[0], 1)}


if __name__ == "__main__":
    main()
