"""DocstringTasks: sentences are read without imports, labels hold, nothing leaks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_merge.data import DocstringTasks
from lightning_merge.data.docstring_reader import first_sentence, normalise, read_package
from lightning_merge.errors import UserError

SOURCE = '''
"""Tools for the work with many boxes.

More about it.
"""
raise RuntimeError("imported")

class Box:
    """A box that holds some things."""

    def is_open(self):
        """Tell about the state of the lid."""
        return self.lid

    @property
    def size(self) -> int:
        """The number of things in the box."""
        return 3

    def empty(self):
        """Throw all of the things away!  And then rest."""
        self.things = []
        def inner():
            """An inner function is not read."""
            return 1

def same(a, b):
    """Compare two boxes with :func:`~a.b.compare` now."""
    return a.x == b.x and isinstance(b, Box)

def stub(a):
    """Do a thing that is abstract."""
    raise NotImplementedError
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "made_up_boxes"
    (folder / "tests").mkdir(parents=True)
    (folder / "_vendor").mkdir()
    (folder / "__init__.py").write_text(SOURCE)
    (folder / "broken.py").write_text('"""A module that has a syntax error."""\ndef f(:\n')
    for skipped in ("tests/box.py", "_vendor/box.py", "test_box.py"):
        (folder / skipped).write_text('"""A sentence that must not be read."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    read_package.cache_clear()
    return folder.name


def test_a_package_is_read_without_importing_it(package: str) -> None:
    found = {item.sentence: item for item in read_package(package, 1.0)}
    assert {sentence: (item.kind, item.result) for sentence, item in found.items()} == {
        "Tools for the work with many boxes.": ("module", None),
        "A box that holds some things.": ("class", None),
        "Tell about the state of the lid.": ("method", "value"),
        "The number of things in the box.": ("property", "value"),
        "Throw all of the things away.": ("method", "nothing"),
        "Compare two boxes with compare now.": ("function", "truth"),
        "Do a thing that is abstract.": ("function", None),
    }
    assert found["The number of things in the box."].returns == "int"
    assert package not in sys.modules
    assert read_package(package, 1.0) is read_package(package, 1.0)


def test_first_sentences_are_plain_words() -> None:
    assert first_sentence("Return the\n    sum of ``x``. Then more.") == "Return the sum of x."
    assert first_sentence("Gaussian (e.g. normal) noise on all values\n\nLong text") is not None
    for refused in ("Too short.", "Alias of %(name)s for all the rest", "See https://a.b for all of it", "word " * 41):
        assert first_sentence(refused) is None


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match=r"'no_such_package' is not installed.*pip install no-such-package"):
        DocstringTasks(packages=["no_such_package"]).get("kind")
    with pytest.raises(UserError, match=r"'sympy' is in packages and in ood_packages\['mathematics'\]"):
        DocstringTasks(packages=["sympy"])
    with pytest.raises(UserError, match="megabytes must be above 0"):
        DocstringTasks(megabytes=0)
    with pytest.raises(UserError, match="packages is empty"):
        DocstringTasks(packages=[])


def test_a_class_without_a_row_is_an_error_that_names_it(package: str) -> None:
    with pytest.raises(UserError, match=r"no sentence of class .*made_up_boxes"):
        DocstringTasks(packages=[package], ood_packages={}).get("kind")


@pytest.fixture(scope="module")
def data() -> DocstringTasks:
    return DocstringTasks()


def test_no_sentence_is_in_two_splits_of_any_tasks(data: DocstringTasks) -> None:
    part: dict[str, str] = {}
    for name in data.task_names:
        task = data.get(name)
        own = [normalise(text) for split in task.splits.values() for text in split.inputs]
        if name != "field":  # whose sentences may become equal only by masking, and are then kept once by that key
            assert len(own) == len(set(own)), name
        for split, rows in task.splits.items():
            for text in rows.inputs:
                # Out-of-domain rows may come in several out-of-domain sets, but never in training.
                where = "ood" if split.startswith("ood_") else split
                assert part.setdefault(normalise(text), where) == where, (name, text)


def test_tasks_are_large_and_balanced_enough(data: DocstringTasks) -> None:
    assert len(data.task_names) >= 5
    for name in data.task_names:
        task = data.get(name)
        assert len(task.splits["train"]) >= 600 and len(task.splits["dev"]) >= 80 and len(task.splits["test"]) >= 180
        assert task.ood_names and all(len(task.splits[split]) >= 180 for split in task.ood_names)
        assert task.label_texts is not None
        for split in task.splits.values():
            counts = np.bincount(split.labels, minlength=len(task.labels))
            assert counts.min() > 0 and counts.max() / counts.sum() < (0.65 if len(task.labels) == 2 else 0.45)
            assert all(4 <= len(text.split()) <= 40 for text in split.inputs)


def test_labels_say_what_the_sentences_say(data: DocstringTasks) -> None:
    task = data.get("truth")
    rows = task.splits["test"]
    says = np.array(
        [text.lower().startswith(("return true", "returns true", "check if", "whether")) for text in rows.inputs]
    )
    assert rows.labels[says].mean() > 0.8 > 0.5 > rows.labels[~says].mean()
    texts = " ".join(data.get("field").splits["train"].inputs).lower()
    for name in ("numpy", "pytorch", "matplotlib", "scikit-learn", "python"):
        assert name not in texts.split(), "a library's name would give the field away"
