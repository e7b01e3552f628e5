"""What a learned merge minimises: small classes over what the model answers for one batch of one task.

An objective that needs no labels adapts on unlabeled data: entropy (AdaMerging, arXiv 2310.02575), the marginal entropy
that keeps predictions diverse, the distance of features (Representation Surgery, arXiv 2402.02705) or of answers to
those of the individual models. ``Supervised`` takes a few labels. The losses of tasks are averaged.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lightning_merge.errors import UserError, unknown


@dataclass
class Outputs:
    """What a model answers for one batch of one task.

    Args:
        task: The task.
        logits: ``(B, C)``.
        features: ``(B, d)``, the representation before the head, where there is one.
        labels: ``(B,)`` int64, where the batch holds any.
        individual: What the task's own fine-tuned model answers, without gradient, where an objective asks for it.
        extra: Anything else, by name: such as features after each block.
    """

    task: str
    logits: Tensor | None = None
    features: Tensor | None = None
    labels: Tensor | None = None
    individual: Outputs | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Objective(ABC):
    """One term of what is minimised, on one batch of one task.

    Args:
        weight: Its factor in the sum of terms, finite.
    """

    weight: float = 1.0

    # Of ``logits``, ``features``, ``labels``, ``individual``: what must be there.
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UserError(f"{type(self).__name__}: weight must be a finite number, got {self.weight}.")

    @property
    def name(self) -> str:
        """How the term is called in logs: ``marginal_entropy``."""
        kind = type(self).__name__
        return "".join("_" * (place > 0 and c.isupper()) + c.lower() for place, c in enumerate(kind))

    @abstractmethod
    def __call__(self, outputs: Outputs) -> Tensor:
        """Return the term, a scalar in fp32, without its weight."""


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax of each row, ``(B, C)`` to ``(B,)``, in nats and fp32.

    Classes that are masked, with logits of -inf, add nothing.
    """
    log_p = logits.float().log_softmax(dim=-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the mean prediction of a batch, ``(B, C)`` to a scalar; log C nats if classes balance."""
    log_p = logits.float().log_softmax(dim=-1)
    # A class that is masked in every row adds nothing; where all of a sum is -inf, its gradient would be NaN.
    masked = (log_p == -math.inf).all(dim=0)
    log_mean = torch.logsumexp(log_p.masked_fill(masked, 0.0), dim=0) - math.log(len(logits))
    return -(log_mean.exp() * log_mean.masked_fill(masked, 0.0)).sum()


@dataclass
class Entropy(Objective):
    """The mean entropy of the predictions: confident answers are taken for right ones (AdaMerging, section 3.2.2).

    Example:
        >>> round(Entropy()(Outputs("a", logits=torch.tensor([[0.3, 0.0]]))).item(), 4)
        0.682
    """

    def __call__(self, outputs: Outputs) -> Tensor:
        assert outputs.logits is not None
        return entropy(outputs.logits).mean()


@dataclass
class MarginalEntropy(Objective):
    """Minus the entropy of the mean prediction: with ``Entropy`` the mutual information of input and answer.

    Entropy alone is least where everything is one class; this term is then greatest. It supposes that a batch holds
    several classes, and under several devices each takes the mean over its own rows.
    """

    def __call__(self, outputs: Outputs) -> Tensor:
        assert outputs.logits is not None
        return -marginal_entropy(outputs.logits)


@dataclass
class FeatureDistance(Objective):
    """The distance of the features to those of the task's individual model.

    Args:
        norm: ``l1``, the mean absolute difference (Representation Surgery, equation 4), or ``l2``, the mean square.
    """

    norm: Literal["l1", "l2"] = "l1"

    needs: ClassVar[frozenset[str]] = frozenset({"features", "individual"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("l1", "l2"):
            raise unknown("norm", str(self.norm), ("l1", "l2"))

    def __call__(self, outputs: Outputs) -> Tensor:
        assert outputs.features is not None and outputs.individual is not None
        assert outputs.individual.features is not None
        distance = functional.l1_loss if self.norm == "l1" else functional.mse_loss
        return distance(outputs.features.float(), outputs.individual.features.float())


@dataclass
class Distillation(Objective):
    """The cross-entropy of the predictions under those of the task's individual model (arXiv 1503.02531).

    Args:
        temperature: Divides both logits, above 0; the loss is multiplied by its square, so that gradients keep size.
    """

    temperature: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "individual"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise UserError(f"Distillation: temperature must be above 0, got {self.temperature}.")

    def __call__(self, outputs: Outputs) -> Tensor:
        assert outputs.logits is not None and outputs.individual is not None
        assert outputs.individual.logits is not None
        target = (outputs.individual.logits.float() / self.temperature).softmax(dim=-1)
        log_p = (outputs.logits.float() / self.temperature).log_softmax(dim=-1)
        # What the individual model rules out adds nothing, also where this model masks it.
        return -(target * log_p.masked_fill(target == 0, 0.0)).sum(dim=-1).mean() * self.temperature**2


@dataclass
class Supervised(Objective):
    """The cross-entropy of a few labels: learned soups (arXiv 2203.05482) and few-shot coefficients."""

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "labels"})

    def __call__(self, outputs: Outputs) -> Tensor:
        assert outputs.logits is not None and outputs.labels is not None
        return functional.cross_entropy(outputs.logits.float(), outputs.labels)
