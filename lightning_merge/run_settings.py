"""The settings of ``run``: what one YAML may say, and what is refused before anything is done."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml

from lightning_merge.adapt_settings import AdaptSettings
from lightning_merge.data import Corruption, TaskData
from lightning_merge.errors import UserError, nearest, unknown
from lightning_merge.methods import MergeMethod, Transform, available_methods
from lightning_merge.modules.tuning import FineTuneSettings, PretrainSettings

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


@dataclass
class VariantSettings:
    """One more fine-tuning of a task, as an ingredient of soups.

    Args:
        task: The task it learns.
        seed: Of its order of rows and of dropout; the head is the task's.
        module: Settings of ``FineTune`` in which it differs.
        max_epochs: Where it differs.
    """

    task: str
    seed: int = 1
    module: dict[str, Any] = field(default_factory=dict)
    max_epochs: int | None = None


@dataclass
class MergeSettings:
    """One merge of a run.

    Args:
        name: Its name in tables and its folder in ``merged/``.
        method: The merge method.
        transforms: Applied to the task vectors first, in order.
        grid: Settings to choose on validation rows, never on test rows: ``{method.scale: [0.1, 0.3]}``, or
            ``{transforms.0.eta: [...]}``.
        models: The fine-tuned models that are merged; by default one for each task.
    """

    name: str
    method: MergeMethod
    transforms: list[MergeMethod] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    models: list[str] | None = None

    def candidates(self) -> list[tuple[dict[str, Any], MergeMethod, list[MergeMethod]]]:
        """Return every combination of the grid, with the method and transforms it means."""
        found = []
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            method, transforms = self.method, list(self.transforms)
            for key, value in chosen.items():
                where, _, setting = key.rpartition(".")
                if where in {"", "method"}:
                    method = _changed(method, setting, value, self.name)
                elif where.startswith("transforms.") and where[11:].isdigit() and int(where[11:]) < len(transforms):
                    index = int(where[11:])
                    transforms[index] = _changed(transforms[index], setting, value, self.name)
                else:
                    raise UserError(
                        f"Merge '{self.name}': the grid's key '{key}' names no setting. Expected method.SETTING, or "
                        f"transforms.N.SETTING with N below {len(transforms)}."
                    )
            found.append((chosen, method, transforms))
        return found


@dataclass
class EvaluateSettings:
    """What the table holds besides test rows and out-of-domain sets.

    Args:
        corruptions: Such as ``typos-3``; those made for another kind of input are passed over.
        precision: Of the encoder while models are scored: ``32-true``, or ``bf16-mixed`` for speed.
        device: Where models are scored: ``cpu``, ``cuda``, ..., or ``auto`` for a GPU where there is one.
    """

    corruptions: list[str] = field(default_factory=list)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    device: str = "auto"

    def chosen_device(self) -> str:
        """Return the device that ``auto`` means."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class RunSettings:
    """One run: a base, tasks, how to fine-tune, the merges, and what is evaluated.

    Args:
        data: The tasks; a LightningDataModule of ``lightning_merge.data``.
        base: The pretrained model: a folder, ``package:NAME/FOLDER``, or ``owner/name@revision``.
        pretrain: Make the base instead, by training a small vision transformer on the data's ``pretrain`` task.
        finetune: How each task is learned.
        variants: Further fine-tunings by name, for soups.
        merges: The merges.
        adapt: The merges that learn on a stream, in this order, after the others; each may start from one before it.
        evaluate: What is evaluated.
        seed: Of everything drawn at random.
    """

    data: TaskData
    base: str | None = None
    pretrain: PretrainSettings | None = None
    finetune: FineTuneSettings = field(default_factory=FineTuneSettings)
    variants: dict[str, VariantSettings] = field(default_factory=dict)
    merges: list[MergeSettings] = field(default_factory=list)
    adapt: list[AdaptSettings] = field(default_factory=list)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    seed: int = 0

    @classmethod
    def of(cls, options: Namespace) -> RunSettings:
        """Pick the settings out of parsed options."""
        return cls(**{spec.name: getattr(options, spec.name) for spec in fields(cls)})

    def check(self) -> None:
        """Check names and grids before any stage starts.

        Raises:
            UserError: No base or two, a repeated or reserved name, an unknown task, model, setting or corruption, or
                a merge that its method or transforms cannot do with its models.
        """
        if (self.base is None) == (self.pretrain is None):
            raise UserError("A run needs either 'base' (a pretrained model) or 'pretrain' (settings to make one).")
        if self.pretrain is not None:
            self.pretrain.check("pretrain")
        self.finetune.check("finetune")
        for name, variant in self.variants.items():
            self._check_variant(name, variant)
        merged = [spec.name for spec in self.merges]
        names = merged + [spec.name for spec in self.adapt]
        for name in names:
            if names.count(name) > merged.count(name) > 0:
                raise UserError(
                    f"The adaptation's name '{name}' is taken by a merge, which has the folder merged/{name}. "
                    "Expected each name once among merges and adaptations."
                )
            if names.count(name) > 1 or name in {"pretrained", "individual"} or not _is_name(name):
                raise UserError(
                    f"The merge's name '{name}' cannot be used. Expected letters, digits, - and _, each name "
                    "once, and neither 'pretrained' nor 'individual'."
                )
        before: dict[str, MergeSettings | AdaptSettings] = {}
        for spec in self.merges:
            self._check_merge(spec)
            before[spec.name] = spec
        for adaptation in self.adapt:
            adaptation.check(self.data, before, self.seed)
            before[adaptation.name] = adaptation
        for corruption in self.evaluate.corruptions:
            Corruption.parse(corruption)

    def _check_variant(self, name: str, variant: VariantSettings) -> None:
        tasks = self.data.task_names
        if name in tasks or not _is_name(name):
            raise UserError(
                f"The variant's name '{name}' cannot be used. Expected letters, digits, - and _, and no task's name."
            )
        if variant.task not in tasks:
            raise unknown(f"task of the variant '{name}'", variant.task, tasks)
        replace(self.finetune, module=variant.module, max_epochs=variant.max_epochs or 1).check(f"variants.{name}")

    def _check_merge(self, spec: MergeSettings) -> None:
        known = [*self.data.task_names, *self.variants]
        if spec.models is not None and not spec.models:
            raise UserError(f"Merge '{spec.name}': models is empty. Known: {', '.join(known)}.")
        for model in spec.models or []:
            if model not in known:
                raise unknown(f"model of the merge '{spec.name}'", model, known)
            if (spec.models or []).count(model) > 1:
                raise UserError(f"Merge '{spec.name}': the model '{model}' is listed twice.")
        for key, values in spec.grid.items():
            if not values:
                raise UserError(f"Merge '{spec.name}': the grid's '{key}' has no values. Expected a list of them.")
        chosen = spec.models or self.data.task_names
        for _, method, transforms in spec.candidates():
            for transform in transforms:
                if not isinstance(transform, Transform):
                    accepted = [name for name, kind in available_methods().items() if issubclass(kind, Transform)]
                    raise UserError(
                        f"Merge '{spec.name}': {type(transform).__name__} is a merge method, not a transform of task "
                        f"vectors. Accepted transforms: {', '.join(sorted(accepted))}."
                    )
            for step in [*transforms, method]:
                try:
                    if not step.varying:  # a setting that varies is checked against the tensors, later
                        step.check_models(chosen)
                except UserError as error:
                    raise UserError(f"Merge '{spec.name}': {error}") from error


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add the settings of a run to a parser."""
    parser.add_class_arguments(RunSettings, None)


def check_entries(arguments: Sequence[str]) -> None:
    """Refuse an entry of ``merges`` or ``adapt`` in a configuration that has a setting which is not one.

    The parser refuses it, too, without saying which entry it is.

    Args:
        arguments: The options of ``run``.

    Raises:
        UserError: With the entry's name, the setting and the nearest spelling.
    """
    kinds = {"merges": MergeSettings, "adapt": AdaptSettings}
    for position, argument in enumerate(arguments):
        name, sign, value = argument.partition("=")
        if name != "--config":
            continue
        path = Path(value if sign else "".join(arguments[position + 1 : position + 2]))
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser says what is wrong with it
        for part, kind in kinds.items():
            entries = content.get(part) if isinstance(content, dict) else None
            known = [spec.name for spec in fields(kind)]
            for number, entry in enumerate(entries if isinstance(entries, list) else ()):
                for key in entry if isinstance(entry, dict) and not entry.keys() <= {"class_path", "init_args"} else ():
                    if key not in known:
                        called = f"'{entry['name']}'" if "name" in entry else f"number {number + 1}"
                        raise unknown(f"setting of the entry {called} in {part}", str(key), known)


def _changed(step: MergeMethod, setting: str, value: Any, merge_name: str) -> MergeMethod:
    """Return a step with one setting changed; the step checks the value."""
    known = [spec.name for spec in fields(step)]
    if setting not in known:
        raise UserError(
            f"Merge '{merge_name}': {type(step).__name__} has no setting '{setting}'. "
            f"Known: {', '.join(known)}.{nearest(setting, known)}"
        )
    return replace(step, **{setting: value})


def _is_name(text: str) -> bool:
    """Whether a text can name a folder and a row."""
    return re.fullmatch(r"[A-Za-z0-9_-]+", text) is not None
