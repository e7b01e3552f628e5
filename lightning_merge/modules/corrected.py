"""A live model whose representations are corrected for the task that is named: hooks, and an encoder with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_merge.errors import UserError, unknown
from lightning_merge.modules.blocks import feature_root, token_mean
from lightning_merge.modules.correctors import FINAL, Correctors
from lightning_merge.modules.encoder import Encoder

Record = dict[str, Tensor]


class CorrectionHooks:
    """Correctors at work in a live module, whose own forward pass is left alone.

    Args:
        module: The module.
        features: Its part, or its method, that gives the final representation; the module itself where it is empty.
        correctors: The correctors, whose blocks are looked for in the part first, then in the module.

    Raises:
        UserError: No such part or method, or a block of the correctors that is not there.
    """

    def __init__(self, module: nn.Module, features: str, correctors: Correctors) -> None:
        self.module, self.features, self.correctors = module, features, correctors
        self.root, self._method = feature_root(module, features)
        self._task: str | None = None
        self._record: Record | None = None
        self._mask: Tensor | None = None
        self._handles: list[Any] = []
        self._blocks = {site: _find((self.root, self.module), site) for site in correctors.sites[:-1]}

    # --- states ---------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the hooks are in their places; they stay where they have been before."""
        had = bool(self._handles)
        if not had:
            self.attach()
        try:
            yield
        finally:
            if not had:
                self.detach()

    def attach(self) -> None:
        """Put the hooks in their places; they do nothing until a task is named or a record wanted."""
        self.detach()
        for site, block in self._blocks.items():
            self._handles.append(block.register_forward_hook(self._hook(site)))
        if self._blocks:
            for part in _ancestors(self.module, next(iter(self._blocks.values()))):
                self._handles.append(part.register_forward_pre_hook(self._see_mask, with_kwargs=True))
        if self._method is None:
            self._handles.append(self.root.register_forward_hook(self._hook(FINAL)))
        else:
            self._wrap(self._method)

    def detach(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._mask = [], None

    @contextmanager
    def on(self, task: str | None) -> Iterator[None]:
        """Inside, representations are corrected for a task, or for none."""
        if task is not None:
            self.correctors.of(task)
        before = self._task
        self._task = task
        try:
            yield
        finally:
            self._task = before

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Inside, the final representation and each block's mean token are kept, by site, as they leave their site."""
        before = self._record
        record: Record = {}
        self._record = record
        try:
            yield record
        finally:
            self._record, self._mask = before, None

    def activate(self, task: str | None) -> None:
        """Correct for a task from now on; None corrects no longer."""
        if task is not None:
            self.correctors.of(task)
        self._task = task

    # --- hooks ----------------------------------------------------------------------------------------------------

    def _hook(self, site: str) -> Callable[[nn.Module, Any, Any], Any]:
        def correct(part: nn.Module, _: Any, output: Any) -> Any:
            return self._pass(site, output, type(part).__name__)

        return correct

    def _pass(self, site: str, output: Any, where: str) -> Any:
        if self._task is None and self._record is None:
            return output
        hidden = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(hidden, Tensor):
            raise UserError(
                f"Surgery needs a tensor from {self.features or where!r} at '{site}', and got {type(hidden).__name__}. "
                "Expected features=... to name a part, or a method, that returns the representation itself."
            )
        if self._task is not None:
            corrector = self.correctors.of(self._task, site)
            hidden = corrector(hidden)
        if self._record is not None:
            self._record[site] = hidden if site == FINAL else token_mean(hidden, self._mask)
        if isinstance(output, (tuple, list)):
            return (hidden, *output[1:]) if isinstance(output, tuple) else [hidden, *output[1:]]
        return hidden

    def _see_mask(self, part: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Keep the mask of padding that a model is called with, by whatever way it comes."""
        mask = named.get("attention_mask")
        if mask is None and arguments:
            names = list(inspect.signature(part.forward).parameters)
            place = names.index("attention_mask") if "attention_mask" in names else len(arguments)
            mask = arguments[place] if place < len(arguments) else None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._mask = mask

    def _wrap(self, name: str) -> None:
        """Let the module's method be corrected, on this instance only."""
        method = getattr(self.module, name)
        had = self.module.__dict__.get(name)

        def corrected(*arguments: Any, **named: Any) -> Any:
            return self._pass(FINAL, method(*arguments, **named), name)

        # The signature stays that of the method: callers look whether it takes a task.
        corrected.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
        self.module.__dict__[name] = corrected
        self._handles.append(_Undo(self.module, name, had))


class CorrectedEncoder(nn.Module):
    """An encoder that answers for one task with that task's correctors; stands wherever an ``Encoder`` is called.

    Args:
        encoder: The encoder, shared, not copied.
        correctors: The correctors of several tasks.
        task: The task.

    Raises:
        UserError: There is no corrector for the task, or the correctors are not of this encoder.
    """

    def __init__(self, encoder: Encoder, correctors: Correctors, task: str) -> None:
        super().__init__()
        if task not in correctors.tasks:
            raise unknown("task of a corrector", task, correctors.tasks)
        self.encoder, self.correctors, self.task = encoder, correctors, task
        width = correctors.of(task).dim
        if width and width != encoder.dim:
            raise UserError(
                f"The correctors take features of size {width}, the encoder gives {encoder.dim}. Expected those that "
                "were trained with it."
            )
        self._hooks = CorrectionHooks(encoder, "", correctors)

    def __getattr__(self, name: str) -> Any:
        # dim, kind, processor, pooling, preprocess, max_length, ...: the encoder's
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("encoder"), name)

    def forward(self, **tensors: Tensor) -> Tensor:
        """Return the corrected features, ``(N, dim)``."""
        with self._hooks.attached(), self._hooks.on(self.task):
            return self.encoder(**tensors)

    def reconfigured(self, pooling: Any = None, max_length: int | None = None) -> CorrectedEncoder:
        """Return the same with another pooling or length of text; see :meth:`Encoder.reconfigured`."""
        return CorrectedEncoder(self.encoder.reconfigured(pooling, max_length), self.correctors, self.task)


def corrected_encoder(encoder: Encoder, correctors: Correctors, task: str) -> CorrectedEncoder:
    """Return an encoder that answers for one task with that task's correctors, for scoring and serving."""
    return CorrectedEncoder(encoder, correctors, task)


def _find(places: Sequence[nn.Module], site: str) -> nn.Module:
    """Find a block by its path, also where one of the two models holds the other one in an attribute."""
    for place in places:
        parts = dict(place.named_modules())
        if site in parts:
            return parts[site]
    parts = dict(places[0].named_modules())
    fitting = [name for name in parts if name and (name.endswith("." + site) or site.endswith("." + name))]
    longest = [name for name in fitting if len(name) == max(map(len, fitting))]
    if len(longest) != 1:
        raise UserError(
            f"The correctors act after '{site}', which {type(places[0]).__name__} does not have. Expected the model "
            "that they were trained with."
        )
    return parts[longest[0]]


def _ancestors(root: nn.Module, block: nn.Module) -> list[nn.Module]:
    """The modules around a block, whose arguments may hold the mask of its tokens."""
    path = next(name for name, part in root.named_modules() if part is block)
    pieces = path.split(".")
    return [root.get_submodule(".".join(pieces[:depth])) for depth in range(len(pieces))]


class _Undo:
    """Gives a wrapped method back, as a hook's handle does."""

    def __init__(self, module: nn.Module, name: str, before: Any) -> None:
        self._module, self._name, self._before = module, name, before

    def remove(self) -> None:
        if self._before is None:
            self._module.__dict__.pop(self._name, None)
        else:
            self._module.__dict__[self._name] = self._before
