"""A LightningModule that knows nothing of this package: fine-tuned twice, merged from the command line, it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge.cli import main

# --- what the user has ------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Two layers that share their weights, batch norm, and the pixels' order as an integer buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.norm, self.out = nn.BatchNorm1d(64), nn.Linear(64, width)
        self.register_buffer("order", torch.arange(64).flip(0))

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.first(images[:, self.order]))
        return self.out(self.norm(torch.relu(self.second(hidden))))


class Classifier(L.LightningModule):
    def __init__(self, width: int = 10, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Network(width)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


def digits(mirrored: bool) -> tuple[TensorDataset, TensorDataset]:
    """Training and test rows of the digits as they are, or mirrored."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32) / 16
    rows = (images.flip(-1) if mirrored else images).flatten(1)
    labels = torch.as_tensor(data.target)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return TensorDataset(rows[train], labels[train]), TensorDataset(rows[test], labels[test])


def train(module: Classifier, rows: Any, path: Path, epochs: int) -> Path:
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=path.parent,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0)))
    trainer.save_checkpoint(path)
    return path


@torch.no_grad()
def accuracy(module: Classifier, mirrored: bool) -> float:
    images, labels = digits(mirrored)[1].tensors
    return (module.eval().net(images).argmax(-1) == labels).float().mean().item()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base trained on a few rows of both kinds, and two fine-tunings of it, one of each kind."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    few = [torch.utils.data.Subset(digits(mirrored)[0], range(150)) for mirrored in (False, True)]
    base = train(Classifier(), torch.utils.data.ConcatDataset(few), folder / "base.ckpt", epochs=10)
    paths = {"base": base}
    for name, mirrored in (("upright", False), ("mirrored", True)):
        module = Classifier.load_from_checkpoint(base, lr=1e-3)
        paths[name] = train(module, digits(mirrored)[0], folder / f"{name}.ckpt", epochs=4)
    return paths


# --- what this package does for it ------------------------------------------------------------------------------


def merge(checkpoints: dict[str, Path], output: Path, *options: str) -> None:
    models = f"{{upright: {checkpoints['upright']}, mirrored: {checkpoints['mirrored']}}}"
    given = ["--base", str(checkpoints["base"]), "--models", models, "--output", str(output), *options]
    assert main(["merge", "--method", "TaskArithmetic", "--method.scale", "0.5", *given]) == 0


def expected_of(checkpoints: dict[str, Path], prefix: str = "") -> dict[str, Tensor]:
    """The merge by hand: the mean of the two, which λ = 0.5 over two task vectors is; statistics averaged."""
    states = {name: torch.load(path, weights_only=True)["state_dict"] for name, path in checkpoints.items()}
    expected = {}
    for name, value in states["base"].items():
        if name.startswith(prefix):
            mean = (states["upright"][name].double() + states["mirrored"][name].double()) / 2
            expected[name.removeprefix(prefix)] = mean.to(value.dtype) if value.is_floating_point() else value
    return expected


def check_answers(module: Classifier, checkpoints: dict[str, Path]) -> None:
    """One model does both tasks: better than the base on their mean, and than the other task's model on each."""
    tuned = {name: Classifier.load_from_checkpoint(path) for name, path in checkpoints.items()}
    merged = {mirrored: accuracy(module, mirrored) for mirrored in (False, True)}
    assert sum(merged.values()) > accuracy(tuned["base"], False) + accuracy(tuned["base"], True)
    assert merged[False] > accuracy(tuned["mirrored"], False) and merged[True] > accuracy(tuned["upright"], True)
    assert min(merged.values()) > 0.85


def test_the_merged_checkpoint_loads_strictly_into_the_users_module(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    merge(checkpoints, tmp_path / "merged.ckpt")
    module = Classifier.load_from_checkpoint(tmp_path / "merged.ckpt", strict=True)
    assert module.hparams == {"width": 10, "lr": 3e-3}  # the base's own
    torch.testing.assert_close(dict(module.state_dict()), expected_of(checkpoints), rtol=1e-5, atol=1e-7)
    assert module.net.second.weight is module.net.first.weight
    check_answers(module, checkpoints)


def test_the_merged_safetensors_loads_strictly_into_the_users_module(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    merge(checkpoints, tmp_path / "merged.safetensors")
    tensors = load_file(tmp_path / "merged.safetensors")
    module = Classifier()
    module.load_state_dict(tensors, strict=True)
    torch.testing.assert_close(tensors, expected_of(checkpoints), rtol=1e-5, atol=1e-7)
    assert torch.equal(tensors["net.first.weight"], tensors["net.second.weight"])
    assert tensors["net.order"].dtype == torch.int64 and tensors["net.norm.num_batches_tracked"].dtype == torch.int64
    check_answers(module, checkpoints)


def test_a_prefix_gives_the_inner_network_alone_and_returns_to_the_checkpoint(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    merge(checkpoints, tmp_path / "inner.safetensors", "--prefix", "net.")
    network = Network(10)
    network.load_state_dict(load_file(tmp_path / "inner.safetensors"), strict=True)
    torch.testing.assert_close(dict(network.state_dict()), expected_of(checkpoints, "net."), rtol=1e-5, atol=1e-7)
    merge(checkpoints, tmp_path / "whole.ckpt", "--prefix", "net.")
    module = Classifier.load_from_checkpoint(tmp_path / "whole.ckpt", strict=True)
    for name, value in network.state_dict().items():
        assert torch.equal(module.net.state_dict()[name], value)


def test_the_users_files_stay_as_they_were(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    before = {name: path.read_bytes() for name, path in checkpoints.items()}
    merge(checkpoints, tmp_path / "merged.ckpt")
    merge(checkpoints, tmp_path / "merged.safetensors", "--batch_norm", "base")
    assert {name: path.read_bytes() for name, path in checkpoints.items()} == before
    base = torch.load(checkpoints["base"], weights_only=True)["state_dict"]
    assert torch.equal(load_file(tmp_path / "merged.safetensors")["net.norm.running_var"], base["net.norm.running_var"])


def test_the_merged_checkpoint_is_trained_on_by_the_users_trainer(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    merge(checkpoints, tmp_path / "merged.ckpt")
    module = Classifier.load_from_checkpoint(tmp_path / "merged.ckpt", strict=True)
    before = accuracy(module, False)
    train(module.train(), digits(False)[0], tmp_path / "again.ckpt", epochs=2)
    assert accuracy(module, False) > before - 0.02
