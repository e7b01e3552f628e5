"""Encoders, heads and the LightningModules that train them."""

from __future__ import annotations

from lightning_merge.modules.adaptive_merge import AdaptiveMerge
from lightning_merge.modules.distilled import DistilledEncoder
from lightning_merge.modules.encoder import Encoder, ImageProcessor, TextProcessor, build_vit
from lightning_merge.modules.export import ExportFineTuned
from lightning_merge.modules.finetune import FineTune
from lightning_merge.modules.folder import base_sha256
from lightning_merge.modules.heads import (
    ClassEmbeddingHead,
    HeadInfo,
    LinearHead,
    class_embeddings,
    load_head,
    orthonormal_embeddings,
    save_head,
)
from lightning_merge.modules.lora import LoraSettings
from lightning_merge.modules.surgery import RepresentationSurgery

__all__ = [
    "AdaptiveMerge",
    "ClassEmbeddingHead",
    "DistilledEncoder",
    "Encoder",
    "ExportFineTuned",
    "FineTune",
    "HeadInfo",
    "ImageProcessor",
    "LinearHead",
    "LoraSettings",
    "RepresentationSurgery",
    "TextProcessor",
    "base_sha256",
    "build_vit",
    "class_embeddings",
    "load_head",
    "orthonormal_embeddings",
    "save_head",
]
