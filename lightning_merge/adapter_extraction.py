"""Which changes of a fine-tuned model a LoRA adapter can hold, and the nearest ones of low rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_merge.adapter_merging import MergedAdapters
from lightning_merge.errors import UserError, nearest
from lightning_merge.low_rank import rank_for_energy, truncate
from lightning_merge.weights import WeightSource
from lightning_merge.weights.adapter_config import is_named
from lightning_merge.weights.adapter_layout import is_conv1d
from lightning_merge.weights.adapter_names import OUTPUT_LAYERS, rename_in_models
from lightning_merge.weights.adapter_writer import Factors, as_matrix
from lightning_merge.weights.compatibility import counterpart, ignored

Kind = Literal["linear", "embedding", "conv"]


@dataclass
class Extracted:
    """What an adapter is to hold.

    Attributes:
        merged: Factors by module and whole tensors, by the names of the model.
        lost: Norms of the changes left out, by the base's tensor.
        saved: Modules held whole.
        transposed: Whether the base stores its matrices as (in, out).
        notes: What a user should know.
    """

    merged: MergedAdapters = field(default_factory=MergedAdapters)
    lost: dict[str, float] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    transposed: bool = False
    notes: list[str] = field(default_factory=list)


def kind_of(name: str, shape: tuple[int, ...]) -> Kind | None:
    """Tell from its name and shape what kind of module a tensor is the matrix of; ``None`` for other tensors."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or len(shape) < 2:
        return None
    last = module.rsplit(".", 1)[-1].lower()
    if len(shape) == 2 and ("embed" in last or last in {"wte", "wpe", "shared"}):
        return "embedding"
    return "linear" if len(shape) == 2 else "conv"


def extract(
    base: WeightSource,
    model: WeightSource,
    target: Sequence[str] | str | None,
    rank: int,
    energy: float | None,
    save_rest: bool,
    ignore: Sequence[str] = (),
) -> Extracted:
    """Take the changes of a model apart; see :func:`~lightning_merge.adapters.extract_adapter`.

    Raises:
        UserError: The target names no matrix, or no matrix differs.
    """
    found, rest = Extracted(), {}
    architecture = (base.config or {}).get("model_type")
    names = [name for name, info in base.tensors.items() if info.dtype.is_floating_point and not ignored(name, ignore)]
    matrices = [name for name in names if kind_of(name, base.tensors[name].shape)]
    modules = {name: rename_in_models(name, architecture).rpartition(".")[0] for name in names}
    chosen = {
        name
        for name in matrices
        if (kind_of(name, base.tensors[name].shape) == "linear" if target is None else is_named(target, modules[name]))
    }
    if not chosen:
        known = sorted({modules[name].rsplit(".", 1)[-1] for name in matrices})
        wanted = target if isinstance(target, str) else ", ".join(target or ["any linear module"])
        raise UserError(f"'{wanted}' names no module with a matrix. Known: {', '.join(known)}.{nearest(wanted, known)}")
    for name in sorted(names):
        change = _change(base, model, name)
        if not change.any():
            continue
        kind = kind_of(name, base.tensors[name].shape)
        if name not in chosen or kind is None:
            rest[name] = change.norm().item()
            continue
        transposed = kind == "linear" and bool(is_conv1d(base, modules[name]))
        found.transposed |= transposed
        matrix = as_matrix(change, kind, transposed)
        low = truncate(matrix, rank if energy is None else rank_for_energy(matrix, energy))
        found.merged.truncated[modules[name]] = low
        found.merged.factors[modules[name]] = Factors(kind, low.up, low.down, base.tensors[name].shape)
    if not found.merged.factors:
        raise UserError(f"'{model.label}' equals '{base.label}' in every module to take. Expected a fine-tuned model.")
    for name, norm in rest.items():
        if not (save_rest and _save(found, base, model, name, modules)):
            found.lost[name] = norm
    if tied := next((name for name in sorted(chosen) if is_tied(base, name)), None):
        found.notes.append(
            f"'{tied}' is one tensor with the output layer: PEFT changes that layer too once the adapter is merged "
            "(merge_and_unload), but not before."
        )
    if save_rest and found.lost:
        found.notes.append(
            "PEFT saves whole modules only: what stands beside other modules, or is tied to the output layer, is lost."
        )
    return found


def is_tied(base: WeightSource, name: str) -> bool:
    """Tell whether a tensor is the embedding of a model whose output layer is the same tensor."""
    if name in base.aliases.values():
        return True
    config = base.config or {}
    has_output = any(re.search("LM|Generation|PreTraining", kind) for kind in config.get("architectures") or ())
    return bool(
        config.get("tie_word_embeddings")
        and has_output
        and kind_of(name, base.tensors[name].shape) == "embedding"
        and base.tensors[name].shape[0] == config.get("vocab_size")
        and not any(other.split(".")[-2:-1] == [layer] for other in base.tensors for layer in OUTPUT_LAYERS)
    )


def _change(base: WeightSource, model: WeightSource, name: str) -> Tensor:
    """W − W₀ in fp64."""
    return _value(base, model, name) - base.read(name).to("cpu", torch.float64)


def _value(base: WeightSource, model: WeightSource, name: str) -> Tensor:
    stored = counterpart(base, name, model)
    assert stored is not None  # the models' headers have been compared
    return model.read(stored).to("cpu", torch.float64)


def _save(found: Extracted, base: WeightSource, model: WeightSource, name: str, modules: dict[str, str]) -> bool:
    """Hold a tensor whole: as a bias of an adapted module, or with its module; tell whether PEFT can do that."""
    module, leaf = modules[name], name.rpartition(".")[2]
    if module in found.merged.factors:
        if leaf != "bias":
            return False
        found.merged.whole[f"{module}.{leaf}"] = _value(base, model, name)
        return True
    if is_tied(base, name):
        return False  # its own copy would untie it
    prefix = name.rpartition(".")[0] + "."
    siblings = [other for other in base.tensors if other.startswith(prefix)]
    if any("." in other.removeprefix(prefix) for other in siblings):
        return False
    for other in siblings:
        found.merged.whole[f"{module}.{other.removeprefix(prefix)}"] = _value(base, model, other)
    if module not in found.saved:
        found.saved.append(module)
    return True
