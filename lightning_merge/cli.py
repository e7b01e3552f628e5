"""The verbs of ``lightning-merge``; each imports what it needs when it runs, so that help and merges start fast."""

from __future__ import annotations

import inspect
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_merge.errors import UserError, unknown

if TYPE_CHECKING:
    from lightning_merge.merging import MergeReport
    from lightning_merge.weights import Finding

VERBS = {
    "run": "fine-tune, merge, evaluate and report, from one YAML; resumes where it stopped",
    "fit": "fine-tune one model, or learn a merge of a run, with Lightning (likewise validate, test, predict)",
    "validate": "",
    "test": "",
    "predict": "",
    "merge": "merge files or folders of weights into one",
    "adapters": "merge PEFT adapters into one adapter",
    "extract": "take a LoRA adapter out of a full fine-tuning",
    "evaluate": "show the table of a run, and score further models on its tasks",
    "methods": "list every merge method, or explain one",
}
USAGE = "usage: lightning-merge VERB [options]   (lightning-merge VERB --help explains a verb)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 1 a part failed, 2 the input cannot be used."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in {"-h", "--help"}:
        print(_help())
        return 0
    if given[0] == "--version":
        from lightning_merge import __version__

        print(f"lightning-merge {__version__}")
        return 0
    verb, rest = given[0], given[1:]
    try:
        if verb not in VERBS:
            raise unknown("verb", verb, VERBS)
        return _HANDLERS.get(verb, _lightning)(rest if verb in _HANDLERS else given)
    except UserError as error:
        print(f"lightning-merge {verb}: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # a parser that printed its help
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        kept = " What was finished is kept; the same command goes on from there." if verb in {"run", "merge"} else ""
        print(f"\nStopped.{kept}", file=sys.stderr)
        return 130


def _help() -> str:
    lines = [USAGE, "", (inspect.getdoc(sys.modules["lightning_merge"]) or ""), "", "verbs:"]
    lines += [f"  {name:<10} {text}" for name, text in VERBS.items() if text]
    lines += ["", "options:", "  --version  print the version", "  --help     print this"]
    return "\n".join(lines)


# --- merge --------------------------------------------------------------------------------------------------------


def _merge(arguments: Sequence[str]) -> int:
    """Merge fine-tuned models, file to file, in bounded memory."""
    from lightning_merge.merging import merge
    from lightning_merge.methods import MergeMethod
    from lightning_merge.parsing import build, make_parser
    from lightning_merge.task_vectors import TaskVectors

    parser = make_parser("merge", _merge.__doc__)
    parser.add_argument("--config", action="config", help="a YAML with any of these options, such as OUT/merge.yaml")
    by_recipe = _names_recipe(arguments)
    if by_recipe:
        parser.add_argument("--recipe", type=str, required=True, help="a recipe of mergekit: its file, or its text")
    else:
        parser.add_argument("--method", type=MergeMethod, required=True, help="see: lightning-merge methods")
        parser.add_argument(
            "--transforms", type=list[MergeMethod], default=[], help="applied to the task vectors, in order"
        )
        parser.add_argument(
            "--base", type=str | None, help="the pretrained model: folder, file, or owner/name@revision"
        )
        parser.add_argument(
            "--models", type=dict[str, str], default={}, help="the fine-tuned models, or adapters: '{cars: A, sun: B}'"
        )
        parser.add_argument("--recipe", type=str | None, help="instead of all these: a recipe of mergekit, unchanged")
        parser.add_argument(
            "--ignore", type=list[str] | str, default=[], help="pattern(s) of tensors kept as the base's"
        )
        parser.add_argument(
            "--prefix", type=str, default="", help="for checkpoints: keep names with this prefix and drop it"
        )
        parser.add_argument("--batch_norm", type=str, default="average", help="BatchNorm statistics: average or base")
        parser.add_argument(
            "--dtype", type=str | None, help="float32, bfloat16, float16 or float64; by default the base's"
        )
    parser.add_argument("--output", type=str | None, help="a folder, a .safetensors file or a Lightning .ckpt file")
    parser.add_argument("--seed", type=int, default=0, help="of the methods that draw at random")
    parser.add_argument(
        "--rounding", type=str, default="nearest", help="into bfloat16: nearest, or stochastic (seeded)"
    )
    parser.add_argument(
        "--max_shard_size", type=int | str | None, default="5GB", help="of a file in the output folder; null for one"
    )
    parser.add_argument("--num_workers", type=int, default=1, help="processes; any number gives the same bytes")
    parser.add_argument("--threads", type=int | None, help="threads of each process; by default the cores are shared")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--dry_run", action="store_true", help="check and plan; write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")
    options, _ = build(parser, arguments)
    if options.output is not None and Path(options.output).suffix in {".pt", ".pth", ".bin", ".gguf"}:
        raise UserError(
            f"The output '{options.output}' names a file of a kind that is not written. "
            "Expected a folder, or a .safetensors or .ckpt file."
        )
    if options.output is None:
        raise UserError("No output. Expected --output FOLDER (or a .safetensors or .ckpt file).")
    how = {
        name: getattr(options, name)
        for name in ("seed", "overwrite", "dry_run", "max_shard_size", "num_workers", "threads", "rounding", "device")
    }
    if by_recipe:
        return _merge_recipe(options.recipe, options.output, how)
    if options.batch_norm not in {"average", "base"}:
        raise unknown("batch_norm", options.batch_norm, ["average", "base"])
    ignore = [options.ignore] if isinstance(options.ignore, str) else options.ignore
    task_vectors = TaskVectors.open(
        options.base, options.models, ignore, options.prefix, batch_norm=options.batch_norm, strict=not options.dry_run
    )
    _print_findings([f for f in task_vectors.findings if options.dry_run or f.level != "INFO"])
    if any(finding.level == "ERROR" for finding in task_vectors.findings):
        print("These models cannot be merged as they are. Nothing was written.")
        return 2
    with _progress(f"merging {len(task_vectors)} models") as on_progress:
        report = merge(
            options.method,
            task_vectors,
            options.output,
            transforms=options.transforms,
            dtype=options.dtype,
            on_progress=on_progress,
            **how,
        )
    _print_findings([f for f in report.findings if f.level == "WARN" and f not in task_vectors.findings])
    return _tell(report, options.dry_run)


def _names_recipe(arguments: Sequence[str]) -> bool:
    """Tell whether a recipe of mergekit is given, on the command line or in the file given as ``--config``."""
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--recipe":
            return True
        if name == "--config":
            path = Path(value or (arguments[position + 1] if position + 1 < len(arguments) else ""))
            if path.is_file() and re.search(
                r"^merge_method:", path.read_text(encoding="utf-8", errors="replace"), re.M
            ):
                raise UserError(f"'{path}' looks like a recipe of mergekit. Expected --recipe {path}.")
            if path.is_file() and re.search(r"^recipe:", path.read_text(encoding="utf-8", errors="replace"), re.M):
                return True
    return False


def _merge_recipe(recipe: str, output: str, how: dict[str, Any]) -> int:
    """Merge every document of a recipe."""
    from lightning_merge.mergekit.run import run_recipe

    level = {"INFO"} if not how["dry_run"] else set()
    with _progress("merging") as on_progress:
        reports = run_recipe(
            recipe,
            output,
            on_plan=lambda plan: _print_findings([f for f in plan.findings if f.level not in level]),
            on_progress=on_progress,
            **how,
        )
    return max(_tell(report, how["dry_run"]) for report in reports)


def _tell(report: MergeReport, dry_run: bool) -> int:
    """Say what a merge did or would do; a dry run that found an ERROR exits 2."""
    if dry_run:
        _print_findings([finding for finding in report.findings if finding.level == "ERROR"])
        print(report.plan)
        print(f"Would write {report.bytes_written / 1e6:,.1f} MB to {report.output}. Nothing was written.")
        return 2 if any(finding.level == "ERROR" for finding in report.findings) else 0
    if report.discarded_tensors:
        print(f"Unfinished work of another merge at this place was dropped ({report.discarded_tensors} tensors).")
    if report.resumed_tensors:
        print(f"Resumed: {report.resumed_tensors} tensors had been finished by an earlier process.")
    if report.already_there:
        print(f"{report.output} already holds this very merge. Nothing to do.")
    else:
        print(
            f"Merged in {report.seconds:.2f} s (+ {report.hashing_seconds:.2f} s hashing): {report.passes} passes, "
            f"{report.bytes_read / 1e6:,.1f} MB read, {report.bytes_written / 1e6:,.1f} MB written, "
            f"peak memory {report.peak_memory_bytes / 1e6:,.0f} MB. {report.output}"
        )
    return 0


def _print_findings(findings: Sequence[Finding]) -> None:
    for finding in findings:
        print(finding, file=sys.stderr)


class _progress:  # noqa: N801 - used like a function
    """A bar that appears after two seconds, on a terminal only."""

    def __init__(self, what: str) -> None:
        self.what, self.started = what, time.monotonic()
        self.bar: Any = None
        self.task: Any = None
        self.terminal = sys.stderr.isatty()

    def __enter__(self) -> Callable[[int, int], None]:
        return self.update

    def update(self, done: int, total: int) -> None:
        """Show how far it is."""
        if not self.terminal or (self.bar is None and time.monotonic() - self.started < 2):
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=total)
        self.bar.update(self.task, completed=done)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def _methods(arguments: Sequence[str]) -> int:
    from lightning_merge.method_pages import methods

    return methods(arguments)


# --- run and evaluate ---------------------------------------------------------------------------------------------

QUICKSTART = "configs/quickstart.yaml"
DEFAULT_OUTPUT = "runs/run"


def _run(arguments: Sequence[str]) -> int:
    """Fine-tune, merge, evaluate and report. Stages whose inputs have not changed are not done again."""
    from lightning_merge.parsing import build, make_parser
    from lightning_merge.pipeline import run
    from lightning_merge.run_settings import RunSettings, add_run_arguments, check_entries

    parser = make_parser("run", _run.__doc__)
    parser.add_argument("--config", action="config", help=f"the run's YAML; {QUICKSTART} where it stands")
    add_run_arguments(parser)
    parser.add_argument("--output", type=str, default=DEFAULT_OUTPUT, help="the run's folder")
    parser.add_argument("--overwrite", action="store_true", help="do every stage again")
    if not any(a.split("=")[0] in {"--config", "-h", "--help"} for a in arguments):
        # An earlier run goes on with its own settings; without one, the quick start is meant.
        for config in (_output_of(arguments) / "run.yaml", Path(QUICKSTART)):
            if config.is_file():
                arguments = ["--config", str(config), *arguments]
                break
    check_entries(arguments)
    options, resolved = build(parser, arguments)
    return run(RunSettings.of(options), Path(options.output), resolved, overwrite=options.overwrite)


def _output_of(arguments: Sequence[str]) -> Path:
    """The value of ``--output`` before anything is parsed."""
    for position, argument in enumerate(arguments):
        if argument.startswith("--output="):
            return Path(argument.partition("=")[2])
        if argument == "--output" and position + 1 < len(arguments):
            return Path(arguments[position + 1])
    return Path(DEFAULT_OUTPUT)


def _evaluate(arguments: Sequence[str]) -> int:
    """Score the models of a run, and others over its base, on its tasks and with its heads; print the table."""
    from lightning_merge.parsing import build, make_parser
    from lightning_merge.scoring import evaluate_run

    parser = make_parser("evaluate", _evaluate.__doc__)
    parser.add_argument("--config", action="config", help="a YAML with any of these options")
    parser.add_argument("--run", type=str, required=True, help="the run's folder")
    parser.add_argument("--models", type=dict[str, str], default={}, help="further models: '{mine: path}'")
    parser.add_argument(
        "--output", type=str | None, help="a folder for results.*; by default only the table is printed"
    )
    options, _ = build(parser, arguments)
    return evaluate_run(Path(options.run), options.models, Path(options.output) if options.output else None)


def _lightning(arguments: Sequence[str]) -> int:
    """Hand fit, validate, test and predict to LightningCLI."""
    from lightning_merge.lightning_cli import main as lightning_main

    return lightning_main(arguments)


def _adapters(arguments: Sequence[str]) -> int:
    from lightning_merge.adapter_verbs import adapters

    return adapters(arguments)


def _extract(arguments: Sequence[str]) -> int:
    from lightning_merge.adapter_verbs import extract

    return extract(arguments)


_HANDLERS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": _run,
    "merge": _merge,
    "adapters": _adapters,
    "extract": _extract,
    "evaluate": _evaluate,
    "methods": _methods,
}


def entry() -> None:
    """The console script."""
    sys.exit(main())
