"""Quantised models: 8-bit floats are read as what they stand for, every other form is refused by name.

An 8-bit float is a number like any other and is read exactly. Where a scale stands beside a tensor of them (one for the
tensor, one for each row, or one for each block, as DeepSeek and Qwen publish their models), the tensor is a stored code
and the weight is code × scale. A merge needs the weights, so they are restored tensor by tensor, in fp32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.weights.source import WeightSource
from lightning_merge.weights.tensor_info import TensorInfo

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The number of each of the 256 codes: looking it up takes a fifth of the time of torch's conversion.
_NUMBERS = {dtype: torch.arange(256, dtype=torch.uint8).view(dtype).float() for dtype in FP8}
# Scales of a weight, by what follows the weight's own name; in spite of its name ``scale_inv`` multiplies, too.
WEIGHT_SCALES = ("_scale_inv", "_scale")
# Scales of activations and caches: they serve inference in 8 bits and are no weights.
ACTIVATION_SCALES = re.compile(r"(.*\.)?(input|act|activation|output|k|v|q|kv|prob)_scale(_ub|_inv)?")
RESTORED_ENTRIES = 1 << 22  # at a time, so that a large matrix needs no second copy of itself
REMEDY = (
    "Expected weights in floating point: dequantise the training base first (for instance with transformers: "
    "from_pretrained, dequantize(), save_pretrained), or take the model as it was before quantisation."
)
# How the names of tensors give a quantisation away where no config does.
_GIVEN_AWAY = (
    (re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\..*)$|\.SCB$"), "bitsandbytes"),
    (re.compile(r"\.g_idx$"), "GPTQ"),
    (re.compile(r"\.(qweight|qzeros)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(weight_packed|weight_zero_point)$"), "compressed-tensors"),
    (re.compile(r"\.weight_scale_2$"), "NVFP4 (modelopt)"),
    (re.compile(r"weight_qdata$"), "torchao"),
    (re.compile(r"\.weight\._(data|scale)$"), "quanto"),
)
_SPELLED = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "gguf": "GGUF",
}


def restored(source: WeightSource) -> WeightSource:
    """Return a source whose tensors are weights: itself, or a view in which 8-bit floats are read as fp32.

    Args:
        source: Any opened source; its ``config.json``, if it has one, says how it was quantised.

    Raises:
        UserError: It is quantised in another form (bitsandbytes, GPTQ, AWQ, MXFP4, torchao, ...), which is named; or an
            8-bit tensor lacks its scale, or has one that does not fit.

    Cost: names, shapes and config only; later each piece is restored when it is asked for.
    """
    settings = quantization_settings(source.config or {})
    form = _other_form(settings)
    if form:
        raise UserError(f"'{source.label}' is quantised by {form}, as its config.json says. {REMEDY}")
    for name, info in source.tensors.items():
        form = next((form for pattern, form in _GIVEN_AWAY if pattern.search(name)), None)
        if info.dtype == torch.uint8 and name.endswith("_blocks") and f"{name[:-7]}_scales" in source.tensors:
            form = "MXFP4"
        if info.dtype in (torch.int8, torch.uint8) and f"{name}_scale" in source.tensors:
            form = form or "8-bit integers with scales"
        if form:
            raise UserError(f"'{source.label}' is quantised by {form}, as its tensor '{name}' shows. {REMEDY}")
    if not any(info.dtype in FP8 for info in source.tensors.values()):
        return source
    return DequantisedSource(source, settings)


def refuse_quantized_file(path: Path) -> None:
    """Refuse a file of a format that holds quantised weights only, by its suffix or first bytes; or a folder of them.

    Raises:
        UserError: It is a GGUF or GGML file, or a folder that holds one and no safetensors file.
    """
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in {".gguf", ".ggml"}]
        if files and next(path.glob("*.safetensors"), None) is None:
            refuse_quantized_file(files[0])
        return
    begin = b""
    if path.is_file():
        with path.open("rb") as stream:
            begin = stream.read(4)
    for form in ("GGUF", "GGML"):
        if path.suffix.lower() == f".{form.lower()}" or begin in {form.encode(), form.lower().encode()}:
            raise UserError(f"'{path}' is a {form} file, which holds a model quantised for llama.cpp. {REMEDY}")


def quantization_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a ``config.json`` says about quantisation, under whichever of its names; empty if nothing."""
    nested = config.get("text_config")
    for holder in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(holder.get(key), Mapping) and holder[key]:
                return dict(holder[key])
    return {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` for restored weights: without the entries that would have them read as codes."""
    kept = {key: value for key, value in config.items() if key not in {"quantization_config", "compression_config"}}
    return {
        key: without_quantization(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in kept.items()
    }


def _other_form(settings: Mapping[str, Any]) -> str | None:
    """Name the quantisation that settings state, unless there is none or it is one by 8-bit floats."""
    if not settings:
        return None
    method = str(settings.get("quant_method", "")).lower()
    bits = next((settings[key] for key in ("bits", "w_bit", "nbits") if settings.get(key)), None)
    if "bitsandbytes" in method or settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method, bits = "bitsandbytes", 8 if settings.get("load_in_8bit") else 4
    elif method in {"fp8", "fbgemm_fp8"}:
        return None
    elif method in {"compressed-tensors", "modelopt"}:
        groups = settings.get("config_groups") or {}
        schemes = [group.get("weights") or {} for group in groups.values() if isinstance(group, Mapping)]
        floats = [scheme.get("type", "float") == "float" and scheme.get("num_bits", 8) == 8 for scheme in schemes]
        form = str(settings.get("quant_algo") or settings.get("format") or "unnamed format")
        plain = form in {"FP8", "float-quantized", "naive-quantized"} and all(floats)
        sparse = str((settings.get("sparsity_config") or {}).get("format") or "dense")
        if plain and sparse == "dense":
            return None
        return f"{method} ({sparse if plain else form})"
    called = _SPELLED.get(method, method or "a method it does not name")
    return f"{called} ({bits} bit)" if bits else called


def _stated_block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share one scale, where the settings state them."""
    groups = settings.get("config_groups")
    schemes = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, Mapping) else []
    stated = [settings.get("weight_block_size"), *(scheme.get("block_structure") for scheme in schemes)]
    for block in stated:
        sizes = re.findall(r"\d+", str(block))
        if len(sizes) == 2 and all(int(size) for size in sizes):
            return int(sizes[0]), int(sizes[1])
    return None


@dataclass(frozen=True)
class _Scale:
    """One scale for each block of a tensor's matrices: which tensor holds them, seen as (matrices, rows, columns)."""

    name: str
    shape: tuple[int, int, int]
    block: tuple[int, int]


class DequantisedSource(WeightSource):
    """A view of a source: 8-bit floats appear as the fp32 weights they stand for, their scales do not appear.

    Args:
        inner: A source with tensors of 8-bit floats.
        settings: What its config says about them.
    """

    def __init__(self, inner: WeightSource, settings: Mapping[str, Any]) -> None:
        self.label = inner.label
        self.inner = (inner,)
        self.folder, self.files, self.prefix = inner.folder, inner.files, inner.prefix
        self.buffers, self.metadata = inner.buffers, inner.metadata
        self._scales: dict[str, _Scale] = {}
        for name in [name for name, info in inner.tensors.items() if info.dtype in FP8]:
            scale = next((name + end for end in WEIGHT_SCALES if name + end in inner.tensors), None)
            if scale is not None:
                self._scales[name] = _fitted(inner, name, scale, _stated_block(settings))
            else:
                _require_plain(inner, name, stated=bool(settings))
        hidden = {scale.name for scale in self._scales.values()}
        modules = {name.rpartition(".")[0] for name in self._scales}
        hidden |= {
            name
            for name in inner.tensors
            if ACTIVATION_SCALES.fullmatch(name) and (settings or name.rpartition(".")[0] in modules)
        }
        self.tensors = {
            name: TensorInfo(info.shape, torch.float32) if info.dtype in FP8 else info
            for name, info in inner.tensors.items()
            if name not in hidden
        }
        self.aliases = {alias: owner for alias, owner in inner.aliases.items() if owner not in hidden}

    @property
    def config(self) -> dict[str, Any] | None:
        """The ``config.json`` of the folder, without what it says about quantisation."""
        config = super().config
        return config if config is None else without_quantization(config)

    def read(self, name: str) -> Tensor:
        """Return a tensor; 8-bit floats in fp32, in memory of its own."""
        stored = self.aliases.get(name, name)
        info = self.tensors[stored]
        if self.inner[0].tensors[stored].dtype not in FP8:
            return self.inner[0].read(stored)
        whole = torch.empty(info.numel, dtype=torch.float32)
        for start in range(0, info.numel, RESTORED_ENTRIES):
            stop = min(start + RESTORED_ENTRIES, info.numel)
            whole[start:stop] = self.read_flat(stored, start, stop)
        return whole.reshape(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return a flat piece; of 8-bit floats only the piece and its scales are read."""
        stored = self.aliases.get(name, name)
        values = self.inner[0].read_flat(stored, start, stop)
        if values.dtype not in FP8:
            return values
        weights = _NUMBERS[values.dtype].index_select(0, values.view(torch.uint8).int())
        if stored in self._scales and stop > start:
            scale = self._scales[stored]
            factors = self.inner[0].read(scale.name).float().reshape(scale.shape)
            weights *= _factors(factors, scale.block, self.tensors[stored].shape, start, stop)
        return weights


def _factors(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Return the factor of each entry of a flat piece of a tensor, from a scale (matrices, rows, columns) of blocks."""
    if scale.numel() == 1:
        return scale.reshape(())
    height, width = shape[-2:]
    rows = torch.arange(start // width, -(-stop // width))
    matrix = rows // height if scale.shape[0] > 1 else torch.zeros_like(rows)
    of_rows = scale[matrix, (rows % height) // block[0]]  # (rows of the piece, blocks across)
    entries = of_rows.repeat_interleave(block[1], dim=1)[:, :width].reshape(-1)
    skipped = start - (start // width) * width
    return entries[skipped : skipped + stop - start]


def _fitted(source: WeightSource, name: str, scale: str, block: tuple[int, int] | None) -> _Scale:
    """Tell which entries share a scale, from the shapes and the block that the config states."""
    shape, found = source.tensors[name].shape, source.tensors[scale].shape
    if source.tensors[scale].dtype.is_floating_point:
        if math.prod(found) == 1:
            return _Scale(scale, (1, 1, 1), (1, 1))
        if len(shape) >= 2:
            leading, (height, width) = shape[:-2], shape[-2:]
            matrices = math.prod(leading)
            if block and found == (*leading, -(-height // block[0]), -(-width // block[1])):
                return _Scale(scale, (matrices, found[-2], found[-1]), block)
            if found in ((*leading, height, 1), (height,)) and not (leading and len(found) == 1):
                return _Scale(scale, (matrices, height, 1), (1, width))
            if found == (*leading, 1, width):
                return _Scale(scale, (matrices, 1, width), (height, 1))
            if leading and found in ((*leading, 1, 1), leading):
                return _Scale(scale, (matrices, 1, 1), (height, width))
    stated = f"in blocks of {block[0]} x {block[1]}" if block else "and no weight_block_size in its config.json"
    raise UserError(
        f"Tensor '{name}' of '{source.label}' has shape {list(shape)}, its scale '{scale}' shape {list(found)} "
        f"({source.tensors[scale].dtype}) {stated}: they do not fit. "
        "Expected one scale for the tensor, for each row, or for each block."
    )


def _require_plain(source: WeightSource, name: str, stated: bool) -> None:
    """Refuse to take codes for weights: an 8-bit float that should have a scale, or has one under another name."""
    module = name.rpartition(".")[0]
    beside = [
        other
        for other in source.tensors
        if "scale" in other.rpartition(".")[2] and other.rpartition(".")[0] == module and other != name
    ]
    if beside:
        raise UserError(
            f"Tensor '{name}' of '{source.label}' is an 8-bit float, and beside it stands '{beside[0]}', a scale in a "
            f"form that is not known. {REMEDY}"
        )
    if stated:
        raise UserError(
            f"Tensor '{name}' of '{source.label}' is an 8-bit float and its config.json states a quantisation, but the "
            f"scale '{name}_scale' or '{name}_scale_inv' is missing. Expected every 8-bit tensor beside its scale."
        )
