"""WUDI-Merging (Cheng et al., 2025, arXiv 2503.08099): least interference, with task vectors in place of inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.errors import UserError
from lightning_merge.methods.base import TensorMerge, hyperparameter
from lightning_merge.methods.matrices import merge_matrices, total_of
from lightning_merge.tensor_view import TensorView


def interference(merged: Tensor, matrices: Collection[Tensor]) -> float:
    """Return Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖², which WUDI minimises over τ; a τ_t of 0 has no part in it."""
    return sum(
        float(((merged - matrix) @ matrix.mT).square().sum() / matrix.square().sum())
        for matrix in matrices
        if matrix.any()
    )


def least_interference(matrices: Collection[Tensor]) -> Tensor:
    """Return the minimiser of :func:`interference` that changes Σ τ_t least.

    The gradient vanishes where τ A = B, with A = Σ A_t, B = Σ τ_t A_t, A_t = τ_tᵀ τ_t / ‖τ_t‖². Directions in which A
    is singular are those that no τ_t has, so Σ τ_t has none of them either, and B A⁺ is the nearest solution. With the
    stacked rows S of τ_t / ‖τ_t‖, A is Sᵀ S; where S has fewer rows than columns, S Sᵀ is decomposed instead.
    """
    rows, columns = next(iter(matrices)).shape
    if rows * len(matrices) >= columns:
        gram, product = normal_equations(matrices)
        return product @ pseudo_inverse(gram)
    units, lengths = unit_matrices(matrices)
    stacked = units.flatten(0, 1)  # S, (T · m, n)
    wanted = (lengths[:, None, None] * (units @ units.mT)).flatten(0, 1)  # what S τᵀ should be, (T · m, m)
    return (pseudo_inverse(stacked @ stacked.mT) @ wanted).mT @ stacked


def normal_equations(matrices: Collection[Tensor]) -> tuple[Tensor, Tensor]:
    """Return A = Σ A_t ``(n, n)`` and B = Σ τ_t A_t ``(m, n)``."""
    rows, columns = next(iter(matrices)).shape
    gram = torch.zeros(columns, columns, dtype=torch.float64)
    product = torch.zeros(rows, columns, dtype=torch.float64)
    for matrix in matrices:
        if matrix.any():
            own = matrix.mT @ matrix / matrix.square().sum()
            gram += own
            product.addmm_(matrix, own)
    return gram, product


def unit_matrices(matrices: Collection[Tensor]) -> tuple[Tensor, Tensor]:
    """Return τ_t / ‖τ_t‖ ``(T, m, n)`` and ‖τ_t‖ ``(T,)`` of those that are not 0."""
    present = [matrix for matrix in matrices if matrix.any()]
    if not present:
        return torch.zeros(0, *next(iter(matrices)).shape, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    lengths = torch.stack([matrix.norm() for matrix in present])
    return torch.stack(present).div_(lengths[:, None, None]), lengths


def pseudo_inverse(gram: Tensor) -> Tensor:
    """Return X⁺ of a symmetric positive semidefinite matrix; eigenvalues that are only rounding count as 0."""
    values, vectors = torch.linalg.eigh(gram)
    present = values > len(gram) * torch.finfo(gram.dtype).eps * values[-1:]
    vectors = vectors[:, present]
    return (vectors / values[present]) @ vectors.mT


def descend(matrices: Collection[Tensor], iterations: int, learning_rate: float) -> Tensor:
    """Minimise :func:`interference` by Adam from Σ τ_t.

    In fp64: Adam divides by the size of past gradients, which makes steps of the rounding of small ones.
    """
    point = total_of(matrices)
    if sum(bool(matrix.any()) for matrix in matrices) <= 1:
        return point  # the minimum itself, where all slope is rounding
    gradient = interference_gradient(matrices)
    first, second = torch.zeros_like(point), torch.zeros_like(point)
    for step in range(1, iterations + 1):
        slope = gradient(point)
        first.lerp_(slope, 0.1)
        second.mul_(0.999).addcmul_(slope, slope, value=0.001)
        deviation = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
        point.addcdiv_(first, deviation, value=-learning_rate / (1 - 0.9**step))
    return point


def interference_gradient(matrices: Collection[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return τ ↦ 2 (τ A − B), by way of A or of the stacked rows S of A = Sᵀ S, whichever takes less."""
    rows, columns = next(iter(matrices)).shape
    if 2 * rows * len(matrices) >= columns:
        gram, product = (2 * term for term in normal_equations(matrices))
        return lambda point: torch.addmm(product, point, gram, beta=-1)
    units, lengths = unit_matrices(matrices)
    product = 2 * torch.einsum("t,tab,tbn->an", lengths, units @ units.mT, units)
    stacked = units.flatten(0, 1)
    return lambda point: torch.addmm(product, point @ stacked.mT, stacked, beta=-1, alpha=2)


@dataclass(frozen=True)
class Wudi(TensorMerge):
    """Find, for each linear layer, the task vector that disturbs every task least where that task's inputs lie.

    The rows of a layer's τ_t are combinations of the inputs it was tuned on and stand in for them: the merge is
    θ₀ + τ with the least Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖². ``closed`` solves this exactly: the solution that changes
    Σ τ_t least, at any scale of τ. ``adam`` walks from Σ τ_t towards it for a fixed number of steps of a fixed length,
    as the paper does, which counts on the walk ending early. Convolutions are matrices (out, in · k · k); biases,
    norms, what has a side of 1 and what ``exclude`` names get the mean of the task vectors. A task whose matrix did not
    change has no part in it.

    Args:
        solver: ``closed`` or ``adam``.
        iterations: Steps of Adam, a whole number in [1, 100000]; the paper's 300 by default.
        learning_rate: Of Adam, in (0, 1]: about how far an entry moves in one step. The paper's 1e-5 by default, which
            suits the small τ of large pretrained models.
        exclude: Patterns of matrices that are no linear layers: an embedding's rows are outputs, not what it is
            multiplied with. Names with ``embed``, ``wte``, ``wpe`` or ``shared`` by default.

    Raises:
        UserError: Iterations that are no whole number, or a pattern that is no regular expression.

    Cost: up to three passes over each matrix ``(m, n)``; ``closed`` T products and one eigendecomposition of order
        min(n, T · m), ``adam`` T products and one more for each iteration, all in fp64 in one thread. Memory for each
        thread, as multiples of the largest matrix in fp32: about 20, or 10 n / m where that is more, with the products;
        about 8 T where n > T · m.
    Reference: Cheng et al., 2025, Whoever Started the Interference Should End It, arXiv 2503.08099, algorithm 1. (Its
        appendix has a closed form with a ridge ω instead of the least change, found weaker than Adam.)

    Example:
        >>> import torch
        >>> from lightning_merge import TaskVectors
        >>> base = {"weight": torch.ones(2, 2)}
        >>> a = {"weight": base["weight"] + torch.tensor([[0.5, 0.0], [0.25, 0.0]])}
        >>> b = {"weight": base["weight"] + torch.tensor([[0.25, 0.0], [0.0, 0.125]])}
        >>> task_vectors = TaskVectors.open(base, {"a": a, "b": b})
        >>> Wudi()(task_vectors)["weight"].round(decimals=4)
        tensor([[1.3889, 1.0000],
                [1.1389, 1.1250]])
    """

    solver: Literal["closed", "adam"] = "closed"
    iterations: int = hyperparameter(300, "[1, 100000]")
    learning_rate: float = hyperparameter(1e-5, "(0, 1]")
    exclude: list[str] = field(default_factory=lambda: ["embed", r"(^|\.)(wte|wpe|shared)\."])

    paper: ClassVar[str] = "WUDI-Merging (Cheng et al., 2025), arXiv 2503.08099"
    device_ready: ClassVar[bool] = True
    tensor_copies: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations != int(self.iterations):
            raise UserError(f"Wudi: iterations must be a whole number, got {self.iterations}.")
        if isinstance(self.exclude, str):
            raise UserError(f"Wudi: exclude must be a list of patterns, got '{self.exclude}'.")
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise UserError(
                    f"Wudi: the pattern '{pattern}' to exclude is no regular expression ({error}). "
                    "Expected one such as 'embeddings' or 'layer[.]0[.]'."
                ) from error

    @property
    def layout(self) -> Literal["pieces", "rows", "tensor"]:
        """Matrices are solved for as a whole."""
        return "tensor"

    def apply(self, view: TensorView, context: Any) -> Tensor:
        """Return θ₀ + the task vector of least interference."""

        def kernel(matrices: Collection[Tensor]) -> Tensor:
            if self.solver == "closed":
                return least_interference(matrices)
            return descend(matrices, int(self.iterations), self.learning_rate)

        excluded = any(re.search(pattern, view.name) for pattern in self.exclude)
        return merge_matrices(view, kernel, excluded=excluded)
