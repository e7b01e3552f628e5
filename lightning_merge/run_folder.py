"""What a finished run offers to later stages: base, fine-tuned models, heads, and the settings it was made with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_merge.errors import UserError, unknown


@dataclass(frozen=True)
class RunParts:
    """The models of a run.

    Args:
        base: Folder of the pretrained model.
        models: For each task the folder of the model fine-tuned on it.
        heads: For each task the file of its head.
    """

    base: Path
    models: dict[str, Path]
    heads: dict[str, Path]


def run_parts(run: str | os.PathLike[str], tasks: list[str] | None = None) -> RunParts:
    """Find the models of a run whose fine-tuning is finished.

    Args:
        run: The output folder of ``lightning-merge run``.
        tasks: The tasks, in this order; by default all of the run.

    Raises:
        UserError: The folder is no run, a model is missing, or a task is not the run's.
    """
    folder = Path(run)
    settings = run_options(folder)
    found = sorted(path.stem for path in (folder / "heads").glob("*.safetensors"))
    known = _task_names(settings) or found
    chosen = known if tasks is None else list(tasks)
    for task in chosen:
        if task not in known:
            raise unknown(f"task of the run '{folder}'", task, known)
    parts = RunParts(
        folder / "base",
        {task: folder / "finetuned" / task for task in chosen},
        {task: folder / "heads" / f"{task}.safetensors" for task in chosen},
    )
    needed = [parts.base / "config.json", *parts.heads.values()]
    needed += [model / "model.safetensors" for model in parts.models.values()]
    missing = [path for path in needed if not path.is_file()]
    if missing or not chosen:
        lacks = f"lacks '{missing[0].relative_to(folder)}'" if missing else "has no fine-tuned models"
        raise UserError(
            f"The run '{folder}' is not finished: it {lacks}. Finish it with lightning-merge run --config "
            f"{folder / 'run.yaml'} --output {folder}."
        )
    return parts


def run_options(folder: Path) -> dict[str, Any]:
    """Return the resolved options that a run was made with, as plain data.

    Raises:
        UserError: The folder is no run.
    """
    path = folder / "run.yaml"
    if not path.is_file():
        raise UserError(
            f"'{folder}' is no run: it holds no run.yaml. Expected the output folder of lightning-merge run."
        )
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
        options["data"]["class_path"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is damaged ({error}). Expected what lightning-merge run wrote.") from error
    return options


def _task_names(options: dict[str, Any]) -> list[str]:
    """The tasks that a run names itself, if it does not take all of its data."""
    return list((options["data"].get("init_args") or {}).get("tasks") or [])
