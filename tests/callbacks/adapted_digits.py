"""Digits in three domains: a small classifier that knows nothing of merging, pretrained and fine-tuned on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge import TaskVectors
from lightning_merge.data import Digits

DOMAINS = ("inverted", "mirrored", "rotated")


class Classifier(L.LightningModule):
    """A perceptron that answers with plain logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def rows(domain: str, split: str) -> tuple[Tensor, Tensor]:
    found = Digits(list(DOMAINS)).get(domain).splits[split]
    return torch.as_tensor(found.inputs).flatten(1).float() / 255, torch.as_tensor(found.labels)


def trainer(**settings: Any) -> L.Trainer:
    """A trainer that writes nothing unless asked to."""
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
             "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip
    return L.Trainer(**(quiet | settings))


def stream(batch_size: int = 16, shuffle: bool = True) -> dict[str, DataLoader]:
    """Unlabeled test images by domain, shuffled alike each time it is made."""
    return {
        domain: DataLoader(
            TensorDataset(rows(domain, "test")[0]), batch_size, shuffle=shuffle, drop_last=True,
            generator=torch.Generator().manual_seed(place),
        )
        for place, domain in enumerate(DOMAINS)
    }  # fmt: skip


@torch.no_grad()
def accuracy(module: Classifier) -> float:
    """The mean over domains of the accuracy on test rows."""
    right = [
        (module(images).argmax(-1) == labels).float().mean() for images, labels in (rows(d, "test") for d in DOMAINS)
    ]
    return float(torch.stack(right).mean())


def make_models(folder: Path) -> dict[str, Path]:
    """Pretrain on a few rows of all domains, fine-tune on each; about ten seconds."""

    def fit(module: Classifier, images: Tensor, labels: Tensor, epochs: int, name: str) -> Path:
        torch.manual_seed(0)
        loader = DataLoader(TensorDataset(images, labels), 32, shuffle=True)
        trainer(max_epochs=epochs).fit(module, loader)
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / f"{name}.safetensors")
        return folder / f"{name}.safetensors"

    torch.manual_seed(0)
    base = Classifier()
    few = [(images[:60], labels[:60]) for images, labels in (rows(d, "train") for d in DOMAINS)]
    paths = {"base": fit(base, torch.cat([f[0] for f in few]), torch.cat([f[1] for f in few]), 10, "base")}
    for domain in DOMAINS:
        tuned = Classifier()
        tuned.load_state_dict(base.state_dict())
        paths[domain] = fit(tuned, *rows(domain, "train"), 6, domain)
    return paths


def open_task_vectors(paths: dict[str, Path]) -> TaskVectors:
    return TaskVectors.open(paths["base"], {d: paths[d] for d in DOMAINS})
