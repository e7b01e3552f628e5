"""What the ``adapter_config.json`` of a PEFT adapter says, and which adapters are exact updates of a base's weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_merge.errors import UserError, nearest

CONFIG_FILE = "adapter_config.json"
ACCEPTED = "Accepted: LoRA (rank-stabilised and DoRA too) and (IA)³ adapters, as PEFT saves them."
# Initialisations that take the first product of the factors out of the base's own weights. PEFT's conversion to a
# plain LoRA writes init_lora_weights: true.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Entries of a LoRA config that make it something else than W₀ + ΔW, each with what it is.
_VARIANTS = {
    "alora_invocation_tokens": "an activated LoRA, which acts on some tokens only",
    "arrow_config": "an Arrow router over several adapters",
    "kasa_config": "a KaSA adapter, which truncates the base's weights",
    "layer_replication": "an adapter over replicated layers",
    "megatron_config": "an adapter of Megatron's parallel layers",
    "monteclora_config": "a MonteCLoRA adapter",
    "target_parameters": "an adapter of stacked parameters (of experts) rather than modules",
    "trainable_token_indices": "an adapter with single trainable tokens",
    "use_bdlora": "a block-diagonal LoRA",
    "use_qalora": "a QA-LoRA over quantised weights",
    "velora_config": "a VeLoRA adapter",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter that its weights depend on.

    Attributes:
        path: The file.
        content: All of it.
    """

    path: Path
    content: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """``"LORA"`` or ``"IA3"``."""
        return str(self.content["peft_type"])

    @property
    def use_dora(self) -> bool:
        """Whether magnitudes of their own scale the rows (arXiv 2402.09353)."""
        return bool(self.content.get("use_dora"))

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores its matrices as (in, out)."""
        return bool(self.content.get("fan_in_fan_out"))

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Modules that the adapter holds whole."""
        return tuple(self.content.get("modules_to_save") or ())

    @property
    def bias(self) -> str:
        """``"none"``, ``"all"`` or ``"lora_only"``: which biases were trained."""
        return str(self.content.get("bias") or "none")

    def rank(self, module: str) -> int:
        """Rank of one module's update: ``r``, or what ``rank_pattern`` says for it."""
        return int(self._for_module("rank_pattern", "r", module))

    def scaling(self, module: str) -> float:
        """By what the product of a module's factors is multiplied: α / r, or α / √r if rank-stabilised (2312.03732)."""
        alpha, rank = float(self._for_module("alpha_pattern", "lora_alpha", module)), self.rank(module)
        return alpha / math.sqrt(rank) if self.content.get("use_rslora") else alpha / rank

    def _for_module(self, patterns: str, default: str, module: str) -> Any:
        given = self.content.get(patterns) or {}
        found = next((key for key in given if re.match(rf"(.*\.)?({key})$", module)), None)
        return given[found] if found is not None else self.content[default]

    def saves(self, module: str) -> bool:
        """Tell whether a module, or one that holds it, is among ``modules_to_save``."""
        return is_inside(module, self.modules_to_save)

    def targets(self, module: str) -> bool:
        """Tell whether PEFT would adapt a module of this name; whatever kind of module it is."""
        content = self.content
        excluded = content.get("exclude_modules")
        if excluded and is_named(excluded, module):
            return False
        wanted = content.get("target_modules")
        if wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear"):
            return True
        return is_named(wanted, module) and (isinstance(wanted, str) or self._in_layers(module))

    def _in_layers(self, module: str) -> bool:
        """Tell whether a module belongs to one of ``layers_to_transform``."""
        layers = self.content.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.content.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            # Any list of modules must have a name before it, a named one need not; the first number counts.
            before = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
            if found := re.match(rf"{before}{pattern}\.(\d+)\.", module):
                return int(found.group(1)) in ([layers] if isinstance(layers, int) else layers)
        return False

    def is_feedforward(self, module: str) -> bool:
        """Tell whether an (IA)³ vector of this module multiplies its input instead of its output."""
        given = self.content.get("feedforward_modules") or ()
        if isinstance(given, str):
            return re.fullmatch(given, module) is not None
        return any(module.endswith(name) for name in given)


def is_inside(module: str, saved: Iterable[str]) -> bool:
    """Tell whether a module is one of those named by their whole names or ends, or lies inside one."""
    return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in saved)


def is_named(wanted: str | Sequence[str], module: str) -> bool:
    """Match as PEFT does: a text is a regular expression for the whole name, a list holds names or their ends."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def read_adapter_config(folder: Path, label: str) -> AdapterConfig:
    """Read an adapter's config and refuse what is no exact update of the base's weights.

    Args:
        folder: The adapter's folder.
        label: How messages call it.

    Raises:
        UserError: There is no config, or it describes an adapter that no single set of weights can represent.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"'{label}' is no PEFT adapter: it holds no {CONFIG_FILE}. {ACCEPTED}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = str(content["peft_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is no config of a PEFT adapter ({error!r}). {ACCEPTED}") from error
    if kind not in {"LORA", "IA3"}:
        raise UserError(f"The adapter '{label}' is of the type {kind}. {ACCEPTED}{nearest(kind, ['LORA', 'IA3'])}")
    if kind == "LORA":
        _check_lora(content, label)
    return AdapterConfig(path, content)


def _check_lora(content: Mapping[str, Any], label: str) -> None:
    started = content.get("init_lora_weights", True)
    if isinstance(started, str) and started.lower().startswith(_CHANGE_THE_BASE):
        raise UserError(
            f"The adapter '{label}' was initialised by '{started}', which changed the base's own weights: over the "
            "original base it is another model. Expected a plain LoRA: save it with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...); or, where the base given is the "
            f"changed one, set init_lora_weights to true in {CONFIG_FILE}."
        )
    for entry, what in _VARIANTS.items():
        if content.get(entry):
            raise UserError(f"The adapter '{label}' is {what} ({entry} in {CONFIG_FILE}). {ACCEPTED}")
    for entry in ("r", "lora_alpha"):
        value = content.get(entry)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or (entry == "r" and value < 1):
            raise UserError(f"The config of the adapter '{label}' has {entry}: {value!r}. Expected a number above 0.")
