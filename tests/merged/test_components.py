"""What scalars finer than coefficients owe their users: settings, files, the callback, shards."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from component_models import SHAPES, TASKS, Bag, backward, loss_of, perturbed, vectors
from torch import Tensor, nn

from lightning_merge import TaskVectors
from lightning_merge.callbacks import AdaMerging
from lightning_merge.coefficients import Coefficients
from lightning_merge.components import Components
from lightning_merge.errors import UserError
from lightning_merge.merged_weights import MergedWeights
from lightning_merge.rank_masks import RankMasks
from lightning_merge.shards import is_sharded

# --- settings, files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "hrad"}, "Unknown mode of rank masks 'hrad'.*mean 'hard'"),
        ({"rank": 0}, r"A rank must be at least 1, or a share in \(0, 1\], got 0"),
        ({"rank": 1.5}, "A rank must be at least 1"),
        ({"keep": 1.1}, r"keep must be in \[0, 1\], got 1.1"),
        ({"margin": 0.0}, "margin must be above 0"),
        ({"prior": -1.0}, "A prior must be at least 0"),
        ({"whole": "embed"}, r"Expected \['embed'\]"),
        ({"whole": ["("]}, r"pattern '\(' of matrices to leave whole is no regular expression"),
        ({"whole": ["."]}, "None of 7 tensors is a matrix"),
        ({"coefficients": Coefficients(["a"], ["w"])}, "of other models or tensors"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RankMasks(TASKS, SHAPES, **settings)


def test_a_scalar_has_no_rows() -> None:
    masks = RankMasks(["a", "b"], {"w": (2, 2), "temperature": ()}, initial=0.5)
    directions = masks.decompose("temperature", torch.tensor([1.0, 3.0]), slice(0, 1))
    out = torch.zeros(1)
    directions.add_to(out, masks()[masks.span("temperature")].detach())
    assert out.item() == 2.0


def test_tied_tensors_follow_one_owner() -> None:
    masks = RankMasks(["a", "b"], {"embed": (3, 2), "head": (3, 2)})
    masks.tie("head", "embed")
    with torch.no_grad():
        masks.raw[masks.span("embed")] = -1.0
    assert masks.table()["a"] == {"embed": 0.0, "head": 0.0}


def test_coefficients_that_are_not_learned_get_no_gradient() -> None:
    """Whoever trains may give every parameter a gradient; λ stays out of it all the same."""
    masks = RankMasks(["a"], {"w": (2, 2)}, learn_coefficients=False)
    assert not masks.coefficients.raw.requires_grad
    masks.requires_grad_(True)
    masks().sum().backward()
    assert masks.coefficients.raw.grad is None and masks.raw.grad is not None


def test_a_nan_is_named() -> None:
    masks = RankMasks(["a"], {"w": (2, 2)})
    with pytest.raises(UserError, match="tensor 'w' hold NaN"):
        masks.decompose("w", torch.tensor([[[1.0, float("nan")], [0.0, 1.0]]]))


def test_the_prior_pulls_back_to_the_start() -> None:
    masks = RankMasks(TASKS, SHAPES, prior=2.0)
    assert masks.penalty().item() == 0.0 and masks.drift() == 0.0
    with torch.no_grad():
        masks.raw[0] += 0.5
    assert masks.penalty().item() == pytest.approx(0.25)


def test_what_was_learned_is_saved_and_loads(tmp_path: Path) -> None:
    _, _, task_vectors = vectors()
    learned = perturbed(RankMasks.of(task_vectors, rank=0.5))
    learned.save(tmp_path / "masks.safetensors", {"note": "x"})
    fresh = RankMasks.of(task_vectors, rank=0.5)
    fresh.load(tmp_path / "masks.safetensors")
    assert torch.equal(fresh(), learned()) and fresh.drift() == 0.0 and fresh.penalty().item() == 0.0
    others = [
        RankMasks.of(task_vectors),
        RankMasks.of(task_vectors, rank=0.5, mode="soft"),
        RankMasks(["a", "b", "x"], SHAPES, rank=0.5),
    ]
    for other in others:
        with pytest.raises(UserError, match="with these settings"):
            other.load(tmp_path / "masks.safetensors")
    by_tensor = Coefficients(TASKS, task_vectors.tensor_names, initial=tmp_path / "masks.safetensors")
    assert torch.equal(by_tensor.raw, learned.coefficients.raw)


# --- in a trainer ------------------------------------------------------------------------------------------------


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("the callback trains")

    def configure_optimizers(self) -> None:
        raise AssertionError("the callback trains")


@pytest.mark.parametrize("kind", [RankMasks])
def test_the_callback_learns_them(kind: type[Components], tmp_path: Path) -> None:
    """Handed over as ``scalars``, in the place of coefficients, by what makes them of the task vectors."""
    L.seed_everything(0)
    module = Classifier()
    base = {name: value.clone() for name, value in module.state_dict().items()}
    models = {t: {name: v + 0.5 * torch.randn_like(v) for name, v in base.items()} for t in ("a", "b")}
    task_vectors = TaskVectors.open(base, models, check=False)
    streams = {t: torch.utils.data.DataLoader(torch.randn(32, 6), batch_size=8) for t in models}
    callback = AdaMerging(task_vectors, scalars=kind.of, learning_rate=0.02)
    trainer = L.Trainer(
        max_epochs=3, callbacks=[callback], accelerator="cpu", logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, streams)
    scalars = callback.scalars
    assert isinstance(scalars, kind) and scalars.drift() > 0
    assert (scalars.raw.detach() != scalars.start(8).mean()).any()
    fresh = Classifier()
    merged = MergedWeights(fresh, task_vectors, scalars)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, fresh.state_dict()[name], rtol=0, atol=1e-6)
    assert merged.nbytes["task_vectors"] > 0
    assert set(callback.table()) == {"a", "b"} and set(callback.table()["a"]) == set(base)


# --- over processes -----------------------------------------------------------------------------------------------


SHARDED: dict[str, Callable[[TaskVectors], Components]] = {
    "masks": RankMasks.of,
    "masks and rest": lambda task_vectors: RankMasks.of(task_vectors, rank=2, rest=True),
}


def _sharded(rank: int, port: int, folder: str, kind: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        _, _, task_vectors = vectors()
        scalars = perturbed(SHARDED[kind](task_vectors))
        module = Bag()
        fully_shard(module)
        assert all(is_sharded(parameter) for parameter in module.parameters())
        merged = MergedWeights(module, task_vectors, scalars)
        merged.attach()
        # The gradient that the loss has at these weights, as the sharded module would leave it behind.
        whole = {name: p.full_tensor().detach().requires_grad_() for name, p in module.named_parameters()}  # type: ignore[attr-defined]
        loss_of(whole).backward()
        for name, parameter in module.named_parameters():
            from torch.distributed.tensor import distribute_tensor

            gradient = whole[name].grad
            assert gradient is not None
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
        merged.backward()
        found = {name: p.grad for name, p in scalars.named_parameters()}
        weights = {name: p.full_tensor().detach() for name, p in module.named_parameters()}  # type: ignore[attr-defined]
        torch.save({"gradients": found, "weights": weights, "bytes": merged.nbytes}, Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SHARDED))
def test_shards_of_rows_merge_and_contract_alike(kind: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_sharded, (port, str(tmp_path), kind), nprocs=2)
    _, _, task_vectors = vectors()
    scalars = perturbed(SHARDED[kind](task_vectors))
    module = Bag()
    merged = MergedWeights(module, task_vectors, scalars)
    held = merged.nbytes["task_vectors"]
    expected = backward(scalars, module, merged)
    shards = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for shard in shards:
        for name, gradient in expected.items():
            torch.testing.assert_close(shard["gradients"][name], gradient, rtol=1e-5, atol=1e-6)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(shard["weights"][name], parameter.detach(), rtol=0, atol=1e-6)
    parts = [shard["bytes"]["task_vectors"] for shard in shards]
    assert all(part < held for part in parts)
    if kind == "rows":
        assert sum(parts) == held
