"""TextTables and ImageArrays: the layouts, and what is said about files that do not follow them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_tables

from lightning_merge.data import ImageArrays, TextTables
from lightning_merge.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_folder_of_tables_is_a_task(tmp_path: Path, zipped: bool) -> None:
    write_tables(tmp_path, zipped=zipped)
    write_tables(tmp_path, "both", pair=True, zipped=zipped)
    data = TextTables(tmp_path)
    assert data.task_names == ["both", "toy"]
    task = data.get("toy")
    assert task.labels == ("no", "yes") and task.label_texts == ("it is not", "it is") and task.description == "toy"
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 6, "dev": 2, "test": 3, "ood_far": 2}
    # Quotes are text, and a line separator inside a row does not end it.
    assert task.splits["dev"].inputs == ['dev "row" 0 é\u2028x', 'dev "row" 1 é\u2028x']
    assert task.splits["dev"].labels.tolist() == [0, 1]
    assert data.get("both").splits["dev"].inputs[1] == ('dev "row" 1 é\u2028x', "b")


def test_zipped_and_plain_tables_have_one_fingerprint(tmp_path: Path) -> None:
    write_tables(tmp_path / "a", zipped=True)
    write_tables(tmp_path / "b", zipped=False)
    assert TextTables(tmp_path / "a").fingerprint("toy") == TextTables(tmp_path / "b").fingerprint("toy")


def test_bad_tables_are_named_with_their_line(tmp_path: Path) -> None:
    folder = write_tables(tmp_path, zipped=False)
    table = folder / "dev.tsv"
    for content, message in [
        ("text\tlabels\na\t0\n", r"header of '.*dev\.tsv'"),
        ("text,label\na,0\n", "header of"),
        ("text\tlabel\n", r"dev\.tsv' has no rows"),
        ("", "header of"),
        ("text\tlabel\na\t0\nb\tc\t1\n", "line 3 of .* has 3 columns"),
        ("text\tlabel\na\t0\nb\t2\n", "unknown label id '2' in line 3 .*0 to 1"),
        ("text\tlabel\na\tyes\n", "unknown label id 'yes' in line 2"),
        ("text\tlabel\na\t-1\n", "unknown label id '-1'"),
    ]:
        table.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            TextTables(tmp_path).get("toy")
    table.write_bytes(b"text\tlabel\n\xff\xfe\t0\n")
    with pytest.raises(UserError, match="cannot be read"):
        TextTables(tmp_path).get("toy")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere' is not a folder"):
        TextTables(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no task in"):
        TextTables(tmp_path)
    folder = write_tables(tmp_path)
    (folder / "dev.tsv.gz").write_bytes(gzip.compress(b"text\tlabel\na\t0\n")[:-9])
    with pytest.raises(UserError, match=r"dev\.tsv\.gz' cannot be read"):
        TextTables(tmp_path).get("toy")
    (folder / "dev.tsv.gz").rename(folder / "devel.tsv.gz")
    with pytest.raises(UserError, match=r"dev\.tsv \(or|dev.tsv' \(or .tsv.gz\) is missing.*devel\.tsv\.gz"):
        TextTables(tmp_path).get("toy")
    (folder / "meta.json").write_text('{"label_texts": []}', encoding="utf-8")
    with pytest.raises(UserError, match=r"labels in '.*meta\.json' is None"):
        TextTables(tmp_path).get("toy")


def write_images(root: Path, name: str, classes: tuple[str, ...] = ("a", "b"), **changed: np.ndarray) -> None:
    arrays: dict[str, np.ndarray] = {"classes": np.array(classes)}
    for split, count in {"train": 6, "dev": 2, "test": 3}.items():
        arrays["x_" + split] = np.full((count, 5, 4), len(name), dtype=np.uint8)
        arrays["y_" + split] = (np.arange(count) % 2).astype(np.uint8)
    arrays.update(changed)
    np.savez(root / f"{name}.npz", **arrays)


def test_an_archive_is_a_task_and_another_its_ood_set(tmp_path: Path) -> None:
    extra = {"x_ood_far": np.zeros((1, 5, 4), dtype=np.uint8), "y_ood_far": np.zeros(1, dtype=np.uint8)}
    write_images(tmp_path, "one", **extra)
    write_images(tmp_path, "other")
    data = ImageArrays(tmp_path, ood={"one": ["other"]}, eval_batch_size=2)
    assert data.task_names == ["one", "other"] and data.ood_names("one") == ["ood_far", "ood_other"]
    assert data.get("one").splits["ood_other"].inputs[0, 0, 0] == len("other")
    batch = next(iter(data.loader("one", "test", corruption="gaussian_noise-1")))
    assert batch["inputs"].shape == (2, 5, 4) and str(batch["inputs"].dtype) == "torch.uint8"


def test_bad_archives_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, "one")
    write_images(tmp_path, "third", classes=("a", "c"))
    with pytest.raises(UserError, match="Did you mean 'third'"):
        ImageArrays(tmp_path, ood={"one": ["thrid"]})
    with pytest.raises(UserError, match=r"\['a', 'c'\].*'one'"):
        ImageArrays(tmp_path, ood={"one": ["third"]}).get("one")
    write_images(tmp_path, "wrong", y_dev=np.array([0, 2], dtype=np.uint8))
    with pytest.raises(UserError, match=r"'wrong'.*'dev'.*label id 2"):
        ImageArrays(tmp_path).get("wrong")
    write_images(tmp_path, "real", y_dev=np.array([0.0, 1.0]))
    with pytest.raises(UserError, match="float64"):
        ImageArrays(tmp_path).get("real")
    np.savez(tmp_path / "little.npz", classes=np.array(["a", "b"]), x_train=np.zeros((1, 2, 2), dtype=np.uint8))
    with pytest.raises(UserError, match="'y_train' is missing"):
        ImageArrays(tmp_path).get("little")
    np.savez(tmp_path / "pickled.npz", classes=np.array(["a", {"b": 1}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("pickled", "text"):
        with pytest.raises(UserError, match=f"{name}.npz"):
            ImageArrays(tmp_path).get(name)


@pytest.mark.skipif(not (SHARED / "text").is_dir(), reason="the shared text tables are not on this machine")
def test_the_shared_text_tables_are_read_and_do_not_leak() -> None:
    data = TextTables(SHARED / "text", tasks=["trec", "sst2", "sick", "agnews"])
    counts = {
        "trec": (4000, 400, 500),
        "sst2": (4000, 400, 1000),
        "sick": (4000, 400, 1000),
        "agnews": (4000, 400, 1000),
    }
    for name in data.task_names:
        task = data.get(name)
        assert tuple(len(task.splits[split]) for split in ("train", "dev", "test")) == counts[name]
        assert not set(task.splits["train"].inputs) & set(task.splits["test"].inputs)
    assert data.ood_names("sst2") == ["ood_amazon", "ood_tweets", "ood_yelp"]
    test = data.get("trec").splits["test"]
    assert np.bincount(test.labels).max() / len(test) == pytest.approx(0.276, abs=5e-4)
    assert isinstance(data.get("sick").splits["test"].inputs[0], tuple)


@pytest.mark.skipif(not (SHARED / "vision").is_dir(), reason="the shared image arrays are not on this machine")
def test_the_shared_image_arrays_are_read() -> None:
    data = ImageArrays(SHARED / "vision", ood={"mnist": ["usps"]})
    task = data.get("mnist")
    assert task.labels == tuple("0123456789") and task.splits["ood_usps"].inputs.shape == (1000, 28, 28)
