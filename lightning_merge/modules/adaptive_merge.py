"""AdaptiveMerge: the models of a run merged by coefficients that are learned on an unlabeled stream.

AdaMerging (Yang et al., 2024, arXiv 2310.02575) as a LightningModule for ``lightning-merge fit``. It brings encoder,
heads and scores; what learns is :class:`lightning_merge.callbacks.AdaMerging`, as in anybody's module.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_merge.errors import UserError, nearest, unknown
from lightning_merge.methods import MergeMethod, TaskArithmetic, Transform
from lightning_merge.modules.adaptation_record import FILE, learned_from, replaces, tell
from lightning_merge.modules.encoder import Encoder
from lightning_merge.modules.heads import HeadInfo, load_head
from lightning_merge.objectives import Objective
from lightning_merge.outputs import refuse_other_content
from lightning_merge.recipe import describe
from lightning_merge.run_folder import run_parts
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights.folder import write_text

COEFFICIENTS = "coefficients.safetensors"
RECORD = FILE
TRACE = "adaptation"


class AdaptiveMerge(L.LightningModule):
    """Merge fine-tuned encoders by coefficients that are learned on unlabeled batches (AdaMerging).

    Training batches are ``{task: {"inputs", "index"}}``, raw, as :class:`lightning_merge.data.TaskStreams` gives them;
    validation and test batches ``{"inputs", "labels", "index"}``, one task after another. The module brings its
    callbacks with it: ``AdaMerging``, ``CollapseGuard`` and ``AdaptationTrace``. At the end of ``fit`` the merged model
    is written to ``output`` by the file engine, with heads, ``coefficients.safetensors`` and the trace; it answers
    by ``lightning_merge.load`` and goes into ``lightning-merge evaluate --models``. Before ``fit`` the module holds the
    base, afterwards the merge.

    Args:
        run: The folder of a finished run, which has everything; or give ``base``, ``models`` and ``heads``.
        base: Folder of the pretrained encoder.
        models: Folders of the fine-tuned encoders, by task.
        heads: Files of their heads, by task.
        tasks: The tasks of the run to merge; all by default.
        by: What shares a coefficient: ``tensor`` (AdaMerging calls it layer-wise), ``block``, ``layer``, ``task``, or
            patterns by group name.
        initial: Where coefficients start: a number, one for each task, or a file ``coefficients.safetensors``; by
            default 0.3, and 0 with a ``start``.
        start: Folder of a merged model of any method, whose difference to the base is one more direction, under the
            folder's name, with a coefficient of 1 at first; without transforms.
        constraint: ``free``, ``clamp`` into [0, 1], or ``softmax`` over the tasks.
        prior: Strength of the pull back to the start, at least 0.
        transforms: Of the task vectors, first: ``ElectSign`` makes it AdaMerging++.
        objectives: What is minimised; ``Entropy`` by default.
        learning_rate: Of Adam, above 0; 1e-3 in the paper.
        weight_decay: Of Adam, at least 0.
        optimizer: Makes another optimizer out of the coefficients.
        individuals: Where an objective asks for the fine-tuned models' answers: ``computed`` each time, or ``cached``.
        storage: Where task vectors live: on the ``device``, on the ``host``, in the models' ``files``.
        dtype: What task vectors are kept in: ``float32`` or ``bfloat16``.
        keep_base: Keep the base in memory, or read it again from its file at each step.
        guard: Stop and go back when the answers collapse; ``false`` for no guard, or a mapping of the settings of
            ``CollapseGuard``.
        trace_every_n_steps: How often coefficients are drawn and logged.
        output: The merged folder, or ``null`` to write none: it must be new, empty or an earlier merge.
        seed: Of transforms that draw at random.

    Raises:
        UserError: The run is not finished, models, heads and base do not fit, or a setting is out of range.
    """

    def __init__(
        self,
        run: str | None = None,
        base: str | None = None,
        models: dict[str, str] | None = None,
        heads: dict[str, str] | None = None,
        tasks: list[str] | None = None,
        by: str | dict[str, str] = "tensor",
        initial: float | str | dict[str, float] | None = None,
        start: str | None = None,
        constraint: Literal["free", "clamp", "softmax"] = "free",
        prior: float | dict[str, float] = 0.0,
        transforms: list[MergeMethod] | None = None,
        objectives: list[Objective] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        individuals: Literal["computed", "cached"] = "computed",
        storage: Literal["device", "host", "files"] = "device",
        dtype: Literal["float32", "bfloat16"] = "float32",
        keep_base: bool = True,
        guard: bool | dict[str, Any] = True,
        trace_every_n_steps: int = 1,
        output: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.run = None if run is None else Path(run)
        places = _places(run, base, models, heads, tasks)
        self.transforms = _transforms(transforms)
        self.output = None if output is None else Path(output)
        self.seed, self.start = seed, None if start is None else Path(start)
        directions = dict(places.models)
        if start is not None:
            if self.transforms:
                raise UserError(
                    f"AdaptiveMerge: transforms ({', '.join(type(step).__name__ for step in self.transforms)}) would "
                    f"also change the start '{start}', which is a merge already. Expected either start or transforms."
                )
            if Path(start).name in directions:
                raise UserError(f"The start '{start}' is called like a task. Expected a folder of another name.")
            directions[Path(start).name] = Path(start)
        self.task_vectors = TaskVectors.open(places.base, directions)
        for transform in self.transforms:
            transform.check(self.task_vectors)
        self.encoder = Encoder.from_pretrained(places.base)
        self.head_files = dict(places.heads)
        loaded = {task: load_head(path) for task, path in places.heads.items()}
        self.info: dict[str, HeadInfo] = {task: info for task, (_, info) in loaded.items()}
        # Lists and plain dicts: task names may hold dots, and encoders share one backbone.
        self.heads = nn.ModuleList(head for head, _ in loaded.values())
        self._position = {task: position for position, task in enumerate(loaded)}
        self._encoders = {
            task: self.encoder.reconfigured(info.pooling, info.max_length) for task, info in self.info.items()
        }
        for task, info in self.info.items():
            if info.dim != self._encoders[task].dim:
                raise UserError(
                    f"The head of task '{task}' takes {info.dim} features, the model in '{places.base}' gives "
                    f"{self._encoders[task].dim}. Expected heads of this base."
                )
        self.requires_grad_(False)
        self.eval()
        self._settings: dict[str, Any] = {
            "by": by, "constraint": constraint, "prior": prior, "objectives": objectives,
            "initial": _initial(initial, list(places.models), start),
            "learning_rate": learning_rate, "weight_decay": weight_decay, "optimizer": optimizer,
            "individuals": individuals, "storage": storage, "dtype": dtype, "keep_base": keep_base,
        }  # fmt: skip
        self._guard, self._every = guard, trace_every_n_steps
        self._callbacks: list[L.Callback] | None = None
        self._scores: dict[str, list[Tensor]] = {}

    # --- what learns ------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """Return AdaMerging, its guard and its trace; the same ones each time."""
        if self._callbacks is None:
            from lightning_merge.callbacks import AdaMerging, AdaptationTrace, CollapseGuard

            self._callbacks = [
                AdaMerging(
                    self.task_vectors, logits="features", heads=dict(zip(self.info, self.heads, strict=True)),
                    transforms=self.transforms, seed=self.seed, models={task: task for task in self.info},
                    **self._settings,
                ),
            ]  # fmt: skip
            if self._guard is not False:
                self._callbacks.append(CollapseGuard(**({} if self._guard is True else self._guard)))
            self._callbacks.append(AdaptationTrace(self._trace_folder, self._every, announce=self.output is None))
        return self._callbacks

    @property
    def adaptation(self) -> Any:
        """The callback that learns the coefficients."""
        return self.configure_callbacks()[0]

    @property
    def guard(self) -> Any:
        """The callback that guards against collapse, or ``None``."""
        return None if self._guard is False else self.configure_callbacks()[1]

    @property
    def _trace_folder(self) -> Path | None:
        return None if self.output is None else self.output.with_name(self.output.name + ".trace")

    # --- answers ----------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, which are the keys of the stream."""
        return tuple(self.info)

    def features(self, batch: Mapping[str, Any], task: str) -> Tensor:
        """Return features ``(B, d)``, before the head, for a batch ``{"inputs"}`` of one task.

        Raw inputs are tokenized or normalised here, where the task is known: its head says how much text is kept.
        """
        encoder = self._encoders[self._known(task)]
        inputs = batch["inputs"]
        if not isinstance(inputs, Mapping):
            inputs = {name: values.to(self.device) for name, values in encoder.preprocess(inputs).items()}
        return encoder(**inputs)

    def logits(self, batch: Mapping[str, Any], task: str) -> Tensor:
        """Return logits ``(B, C)`` for a batch ``{"inputs"}`` of one task, raw or not."""
        return self.heads[self._position[task]](self.features(batch, task))

    def forward(self, inputs: Any, task: str) -> Tensor:
        """Return logits ``(B, C)`` for raw inputs of one task."""
        return self.logits({"inputs": inputs}, task)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Stand in for the step that AdaMerging puts in its place."""
        raise UserError("AdaptiveMerge learns by its callback AdaMerging, which is not among those of the Trainer.")

    def configure_optimizers(self) -> Any:
        """Stand in for AdaMerging's optimizer of the coefficients."""
        return None

    # --- scores -----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the accuracy of the merge as it stands."""
        self._score("val", batch, self._names()[dataloader_idx])

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the accuracy of the merge as it stands."""
        self._score("test", batch, self._names()[dataloader_idx])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return task, rows' numbers and class probabilities (N, C)."""
        task = self._names()[dataloader_idx]
        return {"task": task, "index": batch["index"], "probabilities": self.logits(batch, task).float().softmax(-1)}

    def on_validation_epoch_end(self) -> None:
        """Log the mean over tasks."""
        self._mean("val")

    def on_test_epoch_end(self) -> None:
        """Log the mean over tasks."""
        self._mean("test")

    def _score(self, stage: str, batch: Mapping[str, Any], task: str) -> None:
        if "labels" not in batch:
            return
        right = (self.logits(batch, task).argmax(-1) == batch["labels"]).float()
        self._scores.setdefault(task, []).append(right)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(right)}
        self.log(f"{stage}_accuracy/{task}", right.mean(), sync_dist=True, add_dataloader_idx=False, **options)

    def _mean(self, stage: str) -> None:
        if self._scores:
            mean = torch.stack([torch.cat(right).mean() for right in self._scores.values()]).mean()
            self.log(f"{stage}_accuracy", mean, prog_bar=True, sync_dist=True)
        self._scores = {}

    # --- the end ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what could only fail after the adaptation."""
        data = getattr(self._trainer, "datamodule", None)
        for task in getattr(data, "task_names", ()):
            self._known(task)
        if stage == "fit" and self.output is not None:
            refuse_other_content(self.output, self.task_vectors.sources, overwrite=True)

    def on_fit_end(self) -> None:
        """Write the merged folder (one process writes)."""
        if self.output is not None:
            if self.trainer.is_global_zero:
                replaced = replaces(self.output, getattr(self, "merge", None))
                self.export(self.output)
                tell(self.output, self.run, replaced)
            self.trainer.strategy.barrier()

    def export(self, folder: str | os.PathLike[str]) -> None:
        """Write the merge as it stands: weights by the file engine, heads, coefficients, a record and the trace.

        Args:
            folder: A new or empty folder, or an earlier merge, which is replaced.

        Raises:
            UserError: Nothing has been learned yet, or the folder holds something else.
        """
        from lightning_merge.merging import merge

        scalars = getattr(self.adaptation, "scalars", None)
        if scalars is None:
            raise UserError("AdaptiveMerge has no coefficients yet. Expected a call of Trainer.fit before export.")
        target = Path(folder)
        merge(
            TaskArithmetic(scale=scalars.schedule()), self.task_vectors, target, self.transforms, self.seed,
            overwrite=True, title=target.name, max_shard_size=None,
        )  # fmt: skip
        (target / "heads").mkdir(exist_ok=True)
        for task, path in self.head_files.items():
            shutil.copyfile(path, target / "heads" / f"{task}.safetensors")
        scalars.save(target / COEFFICIENTS)
        write_text(target / RECORD, json.dumps(self.record(), indent=1) + "\n")
        trace = self._trace_folder
        if trace is not None and trace.is_dir():
            shutil.rmtree(target / TRACE, ignore_errors=True)
            os.replace(trace, target / TRACE)

    def record(self) -> dict[str, Any]:
        """Return what an adaptation came to, as plain data: steps, drift, learned parameters, what the guard did."""
        guard, settings, minimised = self.guard, self._settings, self.adaptation.objectives
        shown = f"AdaMerging(by={settings['by']}, objective={' + '.join(type(o).__name__ for o in minimised)})"
        labels = any("labels" in objective.needs for objective in minimised)
        return {
            "method": " → ".join([*map(describe, self.transforms), shown]),
            **learned_from(self.trainer, self.run, self.start or settings["initial"], labels),
            "steps": int(self.trainer.global_step),
            "trained_parameters": sum(p.numel() for p in self.adaptation.scalars.parameters()),
            "drift": float(self.adaptation.drift()),
            "best_step": None if guard is None else guard.best_step,
            "stopped_step": None if guard is None else guard.stopped_step,
            "rolled_back": guard is not None and guard.rolled_back,
        }

    # --- inside -----------------------------------------------------------------------------------------------------

    def _known(self, task: str) -> str:
        if task not in self.info:
            raise unknown("task in the stream", str(task), self.info)
        return task

    def _names(self) -> list[str]:
        """The tasks of the loaders that are gone through one after another."""
        trainer = self.trainer
        loaders = (
            trainer.predict_dataloaders
            if trainer.predicting
            else trainer.test_dataloaders
            if trainer.testing
            else trainer.val_dataloaders
        )
        named = getattr(loaders, "iterables", loaders)
        if isinstance(named, Mapping):
            return [self._known(task) for task in named]
        if len(self.info) == 1:
            return list(self.info)
        raise UserError(
            "AdaptiveMerge scores one task after another. Expected loaders in a dict keyed by task, as TaskStreams "
            "and other LightningDataModules of lightning_merge.data give them."
        )


class _Places:
    def __init__(self, base: Any, models: Mapping[str, Any], heads: Mapping[str, Any]) -> None:
        self.base, self.models, self.heads = base, dict(models), dict(heads)


def _places(
    run: str | None,
    base: str | None,
    models: Mapping[str, str] | None,
    heads: Mapping[str, str] | None,
    tasks: list[str] | None,
) -> _Places:
    """Find base, models and heads: in a run, or as they are given."""
    if run is not None:
        if base is not None or models is not None or heads is not None:
            raise UserError("AdaptiveMerge takes either 'run' or 'base', 'models' and 'heads', got both.")
        parts = run_parts(run, tasks)
        return _Places(parts.base, parts.models, parts.heads)
    if base is None or not models or not heads:
        raise UserError("AdaptiveMerge needs 'run' (--run FOLDER, a finished run), or 'base', 'models' and 'heads'.")
    for task in models:
        if task not in heads:
            raise UserError(f"The model '{task}' has no head. Known heads: {', '.join(heads)}.{nearest(task, heads)}")
    for task in heads:
        if task not in models:
            raise UserError(
                f"The head '{task}' has no model. Known models: {', '.join(models)}.{nearest(task, models)}"
            )
    chosen = list(models) if tasks is None else tasks
    for task in chosen:
        if task not in models:
            raise unknown("task", task, models)
    return _Places(base, {task: models[task] for task in chosen}, {task: heads[task] for task in chosen})


def _initial(given: Any, tasks: list[str], start: str | None) -> Any:
    """Return where coefficients start: at the merge that is given, where there is one."""
    if start is None:
        return 0.3 if given is None else given
    if given is None or isinstance(given, (int, float)):
        return {**dict.fromkeys(tasks, float(given or 0.0)), Path(start).name: 1.0}
    return {Path(start).name: 1.0, **given} if isinstance(given, Mapping) else given


def _transforms(steps: list[MergeMethod] | None) -> list[Transform]:
    for step in steps or []:
        if not isinstance(step, Transform):
            raise UserError(f"{type(step).__name__} is a merge method. Expected transforms of task vectors here.")
    return list(steps or [])  # type: ignore[arg-type]
