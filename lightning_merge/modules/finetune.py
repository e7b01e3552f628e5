"""Fine-tune one pretrained encoder on one task, and write weights that can be merged with those of other tasks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics.classification import MulticlassAccuracy

from lightning_merge.errors import UserError, unknown
from lightning_merge.modules.encoder import Encoder
from lightning_merge.modules.folder import BASE_SHA256, base_sha256, remove_weights, write_card, write_weights
from lightning_merge.modules.heads import (
    ClassEmbeddingHead,
    HeadKind,
    LinearHead,
    class_embeddings,
    label_seed,
    orthonormal_embeddings,
    save_head,
)
from lightning_merge.modules.lora import LoraSettings, adapt
from lightning_merge.weights.folder import copy_companions

Decay = Literal["linear", "cosine", "constant"]


class WarmupDecay:
    """The factor on the learning rate at each optimizer step: linear warm-up, then linear, cosine or no decay to zero.

    Args:
        total_steps: optimizer steps of the whole run.
        warmup_fraction: share of them, in [0, 1], in which the rate rises to its full value.
        decay: how it falls afterwards.
    """

    def __init__(self, total_steps: int, warmup_fraction: float, decay: Decay) -> None:
        self.total_steps = total_steps
        self.warmup_steps = round(warmup_fraction * total_steps)
        self.decay = decay

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        if self.decay == "linear":
            return 1.0 - progress
        return 0.5 * (1.0 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1.0


class FineTune(L.LightningModule):
    """Fine-tune a transformers encoder (BERT-like, ViT, CLIP's vision tower) as a classifier for one task.

    Trained with cross-entropy. The task's classes come from the datamodule (``.task`` and ``.get(task)``) unless
    ``labels`` names them. Batches are raw: ``{"inputs", "labels", "index"}``; they are tokenized or normalised here.
    Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``test_loss`` and ``test_accuracy``.

    Args:
        base: folder of the pretrained model (``config.json``, safetensors, tokenizer), or its name on the Hub.
        head: ``class_embedding`` keeps a frozen vector a class and learns the encoder only, which is what merges
            best; ``linear`` also trains a classification layer. Class vectors are the pretrained model's own
            embeddings of ``label_texts`` for text, and fixed orthonormal vectors drawn from the class names for images.
        head_scale: factor on the cosine of the class-embedding head, positive.
        labels: class names, in the order of the label numbers.
        label_texts: one English phrase a class; the class names where neither this nor the datamodule gives any.
        pooling: ``mean``, ``cls`` or ``pooler``; by default mean for text, cls for ViT, CLIP's own for CLIP.
        max_length: tokens kept of each text.
        freeze_embeddings: leave the token embeddings of a text model as they are. They are half of a small model's
            weights, each token is seen a few times in a short run, and the optimizer would still visit all of them.
            Position and patch embeddings are trained.
        lora: train low-rank updates in place of the weights.
        learning_rate: of AdamW at the end of the warm-up.
        weight_decay: of AdamW, on matrices only (not on biases and normalisations).
        warmup_fraction: share of all steps, in [0, 1], in which the learning rate rises.
        decay: how the learning rate falls afterwards, step by step: ``linear``, ``cosine`` or ``constant``.
        optimizer: makes another optimizer out of the trainable parameters; ``learning_rate``, ``weight_decay``,
            ``warmup_fraction`` and ``decay`` are then not used.
        lr_scheduler: makes a scheduler out of the optimizer, stepped once an epoch, in place of warm-up and decay.
        seed: of the head's fixed vectors or first weights and of LoRA's first weights.

    Raises:
        UserError: the base cannot be loaded, a setting is out of range, or no task is chosen.
    """

    head: ClassEmbeddingHead | LinearHead | None

    def __init__(
        self,
        base: str,
        head: Literal["class_embedding", "linear"] = "class_embedding",
        head_scale: float = 20.0,
        labels: list[str] | None = None,
        label_texts: list[str] | None = None,
        pooling: Literal["mean", "cls", "pooler"] | None = None,
        max_length: int = 64,
        freeze_embeddings: bool = True,
        lora: LoraSettings | None = None,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.1,
        decay: Literal["linear", "cosine", "constant"] = "linear",
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if head not in ("class_embedding", "linear"):
            raise unknown("head", head, ("class_embedding", "linear"))
        if decay not in ("linear", "cosine", "constant"):
            raise unknown("decay", decay, ("linear", "cosine", "constant"))
        for name, value, within in (
            ("head_scale", head_scale, 0 < head_scale < math.inf),
            ("learning_rate", learning_rate, 0 < learning_rate < math.inf),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf),
        ):
            if not within:
                raise UserError(
                    f"FineTune: {name} must be a {'positive' if name != 'weight_decay' else 'non-negative'} "
                    f"number, got {value}."
                )
        if not 0 <= warmup_fraction <= 1:
            raise UserError(f"FineTune: warmup_fraction must be in [0, 1], got {warmup_fraction}.")
        if isinstance(lora, Mapping):  # from a checkpoint's hyper-parameters, which hold plain values only
            lora = LoraSettings(**lora)
        self.save_hyperparameters(ignore=["lora", "optimizer", "lr_scheduler"])
        self.save_hyperparameters({"lora": asdict(lora) if lora is not None else None})
        self.head_kind: HeadKind = head
        self.head_scale = head_scale
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.decay: Decay = decay
        self.optimizer_factory = optimizer
        self.scheduler_factory = lr_scheduler
        self.seed = seed
        self.lora = lora
        self.task: str | None = None
        self.labels = None if labels is None else tuple(labels)
        self.label_texts = None if label_texts is None else tuple(label_texts)

        self.encoder = Encoder.from_pretrained(base, pooling, max_length)
        assert self.encoder.folder is not None
        self.base_folder: Path = self.encoder.folder
        if lora is not None:
            adapt(self.encoder, lora, seed)
        elif freeze_embeddings and self.encoder.kind == "text":
            self.encoder.backbone.get_input_embeddings().requires_grad_(False)
        # what takes no part (a pooler that is not asked for) would be an error under DDP and must not decay
        unused = set(self.encoder.unused_parameters())
        for name, parameter in self.encoder.named_parameters():
            if name in unused:
                parameter.requires_grad_(False)
        self.head = None
        self.accuracy = nn.ModuleDict()
        # transformers hands models over in evaluation mode, and Lightning's fit keeps it: dropout would stay off
        self.train()

    # --- the head -----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Make the head once the task's classes are known; does nothing when it is there already."""
        self._read_task()
        if self.head is not None:
            if self.labels is not None and len(self.labels) != self.head.weight.shape[0]:
                raise UserError(
                    f"FineTune has a head for {self.head.weight.shape[0]} classes, task '{self.task}' has "
                    f"{len(self.labels)}. Make a new FineTune for another task."
                )
            return
        if not self.labels:
            if self._trainer is None:  # load_from_checkpoint comes here before it reads the classes
                return
            raise UserError(
                "FineTune knows no classes. Give labels=[...], or a datamodule with one task chosen (data.task)."
            )
        if self.label_texts is not None and len(self.label_texts) != len(self.labels):
            raise UserError(f"FineTune: {len(self.label_texts)} label_texts for {len(self.labels)} labels.")
        if self.head_kind == "linear":
            self.head = LinearHead(self.encoder.dim, len(self.labels), self.seed)
        elif self.encoder.kind == "text":
            self.head = ClassEmbeddingHead(
                class_embeddings(self.encoder, self.label_texts or self.labels), self.head_scale
            )
        else:
            vectors = orthonormal_embeddings(len(self.labels), self.encoder.dim, label_seed(self.labels, self.seed))
            self.head = ClassEmbeddingHead(vectors, self.head_scale)
        self.head.to(self.device)

    def _read_task(self) -> None:
        """Take task name, classes and phrases from the datamodule; what the caller gave has precedence."""
        datamodule = getattr(self._trainer, "datamodule", None)
        if datamodule is None or not hasattr(datamodule, "get"):
            return
        name = getattr(datamodule, "task", None)
        if name is None:
            if self.labels is None:
                known = ", ".join(getattr(datamodule, "task_names", []))
                raise UserError(
                    "FineTune trains on one task, but the datamodule has none chosen. "
                    f"Set data.task to one of: {known}."
                )
            return
        if self.task == name:
            return
        task = datamodule.get(name)
        if self.head is not None and self.labels is not None and tuple(task.labels) != self.labels:
            raise UserError(
                f"FineTune has a head for the classes of '{self.task}', not for those of '{name}'. "
                "Make a new FineTune for another task."
            )
        self.task = name
        if self.labels is None:
            self.labels = tuple(task.labels)
            if self.label_texts is None and task.label_texts is not None:
                self.label_texts = tuple(task.label_texts)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, making the head in their shape first where the task's classes are not known yet."""
        weight = state_dict.get("head.weight")
        if self.head is None and weight is not None:
            classes, dim = weight.shape
            self.head = (
                LinearHead(dim, classes)
                if self.head_kind == "linear"
                else ClassEmbeddingHead(torch.eye(classes, dim) + 1.0)
            )
            self.head.to(self.device)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the task's name and classes, so that a checkpoint can be used without its datamodule."""
        checkpoint["fine_tune"] = {
            "task": self.task,
            "labels": list(self.labels or ()),
            "label_texts": None if self.label_texts is None else list(self.label_texts),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the task's name and classes."""
        stored = checkpoint.get("fine_tune")
        if stored is not None and self.labels is None and stored["labels"]:
            self.task, self.labels = stored["task"], tuple(stored["labels"])
            self.label_texts = None if stored["label_texts"] is None else tuple(stored["label_texts"])

    # --- steps --------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Tokenize or normalise a raw batch; one that is tensors already is left alone."""
        if isinstance(batch, Mapping) and "inputs" in batch and not isinstance(batch["inputs"], Mapping):
            return {**batch, "inputs": self.encoder.preprocess(batch["inputs"])}
        return batch

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return logits of shape (N, C) for the tensors that ``encoder.preprocess`` makes of raw inputs."""
        if self.head is None:
            raise UserError(
                "FineTune has no head yet. Fit or test it with a Trainer first, or call configure_model() with "
                "labels=[...] given."
            )
        return self.head(self.encoder(**inputs))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        loss = nn.functional.cross_entropy(self(batch["inputs"]), batch["labels"])
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy on validation rows."""
        self._score("val", batch, dataloader_idx)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy on test rows."""
        self._score("test", batch, dataloader_idx)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the rows' numbers and class probabilities: ``index`` (N,) and ``probabilities`` (N, C)."""
        return {"index": batch["index"], "probabilities": self(batch["inputs"]).float().softmax(-1)}

    def _score(self, stage: str, batch: Mapping[str, Any], dataloader_idx: int) -> None:
        labels: Tensor = batch["labels"]
        logits = self(batch["inputs"])
        name = f"{stage}_{dataloader_idx}"
        if name not in self.accuracy:  # one metric a loader: Lightning logs several test sets side by side
            metric = MulticlassAccuracy(num_classes=logits.shape[-1], average="micro")
            self.accuracy[name] = metric.to(self.device)
        accuracy = cast(MulticlassAccuracy, self.accuracy[name])
        accuracy.update(logits, labels)
        loss = nn.functional.cross_entropy(logits, labels)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        self.log(f"{stage}_loss", loss, sync_dist=True, **options)
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True, metric_attribute=f"accuracy.{name}", **options)

    # --- optimization -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the configured optimizer and scheduler, by default AdamW with warm-up and decay by the step."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer_factory is not None:
            optimizer = self.optimizer_factory(trainable)
        else:
            matrices = [parameter for parameter in trainable if parameter.ndim > 1]
            vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
            groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.learning_rate)
        if self.scheduler_factory is not None:
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": self.scheduler_factory(optimizer), "monitor": "val_loss"},
            }
        steps = self.trainer.estimated_stepping_batches
        if self.optimizer_factory is not None or not math.isfinite(
            steps
        ):  # an endless run has no fraction of its steps
            return optimizer
        schedule = LambdaLR(optimizer, WarmupDecay(int(steps), self.warmup_fraction, self.decay))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- export -------------------------------------------------------------------------------------------------

    def export(
        self, folder: str | os.PathLike[str], task: str | None = None, head_path: str | os.PathLike[str] | None = None
    ) -> None:
        """Write the fine-tuned encoder as a Hugging Face folder that merges with the base, and the head beside it.

        Tensor names and dtypes are those of the base's files, config and tokenizer files are its copies, and the
        metadata of ``model.safetensors`` holds ``base_sha256`` and ``task``. LoRA updates are merged into the weights.
        Earlier weights are removed first and the new ones written last, so a folder that has them is complete. A
        licence that the base's card states is stated again. This module is not changed.

        Args:
            folder: where to write; made if absent.
            task: the task's name; by default the one trained on.
            head_path: the head's file; by default ``folder/heads/<task>.safetensors``.

        Raises:
            UserError: there is no head, or no task name is known.
        """
        if self.head is None or not self.labels:
            self.configure_model()
        assert self.head is not None and self.labels is not None
        name = task or self.task
        if name is None:
            raise UserError("FineTune.export: the task has no name. Give task='...'.")
        target = Path(folder)
        if target.resolve() == self.base_folder.resolve():
            raise UserError(f"FineTune.export: '{target}' is the base's own folder. Give another one.")
        digest = base_sha256(self.base_folder)
        remove_weights(target)
        copy_companions(self.base_folder, target)
        write_card(self.base_folder, target, name)
        save_head(
            self.head,
            head_path if head_path is not None else target / "heads" / f"{name}.safetensors",
            labels=self.labels,
            task=name,
            label_texts=self.label_texts,
            base_sha256=digest,
            pooling=self.encoder.pooling,
            max_length=self.encoder.max_length,
        )
        backbone: Any = self.encoder.backbone
        if self.lora is not None:
            import copy

            backbone = copy.deepcopy(backbone).merge_and_unload()
        write_weights(backbone, self.base_folder, target / "model.safetensors", {BASE_SHA256: digest, "task": name})
