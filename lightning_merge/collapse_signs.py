"""Signs, seen without labels, that a merge which learns on an unlabeled stream collapses: pure functions of logits.

Entropy can fall while accuracy falls: it is least where every answer is one class. What follows accuracy is agreement
with the individual models: on the same rows, and whatever the labels are,

    | accuracy(merge) − agreement | ≤ 1 − accuracy(individual),

for where the individual model is right, only agreement is. Its smooth form is the overlap Σ_c min(p_c, q_c) of both
models' probabilities, one minus their distance in total variation: the chance that answers drawn from both agree when
they are drawn together as well as can be. It moves before the first answer flips, and it is bounded, so that a few rows
that are badly wrong do not outvote the others. A merge also comes nearer to sharp individual models by growing sharp
itself, right or wrong; so its logits are first scaled to the individual model's mean entropy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lightning_merge.objectives import entropy

# A fall counts where it is also this many standard errors.
CERTAIN = 2.0


@dataclass(frozen=True)
class Signs:
    """What can be seen of one task, or of the mean over tasks, without labels.

    Args:
        entropy: Mean entropy of the answers, in nats.
        diversity: Entropy of the histogram of predicted classes over log C: 0 if all rows get one class, 1 if all
            classes are predicted alike often.
        agreement_with_start: Share of rows with the class that the starting merge predicts.
        agreement: Share of rows with the class that the task's individual model predicts; NaN where there is none.
        overlap: Mean overlap of the probabilities with those of the individual model, at its mean entropy; NaN where
            there is none.
    """

    entropy: float
    diversity: float
    agreement_with_start: float
    agreement: float
    overlap: float

    def as_dict(self) -> dict[str, float]:
        """Return the signs by name."""
        return asdict(self)


@dataclass(frozen=True)
class Reading:
    """What a check sees.

    Args:
        tasks: The signs by task.
        overlaps: By task that has an individual model, the overlap of each row, ``(N,)``.
    """

    tasks: dict[str, Signs]
    overlaps: dict[str, Tensor]

    @property
    def mean(self) -> Signs:
        """The mean over tasks; of what needs individual models, over the tasks that have one."""
        columns = {name: [getattr(task, name) for task in self.tasks.values()] for name in Signs.__dataclass_fields__}
        for name in ("agreement", "overlap"):
            columns[name] = [value for value in columns[name] if not math.isnan(value)] or [math.nan]
        return Signs(**{name: sum(values) / len(values) for name, values in columns.items()})


def read(logits: Mapping[str, Tensor], start: Mapping[str, Tensor], individual: Mapping[str, Tensor]) -> Reading:
    """Return the signs of each task in what the model answers now.

    Args:
        logits: By task ``(N, C)``, what the model answers now.
        start: What the starting merge answers for the same rows.
        individual: What the task's individual model answers, where there is one.

    Example:
        >>> sure, unsure = torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([[0.1, 0.0], [0.0, 0.1]])
        >>> now = read({"a": sure}, {"a": unsure}, {"a": unsure}).tasks["a"]
        >>> now.diversity, now.agreement
        (0.0, 0.5)
    """
    tasks: dict[str, Signs] = {}
    overlaps: dict[str, Tensor] = {}
    for task, now in logits.items():
        classes = now.argmax(dim=-1)
        finite = whole(now)
        agreement = math.nan
        if task in individual:
            agreement = float(((classes == individual[task].argmax(dim=-1)) & finite).float().mean())
            overlaps[task] = overlap(now, individual[task])
        tasks[task] = Signs(
            entropy=float(entropy(now).mean()),
            diversity=diversity(classes, now.shape[-1]),
            agreement_with_start=float(((classes == start[task].argmax(dim=-1)) & finite).float().mean()),
            agreement=agreement,
            overlap=float(overlaps[task].mean()) if task in overlaps else math.nan,
        )
    return Reading(tasks, overlaps)


def diversity(classes: Tensor, number: int) -> float:
    """Return the entropy of the histogram of predicted classes ``(N,)`` over that of all alike, in [0, 1]."""
    shares = torch.bincount(classes, minlength=number).double() / max(1, len(classes))
    told = shares[shares > 0]
    return max(0.0, float(-(told * told.log()).sum()) / math.log(number)) if number > 1 else 1.0


def whole(logits: Tensor) -> Tensor:
    """Return which rows are answers, ``(N, C)`` to ``(N,)``: not NaN or +inf anywhere; -inf masks a class, not all."""
    return torch.isfinite(logits.amax(dim=-1))


def overlap(logits: Tensor, individual: Tensor) -> Tensor:
    """Return Σ_c min(p_c, q_c) of each row at equal mean entropy: twice ``(N, C)`` to ``(N,)`` in [0, 1].

    A row that is no answer (:func:`whole`) has none.
    """
    q = individual.float().softmax(dim=-1)
    p = (logits.float() * _sharpening(logits, float(entropy(individual).mean()))).softmax(dim=-1)
    return torch.minimum(p, q).sum(dim=-1).nan_to_num(0.0)


def _sharpening(logits: Tensor, target: float) -> float:
    """Return the factor on the logits at which their mean entropy is the target, by bisection of its logarithm."""
    finite = logits.float()[whole(logits)]
    if not len(finite) or math.isnan(target):
        return 1.0
    low, high = -10.0, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        if float(entropy(finite * math.exp(middle)).mean()) > target:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def falls(now: Reading, before: Reading, margin: float) -> bool:
    """Whether the mean overlap over tasks is lower than before by more than ``margin`` and two standard errors.

    Errors are paired over the watched rows; the tasks are taken as they are.
    """
    changes = [(now.overlaps[task] - before.overlaps[task]).double() for task in now.overlaps]
    return _mean(changes) < -max(margin, CERTAIN * _error(changes)) if changes else False


def _mean(changes: Iterable[Tensor]) -> float:
    means = [float(change.mean()) for change in changes]
    return sum(means) / len(means)


def _error(changes: Iterable[Tensor]) -> float:
    variances = [float(change.var(correction=0)) / len(change) for change in changes]
    return math.sqrt(sum(variances)) / len(variances)


@dataclass(frozen=True)
class Rules:
    """By what states are compared, and what counts as a collapse.

    Args:
        start: What the starting merge shows.
        individual: What the individual models show on their tasks.
        margin: What the mean overlap may lose.
        diversity: What share of the entropy of its predicted classes a task must keep.
    """

    start: Reading
    individual: Reading
    margin: float
    diversity: float

    @property
    def sees_individuals(self) -> bool:
        """Whether any task has an individual model to agree with."""
        return bool(self.start.overlaps)

    def score(self, reading: Reading) -> float:
        """Return the criterion, the higher the better: the mean overlap with the individual models.

        Without any it is minus the number of tasks that are given few classes.
        """
        if not math.isfinite(reading.mean.entropy):
            return -math.inf
        return reading.mean.overlap if self.sees_individuals else -float(len(self.poor(reading)))

    def poor(self, reading: Reading) -> list[str]:
        """Return the tasks that are given few classes, and agree less with their individual model than at the start."""
        found = []
        for task, seen in reading.tasks.items():
            start, individual = self.start.tasks[task], self.individual.tasks[task]
            few = seen.diversity < self.diversity * min(start.diversity, individual.diversity)
            if few and not seen.agreement >= start.agreement:  # NaN without an individual model
                found.append(task)
        return found

    def alarms(self, reading: Reading, best: Reading) -> list[str]:
        """Return in words what speaks for a collapse, nothing in a healthy run.

        Args:
            reading: What the model shows now.
            best: What it showed in its best state so far.
        """
        now, start, kept = reading.mean, self.start.mean, best.mean
        if not math.isfinite(now.entropy):
            return ["answers are no longer finite"]
        found = []
        if falls(reading, best, self.margin) and now.entropy < kept.entropy:
            found.append(
                f"entropy fell from {kept.entropy:.3f} to {now.entropy:.3f} while the overlap with the individual "
                f"models fell from {kept.overlap:.3f} to {now.overlap:.3f}"
            )
        elif falls(reading, self.start, self.margin):
            found.append(
                f"the overlap with the individual models, {start.overlap:.3f} at the start, fell to {now.overlap:.3f}"
            )
        poor = self.poor(reading)
        if poor:
            few, first = reading.tasks[poor[0]].diversity, self.start.tasks[poor[0]].diversity
            others = f" and {len(poor) - 1} more" if len(poor) > 1 else ""
            found.append(f"few classes are predicted for '{poor[0]}'{others} (diversity {few:.2f} after {first:.2f})")
        return found
