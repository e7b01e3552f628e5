"""What a merge learns, step by step: to the loggers, and as pictures with the numbers behind them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_merge.adaptation import Adaptation
from lightning_merge.callbacks.collapse_guard import CollapseGuard
from lightning_merge.callbacks.watch import adaptation_of
from lightning_merge.errors import UserError
from lightning_merge.evaluation.adaptation_plots import TraceRow, by_layer, plot_coefficients, plot_trace

# Coefficients beyond which loggers get their means over layers.
MOST_LOGGED = 200


class AdaptationTrace(L.Callback):
    """Log coefficients while a merge learns, and draw what was seen when it has learned.

    Loggers get ``coefficients/<model>/<group>`` and ``coefficients/drift``: means over the tensors of a layer where
    there are more than 200 coefficients, and means over all where there are more than 200 layers and models. At the end
    of a fit ``trace.png`` (the terms that are minimised, drift, and the signs of a :class:`CollapseGuard` if there is
    one) and ``coefficients.png`` (a heat map) are written, each with its numbers as CSV beside it. Steps are recorded
    as they were learned: what a guard has put back shows in ``coefficients.png`` only. Nothing is recorded outside
    ``fit``.

    Args:
        folder: Where to; by default the log directory of the trainer's first logger. Nothing is written without both.
        every_n_steps: Optimizer steps from one record to the next, at least 1.
        announce: Whether to say where the pictures are; not where somebody moves them.

    Raises:
        UserError: The setting is out of range, or nothing in the fit learns a merge.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, every_n_steps: int = 10, announce: bool = True
    ) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise UserError(
                f"AdaptationTrace: every_n_steps must be a whole number of at least 1, got {every_n_steps}."
            )
        self.folder, self.every_n_steps, self.announce = folder, every_n_steps, announce
        self.rows: list[TraceRow] = []
        self._start: dict[str, dict[str, float]] | None = None
        self._seen = -1
        self._warned = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what an earlier fit has left, and check that something learns."""
        if stage == "fit":
            adaptation_of(trainer, pl_module)
            self.rows, self._start, self._seen = [], None, -1
        elif stage in ("test", "predict") and not self._warned:
            callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            if any(getattr(other, "online", "none") != "none" for other in callbacks):
                self._warned = True
                rank_zero_warn("AdaptationTrace records a fit only: nothing is drawn of what is learned online.")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the coefficients at the start."""
        if self._start is None:
            adaptation = adaptation_of(trainer, pl_module)
            self._start = adaptation.table()
            self.rows.append(TraceRow(trainer.global_step, "drift", "", adaptation.drift()))
            self._log_coefficients(trainer, adaptation)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record and log."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._seen:
            return
        self._seen = step
        adaptation = adaptation_of(trainer, pl_module)
        for term, by_task in (getattr(adaptation, "last", None) or {}).items():
            name = f"minimised: {term}"
            self.rows += [TraceRow(step, name, task, value) for task, value in by_task.items()]
            self.rows.append(TraceRow(step, name, "", sum(by_task.values()) / max(1, len(by_task))))
        seen = _put_back(_guard_of(trainer), step)
        self.rows.append(TraceRow(step, "drift", "", adaptation.drift() if seen is None else seen))
        if seen is None:
            self._log_coefficients(trainer, adaptation)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the pictures, of the state in which the guard leaves the merge."""
        folder = self.folder
        if folder is None and trainer.loggers:
            folder = trainer.log_dir  # asked in every process
        guard = _guard_of(trainer)
        if guard is not None:
            guard.conclude(trainer, pl_module)
        table = adaptation_of(trainer, pl_module).table()
        if folder is None or not trainer.is_global_zero:
            return
        written = []
        rows = self.rows + (_signs(guard) if guard is not None else [])
        if rows:
            marks: dict[str, Any] = {}
            if guard is not None and guard.history:
                marks = {
                    "best_step": guard.best_step,
                    "stopped_step": guard.stopped_step,
                    "restored": guard.rolled_back,
                }
            written.append(plot_trace(rows, Path(folder) / "trace.png", **marks))
        if table:
            written.append(plot_coefficients(table, Path(folder) / "coefficients.png", self._start))
        if written and self.announce:
            rank_zero_info(f"AdaptationTrace: {' and '.join(path.name for path in written)} in {folder}.")

    def state_dict(self) -> dict[str, Any]:
        """Return what was recorded."""
        return {"rows": [list(row) for row in self.rows], "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was recorded."""
        self.rows = [TraceRow(*row) for row in state_dict["rows"]]
        self._start = state_dict["start"]

    def _log_coefficients(self, trainer: L.Trainer, adaptation: Adaptation) -> None:
        if not trainer.loggers:
            return
        table = adaptation.table()
        if sum(map(len, table.values())) > MOST_LOGGED:
            table = by_layer(table)
        if sum(map(len, table.values())) > MOST_LOGGED:
            table = {model: {"mean": sum(groups.values()) / len(groups)} for model, groups in table.items()}
        logged = {f"coefficients/{model}/{group}": v for model, groups in table.items() for group, v in groups.items()}
        logged["coefficients/drift"] = adaptation.drift()
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)


def _guard_of(trainer: L.Trainer) -> CollapseGuard | None:
    return next((c for c in trainer.callbacks if isinstance(c, CollapseGuard)), None)  # type: ignore[attr-defined]


def _put_back(guard: CollapseGuard | None, step: int) -> float | None:
    """Return the drift that a guard has seen at this step, where it has put another state back since."""
    if guard is None or not guard.rolled_back or not guard.history or guard.history[-1]["step"] != step:
        return None
    return float(guard.history[-1]["drift"])


def _signs(guard: CollapseGuard) -> list[TraceRow]:
    """Return the checks of a guard as rows of a trace; the drift is recorded by the trace itself."""
    rows = []
    for record in guard.history:
        for name, value in record.items():
            if name not in ("step", "tasks", "alarms", "drift"):
                rows.append(TraceRow(record["step"], name, "", value))
        for task, seen in record["tasks"].items():
            rows += [TraceRow(record["step"], name, task, value) for name, value in seen.items()]
    return rows
