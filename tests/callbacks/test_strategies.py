"""The same coefficients under every strategy, and a refusal of those that cannot work."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adamerging_job as job
import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator, MPSAccelerator
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge import TaskVectors, strategies
from lightning_merge.callbacks import AdaMerging
from lightning_merge.errors import UserError
from lightning_merge.objectives import Distillation, Entropy

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distillation": {"objectives": ["Distillation", "Entropy"]},
    "accumulated": {"accumulate": 2, "trainer": {"gradient_clip_val": 1e-3}},
    "settings": {
        "callback": {"by": "task", "constraint": "softmax", "prior": 0.1, "storage": "host", "keep_base": False}
    },
}


def two_processes(jobs: list[dict[str, Any]]) -> None:
    """Run the user's script in two processes, one job after another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(job.__file__)), json.dumps(jobs)],
            env={**shared, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = [process.communicate(timeout=280)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in output)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that two processes have to do, done in one start of them."""
    root = tmp_path_factory.mktemp("strategies")
    jobs: list[dict[str, Any]] = []

    def add(name: str, **settings: Any) -> None:
        folder = root / name
        folder.mkdir(exist_ok=True)
        jobs.append({"folder": str(folder), "devices": 2, **settings})

    for strategy in ("ddp", "fsdp2"):
        for variant, settings in VARIANTS.items():
            add(f"{strategy}_{variant}", strategy=strategy, **settings)
    for name, strategy, distributed in (("ddp", "ddp", False), ("full", "fsdp2", False), ("sharded", "fsdp2", True)):
        settings = {"strategy": strategy, "distributed_checkpoint": distributed, "epochs": 3}
        add(f"resume_{name}", **settings)
        path = str(root / f"resume_{name}" / "epoch=0.ckpt")
        add(f"resume_{name}", **settings, resume=path, out="resumed.pt")
        add(f"resume_{name}", **settings, resume=path, out="other.pt", callback={"by": "task"}, refused=True)
    two_processes(jobs)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(results: Path, tmp_path: Path, strategy: str, variant: str) -> None:
    one = job.run({"folder": str(tmp_path), **VARIANTS[variant]})
    two = torch.load(results / f"{strategy}_{variant}" / "out.pt", weights_only=True)
    torch.testing.assert_close(two["learned"], one["learned"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=1e-5, atol=1e-6)
    assert (one["learned"]["raw"] - one["learned"]["raw"].flatten()[0]).abs().max() > 0.01  # something was learned
    for name, row in one["last"].items():
        assert two["last"][name] == pytest.approx(row, rel=1e-5)
    for kept in ("left_over", "flags", "hooks", "training"):
        assert two[kept] == one[kept]
    assert two["trained"] != "DistributedDataParallel"  # whose reducer would send every weight's gradient
    assert list(two["state_dict"]) == list(job.UsersModule().state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "full", "sharded"])
def test_two_processes_go_on_as_if_they_had_not_stopped(results: Path, name: str) -> None:
    straight, resumed = (
        torch.load(results / f"resume_{name}" / out, weights_only=True) for out in ("out.pt", "resumed.pt")
    )
    torch.testing.assert_close(resumed["learned"], straight["learned"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(resumed["state_dict"], straight["state_dict"], rtol=1e-5, atol=1e-6)
    earlier = torch.load(results / f"resume_{name}" / "other.pt", weights_only=True)
    assert "by or scalars differ" in earlier["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "full"])
@pytest.mark.parametrize("file", ["epoch=2.ckpt", "weights.ckpt"])
def test_a_checkpoint_in_one_file_loads_strictly_into_the_plain_module(results: Path, name: str, file: str) -> None:
    checkpoint = torch.load(results / f"resume_{name}" / file, weights_only=False)
    module = job.UsersModule()
    module.load_state_dict(checkpoint["state_dict"], strict=True)
    expected = torch.load(results / f"resume_{name}" / "out.pt", weights_only=True)["state_dict"]
    torch.testing.assert_close(dict(module.state_dict()), expected, rtol=0, atol=1e-6)
    if file == "weights.ckpt":
        assert "callbacks" not in checkpoint
    else:
        assert set(checkpoint["callbacks"]["AdaMerging"]) == {"learned", "of", "bad_steps"}


@pytest.mark.slow
def test_each_task_counts_alike_where_a_process_lacks_one(tmp_path: Path) -> None:
    """The gradient is that of the mean over tasks of the mean over the processes that have a batch of the task."""
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("uneven_job.py")), str(tmp_path), str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in output)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    for rank in found:
        torch.testing.assert_close(rank["gradient"], expected["gradient"], rtol=1e-5, atol=1e-7)
        assert rank["last"]["entropy"] == pytest.approx(expected["last"], rel=1e-5)
        assert "holds no task" in rank["refused"] and "Only 1 of 2 processes" in rank["sharded"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def fake(strategy: Any, precision: str = "32-true", accelerator: Any = None) -> Any:
    return SimpleNamespace(
        strategy=strategy, precision_plugin=SimpleNamespace(precision=precision), accelerator=accelerator
    )


def unbuilt(kind: type, **attributes: Any) -> Any:
    """A strategy whose devices are not here."""
    strategy = object.__new__(kind)
    vars(strategy).update(attributes)
    return strategy


def test_strategies_that_cannot_work_are_refused_with_those_that_can() -> None:
    from lightning.pytorch import strategies as theirs

    class Mine(theirs.Strategy):
        pass

    Mine.__abstractmethods__ = frozenset()
    mesh = {name: SimpleNamespace(size=lambda size=size: size) for name, size in
            (("tensor_parallel", 2), ("data_parallel", 1))}  # fmt: skip
    for strategy, message in (
        (unbuilt(theirs.FSDPStrategy), "FSDPStrategy: FSDP1 flattens"),
        (unbuilt(theirs.DeepSpeedStrategy), "DeepSpeedStrategy"),
        (unbuilt(theirs.ModelParallelStrategy, _device_mesh=mesh), "tensor_parallel_size=2"),
        (unbuilt(theirs.XLAStrategy), "do not know the strategy XLAStrategy"),
        (unbuilt(Mine), "do not know the strategy Mine"),
    ):
        with pytest.raises(UserError, match=message) as error:
            strategies.check_trainer(fake(strategy))
        assert "data_parallel_size=N, tensor_parallel_size=1" in str(error.value)
    one = unbuilt(theirs.SingleDeviceStrategy)
    for precision in ("16-mixed", "16-true", "transformer-engine"):
        with pytest.raises(UserError, match=precision):
            strategies.check_trainer(fake(one, precision))
    for precision in strategies.PRECISIONS:
        strategies.check_trainer(fake(one, precision))
    with pytest.raises(UserError, match=r"accelerator 'mps'.*accelerator='cpu', or 'gpu' with CUDA"):
        strategies.check_trainer(fake(one, accelerator=unbuilt(MPSAccelerator)))
    strategies.check_trainer(fake(one, accelerator=unbuilt(CPUAccelerator)))


def test_answers_are_not_remembered_by_row_where_processes_ask_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows its rows would not gather the shards with another that does not."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    mesh = dict.fromkeys(("tensor_parallel", "data_parallel"), SimpleNamespace(size=lambda: 1))
    used = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    sharded = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    sharded._device_mesh, sharded.accelerator = mesh, used.accelerator
    monkeypatch.setattr(L.Trainer, "strategy", property(lambda _: sharded))
    task_vectors = TaskVectors.open(*job.fine_tuned())
    asking = AdaMerging(task_vectors, objectives=[Distillation()], individuals="cached")
    with pytest.raises(UserError, match=r"cached under ModelParallelStrategy.*individuals='computed'"):
        asking.setup(used, job.UsersModule(), "fit")
    for individuals, objective in (("computed", Distillation()), ("cached", Entropy())):
        other = AdaMerging(task_vectors, objectives=[objective], individuals=individuals)
        with pytest.raises(UserError, match="training data is one NoneType"):  # what is looked at next
            other.setup(used, job.UsersModule(), "fit")


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_other_precisions_learn_nearly_the_same(tmp_path: Path, precision: str) -> None:
    found = []
    for chosen in ("32-true", precision):
        callback = AdaMerging(TaskVectors.open(*job.fine_tuned()), learning_rate=1e-2, by="task")
        data = {
            task: DataLoader(TensorDataset(*(part[:64] for part in job.rows(task))), batch_size=16)
            for task in job.TASKS
        }
        L.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, precision=chosen, logger=False, callbacks=[callback],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(job.UsersModule(), data)  # fmt: skip
        assert callback.scalars.raw.dtype == torch.float32
        found.append(callback.scalars.raw.data - 0.3)
    assert (found[0] - found[1]).norm() < 0.1 * found[0].norm()
