"""Learning on the stream of ``Trainer.test`` and ``Trainer.predict``: in which order, from what, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import adamerging_job as job
import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge import TaskVectors
from lightning_merge.callbacks import AdaMerging
from lightning_merge.callbacks.online import check_online
from lightning_merge.coefficients import Coefficients
from lightning_merge.errors import UserError

Checkpoints = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def checkpoints() -> Checkpoints:
    return job.fine_tuned()


def loaders(rows: int = 48, batch_size: int = 16) -> dict[str, DataLoader]:
    return {
        task: DataLoader(TensorDataset(*(part[:rows] for part in job.rows(task))), batch_size=batch_size)
        for task in job.TASKS
    }


def trainer(callback: L.Callback, **settings: Any) -> L.Trainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = dict.fromkeys(off, False)
    return L.Trainer(
        **{**quiet, "max_epochs": 1, "accelerator": "cpu", "inference_mode": False, "callbacks": [callback], **settings}
    )


def by_hand(checkpoints: Checkpoints, when: str) -> tuple[Coefficients, list[Tensor]]:
    """Predict and learn batch by batch, task after task, with autograd through ``functional_call``."""
    base, models = checkpoints
    scalars = Coefficients(sorted(models), sorted(base))
    optimizer = torch.optim.Adam([scalars.raw], lr=1e-2)
    module = job.UsersModule().eval()
    predictions = []

    def logits(x: Tensor) -> Tensor:
        values = scalars()
        weights = {
            name: base[name]
            + sum(values[scalars.span(name)][i] * (models[m][name] - base[name]) for i, m in enumerate(sorted(models)))
            for name in base
        }
        return torch.func.functional_call(module, weights, (x,))

    for loader in loaders().values():
        for x, _ in loader:
            if when == "before":
                predictions.append(logits(x).detach())
            optimizer.zero_grad()
            found = logits(x)
            (-(found.softmax(1) * found.log_softmax(1)).sum(1).mean()).backward()
            optimizer.step()
            if when == "after":
                predictions.append(logits(x).detach())
    return scalars, predictions


@pytest.mark.parametrize("when", ["before", "after"])
def test_each_batch_is_predicted_and_learned_from_in_the_order_asked_for(checkpoints: Checkpoints, when: str) -> None:
    scalars, expected = by_hand(checkpoints, when)
    callback = AdaMerging(TaskVectors.open(*checkpoints), learning_rate=1e-2, online=when)
    module = job.UsersModule()
    found = trainer(callback).predict(module, loaders())
    torch.testing.assert_close(
        torch.cat([x for part in found for x in part]), torch.cat(expected), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(callback.scalars.raw.data, scalars.raw.data, rtol=1e-5, atol=1e-6)
    assert module.training and all(parameter.requires_grad for parameter in module.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())

    tested = AdaMerging(TaskVectors.open(*checkpoints), learning_rate=1e-2, online=when)
    scores = trainer(tested).test(job.UsersModule(), loaders(), verbose=False)
    torch.testing.assert_close(tested.scalars.raw.data, scalars.raw.data, rtol=1e-5, atol=1e-6)
    losses = [
        nn.functional.cross_entropy(logits, y)
        for logits, (_, y) in zip(expected[:3], list(loaders()["even"]), strict=True)
    ]
    assert scores[0]["test_loss/dataloader_idx_0"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_the_two_orders_differ(checkpoints: Checkpoints) -> None:
    before, after = (torch.cat(by_hand(checkpoints, when)[1]) for when in ("before", "after"))
    assert (before - after).abs().max() > 1e-3


def test_a_batch_of_all_tasks_is_one_step(checkpoints: Checkpoints) -> None:
    class Tests(job.UsersModule):
        def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            assert set(batch) == set(job.TASKS)

    online = AdaMerging(TaskVectors.open(*checkpoints), learning_rate=1e-2, online="after")
    trainer(online).test(Tests(), CombinedLoader(loaders(), "max_size_cycle"), verbose=False)
    fitted = AdaMerging(TaskVectors.open(*checkpoints), learning_rate=1e-2)
    trainer(fitted).fit(job.UsersModule(), loaders())
    torch.testing.assert_close(online.learned(), fitted.learned(), rtol=1e-5, atol=1e-6)


def test_it_goes_on_from_a_fit_and_repeats_itself(checkpoints: Checkpoints) -> None:
    callback, module = (
        AdaMerging(TaskVectors.open(*checkpoints), learning_rate=1e-2, online="before"),
        job.UsersModule(),
    )
    trainer(callback).fit(module, loaders())
    fitted = module(job.rows("even")[0][:16])
    found = [trainer(callback).predict(module, loaders()) for _ in range(2)]
    torch.testing.assert_close(found[0], found[1])
    module.eval()
    with torch.no_grad():
        assert (module(job.rows("even")[0][:16]) - found[0][0][0]).abs().max() > 1e-3  # it has learned since
    assert fitted.shape == found[0][0][0].shape


def test_without_it_test_and_predict_are_left_alone(checkpoints: Checkpoints) -> None:
    callback, module = AdaMerging(TaskVectors.open(*checkpoints)), job.UsersModule()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(callback, inference_mode=True).test(module, loaders()["even"], verbose=False)
    torch.testing.assert_close(dict(module.state_dict()), start, rtol=0, atol=0)
    assert callback.scalars is None


def test_what_cannot_work_is_refused(checkpoints: Checkpoints) -> None:
    vectors = TaskVectors.open(*checkpoints)
    with pytest.raises(UserError, match=r"Trainer\.test.*inference mode.*inference_mode=False"):
        trainer(AdaMerging(vectors, online="before"), inference_mode=True).test(job.UsersModule(), loaders())
    data = loaders()
    with pytest.raises(UserError, match="do not say of which task"):
        trainer(AdaMerging(vectors, online="before")).predict(job.UsersModule(), list(data.values()))
    with pytest.raises(UserError, match=r"'od' of Trainer.predict is of no task.*Did you mean 'odd'"):
        trainer(AdaMerging(vectors, online="before")).predict(job.UsersModule(), {"od": data["odd"]})
    with pytest.raises(UserError, match="Unknown time to learn online 'during'"):
        AdaMerging(vectors, online="during")


def test_predictions_in_several_processes_are_refused() -> None:
    """Lightning deals the rows of predictions out as they are, so that one process may have a batch more."""
    loop = SimpleNamespace(inference_mode=False)
    two = SimpleNamespace(world_size=2, predict_loop=loop, test_loop=loop)
    with pytest.raises(UserError, match=r"during Trainer\.predict in 2 processes.*devices=1"):
        check_online(two, "predict")
    check_online(two, "test")
    two.world_size = 1
    check_online(two, "predict")
