"""Classification heads over encoder features: fixed class embeddings (the default for merging) or a trained layer.

A frozen class-embedding head leaves all that is learned in the encoder, where it can be merged: the analogue of CLIP's
zero-shot head. A trained head fits its own fine-tuned encoder, and a merged one only as far as features still agree.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lightning_merge.errors import UserError
from lightning_merge.weights import save_safetensors

if TYPE_CHECKING:
    from lightning_merge.modules.encoder import Encoder

HeadKind = Literal["class_embedding", "linear"]


class ClassEmbeddingHead(nn.Module):
    """Scaled cosine similarity to one fixed vector a class: ``logits = scale * cos(z, e_class)``.

    Nothing here is trained. The similarity is computed in fp32 also under autocast: with a scale of 20, bf16's three
    digits would move logits by 0.1.

    Args:
        weight: class embeddings of shape (C, dim), any length but zero; stored as unit rows.
        scale: positive factor on the cosine, the inverse of a softmax temperature.

    Raises:
        UserError: the scale is not positive, or a row is zero or not finite.
    """

    kind: HeadKind = "class_embedding"
    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: float = 20.0) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise UserError(f"ClassEmbeddingHead: scale must be a positive number, got {scale}.")
        length = weight.detach().double().norm(dim=-1, keepdim=True)
        if weight.ndim != 2 or not bool(torch.isfinite(length).all()) or not bool((length > 0).all()):
            raise UserError(
                "ClassEmbeddingHead: class embeddings must be finite non-zero rows (C, dim), got shape "
                f"{tuple(weight.shape)}."
            )
        self.register_buffer("weight", (weight.detach().double() / length).float())
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of shape (N, C) for features of shape (N, dim)."""
        with torch.autocast(features.device.type, enabled=False):
            return (
                self.scale
                * nn.functional.normalize(features.float(), dim=-1, eps=torch.finfo(torch.float32).tiny)
                @ self.weight.T
            )


class LinearHead(nn.Module):
    """A trained affine layer: ``logits = z @ weight.T + bias``.

    Args:
        dim: features of the encoder.
        num_classes: classes C.
        seed: of the small random start; the caller's random state is neither read nor moved.
    """

    kind: HeadKind = "linear"

    def __init__(self, dim: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.02 * torch.randn(num_classes, dim, generator=generator))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits of shape (N, C) for features of shape (N, dim)."""
        return nn.functional.linear(features, self.weight, self.bias)


def class_embeddings(encoder: Encoder, label_texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Embed one phrase a class with the encoder itself, in evaluation mode.

    Args:
        encoder: a text encoder, usually with its pretrained weights.
        label_texts: one phrase a class, all different.
        batch_size: phrases embedded at once.

    Returns:
        Unit rows of shape (C, dim), fp32, on the CPU.

    Raises:
        UserError: the encoder takes images, or a phrase is there twice (its classes could not be told apart).
    """
    if encoder.kind != "text":
        raise UserError("Class embeddings from phrases need a text encoder. For images use orthonormal_embeddings.")
    repeated = next((text for position, text in enumerate(label_texts) if text in label_texts[:position]), None)
    if repeated is not None:
        raise UserError(
            f"Label text '{repeated}' stands for two classes, which could then not be told apart. "
            "Give each class its own phrase."
        )
    training = encoder.training
    device = next(encoder.parameters()).device
    encoder.eval()
    try:
        with torch.no_grad():
            rows = [
                encoder(
                    **{
                        name: tensor.to(device)
                        for name, tensor in encoder.preprocess(label_texts[start : start + batch_size]).items()
                    }
                )
                for start in range(0, len(label_texts), batch_size)
            ]
    finally:
        encoder.train(training)
    return nn.functional.normalize(torch.cat(rows).double().cpu(), dim=-1).float()


def orthonormal_embeddings(num_classes: int, dim: int, seed: int = 0) -> Tensor:
    """Draw fixed class vectors of unit length, orthogonal to each other where the space has room.

    Made by QR in fp64 of a seeded Gaussian matrix. With more classes than dimensions no orthonormal set exists; then
    the rows are independent random directions, unit length, with cosines of order 1 / sqrt(dim) between them.

    Args:
        num_classes: C, at least 1.
        dim: dimensions, at least 1.
        seed: of the draw; equal arguments give equal vectors.

    Returns:
        Unit rows of shape (C, dim), fp32.
    """
    if num_classes < 1 or dim < 1:
        raise UserError(f"orthonormal_embeddings: num_classes and dim must be at least 1, got {num_classes} and {dim}.")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, num_classes, generator=generator, dtype=torch.float64)
    if num_classes > dim:
        return nn.functional.normalize(gaussian, dim=0).T.float().contiguous()
    columns, triangle = torch.linalg.qr(gaussian)
    # QR leaves the sign of each column open; a positive diagonal makes the answer one
    return (columns * triangle.diagonal().sign()).T.float().contiguous()


def label_seed(labels: Sequence[str], seed: int = 0) -> int:
    """Derive a seed from class names, so that tasks with equal classes share vectors and others do not."""
    digest = hashlib.blake2b(json.dumps([seed, list(labels)]).encode(), digest_size=7)
    return int.from_bytes(digest.digest(), "big")


@dataclass(frozen=True)
class HeadInfo:
    """What a head file says about its head.

    Args:
        kind: ``"class_embedding"`` or ``"linear"``.
        task: the task's name.
        labels: class names, in the order of the logits.
        dim: features the head takes.
        label_texts: one phrase a class, where there are any.
        scale: factor on the cosine; None for a linear head.
        base_sha256: of the base model's weights; empty when unknown.
        pooling: how the encoder's tokens were pooled; None for the encoder's default.
        max_length: tokens kept of each text; None for the encoder's default.
    """

    kind: HeadKind
    task: str
    labels: tuple[str, ...]
    dim: int
    label_texts: tuple[str, ...] | None = None
    scale: float | None = None
    base_sha256: str = ""
    pooling: Literal["mean", "cls", "pooler"] | None = None
    max_length: int | None = None


def save_head(
    head: ClassEmbeddingHead | LinearHead,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str],
    task: str,
    label_texts: Sequence[str] | None = None,
    base_sha256: str = "",
    pooling: str | None = None,
    max_length: int | None = None,
) -> None:
    """Write a head as one safetensors file whose metadata says what it is; see ``HeadInfo`` for the fields.

    Raises:
        UserError: the number of labels or phrases is not the number of classes.
    """
    classes, dim = head.weight.shape
    for name, values in (("labels", labels), ("label_texts", label_texts)):
        if values is not None and len(values) != classes:
            raise UserError(f"Head of task '{task}': {len(values)} {name} for {classes} classes.")
    metadata = {
        "format": "pt",
        "kind": head.kind,
        "task": task,
        "labels": json.dumps(list(labels)),
        "dim": str(dim),
        "base_sha256": base_sha256,
    }
    if label_texts is not None:
        metadata["label_texts"] = json.dumps(list(label_texts))
    tensors = {"weight": head.weight.detach().float().cpu().contiguous()}
    if isinstance(head, ClassEmbeddingHead):
        metadata["scale"] = repr(float(head.scale))
    else:
        tensors["bias"] = head.bias.detach().float().cpu().contiguous()
    if pooling is not None:
        metadata["pooling"] = pooling
    if max_length is not None:
        metadata["max_length"] = str(max_length)
    save_safetensors(tensors, Path(path), metadata)


def load_head(path: str | os.PathLike[str]) -> tuple[ClassEmbeddingHead | LinearHead, HeadInfo]:
    """Read a head written by ``save_head``, in evaluation mode.

    Raises:
        UserError: the file is missing, is not safetensors, is truncated, or its parts contradict each other.
    """
    from safetensors import safe_open

    file = Path(path)
    if not file.is_file():
        raise UserError(f"Head file '{file}' does not exist. Accepted: a .safetensors file written by save_head.")
    try:
        with safe_open(str(file), framework="pt") as source:
            metadata = source.metadata() or {}
            tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        raise UserError(f"Head file '{file}' cannot be read as safetensors: {error}") from error
    info = _head_info(file, metadata)
    shapes = {"weight": (len(info.labels), info.dim)} | ({"bias": (len(info.labels),)} if info.kind == "linear" else {})
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise UserError(f"Head file '{file}': tensor '{name}' has shape {found}, but its metadata means {shape}.")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise UserError(f"Head file '{file}': tensor '{name}' has values that are not finite.")
    if info.kind == "linear":
        linear = LinearHead(info.dim, len(info.labels))
        linear.load_state_dict({name: tensors[name] for name in shapes})
        return linear.eval(), info
    try:
        head = ClassEmbeddingHead(tensors["weight"], info.scale if info.scale is not None else float("nan"))
    except UserError as error:
        raise UserError(f"Head file '{file}': {error}") from error
    # dividing unit rows by their length once more could move the last digit
    head.weight.copy_(tensors["weight"])
    return head.eval(), info


def _head_info(file: Path, metadata: dict[str, str]) -> HeadInfo:
    """Read and check the metadata of a head file."""
    for name in ("kind", "task", "labels", "dim"):
        if name not in metadata:
            raise UserError(
                f"Head file '{file}' has no '{name}' in its metadata. Accepted: a file written by save_head."
            )
    kind = metadata["kind"]
    if kind not in ("class_embedding", "linear"):
        raise UserError(f"Head file '{file}' has unknown kind '{kind}'. Known: class_embedding, linear.")
    try:
        labels = json.loads(metadata["labels"])
        texts = json.loads(metadata["label_texts"]) if "label_texts" in metadata else None
        dim, scale = int(metadata["dim"]), float(metadata["scale"]) if "scale" in metadata else None
        max_length = int(metadata["max_length"]) if "max_length" in metadata else None
    except ValueError as error:
        raise UserError(f"Head file '{file}' has unreadable metadata: {error}") from error
    for name, values in (("labels", labels), ("label_texts", texts)):
        if values is not None and not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            raise UserError(f"Head file '{file}': '{name}' in its metadata must be a JSON list of strings.")
    if texts is not None and len(texts) != len(labels):
        raise UserError(f"Head file '{file}': {len(texts)} label_texts for {len(labels)} labels.")
    pooling = metadata.get("pooling")
    if pooling not in (None, "mean", "cls", "pooler"):
        raise UserError(f"Head file '{file}' has unknown pooling '{pooling}'. Known: cls, mean, pooler.")
    return HeadInfo(
        kind=kind,  # type: ignore[arg-type]
        task=metadata["task"],
        labels=tuple(labels),
        dim=dim,
        label_texts=None if texts is None else tuple(texts),
        scale=scale,
        base_sha256=metadata.get("base_sha256", ""),
        pooling=pooling,  # type: ignore[arg-type]
        max_length=max_length,
    )
