"""The verbs ``fit``, ``validate``, ``test`` and ``predict``: Lightning's own command line with this package's classes.

``FineTune``, ``AdaptiveMerge``, ``ExportFineTuned`` and the datamodules of ``lightning_merge.data`` go by their short
names, classes of the user by their import paths (``--model my_package.MyModule``). ``--run runs/x`` takes models, heads
and data from a finished run.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

# For their names: jsonargparse finds a class by its short name once it is imported.
import lightning_merge.data
import lightning_merge.modules  # noqa: F401
from lightning_merge.errors import UserError
from lightning_merge.methods import MergeMethod
from lightning_merge.objectives import Objective
from lightning_merge.parsing import keep_yaml_keys_as_text, refusal
from lightning_merge.run_folder import run_options, run_parts

VERBS = {
    "fit": "Fine-tune one model on one task, or learn a merge on an unlabeled stream (--run FOLDER).",
    "validate": "Score a model on validation rows.",
    "test": "Score a model on test rows.",
    "predict": "Give class probabilities for the rows of the test set.",
}
SEED = 0
# Where --run fills in what a run knows.
STREAMS, MODEL = "TaskStreams", "AdaptiveMerge"


class KeepConfig(SaveConfigCallback):
    """Keep the configuration beside the logs; without logs it would go over a config.yaml in the current folder."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write it where there is a logger."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class MergeCLI(LightningCLI):
    """LightningCLI with ``FineTune`` as the model where none is named, and errors that are raised, not printed."""

    def __init__(self) -> None:
        options = {"exit_on_error": False}
        verbs = {
            verb: {**options, "prog": f"lightning-merge {verb}", "description": text} for verb, text in VERBS.items()
        }
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=KeepConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=SEED,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_kwargs={**options, "prog": "lightning-merge", **verbs},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take ``FineTune`` where no model class is named, so that ``--model.base`` is enough."""
        # Not otherwise: another class would get FineTune's defaults for the settings that have the same name.
        if not _names(sys.argv[1:], "model"):
            parser.set_defaults({"model": {"class_path": "lightning_merge.modules.FineTune"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; what is refused is told in one sentence."""
        try:
            super().parse_arguments(parser, args)
        except (ArgumentError, ValueError, TypeError) as error:
            verb = self._subcommand_parsers.get(sys.argv[1], parser)
            options = [text for action in verb._actions for text in action.option_strings]
            told = refusal(error, options)
            if re.match("Missing: --data\\b", str(told)) and _names(sys.argv[1:], "data", STREAMS):
                raise UserError(
                    f"Missing: --run FOLDER, the output of lightning-merge run, which holds the models, heads and data "
                    f"that lightning-merge {sys.argv[1]} takes; or --data.data with the tasks' data."
                ) from error
            raise told from error

    def instantiate_classes(self) -> None:
        """Build the objects; the parser hides in its own errors what a class has to say of its settings."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, UserError):
                    raise cause from None
                cause = cause.__cause__ or cause.__context__
            raise

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the Trainer; what it refuses is a setting of the user's."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:
            raise UserError(f"Trainer: {error}") from error


def main(arguments: Sequence[str]) -> int:
    """Run one verb of Lightning's Trainer.

    Args:
        arguments: The verb and its options, such as ``["fit", "--config", "configs/finetune/digits.yaml"]``.

    Returns:
        0; what goes wrong is raised.

    Raises:
        UserError: An option, class or task that is not known, or data that cannot be used.
    """
    keep_yaml_keys_as_text()
    set_parsing_settings(subclasses_enabled=[MergeMethod, Objective])
    try:
        with _command_line(with_run(arguments)), warnings.catch_warnings():
            # FineTune tokenizes itself on purpose, and small loaders need no workers.
            warnings.filterwarnings("ignore", ".*on_before_batch_transfer.*")
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*isinstance.treespec.*")
            # A merge is learned in evaluation mode, on streams that are tasks and not one data set.
            warnings.filterwarnings("ignore", ".*module.s. in eval mode.*")
            MergeCLI()
    except ArgumentError as error:
        raise refusal(error) from error
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    return 0


def with_run(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which ``--run FOLDER`` has become what the run knows: its models, heads and data.

    Options that are given besides have precedence, wherever they stand; configurations have not.

    Args:
        arguments: The verb and its options.

    Raises:
        UserError: The folder is no run, is not finished, or is given twice or not at all.
    """
    rest, folders, configs = [], [], []
    given = iter(arguments)
    for argument in given:
        name, sign, value = argument.partition("=")
        if name == "--run":
            folders.append(value if sign else next(given, ""))
        elif name in ("--config", "-c"):
            configs += [argument] if sign else [argument, next(given, "")]
        else:
            rest.append(argument)
    if not folders:
        return list(arguments)
    if len(folders) > 1 or not folders[0] or folders[0].startswith("--"):
        raise UserError(f"--run is given as {', '.join(folders) or 'nothing'}. Expected one folder of a finished run.")
    run_parts(folders[0])
    filled = [] if _names(arguments, "model") else ["--model", MODEL]
    filled += ["--model.run", folders[0]]
    if not _names(rest, "data"):
        filled += [] if _names(configs, "data") else ["--data", STREAMS]
        filled += ["--data.data", json.dumps(run_options(Path(folders[0]))["data"])]
    return [*rest[:1], *configs, *filled, *rest[1:]]


def _names(arguments: Sequence[str], part: str, wanted: str = "") -> bool:
    """Whether arguments, or configurations among them, name a (``wanted``) class of the model or of the data."""
    options = (f"--{part}", f"--{part}.class_path")
    for position, argument in enumerate(arguments):
        name, sign, value = argument.partition("=")
        if name in options and wanted in (value if sign else "".join(arguments[position + 1 : position + 2])):
            return True
        if name in ("--config", "-c"):
            text = value if sign else next(iter(arguments[position + 1 : position + 2]), "")
            try:
                path = Path(text)
                content = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else text)
            except (OSError, ValueError, yaml.YAMLError):
                continue  # the parser says what is wrong with it
            inside = content.get(arguments[0], content) if isinstance(content, dict) else {}
            named = inside.get(part) if isinstance(inside, dict) else None
            if isinstance(named, dict):
                named = named.get("class_path")
            if isinstance(named, str) and wanted in named:
                return True
    return False


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Let ``sys.argv`` be the arguments: from there LightningCLI reads them and ``ddp`` starts its processes."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before
