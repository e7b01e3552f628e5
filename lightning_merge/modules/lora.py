"""Low-rank adaptation of an encoder, by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_merge.errors import UserError, unknown
from lightning_merge.modules.encoder import Encoder

# the query and value projections that LoRA's paper adapts, under the names that transformers' encoders give them
QUERY_AND_VALUE = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685), by PEFT; merged into plain weights on export.

    Args:
        rank: of each update, at least 1.
        alpha: updates are multiplied by ``alpha / rank``.
        dropout: probability in [0, 1) on the input of an update.
        target_modules: ends of the names of the linear layers to adapt; none means the attention's query and value.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoraSettings: rank must be at least 1, got {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoraSettings: dropout must be in [0, 1), got {self.dropout}.")


def adapt(encoder: Encoder, lora: LoraSettings, seed: int) -> None:
    """Put PEFT's LoRA updates on an encoder's backbone, which freezes everything else."""
    import peft

    linear = {
        name.rsplit(".", 1)[-1] for name, module in encoder.backbone.named_modules() if isinstance(module, nn.Linear)
    }
    targets: Sequence[str] = lora.target_modules or [name for name in QUERY_AND_VALUE if name in linear]
    for target in targets:
        if target.rsplit(".", 1)[-1] not in linear:
            raise unknown("LoRA target module", target, linear)
    if not targets:
        raise UserError(
            "LoRA finds no query or value layers in this model. "
            f"Set lora.target_modules to some of: {', '.join(sorted(linear))}."
        )
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder.backbone = peft.get_peft_model(encoder.backbone, config)  # type: ignore[assignment]
