"""RepresentationSurgery: a merge of a run with correctors for each task, trained on an unlabeled stream.

Representation Surgery (arXiv 2402.02705) and SurgeryV2 (arXiv 2410.14389) for ``lightning-merge fit``. The module
brings encoder, heads and scores; what learns is :class:`lightning_merge.callbacks.Surgery`, as in anybody's module.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch.optim import Optimizer

from lightning_merge.errors import UserError, unknown
from lightning_merge.modules.adaptation_record import learned_from
from lightning_merge.modules.adaptive_merge import RECORD, AdaptiveMerge
from lightning_merge.modules.correctors import FILE, Correctors
from lightning_merge.modules.encoder import Encoder
from lightning_merge.outputs import refuse_other_content
from lightning_merge.weights import open_weights
from lightning_merge.weights.folder import write_text

# What the card of a merge says further where correctors are beside it.
_NOTE = (
    f"Beside the weights, `{FILE}` holds correctors of the features, one set a task. They act where the input's task "
    "is named, as in `lightning_merge.load(folder).features(inputs, task)`; the weights alone are the plain merge."
)


class RepresentationSurgery(AdaptiveMerge):
    """Train low-rank correctors of a merged encoder's features, one set a task, against the fine-tuned encoders.

    Training batches are ``{task: {"inputs", "index"}}``, raw, as :class:`lightning_merge.data.TaskStreams` gives them;
    validation and test batches as for :class:`AdaptiveMerge`, answered with the correctors of their task. At the end
    of ``fit`` a folder is written that holds the merge as it is, its heads and ``surgery.safetensors``;
    ``lightning_merge.load`` then answers with the correctors of the task that is asked about.

    Args:
        merge: The merged model: the name of a merge of the run, or a folder.
        run: The folder of a finished run, which has everything else; or give ``base``, ``models`` and ``heads``.
        base: Folder of the pretrained encoder.
        models: Folders of the fine-tuned encoders, by task.
        heads: Files of their heads, by task.
        tasks: The tasks of the run; all by default.
        version: 1 corrects the features; 2 also the tokens after every block.
        rank: Of each correction, at least 1.
        blocks: For version 2, the path of the list of blocks, or patterns of their paths; found by default.
        learning_rate: Of Adam, above 0; 1e-3 in the papers.
        optimizer: Makes another optimizer out of the correctors' parameters.
        individuals: The fine-tuned encoders' features: ``cached`` asks once for each row, ``computed`` each time.
        output: The folder to write, or ``null`` to write none: new, empty or an earlier merge; or that of ``merge``
            itself, which gets the correctors beside its weights.
        seed: Of the correctors' first values.

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
        version: Literal[1, 2] = 1,
        rank: int = 16,
        blocks: str | list[str] | None = None,
        learning_rate: float = 1e-3,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        individuals: Literal["computed", "cached"] = "cached",
        output: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            run=run, base=base, models=models, heads=heads, tasks=tasks, guard=False, output=output, seed=seed
        )
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
        if isinstance(rank, int) and rank > self.encoder.dim:
            raise UserError(
                f"rank is {rank}, and the merge in '{self.merge}' gives {self.encoder.dim} features, of which no "
                f"corrector has more ranks. Expected a rank of 1 to {self.encoder.dim}."
            )
        self.requires_grad_(False)
        self.eval()
        self._surgery: dict[str, Any] = {
            "version": version, "rank": rank, "blocks": blocks, "learning_rate": learning_rate,
            "optimizer": optimizer, "remember": individuals,
        }  # fmt: skip
        self.configure_callbacks()  # a setting out of range is refused here

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the surgery; the same one each time."""
        if self._callbacks is None and hasattr(self, "_surgery"):
            from lightning_merge.callbacks.surgery import Surgery

            self._callbacks = [
                Surgery(self.task_vectors, features="features", logits="logits", seed=self.seed, **self._surgery)
            ]
        return self._callbacks or []

    @property
    def guard(self) -> Any:
        """None: the correctors are drawn to the individual models, not to confidence."""
        return None

    @property
    def correctors(self) -> Correctors:
        """What has been learned.

        Raises:
            UserError: Nothing yet.
        """
        correctors = self.adaptation.correctors
        if correctors is None or not correctors.trained_tasks:
            raise UserError("RepresentationSurgery has learned nothing yet. Expected a call of Trainer.fit first.")
        return correctors

    # --- scores -----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the accuracy with the correctors of the task."""
        with self._corrected(dataloader_idx):
            super().validation_step(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the accuracy with the correctors of the task."""
        with self._corrected(dataloader_idx):
            super().test_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return task, rows' numbers and class probabilities with the correctors of the task."""
        with self._corrected(dataloader_idx):
            return super().predict_step(batch, batch_idx, dataloader_idx)

    def _corrected(self, dataloader_idx: int) -> AbstractContextManager[None]:
        task, correctors = self._names()[dataloader_idx], self.adaptation.correctors
        trained = correctors is not None and task in correctors.trained_tasks
        return self.adaptation.task(task, self) if trained else nullcontext()

    # --- the end ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what could only fail after the training."""
        output, self.output = self.output, None
        try:
            super().setup(stage)
        finally:
            self.output = output
        if stage == "fit" and output is not None and output.resolve() != self.merge.resolve():
            refuse_other_content(output, [*self.task_vectors.sources, open_weights(self.merge)], overwrite=True)

    def export(self, folder: str | os.PathLike[str]) -> None:
        """Write the merge, its heads, the correctors and a record of the training.

        Args:
            folder: A new or empty folder, or an earlier merge, which is replaced; or the merge's own folder.

        Raises:
            UserError: Nothing has been learned yet, or the folder holds something else.
        """
        correctors, target = self.correctors, Path(folder)
        if target.resolve() != self.merge.resolve():
            refuse_other_content(target, [*self.task_vectors.sources, open_weights(self.merge)], overwrite=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(self.merge, target)
        (target / "heads").mkdir(exist_ok=True)
        for task, path in self.head_files.items():
            shutil.copyfile(path, target / "heads" / f"{task}.safetensors")
        correctors.save(target / FILE)
        _mention(target / "README.md", target.name)
        write_text(target / RECORD, json.dumps(self.record(), indent=1) + "\n")

    def record(self) -> dict[str, Any]:
        """Return what the training came to, as plain data: steps, sizes, the last distances."""
        correctors = self.correctors
        encoder = sum(parameter.numel() for parameter in self.encoder.parameters())
        return {
            "method": f"Surgery(version={correctors.version}, rank={correctors.rank}) over {self.merge.name}",
            **learned_from(self.trainer, self.run, self.merge),
            "merge": self.merge.name,
            "version": correctors.version,
            "rank": correctors.rank,
            "steps": int(self.trainer.global_step),
            "trained_parameters": correctors.size(),
            "stored_parameters": encoder + correctors.size(),
            "active_parameters": encoder + max(map(correctors.size, correctors.tasks)),
            "distance": dict(self.adaptation.last.get("surgery", {})),
            "drift": float(self.adaptation.drift()),
        }


def _mention(card: Path, title: str) -> None:
    """Say once in a merge's card that there are correctors."""
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {title}\n"
    if _NOTE not in text:
        write_text(card, f"{text.rstrip()}\n\n{_NOTE}\n")


def _merged_folder(run: Path | None, merge: str) -> Path:
    """Find a merge by its name in a run, or by its folder."""
    inside = None if run is None else run / "merged" / merge
    for folder in filter(None, (inside, Path(merge))):
        if (folder / "config.json").is_file():
            return folder
    if run is not None and (run / "merged").is_dir():
        raise unknown(f"merge of the run '{run}'", merge, [path.name for path in (run / "merged").iterdir()])
    raise UserError(f"The merge '{merge}' does not exist. Expected a folder with config.json beside weights.")
