"""Tensors in and out of files and modules: opened lazily, checked from headers, written whole or not at all."""

from lightning_merge.weights.compatibility import Finding, find_incompatibilities
from lightning_merge.weights.hashing import fingerprint, sha256_of_file, sha256_of_source
from lightning_merge.weights.memory import peak_memory_bytes, private_memory_bytes, reset_peak_memory
from lightning_merge.weights.opening import open_weights, read_checkpoint, resolve_path
from lightning_merge.weights.source import (
    MemorySource,
    SafetensorsSource,
    WeightSource,
)
from lightning_merge.weights.tensor_info import TensorInfo
from lightning_merge.weights.writer import SafetensorsWriter, save_safetensors

__all__ = [
    "Finding",
    "MemorySource",
    "SafetensorsSource",
    "SafetensorsWriter",
    "TensorInfo",
    "WeightSource",
    "find_incompatibilities",
    "fingerprint",
    "open_weights",
    "peak_memory_bytes",
    "private_memory_bytes",
    "read_checkpoint",
    "reset_peak_memory",
    "resolve_path",
    "save_safetensors",
    "sha256_of_file",
    "sha256_of_source",
]
