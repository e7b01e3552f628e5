"""Scalars finer than coefficients: masks over singular components, factors of output rows; pruned pairs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

from lightning_merge import TaskVectors
from lightning_merge.callbacks import AdaMerging
from lightning_merge.coefficients import Coefficients
from lightning_merge.components import Components
from lightning_merge.errors import UserError
from lightning_merge.merged_weights import MergedWeights, is_sharded
from lightning_merge.methods import Dare, LwPTV, TaskArithmetic
from lightning_merge.pruned_pairs import pruned_pairs
from lightning_merge.rank_masks import RankMasks, singular_factors
from lightning_merge.row_coefficients import RowCoefficients

# Tall, wide, a convolution, an embedding, one column, and what is no matrix. Uneven over two processes.
SHAPES = {
    "tall.weight": (7, 4),
    "wide.weight": (3, 8),
    "conv.weight": (5, 2, 2, 2),
    "embed.weight": (9, 3),
    "column.weight": (6, 1),
    "norm.weight": (7,),
    "one.bias": (1,),
}
TASKS = ("a", "b", "c")
State = dict[str, Tensor]


class Bag(nn.Module):
    """The tensors as parameters of submodules, and a loss that bends in all of them."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            owner, kind = name.split(".")
            child = nn.Module()
            child.register_parameter(kind, nn.Parameter(torch.zeros(shape)))
            setattr(self, owner, child)


def loss_of(tensors: State) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=next(iter(tensors.values())).dtype)
    for name in sorted(SHAPES):
        weight = torch.randn(SHAPES[name], generator=generator).to(total.dtype)
        total = total + (weight * tensors[name]).sum().tanh() + 0.3 * tensors[name].square().sum()
    return total


def vectors() -> tuple[State, dict[str, State], TaskVectors]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    models = {t: {n: v + 0.3 * torch.randn(v.shape, generator=generator) for n, v in base.items()} for t in TASKS}
    return base, models, TaskVectors.open(base, models)


def by_svd(tau: Tensor) -> list[Tensor]:
    """The components of one task vector, each a whole tensor, the largest first; the task vector where it is none."""
    if tau.dim() < 2 or min(tau.shape[0], tau[0].numel()) == 1:
        return [tau]
    u, sigma, vh = torch.linalg.svd(tau.reshape(len(tau), -1), full_matrices=False)
    return [(sigma[i] * torch.outer(u[:, i], vh[i])).reshape(tau.shape) for i in range(len(sigma))]


def by_svd_and_rest(tau: Tensor) -> list[Tensor]:
    """Two components and what they leave."""
    parts = by_svd(tau)
    return parts if len(parts) < 3 else [*parts[:2], sum(parts[3:], parts[2])]


def by_row(tau: Tensor) -> list[Tensor]:
    if tau.dim() < 2 or min(tau.shape[0], tau[0].numel()) == 1:
        return [tau]
    only = torch.eye(len(tau), dtype=tau.dtype).reshape(len(tau), len(tau), *[1] * (tau.dim() - 1))
    return list(only * tau)


def explicit(scalars: Components, values: Tensor, components: Callable[[Tensor], list[Tensor]]) -> State:
    """θ₀ + Σ value · component, each written out, in fp64 and differentiable in the values."""
    base, models, _ = vectors()
    out: State = {}
    for name in SHAPES:
        mine = values[scalars.span(name)].reshape(len(TASKS), -1)
        out[name] = base[name].double()
        for row, task in zip(mine, TASKS, strict=True):
            parts = components((models[task][name] - base[name]).double())
            for value, part in zip(row, parts, strict=False):
                out[name] = out[name] + value.double() * part
    return out


def perturbed(scalars: Components) -> Components:
    """Away from the start, so that no two scalars are alike; masks of both kinds."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in scalars.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return scalars


def backward(scalars: Components, module: Bag, merged: MergedWeights) -> dict[str, Tensor]:
    merged.attach()
    loss_of(dict(module.named_parameters())).backward()
    merged.backward()
    merged.detach()
    return {name: p.grad.clone() for name, p in scalars.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("make", "components"),
    [
        (lambda tv: RankMasks.of(tv), by_svd),
        (lambda tv: RankMasks.of(tv, mode="soft", rank=0.5, keep=0.4), by_svd),
        (lambda tv: RankMasks.of(tv, rank=2, coefficients=Coefficients(TASKS, sorted(SHAPES), by="task")), by_svd),
        (lambda tv: RankMasks.of(tv, rank=2, rest=True, mode="soft"), by_svd_and_rest),
        (lambda tv: RowCoefficients.of(tv), by_row),
    ],
    ids=["hard", "soft", "rank-2-by-task", "rank-2-and-rest", "rows"],
)
def test_weights_and_gradients_are_those_of_the_explicit_sum(
    make: Callable[[TaskVectors], Components], components: Callable[[Tensor], list[Tensor]]
) -> None:
    *_, task_vectors = vectors()
    scalars = perturbed(make(task_vectors))
    module = Bag()
    merged = MergedWeights(module, task_vectors, scalars)
    written = explicit(scalars, scalars(), components)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.double(), written[name], rtol=0, atol=2e-6)

    found = backward(scalars, module, merged)
    scalars.zero_grad()
    loss_of(explicit(scalars, scalars(), components)).backward()
    assert set(found) == {"raw", "coefficients.raw"}
    for name, parameter in scalars.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any()
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_passes_a_mask_as_a_sigmoids() -> None:
    masks = RankMasks(["a"], {"w": (2, 2)}, margin=0.2, initial=2.0)
    with torch.no_grad():
        masks.raw.copy_(torch.tensor([0.2, -0.1]))
    values = masks()
    assert values.tolist() == [2.0, 0.0], "exactly λ or exactly 0"
    values.sum().backward()
    s = torch.tensor([1.0, -0.5]).sigmoid()
    torch.testing.assert_close(masks.raw.grad, 2.0 * s * (1 - s) / 0.2)
    assert masks.coefficients.raw.grad is not None
    assert masks.coefficients.raw.grad.item() == 1.0, "one of two components is merged"


@pytest.mark.parametrize(
    ("kind", "settings"), [(RankMasks, {}), (RankMasks, {"rank": 1, "rest": True}), (RowCoefficients, {})]
)
def test_with_all_factors_one_it_is_task_arithmetic(kind: type[Components], settings: dict[str, Any]) -> None:
    _, _, task_vectors = vectors()
    module = Bag()
    MergedWeights(module, task_vectors, kind.of(task_vectors, **settings, initial={"a": 0.2, "b": 0.5, "c": -0.1}))
    expected = TaskArithmetic(scale={"a": 0.2, "b": 0.5, "c": -0.1})(task_vectors)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-6)


def test_keep_takes_the_leading_components() -> None:
    base, models, task_vectors = vectors()
    module = Bag()
    masks = RankMasks.of(task_vectors, keep=0.5, initial=1.0, whole=["^embed"])
    MergedWeights(module, task_vectors, masks)
    for name, parameter in module.named_parameters():
        expected = base[name].double()
        for task in TASKS:
            tau = (models[task][name] - base[name]).double()
            parts = [tau] if name.startswith("embed") else by_svd(tau)
            expected = expected + sum(parts[: -(-len(parts) // 2)])
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=3e-6)
    assert masks.kept()["b"] == {"tall.weight": 2, "wide.weight": 2, "conv.weight": 3}
    table = masks.table()
    assert table["a"]["tall.weight"] == pytest.approx(0.5) and table["a"]["norm.weight"] == pytest.approx(1.0)


def test_factors_of_a_matrix_without_full_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, 2, generator=generator) @ torch.randn(2, 20, generator=generator)
    for each in (matrix, matrix.mT, torch.zeros(3, 4)):
        left, right = singular_factors(each, min(each.shape))
        torch.testing.assert_close(left @ right, each.double(), rtol=0, atol=1e-12)
        sizes = left.norm(dim=0) * right.norm(dim=1)
        assert (sizes.diff() <= 1e-6).all(), "the largest first"
        torch.testing.assert_close(sizes, torch.linalg.svdvals(each.double()), rtol=1e-6, atol=1e-6)


def test_a_component_that_harms_is_masked_and_the_others_stay() -> None:
    """τ = 3 u₁v₁ᵀ + 2 u₂v₂ᵀ + 1 u₃v₃ᵀ, and the wanted weights lack the second: no rank fits, a mask does."""
    generator = torch.Generator().manual_seed(4)
    u, v = (torch.linalg.qr(torch.randn(6, 3, generator=generator))[0] for _ in range(2))
    sigma = torch.tensor([3.0, 2.0, 1.0])
    tau, wanted = (u * sigma) @ v.mT, (u * sigma * torch.tensor([1.0, 0.0, 1.0])) @ v.mT
    module = nn.Linear(6, 6, bias=False)
    task_vectors = TaskVectors.open({"weight": torch.zeros(6, 6)}, {"a": {"weight": tau}})
    masks = RankMasks.of(task_vectors, rank=3, initial=1.0, learn_coefficients=False, margin=0.045)
    merged = MergedWeights(module, task_vectors, masks)
    # Against eps the rounding in the gradients of the other two, which are 0, is nothing.
    optimizer = torch.optim.Adam(masks.parameters(), lr=0.01, eps=1e-3)
    merged.attach()
    for step in range(12):
        (module.weight - wanted).square().sum().backward()
        optimizer.zero_grad()
        merged.backward()
        optimizer.step()
        merged.materialise()
        assert masks().tolist() == ([1.0, 1.0, 1.0] if step < 4 else [1.0, 0.0, 1.0]), "flips after margin / rate"
    torch.testing.assert_close(module.weight.detach(), wanted, rtol=0, atol=1e-6)
    assert masks.kept() == {"a": {"weight": 2}}
    assert masks.drift() == pytest.approx(3**-0.5)
    assert masks.coefficients.raw.item() == 1.0


def test_bf16_halves_what_is_held_and_keeps_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"weight": torch.randn(96, 64, generator=generator)}
    models = {t: {"weight": base["weight"] + 0.1 * torch.randn(96, 64, generator=generator)} for t in TASKS}
    task_vectors = TaskVectors.open(base, models)
    goal = torch.randn(96, 64, generator=generator)
    found: dict[str, tuple[Tensor, int]] = {}
    for dtype in ("float32", "bfloat16"):
        masks = RankMasks.of(task_vectors, mode="soft")
        module = nn.Linear(64, 96, bias=False)
        merged = MergedWeights(module, task_vectors, masks, dtype=dtype)
        merged.attach()
        (module.weight * goal).sum().backward()
        merged.backward()
        found[dtype] = masks.raw.grad.clone(), merged.nbytes["task_vectors"]
    exact, size = found["float32"]
    rounded, half = found["bfloat16"]
    assert size == 4 * 3 * 64 * (96 + 64) and half * 2 == size
    assert (rounded - exact).norm() < 0.02 * exact.norm()


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
        RowCoefficients.of(task_vectors),
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


@pytest.mark.parametrize("kind", [RankMasks, RowCoefficients])
def test_the_callback_learns_them(kind: type[Components], tmp_path: Path) -> None:
    """Handed over as ``scalars``, in the place of coefficients, by what makes them of the task vectors."""
    L.seed_everything(0)
    module = Classifier()
    base = {name: value.clone() for name, value in module.state_dict().items()}
    models = {t: {name: v + 0.5 * torch.randn_like(v) for name, v in base.items()} for t in ("a", "b")}
    task_vectors = TaskVectors.open(base, models)
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
    "rows": RowCoefficients.of,
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
    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for shard in shards:
        for name, gradient in expected.items():
            torch.testing.assert_close(shard["gradients"][name], gradient, rtol=1e-5, atol=1e-6)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(shard["weights"][name], parameter.detach(), rtol=0, atol=1e-6)
    parts = [shard["bytes"]["task_vectors"] for shard in shards]
    assert all(part < held for part in parts)
    if kind == "rows":
        assert sum(parts) == held


# --- pruned pairs -------------------------------------------------------------------------------------------------


def test_pruned_pairs_are_those_that_lose_everything() -> None:
    base, models, _ = vectors()
    models["b"]["norm.weight"] = base["norm.weight"].clone()  # never changed: no pruning took it
    task_vectors = TaskVectors.open(base, models)
    steps = [LwPTV(eta=0.5, granularity="tensor"), Dare(drop_rate=0.5)]
    pairs = pruned_pairs(task_vectors, steps, seed=3)
    expected = []
    for name in sorted(SHAPES):
        for task in TASKS:
            only = {t: float(t == task) for t in TASKS}
            alone = TaskArithmetic(scale=only)(task_vectors, transforms=steps, seed=3)
            if torch.equal(alone[name], base[name]) and not torch.equal(models[task][name], base[name]):
                expected.append((task, name))
    assert pairs == expected and len(pairs) >= 6
    assert pruned_pairs(task_vectors, []) == []


@pytest.mark.parametrize("by", ["tensor", "task"])
@pytest.mark.parametrize("constraint", ["free", "clamp", "softmax"])
def test_pruned_coefficients_stay_zero(by: Any, constraint: Any) -> None:
    """Under Adam with weight decay, in every table, and the merge is that of the other pairs alone."""
    base, models, task_vectors = vectors()
    transforms = [LwPTV(eta=0.5, granularity="tensor")]
    pairs = pruned_pairs(task_vectors, transforms)
    assert len(pairs) == 3 * 3
    scalars = Coefficients(TASKS, task_vectors.tensor_names, by=by, constraint=constraint, zero=pairs)
    first = scalars.raw.detach().clone()
    module = Bag()
    merged = MergedWeights(module, task_vectors, scalars, transforms=transforms)
    optimizer = torch.optim.AdamW(scalars.parameters(), lr=0.03, weight_decay=0.1)
    merged.attach()
    for _ in range(5):
        loss_of(dict(module.named_parameters())).backward()
        optimizer.zero_grad()
        merged.backward()
        if by == "tensor":
            for task, name in pairs:
                assert scalars.raw.grad[TASKS.index(task), scalars.groups.index(name)] == 0, "is not trained"
        optimizer.step()
        merged.materialise()
    values = scalars().detach()
    assert not torch.equal(scalars.raw, first) and scalars.drift() > 0
    for task, name in pairs:
        assert values[scalars.span(name)][TASKS.index(task)] == 0.0
        if by == "tensor":
            assert scalars.table()[task][name] == 0.0
        assert scalars.schedule().values[name][task] == 0.0
    for name, parameter in module.named_parameters():
        expected = base[name].clone()
        for row, task in enumerate(TASKS):
            if (task, name) not in pairs:
                expected += values[scalars.span(name)][row] * (models[task][name] - base[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=2e-6)
    if constraint == "softmax" and by == "tensor":
        sums = scalars.by_group().sum(dim=0).detach()
        assert all(np.isclose(value, 1, atol=1e-6) or value == 0 for value in sums.tolist())


def test_masks_take_the_pruned_pairs_of_their_coefficients() -> None:
    _, _, task_vectors = vectors()
    own = Coefficients(TASKS, task_vectors.tensor_names, zero=[("b", "tall.weight")])
    masks = RankMasks.of(task_vectors, coefficients=own)
    values = masks()[masks.span("tall.weight")].reshape(3, -1)
    assert (values[1] == 0).all() and (values[0] != 0).all()
    masks().sum().backward()
    assert masks.raw.grad.reshape(-1)[:].count_nonzero() == masks.raw.numel() - 4


def test_pruned_names_must_exist() -> None:
    with pytest.raises(UserError, match=r"tensor of a coefficient that is 0 'wieght'.*mean 'weight'"):
        Coefficients(["a"], ["weight"], zero=[("a", "wieght")])
    with pytest.raises(UserError, match="model of a coefficient that is 0 'x'"):
        Coefficients(["a"], ["weight"], zero=[("x", "weight")])
