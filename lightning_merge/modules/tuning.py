"""Fine-tune one task, or pretrain a small base, with Lightning's Trainer: the training stages of a run."""

from __future__ import annotations

import inspect
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_merge.errors import UserError, nearest, unknown
from lightning_merge.modules.encoder import build_vit
from lightning_merge.modules.finetune import FineTune
from lightning_merge.modules.lora import LoraSettings
from lightning_merge.weights import open_weights, peak_memory_bytes, sha256_of_source

if TYPE_CHECKING:
    from lightning_merge.data import TaskData

# Each process holds the whole model; others would have to gather it before it can be written.
STRATEGIES = ("auto", "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
# Lightning names those it takes in private only.
PRECISIONS = (
    "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "transformer-engine",
    "transformer-engine-float16", "32", "16", "bf16", "64",
)  # fmt: skip
# Arguments of the Trainer that are settings of their own, and where.
RESERVED = {
    "max_epochs": "Set {where}.max_epochs.",
    "precision": "Set {where}.precision.",
    "callbacks": "Set {where}.patience for early stopping; other callbacks go through lightning-merge fit.",
}


@dataclass
class FineTuneSettings:
    """How a task is learned.

    Args:
        module: Settings of :class:`FineTune`: learning_rate, head, head_scale, decay, lora, ...
        max_epochs: Passes over the training rows.
        precision: Of Lightning's Trainer: ``32-true``, ``bf16-mixed``, ...
        patience: Stop after so many epochs without a better validation accuracy and keep the best; ``null`` keeps the
            last and never looks at validation rows.
        trainer: Further arguments of Lightning's Trainer, such as ``accelerator``, ``devices`` (by default one) and
            ``strategy`` (one of ``auto``, ``ddp``, ``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``); not ``max_epochs``,
            ``precision`` and ``callbacks``.
    """

    module: dict[str, Any] = field(default_factory=dict)
    max_epochs: int = 1
    precision: str = "32-true"
    patience: int | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    place: ClassVar[str] = "finetune"

    def check(self, where: str = "finetune") -> None:
        """Refuse settings that FineTune or the Trainer do not know, and strategies that scatter the weights.

        Args:
            where: Their place in the YAML, for the message.

        Raises:
            UserError: An unknown name, with the nearest spelling, or a number out of range.
        """
        for name in self.trainer:
            if name in RESERVED:
                raise UserError(f"{where}.trainer.{name} cannot be set here. {RESERVED[name].format(where=where)}")
        for what, given, kind in (("module", self.module, FineTune), ("trainer", self.trainer, L.Trainer)):
            taken = {"self", "base", *RESERVED}
            known = [name for name in inspect.signature(kind.__init__).parameters if name not in taken]
            for name in given:
                if name not in known:
                    raise UserError(
                        f"{where}.{what}: {kind.__name__} has no setting '{name}'. "
                        f"Known: {', '.join(known)}.{nearest(name, known)}"
                    )
        _check_lora(self.module.get("lora"), f"{where}.module.lora")
        if self.precision not in PRECISIONS:
            raise UserError(
                f"{where}.precision '{self.precision}' is unknown. Accepted: {', '.join(PRECISIONS)}."
                f"{nearest(str(self.precision), PRECISIONS)}"
            )
        if self.max_epochs < 1:
            raise UserError(f"{where}.max_epochs must be at least 1, got {self.max_epochs}.")
        if self.patience is not None and self.patience < 1:
            raise UserError(f"{where}.patience must be at least 1 or null, got {self.patience}.")
        strategy = self.trainer.get("strategy", "auto")
        if strategy not in STRATEGIES:
            raise UserError(
                f"{where}.trainer.strategy '{strategy}' is not for run, which writes whole weights on one machine. "
                f"Accepted: {', '.join(STRATEGIES)}. What shards a model goes through lightning-merge fit."
            )
        if self.trainer.get("num_nodes", 1) != 1:
            raise UserError(f"{where}.trainer.num_nodes must be 1 in run, got {self.trainer['num_nodes']}.")


@dataclass
class PretrainSettings(FineTuneSettings):
    """How a small vision transformer is made into a base: its size, and training on the ``pretrain`` task.

    Args:
        module: Settings of :class:`FineTune`.
        max_epochs: Passes over the training rows.
        precision: Of Lightning's Trainer.
        patience: As for fine-tuning.
        trainer: Further arguments of Lightning's Trainer.
        vit: Settings of :func:`build_vit`: image_size, hidden_size, layers, heads, patch_size.
    """

    vit: dict[str, int] = field(default_factory=dict)

    place: ClassVar[str] = "pretrain"

    def check(self, where: str = "pretrain") -> None:
        """Refuse what FineTune, the Trainer or the vision transformer do not know; see FineTuneSettings."""
        super().check(where)
        known = list(inspect.signature(build_vit).parameters)
        for name in self.vit:
            if name not in known:
                raise unknown(f"setting of {where}.vit", name, known)


def _check_lora(given: Any, where: str) -> None:
    """Refuse what LoraSettings does not take."""
    if given is None or isinstance(given, LoraSettings):
        return
    if not isinstance(given, Mapping):
        raise UserError(f"{where} must be a mapping such as '{{rank: 8}}', or null, got {given!r}.")
    known = [spec.name for spec in fields(LoraSettings)]
    for name in given:
        if name not in known:
            raise unknown(f"setting of {where}", str(name), known)
    try:
        LoraSettings(**given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except TypeError as error:  # text where a number belongs
        raise UserError(f"{where} has a value of the wrong type ({error}). Expected {LoraSettings()}.") from error


@dataclass
class Tuned:
    """What one fine-tuning left behind."""

    task: str
    sha256: str
    trained_parameters: int
    seconds: float
    peak_memory_bytes: int
    validation_accuracy: float | None = None


def fine_tune(
    settings: FineTuneSettings,
    data: TaskData,
    task: str,
    base: Path,
    folder: Path,
    head_path: Path,
    seed: int,
    writes: bool = True,
) -> Tuned:
    """Fine-tune the base on one task and write weights and head.

    Args:
        settings: How to train.
        data: The tasks.
        task: The one to learn.
        base: Folder of the pretrained model.
        folder: Where the fine-tuned model goes, as a Hugging Face folder.
        head_path: Where the head goes.
        seed: Of the order of rows, dropout, and a trained head's first weights.
        writes: Whether this process writes; not so in those that only train along.

    The caller's random state is neither read nor moved.

    Raises:
        UserError: The Trainer cannot be made as asked, or patience is set and no validation took place.
    """
    started = time.monotonic()
    checkpoints = folder.with_name(folder.name + ".checkpoints")
    if writes:
        shutil.rmtree(checkpoints, ignore_errors=True)
    callbacks: list[L.Callback] = []
    best = ModelCheckpoint(
        checkpoints,
        filename="{val_accuracy:.6f}",
        auto_insert_metric_name=False,
        monitor="val_accuracy",
        mode="max",
        save_weights_only=True,
    )
    if settings.patience is not None:
        # Not strict: where no validation took place, that is said below, in words of these settings.
        callbacks = [EarlyStopping("val_accuracy", mode="max", patience=settings.patience, strict=False), best]
    with isolate_rng(), quiet_lightning(), _single_task(data, task, seed):
        torch.manual_seed(seed)
        # Said here, for what spawned processes read of the data does not come back with the weights.
        classes = {"labels": list(data.get(task).labels), "label_texts": data.get(task).label_texts}
        given = settings.module if "labels" in settings.module else {**classes, **settings.module}
        module = FineTune(str(base), **{"seed": seed, **given})
        trainer = _trainer(settings, callbacks)
        trainer.fit(module, datamodule=data)
        accuracy = None
        if settings.patience is not None and writes:
            if not best.best_model_path:
                raise UserError(
                    f"{settings.place}.patience is {settings.patience}, but training on '{task}' ended before any "
                    f"validation. Expected patience: null, or settings in {settings.place}.trainer that reach one "
                    "(max_steps, max_time, check_val_every_n_epoch, val_check_interval, limit_val_batches)."
                )
            # Of the checkpoint's attributes only its path comes back from spawned processes.
            accuracy = float(Path(best.best_model_path).stem.split("-")[0])
            saved = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
            module.load_state_dict(saved["state_dict"])
        if writes:
            module.export(folder, task=task, head_path=head_path)
        trainer.strategy.barrier()
    if not writes:
        return Tuned(task, "", 0, 0.0, 0)
    shutil.rmtree(checkpoints, ignore_errors=True)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return Tuned(
        task, sha256_of_source(open_weights(folder)), trained, time.monotonic() - started, peak_memory_bytes(), accuracy
    )


def pretrain(
    settings: PretrainSettings, data: TaskData, folder: Path, seed: int, writes: bool = True
) -> dict[str, Any]:
    """Make a base: a small vision transformer with seeded weights, trained on the data's ``pretrain`` task.

    What stood in its folder is removed first: files of another base would be taken for its own.
    """
    start = folder.with_name(folder.name + ".untrained")
    if writes:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(start, ignore_errors=True)
        build_vit(**{"seed": seed, **settings.vit}).save_pretrained(start)
    tuned = fine_tune(settings, data, "pretrain", start, folder, start / "head.safetensors", seed, writes)
    if writes:
        shutil.rmtree(start)
    return {"seconds": tuned.seconds, "validation_accuracy": tuned.validation_accuracy}


def _trainer(settings: FineTuneSettings, callbacks: list[L.Callback]) -> L.Trainer:
    """Make Lightning's Trainer; what it refuses is a setting of the user's."""
    options: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": settings.patience is not None,
        "enable_model_summary": False,
        "enable_progress_bar": sys.stderr.isatty(),
        "limit_val_batches": 1.0 if settings.patience is not None else 0,
        "num_sanity_val_steps": 0,
        **settings.trainer,
        "max_epochs": settings.max_epochs,
        "precision": settings.precision,
        "callbacks": callbacks,
    }
    try:
        return L.Trainer(**options)
    except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"Lightning's Trainer refuses {settings.place}.trainer {settings.trainer} with precision "
            f"{settings.precision}: {told}. Expected what this machine and Lightning {L.__version__} can do."
        ) from error


@contextmanager
def _single_task(data: TaskData, task: str, seed: int) -> Iterator[None]:
    """Single out one task of the datamodule for a while, its training rows in the order of a seed."""
    data.get(task)  # read before the seed changes, for that also says which rows are kept
    before = data.task, data.seed
    data.task, data.seed = task, seed
    try:
        yield
    finally:
        data.task, data.seed = before


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out what Lightning says about devices and workers at each of many small fits."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*on_before_batch_transfer.*")
            warnings.filterwarnings("ignore", ".*isinstance.treespec.*")
            warnings.filterwarnings("ignore", "Early stopping conditioned on metric.*")
            warnings.filterwarnings("ignore", ".*could not find the monitored key.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
