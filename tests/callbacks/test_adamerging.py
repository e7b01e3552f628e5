"""AdaMerging's mechanics in one process: its steps are the method's, and everything it changed is put back."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adamerging_job as job
import lightning as L
import pytest
import torch
from adamerging_helpers import Checkpoints, forward, state_of, streams, trainer, weights_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge import TaskVectors
from lightning_merge.callbacks import AdaMerging
from lightning_merge.coefficients import Coefficients
from lightning_merge.directions import TaskDirections
from lightning_merge.errors import UserError
from lightning_merge.merged_weights import MergedWeights
from lightning_merge.objectives import Distillation, FeatureDistance, Supervised


@pytest.fixture(scope="module")
def checkpoints() -> Checkpoints:
    return job.fine_tuned()


@pytest.fixture
def task_vectors(checkpoints: Checkpoints) -> TaskVectors:
    return TaskVectors.open(*checkpoints)


# --- the steps are those of the method --------------------------------------------------------------------------------


def reference(
    checkpoints: Checkpoints, loss_of: Callable[[str, Any, dict[str, Tensor]], Tensor], steps: int, clip: float = 0.0
) -> Coefficients:
    """λ by autograd through ``functional_call``, an independent way."""
    base, models = checkpoints
    names = sorted(models)
    scalars = Coefficients(names, sorted(base))
    optimizer = torch.optim.Adam([scalars.raw], lr=1e-2)
    batches = {task: list(loader) for task, loader in streams().items()}
    for step in range(steps):
        weights = weights_of(checkpoints, scalars)
        loss = torch.stack([loss_of(task, batches[task][step], weights) for task in job.TASKS]).mean()
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_([scalars.raw], clip)
        optimizer.step()
    return scalars


def test_it_learns_what_autograd_through_the_merge_learns(checkpoints: Checkpoints, task_vectors: TaskVectors) -> None:
    callback, module = AdaMerging(task_vectors, learning_rate=1e-2), job.UsersModule(dropout=0.5)
    trainer(callback, gradient_clip_val=0.01).fit(module, streams())
    expected = reference(checkpoints, lambda _, batch, w: _entropy(forward(w, batch[0])), steps=4, clip=0.01)
    torch.testing.assert_close(callback.scalars.raw.data, expected.raw.data, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(dict(module.state_dict()), weights_of(checkpoints, expected), rtol=1e-5, atol=1e-6)


def _entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def test_other_objectives_are_weighted_and_have_what_they_ask_for(
    checkpoints: Checkpoints, task_vectors: TaskVectors
) -> None:
    def loss(task: str, batch: Any, weights: dict[str, Tensor]) -> Tensor:
        logits, own = forward(weights, batch[0]), forward(checkpoints[1][task], batch[0]).detach()
        distillation = -(own.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        return 0.5 * distillation + 2.0 * nn.functional.cross_entropy(logits, batch[1])

    objectives = [Distillation(weight=0.5), Supervised(weight=2.0)]
    callback = AdaMerging(task_vectors, learning_rate=1e-2, objectives=objectives)
    trainer(callback).fit(job.UsersModule(), streams())
    expected = reference(checkpoints, loss, steps=4)
    torch.testing.assert_close(callback.scalars.raw.data, expected.raw.data, rtol=1e-5, atol=1e-6)
    assert set(callback.last) == {"distillation", "supervised"} and set(callback.last["supervised"]) == set(job.TASKS)


def test_accumulated_batches_are_one_larger_batch(task_vectors: TaskVectors) -> None:
    small, large = AdaMerging(task_vectors, learning_rate=1e-2), AdaMerging(task_vectors, learning_rate=1e-2)
    trainer(small, accumulate_grad_batches=2).fit(job.UsersModule(), streams(batch_size=16))
    trainer(large).fit(job.UsersModule(), streams(batch_size=32))
    torch.testing.assert_close(small.scalars.raw.data, large.scalars.raw.data, rtol=1e-5, atol=1e-6)


def test_heads_map_features_to_logits_and_do_not_learn(checkpoints: Checkpoints) -> None:
    """Features from one method and heads by task are the same as logits from one that chooses by the key."""

    class Encoder(job.UsersModule):
        def encode(self, x: Tensor) -> Tensor:
            return self.encoder(x)

        def by_task(self, x: Tensor, task: str) -> Tensor:
            return heads[task](self.encoder(x))

    torch.manual_seed(1)
    heads = {task: nn.Linear(33, 4 + place) for place, task in enumerate(job.TASKS)}
    before = copy.deepcopy({task: head.state_dict() for task, head in heads.items()})
    found = []
    for settings in ({"logits": "encode", "heads": heads}, {"logits": "by_task"}):
        vectors = TaskVectors.open(*checkpoints, ignore=["classifier"])
        callback = AdaMerging(vectors, learning_rate=1e-2, ignore=["classifier"], **settings)
        trainer(callback).fit(Encoder(), streams())
        found.append(callback.scalars.raw.data)
        for task, head in heads.items():
            torch.testing.assert_close(dict(head.state_dict()), dict(before[task]), rtol=0, atol=0)
            if "heads" in settings:  # of others the callback cannot know
                assert all(parameter.requires_grad and parameter.grad is None for parameter in head.parameters())
    torch.testing.assert_close(*found)


def test_features_are_compared_with_those_of_the_individual_model(checkpoints: Checkpoints) -> None:
    class Encoder(job.UsersModule):
        def encode(self, x: Tensor) -> Tensor:
            return self.encoder(x)

    base, models = checkpoints
    one = TaskVectors.open(base, {"even": models["even"]})
    callback = AdaMerging(one, features="encode", objectives=[FeatureDistance()], by="task", learning_rate=2e-2)
    trainer(callback, max_epochs=60).fit(Encoder(), {"even": streams()["even"]})
    # the features are those of the model itself only where λ is 1
    assert callback.scalars.raw.item() == pytest.approx(1.0, abs=0.05)
    assert callback.last["feature_distance"]["even"] < 0.05


def test_bf16_autocast_learns_nearly_the_same(task_vectors: TaskVectors) -> None:
    exact, mixed = (AdaMerging(task_vectors, learning_rate=1e-2, objectives=[Supervised()]) for _ in range(2))
    trainer(exact, max_epochs=3).fit(job.UsersModule(), streams())
    trainer(mixed, max_epochs=3, precision="bf16-mixed").fit(job.UsersModule(), streams())
    moved = (exact.scalars.raw - 0.3).norm()
    assert (exact.scalars.raw - mixed.scalars.raw).norm() < 0.1 * moved


def test_each_step_merges_once_and_contracts_each_tensor_once(
    task_vectors: TaskVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each task: τ is read twice a step, however many tasks there are."""
    counts = {"merged": 0, "contracted": 0}

    def counted(kind: type, method: str, what: str) -> None:
        original = getattr(kind, method)

        def count(self: Any, *args: Any) -> Any:
            counts[what] += 1
            return original(self, *args)

        monkeypatch.setattr(kind, method, count)

    counted(MergedWeights, "materialise", "merged")
    counted(TaskDirections, "contract", "contracted")
    trainer(AdaMerging(task_vectors)).fit(job.UsersModule(), streams())
    assert counts == {"merged": 1 + 4 + 1, "contracted": 6 * 4}  # at the start, each step and the end


def test_schedulers_reach_the_coefficients_and_are_logged(tmp_path: Path, task_vectors: TaskVectors) -> None:
    def once_and_no_more(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)

    callback = AdaMerging(task_vectors, optimizer=_sgd, lr_scheduler=once_and_no_more)
    monitor = L.pytorch.callbacks.LearningRateMonitor("step")
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name=None, version="")
    trainer(callback, monitor, logger=logger, log_every_n_steps=1).fit(job.UsersModule(), streams())
    first = AdaMerging(task_vectors, optimizer=_sgd)
    trainer(first, max_steps=1).fit(job.UsersModule(), streams())
    torch.testing.assert_close(callback.scalars.raw.data, first.scalars.raw.data)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr-SGD"]) for row in rows if row["lr-SGD"]] == [1.0, 0.0, 0.0, 0.0]
    logged = [row for row in rows if row["adamerging/entropy"]]
    assert len(logged) == 4
    for row in logged:
        by_task = [float(row[f"adamerging/entropy/{task}"]) for task in job.TASKS]
        assert float(row["adamerging/entropy"]) == pytest.approx(sum(by_task) / 3, rel=1e-5)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def test_an_optimizer_that_asks_for_several_losses_sees_the_merge_of_each(
    checkpoints: Checkpoints, task_vectors: TaskVectors
) -> None:
    """L-BFGS moves λ between two evaluations of one step."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.5, max_iter=5)

    callback = AdaMerging(task_vectors, objectives=[Supervised()], optimizer=optimizer)
    trainer(callback).fit(job.UsersModule(), streams(rows=64, batch_size=64))
    scalars = Coefficients(task_vectors.names, sorted(task_vectors.tensor_names))
    own = optimizer([scalars.raw])

    def loss() -> Tensor:
        own.zero_grad()
        weights = weights_of(checkpoints, scalars)
        parts = [job.rows(task) for task in job.TASKS]
        value = sum(nn.functional.cross_entropy(forward(weights, x[:64]), y[:64]) for x, y in parts) / 3
        value.backward()
        return value

    own.step(loss)
    torch.testing.assert_close(callback.scalars.raw.data, scalars.raw.data, rtol=1e-4, atol=1e-5)


# --- what is left behind ----------------------------------------------------------------------------------------------


class Interrupt(L.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, *args: Any) -> None:
        raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()], ids=["fit", "error", "ctrl-c"])
def test_the_module_is_left_merged_and_otherwise_as_it_was(
    checkpoints: Checkpoints, task_vectors: TaskVectors, error: BaseException | None
) -> None:
    class Manual(job.UsersModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.encoder[2].eval()
            self.encoder[0].weight.requires_grad_(False)

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("the user's own backward is for the user's own training")

    module = Manual()
    before = state_of(module)
    callback = AdaMerging(task_vectors)
    callbacks = [callback] if error is None else [callback, Interrupt(error)]
    try:
        trainer(*callbacks).fit(module, streams())
    except (RuntimeError, SystemExit):
        assert error is not None
    after = state_of(module)
    after["attributes"] -= after["attributes"] - before["attributes"] - {"training_step", "configure_optimizers"}
    assert after == before
    with torch.no_grad():
        torch.testing.assert_close(dict(module.state_dict()), weights_of(checkpoints, callback.scalars))


def test_ctrl_c_while_the_merge_comes_back_leaves_it_merged(
    checkpoints: Checkpoints, task_vectors: TaskVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an individual model was asked, half of the merge is written: the other half must follow."""
    write, individual = MergedWeights._write, MergedWeights.individual
    left = {"individuals": 4, "writes": 2}

    @contextmanager
    def counted(self: MergedWeights, model: str) -> Iterator[None]:
        with individual(self, model):
            yield
            left["individuals"] -= 1

    def interrupted(self: MergedWeights, *args: Any) -> None:
        if left["individuals"] == 0 and left["writes"] >= 0:
            left["writes"] -= 1
            if left["writes"] < 0:
                raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(MergedWeights, "individual", counted)
    monkeypatch.setattr(MergedWeights, "_write", interrupted)
    callback, module = AdaMerging(task_vectors, objectives=[Distillation()], learning_rate=1e-2), job.UsersModule()
    with pytest.raises(SystemExit):
        trainer(callback).fit(module, streams())
    assert left["writes"] == -1
    with torch.no_grad():
        torch.testing.assert_close(dict(module.state_dict()), weights_of(checkpoints, callback.scalars))


def test_the_modules_own_hooks_see_one_tasks_batch_at_a_time(task_vectors: TaskVectors) -> None:
    """A module whose batches are made ready in a transfer hook goes on making them ready."""

    class Raw(job.UsersModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x, y = batch
            return [x.float() / 16, y]

    raw = {
        task: DataLoader(TensorDataset((job.rows(task)[0][:64] * 16).to(torch.uint8), job.rows(task)[1][:64]), 16)
        for task in job.TASKS
    }
    found = []
    for module, data in ((Raw(), raw), (job.UsersModule(), streams())):
        callback = AdaMerging(task_vectors, learning_rate=1e-2)
        trainer(callback).fit(module, data)
        found.append(callback.scalars.raw.data)
    torch.testing.assert_close(*found)


def test_each_fit_starts_at_the_initial_coefficients(task_vectors: TaskVectors) -> None:
    callback = AdaMerging(task_vectors, learning_rate=1e-2)
    trainer(callback).fit(job.UsersModule(), streams())
    first = callback.learned()
    trainer(callback).fit(job.UsersModule(), streams())
    torch.testing.assert_close(callback.learned(), first)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def fit_with_checkpoints(folder: Path, vectors: TaskVectors, **settings: Any) -> tuple[AdaMerging, L.LightningModule]:
    resume = settings.pop("ckpt_path", None)
    epochs = settings.pop("max_epochs", 2)
    callback, module = AdaMerging(vectors, learning_rate=1e-2, **settings), job.UsersModule()
    saving = L.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer(callback, saving, enable_checkpointing=True, max_epochs=epochs).fit(module, streams(), ckpt_path=resume)
    return callback, module


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, task_vectors: TaskVectors) -> None:
    straight, _ = fit_with_checkpoints(tmp_path, task_vectors, max_epochs=3)
    resumed, _ = fit_with_checkpoints(
        tmp_path / "on", task_vectors, max_epochs=3, ckpt_path=str(tmp_path / "epoch=0.ckpt")
    )
    torch.testing.assert_close(resumed.learned(), straight.learned(), rtol=0, atol=1e-6)
    assert resumed.drift() == pytest.approx(straight.drift(), abs=1e-6) and straight.drift() > 0.05


def test_a_checkpoint_loads_strictly_into_the_plain_module(tmp_path: Path, task_vectors: TaskVectors) -> None:
    _, module = fit_with_checkpoints(tmp_path, task_vectors)
    path = tmp_path / "epoch=1.ckpt"
    plain = job.UsersModule.load_from_checkpoint(path, strict=True)
    torch.testing.assert_close(dict(plain.state_dict()), dict(module.state_dict()), rtol=0, atol=0)
    size = sum(value.numel() * 4 for value in plain.state_dict().values())
    assert path.stat().st_size < size + 20_000  # nothing of three task vectors


def test_a_checkpoint_of_something_else_is_refused_by_name(
    tmp_path: Path, checkpoints: Checkpoints, task_vectors: TaskVectors
) -> None:
    fit_with_checkpoints(tmp_path, task_vectors)
    path = str(tmp_path / "epoch=1.ckpt")
    base, models = checkpoints
    moved = {name: value + 0.01 for name, value in models["odd"].items()}
    for other, settings, message in (
        ({**models, "odd": moved}, {}, "model 'odd' has other weights"),
        (models, {"by": "task"}, r"shape raw \(3, 6\).*raw \(3, 1\)"),
    ):
        with pytest.raises(UserError, match=message):
            fit_with_checkpoints(
                tmp_path / "x", TaskVectors.open(base, other), ckpt_path=path, max_epochs=3, **settings
            )
    renamed = {**{name: models[name] for name in ("even", "odd")}, "smal": models["small"]}
    with pytest.raises(UserError, match=r"'small' is in the checkpoint only.*Did you mean 'smal'"):
        callback = AdaMerging(
            TaskVectors.open(base, renamed), models={t: t[:4] if t == "small" else t for t in job.TASKS}
        )
        trainer(callback, max_epochs=3).fit(job.UsersModule(), streams(), ckpt_path=path)


def test_a_checkpoint_without_coefficients_is_refused(tmp_path: Path, task_vectors: TaskVectors) -> None:
    module = job.UsersModule()
    plain = trainer()
    plain.fit(module, streams()["even"])
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(UserError, match="not written by a fit with AdaMerging"):
        trainer(AdaMerging(task_vectors)).fit(job.UsersModule(), streams(), ckpt_path=str(tmp_path / "plain.ckpt"))
