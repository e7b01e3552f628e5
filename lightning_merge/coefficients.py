"""The merging coefficients λ of a learned merge as parameters: one for each task, layer, block, tensor or own group.

AdaMerging (Yang et al., 2024, arXiv 2310.02575) calls *task-wise* one λ_t for each task, and *layer-wise* one λ_t^l for
each task and parameter tensor: its "layer" is a tensor, here ``by="tensor"``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_merge.directions import Directions, TaskDirections
from lightning_merge.errors import UserError, unknown
from lightning_merge.methods.schedule import ByTensor, settle

Grouping = Literal["task", "layer", "block", "tensor"]
Constraint = Literal["free", "clamp", "softmax"]
Initial = float | Mapping[str, float] | str | os.PathLike[str]

_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")


class Coefficients(nn.Module):
    """λ for each of T models and L tensors, made of one parameter for each model and group of tensors.

    Args:
        models: The models, in the order of the task vectors (sorted names).
        tensors: The tensors that are merged.
        by: What shares a coefficient: all tensors (``task``), those of one numbered layer (``layer``), of one
            submodule of a layer (``block``: its attention, its perceptron), none (``tensor``); or patterns by group
            name, of which the first found in a tensor's name decides (``{attention: "attn|attention", rest: "."}``).
        initial: Where λ starts: a number, one for each model, or a file that :meth:`save` wrote (a warm start).
        constraint: ``free``; ``clamp`` into [0, 1], where a coefficient that has left the interval no longer learns
            (the released AdaMerging); ``softmax`` over the models of each group.
        zero: Pairs of model and tensor whose coefficient is 0 and stays 0: what a pruning left nothing of.
        prior: Strength of ½ · prior · Σ (λ − λ₀)², added to what is minimised; a number, or one for each group pattern.

    Raises:
        UserError: No model or tensor, an unknown setting, a pattern that fits nothing, a start that does not fit.

    Example:
        >>> coefficients = Coefficients(["cars", "sun"], ["layers.0.weight", "layers.1.weight"], by="task")
        >>> coefficients().reshape(2, 2)  # one row for each tensor
        tensor([[0.3000, 0.3000],
                [0.3000, 0.3000]], grad_fn=<ViewBackward0>)
    """

    _initial: Tensor
    # Whether the directions of a shard can be made of the shard alone.
    needs_whole_tensors = False

    def __init__(
        self,
        models: Sequence[str],
        tensors: Sequence[str],
        by: Grouping | Mapping[str, str] = "tensor",
        initial: Initial = 0.3,
        constraint: Constraint = "free",
        zero: Sequence[tuple[str, str]] = (),
        prior: float | Mapping[str, float] = 0.0,
    ) -> None:
        super().__init__()
        if not models or not tensors:
            raise UserError(f"Coefficients need models and tensors, got {len(models)} and {len(tensors)}.")
        if constraint not in get_args(Constraint):
            raise unknown("constraint", str(constraint), get_args(Constraint))
        self.models, self.tensor_names = tuple(models), tuple(tensors)
        self.by, self.constraint = by, constraint
        group_of = _groups(self.tensor_names, by)
        self.groups = tuple(dict.fromkeys(group_of.values()))
        self._rows = {name: row for row, name in enumerate(self.tensor_names)}
        self._index = torch.tensor([self.groups.index(group_of[name]) for name in self.tensor_names])
        keep = torch.ones(len(self.tensor_names), len(self.models))
        for model, tensor in zero:
            if model not in self.models:
                raise unknown("model of a coefficient that is 0", model, self.models)
            if tensor not in self._rows:
                raise unknown("tensor of a coefficient that is 0", tensor, self.tensor_names)
            keep[self._rows[tensor], self.models.index(model)] = 0.0
        self._keep = None if bool(keep.all()) else keep  # (L, T)
        # Where nothing is left of a whole group, there is no coefficient to show either.
        left = torch.zeros(len(self.groups), len(self.models)).index_add(0, self._index, keep).t()
        self._pruned = None if self._keep is None else left == 0  # (T, G)
        start = self._start(initial, group_of)  # (T, G)
        if constraint == "clamp" and not bool(((start >= 0) & (start <= 1)).all()):
            raise UserError(f"Coefficients clamped to [0, 1] cannot start at {start.flatten().tolist()[:3]}.")
        if constraint == "softmax":
            # Any start is a point of the simplex only up to a common factor.
            start = start if self._pruned is None else start.masked_fill(self._pruned, 1.0)
            if not bool((start > 0).all()):
                raise UserError("Coefficients under a softmax must start above 0. Expected initial: 0.3, for example.")
            start = start.log()
        self.raw = nn.Parameter(start)
        self.register_buffer("_initial", self.by_group().detach().clone(), persistent=False)
        self._prior = self._priors(prior)

    # --- what MergedWeights asks ----------------------------------------------------------------------------------

    def forward(self) -> Tensor:
        """Return λ for every tensor and model, flat ``(L · T,)``, fp32: T values for each tensor in turn."""
        values = self.by_group()[:, self._index.to(self.raw.device)].t()  # (L, T)
        if self._keep is not None:
            values = values * self._keep.to(values.device)
        return values.reshape(-1)

    def span(self, tensor: str) -> slice:
        """Where the scalars of one tensor stand in what :meth:`forward` gives."""
        row = self._rows[tensor] * len(self.models)
        return slice(row, row + len(self.models))

    def decompose(self, tensor: str, deltas: Tensor, rows: slice | None = None) -> Directions:
        """Return the directions that the scalars of a tensor multiply.

        Args:
            tensor: Its name.
            deltas: ``(T, *shape)`` task vectors of the tensor, or of this process's shard.
            rows: With ``needs_whole_tensors``, the rows of the tensor that this process holds.
        """
        return TaskDirections(deltas.reshape(len(deltas), -1))

    def tie(self, tensor: str, owner: str) -> None:
        """Give a tensor the coefficients of another: the two are one parameter of the live module."""
        self._index[self._rows[tensor]] = self._index[self._rows[owner]]
        if self._keep is not None:
            self._keep[self._rows[tensor]] = self._keep[self._rows[owner]]

    # --- for people -----------------------------------------------------------------------------------------------

    def by_group(self) -> Tensor:
        """Return λ as ``(T, G)``, after the constraint."""
        pruned = None if self._pruned is None else self._pruned.to(self.raw.device)
        values: Tensor = self.raw
        if self.constraint == "clamp":
            values = values.clamp(0.0, 1.0)
        elif self.constraint == "softmax":
            # Finite, since a group of which every model is pruned must not become NaN.
            values = (values if pruned is None else values.masked_fill(pruned, -1e30)).softmax(dim=0)
        return values if pruned is None else values.masked_fill(pruned, 0.0)

    def table(self) -> dict[str, dict[str, float]]:
        """Return λ by model and group."""
        values = self.by_group().detach().cpu()
        return {
            model: dict(zip(self.groups, row.tolist(), strict=True))
            for model, row in zip(self.models, values, strict=True)
        }

    def drift(self) -> float:
        """Return ‖λ − λ₀‖ / √(T · G): the root mean square by which coefficients have moved."""
        return (self.by_group().detach() - self._initial).square().mean().sqrt().item()

    def penalty(self) -> Tensor:
        """Return ½ Σ prior · (λ − λ₀)², a scalar; 0 without a prior."""
        if self._prior is None:
            return self.raw.new_zeros(())
        return 0.5 * (self._prior.to(self.raw.device) * (self.by_group() - self._initial).square()).sum()

    def schedule(self) -> ByTensor:
        """Return λ as a setting of ``TaskArithmetic``, so that the file engine writes the merge that was learned."""
        values = self().detach().cpu()
        return ByTensor(
            {name: dict(zip(self.models, values[self.span(name)].tolist(), strict=True)) for name in self.tensor_names}
        )

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write λ by model and group to a small safetensors file, which a warm start reads."""
        from lightning_merge.weights import save_safetensors

        described = {"models": json.dumps(self.models), "groups": json.dumps(self.groups), **(metadata or {})}
        save_safetensors({"coefficients": self.by_group().detach().cpu().contiguous()}, Path(path), described)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _start(self, initial: Initial, group_of: Mapping[str, str]) -> Tensor:
        if isinstance(initial, (str, os.PathLike)):
            return self._warm_start(Path(initial))
        if isinstance(initial, ByTensor):
            rows: dict[str, list[float]] = {}
            for name in self.tensor_names:
                value = settle("initial", initial, name, 0.0)
                row = [value[m] if isinstance(value, Mapping) else value for m in self.models]
                if rows.setdefault(group_of[name], row) != row:
                    raise UserError(f"The start differs within the group '{group_of[name]}'. Expected by='tensor'.")
            return torch.tensor([rows[group] for group in self.groups], dtype=torch.float32).t().contiguous()
        if isinstance(initial, Mapping):
            for name in initial:
                if name not in self.models:
                    raise unknown("model of the initial coefficients", name, self.models)
            missing = [name for name in self.models if name not in initial]
            if missing:
                raise UserError(f"The initial coefficients lack the model '{missing[0]}'. Expected one for each.")
            column = [float(initial[name]) for name in self.models]
        else:
            column = [float(initial)] * len(self.models)
        if not all(map(math.isfinite, column)):
            raise UserError(f"Initial coefficients must be finite numbers, got {initial}.")
        return torch.tensor(column)[:, None].repeat(1, len(self.groups))

    def _warm_start(self, path: Path) -> Tensor:
        from lightning_merge.weights import open_weights

        source = open_weights(path)
        if "coefficients" not in source.tensors or "groups" not in source.metadata:
            raise UserError(f"'{path}' holds no coefficients. Expected a file that an adaptation wrote.")
        found = {key: tuple(json.loads(source.metadata[key])) for key in ("models", "groups")}
        for key, own in (("models", self.models), ("groups", self.groups)):
            if set(found[key]) != set(own):
                other = sorted(set(found[key]) ^ set(own))[0]
                raise UserError(
                    f"The coefficients in '{path}' are of other {key} ('{other}' is in one of the two only). "
                    f"Expected {len(own)}: {', '.join(own[:4])}{', …' if len(own) > 4 else ''}."
                )
        values = source.read("coefficients").float()
        rows = [found["models"].index(name) for name in self.models]
        return values[rows][:, [found["groups"].index(name) for name in self.groups]].contiguous()

    def _priors(self, prior: float | Mapping[str, float]) -> Tensor | None:
        if isinstance(prior, Mapping):
            strengths = torch.zeros(len(self.groups))
            for pattern, strength in prior.items():
                fitting = [place for place, group in enumerate(self.groups) if re.search(pattern, group)]
                if not fitting:
                    raise unknown("group of a prior", pattern, self.groups)
                strengths[fitting] = float(strength)
        else:
            strengths = torch.full((len(self.groups),), float(prior))
        if not bool(((strengths >= 0) & strengths.isfinite()).all()):
            raise UserError(f"A prior must be a finite number of at least 0, got {prior}.")
        return strengths if bool(strengths.any()) else None


def _groups(tensors: Sequence[str], by: Grouping | Mapping[str, str]) -> dict[str, str]:
    """Name the group of each tensor."""
    if isinstance(by, Mapping):
        groups: dict[str, str] = {}
        for name in tensors:
            group = next((group for group, pattern in by.items() if re.search(pattern, name)), None)
            if group is None:
                raise UserError(f"No group fits the tensor '{name}'. Expected a last group such as '{{rest: .}}'.")
            groups[name] = group
        unused = [group for group in by if group not in groups.values()]
        if unused:
            raise UserError(f"The group '{unused[0]}' ('{by[unused[0]]}') fits no tensor that no group before it took.")
        return groups
    if by not in get_args(Grouping):
        raise unknown("grouping of coefficients", str(by), get_args(Grouping))
    if by == "tensor":
        return {name: name for name in tensors}
    if by == "task":
        return dict.fromkeys(tensors, "all")
    return {name: _layer(name, deeper=by == "block") for name in tensors}


def _layer(name: str, deeper: bool) -> str:
    """Name the numbered layer of a tensor, or the part of that layer that it belongs to."""
    found = _LAYER.match(name)
    if not found:
        return name.rpartition(".")[0] or name
    rest = name[found.end() + 1 :].split(".")
    return f"{found.group(0)}.{rest[0]}" if deeper and len(rest) > 1 else found.group(0)
