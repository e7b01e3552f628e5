"""What an evaluation found: every model on every task, kept row by row so that differences are paired."""

from __future__ import annotations

import base64
import binascii
import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_merge.errors import UserError, unknown
from lightning_merge.evaluation.records import INDIVIDUAL, KINDS, TEST, Difference, ModelFacts, Score

if TYPE_CHECKING:
    from lightning_merge.evaluation.table import ResultsTable

CSV_COLUMNS = (
    "model",
    "task",
    "split",
    "dataset",
    "metric",
    "value",
    "stderr",
    "n",
    "normalized",
    "selection",
    "seed",
)
FORMAT = "lightning_merge.results"
FORMAT_VERSION = 1


class Results:
    """Tasks x models: scores, and the figures of every table and plot made from them.

    A figure is ``None`` where a score that it needs does not exist (a failed merge, a set that was not evaluated): a
    mean over fewer tasks than the other rows would not compare with them.

    Args:
        tasks: names of the tasks in the order of the columns.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        if len(set(tasks)) != len(tasks) or not tasks:
            raise UserError(f"Results: tasks must be a non-empty list of different names, got {list(tasks)}.")
        self.tasks: tuple[str, ...] = tuple(tasks)
        self._facts: dict[str, ModelFacts] = {}
        self._scores: dict[str, dict[tuple[str, str, str], Score]] = {}

    def add(self, facts: ModelFacts, scores: Iterable[Score] = (), replace: bool = False) -> None:
        """Add one model with its scores; a failed merge has ``facts.error`` and no scores.

        Args:
            facts: what the model is.
            scores: its scores, at most one for each task, split and data set. The scores of ``"individual"`` on a
                task come from the model that was fine-tuned on that task.
            replace: put the model in the place of one with the same name.

        Raises:
            UserError: the name is taken, or a score names another model, an unknown task, or a set that came before.
        """
        if facts.name in self._facts and not replace:
            raise UserError(f"Results: a model called '{facts.name}' is there already; names must differ.")
        found: dict[tuple[str, str, str], Score] = {}
        for score in scores:
            if score.model != facts.name:
                raise UserError(f"Results: a score of '{score.model}' was handed in for the model '{facts.name}'.")
            if score.task not in self.tasks:
                raise unknown("task", score.task, self.tasks)
            if score.key in found:
                raise UserError(f"Results: '{facts.name}' has two scores on {score.task}/{score.dataset}.")
            found[score.key] = score
        self._facts[facts.name] = facts
        self._scores[facts.name] = found

    @property
    def models(self) -> list[str]:
        """Names of the models: pretrained, individual, then the merged ones as they were added."""
        return sorted(self._facts, key=lambda name: KINDS.index(self._facts[name].kind))  # sorted() is stable

    @property
    def scores(self) -> list[Score]:
        """All scores, model by model."""
        return [score for model in self.models for score in self._scores[model].values()]

    def facts(self, model: str) -> ModelFacts:
        """Facts of one model; an unknown name raises UserError."""
        self._known(model)
        return self._facts[model]

    def datasets(self, split: str, task: str) -> list[str]:
        """Data sets of a split on which any model has a score for the task."""
        seen = (score.dataset for score in self.scores if score.split == split and score.task == task)
        return list(dict.fromkeys(seen))

    def score(self, model: str, task: str, split: str = "id", dataset: str = TEST) -> Score | None:
        """Score of a model on one data set, ``None`` where it was not evaluated."""
        self._known(model)
        if task not in self.tasks:
            raise unknown("task", task, self.tasks)
        return self._scores[model].get((task, split, dataset))

    def accuracy(self, model: str, task: str, split: str = "id", dataset: str = TEST) -> float | None:
        """Accuracy in [0, 1]."""
        score = self.score(model, task, split, dataset)
        return None if score is None else score.value

    def normalized(self, model: str, task: str, split: str = "id", dataset: str = TEST) -> float | None:
        """Accuracy divided by that of the individual model on the same data set."""
        own = self.accuracy(model, task, split, dataset)
        ceiling = self.accuracy(INDIVIDUAL, task, split, dataset) if INDIVIDUAL in self._facts else None
        return None if own is None or not ceiling else own / ceiling

    def difference(
        self, model: str, task: str, reference: str = INDIVIDUAL, split: str = "id", dataset: str = TEST
    ) -> Difference | None:
        """Accuracy of ``model`` minus that of ``reference``, paired over the same rows.

        Raises:
            UserError: an unknown model, or the two were evaluated on different numbers of rows.
        """
        own, other = self.score(model, task, split, dataset), self.score(reference, task, split, dataset)
        if own is None or other is None:
            return None
        if own.n != other.n:
            raise UserError(
                f"The difference of '{model}' and '{reference}' on {task}/{dataset} cannot be paired: {own.n} and "
                f"{other.n} rows. Both must be evaluated on the same rows."
            )
        gained = int((own.correct & ~other.correct).sum())
        lost = int((other.correct & ~own.correct).sum())
        mean = (gained - lost) / own.n
        variance = (gained + lost) / own.n - mean * mean
        return Difference(mean, math.sqrt(max(variance, 0.0) / own.n), own.n, gained, lost)

    def mean(self, model: str) -> float | None:
        """Mean accuracy over the tasks."""
        return _mean([self.accuracy(model, task) for task in self.tasks])

    def minimum(self, model: str) -> float | None:
        """Accuracy on the task that the model answers worst."""
        weakest = self.weakest(model)
        return None if weakest is None else self.accuracy(model, weakest)

    def weakest(self, model: str) -> str | None:
        """Name of the task with the lowest accuracy (the first of equals)."""
        values = {task: self.accuracy(model, task) for task in self.tasks}
        present = {task: value for task, value in values.items() if value is not None}
        return min(present, key=lambda task: present[task]) if len(present) == len(self.tasks) else None

    def normalized_mean(self, model: str) -> float | None:
        """Mean over the tasks of the accuracy divided by the individual model's."""
        return _mean([self.normalized(model, task) for task in self.tasks])

    def ood_mean(self, model: str) -> float | None:
        """Mean over the tasks that have out-of-domain sets of the mean over their sets."""
        return self._mean_of_means(model, "ood")

    def corrupted_mean(self, model: str) -> float | None:
        """Mean over the tasks that have corrupted sets of the mean over their sets."""
        return self._mean_of_means(model, "corrupted")

    def set_mean(self, model: str, task: str, split: str) -> float | None:
        """Mean accuracy over the data sets that a task has in a split."""
        return _mean([self.accuracy(model, task, split, dataset) for dataset in self.datasets(split, task)])

    def _mean_of_means(self, model: str, split: str) -> float | None:
        self._known(model)
        return _mean([self.set_mean(model, task, split) for task in self.tasks if self.datasets(split, task)])

    def _known(self, model: str) -> None:
        if model not in self._facts:
            raise unknown("model", model, self._facts)

    def to_json(self) -> str:
        """JSON text that holds everything, the rows' correctness as packed bits in base64."""
        models = []
        for name in self.models:
            scores = [
                {
                    "task": score.task,
                    "split": score.split,
                    "dataset": score.dataset,
                    "metric": "accuracy",
                    "value": score.value,
                    "stderr": score.stderr,
                    "n": score.n,
                    "correct": base64.b64encode(np.packbits(score.correct).tobytes()).decode("ascii"),
                }
                for score in self._scores[name].values()
            ]
            models.append({**dataclasses.asdict(self._facts[name]), "scores": scores})
        document = {"format": FORMAT, "version": FORMAT_VERSION, "tasks": list(self.tasks), "models": models}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Results from the text of ``to_json``; anything else raises UserError."""
        try:
            document = json.loads(text)
            if document["format"] != FORMAT or document["version"] != FORMAT_VERSION:
                raise ValueError(f"format {document['format']!r}, version {document['version']!r}")
            results = cls(document["tasks"])
            for entry in document["models"]:
                entry = dict(entry)
                rows = entry.pop("scores")
                facts = ModelFacts(**entry)
                results.add(facts, [_score_from_row(facts.name, row) for row in rows])
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise UserError(
                f"This is not the text of a results.json of lightning_merge ({type(error).__name__}: {error}). "
                f"Accepted is what Results.to_json writes, format '{FORMAT}' version {FORMAT_VERSION}."
            ) from error
        return results

    def to_csv(self) -> str:
        """CSV text, one line a score, with the columns of ``CSV_COLUMNS``; a failed merge has no scores and no line."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for score in self.scores:
            facts = self._facts[score.model]
            normalized = self.normalized(score.model, *score.key)
            writer.writerow(
                [
                    score.model,
                    *score.key,
                    "accuracy",
                    f"{score.value:.10g}",
                    f"{score.stderr:.10g}",
                    score.n,
                    "" if normalized is None else f"{normalized:.10g}",
                    facts.selection,
                    "" if facts.seed is None else facts.seed,
                ]
            )
        return stream.getvalue()

    def to_markdown(self) -> str:
        """Markdown of the tables, for a README or a model card."""
        from lightning_merge.evaluation.table import markdown

        return markdown(self)

    def table(self) -> ResultsTable:
        """The tables as something rich can print; they wrap to the width of the console."""
        from lightning_merge.evaluation.table import ResultsTable

        return ResultsTable(self)

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``results.json``, ``results.csv`` and ``results.md`` into a folder and return their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"json": self.to_json(), "csv": self.to_csv(), "md": self.to_markdown()}
        paths = []
        for ending, text in texts.items():
            path = folder / f"results.{ending}"
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)  # a run that is killed here leaves the old file whole
            paths.append(path)
        return paths

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Results from a ``results.json`` or the folder that holds it."""
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"There are no results at '{path}'. Accepted is a results.json or the folder of a run.")
        return cls.from_json(path.read_text(encoding="utf-8"))


def _score_from_row(model: str, row: Mapping[str, Any]) -> Score:
    packed = np.frombuffer(base64.b64decode(row["correct"], validate=True), dtype=np.uint8)
    if packed.size != (row["n"] + 7) // 8:
        raise ValueError(f"{row['task']}/{row['dataset']} of '{model}' holds {packed.size} bytes for {row['n']} rows")
    correct = np.unpackbits(packed, count=row["n"]).astype(bool)
    return Score(model, row["task"], row["split"], row["dataset"], correct)


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean, or ``None`` for no values or where one is missing."""
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present and len(present) == len(values) else None
