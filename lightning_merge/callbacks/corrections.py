"""Correctors in a module of the user's: what is asked of them while they learn, and how they act afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import lightning as L
from torch import Tensor, nn

from lightning_merge.errors import UserError, unknown
from lightning_merge.modules.corrected import CorrectionHooks
from lightning_merge.modules.correctors import Correctors


class Corrections(L.Callback):
    """What :class:`lightning_merge.callbacks.Surgery` does besides learning.

    Args:
        features: The module's part, or method, that gives the representation.

    Attributes:
        correctors: What is learned, or has been loaded; ``None`` before.
    """

    def __init__(self, features: str) -> None:
        self.features = features
        self.correctors: Correctors | None = None
        self._module: nn.Module | None = None
        self._hooks: CorrectionHooks | None = None

    # --- what guards, logs and plots ask: lightning_merge.adaptation.Adaptation ------------------------------------

    def learned(self) -> dict[str, Tensor]:
        """A copy of all correctors, on the host; empty ones have seen no features yet."""
        return self._ready().correctors.learned()

    def restore(self, learned: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`learned` gave."""
        self._ready().correctors.restore(learned)

    def drift(self) -> float:
        """Root mean square of how far the correctors' numbers are from their start."""
        return self._ready().correctors.drift()

    def table(self) -> dict[str, dict[str, float]]:
        """By task and site, the root mean square of Up."""
        return self._ready().correctors.table()

    # --- inference ------------------------------------------------------------------------------------------------

    def activate(self, task: str, module: nn.Module | None = None) -> None:
        """Correct the module's representations for one task from now on, until it is fitted again.

        Args:
            task: The task, which correctors cannot find out by themselves.
            module: The module; by default the one that was fitted.

        Raises:
            UserError: No corrector for the task, or none has been trained or loaded here.
        """
        hooks = self._place(task, module)
        hooks.activate(task)
        hooks.attach()

    def deactivate(self) -> None:
        """Correct no longer; the module answers as the merge it is."""
        if self._hooks is not None:
            self._hooks.activate(None)
            self._hooks.detach()

    @contextmanager
    def task(self, task: str, module: nn.Module | None = None) -> Iterator[None]:
        """Inside, the module's representations are corrected for one task; see :meth:`activate`."""
        hooks = self._place(task, module)
        with hooks.attached(), hooks.on(task):
            yield

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the correctors as ``surgery.safetensors``; beside a merged model's weights, ``load`` finds them."""
        if self.correctors is None:
            raise UserError("There are no correctors to save. Expected a fit first; where it forks, give path=...")
        self.correctors.save(path)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _place(self, task: str, module: nn.Module | None) -> CorrectionHooks:
        """Return the hooks in a module, for a task whose correctors are trained."""
        if module is not None and (module is not self._module or self._hooks is None):
            self.deactivate()
            if self.correctors is None:
                raise UserError("There are no correctors here yet. Expected Surgery.load(path), or a fit first.")
            self._module, self._hooks = module, CorrectionHooks(module, self.features, self.correctors)
        hooks = self._ready()
        if task not in hooks.correctors.trained_tasks:
            raise unknown("task of a corrector", task, hooks.correctors.trained_tasks)
        return hooks

    def _ready(self) -> CorrectionHooks:
        if self._hooks is None:
            raise UserError(
                "Surgery has no correctors in a module yet. Expected a fit first, or Surgery.load(path) and "
                "activate(task, module)."
            )
        return self._hooks
