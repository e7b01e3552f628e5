"""Tasks and TaskData: what is refused, what is cut, what is hashed, what a batch holds."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import Made, made_task

from lightning_merge.data import Split, Task, check_task, fingerprint
from lightning_merge.errors import UserError


def with_split(task: Task, name: str, split: Split) -> Task:
    return replace(task, splits={**task.splits, name: split})


@pytest.mark.parametrize("bad", [-1, 2])
def test_an_unknown_label_id_names_task_split_and_what_is_accepted(bad: int) -> None:
    task = made_task()
    labels = task.splits["dev"].labels.copy()
    labels[3] = bad
    with pytest.raises(UserError, match=rf"'short'.*'dev'.*label id {bad} in row 3.*0 to 1"):
        check_task(with_split(task, "dev", Split(task.splits["dev"].inputs, labels)))


def test_an_empty_split_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"'short'.*'ood_far'.*empty"):
        check_task(with_split(made_task(), "ood_far", Split([], np.zeros(0, dtype=np.int64))))


def test_missing_and_unknown_splits_are_refused() -> None:
    task = made_task()
    with pytest.raises(UserError, match="'test' is missing"):
        check_task(replace(task, splits={name: task.splits[name] for name in ("train", "dev")}))
    with pytest.raises(UserError, match="'validation' is unknown"):
        check_task(with_split(task, "validation", task.splits["dev"]))


def test_other_malformed_tasks_are_refused() -> None:
    task = made_task()
    ids = np.zeros(2, dtype=np.int64)
    for broken, message in [
        (replace(task, labels=("one",), label_texts=None), "At least two"),
        (replace(task, labels=("one", "one")), "At least two different"),
        (replace(task, label_texts=("only one",)), "1 label_texts for 2 labels"),
        (with_split(task, "dev", Split(["a"], ids)), "1 inputs but 2 labels"),
        (with_split(task, "dev", Split(["a", 7], ids)), "row 1 is int"),
        (with_split(task, "dev", Split(["a", "b"], ids.astype(np.int32))), "int32"),
    ]:
        with pytest.raises(UserError, match=message):
            check_task(broken)
    floats = {name: Split(np.zeros((2, 4, 4)), ids) for name in ("train", "dev", "test")}
    with pytest.raises(UserError, match=r"float64 of shape \(2, 4, 4\)"):
        check_task(Task("x", "image", ("a", "b"), None, floats))


def test_limits_keep_a_fixed_subset_in_order_and_bound_each_ood_set() -> None:
    full, data = Made().get("short"), Made(max_train=20, max_dev=5, max_test=7, seed=1)
    task = data.get("short")
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 20, "dev": 5, "test": 7, "ood_far": 7}
    position = {text: row for row, text in enumerate(full.splits["train"].inputs)}
    rows = [position[text] for text in task.splits["train"].inputs]
    assert rows == sorted(rows) and rows != list(range(20))
    assert [full.splits["train"].labels[row] for row in rows] == list(task.splits["train"].labels)
    assert Made(max_train=20, seed=1).get("short").splits["train"].inputs == task.splits["train"].inputs
    assert Made(max_train=20, seed=2).get("short").splits["train"].inputs != task.splits["train"].inputs
    larger = Made(max_train=30, seed=1).get("short").splits["train"].inputs
    assert set(task.splits["train"].inputs) < set(larger)
    assert len(full.splits["train"]) == 100, "the task that load() returned must not change"


def test_the_fingerprint_sees_every_row_label_and_name_but_not_the_task_name() -> None:
    task = made_task()
    reference = fingerprint(task)
    assert fingerprint(made_task()) == reference
    assert fingerprint(replace(task, name="other", description="x")) == reference
    dev = task.splits["dev"]
    changed_text = [*dev.inputs[:-1], dev.inputs[-1] + "."]
    swapped = [dev.inputs[1], dev.inputs[0], *dev.inputs[2:]]
    others = [
        with_split(task, "dev", Split(changed_text, dev.labels)),
        with_split(task, "dev", Split(swapped, dev.labels)),
        with_split(task, "dev", Split(dev.inputs, 1 - dev.labels)),
        with_split(task, "ood_near", dev),
        replace(task, labels=("even", "uneven")),
        replace(task, label_texts=("an even row", "an uneven row")),
        replace(task, label_texts=None),
    ]
    assert len({reference, *(fingerprint(other) for other in others)}) == len(others) + 1
    ids = np.zeros(1, dtype=np.int64)
    pairs = [Task("p", "text", ("a", "b"), None, {"train": Split([pair], ids)}) for pair in [("ab", "c"), ("a", "bc")]]
    assert fingerprint(pairs[0]) != fingerprint(pairs[1])


def test_rows_and_orders_do_not_depend_on_the_process_and_packages_are_read_unimported() -> None:
    code = (
        "import sys\n"
        "from data_helpers import Made\n"
        "from lightning_merge.data import Digits, DocstringTasks\n"
        "sentences = DocstringTasks(packages=['stdlib', 'sklearn'], ood_packages={}, megabytes=1.5)\n"
        "print(sentences.fingerprint('kind'), 'sklearn' in sys.modules)\n"
        "data = Made(max_train=20)\n"
        "print(data.fingerprint('short'), data.fingerprint('pairs'), Digits(max_train=9).fingerprint('mirrored'),\n"
        "      list(data.loader('short', 'train', shuffle=True).sampler))\n"
    )
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parents[1])])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "4242")
    ]
    outputs = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert outputs[0][0] == outputs[1][0] and len(outputs[0][0]) > 250
    assert outputs[0][0].splitlines()[0].endswith(" False"), "sklearn was imported"


def test_unknown_names_give_the_nearest_spelling() -> None:
    with pytest.raises(UserError, match="Did you mean 'short'"):
        Made(tasks=["shrot"])
    with pytest.raises(UserError, match="Did you mean 'pairs'"):
        Made(task="pair")
    with pytest.raises(UserError, match="Did you mean 'ood_far'"):
        Made().loader("short", "ood_fra")
    with pytest.raises(UserError, match="listed twice"):
        Made(tasks=["short", "short"])
    with pytest.raises(UserError, match="tasks is empty"):
        Made(tasks=[])
    for name in ("batch_size", "eval_batch_size", "max_train", "max_dev", "max_test"):
        with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
            Made(**{name: 0})


def test_task_names_keep_the_given_order_and_tasks_are_read_once() -> None:
    data = Made(tasks=["pairs", "short"])
    assert data.task_names == ["pairs", "short"]
    assert Made().task_names == ["short", "pairs"]
    assert data.get("pairs") is data.get("pairs")
    assert data.ood_names("pairs") == ["ood_far"]


def test_a_batch_holds_raw_inputs_labels_and_row_numbers() -> None:
    data = Made(batch_size=8, eval_batch_size=16)
    for name, kind in [("short", str), ("pairs", tuple)]:
        rows = data.get(name).splits["test"]
        seen = []
        for batch in data.loader(name, "test"):
            assert set(batch) == {"inputs", "labels", "index"}
            assert batch["labels"].dtype == batch["index"].dtype == torch.int64
            for value, label, index in zip(batch["inputs"], batch["labels"], batch["index"], strict=True):
                assert isinstance(value, kind) and value == rows.inputs[index] and label == rows.labels[index]
                seen.append(int(index))
        assert sorted(seen) == list(range(len(rows)))
    assert len(next(iter(data.loader("short", "train", shuffle=True)))["inputs"]) == 8


def test_a_corruption_follows_the_row_not_the_batch() -> None:
    small, large = Made(eval_batch_size=3), Made(eval_batch_size=50)
    texts = []
    for data in (small, large):
        batches = list(data.loader("short", "test", corruption="typos-5"))
        texts.append({int(i): t for batch in batches for i, t in zip(batch["index"], batch["inputs"], strict=True)})
    assert texts[0] == texts[1]
    clean = small.get("short").splits["test"].inputs
    assert any(texts[0][row] != clean[row] for row in texts[0])
    with pytest.raises(UserError, match="blur-3' is for image inputs, but task 'short' has text"):
        small.loader("short", "test", corruption="blur")


def test_with_one_task_loaders_are_single_and_without_they_are_keyed_by_task() -> None:
    from lightning.pytorch.utilities import CombinedLoader

    one = Made(task="short")
    for loader in (one.train_dataloader(), one.val_dataloader(), one.test_dataloader(), one.predict_dataloader()):
        assert isinstance(next(iter(loader))["inputs"][0], str)
    several = Made()
    assert list(several.train_dataloader()) == ["short", "pairs"]
    tests = several.test_dataloader()
    assert isinstance(tests, CombinedLoader)
    iterator = iter(tests)
    kinds = [(type(batch["inputs"][0]), task) for batch, _, task in iterator]
    assert kinds == [(str, 0), (tuple, 1)], "the tasks come one after another, in order"


def test_workers_give_the_same_batches() -> None:
    plain = [batch["index"].tolist() for batch in Made().loader("pairs", "test", corruption="case-5")]
    worked = [batch["index"].tolist() for batch in Made(num_workers=1).loader("pairs", "test", corruption="case-5")]
    assert plain == worked
    task = made_task()
    assert fingerprint(pickle.loads(pickle.dumps(task))) == fingerprint(task)
