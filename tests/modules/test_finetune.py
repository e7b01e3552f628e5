from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import lightning as L
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import clip_config, loader, make_trainer, save_bert, sentences

from lightning_merge.errors import UserError
from lightning_merge.modules import (
    ClassEmbeddingHead,
    Encoder,
    ExportFineTuned,
    FineTune,
    LoraSettings,
    base_sha256,
    build_vit,
    load_head,
)
from lightning_merge.modules.finetune import WarmupDecay
from lightning_merge.modules.tuning import (
    PRECISIONS,
    FineTuneSettings,
    PretrainSettings,
    Tuned,
    fine_tune,
    pretrain,
)
from lightning_merge.weights.card import stated_license


@dataclass
class TinyData(L.LightningDataModule):
    """The part of the data room's contract that FineTune reads."""

    task: str | None = "mood"
    labels: tuple[str, ...] = ("bad", "good")
    label_texts: tuple[str, ...] | None = ("bad film", "good film")

    def __post_init__(self) -> None:
        super().__init__()
        self.task_names = ["mood", "other"]

    def get(self, name: str) -> Any:
        return SimpleNamespace(labels=self.labels, label_texts=self.label_texts)

    def train_dataloader(self) -> Any:
        return loader(*sentences())

    def val_dataloader(self) -> Any:
        return loader(*sentences(16))

    def test_dataloader(self) -> Any:
        return [loader(*sentences(16)), loader(*sentences(8))]


def fit(module: FineTune, folder: Path, **options: Any) -> L.Trainer:
    trainer = make_trainer(folder, **options)
    trainer.fit(module, datamodule=TinyData())
    return trainer


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Equal names, dtypes and bits (torch.equal alone takes bf16 and fp32 of one value for equal)."""
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
    )


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["class_embedding", "linear"])
def test_text_is_learned_and_logged(bert: Path, tmp_path: Path, head: Any) -> None:
    module = FineTune(str(bert), head=head, learning_rate=1e-2)
    trainer = fit(module, tmp_path, max_epochs=10)
    assert trainer.callback_metrics["val_accuracy"] > 0.9
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(trainer.callback_metrics)
    assert module.task == "mood" and module.labels == ("bad", "good")


def test_digits_are_learned(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = (digits.images * 15.9).astype(np.uint8), digits.target
    build_vit(image_size=8, hidden_size=32, layers=2, heads=2, patch_size=2).save_pretrained(tmp_path / "base")
    module = FineTune(str(tmp_path / "base"), labels=[str(digit) for digit in range(10)], learning_rate=3e-3)
    trainer = make_trainer(tmp_path, max_epochs=4)
    held_out = loader(images[1200:], labels[1200:], 64)
    before = trainer.validate(module, held_out, verbose=False)[0]
    trainer.fit(module, loader(images[:1200], labels[:1200], 32))
    after = trainer.validate(module, held_out, verbose=False)[0]
    assert after["val_loss"] < before["val_loss"]
    assert after["val_accuracy"] > 0.6  # chance is 0.1


def test_logged_accuracy_and_loss_are_those_of_all_rows(bert: Path, tmp_path: Path) -> None:
    module = FineTune(str(bert))
    results = make_trainer(tmp_path).test(module, datamodule=TinyData(), verbose=False)
    assert len(results) == 2
    for result, count in zip(results, (16, 8), strict=True):
        texts, labels = sentences(count)
        module.eval()
        logits = module(module.encoder.preprocess(texts))
        (accuracy,) = [value for name, value in result.items() if "accuracy" in name]
        (loss,) = [value for name, value in result.items() if "loss" in name]
        assert accuracy == pytest.approx(float((logits.argmax(-1).numpy() == labels).mean()))
        assert loss == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, torch.as_tensor(labels))), rel=1e-5
        )


def test_predictions_carry_row_numbers_and_sum_to_one(bert: Path, tmp_path: Path) -> None:
    module = FineTune(str(bert), labels=["bad", "good"])
    batches = make_trainer(tmp_path).predict(module, loader(*sentences(20)))
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(20))
    torch.testing.assert_close(torch.cat([batch["probabilities"] for batch in batches]).sum(-1), torch.ones(20))


def test_what_is_frozen_stays_and_what_trains_moves(bert: Path, tmp_path: Path) -> None:
    module = FineTune(str(bert), learning_rate=1e-2)
    start = {name: value.clone() for name, value in module.encoder.state_dict().items()}
    fit(module, tmp_path)
    end = module.encoder.state_dict()
    still = {name for name in start if torch.equal(start[name], end[name])}
    assert {name for name in still if "key.bias" not in name} == {
        "backbone.embeddings.word_embeddings.weight",
        "backbone.pooler.dense.weight",
        "backbone.pooler.dense.bias",
    }
    assert isinstance(module.head, ClassEmbeddingHead)
    expected = ClassEmbeddingHead(
        torch.cat(
            [Encoder.from_pretrained(bert)(**module.encoder.preprocess([text])) for text in ("bad film", "good film")]
        )
    )
    torch.testing.assert_close(module.head.weight, expected.weight)


def test_token_embeddings_train_when_asked(bert: Path, tmp_path: Path) -> None:
    module = FineTune(str(bert), freeze_embeddings=False, learning_rate=1e-2)
    start = module.encoder.backbone.get_input_embeddings().weight.clone()
    fit(module, tmp_path)
    assert not torch.equal(start, module.encoder.backbone.get_input_embeddings().weight)


def test_dropout_is_on_while_training(tmp_path: Path) -> None:
    module = FineTune(str(save_bert(tmp_path / "bert", dropout=0.5)), labels=["bad", "good"])
    seen = []
    module.encoder.backbone.register_forward_hook(lambda layer, *_: seen.append(layer.training))
    make_trainer(tmp_path).fit(module, loader(*sentences(8)))
    assert seen[-1] is True


def test_image_classes_of_equal_names_share_their_vectors_and_others_do_not(vit: Path) -> None:
    def vectors(labels: list[str], seed: int = 0) -> torch.Tensor:
        module = FineTune(str(vit), labels=labels, seed=seed)
        module.configure_model()
        assert module.head is not None
        return module.head.weight

    assert torch.equal(vectors(["0", "1"]), vectors(["0", "1"]))
    assert not torch.equal(vectors(["0", "1"]), vectors(["cat", "dog"]))
    assert not torch.equal(vectors(["0", "1"]), vectors(["0", "1"], seed=1))


def test_the_learning_rate_rises_then_falls() -> None:
    linear, cosine, constant = (WarmupDecay(10, 0.2, decay) for decay in ("linear", "cosine", "constant"))  # type: ignore[arg-type]
    assert [linear(step) for step in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert [cosine(step) for step in (2, 6, 10)] == pytest.approx([1.0, 0.5, 0.0])
    assert [constant(step) for step in (0, 2, 9)] == [0.5, 1.0, 1.0]
    assert WarmupDecay(1, 0.1, "linear")(0) == 1.0


def test_the_schedule_ends_with_the_run_and_vectors_do_not_decay(bert: Path, tmp_path: Path) -> None:
    module = FineTune(str(bert), learning_rate=1e-3, weight_decay=0.1)
    trainer = fit(module, tmp_path, max_epochs=2, accumulate_grad_batches=2)
    (optimizer,) = trainer.optimizers
    assert trainer.global_step == 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0.0)


def test_optimizer_and_scheduler_can_be_given(bert: Path, tmp_path: Path) -> None:
    module = FineTune(
        str(bert),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1),
    )
    (optimizer,) = fit(module, tmp_path).optimizers
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert all(parameter.requires_grad for parameter in optimizer.param_groups[0]["params"])


def test_bf16_autocast_trains(bert: Path, tmp_path: Path) -> None:
    module = FineTune(str(bert), learning_rate=1e-2)
    assert fit(module, tmp_path, max_epochs=10, precision="bf16-mixed").callback_metrics["val_accuracy"] > 0.9


# --- checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["class_embedding", "linear"])
def test_a_resumed_run_equals_a_straight_one(bert: Path, tmp_path: Path, head: Any) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    options: dict[str, Any] = {"head": head, "learning_rate": 1e-3}
    straight = FineTune(str(bert), **options)
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    fit(straight, tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[keep])
    resumed = FineTune(str(bert), **options)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(resumed, datamodule=TinyData(), ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt", weights_only=True)
    assert trainer.global_step == 8
    assert same_weights(straight.state_dict(), resumed.state_dict())


def test_a_checkpoint_is_usable_without_its_datamodule(bert: Path, tmp_path: Path) -> None:
    module = FineTune(str(bert), head="linear", lora=LoraSettings(rank=2), learning_rate=1e-2)
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "head.weight" in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    loaded = FineTune.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.labels == ("bad", "good") and loaded.task == "mood" and loaded.lora == LoraSettings(rank=2)
    assert same_weights(loaded.state_dict(), module.state_dict())
    loaded.export(tmp_path / "out")
    assert (tmp_path / "out" / "heads" / "mood.safetensors").is_file()


def test_configuring_twice_changes_nothing_and_another_task_is_refused(bert: Path, tmp_path: Path) -> None:
    module = FineTune(str(bert))
    fit(module, tmp_path)
    head = module.head
    module.configure_model()
    assert module.head is head
    with pytest.raises(UserError, match=r"Make a new FineTune"):
        make_trainer(tmp_path).fit(module, datamodule=TinyData(task="other", labels=("a", "b", "c"), label_texts=None))


# --- export -----------------------------------------------------------------------------------------------------


def test_an_export_has_the_names_dtypes_and_hash_of_its_base(bert: Path, vit: Path, tmp_path: Path) -> None:
    for base in (bert, vit):
        module = FineTune(str(base), labels=["bad", "good"])
        out = tmp_path / f"out-{base.name}"
        module.export(out, task="mood", head_path=tmp_path / "heads" / "mood.safetensors")
        stored, original = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
        assert same_weights(stored, original)  # nothing was trained, so nothing may differ
        assert all(stored[name].dtype == original[name].dtype for name in original)
        with safe_open(out / "model.safetensors", framework="pt") as source:
            assert source.metadata() == {"format": "pt", "base_sha256": base_sha256(base), "task": "mood"}
        for name in ("config.json", "tokenizer.json", "vocab.txt", "preprocessor_config.json"):
            assert (out / name).exists() == (base / name).exists()
        assert not [file for file in out.iterdir() if "partial" in file.name or file.name.startswith(".")]
        _, info = load_head(tmp_path / "heads" / "mood.safetensors")
        assert info.base_sha256 == base_sha256(base) and info.pooling == module.encoder.pooling


def test_an_export_that_is_stopped_never_looks_complete(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, out = FineTune(str(bert), labels=["bad", "good"]), tmp_path / "out"
    module.export(out, task="mood")
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (out / name).write_text("{}")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_merge.modules.finetune.write_weights", stopped)
    with pytest.raises(KeyboardInterrupt):
        module.export(out, task="mood")
    assert not [path.name for path in out.iterdir() if "model" in path.name and path.name != "config.json"]
    assert (out / "heads" / "mood.safetensors").is_file()


def test_an_export_states_the_licence_of_its_base(bert: Path, tmp_path: Path) -> None:
    module, out = FineTune(str(bert), labels=["bad", "good"]), tmp_path / "out"
    module.export(out, task="mood")
    assert not (out / "README.md").exists()
    (bert / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    module.export(out, task="mood")
    assert stated_license(out) == "apache-2.0" and "# Base" not in (out / "README.md").read_text()
    (bert / "README.md").write_text("# Base\n")
    module.export(out, task="mood")
    assert stated_license(out) is None  # not that of an earlier base
    (out / "README.md").write_text("my own words")
    module.export(out, task="mood")
    assert (out / "README.md").read_text() == "my own words"


def test_transformers_loads_an_export_with_equal_weights(bert: Path, vit: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    for base, inputs in (
        (bert, sentences(16)),
        (vit, (np.random.default_rng(0).integers(0, 256, (16, 8, 8)).astype(np.uint8), [0, 1] * 8)),
    ):
        module = FineTune(str(base), labels=["bad", "good"], learning_rate=1e-2)
        make_trainer(tmp_path).fit(module, loader(*inputs))
        module.export(tmp_path / "out", task="mood")
        plain, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert same_weights(plain.state_dict(), module.encoder.backbone.state_dict())
        assert not same_weights(plain.state_dict(), AutoModel.from_pretrained(base).state_dict())


def test_tensors_the_encoder_lacks_are_copied_and_half_precision_stays(bert: Path, tmp_path: Path) -> None:
    weights = {name: value.bfloat16() for name, value in load_file(bert / "model.safetensors").items()}
    weights["embeddings.position_ids"] = torch.arange(16)[None]
    save_file(weights, bert / "model.safetensors", {"format": "pt"})
    module = FineTune(str(bert), labels=["bad", "good"])
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    module.export(tmp_path / "out", task="mood")
    assert same_weights(load_file(tmp_path / "out" / "model.safetensors"), weights)


def test_a_base_with_a_language_model_head_keeps_its_names(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, BertForMaskedLM

    torch.manual_seed(0)
    BertForMaskedLM(AutoConfig.from_pretrained(bert)).save_pretrained(bert)
    original = load_file(bert / "model.safetensors")
    assert any(name.startswith("bert.") for name in original)
    module = FineTune(str(bert), labels=["bad", "good"], learning_rate=1e-2)
    make_trainer(tmp_path).fit(module, loader(*sentences(16)))
    module.export(tmp_path / "out", task="mood")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == original.keys()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(stored[name], module.encoder.backbone.state_dict()[name.removeprefix("bert.")])
    assert torch.equal(stored["cls.predictions.bias"], original["cls.predictions.bias"])


def test_a_full_clip_model_keeps_its_text_tower(tmp_path: Path) -> None:
    from transformers import CLIPModel

    torch.manual_seed(0)
    CLIPModel(clip_config()).save_pretrained(tmp_path / "clip")
    module = FineTune(str(tmp_path / "clip"), labels=["a", "b"], learning_rate=1e-2)
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    make_trainer(tmp_path).fit(module, loader(images, [0, 1] * 4))
    module.export(tmp_path / "out", task="t")
    stored, original = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "clip" / "model.safetensors"),
    )
    assert stored.keys() == original.keys()
    changed = {name for name in original if not torch.equal(stored[name], original[name])}
    assert "visual_projection.weight" in changed
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in changed)


def test_lora_trains_its_updates_only_and_exports_what_it_computes(bert: Path, tmp_path: Path) -> None:
    module = FineTune(str(bert), labels=["bad", "good"], lora=LoraSettings(rank=2, alpha=8.0), learning_rate=5e-2)
    assert {name.rsplit(".", 3)[-3] for name, value in module.named_parameters() if value.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    make_trainer(tmp_path).fit(module, loader(*sentences(16)))
    module.eval()
    texts = sentences(6)[0]
    expected = module.encoder(**module.encoder.preprocess(texts))
    module.export(tmp_path / "out", task="mood")
    exported = Encoder.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(exported(**exported.preprocess(texts)), expected, atol=1e-5, rtol=1e-4)
    stored, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(bert / "model.safetensors")
    assert stored.keys() == original.keys()
    changed = {name.split("self.")[1] for name in original if not torch.equal(stored[name], original[name])}
    assert changed == {"query.weight", "value.weight"}
    # the module goes on as it was
    torch.testing.assert_close(module.encoder(**module.encoder.preprocess(texts)), expected, rtol=0, atol=0)


def test_an_unknown_lora_target_is_refused_with_the_nearest(bert: Path) -> None:
    with pytest.raises(UserError, match=r"Unknown LoRA target module 'qeury'.*Did you mean 'query'"):
        FineTune(str(bert), lora=LoraSettings(target_modules=["qeury"]))


def test_the_callback_exports_at_the_end_of_fit(bert: Path, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = FineTune(str(bert), learning_rate=1e-2)
    fit(module, tmp_path, callbacks=[ExportFineTuned(str(tmp_path / "last"))])
    assert same_weights(Encoder.from_pretrained(tmp_path / "last").state_dict(), module.encoder.state_dict())
    # again into the same folder: an earlier export may be replaced
    fit(FineTune(str(bert)), tmp_path, callbacks=[ExportFineTuned(str(tmp_path / "last"))])

    best = ModelCheckpoint(
        tmp_path / "best-ckpt", monitor="val_loss", mode="max"
    )  # the worst, so that it is not the last
    fit(
        FineTune(str(bert), learning_rate=1e-2),
        tmp_path,
        max_epochs=3,
        enable_checkpointing=True,
        callbacks=[best, ExportFineTuned(str(tmp_path / "best"), weights="best")],
    )
    kept = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    exported = Encoder.from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(value, kept[f"encoder.{name}"]) for name, value in exported.items())


def test_the_callback_refuses_a_foreign_folder_before_training(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    module = FineTune(str(bert))
    with pytest.raises(UserError, match=r"already holds something else"):
        fit(module, tmp_path, callbacks=[ExportFineTuned(str(tmp_path / "mine"))])
    assert module.head is None
    with pytest.raises(UserError, match=r"needs a ModelCheckpoint"):
        fit(FineTune(str(bert)), tmp_path, callbacks=[ExportFineTuned(str(tmp_path / "new"), weights="best")])
    with pytest.raises(UserError, match=r"base's own folder"):
        FineTune(str(bert), labels=["a", "b"]).export(bert, task="t")


# --- several processes ------------------------------------------------------------------------------------------


class Sharded(L.LightningDataModule):
    """The same rows in the same global batches of 8, however many processes share them."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world

    def train_dataloader(self) -> Any:
        texts, labels = sentences(32)
        if self.world == 1:
            # DistributedSampler deals rows in turn; batches of 4 a process are then these rows in batches of 8
            return loader(texts, labels, 8)
        rank = torch.distributed.get_rank()
        return loader(texts[rank :: self.world], labels[rank :: self.world], 8 // self.world)


@pytest.mark.parametrize("head", ["class_embedding", "linear"])
def test_two_processes_equal_one(bert: Path, tmp_path: Path, head: Any) -> None:
    """Also shows that no trainable parameter is unused, which DDP would refuse."""
    single, double = (
        FineTune(str(bert), head=head, labels=["bad", "good"], optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
        for _ in range(2)
    )
    make_trainer(tmp_path).fit(single, datamodule=Sharded(1))
    export = ExportFineTuned(str(tmp_path / "out"), task="mood")
    trainer = make_trainer(tmp_path, strategy="ddp_fork", devices=2, use_distributed_sampler=False, callbacks=[export])
    trainer.fit(double, datamodule=Sharded(2))
    start = Encoder.from_pretrained(bert).state_dict()
    moved = 0.0
    for name, value in single.encoder.state_dict().items():
        torch.testing.assert_close(double.encoder.state_dict()[name], value, atol=1e-5, rtol=0, msg=name)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3
    assert single.head is not None and double.head is not None
    torch.testing.assert_close(double.head.weight, single.head.weight, atol=1e-5, rtol=0)
    assert same_weights(Encoder.from_pretrained(tmp_path / "out").state_dict(), double.encoder.state_dict())


# --- the stages of a run ----------------------------------------------------------------------------------------


def tune(bert: Path, folder: Path, **settings: Any) -> Tuned:
    data = TinyData()
    data.seed = 0  # type: ignore[attr-defined]
    made = FineTuneSettings(module={"labels": ["bad", "good"]}, **settings)
    made.check()
    return fine_tune(made, data, "mood", bert, folder / "out", folder / "head.safetensors", 0)  # type: ignore[arg-type]


def test_patience_without_a_validation_is_refused_by_name(bert: Path, tmp_path: Path) -> None:
    assert tune(bert, tmp_path / "a", patience=1).validation_accuracy is not None
    for trainer in ({"max_steps": 1}, {"check_val_every_n_epoch": 3}, {"limit_val_batches": 0}):
        with pytest.raises(UserError, match=r"finetune.patience is 1, but training on 'mood' ended before any"):
            tune(bert, tmp_path / "b", patience=1, trainer={**trainer, "accelerator": "cpu"})


@pytest.mark.parametrize("trainer", [{"accelerator": "tpu"}, {"accelerator": "gpus"}, {"devices": 0}])
def test_what_the_trainer_refuses_is_a_setting(bert: Path, tmp_path: Path, trainer: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"Trainer refuses finetune.trainer .*(tpu|gpus|devices)"):
        tune(bert, tmp_path, trainer=trainer)


def test_the_known_precisions_are_lightnings() -> None:
    from lightning.fabric import connector

    known = {*get_args(connector._PRECISION_INPUT_STR), *get_args(connector._PRECISION_INPUT_STR_ALIAS)}
    assert set(PRECISIONS) == known


def test_pretraining_clears_an_earlier_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and a tokenizer of another base would be read as the new one's."""
    base, seen = tmp_path / "base", []
    base.mkdir()
    (base / "model.safetensors.index.json").write_text("{}")

    def watched(*arguments: Any) -> Tuned:
        seen.append(base.exists())
        return Tuned("pretrain", "", 0, 0.0, 0)

    monkeypatch.setattr("lightning_merge.modules.tuning.fine_tune", watched)
    pretrain(PretrainSettings(vit={"image_size": 8, "hidden_size": 8, "heads": 2}), TinyData(), base, 0)  # type: ignore[arg-type]
    assert seen == [False]


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head": "class_embeding"}, "Did you mean 'class_embedding'"),
        ({"decay": "cosin"}, "Did you mean 'cosine'"),
        ({"head_scale": 0.0}, "head_scale.*0.0"),
        ({"learning_rate": -1.0}, "learning_rate.*-1.0"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"warmup_fraction": 5.0}, r"warmup_fraction must be in \[0, 1\], got 5.0"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(bert: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FineTune(str(bert), **wrong)


def test_no_classes_and_no_task_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"knows no classes"):
        make_trainer(tmp_path).fit(FineTune(str(bert)), loader(*sentences(8)))
    with pytest.raises(UserError, match=r"Set data.task to one of: mood, other"):
        make_trainer(tmp_path).fit(FineTune(str(bert)), datamodule=TinyData(task=None))
    with pytest.raises(UserError, match=r"3 label_texts for 2 labels"):
        FineTune(str(bert), labels=["a", "b"], label_texts=["a", "b", "c"]).configure_model()


def test_the_command_line_can_set_everything() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FineTune, "model")
    parser.add_class_arguments(ExportFineTuned, "export")
    parsed = parser.parse_args(
        [
            "--model.base=b",
            "--model.lora.rank=4",
            "--model.optimizer=torch.optim.SGD",
            "--model.optimizer.lr=0.1",
            "--model.lr_scheduler=torch.optim.lr_scheduler.StepLR",
            "--model.lr_scheduler.step_size=2",
            "--model.labels=[a, b]",
            "--export.folder=out",
        ]
    )
    assert parsed.model.lora.rank == 4 and parsed.model.labels == ["a", "b"]
    assert parsed.model.optimizer.init_args.lr == 0.1
