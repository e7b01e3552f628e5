"""Surgery in the user's trainer, on the user's module: what it learns, what it leaves alone, what it refuses."""

from __future__ import annotations

import itertools
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
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Subset
from users_code import VIEWS, Classifier, Streams, digits, measure, trainer

from lightning_merge import TaskVectors
from lightning_merge.callbacks import Surgery
from lightning_merge.errors import UserError
from lightning_merge.merged_weights import MergedWeights
from lightning_merge.modules.correctors import FINAL, Correctors
from lightning_merge.objectives import FeatureDistance

TWO_PROCESSES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_surgery as t
folder, checkpoints = Path(sys.argv[2]), {k: Path(v) for k, v in json.loads(sys.argv[3]).items()}
for version in (1, 2):
    surgery = t.Surgery(t.opened(checkpoints), features="norm", version=version, path=folder / f"v{version}")
    used = t.trainer(folder, max_epochs=2, strategy="ddp_fork", devices=2, callbacks=[surgery])
    used.fit(t.merged(checkpoints), t.Streams())
surgery = t.Surgery(t.opened(checkpoints), features="norm", version=2, optimizer=t.plain_descent)
keep = t.Keep(folder, surgery)
used = t.trainer(folder, max_epochs=1, strategy="ddp_fork", devices=2, callbacks=[surgery, keep])
used.fit(t.merged(checkpoints), t.Gaps())
"""
# By process: the view of which it has no row, from the first batch on.
LACKING = {0: "mirrored", 1: "rotated"}


def plain_descent(parameters: Any) -> torch.optim.Optimizer:
    """Unlike Adam's, its steps are proportional to gradients."""
    return torch.optim.SGD(parameters, lr=0.5)


class Gaps(Streams):
    """Two processes, each of which has nothing of one view."""

    def loader(self, view: str) -> DataLoader:
        loader = super().loader(view)
        assert self.trainer is not None
        if LACKING[self.trainer.global_rank] == view:
            loader.collate_fn = lambda rows: None
        return loader


class OneShare(Streams):
    """What one of two processes has, in a process by itself."""

    def __init__(self, views: Any, rank: int) -> None:
        super().__init__(views)
        self.rank = rank

    def loader(self, view: str) -> DataLoader:
        rows = digits(view, "stream")
        return DataLoader(rows, batch_size=20, sampler=DistributedSampler(rows, 2, self.rank, shuffle=False))


class Keep(L.Callback):
    """Keeps what each process has learned."""

    def __init__(self, folder: Path, surgery: Surgery) -> None:
        self.folder, self.surgery = folder, surgery

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(self.surgery.learned(), self.folder / f"learned_{trainer.global_rank}.pt")


def opened(checkpoints: dict[str, Path]) -> TaskVectors:
    return TaskVectors.open(checkpoints["base"], {view: checkpoints[view] for view in VIEWS})


def merged(checkpoints: dict[str, Path], scale: float = 0.4) -> Classifier:
    """The user's module with merged weights in it; how they were merged is nobody's business."""
    vectors, module = opened(checkpoints), Classifier.load_from_checkpoint(checkpoints["base"], map_location="cpu")
    state = module.state_dict()
    for name in vectors.tensor_names:
        state[name] = state[name] + scale * sum(vectors[view].delta(name) for view in VIEWS)
    module.load_state_dict(state)
    return module


def individual(checkpoints: dict[str, Path], view: str) -> Classifier:
    return Classifier.load_from_checkpoint(checkpoints[view], map_location="cpu")


def fitted(
    checkpoints: dict[str, Path], folder: Path, epochs: int = 2, views: Any = VIEWS, **options: Any
) -> tuple[Surgery, Classifier]:
    settings: dict[str, Any] = {"features": "norm", "task_vectors": opened(checkpoints)} | options
    surgery, module = Surgery(**settings), merged(checkpoints)
    trainer(folder, max_epochs=epochs, callbacks=[surgery]).fit(module, Streams(views))
    return surgery, module


def corrected(surgery: Surgery, module: Classifier) -> dict[str, float]:
    found = {}
    for view in VIEWS:
        with surgery.task(view):
            found[view] = measure(module)[view][0]
    return found


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(autouse=True)
def kept_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


# --- what it learns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_it_brings_accuracy_and_features_nearer_to_the_individual_models(
    checkpoints: dict[str, Path], tmp_path: Path, version: Any
) -> None:
    surgery, module = fitted(checkpoints, tmp_path, epochs=15, version=version)
    module.eval()
    before, after = measure(module), corrected(surgery, module)
    assert sum(after.values()) / 3 > sum(accuracy for accuracy, _ in before.values()) / 3 + 0.01
    for view in VIEWS:
        images = digits(view, "test").tensors[0]
        with torch.no_grad():
            target = individual(checkpoints, view).eval()
            target.head = module.head = torch.nn.Identity()
            plain, goal = module(images), target(images)
            with surgery.task(view):
                nearer = module(images)
        assert (nearer - goal).abs().mean() < 0.9 * (plain - goal).abs().mean()


def test_version_two_corrects_after_each_block_and_on_the_features(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    surgery, _ = fitted(checkpoints, tmp_path, epochs=1, version=2)
    assert surgery.correctors is not None
    assert surgery.correctors.sites == ("blocks.0", "blocks.1", FINAL)
    assert all(value > 0 for row in surgery.table().values() for value in row.values())
    assert surgery.drift() > 0 and surgery.tasks == VIEWS


@pytest.mark.parametrize("version", [1, 2])
def test_the_loss_on_a_fixed_batch_falls(checkpoints: dict[str, Path], tmp_path: Path, version: Any) -> None:
    class Fixed(L.LightningDataModule):
        def train_dataloader(self) -> dict[str, DataLoader]:
            return {view: DataLoader(Subset(digits(view, "stream"), range(40)), batch_size=40) for view in VIEWS}

    seen: list[float] = []

    class Note(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(sum(surgery.last["surgery"].values()))

    surgery = Surgery(opened(checkpoints), features="norm", version=version)
    trainer(tmp_path, max_epochs=30, callbacks=[surgery, Note()]).fit(merged(checkpoints), Fixed())
    assert all(later <= earlier * 1.01 for earlier, later in itertools.pairwise(seen))
    assert seen[-1] < 0.9 * seen[0]


def test_the_first_loss_is_the_papers(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    surgery, _ = fitted(checkpoints, tmp_path, epochs=1, learning_rate=1e-30)
    for view in VIEWS:
        images = digits(view, "stream").tensors[0][-40:]  # the last step's
        with torch.no_grad():
            ours, theirs = merged(checkpoints).eval(), individual(checkpoints, view).eval()
            ours.head = theirs.head = torch.nn.Identity()
            by_hand = (ours(images) - theirs(images)).abs().mean().item()
        assert surgery.last["surgery"][view] == pytest.approx(by_hand, rel=1e-4)


def test_one_step_over_all_tasks_is_one_step_of_each(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    together, _ = fitted(checkpoints, tmp_path, version=2)
    for view in VIEWS:
        alone, _ = fitted(checkpoints, tmp_path, version=2, views=[view])
        assert alone.tasks == (view,) and alone.correctors is not None and together.correctors is not None
        for site in alone.correctors.sites:
            for name in ("down", "up"):
                mine = getattr(alone.correctors.of(view, site), name)
                torch.testing.assert_close(getattr(together.correctors.of(view, site), name), mine)


def test_teachers_from_files_modules_and_merged_weights_are_the_same(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from_files, _ = fitted(checkpoints, tmp_path)
    modules = {view: individual(checkpoints, view) for view in VIEWS}
    from_modules, _ = fitted(checkpoints, tmp_path, task_vectors=None, individuals=modules)
    assert equal(from_files.learned(), from_modules.learned())

    from lightning_merge.coefficients import Coefficients

    vectors, module = opened(checkpoints), merged(checkpoints)
    live = MergedWeights(module, vectors, Coefficients(vectors.names, vectors.tensor_names, initial=0.4))
    surgery = Surgery(individuals=live, tasks=VIEWS, features="norm")
    trainer(tmp_path, max_epochs=2, callbacks=[surgery]).fit(module, Streams())
    for name, values in surgery.learned().items():
        torch.testing.assert_close(values, from_files.learned()[name], atol=1e-5, rtol=1e-4)


def test_answers_that_are_kept_by_row_are_those_that_are_computed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    class Numbered(Streams):
        def loader(self, view: str) -> Any:
            loader = super().loader(view)
            rows = [{"images": image, "index": place} for place, image in enumerate(digits(view, "stream").tensors[0])]
            return DataLoader(rows, batch_size=40, sampler=loader.sampler)  # type: ignore[arg-type]

    learned = []
    for remember in ("computed", "cached"):
        surgery = Surgery(opened(checkpoints), features="norm", version=2, remember=remember, inputs="images")  # type: ignore[arg-type]
        trainer(tmp_path, max_epochs=2, callbacks=[surgery]).fit(merged(checkpoints), Numbered())
        learned.append(surgery.learned())
    for name in learned[0]:
        torch.testing.assert_close(learned[0][name], learned[1][name])
    with pytest.raises(UserError, match="the batch has no 'index'"):
        fitted(checkpoints, tmp_path, remember="cached")


# --- what it leaves alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["finished", "exception"])
def test_everything_else_is_as_it_was(checkpoints: dict[str, Path], tmp_path: Path, end: str) -> None:
    module = merged(checkpoints)
    module.embed.requires_grad_(False)
    module.norm.eval()
    before = {name: values.clone() for name, values in module.state_dict().items()}
    places = [p.data_ptr() for p in module.parameters()]
    flags = [p.requires_grad for p in module.parameters()]
    modes = [part.training for part in module.modules()]
    own = set(vars(module)) - {"_trainer"}

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            assert not any(p.requires_grad for p in pl_module.parameters())
            assert not any(part.training for part in pl_module.modules())
            if end == "exception":
                raise KeyError("the user's own")

    surgery = Surgery(opened(checkpoints), features="norm", version=2)
    used = trainer(tmp_path, max_epochs=1, callbacks=[surgery, Stop()])
    if end == "exception":
        with pytest.raises(KeyError, match="the user's own"):
            used.fit(module, Streams())
    else:
        used.fit(module, Streams())
    assert equal(before, module.state_dict())
    assert places == [p.data_ptr() for p in module.parameters()]
    assert flags == [p.requires_grad for p in module.parameters()]
    assert modes == [part.training for part in module.modules()]
    assert not {"training_step", "configure_optimizers"} & set(vars(module))
    assert set(vars(module)) - {"_trainer"} == own
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(p.grad is None for p in module.parameters())


def test_checkpoints_load_strictly_into_the_plain_module_and_a_stopped_run_equals_a_straight_one(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    straight, _ = fitted(checkpoints, tmp_path, epochs=4, version=2)
    first = Surgery(opened(checkpoints), features="norm", version=2)
    module = merged(checkpoints)
    used = trainer(tmp_path, max_epochs=2, callbacks=[first])
    used.fit(module, Streams())
    used.save_checkpoint(tmp_path / "half.ckpt")

    plain = Classifier.load_from_checkpoint(tmp_path / "half.ckpt", map_location="cpu")  # strict
    assert equal(plain.state_dict(), merged(checkpoints).state_dict())
    second = Surgery(opened(checkpoints), features="norm", version=2)
    started = Classifier()  # its weights come from the checkpoint
    trainer(tmp_path, max_epochs=4, callbacks=[second]).fit(started, Streams(), ckpt_path=tmp_path / "half.ckpt")
    for name, values in straight.learned().items():
        torch.testing.assert_close(second.learned()[name], values, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    places = json.dumps({name: str(path) for name, path in checkpoints.items()})
    command = [sys.executable, "-c", TWO_PROCESSES, here, str(tmp_path), places]
    for version in (1, 2):
        (tmp_path / f"v{version}").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    for version in (1, 2):
        alone, _ = fitted(checkpoints, tmp_path, version=version)
        together = Correctors.load(tmp_path / f"v{version}").learned()
        for name, values in alone.learned().items():
            torch.testing.assert_close(together[name], values, atol=1e-5, rtol=1e-4)

    # Where a process has no rows of a view, it takes the step of those that have.
    first, second = (torch.load(tmp_path / f"learned_{rank}.pt", weights_only=True) for rank in (0, 1))
    assert equal(first, second)
    for rank, lacking in LACKING.items():
        view = LACKING[1 - rank]
        assert view != lacking
        alone = Surgery(opened(checkpoints), features="norm", version=2, optimizer=plain_descent)
        trainer(tmp_path, max_epochs=1, callbacks=[alone]).fit(merged(checkpoints), OneShare([view], rank))
        for name, values in alone.learned().items():
            if name.startswith(view):
                torch.testing.assert_close(first[name], values, atol=1e-5, rtol=1e-4)
                assert "up" not in name or float(values.abs().max()) > 1e-3


def test_accumulated_batches_are_one_batch(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    surgery, module = Surgery(opened(checkpoints), features="norm", version=2), merged(checkpoints)
    used = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[surgery])
    used.fit(module, Streams(batch_size=20))
    at_once, _ = fitted(checkpoints, tmp_path, version=2)
    for name, values in at_once.learned().items():
        torch.testing.assert_close(surgery.learned()[name], values, atol=1e-5, rtol=1e-4)


# --- afterwards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_saved_correctors_answer_equally_elsewhere(checkpoints: dict[str, Path], tmp_path: Path, version: Any) -> None:
    surgery, module = fitted(checkpoints, tmp_path, version=version, path=tmp_path / "surgery.safetensors")
    images = digits("mirrored", "test").tensors[0]
    plain = module.eval()(images)
    with surgery.task("mirrored"):
        expected = module(images)
    assert not torch.equal(plain, expected) and torch.equal(module(images), plain)
    loaded, other = Surgery.load(tmp_path / "surgery.safetensors"), merged(checkpoints).eval()
    loaded.activate("mirrored", other)
    assert torch.equal(other(images), expected)
    loaded.activate("upright")
    assert not torch.equal(other(images), expected)
    loaded.deactivate()
    assert torch.equal(other(images), plain)


def test_a_task_must_be_named_and_known(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    surgery, _ = fitted(checkpoints, tmp_path, views=VIEWS[:2])
    with pytest.raises(TypeError):
        surgery.activate()  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"Unknown task of a corrector 'uprigth'.*Did you mean 'upright'"):
        surgery.activate("uprigth")
    with pytest.raises(UserError, match="Unknown task of a corrector 'rotated'"):  # never in the stream
        surgery.activate("rotated")
    with pytest.raises(UserError, match="Expected a fit first"):
        Surgery(opened(checkpoints), features="norm").activate("upright")
    with pytest.raises(UserError, match="Expected a fit first"):
        Surgery(opened(checkpoints), features="norm").save(tmp_path)


def test_a_further_fit_ends_a_corrected_answer_and_goes_on_without_it(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    twice: list[dict[str, float]] = []
    never: list[dict[str, float]] = []
    images = digits("upright", "test").tensors[0]
    for activated, losses in ((True, twice), (False, never)):
        surgery, module = fitted(checkpoints, tmp_path, version=2)
        plain = module.eval()(images)
        if activated:
            surgery.activate("upright")
        trainer(tmp_path, max_epochs=1, callbacks=[surgery]).fit(module, Streams())
        losses.append(surgery.last["surgery"])
        surgery.deactivate()
        assert torch.equal(module(images), plain)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert twice == never


def test_correctors_go_on_with_their_module_and_begin_anew_with_another(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    starts: list[float] = []

    class Start(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            starts.append(surgery.drift())

    surgery, module = fitted(checkpoints, tmp_path)
    reached = surgery.drift()
    for again in (module, merged(checkpoints)):
        trainer(tmp_path, max_epochs=2, callbacks=[surgery, Start()]).fit(again, Streams())
    assert starts[0] == reached > 0 and starts[1] == 0
    fresh, _ = fitted(checkpoints, tmp_path)
    assert equal(surgery.learned(), fresh.learned())
    surgery.activate("upright", merged(checkpoints))  # where they answer is not where they have learned
    trainer(tmp_path, max_epochs=1, callbacks=[surgery, Start()]).fit(again, Streams())
    assert starts[2] == pytest.approx(fresh.drift()) and surgery._targets is None


def test_going_back_to_the_start_leaves_correctors_that_change_nothing(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    class BackToTheStart(L.Callback):
        """What a guard does that finds every state worse."""

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 0:
                self.initial = surgery.learned()

        def on_train_end(self, *_: Any) -> None:
            assert surgery.drift() > 0
            surgery.restore(self.initial)

    surgery = Surgery(opened(checkpoints), features="norm", version=2, path=tmp_path / "surgery.safetensors")
    module = merged(checkpoints)
    trainer(tmp_path, max_epochs=1, callbacks=[surgery, BackToTheStart()]).fit(module, Streams())
    images, loaded = digits("upright", "test").tensors[0], Surgery.load(tmp_path / "surgery.safetensors")
    plain = module.eval()(images)
    loaded.activate("upright", module)
    assert torch.equal(module(images), plain) and surgery.drift() == 0
    unseen = Surgery(opened(checkpoints), features="norm", path=tmp_path / "unseen.safetensors")
    with pytest.warns(UserWarning, match="has seen no batch, and writes nothing"):
        trainer(tmp_path, max_epochs=0, callbacks=[unseen]).fit(module, Streams())


def test_the_state_that_a_guard_keeps_can_be_put_back(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    surgery, module = fitted(checkpoints, tmp_path, version=2)
    batch = digits("rotated", "test")[:30]
    module.eval()
    kept = surgery.learned()
    before = surgery.answer("rotated", batch)
    assert before.logits is not None and before.features is not None and before.logits.shape == (30, 10)
    assert before.features.shape == (30, 32) and list(before.extra) == ["blocks.0", "blocks.1"]
    with surgery.individual("rotated"):
        before.individual = surgery.answer("rotated", batch)
    torch.testing.assert_close(before.individual.logits, individual(checkpoints, "rotated").eval()(batch[0]))
    assert FeatureDistance()(before) > 0
    surgery.restore({name: torch.zeros_like(values) for name, values in kept.items()})
    assert torch.equal(surgery.answer("rotated", batch).logits, module(batch[0]))
    surgery.restore(kept)
    assert equal(surgery.learned(), kept) and torch.equal(surgery.answer("rotated", batch).logits, before.logits)


# --- other modules --------------------------------------------------------------------------------------------------


def test_a_method_may_give_the_features_and_the_task_reaches_the_users_method(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    class ByMethod(Classifier):
        def encode(self, images: Tensor) -> Tensor:
            patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)
            tokens = self.embed(patches) + self.place
            for block in self.blocks:
                tokens = block(tokens)
            return self.norm(tokens.mean(1))

        def answer(self, images: Tensor, task: str) -> Tensor:
            assert task in VIEWS
            return self.head(self.encode(images))

    by_part, _ = fitted(checkpoints, tmp_path, version=2)
    for logits in ("answer", None):  # None: the features alone are asked for
        module = ByMethod.load_from_checkpoint(checkpoints["base"], map_location="cpu")
        module.load_state_dict(merged(checkpoints).state_dict())
        surgery = Surgery(opened(checkpoints), features="encode", logits=logits, version=2)
        trainer(tmp_path, max_epochs=2, callbacks=[surgery]).fit(module, Streams(labels=False))
        assert "encode" not in vars(module)
        assert equal(by_part.learned(), surgery.learned())


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": 3}, r"Unknown version of surgery '3'"),
        ({"rank": 0}, r"rank must be an integer from 1, got 0"),
        ({"learning_rate": 0.0}, r"learning_rate must be a positive number"),
        ({"remember": "always"}, r"Known: cached, computed"),
        ({"models": {"cars": "uprigt"}}, r"Unknown individual model 'uprigt'.*Did you mean 'upright'"),
        ({"individuals": {}}, r"either task_vectors or individuals"),
    ],
)
def test_settings_out_of_range(checkpoints: dict[str, Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Surgery(opened(checkpoints), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": "normm"}, r"part or method of Classifier \(features=\.\.\.\) 'normm'.*Did you mean 'norm'"),
        ({"logits": "forwards"}, r"'forwards'.*Did you mean 'forward'"),
        ({"version": 2, "blocks": "block"}, r"No block of Classifier is called 'block'.*'blocks' \(2\)"),
        ({"features": "hparams_file"}, r"features="),
    ],
)
def test_what_the_module_does_not_have(
    checkpoints: dict[str, Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fitted(checkpoints, tmp_path, **settings)


def test_streams_of_other_tasks_and_features_that_are_not_called(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Unknown task of the training stream 'upright'.*'?turned'?"):
        fitted(checkpoints, tmp_path, models={"turned": "rotated"})
    module = merged(checkpoints)
    with pytest.raises(UserError, match="surgery learns from a batch of each task"):
        trainer(tmp_path, max_epochs=1, callbacks=[Surgery(opened(checkpoints), features="norm")]).fit(
            module, users_code.ViewedDigits(VIEWS)
        )
    module.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="did not call 'extra'"):
        trainer(tmp_path, max_epochs=1, callbacks=[Surgery(opened(checkpoints), features="extra")]).fit(
            module, Streams()
        )
    assert not any(part._forward_hooks for part in module.modules())


def test_objects_of_the_other_lightning_and_a_second_surgery_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    class Theirs(L.Callback):
        __module__ = "pytorch_lightning.callbacks"

    class Other(Surgery):
        state_key = "other"  # type: ignore[assignment]

    first, second = (kind(opened(checkpoints), features="norm") for kind in (Surgery, Other))
    for another, message in ((Theirs(), "callback Theirs is one of 'pytorch_lightning'"), (second, "are 2 callbacks")):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, max_epochs=1, callbacks=[first, another]).fit(merged(checkpoints), Streams())


def test_sharding_is_refused_by_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    surgery = Surgery(opened(checkpoints), features="norm")

    class Sharding(L.Trainer):
        """What a sharding trainer looks like before its processes are there."""

        strategy = ModelParallelStrategy()  # type: ignore[assignment]
        accelerator = precision_plugin = None  # type: ignore[assignment]

        def __init__(self) -> None:
            mesh = SimpleNamespace(size=lambda: 1)
            self.strategy._device_mesh = {"tensor_parallel": mesh, "data_parallel": mesh}

    with pytest.raises(UserError, match=r"does not support ModelParallelStrategy.*'auto' or 'ddp'"):
        surgery.setup(Sharding(), merged(checkpoints), "fit")
    with pytest.raises(UserError, match=r"callback of 'lightning'"):
        surgery.setup(object(), merged(checkpoints), "fit")  # type: ignore[arg-type]
