"""The sampler: every row once, like lengths together, an order that depends on seed and epoch alone."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from data_helpers import Made

from lightning_merge.data import LengthGroupedSampler

LENGTHS = np.random.default_rng(0).integers(1, 200, 1003)


def padding(order: list[int], batch_size: int) -> int:
    batches = [LENGTHS[order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return int(sum(batch.max() * len(batch) - batch.sum() for batch in batches))


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_row_comes_once(shuffle: bool) -> None:
    sampler = LengthGroupedSampler(LENGTHS, 16, shuffle)
    assert sorted(sampler) == list(range(1003)) and len(sampler) == 1003


def test_shuffled_order_depends_on_seed_and_epoch_only() -> None:
    sampler = LengthGroupedSampler(LENGTHS, 16, True, seed=3)
    first, again = list(sampler), list(sampler)
    assert first == again
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(LengthGroupedSampler(LENGTHS, 16, True, seed=4)) != first
    other = LengthGroupedSampler(LENGTHS, 16, True, seed=3)
    other.set_epoch(1)
    assert list(other) == second


def test_batches_hold_like_lengths_but_are_not_sorted_in_time() -> None:
    grouped = list(LengthGroupedSampler(LENGTHS, 16, True))
    plain = np.random.default_rng(1).permutation(1003).tolist()
    assert padding(grouped, 16) < 0.25 * padding(plain, 16)
    means = [LENGTHS[grouped[start : start + 16]].mean() for start in range(0, 992, 16)]
    steps = np.diff(means)
    assert (steps > 0).sum() > 15 and (steps < 0).sum() > 15


def test_evaluation_is_sorted_longest_first_and_does_not_change() -> None:
    sampler = LengthGroupedSampler(LENGTHS, 16)
    order = list(sampler)
    assert (np.diff(LENGTHS[order]) <= 0).all()
    sampler.set_epoch(5)
    assert list(sampler) == order


def test_images_of_one_size_are_shuffled_all_the_same() -> None:
    order = list(LengthGroupedSampler(np.zeros(100), 10, True))
    assert order != sorted(order) and sorted(order) == list(range(100))


class Watcher(L.LightningModule):
    """Records the row numbers it is trained on, epoch by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: list[list[int]] = []
        self.samplers: list[Any] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])
        self.samplers.append(self.trainer.train_dataloader.sampler)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.epochs[-1] += batch["index"].tolist()
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(**settings: Any) -> Watcher:
    module = Watcher()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **settings,
    )
    trainer.fit(module, datamodule=Made(task="short", batch_size=8))
    return module


def test_lightning_tells_the_sampler_the_epoch() -> None:
    module = fit()
    assert isinstance(module.samplers[0], LengthGroupedSampler)
    assert sorted(module.epochs[0]) == sorted(module.epochs[1]) == list(range(100))
    assert module.epochs[0] != module.epochs[1]
    assert fit().epochs == module.epochs


def test_lightning_can_replace_it_by_its_distributed_sampler() -> None:
    from torch.utils.data.distributed import DistributedSampler

    data = Made(task="short", batch_size=8)
    loader = data.train_dataloader()
    from lightning.pytorch.utilities.data import _update_dataloader

    sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=0, shuffle=True)
    replaced = _update_dataloader(loader, sampler)
    rows = [row for batch in replaced for row in batch["index"].tolist()]
    assert len(rows) == 50 and len(set(rows)) == 50
