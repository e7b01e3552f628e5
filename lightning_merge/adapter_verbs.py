"""The verbs ``adapters`` (merge PEFT adapters into one) and ``extract`` (take an adapter out of a full model)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_merge.errors import UserError

if TYPE_CHECKING:
    from lightning_merge.adapters import AdapterReport

# Matrices whose errors are printed one by one; beyond, the worst of them.
_SHOWN = 40


def adapters(arguments: Sequence[str]) -> int:
    """Merge PEFT adapters over one base into one adapter, exactly or truncated to a rank."""
    from lightning_merge.adapters import merge_adapters
    from lightning_merge.methods import MergeMethod, SimpleAverage
    from lightning_merge.parsing import build, make_parser

    parser = make_parser("adapters", adapters.__doc__)
    parser.add_argument("--config", action="config", help="a YAML with any of these options")
    parser.add_argument("--method", type=MergeMethod, default=SimpleAverage(), help="see: lightning-merge methods")
    parser.add_argument(
        "--transforms", type=list[MergeMethod], default=[], help="applied to the task vectors, in order"
    )
    parser.add_argument("--base", type=str | None, help="the model the adapters were trained over")
    parser.add_argument("--adapters", type=dict[str, str], default={}, help="adapter folders: '{cars: A, sun: B}'")
    parser.add_argument("--output", type=str | None, help="a new folder")
    parser.add_argument("--rank", type=int | None, help="truncate to it; by default linear methods are exact")
    parser.add_argument("--knots", action="store_true", help="merge in a basis the adapters share (KnOTS)")
    parser.add_argument("--seed", type=int, default=0, help="of the methods that draw at random")
    parser.add_argument("--ignore", type=list[str] | str, default=[], help="pattern(s) of whole tensors that stay out")
    parser.add_argument(
        "--rename", type=dict[str, str] | None, help="from the adapters' names to the base's: '{PATTERN: REPLACEMENT}'"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that stands at the output")
    options, _ = build(parser, arguments)
    if options.base is None:
        raise UserError("No base. Expected --base REF, the model the adapters were trained over.")
    if options.output is None:
        raise UserError("No output. Expected --output FOLDER.")
    report = merge_adapters(
        options.base,
        dict(options.adapters),
        options.output,
        method=options.method,
        transforms=options.transforms,
        rank=options.rank,
        seed=options.seed,
        knots=options.knots,
        ignore=[options.ignore] if isinstance(options.ignore, str) else options.ignore,
        overwrite=options.overwrite,
        rename=dict(options.rename) if options.rename else None,
    )
    _print(report, f"Merged {len(options.adapters)} adapters")
    return 0


def extract(arguments: Sequence[str]) -> int:
    """Write what fine-tuning changed in a full model as a LoRA adapter, with the error of every matrix."""
    from lightning_merge.adapters import extract_adapter
    from lightning_merge.parsing import build, make_parser

    parser = make_parser("extract", extract.__doc__)
    parser.add_argument("--config", action="config", help="a YAML with any of these options")
    parser.add_argument("--base", type=str | None, help="the pretrained model")
    parser.add_argument("--model", type=str | None, help="the fine-tuned model")
    parser.add_argument("--output", type=str | None, help="a new folder")
    parser.add_argument("--rank", type=int | None, help="of each matrix; 16 by default")
    parser.add_argument("--energy", type=float | None, help="in place of a rank: part of the squared singular values")
    parser.add_argument(
        "--target", type=list[str] | str | None, help="ends of modules' names, or one pattern; by default all linear"
    )
    parser.add_argument("--rest", type=str, default="lose", help="other changes: lose (and say so), or save whole")
    parser.add_argument("--ignore", type=list[str] | str, default=[], help="pattern(s) of tensors that stay out")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that stands at the output")
    options, _ = build(parser, arguments)
    for name in ("base", "model", "output"):
        if getattr(options, name) is None:
            raise UserError(f"No {name}. Expected --{name} {'FOLDER' if name == 'output' else 'REF'}.")
    report = extract_adapter(
        options.base,
        options.model,
        options.output,
        rank=options.rank,
        energy=options.energy,
        target=options.target,
        rest=options.rest,
        ignore=[options.ignore] if isinstance(options.ignore, str) else options.ignore,
        overwrite=options.overwrite,
    )
    _print(report, "Extracted an adapter")
    return 0


def _print(report: AdapterReport, done: str) -> None:
    """Say what is exact, how near the rest is, and what is missing."""
    for note in report.notes:
        print(f"WARN: {note}", file=sys.stderr)
    worst = sorted(report.errors, key=lambda name: (-report.errors[name], name))
    shown = sorted(report.errors) if len(worst) <= _SHOWN else worst[:_SHOWN]
    if shown:
        width = max(len(name) for name in shown)
        print(f"{'module':<{width}}  rank  relative error")
        for name in shown:
            print(f"{name:<{width}}  {report.ranks[name]:>4}  {report.errors[name]:.3g}")
        if len(shown) < len(worst):
            print(f"({len(worst) - len(shown)} more matrices, each nearer)")
    for name, norm in sorted(report.lost.items()):
        print(f"WARN: the change of '{name}' (norm {norm:.3g}) is not in the adapter.", file=sys.stderr)
    if report.errors:
        print(f"{done}: {len(worst)} matrices, relative error {report.error:.3g} over all. {report.output}")
    else:
        print(f"{done}, exactly to the rounding of fp32. {report.output}")
