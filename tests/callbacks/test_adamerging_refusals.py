"""What AdaMerging skips or refuses: numbers that are not finite, and settings that cannot work, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adamerging_job as job
import lightning as L
import pytest
import torch
from adamerging_helpers import Checkpoints, state_of, streams, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge import TaskVectors
from lightning_merge.callbacks import AdaMerging
from lightning_merge.errors import UserError
from lightning_merge.objectives import Entropy, FeatureDistance, MarginalEntropy, Supervised


@pytest.fixture(scope="module")
def checkpoints() -> Checkpoints:
    return job.fine_tuned()


@pytest.fixture
def task_vectors(checkpoints: Checkpoints) -> TaskVectors:
    return TaskVectors.open(*checkpoints)


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


def test_models_of_another_base_are_refused(checkpoints: Checkpoints) -> None:
    """The same architecture, trained from other first weights: headers cannot tell."""
    base, models = checkpoints
    generator = torch.Generator().manual_seed(5)
    other = {name: torch.randn(value.shape, generator=generator) for name, value in base.items()}
    refused("'even' hardly shares its weights with the base", AdaMerging(TaskVectors.open(other, models)))


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


@pytest.mark.parametrize(("pattern", "told"), [("clasifier", "fits none of"), (".", None), ("weight", None)])
def test_patterns_to_ignore_that_leave_nothing_out_are_refused(
    task_vectors: TaskVectors, pattern: str, told: str | None
) -> None:
    """A slip of the pen, or tensors that are merged all the same."""
    refused(told or "fits only merged parameters or heads", AdaMerging(task_vectors, ignore=[pattern]))


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"constraint": "clamp"}, "learned with constraint free"), ({"objectives": [MarginalEntropy()]}, "objectives")],
)
def test_a_checkpoint_goes_on_with_its_own_settings_only(
    task_vectors: TaskVectors, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    first = trainer(AdaMerging(task_vectors))
    first.fit(job.UsersModule(), streams())
    first.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(UserError, match=told):
        trainer(AdaMerging(task_vectors, **settings), max_epochs=2).fit(
            job.UsersModule(), streams(), ckpt_path=tmp_path / "first.ckpt"
        )
