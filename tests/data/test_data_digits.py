"""Digits and HuggingFaceDatasets."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

from lightning_merge.data import Digits, HuggingFaceDatasets, HuggingFaceSource
from lightning_merge.data.digits import split_rows
from lightning_merge.errors import UserError


def test_a_digit_is_in_the_same_split_in_every_domain() -> None:
    rows = split_rows()
    assert {name: len(part) for name, part in rows.items()} == {"train": 1078, "dev": 216, "test": 503}
    assert len(np.unique(np.concatenate(list(rows.values())))) == 1797
    data = Digits()
    labels = {name: data.get(name).splits["test"].labels.tolist() for name in data.task_names}
    assert len(labels) >= 5 and all(ids == labels["upright"] for ids in labels.values())


def test_no_image_is_in_train_and_in_a_test_or_ood_split() -> None:
    data = Digits()
    pretrain = {image.tobytes() for image in data.get("pretrain").splits["train"].inputs}
    for name in data.task_names:
        task = data.get(name)
        train = {image.tobytes() for image in task.splits["train"].inputs}
        for split in ("dev", "test", *task.ood_names):
            held_out = {image.tobytes() for image in task.splits[split].inputs}
            assert not held_out & train and not held_out & pretrain
        assert pretrain & train, "the mixture takes its rows from the training digits"


def test_domains_show_the_same_digit_in_their_own_way() -> None:
    data = Digits(domains=["upright", "rotated", "mirrored", "inverted", "transposed", "flipped"], layout="full")
    image = {name: data.get(name).splits["test"].inputs[7] for name in data.task_names}
    upright = image["upright"]
    assert (image["rotated"] == np.rot90(upright)).all()
    assert (image["mirrored"] == upright[:, ::-1]).all()
    assert (image["inverted"] == 255 - upright).all()
    assert (image["transposed"] == upright.T).all()
    assert (image["flipped"] == upright[::-1]).all()
    assert len({name: data.fingerprint(name) for name in data.task_names}) == 6


@pytest.mark.parametrize("size", [16, 24, 32])
def test_quadrants_keep_tasks_apart_on_the_canvas(size: int) -> None:
    data = Digits(image_size=size)
    used = {name: data.get(name).splits["train"].inputs.max(axis=0) > 0 for name in data.task_names}
    assert used["upright"].shape == (size, size) and used["upright"][: size // 2, : size // 2].any()
    assert not (used["upright"] & used["rotated"]).any() and not (used["upright"] & used["mirrored"]).any()


def test_ood_views_are_mild_but_new() -> None:
    task = Digits(layout="full").get("upright")
    assert task.ood_names == ["ood_nudged", "ood_thick", "ood_tilted"]
    test = task.splits["test"].inputs.astype(float)
    for name in task.ood_names:
        view = task.splits[name].inputs.astype(float)
        overlap = (view * test).sum() / np.sqrt((view**2).sum() * (test**2).sum())
        assert 0.7 < overlap < 0.99, (name, overlap)
        assert (task.splits[name].labels == task.splits["test"].labels).all()
    assert task.splits["ood_thick"].inputs.mean() > test.mean()


def test_pretrain_is_a_small_mixture_and_no_task_of_a_run() -> None:
    data = Digits(pretrain_rows=20)
    assert "pretrain" not in data.task_names
    assert len(data.get("pretrain").splits["train"]) == 20 * len(data.task_names)
    assert next(iter(Digits(task="pretrain").train_dataloader()))["inputs"].shape == (32, 16, 16)


def test_bad_settings_are_refused() -> None:
    for settings, message in [
        ({"domains": ["uprigth"]}, "Did you mean 'upright'"),
        ({"domains": ["upright", "upright"]}, "listed twice"),
        ({"domains": []}, "domains is empty"),
        ({"image_size": 12}, "at least 16, got 12"),
        ({"image_size": 17}, "even"),
        ({"layout": "quadrant"}, "Did you mean 'quadrants'"),
        ({"pretrain_rows": 3}, "at least 10"),
        ({"domains": ["upright"], "tasks": ["rotated"]}, "Unknown task 'rotated'"),
    ]:
        with pytest.raises(UserError, match=message):
            Digits(**settings)  # type: ignore[arg-type]


class FakeTable:
    """What is used of a ``datasets`` table."""

    def __init__(self, columns: dict[str, list[Any]], names: list[str] | None) -> None:
        self.columns = columns
        self.column_names = list(columns)
        self.features = {"label": types.SimpleNamespace(names=names) if names else object()}

    def __getitem__(self, column: str) -> list[Any]:
        return self.columns[column]


def install(monkeypatch: pytest.MonkeyPatch, tables: dict[str, FakeTable]) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = lambda path, config, revision: tables  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def table(split: str, count: int, names: list[str] | None = None) -> FakeTable:
    columns = {"text": [f"{split} {row}" for row in range(count)], "label": [row % 2 for row in range(count)]}
    return FakeTable({**columns, "text_b": ["b"] * count}, names)


def test_a_hub_dataset_is_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["no", "yes"]
    install(monkeypatch, {"train": table("train", 40, names), "test": table("test", 8), "far": table("far", 4)})
    source = HuggingFaceSource("owner/name", ood={"far": "far"})
    task = HuggingFaceDatasets({"toy": source}).get("toy")
    assert task.labels == ("no", "yes") and task.ood_names == ["ood_far"]
    assert len(task.splits["train"]) == 36 and len(task.splits["dev"]) == 4, "a tenth is set aside for validation"
    assert not set(task.splits["train"].inputs) & set(task.splits["dev"].inputs)
    pairs = HuggingFaceDatasets({"toy": HuggingFaceSource("owner/name", inputs=["text", "text_b"])}).get("toy")
    assert pairs.splits["test"].inputs[3] == ("test 3", "b")


def test_hub_errors_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"train": table("train", 4), "test": table("test", 8)})
    for source, message in [
        (HuggingFaceSource("x", inputs=["txt"]), "Unknown column .* 'txt'.*Did you mean 'text'"),
        (HuggingFaceSource("x", test="tests"), "Did you mean 'test'"),
        (HuggingFaceSource("x"), "names no classes"),
    ]:
        with pytest.raises(UserError, match=message):
            HuggingFaceDatasets({"toy": source}).get("toy")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        HuggingFaceDatasets({"toy": HuggingFaceSource("x")}).get("toy")
    with pytest.raises(UserError, match="1 to 1 image columns"):
        HuggingFaceSource("x", kind="image", inputs=["a", "b"])
