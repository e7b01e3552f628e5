"""What stands around an output is left alone, what is finished is kept, and what is begun is told apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_files import as_option, listing, run_python, save_three, weights
from safetensors.torch import load_file

from lightning_merge import TaskVectors, merge
from lightning_merge.cli import main
from lightning_merge.errors import UserError
from lightning_merge.methods import SimpleAverage, TaskArithmetic, Ties
from lightning_merge.weights import save_safetensors


@pytest.fixture
def three(tmp_path: Path) -> TaskVectors:
    base, models = save_three(tmp_path / "in")
    return TaskVectors.open(base, models)


# --- other people's files ---------------------------------------------------------------------------------------


def test_folders_beside_the_output_are_never_touched(tmp_path: Path, three: TaskVectors) -> None:
    for name in ("out.old", "out.stages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    merge(TaskArithmetic(), three, tmp_path / "out")
    merge(TaskArithmetic(scale=0.1), three, tmp_path / "out", overwrite=True)
    merge(TaskArithmetic(scale=0.1), three, tmp_path / "out")
    assert all((tmp_path / name / "thesis.txt").read_text() == "mine" for name in ("out.old", "out.stages"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.old", "out.stages"]


def test_a_folder_that_is_not_ours_is_in_the_way(tmp_path: Path, three: TaskVectors) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out.partial' is in the way"):
        merge(TaskArithmetic(), three, tmp_path / "out")
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_models_where_the_work_happens_are_refused(tmp_path: Path) -> None:
    base, models = save_three(tmp_path / "out.partial" / "files")
    with pytest.raises(UserError, match=r"lies in '.*out.partial', where the work on 'out' happens"):
        merge(TaskArithmetic(), TaskVectors.open(base, models), tmp_path / "out")
    assert base.is_file()


def test_what_appears_at_the_output_meanwhile_stays(tmp_path: Path, three: TaskVectors) -> None:
    def intrude(done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(UserError, match="already holds something else"):
        merge(TaskArithmetic(), three, tmp_path / "out", on_progress=intrude)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_an_output_behind_a_link_stays_behind_it(tmp_path: Path, three: TaskVectors) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "merged")
    for scale in (0.1, 0.2):
        merge(TaskArithmetic(scale=scale), three, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert load_file(tmp_path / "disk" / "merged" / "model.safetensors").keys() == load_file(three.base.files[0]).keys()


# --- what is finished is kept -----------------------------------------------------------------------------------


def test_what_fails_at_the_very_end_costs_no_work(
    tmp_path: Path, three: TaskVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lightning_merge.merging.card_text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(TaskArithmetic(), three, tmp_path / "out")
    report = merge(TaskArithmetic(), three, tmp_path / "out")
    assert report.resumed_tensors == len(three.template.tensors) and report.passes == 0


SLOW = """
import os, sys, time
from dataclasses import dataclass
from lightning_merge.methods import TaskArithmetic

class Slow(TaskArithmetic):
    def apply(self, view, context):
        if view.name == "layer.weight":
            open(os.environ["REACHED"], "w").close()
            time.sleep(float(os.environ["SLOW"]))
            if os.environ.get("DIE"):
                os._exit(9)
        return super().apply(view, context)
"""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A method that takes its time, from a module that every process can import."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "slow_method.py").write_text(SLOW)
    monkeypatch.setenv("REACHED", str(tmp_path / "reached"))
    monkeypatch.setenv("SLOW", "0")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    import slow_method

    yield slow_method.Slow
    del sys.modules["slow_method"]


def test_a_worker_that_is_killed_costs_its_own_tensors_only(
    tmp_path: Path, three: TaskVectors, slow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("DIE", "1")
        patch.setenv("SLOW", "1")
        with pytest.raises(UserError, match=r"has ended before its work was done .* goes on from there"):
            merge(slow(), three, tmp_path / "out", num_workers=2)
    assert merge(slow(), three, tmp_path / "out", num_workers=2).resumed_tensors > 0
    expected = TaskArithmetic()(three)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_workers_that_outlive_a_killed_merge_keep_its_place(tmp_path: Path, three: TaskVectors, slow: Any) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "lib")!r})
from slow_method import Slow
from lightning_merge import TaskVectors, merge
base, cars, sun, out = sys.argv[1:]
merge(Slow(), TaskVectors.open(base, {{"cars": cars, "sun": sun}}), out, num_workers=2)
"""
    files = [str(tmp_path / "in" / f"{name}.safetensors") for name in ("base", "cars", "sun")]
    environment = {**os.environ, "SLOW": "6", "REACHED": str(tmp_path / "reached")}
    parent = subprocess.Popen([sys.executable, "-c", code, *files, str(tmp_path / "out")], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "reached").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    with pytest.raises(UserError, match="Another process is merging"):
        merge(SimpleAverage(), three, tmp_path / "out")
    while time.monotonic() < deadline:
        try:
            merge(SimpleAverage(), three, tmp_path / "out")
            break
        except UserError:
            time.sleep(0.2)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in SimpleAverage()(three).items())


# --- which merge it is ------------------------------------------------------------------------------------------


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, three: TaskVectors) -> None:
    def change(done: int, total: int) -> None:
        save_safetensors(weights(5), tmp_path / "in" / "sun.safetensors")

    with pytest.raises(UserError, match=r"sun.safetensors' was changed while it was merged"):
        merge(TaskArithmetic(), three, tmp_path / "out", on_progress=change)
    assert not (tmp_path / "out").exists()


def test_a_source_replaced_with_its_old_times_begins_anew(tmp_path: Path, three: TaskVectors) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(TaskArithmetic(), three, tmp_path / "out", threads=1, on_progress=stop)
    path = tmp_path / "in" / "sun.safetensors"
    times = path.stat()
    save_safetensors(weights(5), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = TaskVectors.open(three.base, {n: tmp_path / "in" / f"{n}.safetensors" for n in ("cars", "sun")})
    assert merge(TaskArithmetic(), changed, tmp_path / "out").resumed_tensors == 0


def test_other_names_for_tensors_are_another_merge(tmp_path: Path) -> None:
    both = {f"{prefix}.w": torch.full((4,), float(n)) for n, prefix in enumerate(("m", "ema"))}
    torch.save({"state_dict": {"base.w": torch.zeros(4)}}, tmp_path / "base.ckpt")
    torch.save({"state_dict": both}, tmp_path / "model.ckpt")
    from lightning_merge.weights import open_weights

    def opened(prefix: str) -> TaskVectors:
        base = open_weights(tmp_path / "base.ckpt", "base.")
        return TaskVectors.open(base, {"a": open_weights(tmp_path / "model.ckpt", prefix)})

    merge(TaskArithmetic(scale=1.0), opened("m."), tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="already holds another merge"):
        merge(TaskArithmetic(scale=1.0), opened("ema."), tmp_path / "out.safetensors")


def test_vectors_under_other_names_are_what_they_are(tmp_path: Path, three: TaskVectors) -> None:
    swapped = TaskVectors.of(three, {"cars": three["sun"], "sun": three["cars"]})
    only = {"cars": 1.0, "sun": 0.0}
    expected = TaskArithmetic(scale={"cars": 0.0, "sun": 1.0})(three)
    for name, value in TaskArithmetic(scale=only)(swapped).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    mixed = TaskVectors.of(three, {"cars": three["cars"], "both": three["cars"] + three["sun"]})
    merge(TaskArithmetic(), mixed, tmp_path / "mixed.safetensors")
    found = load_file(tmp_path / "mixed.safetensors")
    assert all(torch.equal(found[name], value) for name, value in TaskArithmetic()(mixed).items())


@pytest.mark.parametrize("damage", ["{", "[]", '{"files": 3}', "null"])
def test_a_damaged_record_vouches_for_nothing(tmp_path: Path, three: TaskVectors, damage: str) -> None:
    merge(TaskArithmetic(), three, tmp_path / "out")
    (tmp_path / "out" / "merge.json").write_text(damage)
    with pytest.raises(UserError, match="already holds another merge"):
        merge(TaskArithmetic(), three, tmp_path / "out")
    assert not merge(TaskArithmetic(), three, tmp_path / "out", overwrite=True).already_there


def test_a_shard_that_is_gone_is_made_again(tmp_path: Path, three: TaskVectors) -> None:
    merge(TaskArithmetic(), three, tmp_path / "out", max_shard_size="1KB")
    before = listing(tmp_path / "out")
    next((tmp_path / "out").glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match="already holds another merge"):
        merge(TaskArithmetic(), three, tmp_path / "out", max_shard_size="1KB")
    merge(TaskArithmetic(), three, tmp_path / "out", max_shard_size="1KB", overwrite=True)
    assert listing(tmp_path / "out").keys() == before.keys()


# --- numbers ----------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers(tmp_path: Path, three: TaskVectors) -> None:
    scale = np.linspace(0, 1, 4)[1]
    merge(TaskArithmetic(scale=scale), three, tmp_path / "out", seed=np.int64(3))
    assert main(["merge", "--config", str(tmp_path / "out" / "merge.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert listing(tmp_path / "again")["model.safetensors"] == listing(tmp_path / "out")["model.safetensors"]


def test_what_is_copied_overflows_as_loudly_as_what_is_merged(tmp_path: Path) -> None:
    base = {"head.weight": torch.full((3,), 1e6), "w": torch.ones(3)}
    vectors = TaskVectors.open(base, {"a": {**base, "w": torch.zeros(3)}}, ignore=["head"], check=False)
    with pytest.raises(UserError, match=r"'head.weight' overflows float16"):
        merge(TaskArithmetic(), vectors, tmp_path / "out.safetensors", dtype="float16")
    with pytest.raises(UserError, match=r"'head.weight' overflows float16"):
        TaskArithmetic()(vectors, dtype=torch.float16)


def test_a_restored_base_is_no_longer_called_quantised(tmp_path: Path) -> None:
    fp8 = torch.randn(8, 8).to(torch.float8_e4m3fn)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}, "torch_dtype": "bfloat16"}
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        save_safetensors({"w": fp8, "w_scale_inv": torch.ones(1)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    merge(SimpleAverage(), TaskVectors.open(tmp_path / "base", {"a": tmp_path / "a"}), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written and written["torch_dtype"] == "float32"
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], fp8.float())


def test_more_processes_than_sense_are_not_started(tmp_path: Path, three: TaskVectors) -> None:
    report = merge(Ties(), three, tmp_path / "out", num_workers=10_000)
    assert any("10000 processes are too many" in finding.message for finding in report.findings)


def test_patterns_that_fit_nothing_are_told(tmp_path: Path, three: TaskVectors) -> None:
    scale = [{"tensors": "self_atn", "value": 0.1}, {"value": 0.2}]
    found = merge(Ties(scale=scale), three, tmp_path / "out", dry_run=True).findings
    assert any("Ties: scale has the pattern 'self_atn', which fits no tensor" in str(finding) for finding in found)
    ignoring = TaskVectors.open(three.base, three.models, ignore=["nothing_like_it"])
    assert any("'nothing_like_it' to ignore fits no tensor" in str(finding) for finding in ignoring.findings)


def test_what_is_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, models = save_three(tmp_path / "in")
    given = ["merge", "--method", "SimpleAverage", "--base", str(base), "--output", str(tmp_path / "out")]
    assert main([*given, "--models", f"{{a: {models['cars']}, a: {models['sun']}}}"]) == 2
    assert "'a' stands twice" in capsys.readouterr().err
    assert main([*given, "--models", as_option(models), "--ignore", "a", "--ignore", "b"]) == 2
    assert "--ignore is given 2 times" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_of_the_current_folder_is_run_by_processes(tmp_path: Path) -> None:
    base, models = save_three(tmp_path / "in")
    (tmp_path / "random.py").write_text("raise SystemExit('imported from the current folder')")
    code = """
import os, sys
import torch  # which has imported random, before this folder can be in the way of it
from lightning_merge.cli import main
os.chdir(sys.argv[1])
sys.exit(main(["merge", "--method", "Ties", "--base", sys.argv[2], "--models", sys.argv[3], "--output", "out",
               "--num_workers", "2"]))
"""
    done = run_python(code, tmp_path, base, as_option(models))
    assert done.returncode == 0, done.stderr
