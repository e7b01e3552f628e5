"""A few watched batches of the stream, and what the starting merge and the individual models answer for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import lightning as L
import torch
import torch.distributed
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_merge.adaptation import Adaptation
from lightning_merge.errors import UserError

# Watched batches up to this size are shared among processes and saved in checkpoints; larger ones are taken anew from
# the stream when a run is resumed.
MOST_BYTES_KEPT = 64 * 2**20

_ASKED = ("answer", "learned", "restore", "drift")


def adaptation_of(trainer: L.Trainer, pl_module: L.LightningModule) -> Adaptation:
    """Return what learns in a fit: the first callback that can be asked as an Adaptation, else the module itself.

    Raises:
        UserError: Neither can be asked.
    """
    for candidate in (*trainer.callbacks, pl_module):  # type: ignore[attr-defined]
        if all(callable(getattr(candidate, name, None)) for name in _ASKED):
            return cast(Adaptation, candidate)
    raise UserError(
        f"Nothing in this fit learns a merge: neither {type(pl_module).__name__} nor a callback has the methods "
        f"{', '.join(_ASKED)}. Expected AdaMerging(...) among the Trainer's callbacks, or a module like AdaptiveMerge."
    )


@contextmanager
def watching(pl_module: L.LightningModule) -> Iterator[None]:
    """Inside, nothing records gradients and the module is in evaluation mode; modes and random states are put back."""
    modes = {module: module.training for module in pl_module.modules()}
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(torch.no_grad())
        pl_module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


class WatchedBatches:
    """The first batches that pass, with the answers of the starting merge and of the individual models.

    Under several processes each contributes batches and answers its own; all see the answers for all rows, so that all
    decide alike.

    Args:
        most: How many batches of each task are watched, over all processes; at least one a process.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.batches: list[tuple[str, Any]] = []  # task and batch, on the host
        self.seen = 0
        self.shared = False  # all processes hold the same batches
        self.start: dict[str, Tensor] = {}  # by task (N, C), the answers of the starting merge for all rows
        self.individual: dict[str, Tensor] = {}  # and of the individual models
        self.without_individual: dict[str, str] = {}  # why a task has none

    @property
    def ready(self) -> bool:
        """Whether the starting merge and the individual models have answered."""
        return bool(self.start)

    # --- taking batches -------------------------------------------------------------------------------------------

    def take(self, batch: Any, tasks: tuple[str, ...], world_size: int) -> bool:
        """Keep a copy of a batch of the stream on the host; return whether there are enough."""
        parts = batch if isinstance(batch, Mapping) and any(task in batch for task in tasks) else None
        if parts is None and len(tasks) == 1:
            parts = {tasks[0]: batch}
        for task in tasks:
            part = None if parts is None else parts.get(task)
            if part is not None:
                copied = apply_to_collection(part, Tensor, lambda t: t.detach().to("cpu", copy=True))
                self.batches.append((task, copied))
        self.seen += 1
        return self.seen >= -(-self.most // world_size)

    def capture(
        self, trainer: L.Trainer, pl_module: L.LightningModule, adaptation: Adaptation, initial: Mapping[str, Tensor]
    ) -> None:
        """Ask the starting merge and the individual models, once; the merge is afterwards as it was.

        Cost: one model read, written and run over its batches for each task, and one restoring of λ each way.
        """
        self._share(trainer)
        now = adaptation.learned()
        try:
            adaptation.restore(initial)
            self.start = self.answers(trainer, pl_module, adaptation)
            for task in self.tasks:
                self._ask_individual(trainer, pl_module, adaptation, task)
        finally:
            adaptation.restore(now)

    def reopen(self, trainer: L.Trainer) -> None:
        """Take more batches: the answers came before there were enough."""
        self.batches = [self.batches[place] for place in self._mine(trainer)]
        self.start, self.individual, self.without_individual, self.shared = {}, {}, {}, False

    def _ask_individual(
        self, trainer: L.Trainer, pl_module: L.LightningModule, adaptation: Adaptation, task: str
    ) -> None:
        if getattr(adaptation, "individual", None) is None:
            self.without_individual[task] = f"{type(adaptation).__name__} has none"
            return
        try:
            with adaptation.individual(task):
                self.individual |= self.answers(trainer, pl_module, adaptation, task)
        except (UserError, NotImplementedError, FileNotFoundError) as error:
            self.without_individual[task] = str(error) or type(error).__name__

    def _share(self, trainer: L.Trainer) -> None:
        """Give every process the batches of all, where they are small and of plain kinds."""
        size = torch.tensor(float(self.nbytes if self.is_plain else math.inf), device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            size = trainer.strategy.reduce(size, reduce_op="sum")
        self.shared = float(size) <= MOST_BYTES_KEPT
        if self.shared and trainer.world_size > 1:
            # One batch of each process in turn: dealt out in the same way, each gets its own.
            self.batches = [batch for batches in zip(*_gather(trainer, self.batches), strict=True) for batch in batches]

    # --- asking ---------------------------------------------------------------------------------------------------

    def answers(
        self, trainer: L.Trainer, pl_module: L.LightningModule, adaptation: Adaptation, task: str | None = None
    ) -> dict[str, Tensor]:
        """Return what the model answers now: logits ``(N, C)`` by task, fp32 on the host, the same in all processes.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            adaptation: What is asked.
            task: Only for this task.
        """
        mine = [place for place in self._mine(trainer) if task in (None, self.batches[place][0])]
        with watching(pl_module):
            answered = [(self.batches[place][0], self._logits(trainer, adaptation, place)) for place in mine]
        if trainer.world_size > 1 and not self._repeats(trainer):
            answered = [answer for answers in _gather(trainer, answered) for answer in answers]
        by_task: dict[str, list[Tensor]] = {}
        for name, logits in answered:
            by_task.setdefault(name, []).append(logits)
        return {name: torch.cat(logits) for name, logits in by_task.items()}

    def _logits(self, trainer: L.Trainer, adaptation: Adaptation, place: int) -> Tensor:
        task, batch = self.batches[place]
        with trainer.precision_plugin.forward_context():
            logits = adaptation.answer(task, move_data_to_device(batch, trainer.strategy.root_device)).logits
        if logits is None:
            raise UserError(
                f"The answer for task '{task}' has no logits, of which a guard sees whether the merge collapses. "
                "Expected Outputs(logits=...)."
            )
        return logits.detach().float().cpu()

    def _mine(self, trainer: L.Trainer) -> list[int]:
        """Places of the batches that this process answers, equally many in each, as sharded models need."""
        everything = range(len(self.batches))
        if not self.shared or self._repeats(trainer):
            return list(everything)
        places = [[place for place in everything if self.batches[place][0] == task] for task in self.tasks]
        return sorted(place for of_task in places for place in of_task[trainer.global_rank :: trainer.world_size])

    def _repeats(self, trainer: L.Trainer) -> bool:
        """Whether all processes answer all batches, because shared ones cannot be dealt out evenly."""
        counts = [sum(name == task for name, _ in self.batches) for task in self.tasks]
        return self.shared and any(count % trainer.world_size for count in counts)

    # --- keeping --------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """The tasks that are watched."""
        return list(dict.fromkeys(task for task, _ in self.batches))

    @property
    def is_plain(self) -> bool:
        """Whether the batches are of tensors, numbers, strings, lists, tuples and dicts, as a checkpoint may hold."""
        return all(_is_plain(batch) for _, batch in self.batches)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in the batches."""
        sizes: list[int] = []
        apply_to_collection(self.batches, Tensor, lambda t: sizes.append(t.numel() * t.element_size()))
        return sum(sizes)

    def state_dict(self) -> dict[str, Any] | None:
        """Return batches and answers in plain kinds, or ``None`` where they are to be taken anew."""
        if not (self.ready and self.shared):
            return None
        kept = ("batches", "seen", "start", "individual", "without_individual")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)
        self.shared = True


def _gather(trainer: L.Trainer, mine: list[Any]) -> list[list[Any]]:
    """Return what each process has, in order of the processes."""
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


def _is_plain(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        return type(batch) is dict and all(isinstance(key, (str, int)) and _is_plain(v) for key, v in batch.items())
    if isinstance(batch, (list, tuple)):
        return type(batch) in (list, tuple) and all(map(_is_plain, batch))
    return batch is None or type(batch) in (Tensor, str, bytes, bool, int, float)
