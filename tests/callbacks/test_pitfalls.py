"""Each pitfall of trainers and strategies that learned merges were seen to fall into, and the test that catches it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import users_code
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from users_code import VIEWS, Classifier, Streams, digits
from users_runs import adapt, in_processes, marks, merged_by_hand, task_vectors

from lightning_merge.callbacks import AdaMerging
from lightning_merge.errors import UserError
from lightning_merge.objectives import Distillation, Entropy

Checkpoints = dict[str, Path]


class Look(L.Callback):
    """Calls a function at each start of a training batch."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look(trainer, pl_module)


def start(checkpoints: Checkpoints) -> dict[str, Tensor]:
    """The merge that adaptation starts from."""
    names = torch.load(checkpoints["base"], weights_only=True)["state_dict"]
    return merged_by_hand(checkpoints, {view: dict.fromkeys(names, 0.3) for view in VIEWS})


def fit(
    folder: Path, checkpoints: Checkpoints, module: Any = None, data: Any = None, look: Any = None, **options: Any
) -> AdaMerging:
    adamerging = AdaMerging(task_vectors(checkpoints), **{"learning_rate": 1e-2, **options.pop("settings", {})})
    callbacks = [adamerging, *([Look(look)] if look else []), *options.pop("callbacks", [])]
    used = users_code.trainer(folder, callbacks=callbacks, **{"max_epochs": 1, "limit_train_batches": 3, **options})
    given = {"datamodule": Streams()} if data is None else {"train_dataloaders": data}
    used.fit(Classifier() if module is None else module, **given, ckpt_path=options.get("ckpt_path"))
    return adamerging


# --- what a resumed run starts from -----------------------------------------------------------------------------------


def test_a_resumed_run_starts_from_the_files_base_and_the_checkpoints_coefficients(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Restored weights are merged already: taken for θ₀, they would be merged twice."""
    adapt(tmp_path, checkpoints, epochs=1)
    saved = tmp_path / "checkpoints" / "epoch=0.ckpt"
    seen: list[dict[str, Tensor]] = []
    adamerging = AdaMerging(task_vectors(checkpoints), learning_rate=1e-2)
    look = Look(lambda _, module: seen.append({n: v.detach().clone() for n, v in module.state_dict().items()}))
    used = users_code.trainer(tmp_path, max_epochs=2, limit_train_batches=4, callbacks=[adamerging, look])
    used.fit(Classifier(), datamodule=Streams(), ckpt_path=str(saved))
    assert len(seen) == 4
    kept = torch.load(saved, weights_only=True)["state_dict"]
    assert {name: value for name, value in seen[0].items() if not torch.equal(value, kept[name])} == {}


def test_that_a_run_resumed_within_an_epoch_reads_data_again_is_documented(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    rows: list[Tensor] = []

    class Rows(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            rows.append(batch["upright"][0])

    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(tmp_path, checkpoints, callbacks=[Rows(), saving], enable_checkpointing=True)
    straight, rows[:] = list(rows), []
    adamerging = AdaMerging(task_vectors(checkpoints), learning_rate=1e-2)
    used = users_code.trainer(tmp_path, max_epochs=1, limit_train_batches=3, callbacks=[adamerging, Rows()])
    used.fit(Classifier(), datamodule=Streams(), ckpt_path=str(tmp_path / "step=2.ckpt"))
    # Lightning goes on at batch 2 with the first rows of the loader, as of version 2.6.
    assert len(rows) == 1 and torch.equal(rows[0], straight[0])
    assert "max_epochs" in (inspect.getdoc(AdaMerging) or "")


# --- data -----------------------------------------------------------------------------------------------------------


def test_two_processes_read_the_rows_of_one_in_its_order() -> None:
    """``fit`` shuffles under DDP: the streams that equality is tested with bring their own sampler."""

    def batches(world: int, rank: int) -> list[Tensor]:
        streams = Streams()
        streams.trainer = type("Of", (), {"world_size": world, "global_rank": rank})()
        return [images for images, _ in streams.train_dataloader()["mirrored"]]

    for whole, first, second in zip(batches(1, 0), batches(2, 0), batches(2, 1), strict=True):
        assert torch.equal(whole, torch.stack([first, second], dim=1).flatten(0, 1))


@pytest.mark.parametrize(("mode", "steps"), [("max_size_cycle", 5), ("min_size", 2), ("max_size", 5)])
def test_streams_of_unequal_length_are_combined_in_every_mode(
    mode: Any, steps: int, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """``max_size`` gives None for the task that has ended: the others go on."""
    loaders = {view: DataLoader(digits(view, "stream"), batch_size=80) for view in VIEWS}
    loaders["rotated"] = DataLoader(Subset(digits("rotated", "stream"), range(160)), batch_size=80)
    tasks: list[set[str]] = []

    class Last(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            tasks.append({task for task in VIEWS if any(task in str(key) for key in _names(adamerging.last))})

    adamerging = AdaMerging(task_vectors(checkpoints))
    used = users_code.trainer(tmp_path, max_epochs=1, callbacks=[adamerging, Last()])
    used.fit(Classifier(), CombinedLoader(loaders, mode))
    full, ended = set(VIEWS), set(VIEWS) - {"rotated"}
    assert tasks == ([full, full, ended, ended, ended] if mode == "max_size" else [full] * steps)


def _names(found: Any) -> list[str]:
    """All keys of a nested dict."""
    if not isinstance(found, dict):
        return []
    return [*map(str, found), *(name for value in found.values() for name in _names(value))]


# --- inference mode -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_adapting_online_needs_gradients_and_says_so(verb: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    class Answers(Classifier):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0])

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            return self(batch[0])

    loaders = {view: DataLoader(digits(view, "stream"), batch_size=100) for view in VIEWS}
    module = Answers()
    before = marks(module)
    refused = users_code.trainer(tmp_path, callbacks=[AdaMerging(task_vectors(checkpoints), online="after")])
    with pytest.raises(UserError, match="inference_mode=False"):
        getattr(refused, verb)(module, loaders)
    assert marks(module) == before
    adamerging = AdaMerging(task_vectors(checkpoints), online="after", learning_rate=1e-2)
    used = users_code.trainer(tmp_path, callbacks=[adamerging], inference_mode=False)
    getattr(used, verb)(module, loaders)
    assert marks(module) == before
    table = adamerging.table()
    assert all(table[view]["embed.weight"] != 0.3 for view in VIEWS)
    assert not any(parameter.is_inference() for parameter in module.parameters())
    torch.testing.assert_close(dict(module.state_dict()), merged_by_hand(checkpoints, table), rtol=1e-5, atol=1e-6)
    module(digits("upright", "stream").tensors[0][:2]).sum().backward()  # trains again


@pytest.mark.parametrize("online", ["before", "after"])
def test_each_batch_is_predicted_before_or_after_it_is_learned_from(
    online: Any, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Under one autocast context for a whole step, copies of weights that are kept would answer for the ones before."""
    first, second = (digits("upright", "stream").tensors[0][start : start + 50] for start in (0, 50))
    merge = Classifier().eval()
    merge.load_state_dict(start(checkpoints))

    class Answers(Classifier):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch)

    settings: dict[str, Any] = {"online": online, "learning_rate": 0.1, "models": {"upright": "upright"}}
    adamerging = AdaMerging(task_vectors(checkpoints), **settings)
    used = users_code.trainer(tmp_path, callbacks=[adamerging], inference_mode=False, precision="bf16-mixed")
    answers = used.predict(Answers(), {"upright": DataLoader(torch.cat([first, second]), batch_size=50)})
    with torch.no_grad():
        moved = [
            float((found.float() - merge(images)).abs().max())
            for found, images in zip(answers, (first, second), strict=True)
        ]
    assert moved[1] > 0.5 and (moved[0] > 0.5 if online == "after" else moved[0] < 0.3), moved


# --- patching -------------------------------------------------------------------------------------------------------


def test_what_stands_in_for_training_step_is_a_bound_method_whatever_the_users_takes(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    class OneArgument(Classifier):
        def training_step(self, batch: Any) -> Tensor:
            raise AssertionError("the user's step was called")

    def look(trainer: L.Trainer, module: L.LightningModule) -> None:
        assert inspect.ismethod(module.training_step) and module.training_step.__self__ is module
        assert inspect.ismethod(module.configure_optimizers) and module.configure_optimizers.__self__ is module

    module = OneArgument()
    fit(tmp_path, checkpoints, module, look=look)
    assert "training_step" not in vars(module) and "configure_optimizers" not in vars(module)


def test_task_vectors_are_no_part_of_the_module_while_it_is_adapted(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """As buffers they would be sent again at each forward pass of DDP, and saved in each checkpoint."""
    module = Classifier()
    tensors = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}

    def look(trainer: L.Trainer, module: L.LightningModule) -> None:
        assert {name for name, _ in [*module.named_parameters(), *module.named_buffers()]} == tensors

    adamerging = fit(tmp_path, checkpoints, module, look=look)
    # Coefficients, their optimizer's state and small change; τ would be 3 · 20,000 numbers.
    states = adamerging.state_dict()
    assert _numbers(states) < 5 * 3 * len(tensors)


def _numbers(found: Any) -> int:
    if isinstance(found, Tensor):
        return found.numel()
    values = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
    return sum(map(_numbers, values))


def test_dropout_and_batch_norm_do_not_move_while_entropy_is_minimised(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """``fit`` leaves modes as they are: dropout of a module in training mode would make gradients random."""
    traces = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = Classifier().train()
        adamerging = fit(tmp_path, checkpoints, module)
        assert all(part.training for part in module.modules())
        traces.append(adamerging.scalars().detach())
    assert torch.equal(*traces)


def test_two_of_them_in_one_trainer_are_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Two stateful callbacks of a type share a key in checkpoints, and both would replace the user's step."""
    module = Classifier()
    before = marks(module)
    with pytest.raises((RuntimeError, UserError), match="AdaMerging"):
        both = [AdaMerging(task_vectors(checkpoints)), AdaMerging(task_vectors(checkpoints), by="task")]
        users_code.trainer(tmp_path, max_epochs=1, callbacks=both).fit(module, datamodule=Streams())
    assert marks(module) == before


def test_objects_of_pytorch_lightning_are_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The same classes by name, but others: callbacks are accepted in silence."""
    old = pytest.importorskip("pytorch_lightning")

    class Theirs(old.Callback):
        pass

    with pytest.raises(UserError, match=r"(?s)pytorch_lightning.*lightning"):
        fit(tmp_path, checkpoints, callbacks=[Theirs()])
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    theirs = old.Trainer(accelerator="cpu", max_epochs=1, callbacks=[AdaMerging(task_vectors(checkpoints))], **quiet)

    class TheirModule(old.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(64, 10)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(UserError, match=r"(?s)pytorch_lightning.*lightning"):
        theirs.fit(TheirModule(), {view: DataLoader(digits(view, "stream")) for view in VIEWS})


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bf16-mixed", "the user's autocast"])
def test_autocast_does_not_answer_with_weights_it_has_kept(how: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """In one autocast context the individual model and the merge would both answer with the first's low-precision copy.

    The cross-entropy under the individual model's answers is far from the entropy of the merge's own, in any precision.
    Lightning's own context keeps no copies, one of the user's around ``fit`` does, for all steps.
    """
    settings = {"objectives": [Entropy(), Distillation()], "learning_rate": 0.1}
    exact = fit(tmp_path, checkpoints, settings=settings)
    if how == "bf16-mixed":
        rough = fit(tmp_path, checkpoints, settings=settings, precision=how)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            rough = fit(tmp_path, checkpoints, settings=settings)
    assert set(_flat(exact.last)) == set(_flat(rough.last)) and len(_flat(exact.last)) == 6
    for name, value in _flat(exact.last).items():
        assert _flat(rough.last)[name] == pytest.approx(value, rel=0.1), name


def _flat(found: Any, place: str = "") -> dict[str, float]:
    if isinstance(found, dict):
        return {name: v for key, part in found.items() for name, v in _flat(part, f"{place}/{key}").items()}
    return {place: float(found)}


def test_low_precision_gradients_are_those_of_full_precision_nearly(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Coefficients that scaled gradients reached, or stale copies of weights, would go elsewhere."""
    found = {p: fit(tmp_path, checkpoints, precision=p).scalars().detach() - 0.3 for p in ("32-true", "bf16-mixed")}
    exact, rough = found["32-true"], found["bf16-mixed"]
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.97


# --- sharding, in one process and in two ----------------------------------------------------------------------------


@pytest.mark.slow
def test_what_two_processes_send_each_other(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Under DDP nothing but the contracted numbers is reduced: no buffer, no gradient of a weight.

    A layout of tensors over processes, which ``ModelParallelStrategy()`` has by default, is refused with the remedy.
    """
    jobs: list[dict[str, Any]] = [
        {"name": "traffic", "on": "ddp", "epochs": 1, "checkpoints": checkpoints, "watch": True},
        {"name": "default", "on": "tensor_parallel", "kind": "Sharded", "checkpoints": checkpoints, "refused": True},
    ]
    for traffic, default in in_processes(tmp_path, jobs):
        numbers = 3 * len(traffic["state_dict"])
        assert traffic["wrapped"] == "Classifier"
        assert [size for size in traffic["reduced"] if size > 8] == 4 * [numbers]
        assert "tensor_parallel_size=1" in default["refused"]


@pytest.mark.slow
def test_forked_processes_bring_the_merge_back_in_the_module(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """What processes set on Python objects is lost when they end; weights are not."""
    job = {"name": "forked", "on": "ddp_fork", "epochs": 1, "checkpoints": checkpoints}
    ((forked,),) = in_processes(tmp_path, [job], count=1)
    expected = merged_by_hand(checkpoints, forked["table"])
    torch.testing.assert_close(forked["state_dict"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(forked["state_dict"]["embed.weight"], start(checkpoints)["embed.weight"])
    assert forked["changed"] == {}
