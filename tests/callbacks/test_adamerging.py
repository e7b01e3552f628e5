"""AdaMerging's mechanics in one process: its steps are the method's, and everything it changed is put back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adamerging_job as job
import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge import TaskVectors
from lightning_merge.callbacks import AdaMerging
from lightning_merge.coefficients import Coefficients
from lightning_merge.errors import UserError
from lightning_merge.objectives import Distillation, Entropy, FeatureDistance, MarginalEntropy, Supervised

Checkpoints = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def checkpoints() -> Checkpoints:
    return job.fine_tuned()


@pytest.fixture
def task_vectors(checkpoints: Checkpoints) -> TaskVectors:
    return TaskVectors.open(*checkpoints)


def streams(rows: int = 64, batch_size: int = 16) -> dict[str, DataLoader]:
    return {
        task: DataLoader(TensorDataset(*(part[:rows] for part in job.rows(task))), batch_size=batch_size)
        for task in job.TASKS
    }


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def state_of(module: L.LightningModule) -> dict[str, Any]:
    """Everything of a module that a callback might leave changed, but for its weights."""
    return {
        "attributes": {name for name in vars(module) if name not in ("_trainer", "_fabric")},
        "methods": [getattr(module, name).__func__ for name in ("training_step", "configure_optimizers", "backward")],
        "flags": [parameter.requires_grad for parameter in module.parameters()],
        "gradients": [parameter.grad is None for parameter in module.parameters()],
        "hooks": [len(parameter._post_accumulate_grad_hooks or ()) for parameter in module.parameters()],
        "modes": [part.training for part in module.modules()],
        "modules": [name for name, _ in module.named_modules()],
        "automatic": module.automatic_optimization,
    }


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


def weights_of(checkpoints: Checkpoints, scalars: Coefficients) -> dict[str, Tensor]:
    base, models = checkpoints
    values = scalars()
    return {
        name: base[name]
        + sum(values[scalars.span(name)][place] * (models[m][name] - base[name]) for place, m in enumerate(models))
        for name in sorted(base)
    }


def forward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(job.UsersModule().eval(), weights, (x,))


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


def test_schedulers_and_settings_reach_the_coefficients(task_vectors: TaskVectors) -> None:
    callback = AdaMerging(
        task_vectors,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0),
    )
    monitor = L.pytorch.callbacks.LearningRateMonitor()
    fit = trainer(callback, monitor, logger=L.pytorch.loggers.CSVLogger(""), log_every_n_steps=1, default_root_dir="")
    fit.loggers.clear()
    fit.callbacks.remove(monitor)
    fit.fit(job.UsersModule(), streams())
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.0
    first = AdaMerging(task_vectors, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    trainer(first, max_steps=1).fit(job.UsersModule(), streams())
    torch.testing.assert_close(callback.scalars.raw.data, first.scalars.raw.data)


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


# --- numbers that are not finite --------------------------------------------------------------------------------------


class Broken(job.UsersModule):
    """Answers NaN for one task in some steps."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad, self.calls = bad, 0

    def answer(self, x: Tensor, task: str) -> Tensor:
        logits = self(x)
        if task == "odd":
            self.calls += 1
            return logits * float("nan") if self.calls - 1 in self.bad else logits
        return logits


def test_a_step_with_nan_is_as_if_it_had_not_been(task_vectors: TaskVectors) -> None:
    callback = AdaMerging(task_vectors, logits="answer", learning_rate=1e-2)
    module = Broken({2, 3})
    trainer(callback).fit(module, streams())
    short = AdaMerging(task_vectors, logits="answer", learning_rate=1e-2)
    trainer(short, limit_train_batches=2).fit(Broken(set()), streams())
    torch.testing.assert_close(callback.learned(), short.learned(), rtol=0, atol=0)
    assert callback.bad_steps == 2
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def test_nan_in_step_after_step_stops_and_names_the_task(task_vectors: TaskVectors) -> None:
    callback = AdaMerging(task_vectors, logits="answer", max_bad_steps=2)
    with pytest.raises(UserError, match="the task 'odd' was NaN or infinite in 2 steps in a row"):
        trainer(callback, max_epochs=5).fit(Broken({0, 2, 3}), streams())


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(message: str, callback: AdaMerging, module: L.LightningModule | None = None, **settings: Any) -> None:
    data = settings.pop("data", streams())
    module = job.UsersModule() if module is None else module
    before = state_of(module)
    with pytest.raises(UserError, match=message):
        trainer(callback, **settings).fit(module, data)
    assert state_of(module)["flags"] == before["flags"] and state_of(module)["methods"] == before["methods"]


def test_streams_that_are_not_the_tasks_are_refused(task_vectors: TaskVectors) -> None:
    data = streams()
    wrong = {"even": data["even"], "od": data["odd"], "small": data["small"]}
    refused(
        r"are even, od, small; the tasks are even, odd, small.*Did you mean 'odd'", AdaMerging(task_vectors), data=wrong
    )
    refused("a dict of loaders with the keys", AdaMerging(task_vectors), data=data["even"])

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return wrong

    with pytest.raises(UserError, match="the tasks are"):
        trainer(AdaMerging(task_vectors)).fit(job.UsersModule(), datamodule=Data())


def test_parameters_that_nothing_covers_are_listed(task_vectors: TaskVectors) -> None:
    class More(job.UsersModule):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(3, 3)

    refused(r"2 trainable parameters of More .*gate\.weight, gate\.bias", AdaMerging(task_vectors), More())
    trainer(AdaMerging(task_vectors, ignore=["^gate"])).fit(More(), streams())
    trainer(AdaMerging(task_vectors)).fit(_frozen(More()), streams())


def _frozen(module: Any) -> Any:
    module.gate.requires_grad_(False)
    return module


def test_logits_are_looked_at_in_the_first_batch(task_vectors: TaskVectors) -> None:
    class Odd(job.UsersModule):
        def tokens(self, x: Tensor) -> Tensor:
            return self(x)[:, None].expand(-1, 5, -1)

        def chosen(self, x: Tensor) -> Tensor:
            return self(x).argmax(1, keepdim=True).expand(-1, 3)

        def detached(self, x: Tensor) -> Tensor:
            return self(x).detach()

        def one(self, x: Tensor) -> Tensor:
            return self(x)[:, :1]

        def several(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self(x), x

    for method, message in (
        ("tokens", r"shape \(16, 5, 10\)"),
        ("chosen", "torch.int64"),
        ("detached", "does not depend on the merged weights"),
        ("one", r"shape \(16, 1\)"),
        ("several", "gave tuple for the task 'even'"),
    ):
        refused(message, AdaMerging(task_vectors, logits=method), Odd())
    refused("no method 'forwrd'.*Did you mean 'forward'", AdaMerging(task_vectors, logits="forwrd"))


def test_settings_that_cannot_work_are_refused(checkpoints: Checkpoints, task_vectors: TaskVectors) -> None:
    base, models = checkpoints
    refused("have none. Expected", AdaMerging(TaskVectors.open(None, models)))
    narrow = {name: value[:16] for name, value in base.items()}
    refused("Expected the same architecture", AdaMerging(TaskVectors.open(narrow, dict.fromkeys(job.TASKS, narrow))))
    heads = {"even": nn.Linear(33, 2), "odd": nn.Linear(33, 2)}
    refused("no head for the task 'small'", AdaMerging(task_vectors, heads=heads))
    refused("Unknown task of a head 'big'", AdaMerging(task_vectors, heads={**heads, "big": nn.Linear(33, 2)}))
    refused("features=", AdaMerging(task_vectors, objectives=[FeatureDistance()]))
    refused("precision '16-true'", AdaMerging(task_vectors), precision="16-true")
    one = job.rows("even")[0]
    unlabeled = {task: DataLoader(TensorDataset(one), batch_size=16) for task in job.TASKS}
    refused("holds no labels", AdaMerging(task_vectors, objectives=[Supervised()]), data=unlabeled)
    with pytest.raises(UserError, match="objectives"):
        AdaMerging(task_vectors, objectives=[])
    with pytest.raises(UserError, match="Unknown model 'eve'"):
        AdaMerging(task_vectors, models={"even": "eve"})


def test_a_second_adamerging_is_refused(task_vectors: TaskVectors) -> None:
    class Other(AdaMerging):
        @property
        def state_key(self) -> str:
            return "other"

    with pytest.raises(UserError, match="2 callbacks"):
        trainer(AdaMerging(task_vectors), Other(task_vectors)).fit(job.UsersModule(), streams())


def test_objects_of_the_other_lightning_are_refused(task_vectors: TaskVectors) -> None:
    package = pytest.importorskip("pytorch_lightning")

    class Theirs(package.Callback):
        pass

    with pytest.raises(UserError, match="callback Theirs is one of 'pytorch_lightning'"):
        trainer(AdaMerging(task_vectors), Theirs()).fit(job.UsersModule(), streams())


def test_batch_norm_is_in_evaluation_or_refused() -> None:
    class Training(job.UsersModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.train()

    torch.manual_seed(0)
    base = {name: value.clone() for name, value in job.UsersModule(norm=True).state_dict().items()}
    models = {
        task: {n: v + 0.1 * torch.rand_like(v) if v.is_floating_point() else v for n, v in base.items()}
        for task in job.TASKS
    }
    vectors = TaskVectors.open(base, models)
    refused("'encoder.1' .BatchNorm1d. of Training is in training mode", AdaMerging(vectors), Training(norm=True))
    module = job.UsersModule(norm=True)
    trainer(AdaMerging(vectors)).fit(module, streams())
    mean = torch.stack([models[task]["encoder.1.running_mean"] for task in job.TASKS]).mean(0)
    torch.testing.assert_close(module.encoder[1].running_mean, mean)  # no batch has moved it
    assert module.encoder[1].training
    # dropout alone is switched off again, in silence: what is learned is the same
    found = []
    for kind in (Training, job.UsersModule):
        callback = AdaMerging(TaskVectors.open(*job.fine_tuned()), objectives=[Entropy(), MarginalEntropy(0.1)])
        trainer(callback).fit(kind(dropout=0.5), streams())
        found.append(callback.learned())
    torch.testing.assert_close(*found)
