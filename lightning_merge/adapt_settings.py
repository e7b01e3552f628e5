"""The settings of a merge that learns on a stream of a run's tasks, and what of them is refused beforehand."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from lightning_merge.data import TaskData, TaskStreams
from lightning_merge.errors import UserError, nearest, unknown
from lightning_merge.methods import MergeMethod, Transform, available_methods
from lightning_merge.modules.tuning import FineTuneSettings
from lightning_merge.objectives import Objective

# Settings of AdaptiveMerge that have a place of their own here, or that a run knows.
_OWN = ("run", "base", "models", "heads", "tasks", "output", "seed", "merge", "optimizer", "start")
# What learns, by the module that does it.
_KINDS = {"AdaMerging": "AdaptiveMerge", "Surgery": "RepresentationSurgery", "Distilled": "DistilledEncoder"}


@dataclass
class AdaptSettings:
    """One merge of a run that learns, after those that do not.

    Args:
        name: Its name in tables and its folder in ``merged/``.
        what: ``AdaMerging`` learns coefficients of the task vectors; ``Surgery`` learns correctors of a merge's
            features for each task, which must then be named at inference; ``Distilled`` trains all weights of a merge
            to answer as the fine-tuned models do.
        over: For ``Surgery`` and ``Distilled``, the merge, or the adaptation before it, that is corrected or trained.
        initial: For ``AdaMerging``, where coefficients start: a number, one for each task, or the name of a merge or
            adaptation before it. From ``TaskArithmetic``, ``SimpleAverage`` and adaptations it takes the coefficients,
            on task vectors transformed as theirs unless ``transforms`` says otherwise; any other merge becomes one more
            direction, with a coefficient of 1 at first, where those of the tasks are 0.
        by: For ``AdaMerging``, what shares a coefficient: ``tensor``, ``block``, ``layer``, ``task``, or patterns.
        constraint: For ``AdaMerging``, ``free``, ``clamp`` or ``softmax``.
        transforms: For ``AdaMerging``, of the task vectors, first: ``ElectSign`` makes it AdaMerging++.
        objectives: For ``AdaMerging``, what is minimised; ``Entropy`` by default. Surgery brings features, and
            ``Distilled`` answers, nearer to those of the fine-tuned models.
        version: For ``Surgery``, 1 corrects the features, 2 also what each block gives.
        rank: For ``Surgery``, of the correctors, at least 1.
        learning_rate: Above 0; by default 1e-3, and 1e-4 for ``Distilled``.
        split: The rows that are seen, without labels: ``test`` (transductive), ``dev``, ``train``, ``ood_<domain>``.
        batch_size: Rows of each task in a step.
        max_rows: The most rows of each task that are seen.
        corruption: Changes what is seen, such as ``typos-3``.
        max_epochs: How many times ``batches`` steps are taken.
        batches: Steps in an epoch, at most; the largest task's rows end an epoch before.
        precision: Of Lightning's Trainer: ``32-true``, ``bf16-mixed``, ...
        guard: Stop and go back when answers collapse; ``false``, or a mapping of settings of ``CollapseGuard``.
        module: Further settings of ``AdaptiveMerge``, ``RepresentationSurgery`` or ``DistilledEncoder``: ``prior``,
            ``storage``, ``cross``, ...
        trainer: Further arguments of Lightning's Trainer: ``devices``, ``strategy``, ``accumulate_grad_batches``, ...
        grid: Settings to choose on validation labels: ``{learning_rate: [1.0e-3, 3.0e-3]}``.
    """

    name: str
    what: Literal["AdaMerging", "Surgery", "Distilled"] = "AdaMerging"
    over: str | None = None
    initial: float | str | dict[str, float] = 0.3
    by: str | dict[str, str] = "tensor"
    constraint: Literal["free", "clamp", "softmax"] = "free"
    transforms: list[MergeMethod] = field(default_factory=list)
    objectives: list[Objective] = field(default_factory=list)
    version: int = 1
    rank: int = 16
    learning_rate: float | None = None
    split: str = "test"
    batch_size: int = 16
    max_rows: int | None = None
    corruption: str | None = None
    max_epochs: int = 10
    batches: int = 50
    precision: str = "32-true"
    guard: bool | dict[str, Any] = True
    module: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """The learning rate, given or by default."""
        if self.learning_rate is None:
            return 1e-4 if self.what == "Distilled" else 1e-3
        return self.learning_rate

    @property
    def supervised(self) -> bool:
        """Whether an objective takes labels."""
        return any("labels" in objective.needs for objective in self.objectives)

    @property
    def before(self) -> str | None:
        """The merge or adaptation that it starts from, if any."""
        if self.what != "AdaMerging":
            return self.over
        return self.initial if isinstance(self.initial, str) else None

    def streams(self, data: TaskData, seed: int) -> TaskStreams:
        """Return the stream that it learns from."""
        return TaskStreams(
            data,
            self.split,
            self.batch_size,
            labels=self.supervised,
            max_rows=self.max_rows,
            corruption=self.corruption,
            num_workers=data.num_workers,
            seed=seed,
        )

    def candidates(self) -> list[tuple[dict[str, Any], AdaptSettings]]:
        """Return every combination of the grid with the settings that it means; one without a grid."""
        found = []
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            spec = replace(self, grid={})
            for key, value in chosen.items():
                spec = spec._changed(key, value)
            found.append((chosen, spec))
        return found

    def plain(self) -> dict[str, Any]:
        """Return everything as plain data, of which a stage is known."""
        from lightning_merge.recipe import as_config

        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        values["transforms"] = [as_config(step) for step in self.transforms]
        values["objectives"] = [{"class": type(o).__qualname__, **asdict(o)} for o in self.objectives]
        values["learning_rate"] = self.rate
        values["grid"] = list(self.grid.items())  # its order decides between equals
        return values

    # --- refusals -----------------------------------------------------------------------------------------------------

    def check(self, data: TaskData, before: Mapping[str, Any], seed: int = 0) -> None:
        """Refuse what cannot be learned, before anything is.

        Args:
            data: The tasks.
            before: The merges and adaptations that stand before it, by name.
            seed: The run's.

        Raises:
            UserError: An unknown name or setting, a stream that no task has, labels of test rows, a start that is no
                sum of task vectors.
        """
        where = f"Adaptation '{self.name}'"
        for key, values in self.grid.items():
            if not values:
                raise UserError(f"{where}: the grid's '{key}' has no values. Expected a list of them.")
        for _, spec in self.candidates():
            try:
                spec._check_settings(before, data.task_names)
                spec.streams(data, seed)
            except UserError as error:
                told = str(error)
                raise UserError(told if told.startswith(("Adaptation", "adapt.")) else f"{where}: {told}") from error

    def _check_settings(self, before: Mapping[str, Any], tasks: Sequence[str]) -> None:
        place = f"adapt.{self.name}"
        FineTuneSettings(max_epochs=self.max_epochs, precision=self.precision, trainer=self.trainer).check(place)
        for name, own in (("limit_train_batches", "batches"), ("limit_val_batches", "grid")):
            if name in self.trainer:
                raise UserError(f"{place}.trainer.{name} cannot be set here. Set {place}.{own}.")
        if self.batches < 1:
            raise UserError(f"batches must be at least 1, got {self.batches}.")
        if not self.rate > 0:
            raise UserError(f"learning_rate must be above 0, got {self.rate}.")
        self._check_kind(before)
        self._check_module()
        for transform in self.transforms:
            if not isinstance(transform, Transform):
                accepted = [name for name, kind in available_methods().items() if issubclass(kind, Transform)]
                raise UserError(
                    f"{type(transform).__name__} is a merge method, not a transform of task vectors. "
                    f"Accepted transforms: {', '.join(sorted(accepted))}."
                )
            if not transform.varying:
                transform.check_models(tasks)
        if isinstance(self.initial, Mapping):
            for task in self.initial:
                if task not in tasks:
                    raise unknown("task of the initial coefficients", task, tasks)

    def _check_kind(self, before: Mapping[str, Any]) -> None:
        if self.what not in _KINDS:
            raise unknown("kind of adaptation", str(self.what), tuple(_KINDS))
        if self.what == "AdaMerging" and self.over is not None:
            raise UserError(
                f"over is for Surgery and Distilled; AdaMerging starts from a merge by initial: {self.over}."
            )
        if self.what != "AdaMerging":
            does = "corrects" if self.what == "Surgery" else "trains"
            if self.over is None:
                raise UserError(f"{self.what} {does} a merge. Expected over: one of {', '.join(before) or 'none'}.")
            for name in ("transforms", "objectives"):
                if getattr(self, name):
                    raise UserError(f"{self.what} has no {name}: it {does} a merge that is there.")
        if self.what == "Surgery":
            if self.version not in (1, 2):
                raise unknown("version of surgery", str(self.version), ("1", "2"))
            if self.rank < 1:
                raise UserError(f"rank must be at least 1, got {self.rank}.")
        if self.before is not None and self.before not in before:
            raise unknown("merge to start from", self.before, before)
        start = before.get(self.before or "")
        if self.what != "Surgery" and isinstance(start, AdaptSettings) and start.what == "Surgery":
            raise UserError(f"It cannot start from '{self.before}', whose {start.what} merges nothing.")
        if self.what == "AdaMerging" and getattr(start, "models", None):
            raise UserError(f"It cannot start from '{self.before}', which merges models of its own choice.")

    def _check_module(self) -> None:
        from lightning_merge import modules

        kind = getattr(modules, _KINDS[self.what])
        own = {spec.name for spec in fields(self)}
        known = [name for name in inspect.signature(kind).parameters if name not in _OWN and name not in own]
        for name in self.module:
            if name in own:
                raise UserError(f"module.{name} cannot be set here. Set adapt.{self.name}.{name}.")
            if name not in known:
                raise UserError(
                    f"module: {kind.__name__} has no setting '{name}'. Known: {', '.join(known)}.{nearest(name, known)}"
                )
        if isinstance(self.guard, Mapping):
            from lightning_merge.callbacks import CollapseGuard

            known = list(inspect.signature(CollapseGuard).parameters)
            for name in self.guard:
                if name not in known:
                    raise unknown("setting of CollapseGuard", name, known)
            CollapseGuard(**self.guard)

    def _changed(self, key: str, value: Any) -> AdaptSettings:
        """Return the settings with one changed, as the grid names it."""
        head, _, rest = key.partition(".")
        known = [spec.name for spec in fields(self) if spec.name not in ("name", "what", "grid")]
        if head == "transforms" and rest:
            place, _, setting = rest.partition(".")
            if place.isdigit() and int(place) < len(self.transforms):
                step = self.transforms[int(place)]
                names = [spec.name for spec in fields(step)]
                if setting not in names:
                    raise unknown(f"setting of {type(step).__name__}", setting, names)
                steps = list(self.transforms)
                steps[int(place)] = replace(step, **{setting: value})
                return replace(self, transforms=steps)
        elif head == "module" and rest:
            return replace(self, module={**self.module, rest: value})
        elif key in known:
            return replace(self, **{key: value})
        raise UserError(
            f"Adaptation '{self.name}': the grid's key '{key}' names no setting. Expected module.SETTING, "
            f"transforms.N.SETTING or one of: {', '.join(known)}.{nearest(key, known)}"
        )
