"""LwPTV, layer-wise pruning of task vectors (arXiv 2506.09093): where a task vector says little, keep the base.

The paper's exact saliency score could not be consulted; the four candidates below share its structure (one mask over
layers for each task), and the default is the simplest that matches "redundancy of parameters in task vectors".
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import Context, Header, Partial, Transform, hyperparameter, kept_count, ordered_sum
from lightning_merge.methods.top_k import LargestEntries
from lightning_merge.tensor_view import TensorView, block_sums
from lightning_merge.weights import TensorInfo

Granularity = Literal["block", "module", "tensor"]


def layer_of(name: str, granularity: Granularity) -> str:
    """Return the layer a tensor belongs to.

    ``tensor``: itself. ``module``: its submodule, weight and bias together. ``block``: everything up to the first
    number in the name (``encoder.layer.3``); a tensor without one goes with its module.
    """
    if granularity == "tensor":
        return name
    block = re.match(r"(?:.*?\.)?\d+(?=\.)", name) if granularity == "block" else None
    return block.group(0) if block else name.rpartition(".")[0] or name


def natural_order(name: str) -> list[str | int]:
    """Return a key that sorts names as they are counted: ``layer.2`` before ``layer.10``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def layer_mask(
    saliency: Sequence[Sequence[float]], pruned: int, ranking: Literal["task", "global"]
) -> list[list[bool]]:
    """Return m_t[l], false for the ``pruned`` least salient layers of each task, or of all tasks together.

    Args:
        saliency: One row of L scores for each of T tasks; equal scores are pruned in the order of the layers.
        pruned: How many layers of each task go (``task``), or how many of all T · L (``global``).
    """
    keep = [[True] * len(row) for row in saliency]
    everything = [(score, layer, task) for task, row in enumerate(saliency) for layer, score in enumerate(row)]
    groups = (
        [everything] if ranking == "global" else [[e for e in everything if e[2] == t] for t in range(len(saliency))]
    )
    for group in groups:
        for _, layer, task in sorted(group)[:pruned]:
            keep[task][layer] = False
    return keep


@dataclass
class _Layers(Context):
    """Per layer and task: whether it is kept, and the factor on what is kept."""

    factors: Mapping[str, Tensor] = field(default_factory=dict)  # layer -> (T,)
    sizes: Mapping[str, int] = field(default_factory=dict)
    entries: LargestEntries | None = None


@dataclass(frozen=True)
class LwPTV(Transform):
    """Prune each task vector layer by layer: its least salient layers go back to the base.

    Composes before any merge. A layer pruned for every task equals the base bit for bit.

    Args:
        eta: Fraction of the layers pruned for each task, in [0, 1]; ⌊η L⌋ layers go, where L counts the layers that
            some task changed. 0.2 by default.
        saliency: ``magnitude`` mean |τ|; ``distance`` mean |τ_t − mean of all τ|, of at least two models; ``drift``
            ‖τ‖ / ‖θ₀‖; ``entry`` prunes the ⌊η n⌋ smallest entries inside each layer instead of whole layers.
        granularity: What a layer is: ``block`` (transformer block), ``module`` (weight and bias), or ``tensor``.
        protect: Patterns of tensors that are never pruned and do not count as layers.
        rescale: ``none``; ``inverse_keep`` multiplies what is kept by 1 / (1 − η) of the setting η, though ⌊η L⌋ / L of
            the layers went; ``norm`` restores ‖τ_t‖.
        ranking: Rank the layers of each ``task`` by themselves (the paper's mask for each task), or all together
            (``global``: ⌊η L T⌋ pairs go).

    Raises:
        UserError: ``inverse_keep`` with η = 1, ``norm`` with ``entry``, ``distance`` with one model, or a pattern that
            is no regular expression.

    Cost: one measuring pass over the base and the models (``entry`` samples first, and may break ties after).
    Reference: Merging Smarter, Generalizing Better, 2025, arXiv 2506.09093; see the module's note on the saliency.

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> from lightning_merge.methods import TaskArithmetic
        >>> base = {"layer.0.weight": torch.zeros(2), "layer.1.weight": torch.zeros(2)}
        >>> model = {"layer.0.weight": torch.tensor([0.1, -0.1]), "layer.1.weight": torch.tensor([0.5, 0.25])}
        >>> task_vectors = TaskVectors.open(base, {"a": model})
        >>> TaskArithmetic(scale=1)(task_vectors, transforms=[LwPTV(eta=0.5)])
        {'layer.0.weight': tensor([0., 0.]), 'layer.1.weight': tensor([0.5000, 0.2500])}
    """

    eta: float = hyperparameter(0.2, "[0, 1]")
    saliency: Literal["magnitude", "distance", "drift", "entry"] = "magnitude"
    granularity: Granularity = "block"
    protect: list[str] = field(default_factory=list)
    rescale: Literal["none", "inverse_keep", "norm"] = "none"
    ranking: Literal["task", "global"] = "task"

    paper: ClassVar[str] = "Layer-wise pruning of task vectors, LwPTV (2025), arXiv 2506.09093"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.protect, str):
            raise UserError(f"LwPTV: protect must be a list of patterns, got '{self.protect}'.")
        for pattern in self.protect:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise UserError(
                    f"LwPTV: the pattern '{pattern}' to protect is no regular expression ({error}). "
                    "Expected one such as 'embeddings' or 'layer[.]0[.]'."
                ) from error
        if self.rescale == "inverse_keep" and self.eta == 1:
            raise UserError("LwPTV: rescale inverse_keep divides by 1 - eta, and eta is 1. Expected eta below 1.")
        if self.rescale == "norm" and self.saliency == "entry":
            raise UserError(
                "LwPTV: rescale norm goes with whole layers. Expected none or inverse_keep with saliency entry."
            )

    @property
    def reach(self) -> Literal["tensor", "model"]:
        """Layers are ranked over the model; entries inside one tensor need no more than that tensor."""
        return "tensor" if self.saliency == "entry" and self.granularity == "tensor" else "model"

    def check_models(self, models: Sequence[str]) -> None:
        """Check the models, and that there is a mean to be distant from."""
        super().check_models(models)
        if self.saliency == "distance" and len(models) < 2:
            raise UserError(
                f"LwPTV: saliency distance compares each task vector with the mean of all and takes at least 2 models, "
                f"got {len(models)}. Expected more models, or saliency magnitude, drift or entry."
            )

    def begin(self, header: Header) -> Context:
        """Group the tensors into layers."""
        sizes: dict[str, int] = {}
        prunable: dict[str, TensorInfo] = {}
        for name in sorted(header.tensors):
            if header.tensors[name].numel and not self._protected(name):
                prunable[name] = header.tensors[name]
                layer = layer_of(name, self.granularity)
                sizes[layer] = sizes.get(layer, 0) + header.tensors[name].numel
        if self.eta == 0 or not prunable:
            return _Layers()
        if self.saliency == "entry":
            entries = LargestEntries(
                tensors=prunable,
                ranks=lambda count: [count - kept_count(self.eta, count)],
                group=lambda name: layer_of(name, self.granularity),
            )
            return _Layers(complete=False, entries=entries, sizes=sizes)
        return _Layers(complete=False, sizes=sizes)

    def measure(self, view: TensorView, context: _Layers) -> Partial:
        """Sum, block by block, what the saliency of the piece's layer needs."""
        if self._protected(view.name):
            return {}
        if context.entries is not None:
            return context.entries.measure(view)
        layer = layer_of(view.name, self.granularity)
        deltas = view.deltas.double()
        measured: Partial = {("square", layer, view.name, view.start): _blocks(deltas.square())}
        if self.saliency == "magnitude":
            measured[("score", layer, view.name, view.start)] = _blocks(deltas.abs())
        elif self.saliency == "distance":
            mean = ordered_sum(deltas) / len(deltas)
            measured[("score", layer, view.name, view.start)] = _blocks((deltas - mean).abs())
        else:
            measured[("base", layer, view.name, view.start)] = _blocks(view.base.double().square()[None])
        return measured

    def conclude(self, partial: Partial, context: _Layers) -> Context:
        """Rank the layers of each task."""
        if context.entries is not None:
            entries = context.entries.conclude(partial)
            return _Layers(complete=entries.complete, entries=entries, sizes=context.sizes)
        layers = sorted(context.sizes, key=natural_order)  # equal scores are pruned in this order
        square = _totals(partial, "square", layers)
        # Layers that fine-tuning left alone (frozen embeddings, an unused pooler) are no part of any task vector.
        # Counted, they would be pruned first, and eta would do nothing.
        layers = [layer for layer, row in zip(layers, square, strict=True) if any(row)]
        if not layers:
            return _Layers(sizes=context.sizes)
        square = [row for row in square if any(row)]
        if self.saliency == "drift":
            base = _totals(partial, "base", layers)
            scores = [[_drift(s, b[0]) for s in row] for row, b in zip(square, base, strict=True)]
        else:
            sums = _totals(partial, "score", layers)
            scores = [[s / context.sizes[layer] for s in row] for layer, row in zip(layers, sums, strict=True)]
        saliency = [list(row) for row in zip(*scores, strict=True)]  # (T, L)
        tasks = len(saliency)
        total = len(layers) * (tasks if self.ranking == "global" else 1)
        keep = layer_mask(saliency, kept_count(self.eta, total), self.ranking)
        factors = torch.zeros(len(layers), tasks, dtype=torch.float64)
        for task in range(tasks):
            factor = 1.0
            if self.rescale == "inverse_keep":
                factor = 1.0 / (1.0 - self.eta)
            elif self.rescale == "norm":
                before = math.fsum(row[task] for row in square)
                kept = math.fsum(row[task] for row, m in zip(square, keep[task], strict=True) if m)
                # What is protected keeps its own share of the norm.
                factor = math.sqrt(before / kept) if kept else 1.0
            factors[:, task] = torch.tensor([factor if m else 0.0 for m in keep[task]], dtype=torch.float64)
        return _Layers(factors=dict(zip(layers, factors, strict=True)), sizes=context.sizes)

    def apply(self, view: TensorView, context: _Layers) -> Tensor:
        """Return the pruned task vectors ``(T, n)``."""
        if self.eta == 0 or self._protected(view.name):
            return view.deltas
        if context.entries is not None:
            factor = 1.0 / (1.0 - self.eta) if self.rescale == "inverse_keep" else 1.0
            return context.entries.trim(view) * factor
        factors = context.factors.get(layer_of(view.name, self.granularity))
        return view.deltas if factors is None else view.deltas * factors.to(view.deltas.dtype)[:, None]

    def _protected(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.protect)


def _drift(square: float, base_square: float) -> float:
    """Return ‖τ‖ / ‖θ₀‖; a layer that was 0 and moved has drifted infinitely."""
    if base_square:
        return math.sqrt(square / base_square)
    return math.inf if square else 0.0


def _blocks(values: Tensor) -> list[list[float]]:
    """Return, for each of T rows of fp64 values ``(T, n)``, the sums over grid blocks."""
    return [block_sums(row) for row in values]


def _totals(partial: Partial, kind: str, layers: Sequence[str]) -> list[list[float]]:
    """Add block sums exactly, layer by layer: one row of T totals for each layer."""
    rows: dict[str, list[list[list[float]]]] = {layer: [] for layer in layers}
    for key, value in partial.items():
        if isinstance(key, tuple) and key[0] == kind:
            layer = key[1] if kind else ""
            if layer in rows:  # layers that did not move were measured too
                rows[layer].append(value)
    return [
        [math.fsum(itertools.chain.from_iterable(piece[task] for piece in pieces)) for task in range(len(pieces[0]))]
        if pieces
        else []
        for pieces in rows.values()
    ]
