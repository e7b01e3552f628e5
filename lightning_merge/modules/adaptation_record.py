"""What an adapted folder says of itself: what it was learned from, read again where it is scored, and told at the end.

A score means something else where test rows, even without labels, or validation labels took part; the folder says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from lightning_merge.data import TaskStreams
from lightning_merge.errors import UserError
from lightning_merge.methods import available_methods
from lightning_merge.modules.correctors import FILE as CORRECTORS
from lightning_merge.run_folder import run_options

FILE = "adaptation.json"
VALIDATION = "validation labels"
UNKNOWN = "not recorded"


def learned_from(trainer: L.Trainer, run: Path | None, start: Any = None, supervised: bool = False) -> dict[str, Any]:
    """Return the rows that a fit has seen, and all data that has chosen anything in its result.

    Args:
        trainer: The fit's, with its data.
        run: The run that the models are from, if any.
        start: The folder of a merge that was started from, or a file in it, if any.
        supervised: Whether an objective takes labels.

    Returns:
        ``split``, or ``None`` where the stream is none of ``TaskStreams``, and ``selection``.
    """
    data = getattr(trainer, "datamodule", None)
    split = data.split if isinstance(data, TaskStreams) else None
    rows = {"train": "training", "dev": "validation", None: "stream"}.get(split, split)
    parts = []
    if isinstance(start, (str, Path)):
        place = Path(start)
        parts += selection_of(place.parent if place.is_file() else place).split(" + ")
    if run is not None and _patience(run):
        parts.append(VALIDATION)
    if any(isinstance(callback, EarlyStopping) and "val" in str(callback.monitor) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        parts.append(VALIDATION)
    parts.append(f"{rows} labels" if supervised else f"unlabeled {split or 'stream'}")
    return {"split": split, "selection": _joined(parts)}


def read_record(folder: Path) -> dict[str, Any]:
    """Return what stands in ``adaptation.json`` of a folder; nothing where there is none or it is damaged."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def selection_of(folder: Path, record: Mapping[str, Any] | None = None) -> str:
    """Return the data that chose anything in a model, by what is kept beside it.

    Args:
        folder: The model's.
        record: What :func:`read_record` gives, where it is known; of an empty one the file is read.

    Returns:
        As in a table: ``unlabeled test``, ``none`` for a merge without data, ``not recorded`` where nothing says it.
    """
    record = record or read_record(folder)
    parts = []
    # What a run has written knows also of what it started from.
    for kind in ("merge", "adapt"):
        made = _json(folder.resolve().parent.parent / ".stages" / f"{kind}-{folder.resolve().name}.json").get("result")
        if folder.resolve().parent.name == "merged" and isinstance(made, dict) and made.get("selection"):
            parts += str(made["selection"]).split(" + ")
    if record.get("selection"):
        parts += str(record["selection"]).split(" + ")
    if not parts:
        parts = ["none" if not (folder / FILE).is_file() and _without_data(folder) else UNKNOWN]
    return _joined(parts)


def replaces(output: Path, merge: Path | None) -> bool:
    """Whether a folder to be written goes in the place of an earlier one, and not beside the merge that it is."""
    return output.is_dir() and any(output.iterdir()) and (merge is None or output.resolve() != merge.resolve())


def tell(output: Path, run: Path | None, replaced: bool) -> None:
    """Say in one line what has been written where, and how it is scored.

    Args:
        output: The folder.
        run: The run that the models are from, if any.
        replaced: Whether an earlier folder went.
    """
    further = {"coefficients.safetensors": "coefficients", CORRECTORS: "correctors", "adaptation": "trace"}
    holds = ["weights", "heads", "record", *(told for place, told in further.items() if (output / place).exists())]
    earlier = "; an earlier folder was replaced" if replaced else ""
    name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in output.name)
    score = f"Use it: lightning_merge.load('{output}')"
    if run is not None:
        score = f"Score it: lightning-merge evaluate --run {run} --models '{{{name}: {output}}}'"
    rank_zero_info(f"The merged model is in {output} ({', '.join(holds)}{earlier}). {score}")


def _joined(parts: list[str]) -> str:
    return " + ".join(dict.fromkeys(part for part in parts if part != "none")) or "none"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _without_data(folder: Path) -> bool:
    """Whether a merge's record names methods that ask no data."""
    recipe = _json(folder / "merge.json").get("recipe")
    method = recipe.get("method") if isinstance(recipe, dict) else None
    named = method.get("class_path") if isinstance(method, dict) else method
    kind = available_methods().get(str(named).rpartition(".")[2])
    return kind is not None and not kind.needs_score


def _patience(run: Path) -> bool:
    """Whether the fine-tuned models of a run were chosen on validation rows."""
    try:
        settings = run_options(run).get("finetune")
    except UserError:
        return False
    return isinstance(settings, dict) and settings.get("patience") is not None
