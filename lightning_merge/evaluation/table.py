"""The tables of an evaluation: the same columns in the terminal, in Markdown and in the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lightning_merge.evaluation.records import INDIVIDUAL, PRETRAINED, ModelFacts

if TYPE_CHECKING:
    from lightning_merge.evaluation.results import Results

ABSENT = "—"
PLAIN_WIDTH = 110
LEGEND = (
    "Per task: accuracy in % ± binomial standard error; below it the accuracy as a share of the individual model's "
    "(each task by the model fine-tuned on it) and the difference to that model in points, paired over the same rows."
)
MEANS = (
    "Mean, min: raw accuracy over the tasks. Norm.: mean share of the individual model's accuracy. OOD, corrupted: "
    "mean over the tasks that have such sets of the mean over their sets. Bold: best merged model of a column."
)
HONESTY = (
    "Selection names the data that chose something: a scale tuned on validation labels is not data-free, and "
    "adapting to the unlabeled test stream is transductive. By task: the task must be named for the features already, "
    "not for the head alone."
)
BY_TASK = "by task"
CAPTION = (LEGEND, MEANS, HONESTY)


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        header: its title.
        cells: for each row (model) the lines of its cell; the first is the figure, the others stand below, dim.
        best: rows whose figure is the best among the merged models.
        numeric: set to the right.
    """

    header: str
    cells: tuple[tuple[str, ...], ...]
    best: frozenset[int] = frozenset()
    numeric: bool = True


def percent(value: float | None, signed: bool = False) -> str:
    """Format a share as percent with one decimal, ``0.912`` as ``91.2``; with a true minus sign."""
    if value is None:
        return ABSENT
    rounded = round(100.0 * value, 1) + 0.0  # + 0.0 turns -0.0 into 0.0
    text = f"{rounded:+.1f}" if signed else f"{rounded:.1f}"
    return text.replace("-", "−")


def human_count(value: int) -> str:
    """Format a number of parameters with three digits: ``22.7M``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.0f}{unit}" if scaled >= 99.95 else f"{scaled:.1f}{unit}"
    return str(value)


def human_bytes(value: int) -> str:
    """Format bytes in binary units: ``1.2 GiB``; 0 stands for not measured."""
    if value <= 0:
        return ABSENT
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.0f} {unit}" if scaled >= 99.95 else f"{scaled:.1f} {unit}"
    return f"{value} B"


def human_seconds(value: float) -> str:
    """Format a duration: ``0.84 s``, ``12.3 s``, ``2 m 05 s``, ``1 h 02 m``; 0 stands for not measured."""
    if value <= 0:
        return ABSENT
    if value < 59.95:
        return f"{value:.2f} s" if value < 0.995 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d} m" if hours else f"{minutes} m {seconds:02d} s"


def rows(results: Results) -> list[str]:
    """Models in the order of the rows; pretrained and individual always stand there, evaluated or not."""
    return [PRETRAINED, INDIVIDUAL, *(name for name in results.models if name not in (PRETRAINED, INDIVIDUAL))]


def errors(results: Results) -> dict[str, str]:
    """Models that failed, with what went wrong."""
    return {name: error for name in results.models if (error := results.facts(name).error) is not None}


def task_columns(results: Results, paired_stderr: bool = False) -> list[Column]:
    """Build one column a task: accuracy ± standard error; below, share of and difference to the individual model.

    Args:
        results: what to show.
        paired_stderr: give the difference its own line, with its paired standard error.
    """
    columns = []
    for task in results.tasks:
        cells = [_task_cell(results, model, task, paired_stderr) for model in rows(results)]
        columns.append(Column(task, tuple(cells), _best(results, partial(results.accuracy, task=task))))
    return columns


def quality_columns(results: Results) -> list[Column]:
    """Build the columns over all tasks: mean, minimum, share of the individual models, OOD, corrupted, selection."""
    quality: list[tuple[str, Callable[[str], float | None]]] = [
        ("mean", results.mean),
        ("min", results.minimum),
        ("norm. %", results.normalized_mean),
    ]
    if any(results.datasets("ood", task) for task in results.tasks):
        quality.append(("OOD", results.ood_mean))
    if any(results.datasets("corrupted", task) for task in results.tasks):
        quality.append(("corrupted", results.corrupted_mean))
    columns = []
    for header, figure in quality:
        cells = []
        for model in rows(results):
            known = model in results.models
            weakest = results.weakest(model) if known and header == "min" else None
            cells.append((percent(figure(model) if known else None), *([weakest] if weakest else [])))
        columns.append(Column(header, tuple(cells), _best(results, figure)))
    selection: list[tuple[str, ...]] = []
    for model in rows(results):
        facts = results.facts(model) if model in results.models else None
        chosen = ", ".join(f"{key}={value}" for key, value in facts.selected.items()) if facts else ""
        below = [*([chosen] if chosen else []), *([BY_TASK] if facts and facts.needs_task else [])]
        selection.append((facts.selection if facts else ABSENT, *below))
    return [*columns, Column("selection", tuple(selection), numeric=False)]


def cost_columns(results: Results) -> list[Column]:
    """Build the columns of what each model took to make and takes to keep."""
    formats: list[tuple[str, Callable[[ModelFacts], str]]] = [
        ("trained", lambda facts: human_count(facts.trained_parameters)),
        ("stored", lambda facts: human_count(facts.stored_parameters)),
        ("active", lambda facts: human_count(facts.active_parameters)),
        ("time", lambda facts: human_seconds(facts.seconds)),
        ("peak memory", lambda facts: human_bytes(facts.peak_memory_bytes)),
    ]
    made = [results.facts(model) if model in results.models else None for model in rows(results)]
    return [
        Column(header, tuple((ABSENT if m is None or m.error is not None else text(m),) for m in made))
        for header, text in formats
    ]


def _task_cell(results: Results, model: str, task: str, paired_stderr: bool) -> tuple[str, ...]:
    if model not in results.models:
        return (ABSENT,)
    if results.facts(model).error is not None:
        return ("failed",)
    score = results.score(model, task)
    if score is None:
        return (ABSENT,)
    figure = f"{percent(score.value)} ±{percent(score.stderr)}"
    if model == INDIVIDUAL:
        return (figure, "100%")
    share = results.normalized(model, task)
    difference = results.difference(model, task) if INDIVIDUAL in results.models else None
    if difference is None:
        return (figure,)
    shared = [] if share is None else [f"{percent(share)}%"]
    moved = percent(difference.value, signed=True)
    if paired_stderr:
        return (figure, *shared, f"{moved} ±{percent(difference.stderr)}")
    return (figure, " ".join([*shared, moved]))


def _best(results: Results, figure: Callable[[str], float | None]) -> frozenset[int]:
    values = {
        row: value
        for row, model in enumerate(rows(results))
        if model in results.models and results.facts(model).kind == "merged" and (value := figure(model)) is not None
    }
    if len(values) < 2:
        return frozenset()  # best of one says nothing
    top = max(values.values())
    return frozenset(row for row, value in values.items() if value >= top - 1e-12)  # a mean's rounding is no win


class ResultsTable:
    """The tables for rich's console: per task, over all tasks, costs; then what failed and the captions.

    Columns that do not fit the width of the console go into further tables below, with the models' names again.
    """

    def __init__(self, results: Results) -> None:
        self.results = results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield what rich prints."""
        plain = _ascii if options.ascii_only else _same
        width = options.max_width
        for title, columns in (
            ("Accuracy by task", task_columns(self.results)),
            ("Over all tasks", quality_columns(self.results)),
            ("Parameters and cost", cost_columns(self.results)),
        ):
            for part, chosen in enumerate(_fit(columns, rows(self.results), width)):
                yield _table(title if part == 0 else f"{title}, continued", rows(self.results), chosen, plain)
                yield Text()
        for name, error in errors(self.results).items():
            yield Text(plain(f"{name} failed: {error}"), style="red")
        for line in CAPTION:
            yield Text(plain(line), style="dim")


def show(results: Results, console: Console | None = None, file: IO[str] | None = None) -> None:
    """Print the tables; where there is no terminal to tell its width, in plain text of 110 columns."""
    if console is None:
        console = Console(file=file, highlight=False)
        if not console.is_terminal:
            console = Console(file=file, highlight=False, width=PLAIN_WIDTH)
    console.print(results.table())


NAME_WIDTH = 26
TEXT_WIDTH = 20


def _fit(columns: Sequence[Column], names: Sequence[str], width: int) -> list[list[Column]]:
    """Divide columns over as many tables as the width asks for, of about equal numbers of columns."""
    first = min(NAME_WIDTH, max(cell_len(name) for name in [*names, "model"]))
    sizes = [_width(column) for column in columns]
    fitted: list[list[Column]] = []
    room = 0
    for column, size in zip(columns, sizes, strict=True):
        if not fitted or size + 2 > room:
            fitted.append([])
            room = width - first - 1
        fitted[-1].append(column)
        room -= size + 2
    if len(fitted) == 2 and len({column.numeric for column in columns}) == 1:  # 4 + 4 reads better than 7 + 1
        half = (len(columns) + 1) // 2
        return [list(columns[:half]), list(columns[half:])]
    return fitted


def _width(column: Column) -> int:
    longest = max(cell_len(line) for lines in [*column.cells, (column.header,)] for line in lines)
    return longest if column.numeric else min(TEXT_WIDTH, longest)


def _table(title: str, names: Sequence[str], columns: Sequence[Column], plain: Callable[[str], str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    table.add_column("model", max_width=NAME_WIDTH, overflow="fold")
    for column in columns:
        table.add_column(
            Text(plain(column.header)),
            justify="right" if column.numeric else "left",
            no_wrap=column.numeric,
            overflow="fold",
            max_width=None if column.numeric else TEXT_WIDTH,
        )
    for row, name in enumerate(names):
        cells = [Text(plain(name))]  # Text, not markup: a model may be called "[red]"
        for column in columns:
            lines = column.cells[row]
            cell = Text(plain(lines[0]), style="bold" if row in column.best else "")
            if lines[0] == "failed":
                cell.stylize("red")
            for line in lines[1:]:
                cell.append("\n" + plain(line), style="not bold dim")
            cells.append(cell)
        table.add_row(*cells)
    return table


def _same(text: str) -> str:
    return text


def _ascii(text: str) -> str:
    replaced = text.replace("±", "+-").replace("−", "-").replace("—", "-").replace("\u2026", "...")
    return replaced.encode("ascii", "replace").decode("ascii")


def markdown(results: Results) -> str:
    """Write the tables as GitHub Markdown, the best merged model of each column in bold."""
    parts = ["## Accuracy by task", "", *_markdown_table(results, task_columns(results, paired_stderr=True)), ""]
    parts += ["## Over all tasks", "", *_markdown_table(results, quality_columns(results)), ""]
    parts += ["## Parameters and cost", "", *_markdown_table(results, cost_columns(results)), ""]
    parts += [f"- {_cell(name)} failed: {_cell(error)}" for name, error in errors(results).items()]
    parts += ["", *(line for text in CAPTION for line in (text, ""))]
    return "\n".join(parts).rstrip("\n") + "\n"


def _markdown_table(results: Results, columns: Sequence[Column]) -> list[str]:
    lines = ["| " + " | ".join(["model", *(_cell(column.header) for column in columns)]) + " |"]
    lines.append("|" + "|".join([" --- ", *(" ---: " if column.numeric else " --- " for column in columns)]) + "|")
    for row, name in enumerate(rows(results)):
        cells = [_cell(name)]
        for column in columns:
            figure, *below = (_cell(line) for line in column.cells[row])
            cells.append("<br>".join([f"**{figure}**" if row in column.best else figure, *below]))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(text: str) -> str:
    """Escape what would end a table's cell or start HTML."""
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.split())
