"""Run a recipe of mergekit with our engine: every document is a merge, the last is the output."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_merge.errors import UserError
from lightning_merge.mergekit.plan import RecipePlan, read_recipe
from lightning_merge.merging import MergeReport, merge_parts
from lightning_merge.outputs import is_folder

RECIPE_FILE = "mergekit_config.yml"


def run_recipe(
    recipe: str | Path,
    output: str | Path,
    on_plan: Callable[[RecipePlan], None] = lambda plan: None,
    **options: Any,
) -> list[MergeReport]:
    """Merge what a recipe of mergekit describes.

    Args:
        recipe: A YAML file, or its text.
        output: A folder. Of several documents the one without a name stands there, and the others are removed when it
            is done; where all have names, each has a folder of its name inside.
        on_plan: Called with each document before it is merged.
        options: As for :func:`~lightning_merge.merging.merge`: ``seed``, ``overwrite``, ``dry_run``, and so on.

    Returns:
        A report for each document, in the order in which they ran.

    Raises:
        UserError: Something in the recipe is unknown, not supported, or does not fit the models; nothing is written.

    Cost: see :func:`~lightning_merge.merging.merge`, for each document.
    """
    output = Path(output)
    if not is_folder(output):
        raise UserError(f"A recipe makes a model's folder, not the file '{output}'. Expected --output FOLDER.")
    text = Path(recipe).read_text(encoding="utf-8") if _is_file(recipe) else str(recipe)
    plans = read_recipe(recipe)
    for plan in plans:
        if plan.name is not None and (plan.name in {".", ".."} or not re.fullmatch(r"[\w.-]+", plan.name)):
            raise UserError(
                f"A document is called '{plan.name}'. Expected the plain name of a folder, such as 'stage-1'."
            )
    unnamed = [plan for plan in plans if plan.name is None]
    stages = output.with_name(output.name + ".stages") if unnamed else output
    reports = []
    for plan in plans:
        on_plan(plan)
        place = output if plan.name is None else stages / plan.name
        # A stage is ours alone: what an earlier run left there of another recipe is of no use.
        how = {**options, "overwrite": True} if unnamed and plan.name and (place / "merge.json").is_file() else options
        report = merge_parts(
            plan.parts,
            place,
            recipe={"recipe": text, "seed": options.get("seed", 0), "rounding": options.get("rounding", "nearest")},
            dtype=plan.dtype,
            companions={**plan.companions, RECIPE_FILE: plan.recipe},
            findings=plan.findings,
            **how,
        )
        if not options.get("dry_run"):
            plan.planned.written(place)
        reports.append(report)
    if unnamed and not options.get("dry_run"):
        for plan in plans:
            if plan.name is not None:
                shutil.rmtree(stages / plan.name, ignore_errors=True)
        with suppress(OSError):  # whatever else stands there is not ours
            stages.rmdir()
    return reports


def _is_file(recipe: str | Path) -> bool:
    try:
        return Path(recipe).is_file()
    except OSError:  # a text too long for a name
        return False
