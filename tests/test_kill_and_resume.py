"""A merge that is killed, at any moment, and asked for again gives the bytes of one that never was."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import as_option, listing, save_three

from lightning_merge import TaskVectors, merge
from lightning_merge.cli import main
from lightning_merge.errors import UserError
from lightning_merge.methods import Ties
from lightning_merge.weights import save_safetensors

ROWS, COLUMNS, LAYERS = 1024, 1024, 28  # in bf16 and with three models over a base, 4 × 59 MB
NOT_COMPARED = {"merge.json", "README.md"}  # they tell times

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@dataclass(frozen=True)
class Form:
    """One kind of output, of one kind of merge."""

    output: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.output, *self.options[1::2]])


WHOLE_MODEL, BY_TENSOR = ("--method.scope", "model"), ("--method.scope", "tensor")
SHARDS, TWO = ("--max_shard_size", "20MB"), ("--num_workers", "2")
FORMS = [
    Form("out.safetensors", BY_TENSOR),
    Form("out", (*WHOLE_MODEL, *SHARDS)),
    Form("out", (*BY_TENSOR, *SHARDS, *TWO)),
    Form("out.safetensors", (*WHOLE_MODEL, *TWO)),
]


class Bench:
    """Models that take a second to merge, and what comes of it undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.models = folder / "in" / "base.safetensors", {}
        self.base.parent.mkdir()
        generator = torch.Generator().manual_seed(0)
        # Few random numbers go a long way: every layer turns the same ones by another amount.
        noise = torch.randn(ROWS * COLUMNS, generator=generator)

        def weights(model: int) -> dict[str, torch.Tensor]:
            changed = {}
            for layer in range(LAYERS):
                values = noise.roll(layer * 997) + 0.1 * model * noise.roll(layer * 991 + model * 983)
                changed[f"layer.{layer}.weight"] = values.reshape(ROWS, COLUMNS).bfloat16()
            return changed

        save_safetensors(weights(0), self.base)
        for model, name in enumerate(("cars", "sun", "dtd"), start=1):
            self.models[name] = self.base.with_name(f"{name}.safetensors")
            save_safetensors(weights(model), self.models[name])
        self.undisturbed: dict[Form, tuple[dict[str, bytes], float]] = {}

    def arguments(self, form: Form, output: Path) -> list[str]:
        sources = ["--base", str(self.base), "--models", as_option(self.models)]
        return ["merge", "--method", "Ties", *sources, *form.options, "--output", str(output)]

    def expected(self, form: Form) -> tuple[dict[str, bytes], float]:
        """The bytes of a merge that nobody kills, and the seconds it takes."""
        if form not in self.undisturbed:
            output = self.folder / "undisturbed" / form.output
            output.parent.mkdir(exist_ok=True)
            started = time.perf_counter()
            assert main(self.arguments(form, output)) == 0
            self.undisturbed[form] = found(output), time.perf_counter() - started
            shutil.rmtree(output.parent)
        return self.undisturbed[form]


def found(output: Path) -> dict[str, bytes]:
    """Every file of an output that must be the same whenever it is made."""
    if output.is_file():
        return {output.name: output.read_bytes()}
    return {name: content for name, content in listing(output).items() if name not in NOT_COMPARED}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("kill")
    yield Bench(folder)
    shutil.rmtree(folder)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Run the command in a process, and a process group, of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from lightning_merge.cli import entry; entry()", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def alive(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    running = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of_group = entry.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                running.append(int(entry.parent.name))
    return running


def kill_once(arguments: list[str], output: Path, delay: float, with_children: bool) -> tuple[bool, int]:
    """Start a merge and kill it some time after it began to work; whether it was killed, and its process group."""
    process = start(arguments)
    partial = output.with_name(output.name + ".partial")
    while process.poll() is None and not partial.exists():
        time.sleep(0.001)
    time.sleep(delay)
    # Its own worker processes are killed with it, or have to notice for themselves.
    with suppress(ProcessLookupError):  # it has ended already
        (os.killpg if with_children else os.kill)(process.pid, signal.SIGKILL)
    text, _ = process.communicate()
    assert process.returncode in {0, -signal.SIGKILL}, text
    return process.returncode != 0, process.pid


def disturb(bench: Bench, form: Form, output: Path, seed: int, times: int = 1) -> tuple[int, bool]:
    """Kill a merge, then let it end; how often it was killed, and whether it then went on."""
    draw = random.Random(seed)
    expected, seconds = bench.expected(form)
    output.parent.mkdir()
    arguments = bench.arguments(form, output)
    killed, groups, latest = 0, [], seconds
    for _ in range(times):
        was_killed, group = kill_once(arguments, output, draw.uniform(0, latest), with_children=draw.random() < 0.5)
        groups.append(group)
        killed += was_killed
        if not was_killed:  # faster than foreseen
            latest /= 2
            for path in output.parent.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    last = start(arguments)
    text, _ = last.communicate(timeout=300)
    assert last.returncode == 0, text
    assert found(output) == expected
    beside = {output.name, output.name + ".merge.json"} if output.suffix else {output.name}
    assert {path.name for path in output.parent.iterdir()} == beside
    deadline = time.monotonic() + 20
    while any(alive(group) for group in groups):
        assert time.monotonic() < deadline, "a killed merge's own processes live on"
        time.sleep(0.05)
    assert found(output) == expected  # nor did they write into it
    shutil.rmtree(output.parent)
    return killed, "Resumed: " in text


@needs_linux
def test_killed_three_times_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    results = [disturb(bench, form, tmp_path / str(n) / form.output, seed=n) for n, form in enumerate(FORMS[:3])]
    assert sum(killed for killed, _ in results)
    seed = len(results)
    while not any(resumed for _, resumed in results):  # a moment before the first tensor is done is no news
        assert seed < 9, "no killed merge was ever resumed"
        results.append(disturb(bench, FORMS[0], tmp_path / str(seed) / FORMS[0].output, seed))
        seed += 1


@needs_linux
@pytest.mark.slow
def test_killed_twenty_times_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    results = []
    for seed in range(20):
        form = FORMS[seed % len(FORMS)]
        results.append(disturb(bench, form, tmp_path / str(seed) / form.output, 100 + seed, times=1 + seed % 3))
    assert sum(killed for killed, _ in results) >= 10
    assert sum(resumed for _, resumed in results) >= 3


# --- at every change of the disk ----------------------------------------------------------------------------------

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.copyfile"}


def is_change(event: str, arguments: tuple[Any, ...], below: str) -> bool:
    """Tell whether an audit event is about to change a file in a folder."""
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return bool(writes) and isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(below)
    return event in CHANGES and any(
        os.fsdecode(path).startswith(below) for path in arguments if isinstance(path, (str, bytes, os.PathLike))
    )


def merge_until(change: int, below: Path, base: Path, models: dict[str, Path], output: Path, **options: Any) -> bool:
    """Merge in a fork that is killed right before its n-th change of the disk; whether there were so many."""
    process = os.fork()
    if not process:
        left = change

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if is_change(event, arguments, str(below)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            merge(Ties(), TaskVectors.open(base, models), output, threads=1, **options)
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert status in {0, signal.SIGKILL}, f"change {change}: the merge failed"
    return status != 0


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "over an earlier merge"])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_killed_before_any_change_of_the_disk(name: str, overwrite: bool, tmp_path: Path) -> None:
    base, models = save_three(tmp_path / "in")
    options: dict[str, Any] = {"overwrite": overwrite}
    if name == "out":
        options["max_shard_size"] = "1MB"
    merge(Ties(), TaskVectors.open(base, models), tmp_path / "undisturbed" / name, threads=1, **options)
    expected = found(tmp_path / "undisturbed" / name)
    beside = {path.name for path in (tmp_path / "undisturbed").iterdir()}
    change, resumed, problems = 1, 0, []
    while True:
        place = tmp_path / "killed" / str(change)
        output = place / name
        earlier: dict[str, bytes] = {}
        if overwrite:
            merge(Ties(density=0.5), TaskVectors.open(base, models), output, threads=1)
            earlier = found(output)
        if not merge_until(change, tmp_path / "killed", base, models, output, **options):
            break
        if output.exists() and found(output) not in (expected, earlier):
            problems.append(f"{change}: what stands under the output's name is not whole")
        try:
            resumed += merge(Ties(), TaskVectors.open(base, models), output, threads=1, **options).resumed_tensors
        except UserError as error:
            problems.append(f"{change}: the same merge is refused: {error}")
            continue
        else:
            if found(output) != expected:
                problems.append(f"{change}: the bytes differ")
            if left := {path.name for path in place.iterdir()} - beside:
                problems.append(f"{change}: left over: {left}")
        finally:
            shutil.rmtree(place)
            change += 1
    assert change > 5 and resumed
    assert not problems, "\n".join(problems)
