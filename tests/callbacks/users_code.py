"""What a user has: modules, data and fine-tunings in Lightning. Nothing here knows of any package for merging."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

VIEWS = ("upright", "mirrored", "rotated")

# --- data -----------------------------------------------------------------------------------------------------------


def digits(view: str, split: str = "train") -> TensorDataset:
    """The digits, seen in one of three ways: 1000 rows to train on, 400 to adapt on, the rest to measure on."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32) / 16
    images = {"upright": images, "mirrored": images.flip(-1), "rotated": images.rot90(1, (1, 2))}[view]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    rows = {"train": order[:1000], "stream": order[1000:1400], "test": order[1400:]}[split]
    return TensorDataset(images[rows].contiguous(), torch.as_tensor(data.target)[rows])


class ViewedDigits(L.LightningDataModule):
    """One labelled loader over some views, for supervised training."""

    def __init__(self, views: Sequence[str], rows: int = 1000) -> None:
        super().__init__()
        self.views, self.rows = views, rows

    def train_dataloader(self) -> DataLoader:
        parts: list[Dataset] = [Subset(digits(view), range(self.rows)) for view in self.views]
        generator = torch.Generator().manual_seed(0)
        return DataLoader(ConcatDataset(parts), batch_size=50, shuffle=True, generator=generator)


class Streams(L.LightningDataModule):
    """A dict of loaders, one for each view, whose order does not depend on how many processes share the rows.

    ``batch_size`` is that of all processes together; row i of a step is the same row however many they are.
    """

    def __init__(self, views: Sequence[str] = VIEWS, batch_size: int = 40, labels: bool = True) -> None:
        super().__init__()
        self.views, self.batch_size, self.labels = views, batch_size, labels

    def train_dataloader(self) -> dict[str, DataLoader]:
        return {view: self.loader(view) for view in self.views}

    def loader(self, view: str) -> DataLoader:
        assert self.trainer is not None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        rows: Any = digits(view, "stream")
        if not self.labels:
            rows = [image for image, _ in rows]
        sampler = DistributedSampler(rows, world, rank, shuffle=False)
        return DataLoader(rows, batch_size=self.batch_size // world, sampler=sampler)


# --- modules --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a perceptron, each with its residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(tokens)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.dropout(self.out(mixed))
        return tokens + self.dropout(self.down(F.gelu(self.up(self.norm_2(tokens)))))


class Classifier(L.LightningModule):
    """Sixteen patches of an image, two blocks, one head for all views."""

    def __init__(self, width: int = 32, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Linear(4, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def features(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)  # (B, 16, 4)
        tokens = self.embed(patches) + self.place
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens.mean(1))

    def answer(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Some parameters are not trained, and the optimizer is not told of them.
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=self.hparams["lr"])


class Sharded(Classifier):
    """The same, cut over the processes of a device mesh where there is one."""

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self.blocks[0], FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)


class HoldsTransformer(L.LightningModule):
    """A model of transformers in an attribute, and for each view a head, which the user's method chooses by its key."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8,
            patch_size=2, num_channels=1, qkv_bias=False, hidden_dropout_prob=0.1,
        )  # fmt: skip
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({view: nn.Linear(32, 10) for view in VIEWS})
        self.view = VIEWS[0]

    def logits(self, images: Tensor, task: str) -> Tensor:
        return self.heads[task](self.vit(images.unsqueeze(1)).last_hidden_state[:, 0])

    def features(self, images: Tensor) -> Tensor:
        return self.vit(images.unsqueeze(1)).last_hidden_state[:, 0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits(batch[0], self.view), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class WithBatchNorm(L.LightningModule):
    """A perceptron with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(images.flatten(1)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


# --- training -------------------------------------------------------------------------------------------------------


def trainer(folder: Path, **options: Any) -> L.Trainer:
    """The user's trainer."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, **quiet}
    return L.Trainer(default_root_dir=folder, **{**defaults, **options})


def train(module: L.LightningModule, views: Sequence[str], path: Path, epochs: int, rows: int = 1000) -> Path:
    """Train on labels and save a checkpoint."""
    used = trainer(path.parent, max_epochs=epochs)
    used.fit(module, ViewedDigits(views, rows))
    used.save_checkpoint(path)
    return path


def finetuned_checkpoints(folder: Path, kind: type[L.LightningModule] = Classifier) -> dict[str, Path]:
    """A base trained on a few rows of all views, and one fine-tuning of it for each view."""
    torch.manual_seed(0)
    paths = {"base": train(kind(), VIEWS, folder / "base.ckpt", epochs=40, rows=300)}
    for view in VIEWS:
        torch.manual_seed(1)
        module = kind.load_from_checkpoint(paths["base"], lr=1e-3, map_location="cpu")
        paths[view] = train(module, [view], folder / f"{view}.ckpt", epochs=8)
    return paths


@torch.no_grad()
def measure(module: L.LightningModule, split: str = "test") -> dict[str, tuple[float, float]]:
    """Accuracy and mean entropy on each view, in evaluation mode; the module's modes are put back."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    found = {}
    for view in VIEWS:
        images, labels = digits(view, split).tensors
        logits = module(images)
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
        found[view] = ((logits.argmax(-1) == labels).float().mean().item(), entropy)
    for part, mode in modes.items():
        part.training = mode
    return found
