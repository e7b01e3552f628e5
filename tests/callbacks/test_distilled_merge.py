"""DistilledMerge in the user's trainer, on the user's module: what it learns, what it leaves alone, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import users_code
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from users_code import VIEWS, Classifier, HoldsTransformer, Streams, digits, measure, trainer

from lightning_merge import TaskVectors
from lightning_merge.callbacks import AdaptationTrace, CollapseGuard, DistilledMerge
from lightning_merge.callbacks.distilled_merge import divergence, warm_cosine
from lightning_merge.callbacks.individual_answers import IndividualAnswers
from lightning_merge.errors import UserError

TWO_PROCESSES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_distilled_merge as t
folder, checkpoints = Path(sys.argv[2]), {k: Path(v) for k, v in json.loads(sys.argv[3]).items()}
distilled = t.DistilledMerge(t.opened(checkpoints), lr_scheduler=t.constant)
used = t.trainer(folder, max_epochs=2, strategy="ddp_fork", devices=2, callbacks=[distilled, t.Keep(folder)])
used.fit(t.merged(checkpoints), t.Streams())
"""


class Keep(L.Callback):
    """Write the weights where a fit forks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.folder / "weights.pt")


class Heads(nn.Module):
    """A head that answers with the signs of the task."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 32, generator=generator))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight.t()


class Fixed(L.LightningDataModule):
    """The same 40 rows of each view at every step."""

    def train_dataloader(self) -> dict[str, DataLoader]:
        return {view: DataLoader(Subset(digits(view, "stream"), range(40)), batch_size=40) for view in VIEWS}


def constant(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def opened(checkpoints: dict[str, Path], **options: Any) -> TaskVectors:
    return TaskVectors.open(checkpoints["base"], {view: checkpoints[view] for view in VIEWS}, **options)


def merged(checkpoints: dict[str, Path], scale: float = 0.4) -> Classifier:
    """The user's module with merged weights in it; how they were merged is nobody's business."""
    vectors, module = opened(checkpoints), Classifier.load_from_checkpoint(checkpoints["base"], map_location="cpu")
    state = module.state_dict()
    for name in vectors.tensor_names:
        state[name] = state[name] + scale * sum(vectors[view].delta(name) for view in VIEWS)
    module.load_state_dict(state)
    return module


def individual(checkpoints: dict[str, Path], view: str) -> Classifier:
    return Classifier.load_from_checkpoint(checkpoints[view], map_location="cpu").eval()


def heads() -> dict[str, Heads]:
    return {view: Heads(seed) for seed, view in enumerate(VIEWS)}


def fitted(
    checkpoints: dict[str, Path], folder: Path, epochs: int = 2, data: Any = None, **options: Any
) -> tuple[DistilledMerge, Classifier]:
    settings: dict[str, Any] = {"task_vectors": opened(checkpoints)} | options
    distilled, module = DistilledMerge(**settings), merged(checkpoints)
    trainer(folder, max_epochs=epochs, callbacks=[distilled]).fit(module, data or Streams())
    return distilled, module


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(autouse=True)
def kept_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


# --- what it learns -------------------------------------------------------------------------------------------------


def test_it_brings_answers_to_those_of_the_individual_models(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    before = measure(merged(checkpoints))
    _, module = fitted(checkpoints, tmp_path, epochs=15, learning_rate=1e-3)
    after = measure(module)
    assert sum(a for a, _ in after.values()) / 3 > sum(a for a, _ in before.values()) / 3 + 0.03
    far = {True: 0.0, False: 0.0}
    for view in VIEWS:
        images = digits(view, "test").tensors[0]
        with torch.no_grad():
            target = individual(checkpoints, view)(images)
            for trained, model in ((False, merged(checkpoints)), (True, module)):
                far[trained] += float(divergence(model.eval()(images), target))
    assert far[True] < 0.75 * far[False]


def test_the_divergence_on_a_fixed_batch_falls_to_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    seen: list[float] = []

    class Note(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(sum(distilled.last["distillation"].values()))

    distilled = DistilledMerge(opened(checkpoints), learning_rate=3e-3)
    trainer(tmp_path, max_epochs=80, callbacks=[distilled, Note()]).fit(merged(checkpoints), Fixed())
    assert seen[-1] < 0.05 * seen[0]


def test_the_first_step_is_that_of_the_loss_written_by_hand(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Own head on own model and, weighted, every other head on its own model; the mean over tasks."""
    cross, own_heads = 2.0, heads()
    distilled, module = fitted(
        checkpoints, tmp_path, 1, Fixed(), logits="features", heads=own_heads, cross=cross, ignore=["^head"],
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0), lr_scheduler=constant,
    )  # fmt: skip
    by_hand = merged(checkpoints).eval()
    total: Any = 0.0
    for view in VIEWS:
        images = digits(view, "stream").tensors[0][:40]
        for model in VIEWS:
            with torch.no_grad():
                target = own_heads[model](individual(checkpoints, model).features(images)).softmax(-1)
            log_p = own_heads[model](by_hand.features(images)).log_softmax(-1)
            term = (target * (target.log() - log_p)).sum(-1).mean()
            total = total + term * (1.0 if model == view else cross / 2) / 3
    total.backward()
    for name, parameter in by_hand.named_parameters():
        if not name.startswith("head"):
            expected = parameter.detach() - parameter.grad  # type: ignore[operator]
            torch.testing.assert_close(module.state_dict()[name], expected, atol=1e-5, rtol=1e-4)
    summed = sum(distilled.last["distillation"].values()) + cross * sum(distilled.last["cross"].values())
    assert summed / 3 == pytest.approx(float(total.detach()), rel=1e-4)


def test_a_task_argument_chooses_the_head_too(tmp_path: Path) -> None:
    """The user's method has heads of its own: the same weights as with the heads given."""
    base = HoldsTransformer().eval()
    models = {}
    for seed, view in enumerate(VIEWS):
        torch.manual_seed(seed)
        models[view] = HoldsTransformer().eval()
        models[view].heads.load_state_dict(base.heads.state_dict())
    learned = []
    for options in ({"logits": "logits"}, {"logits": "features", "heads": dict(base.heads.items())}):
        module = HoldsTransformer()
        module.load_state_dict(base.state_dict())
        if "heads" in options:
            options["heads"] = dict(module.heads.items())
        distilled = DistilledMerge(individuals=models, cross=1.0, ignore=["^heads"], **options)  # type: ignore[arg-type]
        trainer(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[distilled]).fit(module, Streams())
        assert not any(name.startswith("heads") for name in distilled.trained)
        learned.append(distilled.learned())
    for name, values in learned[0].items():
        torch.testing.assert_close(learned[1][name], values, atol=1e-5, rtol=1e-4)


def test_the_other_models_answers_are_kept_with_cross(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def apart(module: Classifier) -> float:
        found = 0.0
        with torch.no_grad():
            for view in VIEWS:
                images = digits(view, "test").tensors[0]
                for model in VIEWS:
                    if model != view:
                        target = own_heads[model](individual(checkpoints, model).features(images))
                        found += float(divergence(own_heads[model](module.eval().features(images)), target))
        return found

    own_heads = heads()
    options: dict[str, Any] = {"logits": "features", "heads": own_heads, "ignore": ["^head"], "learning_rate": 1e-3}
    alone, across = (fitted(checkpoints, tmp_path, 5, cross=cross, **options)[1] for cross in (0.0, 2.0))
    assert apart(across) < 0.8 * apart(alone)


def test_each_model_takes_the_merges_place_once_in_a_step() -> None:
    places: list[str] = []
    asked: list[tuple[str, str, str]] = []

    class As:
        def __init__(self, model: str) -> None:
            self.model = model

        def __enter__(self) -> None:
            places.append(self.model)

        def __exit__(self, *_: Any) -> None:
            places.append("merge")

    def ask(task: str, batch: Any, head: str) -> Tensor:
        asked.append((task, head, places[-1]))
        return 100.0 * VIEWS.index(head) + 10.0 * VIEWS.index(task) + batch["index"][:, None].float()

    batches = {view: {"index": torch.tensor([3, 1])} for view in VIEWS}
    for remember in ("computed", "cached"):
        answers = IndividualAnswers(ask, As, VIEWS, across=True, remember=remember)  # type: ignore[arg-type]
        first = answers(batches)
        assert places == ["upright", "merge", "mirrored", "merge", "rotated", "merge"]
        assert all(head == place for _, head, place in asked) and len(asked) == 9
        assert list(first["mirrored"]) == ["mirrored", "upright", "rotated"]  # its own first
        turned = answers({"mirrored": {"index": torch.tensor([1, 3])}})
        assert turned["mirrored"]["rotated"].flatten().tolist() == [211.0, 213.0]
        assert (len(asked) == 9) == (remember == "cached")
        places.clear()
        asked.clear()


def test_models_as_modules_answer_as_their_files(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    modules = {view: individual(checkpoints, view) for view in VIEWS}
    _, from_modules = fitted(checkpoints, tmp_path, task_vectors=None, individuals=modules)
    _, from_files = fitted(checkpoints, tmp_path)
    for name, values in from_files.state_dict().items():
        torch.testing.assert_close(from_modules.state_dict()[name], values)


def test_answers_that_are_kept_by_row_are_those_that_are_computed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    class Numbered(Streams):
        def loader(self, view: str) -> Any:
            loader = super().loader(view)
            rows = [{"images": image, "index": place} for place, image in enumerate(digits(view, "stream").tensors[0])]
            return DataLoader(rows, batch_size=40, sampler=loader.sampler)  # type: ignore[arg-type]

    found = []
    for remember in ("computed", "cached"):
        options: dict[str, Any] = {"inputs": "images", "remember": remember, "logits": "features", "heads": heads()}
        found.append(fitted(checkpoints, tmp_path, 2, Numbered(), cross=1.0, ignore=["^head"], **options)[1])
    for name, values in found[0].state_dict().items():
        torch.testing.assert_close(found[1].state_dict()[name], values, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="the batch has no 'index'"):
        fitted(checkpoints, tmp_path, remember="cached")


def test_accumulated_batches_are_one_batch(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """With plain gradient descent, which tells a gradient from its double."""
    plain: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "lr_scheduler": constant}
    distilled, module = DistilledMerge(opened(checkpoints), **plain), merged(checkpoints)
    used = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[distilled])
    used.fit(module, Streams(batch_size=20))
    _, at_once = fitted(checkpoints, tmp_path, **plain)
    for name, values in at_once.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], values, atol=1e-5, rtol=1e-4)


def test_the_rate_warms_up_and_falls() -> None:
    rates = [warm_cosine(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(rates[4], abs=0.01)
    assert rates[50] == pytest.approx(0.5) and rates[100] == 0.02 and warm_cosine(7, float("inf")) == 1.0


# --- what it trains and leaves alone --------------------------------------------------------------------------------


def test_no_step_is_the_merge_to_the_byte(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    distilled, module = fitted(
        checkpoints, tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), lr_scheduler=constant
    )
    assert equal(module.state_dict(), merged(checkpoints).state_dict()) and distilled.drift() == 0


def test_what_no_model_has_changed_and_what_is_ignored_stays(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    models = {view: individual(checkpoints, view) for view in VIEWS}
    for model in models.values():
        model.embed.load_state_dict(models["upright"].embed.state_dict())
    start = merged(checkpoints)
    distilled, module = fitted(checkpoints, tmp_path, task_vectors=None, individuals=models, ignore=[r"blocks\.0\."])
    still = {name for name, values in module.state_dict().items() if torch.equal(values, start.state_dict()[name])}
    frozen = {name for name in start.state_dict() if name.startswith(("embed.", "blocks.0."))}
    assert still == frozen and set(distilled.trained) == set(start.state_dict()) - frozen
    assert distilled.trained_parameters == sum(v.numel() for n, v in start.state_dict().items() if n not in frozen)


@pytest.mark.parametrize("end", ["finished", "exception"])
def test_everything_else_is_as_it_was(checkpoints: dict[str, Path], tmp_path: Path, end: str) -> None:
    module, own_heads = merged(checkpoints), heads()
    module.embed.requires_grad_(False)
    module.norm.eval()
    places = [p.data_ptr() for p in module.parameters()]
    flags = [p.requires_grad for p in module.parameters()]
    modes = [part.training for part in module.modules()]
    before = {view: head.weight.detach().clone() for view, head in own_heads.items()}
    own = set(vars(module)) - {"_trainer"}

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            assert not any(part.training for part in pl_module.modules())
            if end == "exception":
                raise KeyError("the user's own")

    distilled = DistilledMerge(opened(checkpoints), "features", own_heads, ["^head"], cross=1.0)
    used = trainer(tmp_path, max_epochs=1, callbacks=[distilled, Stop()])
    if end == "exception":
        with pytest.raises(KeyError, match="the user's own"):
            used.fit(module, Streams())
    else:
        used.fit(module, Streams())
    assert distilled.drift() > 0
    assert torch.equal(module.head.weight, merged(checkpoints).head.weight)
    assert all(torch.equal(own_heads[view].weight, weight) for view, weight in before.items())
    assert places == [p.data_ptr() for p in module.parameters()]
    assert flags == [p.requires_grad for p in module.parameters()]
    assert modes == [part.training for part in module.modules()]
    assert not {"training_step", "configure_optimizers"} & set(vars(module))
    assert set(vars(module)) - {"_trainer"} == own
    assert all(p.grad is None for part in (module, *own_heads.values()) for p in part.parameters())


# --- checkpoints, guards, processes ---------------------------------------------------------------------------------


def test_checkpoints_load_strictly_and_a_stopped_run_equals_a_straight_one(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    class Interrupt(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    straight, expected = fitted(checkpoints, tmp_path, epochs=4)
    first, module = DistilledMerge(opened(checkpoints)), merged(checkpoints)
    used = trainer(tmp_path, max_epochs=4, callbacks=[first, Interrupt()])
    used.fit(module, Streams())
    used.save_checkpoint(tmp_path / "half.ckpt")
    plain = Classifier.load_from_checkpoint(tmp_path / "half.ckpt", map_location="cpu")  # strict
    assert equal(plain.state_dict(), module.state_dict())
    second, started = DistilledMerge(opened(checkpoints)), Classifier()  # its weights come from the checkpoint
    trainer(tmp_path, max_epochs=4, callbacks=[second]).fit(started, Streams(), ckpt_path=tmp_path / "half.ckpt")
    for name, values in expected.state_dict().items():
        torch.testing.assert_close(started.state_dict()[name], values, atol=1e-6, rtol=1e-5)
    assert second.drift() == pytest.approx(straight.drift(), rel=1e-4) and straight.drift() > first.drift() > 0


def test_guards_and_traces_ask_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A rate that breaks the model: the guard goes back to a state that answers as the start or better."""
    distilled = DistilledMerge(opened(checkpoints), learning_rate=1.0, lr_scheduler=constant)
    guard, module = CollapseGuard(every_n_steps=2), merged(checkpoints)
    callbacks = [distilled, guard, AdaptationTrace(tmp_path / "trace", every_n_steps=2)]
    trainer(tmp_path, max_epochs=3, callbacks=callbacks).fit(module, Streams())
    assert guard.rolled_back and (tmp_path / "trace" / "trace.csv").is_file()
    before, after = measure(merged(checkpoints), "stream"), measure(module, "stream")
    assert sum(a for a, _ in after.values()) >= sum(a for a, _ in before.values()) - 0.05


def test_the_state_that_a_guard_keeps_can_be_put_back(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    distilled, module = fitted(checkpoints, tmp_path)
    batch, kept = digits("rotated", "test")[:30], distilled.learned()
    module.eval()
    before = distilled.answer("rotated", batch).logits
    with distilled.individual("rotated"):
        torch.testing.assert_close(
            distilled.answer("rotated", batch).logits, individual(checkpoints, "rotated")(batch[0])
        )
    distilled.restore({name: torch.zeros_like(values) for name, values in kept.items()})
    assert not torch.equal(distilled.answer("rotated", batch).logits, before)
    distilled.restore(kept)
    assert equal(distilled.learned(), kept) and torch.equal(distilled.answer("rotated", batch).logits, before)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    places = json.dumps({name: str(path) for name, path in checkpoints.items()})
    command = [sys.executable, "-c", TWO_PROCESSES, here, str(tmp_path), places]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    _, alone = fitted(checkpoints, tmp_path, lr_scheduler=constant)
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, values in alone.state_dict().items():
        torch.testing.assert_close(together[name], values, atol=2e-5, rtol=1e-3)


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cross": -1.0}, "cross is -1.0. Expected a number of at least 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"remember": "always"}, "Known: cached, computed"),
        ({"models": {"cars": "uprigt"}}, "Unknown individual model 'uprigt'.*Did you mean 'upright'"),
        ({"individuals": {}}, "either task_vectors or individuals"),
    ],
)
def test_settings_out_of_range(checkpoints: dict[str, Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DistilledMerge(opened(checkpoints), **settings)


def test_what_does_not_fit_is_refused_before_anything_is_learned(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for options, message in (
        ({"cross": 1.0}, "gives one answer whatever the task"),
        ({"logits": "forwards"}, "Did you mean 'forward'"),
        ({"ignore": [".*"]}, "no weights to train"),
        ({"logits": "features", "heads": {"upright": Heads(0)}, "ignore": ["^head"]}, "no head for the task"),
    ):
        with pytest.raises(UserError, match=message):
            fitted(checkpoints, tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a merge learns from a batch of each task"):
        fitted(checkpoints, tmp_path, data=users_code.ViewedDigits(VIEWS))
    with pytest.raises(UserError, match="keys of the training stream"):
        fitted(checkpoints, tmp_path, data=Streams(VIEWS[:2]))
    used = trainer(tmp_path, max_epochs=1, precision="bf16-true", callbacks=[DistilledMerge(opened(checkpoints))])
    with pytest.raises(UserError, match="lost in rounding"):
        used.fit(merged(checkpoints), Streams())


def test_sharding_is_refused_by_name(checkpoints: dict[str, Path]) -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Sharding(L.Trainer):
        """What a sharding trainer looks like before its processes are there."""

        strategy = ModelParallelStrategy()  # type: ignore[assignment]
        accelerator = precision_plugin = None  # type: ignore[assignment]

        def __init__(self) -> None:
            mesh = SimpleNamespace(size=lambda: 1)
            self.strategy._device_mesh = {"tensor_parallel": mesh, "data_parallel": mesh}

    distilled = DistilledMerge(opened(checkpoints))
    with pytest.raises(UserError, match=r"does not support ModelParallelStrategy.*'auto' or 'ddp'"):
        distilled.setup(Sharding(), merged(checkpoints), "fit")
    with pytest.raises(UserError, match=r"callback of 'lightning'"):
        distilled.setup(object(), merged(checkpoints), "fit")  # type: ignore[arg-type]
