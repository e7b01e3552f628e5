"""Unlabeled streams over several tasks."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch
from data_helpers import Made

from lightning_merge.data import Digits, Split, Task, TaskStreams
from lightning_merge.errors import UserError


class Uneven(Made):
    """The task ``pairs`` has 50 test rows, ``short`` 10."""

    def load(self, name: str) -> Task:
        task = super().load(name)
        if name == "pairs":
            return task
        test = task.splits["test"]
        return Task(name, task.kind, task.labels, task.label_texts,
                    {**task.splits, "test": Split(test.inputs[:10], test.labels[:10])})  # fmt: skip


class Watching(L.LightningModule):
    """Writes down which rows come when; learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[dict[str, list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        assert all("labels" not in part for part in batch.values())
        self.seen.append({task: part["index"].tolist() for task, part in batch.items()})
        return self.weight * 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def watch(streams: TaskStreams, folder: Any, **options: Any) -> Watching:
    module = Watching()
    checkpoint = options.pop("ckpt_path", None)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, enable_checkpointing=False, limit_val_batches=0, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=streams, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


def test_a_batch_has_the_same_number_of_rows_of_each_task_and_no_labels() -> None:
    batch = next(iter(TaskStreams(Made(), batch_size=6).train_dataloader()))[0]
    assert set(batch) == {"short", "pairs"}
    for task in batch.values():
        assert set(task) == {"inputs", "index"} and len(task["inputs"]) == len(task["index"]) == 6
    assert isinstance(batch["pairs"]["inputs"][0], tuple)


def test_rows_are_known_by_their_numbers_in_the_split() -> None:
    data = Made()
    streams = TaskStreams(data, split="dev", batch_size=5, max_rows=7, seed=3)
    rows = data.get("short").splits["dev"]
    for batch, _, _ in streams.train_dataloader():
        for text, index in zip(batch["short"]["inputs"], batch["short"]["index"], strict=True):
            assert rows.inputs[int(index)] == text


def test_the_small_task_starts_again_in_another_order_while_the_large_one_lasts() -> None:
    batches = [batch for batch, _, _ in TaskStreams(Uneven(), batch_size=1).train_dataloader()]
    assert len(batches) == 50  # as many as the large task has rows
    small = [int(batch["short"]["index"]) for batch in batches]
    passes = [small[start : start + 10] for start in range(0, 50, 10)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 5
    large = [row for batch in batches for row in batch["pairs"]["index"].tolist()]
    assert Counter(large) == Counter(range(50))
    assert len(list(TaskStreams(Uneven(), batch_size=1, mode="min_size").train_dataloader())) == 10


def test_few_rows_are_the_same_few_in_each_epoch_and_part_of_what_more_would_be() -> None:
    def rows(count: int) -> set[int]:
        loader = TaskStreams(Made(), batch_size=4, max_rows=count).train_dataloader()
        twice = itertools.chain(loader, loader)
        return {int(row) for batch, _, _ in twice for row in batch["short"]["index"]}

    assert len(rows(6)) == 6 and rows(6) < rows(12)


def test_labels_come_only_when_asked_for_and_never_of_test_rows() -> None:
    data = Made()
    batch = next(iter(TaskStreams(data, split="dev", labels=True).train_dataloader()))[0]["short"]
    labels = data.get("short").splits["dev"].labels[batch["index"].numpy()]
    assert batch["labels"].tolist() == labels.tolist()
    for split in ("test", "ood_far"):
        with pytest.raises(UserError, match="Expected split: dev or train"):
            TaskStreams(data, split=split, labels=True)


def test_a_corrupted_stream_shows_what_the_evaluation_scores() -> None:
    data = Digits(tasks=["upright"], max_test=20)
    batch = next(iter(TaskStreams(data, batch_size=8, max_rows=9, corruption="gaussian_noise-3").train_dataloader()))[0]
    scored = next(iter(data.loader("upright", "test", corruption="gaussian_noise-3")))
    place = {int(row): image for row, image in zip(scored["index"], scored["inputs"], strict=True)}
    for row, image in zip(batch["upright"]["index"], batch["upright"]["inputs"], strict=True):
        assert torch.equal(image, place[int(row)])


def test_a_stream_goes_on_after_an_epoch_as_it_would_have(tmp_path: Any) -> None:
    """Lightning asks a resumed loader for its first batches before it says which epoch it is."""
    straight = watch(TaskStreams(Uneven(), batch_size=2), tmp_path, max_epochs=3).seen
    assert len(straight) == 75 and straight[:25] != straight[25:50] != straight[50:]
    first = watch(TaskStreams(Uneven(), batch_size=2), tmp_path, max_epochs=1).seen
    rest = watch(TaskStreams(Uneven(), batch_size=2), tmp_path, max_epochs=3, ckpt_path=tmp_path / "last.ckpt").seen
    assert first + rest == straight


def test_the_seed_decides_the_order() -> None:
    orders = {
        seed: [batch["short"]["index"].tolist() for batch, _, _ in TaskStreams(Made(), seed=seed).train_dataloader()]
        for seed in (0, 1)
    }
    again = [batch["short"]["index"].tolist() for batch, _, _ in TaskStreams(Made(), seed=0).train_dataloader()]
    assert orders[0] == again != orders[1]


def test_loaders_that_score_are_the_datas_own() -> None:
    data = Made()
    for loader, split in ((TaskStreams(data).val_dataloader(), "dev"), (TaskStreams(data).test_dataloader(), "test")):
        assert list(loader.iterables) == ["short", "pairs"]
        batches = [batch for batch, _, dataloader_idx in loader if dataloader_idx == 1]
        assert sum(len(batch["labels"]) for batch in batches) == len(data.get("pairs").splits[split])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"split": "tset"}, "Unknown split of TaskStreams 'tset'.*Did you mean 'test'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"mode": "max_size"}, "Unknown mode of TaskStreams 'max_size'"),
        ({"corruption": "typoes-3"}, "Did you mean 'typos'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        TaskStreams(Made(), **settings)


def test_what_the_data_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match="Unknown split of task 'short' 'ood_near'"):
        TaskStreams(Made(), split="ood_near").stream("short")
    with pytest.raises(UserError, match="for image inputs, but task 'short' has text"):
        TaskStreams(Made(), corruption="blur-3").stream("short")
    with pytest.raises(UserError, match=r"Expected data\.task: null"):
        TaskStreams(Made(task="short"))
