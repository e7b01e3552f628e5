"""DocstringTasks: real English classification tasks that every machine with this package already holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lightning_merge.data.datamodule import TaskData
from lightning_merge.data.docstring_reader import Documented, normalise, read_package, stable_hash
from lightning_merge.data.task import OOD_PREFIX, Split, Task
from lightning_merge.errors import UserError

TRAIN_PACKAGES = ("stdlib", "numpy", "scipy", "sklearn", "torch", "torchmetrics", "matplotlib", "transformers")
# Never trained on by any task.
OOD_PACKAGES: dict[str, tuple[str, ...]] = {
    "mathematics": ("sympy", "networkx", "mpmath"),
    "tools": ("rich", "huggingface_hub", "peft", "lightning", "jsonargparse", "fsspec"),
    "drawing": ("mpl_toolkits",),
}
TRAIN_PART, DEV_PART = 0.70, 0.10
BALANCE = 1.5  # the most rows of a class, in rows of the rarest one
BALANCE_FLOOR = 40  # a class with so few rows is not what others are cut to


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


VERBS: dict[str, frozenset[str]] = {
    "check": _words("is has can check validate verify ensure assert test supports"),
    "set": _words("set"),
    "add": _words("add append insert register extend attach"),
    "remove": _words("remove delete del clear pop discard reset drop unregister cleanup"),
    "load": _words("load loads read parse open fetch import deserialize"),
    "save": _words("save write dump dumps export push print store serialize savefig emit log"),
    "create": _words("create make build new generate"),
    "convert": _words("to convert as cast encode decode asarray format"),
}
QUESTIONS = _words("is has can should are does needs supports contains allows requires exists")
TOPICS: dict[str, frozenset[str]] = {
    "plotting": _words(
        "plot plotting draw drawing figure axes backends artist colors legend ticker lines patches pyplot widgets "
        "visualization offsetbox axes3d axis3d axes_grid1 axisartist mplot3d"
    ),
    "statistics": _words("stats statistics distributions random probability naive_bayes mixture covariance"),
    "linear algebra": _words("linalg matrices matrix tensor tensors isolve decomposition"),
    "input and output": _words(
        "io readwrite json csv pickle xml email html codecs gzip zipfile tarfile zip file npyio parsing serialization "
        "urllib http implementations"
    ),
    "calculus": _words("integrate integrals calculus special series functions optimize solvers"),
    "parallel": _words(
        "distributed multiprocessing concurrent asyncio threading socket subprocess parallel strategies fabric"
    ),
}
FIELDS: dict[str, frozenset[str]] = {
    "general programming": _words("stdlib rich huggingface_hub fsspec jsonargparse"),
    "mathematics": _words("numpy scipy sympy mpmath"),
    "machine learning": _words("sklearn torch torchmetrics transformers lightning peft"),
    "plotting": _words("matplotlib mpl_toolkits"),
}
_LIBRARY_NAME = re.compile(
    r"\b(?:numpy|scipy|sympy|mpmath|networkx|scikit[- ]?learn|sklearn|py[- ]?torch|torch\w*|transformers?|"
    r"hugging ?face|matplotlib|mpl\w*|pyplot|lightning|fabric|peft|rich|fsspec|jsonargparse|argparse|c?python)"
    r"(?:[._]\w+)*\b",
    re.IGNORECASE,
)


def kind_of(item: Documented) -> str | None:
    """Return what sort of object is documented."""
    return {"module": "module", "class": "class", "function": "function", "method": "function"}.get(item.kind)


def action_of(item: Documented) -> str | None:
    """Return the verb that a function's name begins with."""
    if item.kind not in ("function", "method"):
        return None
    first = item.name.lstrip("_").split("_")[0].lower()
    return next((action for action, words in VERBS.items() if first in words), None)


def truth_of(item: Documented) -> str | None:
    """Return whether a function or property answers yes or no, by annotation, name or body."""
    if item.kind not in ("function", "method", "property"):
        return None
    first = item.name.lstrip("_").split("_")[0]
    truth = item.returns == "bool" or first in QUESTIONS or item.result == "truth"
    return "yes or no" if truth else "anything else"


def effect_of(item: Documented) -> str | None:
    """Return whether a function gives a value back or only does something."""
    if item.kind not in ("function", "method") or item.result is None:
        return None
    return "action" if item.result == "nothing" else "value"


def topic_of(item: Documented) -> str | None:
    """Return the subject that the module's path names, if it names exactly one."""
    parts = {part.lstrip("_") for part in item.module.split(".")}
    hits = [topic for topic, words in TOPICS.items() if parts & words]
    return hits[0] if len(hits) == 1 else None


def field_of(item: Documented) -> str | None:
    """Return the field that the package serves."""
    return next((name for name, packages in FIELDS.items() if item.package in packages), None)


@dataclass(frozen=True)
class _Definition:
    label_of: Callable[[Documented], str | None]
    label_texts: dict[str, str]  # label to phrase, in the order of the ids
    ood: Mapping[str, tuple[str, ...]]  # out-of-domain set to the groups of packages it is made of
    description: str
    masked: bool = False  # hide library names, which would give the label away


_EACH = {"mathematics": ("mathematics",), "tools": ("tools",)}
# Where classes differ by package, one group alone would hold too few of them.
_TOGETHER = {"packages": ("mathematics", "tools", "drawing")}
_TASKS: dict[str, _Definition] = {
    "kind": _Definition(
        kind_of,
        {
            "class": "a class of objects",
            "function": "a function that does something",
            "module": "a module with tools",
        },
        _EACH,
        "does the sentence document a class, a function or a module",
    ),
    "action": _Definition(
        action_of,
        {
            "check": "check whether something is true or valid",
            "set": "set a value",
            "add": "add or register an item",
            "remove": "remove, delete or reset",
            "load": "load, read or parse",
            "save": "save, write or export",
            "create": "create or generate something new",
            "convert": "convert to another form",
        },
        _EACH,
        "what the documented function does, by the first word of its name",
    ),
    "truth": _Definition(
        truth_of,
        {"anything else": "returns something or does something", "yes or no": "returns true or false"},
        _EACH,
        "does the documented function answer yes or no",
    ),
    "effect": _Definition(
        effect_of,
        {"action": "changes or does something", "value": "returns a value"},
        _EACH,
        "does the documented function return a value or only act",
    ),
    "topic": _Definition(
        topic_of,
        {
            "plotting": "plotting and drawing figures",
            "statistics": "statistics and probability distributions",
            "linear algebra": "linear algebra and matrices",
            "input and output": "reading, writing and sending files and data",
            "calculus": "calculus, optimization and special functions",
            "parallel": "parallel and distributed computing",
        },
        _TOGETHER,
        "the subject of the documented object, by its module's path",
    ),
    "field": _Definition(
        field_of,
        {
            "general programming": "general programming",
            "mathematics": "scientific computing and mathematics",
            "machine learning": "machine learning",
            "plotting": "plotting and visualization",
        },
        _TOGETHER,
        "what the documented package is for (library names are masked)",
        masked=True,
    ),
}


class DocstringTasks(TaskData):
    """First docstring sentences of installed packages, labelled by what the source code around them shows.

    ``kind`` (class, function, module), ``action`` (check, set, add, remove, load, save, create, convert), ``truth``
    (answers yes or no), ``effect`` (returns a value or acts), ``topic`` (plotting, statistics, linear algebra, ...) and
    ``field`` (mathematics, machine learning, ...). Labels mean the same in every package, so packages that no task
    trains on are true out-of-domain sets. Sentences are read with ``ast``; no package is imported.

    A sentence's split depends on the hash of its words alone: 70 % train, 10 % dev, 20 % test, the same in all tasks.
    Sentences that occur twice are kept once, those with two labels not at all, and those of out-of-domain packages only
    if no training package has them. Classes are cut to at most 1.5 times the rows of the rarest. Counts depend a little
    on the installed versions; ``fingerprint`` tells.

    Args:
        packages: the packages to train on: importable top-level names, or ``"stdlib"``; ``None`` for the standard
            library, numpy, scipy, scikit-learn, torch, torchmetrics, matplotlib and transformers.
        ood_packages: groups of packages never trained on; ``None`` for ``mathematics``, ``tools`` and ``drawing``.
            Groups of these names make the sets above; any other group makes a set ``ood_<group>`` of every task.
        megabytes: the most source code to read of one package, above 0.
        tasks: see TaskData, as all that follow.
        task: the one to train on.
        batch_size: rows a training batch.
        eval_batch_size: rows a batch elsewhere.
        max_train: the most training rows a task.
        max_dev: the most validation rows a task.
        max_test: the most rows a test set.
        num_workers: processes a loader.
        seed: which rows are kept, and their order.

    Raises:
        UserError: a package both trained on and out-of-domain, a size out of range, or what TaskData refuses; on
            reading: a package that is not installed, or a class without a row.
    """

    def __init__(
        self,
        packages: list[str] | None = None,
        ood_packages: Mapping[str, list[str]] | None = None,
        megabytes: float = 6.0,
        tasks: list[str] | None = None,
        task: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_train: int | None = None,
        max_dev: int | None = None,
        max_test: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.packages = tuple(TRAIN_PACKAGES if packages is None else packages)
        groups: Mapping[str, tuple[str, ...] | list[str]] = OOD_PACKAGES if ood_packages is None else ood_packages
        self.ood_packages = {group: tuple(names) for group, names in groups.items()}
        if not self.packages:
            raise UserError("DocstringTasks: packages is empty. At least one package is needed.")
        for group, names in self.ood_packages.items():
            for name in names:
                if name in self.packages:
                    raise UserError(
                        f"DocstringTasks: package '{name}' is in packages and in ood_packages['{group}']. An "
                        "out-of-domain package must not be trained on."
                    )
        if not megabytes > 0:
            raise UserError(f"DocstringTasks: megabytes must be above 0, got {megabytes}.")
        self.megabytes = megabytes
        super().__init__(tasks, task, batch_size, eval_batch_size, max_train, max_dev, max_test, num_workers, seed)

    def available(self) -> list[str]:
        """Return the six tasks."""
        return list(_TASKS)

    def load(self, name: str) -> Task:
        """Label the sentences of all packages for one task."""
        definition = _TASKS[name]
        labels = list(definition.label_texts)
        items = [item for package in self.packages for item in read_package(package, self.megabytes)]
        seen = {_key(item.sentence) for item in items}
        parts: dict[str, list[tuple[str, str, int]]] = {"train": [], "dev": [], "test": []}
        for row in _label(items, definition, labels):
            parts[_part(row[0])].append(row)
        for split, rows in parts.items():
            present = {row[2] for row in rows}
            empty = [label for number, label in enumerate(labels) if number not in present]
            if empty:
                raise UserError(
                    f"Task '{name}', split '{split}': no sentence of class '{empty[0]}' in packages "
                    f"{', '.join(self.packages)}. Name more packages, or raise megabytes (now {self.megabytes:g})."
                )
        own = {group: (group,) for group in self.ood_packages if group not in OOD_PACKAGES}
        for domain, groups in {**definition.ood, **own}.items():
            packages = [package for group in groups for package in self.ood_packages.get(group, ())]
            if not packages:
                continue
            items = [item for package in packages for item in read_package(package, self.megabytes)]
            rows = [row for row in _label(items, definition, labels) if row[0] not in seen]
            if not rows:
                raise UserError(
                    f"Task '{name}', split '{OOD_PREFIX}{domain}': no labelled sentence in packages "
                    f"{', '.join(packages)}. Name other packages in ood_packages['{groups[0]}']."
                )
            seen.update(row[0] for row in rows)
            parts[OOD_PREFIX + domain] = rows
        splits = {split: _balance(rows) for split, rows in parts.items()}
        texts = tuple(definition.label_texts.values())
        return Task(name, "text", tuple(labels), texts, splits, definition.description)


def _mask(sentence: str) -> str:
    return _LIBRARY_NAME.sub("library", sentence)


def _key(sentence: str) -> str:
    # Masked in every task, so that a sentence has the same key, and so the same split, in all of them.
    return normalise(_mask(sentence))


def _label(items: list[Documented], definition: _Definition, labels: list[str]) -> list[tuple[str, str, int]]:
    """Return ``(key, sentence, label id)`` of every different sentence that has exactly one label."""
    found: dict[str, tuple[str, set[int]]] = {}
    for item in items:
        label = definition.label_of(item)
        if label is not None:
            sentence = _mask(item.sentence) if definition.masked else item.sentence
            found.setdefault(_key(item.sentence), (sentence, set()))[1].add(labels.index(label))
    return [(key, sentence, ids.pop()) for key, (sentence, ids) in found.items() if len(ids) == 1]


def _part(key: str) -> str:
    place = stable_hash(key, "split") / 2.0**64
    return "train" if place < TRAIN_PART else "dev" if place < TRAIN_PART + DEV_PART else "test"


def _balance(rows: list[tuple[str, str, int]]) -> Split:
    """Return the rows in the order of their hash, with no class far larger than the rarest."""
    rows = sorted(rows, key=lambda row: (stable_hash(row[0], "order"), row[0]))
    counts = np.bincount([row[2] for row in rows])
    most = max(BALANCE_FLOOR, int(BALANCE * counts[counts > 0].min()))
    taken = np.zeros_like(counts)
    kept = []
    for row in rows:
        if taken[row[2]] < most:
            taken[row[2]] += 1
            kept.append(row)
    return Split([row[1] for row in kept], np.array([row[2] for row in kept], dtype=np.int64))
