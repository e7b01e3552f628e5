"""DistilledEncoder: a merge of a run whose weights learn the answers of the individual models on an unlabeled stream.

Plain knowledge distillation (arXiv 1503.02531) for ``lightning-merge fit``. The module brings encoder, heads and
scores; what learns is :class:`lightning_merge.callbacks.DistilledMerge`, as in anybody's module.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_merge.errors import UserError
from lightning_merge.modules.adaptation_record import learned_from
from lightning_merge.modules.adaptive_merge import RECORD, TRACE, AdaptiveMerge
from lightning_merge.modules.encoder import Encoder
from lightning_merge.modules.folder import WEIGHTS, remove_weights, write_weights
from lightning_merge.modules.surgery import _merged_folder
from lightning_merge.outputs import refuse_other_content, versions
from lightning_merge.weights import open_weights, sha256_of_source
from lightning_merge.weights.card import stated_license
from lightning_merge.weights.folder import copy_companions, write_text


class DistilledEncoder(AdaptiveMerge):
    """Train all weights of a merged encoder to answer as the fine-tuned ones do, on unlabeled rows.

    Training batches are ``{task: {"inputs", "index"}}``, raw, as :class:`lightning_merge.data.TaskStreams` gives them;
    validation and test batches as for :class:`AdaptiveMerge`. At the end of ``fit`` a folder is written with weights
    under the names and in the dtypes of the merge's files, the heads, a record and the trace; it answers by
    ``lightning_merge.load`` as any merge does.

    Args:
        merge: The merged model to start from: the name of a merge of the run, or a folder.
        run: The folder of a finished run, which has everything else; or give ``base``, ``models`` and ``heads``.
        base: Folder of the pretrained encoder.
        models: Folders of the fine-tuned encoders, by task.
        heads: Files of their heads, by task.
        tasks: The tasks of the run; all by default.
        cross: Weight of the other models' answers on a task's rows, each through its own head, at least 0: it keeps
            what they know outside their tasks' data, for as many models asked about each row.
        temperature: Divides logits, above 0.
        ignore: Patterns of weights that stay as the merge has them.
        learning_rate: Of AdamW, above 0.
        weight_decay: Of AdamW, at least 0.
        optimizer: Makes another optimizer out of the weights.
        lr_scheduler: Makes a scheduler of the optimizer, stepped every batch; by default a warm-up and a cosine.
        individuals: The fine-tuned encoders' answers: ``cached`` asks once for each row, ``computed`` each time.
        guard: Stop and go back when the answers collapse; ``false`` for no guard, or a mapping of the settings of
            ``CollapseGuard``.
        trace_every_n_steps: How often losses and drift are recorded.
        output: The folder to write, or ``null`` to write none: it must be new, empty or an earlier merge.
        seed: Kept with the record.

    Raises:
        UserError: The run is not finished, the merge is not there or does not fit, or a setting is out of range.
    """

    def __init__(
        self,
        merge: str = "task_arithmetic",
        run: str | None = None,
        base: str | None = None,
        models: dict[str, str] | None = None,
        heads: dict[str, str] | None = None,
        tasks: list[str] | None = None,
        cross: float = 0.0,
        temperature: float = 1.0,
        ignore: list[str] | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        individuals: Literal["computed", "cached"] = "cached",
        guard: bool | dict[str, Any] = True,
        trace_every_n_steps: int = 1,
        output: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            run=run, base=base, models=models, heads=heads, tasks=tasks, guard=guard, output=output, seed=seed,
            trace_every_n_steps=trace_every_n_steps,
        )  # fmt: skip
        self.merge = _merged_folder(self.run, merge)
        self.encoder = Encoder.from_pretrained(self.merge)
        self._encoders = {
            task: self.encoder.reconfigured(info.pooling, info.max_length) for task, info in self.info.items()
        }
        for task, encoder in self._encoders.items():
            if encoder.dim != self.info[task].dim:
                raise UserError(
                    f"The merge in '{self.merge}' gives {encoder.dim} features, the head of task '{task}' takes "
                    f"{self.info[task].dim}. Expected a merge of the same models."
                )
        poolings = {task: info.pooling for task, info in self.info.items()}
        if cross and len(set(poolings.values())) > 1:
            shown = ", ".join(f"{task} {pooling}" for task, pooling in poolings.items())
            raise UserError(
                f"cross is {cross}, and the heads take features of different poolings ({shown}), so that one task's "
                "features do not fit another's head. Expected heads of one pooling, or cross=0."
            )
        self.requires_grad_(False)
        self.eval()
        self._settings = {
            "cross": cross, "temperature": temperature, "ignore": ignore or (), "learning_rate": learning_rate,
            "weight_decay": weight_decay, "optimizer": optimizer, "lr_scheduler": lr_scheduler,
            "remember": individuals,
        }  # fmt: skip
        self.configure_callbacks()  # a setting out of range is refused here

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the distillation, its guard and its trace; the same ones each time."""
        if self._callbacks is None:
            from lightning_merge.callbacks import AdaptationTrace, CollapseGuard, DistilledMerge

            heads = dict(zip(self.info, self.heads, strict=True))
            self._callbacks = [
                DistilledMerge(
                    self.task_vectors, "features", heads, models={task: task for task in self.info}, **self._settings
                )
            ]
            if self._guard is not False:
                self._callbacks.append(CollapseGuard(**({} if self._guard is True else self._guard)))
            self._callbacks.append(AdaptationTrace(self._trace_folder, self._every, announce=self.output is None))
        return self._callbacks

    # --- the end ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what could only fail after the training."""
        output, self.output = self.output, None
        try:
            super().setup(stage)
        finally:
            self.output = output
        if stage == "fit" and output is not None:
            self._refuse(output)

    def export(self, folder: str | os.PathLike[str]) -> None:
        """Write the weights as they stand, the heads, a record and the trace.

        Args:
            folder: A new or empty folder, or an earlier merge, which is replaced.

        Raises:
            UserError: Nothing has been learned yet, or the folder holds something else.
        """
        if not self.adaptation.trained:
            raise UserError("DistilledEncoder has learned nothing yet. Expected a call of Trainer.fit before export.")
        target = Path(folder)
        self._refuse(target)
        remove_weights(target)
        shutil.rmtree(target, ignore_errors=True)
        copy_companions(self.merge, target)
        (target / "heads").mkdir()
        for task, path in self.head_files.items():
            shutil.copyfile(path, target / "heads" / f"{task}.safetensors")
        record = self.record()
        write_text(target / RECORD, json.dumps(record, indent=1) + "\n")
        write_text(target / "merge.json", json.dumps(self._provenance(record), indent=1) + "\n")
        write_text(target / "README.md", self._card(target.name))
        trace = self._trace_folder
        if trace is not None and trace.is_dir():
            os.replace(trace, target / TRACE)
        # Last, so that a folder that has weights is complete.
        write_weights(self.encoder.backbone, self.merge, target / WEIGHTS, {"distilled_over": self.merge.name})

    def record(self) -> dict[str, Any]:
        """Return what the training came to, as plain data: steps, sizes, the last losses, what the guard did."""
        guard, learned = self.guard, self.adaptation
        return {
            "method": f"Distilled(cross={learned.cross:g}) over {self.merge.name}",
            **learned_from(self.trainer, self.run, self.merge),
            "merge": self.merge.name,
            "cross": learned.cross,
            "steps": int(self.trainer.global_step),
            "trained_parameters": learned.trained_parameters,
            "losses": {name: dict(values) for name, values in learned.last.items()},
            "drift": float(learned.drift()),
            "best_step": None if guard is None else guard.best_step,
            "stopped_step": None if guard is None else guard.stopped_step,
            "rolled_back": guard is not None and guard.rolled_back,
        }

    def _refuse(self, output: Path) -> None:
        refuse_other_content(output, [*self.task_vectors.sources, open_weights(self.merge)], overwrite=True)

    def _provenance(self, record: dict[str, Any]) -> dict[str, Any]:
        models = {name: sha256_of_source(source) for name, source in self.task_vectors.models.items()}
        over = {"name": self.merge.name, "sha256": sha256_of_source(open_weights(self.merge))}
        return {**record, "method": "distillation", "over": over, "models": models, "versions": versions()}

    def _card(self, title: str) -> str:
        license = stated_license(self.merge)
        head = "" if license is None else f"---\nlicense: {license}\n---\n\n"
        return (
            f"{head}# {title}\n\nAll weights of the merge {self.merge.name} were trained with lightning_merge to "
            f"answer, on unlabeled inputs, as the models of these tasks do: {', '.join(self.info)}.\n"
        )
