"""Which parameter of a live module is which tensor of the models' files.

A checkpoint's names are the module's own. Files of transformers are named otherwise than its modules, and a module of
the user's may hold such a model in an attribute: both are found out, never guessed from shapes or positions.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_merge.errors import UserError, nearest

# What wrappers put into names: torch.compile, DistributedDataParallel, checkpoint wrappers.
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def parameter_names(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], prefix: str | None = None
) -> dict[str, str]:
    """Map each tensor to the module's parameter (or buffer) of the same place.

    Args:
        module: The live module.
        shapes: The tensors' names and shapes.
        prefix: What stands before the tensors' names in the module (``model.``); found out by default.

    Returns:
        The module's names by tensor name. Two tensors may go to one tied parameter.

    Raises:
        UserError: A tensor has no counterpart, or one of another shape; several prefixes fit equally well.

    Cost: a module of transformers is asked for the names of its files once, by a save of one number a tensor.
    """
    named = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    own: dict[str, str] = {}
    for name in named:
        own.setdefault(_WRAPPERS.sub("", name), name)
    known = dict(own)
    for place, part in _pretrained_models(module):
        for alternative, inner in _file_names(part).items():
            known.setdefault(place + alternative, own.get(_WRAPPERS.sub("", place + inner), place + inner))
    chosen = _best_prefix(list(shapes), known) if prefix is None else prefix
    found: dict[str, str] = {}
    missing = [name for name in shapes if known.get(chosen + name) not in named]
    if missing:
        place = f" under '{chosen}'" if chosen else ""
        raise UserError(
            f"The tensor '{missing[0]}' of the task vectors has no counterpart in {type(module).__name__}{place} "
            f"({len(missing)} of {len(shapes)} have none). Expected the models this module was built from; leave a "
            f"tensor out with TaskVectors.open(..., ignore=[...]).{nearest(chosen + missing[0], known)}"
        )
    for name, shape in shapes.items():
        target = known[chosen + name]
        if tuple(named[target].shape) != tuple(shape):
            raise UserError(
                f"The tensor '{name}' has shape {tuple(shape)} in the task vectors and {tuple(named[target].shape)} "
                f"as '{target}' of {type(module).__name__}. Expected the same architecture."
            )
        found[name] = target
    return found


def _best_prefix(names: Sequence[str], known: Mapping[str, str]) -> str:
    """Return what must stand before the tensors' names so that most of them are known."""
    probe = names[len(names) // 2]
    candidates = {""} | {alternative[: -len(probe)] for alternative in known if alternative.endswith("." + probe)}
    candidates |= {alternative[: -len(names[0])] for alternative in known if alternative.endswith("." + names[0])}
    score = {prefix: sum(prefix + name in known for name in names) for prefix in candidates}
    best = max(score.values())
    if not best:
        raise UserError(
            f"None of the {len(names)} tensors of the task vectors (such as '{probe}') is in the module, whose "
            f"parameters are called like '{next(iter(known), '')}'. Expected the models this module was built from, "
            "or prefix=... if they stand under another name."
        )
    # Files with and without the name that a head puts before them fit the same parameters: the shortest speaks for all.
    places: dict[tuple[str | None, ...], str] = {}
    for prefix in sorted((prefix for prefix in candidates if score[prefix] == best), key=lambda p: (len(p), p)):
        places.setdefault(tuple(known.get(prefix + name) for name in names), prefix)
    winners = list(places.values())
    if len(winners) > 1:
        raise UserError(
            f"The tensors of the task vectors fit in {len(winners)} places of the module: "
            f"{', '.join(repr(prefix) for prefix in winners)}. Expected prefix=... with one of them."
        )
    return winners[0]


def _pretrained_models(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the outermost transformers models of a module with their places; transformers is not imported for it."""
    import sys

    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    places: list[str] = []
    for place, part in module.named_modules():
        if isinstance(part, PreTrainedModel) and not any(place.startswith(outer) for outer in places):
            places.append(place + "." if place else "")
            yield (place + "." if place else ""), part
            if not place:
                return


def _file_names(model: Any) -> dict[str, str]:
    """Map the names that a transformers model gives its tensors in files to those in the module.

    Only ``save_pretrained`` knows how names are turned back: it is given one number for each tensor.
    """
    from safetensors import safe_open

    from lightning_merge.weights.folder import quiet_transformers

    inner = list(model.state_dict())
    tags = {name: torch.full((1,), float(place)) for place, name in enumerate(inner)}
    # Of several processes transformers lets the first one save; here each needs the names, in a folder of its own.
    decides = "should_save_on_this_rank"
    if hasattr(model, decides):
        setattr(model, decides, lambda *_, **__: True)
    with tempfile.TemporaryDirectory(prefix="lightning-merge-names-") as folder, quiet_transformers():
        try:
            model.save_pretrained(folder, state_dict=tags, max_shard_size="1000GB")
            with safe_open(str(Path(folder) / "model.safetensors"), framework="pt") as saved:
                stored = {name: inner[int(saved.get_tensor(name).item())] for name in saved.keys()}  # noqa: SIM118
        except Exception:  # a conversion that needs whole tensors; its files then name themselves as the module does
            return {}
        finally:
            model.__dict__.pop(decides, None)
    found: dict[str, str] = {}
    base = f"{model.base_model_prefix}."
    for name, target in stored.items():
        found[name] = target
    for name, target in stored.items():
        # A base model's file may or may not have the name that heads put before it.
        found.setdefault(name.removeprefix(base), target)
        found.setdefault(base + name, target)
    return found
