"""A merged model that answers: one encoder, one head a task, labels and probabilities for raw inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_merge.errors import UserError, unknown
from lightning_merge.modules.corrected import CorrectedEncoder
from lightning_merge.modules.correctors import FILE, Correctors
from lightning_merge.modules.encoder import Encoder
from lightning_merge.modules.heads import ClassEmbeddingHead, HeadInfo, LinearHead, load_head

Inputs = str | Sequence[str] | Sequence[tuple[str, str]] | np.ndarray | Tensor


@dataclass(frozen=True)
class Prediction:
    """What a model answers for N inputs.

    Args:
        task: the task it was asked about.
        classes: the task's C class names.
        probabilities: shape (N, C), fp32, on the CPU; rows sum to 1.
    """

    task: str
    classes: tuple[str, ...]
    probabilities: Tensor

    @property
    def labels(self) -> list[str]:
        """The most probable class of each input."""
        return [self.classes[index] for index in self.probabilities.argmax(-1).tolist()]

    def __len__(self) -> int:
        return len(self.probabilities)


class MergedModel(nn.Module):
    """One encoder with the heads of several tasks.

    Calling it needs raw inputs and a task: ``model(["what is a comet ?"], task="trec").labels``. With correctors
    (Representation Surgery) the encoder's features are those of the task that is named, which then cannot be left out.

    Args:
        encoders: for each task the encoder that pools as the task's head was trained; all share one backbone.
        heads: for each task its head and what is known of it.
        default: the encoder for features that no task is named for.
        correctors: what corrects the features for each task, if anything does.

    Raises:
        UserError: the correctors were trained with another encoder.
    """

    def __init__(
        self,
        default: Encoder,
        encoders: dict[str, Encoder],
        heads: dict[str, tuple[ClassEmbeddingHead | LinearHead, HeadInfo]],
        correctors: Correctors | None = None,
    ) -> None:
        super().__init__()
        self.encoder = default
        self.correctors = correctors
        self._corrected: dict[str, CorrectedEncoder] = {}
        if correctors is not None:
            # A task without a head may have correctors too: its features can be asked for.
            self._corrected = {t: CorrectedEncoder(encoders.get(t, default), correctors, t) for t in correctors.tasks}
        # a plain dict: task names may hold dots, and the encoders share one backbone that must not be counted twice
        self._encoders = encoders
        self._positions = {task: position for position, task in enumerate(heads)}
        self.heads = nn.ModuleList(head for head, _ in heads.values())
        self.info = {task: info for task, (_, info) in heads.items()}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks the model has heads for."""
        return list(self.info)

    def forward(self, inputs: Inputs, task: str | None = None, batch_size: int = 64) -> Prediction:
        """Answer for raw inputs.

        Args:
            inputs: a string, strings, pairs of strings, one uint8 image or a uint8 array of images.
            task: whose classes to answer with; may be left out when the model has one head.
            batch_size: inputs computed at once.

        Raises:
            UserError: the task is unknown, or left out where there are several.
        """
        name = self._task(task)
        head = self.heads[self._positions[name]]
        features = self.features(inputs, name, batch_size)
        with torch.inference_mode():
            device = head.weight.device
            logits = torch.cat([head(part.to(device)).float().cpu() for part in features.split(batch_size)])
        return Prediction(name, self.info[name].labels, logits.softmax(-1))

    def features(self, inputs: Inputs, task: str | None = None, batch_size: int = 64) -> Tensor:
        """Return the encoder's features of raw inputs, shape (N, dim), fp32, on the CPU.

        Args:
            inputs: as for calling the model.
            task: whose pooling (and correctors) to use; by default the encoder's own.
            batch_size: inputs computed at once.

        Raises:
            UserError: the model has correctors, and no task is named, or one without a corrector.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        encoder = self._encoder(task)
        rows = _as_batch(inputs)
        if len(rows) == 0:
            raise UserError("The list of inputs is empty. Accepted: one input or more.")
        # texts of like length together: a batch is padded to its longest
        order = list(range(len(rows)))
        if not isinstance(rows, (Tensor, np.ndarray)):
            order.sort(
                key=lambda index: len(rows[index]) if isinstance(rows[index], str) else sum(map(len, rows[index]))
            )
        device = next(encoder.parameters()).device
        was_training = self.training
        self.eval()
        result = torch.empty(len(rows), encoder.dim)
        try:
            with torch.inference_mode():
                for start in range(0, len(order), batch_size):
                    chosen = order[start : start + batch_size]
                    part: Any = (
                        rows[chosen] if isinstance(rows, (Tensor, np.ndarray)) else [rows[index] for index in chosen]
                    )
                    tensors = {key: value.to(device) for key, value in encoder.preprocess(part).items()}
                    result[chosen] = encoder(**tensors).float().cpu()
        finally:
            self.train(was_training)
        return result

    @property
    def stored_parameters(self) -> int:
        """Numbers that are stored: of the encoder and of the correctors of all tasks; heads are not counted."""
        correctors = 0 if self.correctors is None else self.correctors.size()
        return sum(p.numel() for p in self.encoder.parameters()) + correctors

    @property
    def active_parameters(self) -> int:
        """Numbers that take part in one answer: of the encoder and of one task's correctors; heads are not counted."""
        correctors = self.correctors
        largest = max(map(correctors.size, correctors.tasks)) if correctors is not None else 0
        return sum(p.numel() for p in self.encoder.parameters()) + largest

    def _encoder(self, task: str | None) -> Encoder | CorrectedEncoder:
        """Choose the encoder that answers for a task, with its correctors where the model has some."""
        if self.correctors is None:
            return self.encoder if task is None else self._encoders[self._task(task)]
        if task is None:
            known = ", ".join(sorted(self._corrected))
            raise UserError(f"This model's features are corrected for a task; name one. Known: {known}.")
        if task not in self._corrected:
            raise unknown("task of a corrector", task, self._corrected)
        return self._corrected[task]

    def _task(self, task: str | None) -> str:
        """Check a task's name, or take the only one."""
        if not self.info:
            raise UserError(
                "This model has no heads, so it can give features only. "
                "Accepted: a folder with heads/<task>.safetensors."
            )
        if task is None:
            if len(self.info) > 1:
                raise UserError(
                    f"This model answers for several tasks; name one. Known: {', '.join(sorted(self.info))}."
                )
            return next(iter(self.info))
        if task not in self.info:
            raise unknown("task", task, self.info)
        return task


def load(
    folder: str | os.PathLike[str], heads: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
) -> MergedModel:
    """Load a merged (or fine-tuned, or base) model folder with its heads, ready to answer.

    Where ``surgery.safetensors`` stands beside the weights, each task is answered with its own correctors.

    Args:
        folder: a Hugging Face folder with ``heads/<task>.safetensors`` in it, such as ``runs/x/merged/ties``.
        heads: a folder of heads to use in place of ``folder/heads``, such as ``runs/x/heads`` for ``runs/x/base``.
        device: where to compute.

    Raises:
        UserError: the folder or a head cannot be read, or a head does not fit the encoder.
    """
    source = Path(folder)
    if not source.is_dir():
        raise UserError(
            f"Model folder '{source}' does not exist. Accepted: a folder with config.json, safetensors weights "
            "and heads."
        )
    head_folder = source / "heads" if heads is None else Path(heads)
    if heads is not None and not head_folder.is_dir():
        raise UserError(
            f"Folder of heads '{head_folder}' does not exist. Accepted: a folder of <task>.safetensors files."
        )
    files = sorted(head_folder.glob("*.safetensors"))
    loaded = [(file, *load_head(file)) for file in files]
    default = Encoder.from_pretrained(source) if not loaded else _encoder(source, loaded[0][2])
    encoders: dict[str, Encoder] = {}
    for file, _, info in loaded:
        if info.task in encoders:
            raise UserError(f"Head file '{file}' is the second one for task '{info.task}'. Accepted: one head a task.")
        encoders[info.task] = default.reconfigured(info.pooling, info.max_length)
        if encoders[info.task].dim != info.dim:
            raise UserError(
                f"Head file '{file}' takes {info.dim} features, the model in '{source}' gives "
                f"{encoders[info.task].dim}."
            )
    correctors = Correctors.load(source / FILE) if (source / FILE).is_file() else None
    model = MergedModel(default, encoders, {info.task: (head, info) for _, head, info in loaded}, correctors)
    return model.to(device).eval().requires_grad_(False)


def _encoder(folder: Path, info: HeadInfo) -> Encoder:
    """Load the encoder as a head was trained with it."""
    if info.max_length is None:
        return Encoder.from_pretrained(folder, info.pooling)
    return Encoder.from_pretrained(folder, info.pooling, info.max_length)


def _as_batch(inputs: Inputs) -> Any:
    """Make one string, one pair or one image a batch of one."""
    if isinstance(inputs, str):
        return [inputs]
    if isinstance(inputs, (Tensor, np.ndarray)):
        single = inputs.ndim == 2 or (inputs.ndim == 3 and inputs.shape[-1] == 3)
        return inputs[None] if single else inputs
    if isinstance(inputs, tuple) and len(inputs) == 2 and all(isinstance(part, str) for part in inputs):
        raise UserError(
            "A tuple of two strings could be one pair or two texts. "
            "Accepted: [(first, second)] for a pair, [first, second] for texts."
        )
    return list(inputs)
