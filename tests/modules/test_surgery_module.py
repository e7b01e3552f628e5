"""RepresentationSurgery on a tiny run: what it writes answers with correctors, and nearer to the individual models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import loader, make_trainer

from lightning_merge import load
from lightning_merge.errors import UserError
from lightning_merge.modules import ClassEmbeddingHead, RepresentationSurgery, orthonormal_embeddings, save_head
from lightning_merge.weights.folder import copy_companions

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 8, 8)).astype(np.uint8)
LABELS = np.arange(24) % 3


class Rows(L.LightningDataModule):
    """The same rows for both tasks."""

    task_names = ("first", "v1.second")

    def train_dataloader(self) -> dict[str, Any]:
        return {task: loader(IMAGES, LABELS) for task in self.task_names}

    def val_dataloader(self) -> Any:
        from lightning.pytorch.utilities import CombinedLoader

        return CombinedLoader({task: loader(IMAGES, LABELS) for task in self.task_names}, mode="sequential")


@pytest.fixture
def parts(vit: Path, tmp_path: Path) -> dict[str, Any]:
    """A base, two models some way from it, their mean, and heads."""
    base = load_file(vit / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    models, heads, mean = {}, {}, {name: values.clone() for name, values in base.items()}
    for task in Rows.task_names:
        models[task], heads[task] = str(tmp_path / task), str(tmp_path / "heads" / f"{task}.safetensors")
        delta = {name: 0.05 * torch.randn(values.shape, generator=generator) for name, values in base.items()}
        copy_companions(vit, tmp_path / task)
        save_file({n: v + delta[n] for n, v in base.items()}, tmp_path / task / "model.safetensors", {"format": "pt"})
        mean = {name: values + delta[name] / 2 for name, values in mean.items()}
        head = ClassEmbeddingHead(orthonormal_embeddings(3, 16, seed=len(task)))
        save_head(head, heads[task], labels=["a", "b", "c"], task=task, pooling="cls")
    copy_companions(vit, tmp_path / "merged")
    save_file(mean, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    return {"merge": str(tmp_path / "merged"), "base": str(vit), "models": models, "heads": heads}


@pytest.mark.parametrize("version", [1, 2])
def test_the_folder_it_writes_answers_nearer_to_the_individual_models(
    parts: dict[str, Any], tmp_path: Path, version: Any
) -> None:
    output = tmp_path / "corrected"
    module = RepresentationSurgery(**parts, version=version, rank=4, learning_rate=1e-2, output=str(output))
    make_trainer(tmp_path, max_epochs=12).fit(module, datamodule=Rows())
    merged, corrected = load(parts["merge"], heads=tmp_path / "heads"), load(output)
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "merged" / "model.safetensors").read_bytes()
    for task in Rows.task_names:
        goal = load(parts["models"][task], heads=tmp_path / "heads").features(IMAGES, task)
        plain = (merged.features(IMAGES, task) - goal).abs().mean()
        assert (corrected.features(IMAGES, task) - goal).abs().mean() < 0.8 * plain
        with torch.no_grad(), module.adaptation.task(task, module):
            logits = module.cpu()(IMAGES, task)
        torch.testing.assert_close(corrected(IMAGES, task).probabilities, logits.softmax(-1), atol=1e-5, rtol=1e-4)
    record = json.loads((output / "adaptation.json").read_text())
    assert record["steps"] == 36 and record["version"] == version and set(record["distance"]) == set(Rows.task_names)
    assert record["trained_parameters"] == (1 if version == 1 else 3) * 2 * 2 * 4 * 16
    assert record["stored_parameters"] == corrected.stored_parameters
    assert record["active_parameters"] == corrected.active_parameters


def test_validation_answers_with_the_correctors_of_its_task(parts: dict[str, Any], tmp_path: Path) -> None:
    module = RepresentationSurgery(**parts, rank=4, learning_rate=1e-2)
    trainer = make_trainer(tmp_path, max_epochs=4)
    trainer.fit(module, datamodule=Rows())
    for task in Rows.task_names:
        with torch.no_grad(), module.adaptation.task(task, module):
            right = float((module(IMAGES, task).argmax(-1) == torch.as_tensor(LABELS)).float().mean())
        assert float(trainer.callback_metrics[f"val_accuracy/{task}"]) == pytest.approx(right)


def test_the_correctors_may_go_beside_the_merge_itself_and_nothing_else_is_written_over(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "merged" / "README.md").write_text("# Mine\n")
    module = RepresentationSurgery(**parts, rank=2, output=parts["merge"])
    make_trainer(tmp_path).fit(module, datamodule=Rows())
    assert load(parts["merge"]).correctors is not None
    card = (tmp_path / "merged" / "README.md").read_text()
    module.export(parts["merge"])
    assert card == (tmp_path / "merged" / "README.md").read_text()
    assert card.startswith("# Mine\n") and card.count("`surgery.safetensors`") == 1 and "task is named" in card
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    module = RepresentationSurgery(**parts, output=str(tmp_path / "mine"))
    with pytest.raises(UserError, match="already holds something else"):
        make_trainer(tmp_path).fit(module, datamodule=Rows())
    with pytest.raises(UserError, match="learned nothing yet"):
        module.export(tmp_path / "new")


def test_what_is_not_there_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"merge '.*absent' does not exist"):
        RepresentationSurgery(**parts | {"merge": str(tmp_path / "absent")})
    with pytest.raises(UserError, match="rank must be an integer from 1, got 0"):
        RepresentationSurgery(**parts, rank=0)
    with pytest.raises(UserError, match=r"rank is 17, and the merge in .* gives 16 features"):
        RepresentationSurgery(**parts, rank=17)
