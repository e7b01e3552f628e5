"""Adapters written as PEFT saves them, so that PEFT loads them: factors, tensors held whole, config."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_merge.weights.adapter_config import CONFIG_FILE, is_inside
from lightning_merge.weights.adapter_names import WRAPPER
from lightning_merge.weights.adapters import WEIGHTS_FILE
from lightning_merge.weights.writer import save_safetensors


@dataclass(frozen=True)
class Factors:
    """The update of one module: ``up @ down``, as the module sees it.

    Attributes:
        kind: What PEFT is to make of the module.
        up: ``(out, r)``.
        down: ``(r, in)``; the kernel's axes flattened for a convolution.
        shape: Of the base's tensor.
    """

    kind: Literal["linear", "embedding", "conv"]
    up: Tensor
    down: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Rank that PEFT is told."""
        return self.up.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of PEFT's file, by their ends; fp32."""
        up, down = self.up.to(torch.float32), self.down.to(torch.float32)
        if self.kind == "embedding":
            return {"lora_embedding_A": down, "lora_embedding_B": up}
        if self.kind == "conv":
            ones = (1,) * (len(self.shape) - 2)
            down, up = down.reshape(-1, *self.shape[1:]), up.reshape(*up.shape, *ones)
        return {"lora_A.weight": down, "lora_B.weight": up}


def as_matrix(delta: Tensor, kind: str, transposed: bool) -> Tensor:
    """Return an update as its module sees it, ``(out, in)``, from the base's orientation."""
    if kind == "embedding" or transposed:
        return delta.T
    return delta.flatten(1)


def write_lora(
    folder: Path,
    factors: Mapping[str, Factors],
    whole: Mapping[str, Tensor],
    modules_to_save: Iterable[str] = (),
    fan_in_fan_out: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a LoRA adapter whose scaling is 1 everywhere.

    Args:
        folder: An existing folder.
        factors: Updates by the modules' names, as PEFT's model has them.
        whole: Tensors held whole, by their names in the model: of modules to save, or biases.
        modules_to_save: Modules among whose tensors those are.
        fan_in_fan_out: Whether the base stores its matrices as (in, out).
        settings: Further entries of the config.
    """
    saved = sorted(modules_to_save)
    tensors = {f"{name}.{end}": value for name, held in factors.items() for end, value in held.tensors().items()}
    modes = {"none"}
    for name, value in whole.items():
        module, _, leaf = name.rpartition(".")
        inside = module in factors
        if not is_inside(module, saved):
            modes.add("lora_only" if inside else "all")
        tensors[f"{module}.base_layer.{leaf}" if inside else name] = value.to(torch.float32)
    ranks = {name: held.rank for name, held in sorted(factors.items())}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "revision": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "target_modules": _exactly(list(ranks)),
        "modules_to_save": saved or None,
        "bias": next(mode for mode in ("all", "lora_only", "none") if mode in modes),
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        **(settings or {}),
    }
    _write(folder, tensors, config)


def write_ia3(
    folder: Path,
    vectors: Mapping[str, Tensor],
    feedforward: Iterable[str],
    whole: Mapping[str, Tensor],
    modules_to_save: Iterable[str] = (),
    fan_in_fan_out: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write an (IA)³ adapter: vectors by the modules' names, those of ``feedforward`` on the input; see
    :func:`write_lora` for the rest."""
    tensors = {f"{name}.ia3_l": value.to(torch.float32) for name, value in vectors.items()}
    tensors |= {name: value.to(torch.float32) for name, value in whole.items()}
    config = {
        "peft_type": "IA3",
        "base_model_name_or_path": None,
        "task_type": None,
        "revision": None,
        "inference_mode": True,
        "target_modules": _exactly(sorted(vectors)),
        "feedforward_modules": sorted(feedforward),
        "modules_to_save": sorted(modules_to_save) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "init_ia3_weights": True,
        **(settings or {}),
    }
    _write(folder, tensors, config)


def _exactly(names: list[str]) -> list[str] | str:
    """Name modules so that PEFT adapts no others: a listed name also means every name that ends in it."""
    if any(other != name and other.endswith(f".{name}") for name in names for other in names):
        return "|".join(re.escape(name) for name in names)
    return names


def _write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    save_safetensors({WRAPPER + name: value for name, value in sorted(tensors.items())}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
