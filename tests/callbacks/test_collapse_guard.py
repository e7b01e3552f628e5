"""The guard on real data: it stops a collapse and rolls it back, leaves a healthy run alone, and survives a resume."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from adapted_digits import DOMAINS, Classifier, accuracy, make_models, open_task_vectors, rows, stream, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor

from lightning_merge.callbacks import AdaMerging, CollapseGuard
from lightning_merge.collapse_signs import Rules, diversity, falls, overlap, read, whole
from lightning_merge.errors import UserError

# --- signs --------------------------------------------------------------------------------------------------------


def test_overlap_by_hand() -> None:
    # At equal mean entropy nothing is scaled: p = (.9, .1), q = (.1, .9) share .1 + .1.
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()
    torch.testing.assert_close(overlap(p, q), torch.tensor([0.2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(overlap(p, p), torch.tensor([1.0]), atol=1e-5, rtol=0)


def test_overlap_does_not_see_how_sharp_a_merge_is() -> None:
    torch.manual_seed(0)
    logits, individual = torch.randn(50, 7), 3 * torch.randn(50, 7)
    torch.testing.assert_close(overlap(logits, individual), overlap(9 * logits, individual), atol=1e-4, rtol=0)


def test_overlap_of_rows_that_are_not_finite() -> None:
    individual = torch.randn(3, 4)
    broken = individual.clone()
    broken[1, 2] = math.nan
    shares = overlap(broken, individual)
    assert shares[1] == 0 and shares[0] > 0.8
    assert overlap(torch.full((3, 4), math.nan), individual).sum() == 0


def test_rows_with_masked_classes_are_answers() -> None:
    individual = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    noisy = individual + torch.randn(8, 3, generator=torch.Generator().manual_seed(1))

    def masked(logits: Tensor) -> Tensor:
        return torch.cat([logits, torch.full((8, 2), -math.inf)], dim=1)

    seen, plain = (
        read({"a": change(noisy)}, {"a": change(noisy)}, {"a": change(individual)}).tasks["a"]
        for change in (masked, lambda logits: logits)
    )
    for name in ("entropy", "agreement_with_start", "agreement", "overlap"):
        assert getattr(seen, name) == pytest.approx(getattr(plain, name), abs=1e-5)
    for broken in (math.nan, math.inf):
        row = masked(noisy)
        row[0, 1] = broken
        assert read({"a": row}, {"a": row}, {"a": masked(individual)}).tasks["a"].agreement_with_start == 7 / 8
    assert not whole(torch.full((1, 3), -math.inf)).any()


def test_agreement_bounds_accuracy() -> None:
    # |accuracy - agreement| <= 1 - accuracy of the individual model, whatever the labels.
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        merge, individual = torch.randn(2, 40, 5, generator=generator)
        labels = torch.where(torch.rand(40, generator=generator) < 0.7, individual.argmax(-1), torch.tensor(0))
        seen = read({"a": merge}, {"a": merge}, {"a": individual}).tasks["a"]
        right = (merge.argmax(-1) == labels).float().mean()
        assert abs(right - seen.agreement) <= 1 - (individual.argmax(-1) == labels).float().mean() + 1e-6


def test_diversity_by_hand() -> None:
    assert diversity(torch.tensor([2, 2, 2]), 4) == 0
    assert diversity(torch.arange(4), 4) == pytest.approx(1)
    assert diversity(torch.tensor([0, 1]), 4) == pytest.approx(0.5)


def test_a_fall_is_large_and_certain() -> None:
    individual = {"a": 4 * torch.randn(200, 3, generator=torch.Generator().manual_seed(1))}
    good = read(individual, individual, individual)
    one_row = individual["a"].clone()
    one_row[0] = -one_row[0]
    # One row of 200 is neither; one of 4 is large (more than a margin of 0.01) and not certain.
    assert not falls(read({"a": one_row}, individual, individual), good, 0.01)
    few = {"a": individual["a"][:4]}
    assert not falls(read({"a": one_row[:4]}, few, few), read(few, few, few), 0.01)
    assert falls(read({"a": -individual["a"]}, individual, individual), good, 0.01)
    assert not falls(read({"a": -individual["a"]}, individual, individual), good, 1.0)
    assert not falls(good, good, 0.0)


def test_one_collapsed_task_is_seen_while_the_mean_rises() -> None:
    # Three tasks improve and one is given one class: the mean overlap rises, and yet it is a collapse.
    generator = torch.Generator().manual_seed(0)
    individual = {task: 5 * torch.randn(60, 6, generator=generator) for task in "abcd"}
    start = {task: logits + 9 * torch.randn(60, 6, generator=generator) for task, logits in individual.items()}
    now = dict(individual, d=torch.zeros(60, 6).index_fill(1, torch.tensor([2]), 8.0))
    first, seen = read(start, start, individual), read(now, start, individual)
    rules = Rules(first, read(individual, start, individual), margin=0.01, diversity=0.5)
    assert seen.mean.overlap > first.mean.overlap
    assert rules.poor(seen) == ["d"] and len(rules.alarms(seen, first)) == 1
    assert rules.alarms(read(dict(individual), start, individual), first) == []


def test_a_task_whose_rows_are_of_one_class_is_not_poor() -> None:
    individual = {"a": torch.zeros(20, 5).index_fill(1, torch.tensor([3]), 4.0)}
    start = {"a": torch.randn(20, 5)}
    rules = Rules(read(start, start, individual), read(individual, start, individual), 0.01, 0.5)
    assert rules.poor(read(individual, start, individual)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"watch_batches": 0}, "watch_batches must be a whole number of at least 1, got 0"),
        ({"every_n_steps": 2.5}, "every_n_steps must be a whole number"),
        ({"patience": True}, "patience must be a whole number"),
        ({"margin": -0.1}, r"margin must be in \[0, 1\], got -0.1"),
        ({"diversity": 50}, r"diversity must be in \[0, 1\], got 50. Did you mean 0.5\?"),
        ({"margin": math.nan}, "margin must be in"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CollapseGuard(**settings)


# --- real runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("digits"))


class Merging(AdaMerging):
    """AdaMerging, without the individual models of some tasks if so chosen."""

    without: tuple[str, ...] = ()

    def individual(self, task: str) -> Any:
        if task in self.without:
            raise UserError(f"The model of '{task}' is gone.")
        return super().individual(task)


def adapt(
    models: dict[str, Path],
    guard: L.Callback | None,
    learning_rate: float,
    epochs: int = 2,
    ckpt_path: str | None = None,
    without: tuple[str, ...] = (),
    shuffle: bool = True,
    **settings: Any,
) -> tuple[Classifier, dict[str, Tensor]]:
    module = Classifier()
    module.load_state_dict(load_file(models["base"]))
    merging = Merging(open_task_vectors(models), learning_rate=learning_rate)
    merging.without = without
    callbacks = [merging, *([guard] if guard else []), *settings.pop("more", [])]
    trainer(max_epochs=epochs, callbacks=callbacks, **settings).fit(
        module, stream(shuffle=shuffle), ckpt_path=ckpt_path
    )
    return module, merging.learned()


def starting_accuracy(models: dict[str, Path]) -> float:
    module = Classifier()
    tensors = {name: load_file(path) for name, path in models.items()}
    base = tensors["base"]
    module.load_state_dict({k: v + 0.3 * sum(tensors[d][k] - v for d in DOMAINS) for k, v in base.items()})
    return accuracy(module)


def test_a_collapse_is_stopped_and_rolled_back(models: dict[str, Path]) -> None:
    alone, _ = adapt(models, None, learning_rate=0.1)
    guard = CollapseGuard()
    guarded, learned = adapt(models, guard, learning_rate=0.1)
    start = starting_accuracy(models)
    assert accuracy(alone) < start - 0.3  # it does collapse, and its entropy falls all the while
    assert accuracy(guarded) >= start - 0.01
    assert guard.stopped_step == 30 and guard.best_step == 0  # three checks in a row; all are worse than the start
    assert guard.history[-1]["entropy"] < 0.2 * guard.history[0]["entropy"]
    assert guard.history[-1]["alarms"]
    assert all(torch.equal(value, guard._initial[name]) for name, value in learned.items())


def test_a_slow_collapse_ends_at_its_best_state(models: dict[str, Path]) -> None:
    """Entropy falls throughout; accuracy rises first. The state that is kept is near the best one."""
    alone, _ = adapt(models, None, learning_rate=0.01)
    guard = CollapseGuard(every_n_steps=5)
    guarded, _ = adapt(models, guard, learning_rate=0.01)
    start = starting_accuracy(models)
    assert accuracy(alone) < start - 0.05
    assert accuracy(guarded) > start + 0.02
    assert guard.stopped_step is not None and 0 < guard.best_step < guard.stopped_step


def test_a_healthy_run_is_left_alone(models: dict[str, Path]) -> None:
    """Not only the accuracy: the coefficients are those of the run without a guard, to the last bit."""
    alone, without = adapt(models, None, learning_rate=1e-3)
    guard = CollapseGuard(every_n_steps=5)
    guarded, learned = adapt(models, guard, learning_rate=1e-3)
    assert accuracy(alone) > starting_accuracy(models) + 0.02
    assert guard.stopped_step is None and not guard.rolled_back
    assert not any(record["alarms"] for record in guard.history)
    assert all(torch.equal(learned[name], without[name]) for name in without)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), guarded.parameters(), strict=True))


@pytest.mark.parametrize("learning_rate", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 17])
def test_the_end_is_never_worse_than_the_start_by_the_criterion(
    models: dict[str, Path], learning_rate: float, steps: int
) -> None:
    """Also where the run is shorter than the watched batches, and where the last step is no step of a check."""
    guard = CollapseGuard(every_n_steps=10)
    module, _ = adapt(models, guard, learning_rate, limit_train_batches=steps, epochs=1)
    with torch.no_grad():
        now = {
            task: torch.cat([module(batch[0]) for name, batch in guard._watched.batches if name == task])
            for task in DOMAINS
        }
    final = read(now, guard._watched.start, guard._watched.individual).mean.overlap
    assert final >= guard.history[0]["overlap"] - 1e-6


def test_nothing_is_disturbed_by_watching(models: dict[str, Path]) -> None:
    """Random numbers, modes, and the weights between a check and the next step."""

    class Noise(L.Callback):
        def __init__(self) -> None:
            self.drawn: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.drawn.append(float(torch.rand(())))

    drawn = []
    for guard in (None, CollapseGuard(every_n_steps=1, patience=1000)):
        torch.manual_seed(0)
        noise = Noise()
        module, _ = adapt(models, guard, 1e-3, epochs=1, limit_train_batches=6, more=[noise])
        drawn.append(noise.drawn)
        assert module.training
    assert drawn[0] == drawn[1]


def test_a_stopped_run_equals_a_straight_one(models: dict[str, Path], tmp_path: Path) -> None:
    """Resumed at an epoch's end, where the guard had put an earlier state back: it goes on from the last one."""
    kwargs: Any = {"learning_rate": 0.01, "limit_train_batches": 12, "shuffle": False}

    def guard() -> CollapseGuard:
        return CollapseGuard(every_n_steps=5, patience=50)

    straight, once = guard(), guard()
    _, expected = adapt(models, straight, epochs=3, **kwargs)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    first, _ = adapt(models, once, epochs=2, enable_checkpointing=True, more=[saving], **kwargs)
    assert once.rolled_back and 0 < once.best_step < 24
    saved = torch.load(saving.last_model_path, weights_only=True)
    # What is saved at the end is the state that was put back, in the user's own module.
    for name, value in first.state_dict().items():
        torch.testing.assert_close(saved["state_dict"][name], value)
    again = guard()
    _, learned = adapt(models, again, epochs=3, ckpt_path=saving.last_model_path, **kwargs)
    assert [r["step"] for r in again.history] == [r["step"] for r in straight.history]
    for record, other in zip(again.history, straight.history, strict=True):
        assert record["overlap"] == pytest.approx(other["overlap"], abs=2e-5)
    assert again.best_step == straight.best_step
    torch.testing.assert_close(learned, expected, rtol=1e-5, atol=1e-6)


def test_large_batches_are_taken_anew_after_a_resume(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_merge.callbacks.watch.MOST_BYTES_KEPT", 0)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    guard = CollapseGuard(every_n_steps=5, patience=50)
    adapt(models, guard, 0.01, epochs=1, limit_train_batches=12, enable_checkpointing=True, more=[saving])
    saved = torch.load(saving.last_model_path, weights_only=True)["callbacks"]["CollapseGuard"]
    assert saved["watched"] is None
    again = CollapseGuard(every_n_steps=5, patience=50)
    _, learned = adapt(models, again, 0.1, epochs=3, limit_train_batches=12, ckpt_path=saving.last_model_path)
    assert again.rolled_back and again.best_step <= 24
    assert all(torch.equal(value, again._best[name]) for name, value in learned.items())


def test_a_best_state_that_other_batches_find_worse_gives_way_to_the_start(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watched batches are not saved, and on those that are taken anew what was best is worse than the start."""
    monkeypatch.setattr("lightning_merge.callbacks.watch.MOST_BYTES_KEPT", 0)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    guard = CollapseGuard(every_n_steps=5, patience=50)
    adapt(models, guard, 1e-3, epochs=1, limit_train_batches=12, enable_checkpointing=True, more=[saving])
    assert guard.best_step > 0
    saved = torch.load(saving.last_model_path, weights_only=True)
    state = saved["callbacks"]["CollapseGuard"]
    collapsed = {name: torch.full_like(value, 4.0) for name, value in state["learned"][1].items()}
    state["learned"][1] = state["live"]["best"] = state["live"]["learned"] = collapsed
    state["live"]["best_step"] = 10
    torch.save(saved, tmp_path / "changed.ckpt")
    again = CollapseGuard(every_n_steps=5, patience=50)
    _, learned = adapt(models, again, 1e-12, epochs=2, limit_train_batches=12, ckpt_path=str(tmp_path / "changed.ckpt"))
    assert again.rolled_back and again.best_step == 0
    assert all(torch.equal(value, again._initial[name]) for name, value in learned.items())


def test_without_individual_models_it_says_so_and_sees_few_classes(
    models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    guard = CollapseGuard()
    caplog.set_level("INFO")
    module, _ = adapt(models, guard, 0.1, without=DOMAINS)
    assert "no individual model of any task: only a collapse into few classes can be seen" in caplog.text
    assert "The model of 'inverted' is gone" in caplog.text
    assert guard.stopped_step is not None and accuracy(module) >= starting_accuracy(models) - 0.05
    healthy = CollapseGuard()
    adapt(models, healthy, 1e-3, without=DOMAINS)
    assert not healthy.rolled_back
    one = CollapseGuard()
    adapt(models, one, 1e-3, epochs=1, limit_train_batches=10, without=("mirrored",))
    assert math.isnan(one.history[-1]["tasks"]["mirrored"]["overlap"]) and one.history[-1]["overlap"] > 0.5
    assert "no individual model of 'mirrored'" in caplog.text


def test_answers_that_are_not_finite_are_a_collapse(models: dict[str, Path]) -> None:
    class Poison(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            merging = trainer.callbacks[0]
            if trainer.global_step == 8:
                merging.restore({name: torch.full_like(v, math.nan) for name, v in merging.learned().items()})

    guard = CollapseGuard(every_n_steps=4, patience=1)
    # The poison comes before the guard, and the guard's check before the next step.
    module = Classifier()
    module.load_state_dict(load_file(models["base"]))
    merging = AdaMerging(open_task_vectors(models), learning_rate=1e-3)
    trainer(max_epochs=1, callbacks=[merging, Poison(), guard]).fit(module, stream())
    assert guard.stopped_step == 8 and guard.best_step == 4
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_a_fit_that_learns_no_merge_is_refused() -> None:
    images, labels = rows("inverted", "dev")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 32)
    with pytest.raises(UserError, match="Nothing in this fit learns a merge: neither Classifier"):
        trainer(max_epochs=1, callbacks=[CollapseGuard()]).fit(Classifier(), loader)


def test_it_says_in_one_line_what_it_did(models: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    adapt(models, CollapseGuard(patience=1), 0.1, epochs=1, limit_train_batches=12)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("CollapseGuard")]
    assert len(said) == 1 and "stopped at step 10 after 1 check in a row that saw a collapse" in said[0]
    assert "back to the starting merge" in said[0]


@pytest.mark.slow
def test_two_processes_decide_alike_and_resume(models: dict[str, Path], tmp_path: Path) -> None:
    job = Path(__file__).with_name("guard_job.py")
    done = subprocess.run(
        [sys.executable, str(job), str(models["base"].parent), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("straight", "resumed"):
        ranks = [torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert ranks[0]["history"] == ranks[1]["history"] and ranks[0]["steps"] == ranks[1]["steps"]
        assert ranks[0]["watched"] == ranks[1]["watched"] == 4 * 16 * len(DOMAINS)  # half of them from each process
        assert all(torch.equal(value, ranks[1]["learned"][name]) for name, value in ranks[0]["learned"].items())
    straight, resumed = (torch.load(tmp_path / f"{name}_0.pt", weights_only=True) for name in ("straight", "resumed"))
    assert straight["steps"] == resumed["steps"] and straight["steps"][1] is not None  # both were stopped
    assert straight["overlaps"] == pytest.approx(resumed["overlaps"], abs=2e-5)
    torch.testing.assert_close(straight["learned"], resumed["learned"], rtol=1e-5, atol=1e-6)
