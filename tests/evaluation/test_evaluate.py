"""Predictions stand in the order of the rows, and evaluation leaves no trace on the modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_merge.errors import UserError
from lightning_merge.evaluation import predict, score_model


class Signs(nn.Module):
    """Features are the numbers themselves; dropout and BatchNorm would show if training mode were on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.drop = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(()))

    def preprocess(self, inputs: list[str]) -> dict[str, Tensor]:
        return {"numbers": torch.tensor([[float(text)] for text in inputs])}

    def forward(self, numbers: Tensor) -> Tensor:
        return self.drop(self.norm(numbers)) * self.weight


class TwoClasses(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([-features, features], dim=1)  # class 1 where the number is positive


INPUTS = [str((-1) ** (row * row // 3) * (row + 1)) for row in range(23)]
TRUTH = np.array([int(float(text) > 0) for text in INPUTS])


def batches(order: list[int], size: int, labels: np.ndarray = TRUTH, inputs: list[str] = INPUTS) -> Iterator[dict]:
    for start in range(0, len(order), size):
        index = order[start : start + size]
        yield {
            "inputs": [inputs[row] for row in index],
            "labels": torch.tensor([int(labels[row]) for row in index]),
            "index": torch.tensor(index),
        }


@pytest.mark.parametrize("size", [1, 4, 23, 100])
@pytest.mark.parametrize("step", [1, 5, 22])
def test_rows_come_in_order_whatever_the_batches(size: int, step: int) -> None:
    order = [(row * step) % 23 for row in range(23)]
    predictions, labels = predict(Signs(), TwoClasses(), batches(order, size))
    assert predictions.dtype == labels.dtype == np.int64
    assert predictions.tolist() == labels.tolist() == TRUTH.tolist()


def test_rows_that_pad_a_distributed_sampler_count_once() -> None:
    predictions, _ = predict(Signs(), TwoClasses(), batches([*range(22, -1, -1), 0, 1], 4))
    assert predictions.tolist() == TRUTH.tolist()


def test_modes_are_restored_one_by_one_even_after_an_error() -> None:
    encoder, head = Signs().train(), TwoClasses().train()
    encoder.norm.eval()  # frozen by its owner
    with pytest.raises(UserError, match="NaN"):
        predict(encoder, head, batches([0], 1, inputs=["nan"]))
    predict(encoder, head, batches(list(range(23)), 8))
    assert (encoder.training, encoder.norm.training, encoder.drop.training, head.training) == (True, False, True, True)
    assert float(encoder.norm.running_mean) == 0.0  # nothing was learned from the test rows
    assert encoder.weight.requires_grad and encoder.weight.grad is None


def test_no_batch_is_an_error() -> None:
    with pytest.raises(UserError, match="no batch"):
        predict(Signs(), TwoClasses(), [])


class Data:
    """Task ``a`` has an OOD set whose first label is wrong, ``b`` has none."""

    def ood_names(self, name: str) -> list[str]:
        return ["ood_x"] if name == "a" else []

    def loader(self, name: str, split: str, *, corruption: Any = None) -> Iterator[dict]:
        labels, inputs = TRUTH.copy(), INPUTS
        if split == "ood_x":
            labels[0] = 1 - labels[0]
        if corruption is not None:
            assert split == "test"  # out-of-domain sets are not corrupted on top
            inputs = [str(-float(text)) for text in INPUTS]
        return batches(list(range(22, -1, -1)), 5, labels, inputs)


class Negate:
    def __str__(self) -> str:
        return "negate-3"


def test_score_model_covers_every_set_and_tells_of_it() -> None:
    heard = []
    encoder = Signs()
    scores = score_model("m", encoder, {"a": TwoClasses(), "b": TwoClasses()}, Data(), ["a", "b"], [Negate()],
                         on_progress=lambda *report: heard.append(report))  # fmt: skip
    assert [(s.task, s.split, s.dataset, s.value) for s in scores] == [
        ("a", "id", "test", 1.0),
        ("a", "ood", "ood_x", 22 / 23),
        ("a", "corrupted", "negate-3", 0.0),
        ("b", "id", "test", 1.0),
        ("b", "corrupted", "negate-3", 0.0),
    ]
    assert scores[1].correct.tolist() == [False] + [True] * 22  # row 0, although it came in the last batch
    assert heard == [(s.task, s.dataset, done, 5) for done, s in enumerate(scores, start=1)]
    assert encoder.training


def test_score_model_takes_corruptions_by_task_and_names_a_missing_head() -> None:
    scores = score_model("m", Signs(), {"a": TwoClasses(), "b": TwoClasses()}, Data(), ["a", "b"], {"b": [Negate()]})
    assert [s.task for s in scores if s.split == "corrupted"] == ["b"]
    with pytest.raises(UserError, match=r"no head for the task 'bb'.*Did you mean 'b'"):
        score_model("m", Signs(), {"b": TwoClasses()}, Data(), ["bb"])


def test_an_error_names_model_and_data_set() -> None:
    encoder = Signs()
    with torch.no_grad():
        encoder.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"'ties' on a/test: .*NaN"):
        score_model("ties", encoder, {"a": TwoClasses()}, Data(), ["a"])
