"""A user's own script: a supervised module over digits, adapted by the callback in a Trainer of one or two processes.

Run as ``python adamerging_job.py '[{"strategy": "ddp", ...}, ...]'``; what came out is written by the first process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

TASKS = ("even", "odd", "small")
BATCH = 16


class UsersModule(L.LightningModule):
    """An ordinary supervised classifier."""

    def __init__(self, dropout: float = 0.3, norm: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, 32),
            *([nn.BatchNorm1d(32)] if norm else []),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(32, 33),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(33, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("test_loss", nn.functional.cross_entropy(self(x), y), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ShardedModule(UsersModule):
    """The same, spread over processes by its own hook, as ModelParallelStrategy asks for."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None and not hasattr(self.classifier.weight, "placements"):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.encoder, mesh=mesh)
            fully_shard(self.classifier, mesh=mesh)


def rows(task: str) -> tuple[Tensor, Tensor]:
    """Digits of one task: 128 of them."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    keep = {"even": y % 2 == 0, "odd": y % 2 == 1, "small": y < 5}[task]
    return x[keep][:128], y[keep][:128]


class UsersData(L.LightningDataModule):
    """A loader for each task, unshuffled, each process its own half."""

    def train_dataloader(self) -> dict[str, DataLoader]:
        assert self.trainer is not None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        loaders = {}
        for task in TASKS:
            data = TensorDataset(*rows(task))
            sampler = DistributedSampler(data, world, rank, shuffle=False)
            loaders[task] = DataLoader(data, batch_size=BATCH // world, sampler=sampler)
        return loaders


def fine_tuned() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A base and three models trained from it, the same whenever they are made."""
    torch.manual_seed(0)
    base = UsersModule(dropout=0.0)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    models = {}
    for task in TASKS:
        base.load_state_dict(start)
        x, y = rows(task)
        optimizer = torch.optim.Adam(base.parameters(), lr=3e-3)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(base(x), y).backward()
            optimizer.step()
        models[task] = {name: value.clone() for name, value in base.state_dict().items()}
    return start, models


class Watch(L.Callback):
    """Notes what the strategy has made of the module while it trains."""

    kind = ""
    path: Path | None = None

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.path is not None:
            trainer.save_checkpoint(self.path, weights_only=True)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.kind = type(trainer.strategy.model).__name__


def strategy_of(name: str) -> Any:
    if name != "fsdp2":
        return name
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", save_distributed_checkpoint=False
    )


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Fit once and describe what came out."""
    from lightning_merge import TaskVectors, objectives
    from lightning_merge.callbacks import AdaMerging

    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    task_vectors = TaskVectors.open(*fine_tuned())
    chosen = [getattr(objectives, name)() for name in job.get("objectives", ["Entropy"])]
    callback = AdaMerging(task_vectors, learning_rate=1e-2, objectives=chosen, **job.get("callback", {}))
    module = ShardedModule() if job.get("strategy") == "fsdp2" else UsersModule()
    strategy = strategy_of(job.get("strategy", "auto"))
    if job.get("distributed_checkpoint"):
        strategy._save_distributed_checkpoint = True
    folder = Path(job["folder"])
    watch = Watch()
    if not job.get("distributed_checkpoint"):
        watch.path = folder / ("resumed_weights.ckpt" if job.get("resume") else "weights.ckpt")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=job.get("devices", 1),
        strategy=strategy,
        max_epochs=job.get("epochs", 2),
        accumulate_grad_batches=job.get("accumulate", 1),
        use_distributed_sampler=False,
        callbacks=[
            callback,
            watch,
            L.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1, monitor=None),
        ],
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **job.get("trainer", {}),
    )
    if job.get("refused"):
        try:
            trainer.fit(module, datamodule=UsersData(), ckpt_path=job["resume"])
        except ValueError as error:
            torch.save({"refused": str(error)}, folder / job["out"])
        return {}
    trainer.fit(module, datamodule=UsersData(), ckpt_path=job.get("resume"))
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in module.state_dict().items()
    }
    found = {
        "learned": callback.learned(),
        "state_dict": {name: value.detach().clone() for name, value in state.items()},
        "last": callback.last,
        "trained": watch.kind,
        "left_over": [name for name in vars(module) if name in ("training_step", "configure_optimizers")],
        "flags": [parameter.requires_grad for parameter in module.parameters()],
        "hooks": sum(len(p._post_accumulate_grad_hooks or ()) for p in module.parameters()),
        "training": [part.training for part in module.modules()],
    }
    if trainer.is_global_zero:
        torch.save(found, folder / job.get("out", "out.pt"))
    return found


if __name__ == "__main__":
    for each in json.loads(sys.argv[1]):
        run(each)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
