"""A guard for merges that learn on unlabeled streams: it keeps the best state, stops a collapse and rolls it back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_merge.adaptation import Adaptation
from lightning_merge.callbacks.watch import WatchedBatches, adaptation_of
from lightning_merge.collapse_signs import Reading, Rules, falls, read
from lightning_merge.errors import UserError


class CollapseGuard(L.Callback):
    """Watch label-free signs of an adaptation, keep its best state, stop a collapse and roll it back.

    Entropy can fall while accuracy falls. The guard watches the first batches of each task: their entropy, how many
    classes are predicted, how often the merge agrees with what it answered at its start and with the tasks' individual
    models, and how far λ has moved. The *criterion* is the mean overlap of probabilities with the individual models
    over rows and tasks, at their mean entropy (:mod:`lightning_merge.collapse_signs`). It was chosen among fifteen on
    two models of three and four domains of digits: 21 runs with cosine and plain logits, learning rates from 1e-3 to
    0.1, and 64 watched rows a task. The state that it takes for the best was 0.04 points of accuracy below the best
    one on average, and 0.2 at most; by agreement of classes 0.2 and 1.9; by the overlap without equal entropy, which
    takes a merge that only grows sharper for a better one, 0.7 and 3.8; by cross-entropy 0.7 and 3.4; by entropy 20
    and 63.

    A check sees a *collapse* where answers are no longer finite; or the criterion is below that of the starting merge;
    or entropy has gone down since the best state while the criterion went down; or a task is given few classes:
    the entropy of its predicted classes is below ``diversity`` times that at the start and that of its individual
    model, while it agrees less with that model than at the start. "Below" means by more than ``margin`` and by more
    than two standard errors, paired over the watched rows. After ``patience`` such checks in a row the best state is
    put back and the trainer stops.

    At the end of a fit the last state stays if no collapse is seen, it is not below the best state in the same sense,
    and its criterion is not below that of the starting merge at all; otherwise the best state is put back, the starting
    merge among the candidates. So the final state is never worse than the starting merge by the guard's criterion, and
    a healthy run ends where it would have ended without a guard. Checkpoints that are saved at the end of the last
    epoch hold the final state; when such a fit is resumed for more epochs, it goes on from the last state.

    Tasks without an individual model are watched for the diversity of their classes only; if no task has one, the
    criterion is how many tasks have kept theirs, which sees no other collapse, and the guard says so. The watched rows
    are rows that the merge also learns from. Nothing is watched outside ``fit``. Signs are logged as ``guard/…``,
    and ``agreement`` stands in the progress bar.

    Args:
        watch_batches: Batches watched of each task, at least 1, over all processes (each gives at least one).
        every_n_steps: Optimizer steps from one check to the next, at least 1.
        patience: Checks in a row that see a collapse before the run is stopped, at least 1.
        margin: What the criterion may lose, in [0, 1].
        diversity: What share of the entropy of predicted classes a task must keep, in [0, 1]; 0 asks for none.

    Raises:
        UserError: A setting is out of range, or nothing in the fit learns a merge.

    Cost: one forward pass over the watched batches for each check; once, another two and reading each individual
    model; the watched batches, three sets of learned numbers and logits on the host.
    """

    def __init__(
        self,
        watch_batches: int = 4,
        every_n_steps: int = 10,
        patience: int = 3,
        margin: float = 0.01,
        diversity: float = 0.5,
    ) -> None:
        for name, count in (("watch_batches", watch_batches), ("every_n_steps", every_n_steps), ("patience", patience)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise UserError(f"CollapseGuard: {name} must be a whole number of at least 1, got {count}.")
        for name, share in (("margin", margin), ("diversity", diversity)):
            if not 0 <= share <= 1:
                hint = f" Did you mean {share / 100:g}?" if 1 < share <= 100 else ""
                raise UserError(f"CollapseGuard: {name} must be in [0, 1], got {share}.{hint}")
        self.watch_batches, self.every_n_steps, self.patience = watch_batches, every_n_steps, patience
        self.margin, self.diversity = margin, diversity
        self._reset()

    def _reset(self) -> None:
        # What each check saw, the starting merge first: step, signs, signs by task and what spoke for a collapse.
        self.history: list[dict[str, Any]] = []
        self.best_step = 0
        self.stopped_step: int | None = None
        self.rolled_back = False
        self._watched = WatchedBatches(self.watch_batches)
        self._initial: dict[str, Tensor] | None = None
        self._best: dict[str, Tensor] | None = None
        self._alarms = 0
        # Of a fit that has ended: what it would go on from.
        self._live: dict[str, Any] | None = None
        self._said = ""
        self._concluded = False
        self._last_is_worse = False
        self._forget_references()

    def _forget_references(self) -> None:
        self._rules: Rules | None = None
        self._best_score = -math.inf
        self._best_reading: Reading | None = None

    # --- the trainer's hooks ------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what an earlier fit has left, and check that something learns."""
        if stage == "fit":
            self._reset()
            adaptation_of(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first batches; go on from the last state where a fit that had ended is resumed."""
        adaptation = adaptation_of(trainer, pl_module)
        if self._live is not None:
            self._go_on(trainer, adaptation)
        self._concluded = self.rolled_back = False
        if self._initial is None:
            self._initial = self._best = adaptation.learned()
            self.best_step = trainer.global_step
        if not self._watched.ready and self._watched.take(batch, tuple(adaptation.tasks), trainer.world_size):
            self._capture(trainer, pl_module, adaptation)
        if self._watched.ready and self._rules is None:
            self._settle(trainer, pl_module, adaptation)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check; stop what collapses; put the final state in place before the last validation and checkpoint."""
        if trainer.global_step % self.every_n_steps == 0 and self._rules is not None:
            self._check(trainer, pl_module)
            if self._alarms >= self.patience:
                self._stop(trainer, pl_module)
        if _is_last(trainer, batch_idx):
            self.conclude(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the final state in place where something else has stopped the run."""
        if trainer.should_stop:
            self.conclude(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the final state in place, and say what was done."""
        self.conclude(trainer, pl_module)
        if self._said:
            rank_zero_info(f"CollapseGuard: {self._said}")

    def state_dict(self) -> dict[str, Any]:
        """Return the starting and the best state, the watched batches, counters and what was seen."""
        return {
            "history": list(self.history),
            "steps": [self.best_step, self.stopped_step],
            "alarms": self._alarms,
            "learned": [self._initial, self._best],
            "live": self._live,
            "watched": self._watched.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.history = list(state_dict["history"])
        self.best_step, self.stopped_step = state_dict["steps"]
        self._alarms, self._live = state_dict["alarms"], state_dict["live"]
        self._initial, self._best = state_dict["learned"]
        if state_dict["watched"] is not None:
            self._watched.load_state_dict(state_dict["watched"])

    # --- references ---------------------------------------------------------------------------------------------------

    def _capture(self, trainer: L.Trainer, pl_module: L.LightningModule, adaptation: Adaptation) -> None:
        """Ask the starting merge and the individual models about the watched batches."""
        assert self._initial is not None
        self._watched.capture(trainer, pl_module, adaptation, self._initial)
        missing = self._watched.without_individual
        if missing:
            task, why = next(iter(missing.items()))
            if len(missing) == len(self._watched.tasks):
                whose = "any task: only a collapse into few classes can be seen"
            else:
                others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                whose = f"'{task}'{others}: there only a collapse into few classes can be seen"
            rank_zero_info(f"CollapseGuard: there is no individual model of {whose} ({why}).")

    def _settle(self, trainer: L.Trainer, pl_module: L.LightningModule, adaptation: Adaptation) -> None:
        """Take the signs of the references and of the best state: at first, and again after a resume."""
        watched = self._watched
        start = self._read(watched.start)
        individual = self._read({**watched.start, **watched.individual})
        self._rules = Rules(start, individual, self.margin, self.diversity)
        self._best_score, self._best_reading = self._rules.score(start), start
        if not self.history:
            self._record(trainer, pl_module, start, 0.0, [], self.best_step)
        elif self.best_step != self.history[0]["step"]:
            assert self._best is not None
            now = adaptation.learned()
            adaptation.restore(self._best)
            try:
                best = self._read(watched.answers(trainer, pl_module, adaptation))
            finally:
                adaptation.restore(now)
            # Other batches than those that it was chosen on may find it worse than the start.
            if self._rules.score(best) >= self._best_score:
                self._best_score, self._best_reading = self._rules.score(best), best
            else:
                self._best, self.best_step = self._initial, self.history[0]["step"]

    def _read(self, logits: Mapping[str, Tensor]) -> Reading:
        return read(logits, self._watched.start, self._watched.individual)

    # --- checks -------------------------------------------------------------------------------------------------------

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See how the merge answers now, record and log it, and keep the state if it is the best."""
        assert self._rules is not None and self._best_reading is not None
        if self.history[-1]["step"] == trainer.global_step:  # between two steps, under gradient accumulation
            return
        adaptation = adaptation_of(trainer, pl_module)
        reading = self._read(self._watched.answers(trainer, pl_module, adaptation))
        alarms, score = self._rules.alarms(reading, self._best_reading), self._rules.score(reading)
        self._last_is_worse = (
            bool(alarms)
            or falls(reading, self._best_reading, self.margin)
            or not score >= self._rules.score(self._rules.start)
        )
        # Without individual models all states are as good until one collapses: then the latest is the best.
        if not alarms and (score > self._best_score or not self._rules.sees_individuals):
            self._best, self.best_step = adaptation.learned(), trainer.global_step
            self._best_score, self._best_reading = score, reading
        self._alarms = self._alarms + 1 if alarms else 0
        self._record(trainer, pl_module, reading, adaptation.drift(), alarms, trainer.global_step)

    def _stop(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the best state back and stop the trainer."""
        assert self._best is not None
        adaptation_of(trainer, pl_module).restore(self._best)
        trainer.should_stop = True
        self.stopped_step, self._alarms = trainer.global_step, 0
        self._concluded = self.rolled_back = True
        checks = f"after {self.patience} check{'s' if self.patience > 1 else ''} in a row that saw a collapse"
        self._said = (
            f"stopped at step {self.stopped_step} {checks} ({'; '.join(self.history[-1]['alarms'])}); "
            f"back to {self._best_name()}."
        )

    def conclude(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the last state, or put the best one back; once."""
        if self._concluded or self._initial is None:
            return
        self._concluded = True
        adaptation = adaptation_of(trainer, pl_module)
        before = (self._best, self.best_step, self._alarms, len(self.history), self._watched.ready)
        if not self._watched.ready and self._watched.batches:
            self._capture(trainer, pl_module, adaptation)
            self._settle(trainer, pl_module, adaptation)
        if self._rules is None:
            return
        self._check(trainer, pl_module)
        assert self._best is not None
        live = adaptation.learned()
        self._live = dict(zip(("best", "best_step", "alarms", "checks", "ready"), before, strict=True), learned=live)
        first, last = self.history[0], self.history[-1]
        sign = "overlap" if self._rules.sees_individuals else "diversity"
        what = "overlap with the individual models" if sign == "overlap" else "diversity of predicted classes"
        seen = f"{what} {first[sign]:.3f} at the start, {last[sign]:.3f} at step {last['step']}"
        checks = f"{len(self.history) - 1} check{'s' if len(self.history) > 2 else ''}"
        if self._last_is_worse:
            adaptation.restore(self._best)
            self.rolled_back = True
            alarms = "".join(f"; {alarm}" for alarm in last["alarms"])
            self._said = f"{checks}, {seen}{alarms}; back to {self._best_name()}."
        else:
            self._said = f"{checks}, no collapse; {seen}; the last state stays."

    def _go_on(self, trainer: L.Trainer, adaptation: Adaptation) -> None:
        """Go on from where a fit had ended, as if it had not."""
        assert self._live is not None
        adaptation.restore(self._live["learned"])
        self._best, self.best_step, self._alarms = (self._live[name] for name in ("best", "best_step", "alarms"))
        self.history = self.history[: self._live["checks"]]
        if not self._live["ready"] and self._watched.ready:
            self._watched.reopen(trainer)
        self._live = None
        self._forget_references()

    def _best_name(self) -> str:
        first = self.history[0]["step"]
        return "the starting merge" if self.best_step == first else f"the state of step {self.best_step}"

    def _record(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        reading: Reading,
        drift: float,
        alarms: list[str],
        step: int,
    ) -> None:
        """Remember what a check saw, and log it."""
        means = reading.mean.as_dict() | {"drift": drift}
        tasks = {task: seen.as_dict() for task, seen in reading.tasks.items()}
        self.history.append({"step": step, **means, "tasks": tasks, "alarms": alarms})
        logged = {f"guard/{name}": value for name, value in means.items()}
        for task, seen in tasks.items():
            logged |= {f"guard/{name}/{task}": seen[name] for name in ("entropy", "diversity", "overlap")}
        logged = {name: value for name, value in logged.items() if not math.isnan(value)}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=step)
        shown = "agreement" if not math.isnan(means["agreement"]) else "agreement_with_start"
        pl_module.log(shown, means[shown], prog_bar=True, logger=False, on_step=True, on_epoch=False)


def _is_last(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether no batch of the fit follows."""
    epoch_ends = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
    epochs = trainer.max_epochs
    last_epoch = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return (epoch_ends and last_epoch) or 0 <= trainer.max_steps <= trainer.global_step
