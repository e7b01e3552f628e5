"""The user's module in the user's trainer with one callback more; alone, or as one of two processes.

Called as a script, this is one process of several: ``python users_runs.py FOLDER``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import users_code
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_merge import TaskVectors
from lightning_merge.callbacks import AdaMerging
from lightning_merge.errors import UserError

Checkpoints = Mapping[str, str | Path]


def task_vectors(checkpoints: Checkpoints, **options: Any) -> TaskVectors:
    return TaskVectors.open(checkpoints["base"], {view: checkpoints[view] for view in users_code.VIEWS}, **options)


def strategy(name: str) -> dict[str, Any]:
    """Trainer arguments for a strategy's short name."""
    if name == "auto":
        return {}
    if name == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        return {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    if name == "ddp_fork":
        return {"devices": 2, "strategy": "ddp_fork"}
    from lightning.pytorch.strategies import ModelParallelStrategy

    if name == "tensor_parallel":  # its default: all devices
        return {"devices": 2, "strategy": ModelParallelStrategy(process_group_backend="gloo")}
    sharded = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=name == "fsdp2_distributed",
        process_group_backend="gloo",
    )
    return {"devices": 2, "strategy": sharded}


# --- what must be as it was -------------------------------------------------------------------------------------------


def marks(module: nn.Module) -> dict[str, Any]:
    """Everything that a callback could leave behind on a module, apart from its weights."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    return {
        "methods of the instance": sorted(n for n in vars(module) if callable(getattr(type(module), n, None))),
        "parameters": [name for name, _ in module.named_parameters()],
        "buffers": [name for name, _ in module.named_buffers()],
        "modules": [name for name, _ in module.named_modules()],
        "trained": [name for name, parameter in module.named_parameters() if parameter.requires_grad],
        "modes": {name: part.training for name, part in module.named_modules()},
        "hooks of modules": {n: [len(getattr(part, n)) for part in module.modules()] for n in hooks},
        "hooks of parameters": [
            name
            for name, p in module.named_parameters()
            if getattr(p, "_post_accumulate_grad_hooks", None) or getattr(p, "_backward_hooks", None)
        ],
        "gradients": [name for name, parameter in module.named_parameters() if parameter.grad is not None],
    }


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, gathered where it is sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if any(hasattr(value, "full_tensor") for value in module.state_dict().values()):
        return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def merged_by_hand(checkpoints: Checkpoints, table: Mapping[str, Mapping[str, float]]) -> dict[str, Tensor]:
    """θ₀ + Σ λ τ from the files alone."""
    states = {name: torch.load(path, weights_only=True)["state_dict"] for name, path in checkpoints.items()}
    merged = {}
    for name, base in states["base"].items():
        moved = sum(table[view][name] * (states[view][name].double() - base.double()) for view in users_code.VIEWS)
        merged[name] = (base.double() + moved).to(base.dtype)
    return merged


# --- runs -----------------------------------------------------------------------------------------------------------


class Record(L.Callback):
    """What another callback of the user's sees of the coefficients, step by step."""

    def __init__(self, adamerging: AdaMerging) -> None:
        self.adamerging, self.trace, self.wrapped = adamerging, [], ""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.wrapped = type(trainer.strategy.model).__name__
        self.trace.append(self.adamerging.scalars().detach().cpu().clone())

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            Path(trainer.default_root_dir, "table.json").write_text(json.dumps(self.adamerging.table()))


def adapt(
    folder: Path,
    checkpoints: Checkpoints,
    on: str = "auto",
    kind: str = "Classifier",
    epochs: int = 3,
    resume: str | None = None,
    trainer: Mapping[str, Any] | None = None,
    streams: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Adapt a module of the user's whose weights are random, and say what came of it."""
    torch.manual_seed(len(folder.name))  # the live module's own weights are of no account
    module = getattr(users_code, kind)()
    module.place.requires_grad_(False)  # frozen by the user, merged all the same
    module.blocks[0].dropout.eval()
    adamerging = AdaMerging(task_vectors(checkpoints), **{"learning_rate": 1e-2, **settings})
    record = Record(adamerging)
    saving = ModelCheckpoint(dirpath=folder / "checkpoints", filename="{epoch}", save_top_k=-1)
    used = users_code.trainer(
        folder,
        **{"max_epochs": epochs, "limit_train_batches": 4, "enable_checkpointing": True, **(trainer or {})},
        **strategy(on),
        callbacks=[adamerging, record, saving],
    )
    before = marks(module)
    used.fit(module, datamodule=users_code.Streams(**(streams or {})), ckpt_path=resume)
    after = marks(module)
    if on.startswith("fsdp2"):
        for key in ("hooks of modules", "modules"):  # fully_shard's own
            before.pop(key), after.pop(key)
    return {
        # Processes that were forked or spawned leave files.
        "table": json.loads((folder / "table.json").read_text()) if on == "ddp_fork" else adamerging.table(),
        "trace": torch.stack(record.trace) if record.trace else None,
        "wrapped": record.wrapped,
        "state_dict": whole_state_dict(module),
        "changed": {key: (before[key], after[key]) for key in before if before[key] != after[key]},
        "strategy's own": [name for name in ("configure_ddp", "load_checkpoint") if name in vars(used.strategy)],
        "module": module,
        "callback": adamerging,
        "trainer": used,
    }


def supervise(folder: Path, module: L.LightningModule, on: str = "auto", **options: Any) -> list[float]:
    """Train the adapted module on labels with the user's own step and optimizer; returns the losses."""
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    used = users_code.trainer(folder, max_epochs=1, callbacks=[Losses()], **strategy(on), **options)
    used.fit(module, datamodule=users_code.ViewedDigits(users_code.VIEWS))
    return losses


# --- several processes ----------------------------------------------------------------------------------------------


def in_processes(
    folder: Path, jobs: Sequence[Mapping[str, Any]], count: int = 2, timeout: float = 400
) -> list[list[dict[str, Any]]]:
    """Run jobs one after another in processes that talk over gloo; returns each process's results.

    A job is the arguments of :func:`adapt` with a ``name``; ``resume`` is a path below the folder. With ``watch`` the
    numbers that are reduced are counted, with ``again`` the module is trained on labels afterwards, and of what is
    ``refused`` the message is returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(list(jobs), default=str), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [{"WORLD_SIZE": str(count), "NODE_RANK": "0", "LOCAL_RANK": str(rank)} for rank in range(count)]
    said = [(folder / f"said_{rank}.txt").open("w+", encoding="utf-8") for rank in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**shared, **(rank if count > 1 else {})},
            stdout=text,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for rank, text in zip(ranks, said, strict=True)
    ]
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                break  # the others would wait for the one that failed
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    for process, text in zip(processes, said, strict=True):
        text.seek(0)
        words = text.read()
        text.close()
        assert process.returncode in (0, -signal.SIGKILL), words[-4000:]
    assert all(process.returncode == 0 for process in processes), f"no end after {timeout} s"
    return [torch.load(folder / f"results_{rank}.pt", weights_only=False) for rank in range(count)]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = []
    for job in json.loads((folder / "jobs.json").read_text(encoding="utf-8")):
        name, watch, again, refused = (job.pop(key, None) for key in ("name", "watch", "again", "refused"))
        if job.get("resume"):
            job["resume"] = str(folder / job["resume"])
        result: dict[str, Any] = {}
        reduced: list[int] = []
        try:
            with counted(reduced) if watch else contextlib.nullcontext():
                result = adapt(folder / name, **job)
        except UserError as error:
            if not refused:
                raise
            result["refused"] = str(error)
        if again:
            result["losses"] = supervise(folder / name / "again", result["module"], job["on"])
            result["trained"] = whole_state_dict(result["module"])
        result["reduced"] = reduced
        results.append({key: result[key] for key in result if key not in ("module", "callback", "trainer")})
    torch.save(results, folder / f"results_{os.environ.get('LOCAL_RANK', 0)}.pt")


@contextlib.contextmanager
def counted(sizes: list[int]) -> Iterator[None]:
    """Note how many numbers each reduction over processes takes."""
    own = torch.distributed.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return own(tensor, *args, **kwargs)

    torch.distributed.all_reduce = all_reduce
    try:
        yield
    finally:
        torch.distributed.all_reduce = own


if __name__ == "__main__":
    main(Path(sys.argv[1]))
