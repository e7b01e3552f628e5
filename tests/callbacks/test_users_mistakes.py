"""What goes wrong in a user's trainer: everything is undone, and bad input is refused with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import users_code
from torch import Tensor, nn
from users_code import VIEWS, Classifier, Streams, digits
from users_runs import marks, supervise, task_vectors

from lightning_merge import TaskVectors
from lightning_merge.callbacks import AdaMerging
from lightning_merge.errors import UserError

Checkpoints = dict[str, Path]

HOOKS = (
    "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "forward",
    "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end",
)  # fmt: skip


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()], ids=["exception", "ctrl_c"])
@pytest.mark.parametrize("hook", HOOKS)
def test_everything_is_undone_when_the_users_code_fails(
    hook: str, error: BaseException, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    class Fails(Classifier):
        calls = 0

    own: Callable[..., Any] = getattr(Classifier, hook)

    def fail(self: Fails, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == (5 if hook == "forward" else 1 if "start" in hook or "epoch" in hook else 2):
            raise error
        return own(self, *args, **kwargs)

    setattr(Fails, hook, fail)
    module, adamerging = Fails(), AdaMerging(task_vectors(checkpoints))
    module.place.requires_grad_(False)
    module.blocks[0].dropout.eval()
    before = marks(module)
    used = users_code.trainer(tmp_path, max_epochs=1, limit_train_batches=3, callbacks=[adamerging])
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
        used.fit(module, datamodule=Streams())
    assert marks(module) == before
    setattr(Fails, hook, own)
    embed = module.embed.weight.detach().clone()
    losses = supervise(tmp_path, module, limit_train_batches=3)
    assert max(losses) < 4 and not torch.equal(embed, module.embed.weight)


# --- bad input ------------------------------------------------------------------------------------------------------


class Odd(Classifier):
    """Methods that give no logits."""

    def tokens(self, images: Tensor) -> Tensor:
        return self.embed(images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2))

    def both(self, images: Tensor) -> Any:
        return self(images), images

    def nothing(self, images: Tensor) -> None:
        return None

    def number(self, images: Tensor) -> Tensor:
        return self(images).mean()


class MorePart(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(4, 4)


def fit(
    folder: Path, checkpoints: Checkpoints, module: Any = None, data: Any = None, trainer: Any = None, **given: Any
):
    adamerging = AdaMerging(given.pop("task_vectors", None) or task_vectors(checkpoints), **given)
    used = users_code.trainer(folder, max_epochs=1, limit_train_batches=3, callbacks=[adamerging], **(trainer or {}))
    module = Classifier() if module is None else module
    before = marks(module)
    try:
        used.fit(module, **({"datamodule": Streams()} if data is None else {"train_dataloaders": data}))
    finally:
        assert marks(module) == before
    return adamerging


def loaders(*views: str) -> dict[str, Any]:
    return {view: torch.utils.data.DataLoader(digits(VIEWS[0], "stream"), batch_size=8) for view in views}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a task without a stream": (lambda: {"data": loaders(*VIEWS[:2])}, "rotated"),
    "a stream without a task": (lambda: {"data": loaders(*VIEWS, "sideways")}, "sideways"),
    "a misspelt key": (lambda: {"data": loaders("upright", "mirorred", "rotated")}, "mirorred(.|\n)*mirrored"),
    "one loader for all": (lambda: {"data": loaders("upright")["upright"]}, "dict|keyed"),
    "no such method": (lambda: {"logits": "forwards"}, "forwards(.|\n)*forward"),
    "tokens, not logits": (lambda: {"module": Odd(), "logits": "tokens"}, "tokens(.|\n)*\\(B, C\\)|logits"),
    "a pair, not logits": (lambda: {"module": Odd(), "logits": "both"}, "both(.|\n)*logits"),
    "nothing, not logits": (lambda: {"module": Odd(), "logits": "nothing"}, "nothing(.|\n)*logits"),
    "a number, not logits": (lambda: {"module": Odd(), "logits": "number"}, "number(.|\n)*logits"),
    "a part outside the task vectors": (lambda: {"module": MorePart()}, "adapter.weight(.|\n)*ignore"),
    "another architecture": (lambda: {"module": Classifier(width=16)}, "shape"),
    "another kind of model": (
        lambda: {"module": users_code.WithBatchNorm()},
        "counterpart|none of the",
    ),
    "a head too few": (lambda: {"heads": {"upright": nn.Identity(), "mirrored": nn.Identity()}}, "rotated"),
    "a head too many": (lambda: {"heads": {v: nn.Identity() for v in (*VIEWS, "sideways")}}, "sideways"),
    "inputs that batches lack": (lambda: {"inputs": "pixels"}, "pixels"),
    "fp16 with a scaler": (
        lambda: {"trainer": {"plugins": [half()]}},
        "16-mixed(.|\n)*bf16-mixed",
    ),
    "an unknown way of being online": (lambda: {"online": "durring"}, "durring(.|\n)*before"),
    "a learning rate below zero": (lambda: {"learning_rate": -1e-3}, "learning_rate"),
    "a constraint of no kind": (lambda: {"constraint": "clam"}, "clam(.|\n)*clamp"),
}


def half() -> Any:
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_remedy(case: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    build, message = REFUSED[case]
    with pytest.raises(UserError, match=f"(?i){message}"):
        fit(tmp_path, checkpoints, **build())


# --- strategies that cannot work --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_own_the_weights_are_refused(
    name: str, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need a GPU, or a package: an object of the class is all that is looked at."""
    from lightning.pytorch import strategies

    kind = getattr(strategies, name)
    adamerging, module = AdaMerging(task_vectors(checkpoints)), Classifier()
    used = users_code.trainer(tmp_path, callbacks=[adamerging])
    monkeypatch.setattr(type(used), "strategy", property(lambda _: object.__new__(kind)))
    with pytest.raises(UserError, match=rf"(?s){name}.*ModelParallelStrategy"):
        adamerging.setup(used, module, "fit")


# --- numbers that are not finite --------------------------------------------------------------------------------------


class Blows(Classifier):
    """Its answers to all tasks of some steps are NaN."""

    bad: tuple[int, ...] = (1,)

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits * float("nan") if self.trainer.fit_loop.epoch_loop.batch_idx in self.bad else logits


def test_a_step_that_is_not_finite_is_skipped_and_counted(checkpoints: Checkpoints, tmp_path: Path) -> None:
    from users_runs import Record

    adamerging = AdaMerging(task_vectors(checkpoints), max_bad_steps=2)
    record, module = Record(adamerging), Blows()
    before = marks(module)
    used = users_code.trainer(tmp_path, max_epochs=1, limit_train_batches=3, callbacks=[adamerging, record])
    used.fit(module, datamodule=Streams())
    first, second, third = record.trace
    assert torch.equal(first, second) and not torch.equal(second, third) and bool(third.isfinite().all())
    assert adamerging.bad_steps == 1 and marks(module) == before
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def test_too_many_of_them_end_the_fit_at_the_last_good_merge(checkpoints: Checkpoints, tmp_path: Path) -> None:
    module = Blows()
    module.bad = (1, 2)
    with pytest.raises(UserError, match=r"(?s)NaN.*max_bad_steps"):
        fit(tmp_path, checkpoints, module=module, max_bad_steps=2)
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


# --- batch norm -----------------------------------------------------------------------------------------------------


class Trains(users_code.WithBatchNorm):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.train()


@pytest.mark.parametrize("kind", [users_code.WithBatchNorm, Trains])
def test_statistics_are_those_of_the_models_and_batches_do_not_move_them(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    states = {}
    for name in ("base", *VIEWS):
        states[name] = {n: v.clone() for n, v in users_code.WithBatchNorm().state_dict().items()}
        states[name]["norm.running_mean"].normal_()
    vectors = TaskVectors.open(states["base"], {view: states[view] for view in VIEWS}, check=False)
    module = kind()
    if kind is Trains:
        with pytest.raises(UserError, match=r"(?s)norm.*training mode.*evaluation"):
            fit(tmp_path, {}, module=module, task_vectors=vectors)
        return
    fit(tmp_path, {}, module=module, task_vectors=vectors)
    mean = sum(states[view]["norm.running_mean"] for view in VIEWS) / 3
    torch.testing.assert_close(module.norm.running_mean, mean)
