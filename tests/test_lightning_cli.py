"""The verbs of LightningCLI, in this process, on digits."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from safetensors import safe_open

import lightning_merge
from lightning_merge.cli import main

SMALL = ["--data", "Digits", "--data.max_train", "64", "--data.max_dev", "32", "--data.max_test", "32"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]


class MeanBrightness(L.LightningModule):
    """A user's module that knows nothing of this package: one weight, fitted to nothing in particular."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, 10)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        brightness = batch["inputs"].float().mean(dim=(1, 2))[:, None] / 255
        return torch.nn.functional.cross_entropy(self.layer(brightness), batch["labels"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lightning_merge.modules import build_vit

    folder = tmp_path_factory.mktemp("vit") / "base"
    build_vit(image_size=16, hidden_size=16, layers=1, heads=2, patch_size=8, seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export in ``upright`` and a checkpoint in ``last.ckpt``, made by the verb fit."""
    folder = tmp_path_factory.mktemp("fit")
    arguments = ["fit", "--model.base", str(base), *SMALL, "--data.task", "upright", *QUIET]
    arguments += ["--trainer.max_epochs", "1", "--trainer.default_root_dir", str(folder)]
    arguments += ["--trainer.callbacks+=ExportFineTuned", "--trainer.callbacks.folder", str(folder / "upright")]
    arguments += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath", str(folder)]
    arguments += ["--trainer.callbacks.filename", "last"]
    assert main(arguments) == 0
    return folder


def test_fit_exports_what_merges(fitted: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_merge.modules import base_sha256, load_head

    with safe_open(fitted / "upright" / "model.safetensors", framework="pt") as weights:
        assert weights.metadata()["base_sha256"] == base_sha256(base)
    _, info = load_head(fitted / "upright" / "heads" / "upright.safetensors")
    assert info.task == "upright" and len(info.labels) == 10
    output = fitted / "merged"
    assert main(["merge", "--method", "SimpleAverage", "--models", f"{{a: {fitted / 'upright'}, b: {base}}}",
                 "--base", str(base), "--output", str(output)]) == 0  # fmt: skip
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_checkpoint_is_scored(verb: str, fitted: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [verb, "--model.base", str(base), *SMALL, "--data.task", "upright", *QUIET]
    arguments += ["--trainer.default_root_dir", str(fitted)]
    assert main([*arguments, "--ckpt_path", str(fitted / "last.ckpt")]) == 0
    shown = capsys.readouterr().out
    if verb != "predict":
        assert {"validate": "val_accuracy", "test": "test_accuracy"}[verb] in shown


def test_the_configuration_is_kept_and_written_again(base: Path, tmp_path: Path) -> None:
    arguments = ["fit", "--model.base", str(base), *SMALL, "--data.task", "rotated", "--trainer.max_epochs", "1"]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path)]
    arguments += ["--trainer.logger.version", "one", "--trainer.enable_checkpointing", "false"]
    for _ in range(2):  # Lightning by itself refuses to overwrite the first one's
        assert main(arguments) == 0
    kept = yaml.safe_load((tmp_path / "lightning_logs" / "one" / "config.yaml").read_text())
    assert kept["data"]["init_args"]["task"] == "rotated" and kept["seed_everything"] == 0


def test_a_users_own_module_is_found_by_its_path(tmp_path: Path) -> None:
    arguments = ["fit", "--model", f"{__name__}.MeanBrightness", *SMALL, "--data.task", "upright", *QUIET]
    arguments += ["--trainer.max_epochs", "1", "--trainer.default_root_dir", str(tmp_path)]
    assert main(arguments) == 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--data", "Digits", "--data.task", "uprigth"], "Unknown task 'uprigth'. *Did you mean 'upright'?"),
        (["--data", "Digit", "--data.task", "upright"], "Unknown class 'Digit'. *Did you mean 'Digits'?"),
        (["--data", "Digits", "--data.taskk", "upright"], "Unknown setting of Digits 'taskk'. *Did you mean 'task'?"),
        (["--data", "Digits"], "Set data.task to one of"),
        (["--data", "Digits", "--data.task", "upright", "--model.head_scale", "-1"], "head_scale must be a positive"),
        (["--data", "Digits", "--data.task", "upright", "--trainer.max_epochz", "1"], "trainer.max_epochs"),
        (["--data", "Digits", "--data.task", "upright", "--trainer.strategy", "nonsense"], "nonsense"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_sentence(
    wrong: list[str], told: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--model.base", str(base), *QUIET, "--trainer.default_root_dir", str(tmp_path), *wrong]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-merge fit: error: ")]
    assert len(lines) == 1
    for part in told.split(" *"):
        assert part in lines[0]


# --- a merge that learns, with what a run has left ----------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(fitted: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one task, in the layout that lightning-merge run leaves."""
    folder = tmp_path_factory.mktemp("run") / "x"
    shutil.copytree(base, folder / "base")
    shutil.copytree(fitted / "upright", folder / "finetuned" / "upright")
    shutil.copytree(fitted / "upright" / "heads", folder / "heads")
    data = {"class_path": "Digits", "init_args": {"tasks": ["upright"], "max_test": 20, "max_dev": 20}}
    (folder / "run.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


@pytest.mark.parametrize("config", ["adamerging", "adamerging_pp"])
def test_a_run_fills_in_models_heads_and_data(
    config: str, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(__file__).parents[1] / "configs" / "adapt" / f"{config}.yaml"
    arguments = ["fit", "--config", str(path), "--run", str(finished), "--model.output", str(tmp_path / "out"), *QUIET]
    arguments += ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        assert main(arguments) == 0
    [told] = [line for line in caplog.messages if line.startswith("The merged model is in ")]
    assert f"in {tmp_path / 'out'} (" in told and "was replaced" not in told
    assert f"lightning-merge evaluate --run {finished} --models '{{out: {tmp_path / 'out'}}}'" in told
    # No path is told that is gone when the command ends.
    assert not any("out.trace" in line for line in caplog.messages)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        assert main(arguments) == 0
    assert "an earlier folder was replaced" in "".join(caplog.messages)
    assert (tmp_path / "out" / "coefficients.safetensors").is_file()
    record = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert record["steps"] == 2  # 20 rows, 16 at a time
    assert (record["split"], record["selection"]) == ("test", "unlabeled test")
    model = lightning_merge.load(tmp_path / "out")
    assert model.tasks == ["upright"]
    kept = [step["class_path"] for step in yaml.safe_load((tmp_path / "out" / "merge.yaml").read_text())["transforms"]]
    assert kept == (["ElectSign"] if config.endswith("pp") else [])


def test_options_go_before_what_a_run_says(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The defaults of FineTune, whose settings have the same names, must not come through either."""
    arguments = ["fit", f"--run={finished}", "--data.data.init_args.max_test", "9", "--model.initial", "0.5"]
    assert main([*arguments, "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    assert settings["model"]["class_path"].endswith("AdaptiveMerge") and model["run"] == str(finished)
    assert (model["initial"], model["learning_rate"], model["weight_decay"]) == (0.5, 1e-3, 0.0)
    assert data["data"]["init_args"]["max_test"] == 9 and data["data"]["init_args"]["max_dev"] == 20
    assert data["split"] == "test"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--run", "nowhere"], "'nowhere' is no run"),
        (["--run"], "Expected one folder of a finished run"),
        (["--run", "RUN", "--run", "RUN"], "Expected one folder of a finished run"),
        (["--run", "RUN", "--model.lerning_rate", "1"], "Did you mean 'learning_rate'?"),
        (["--run", "RUN", "--model.objectives", "[Entrpy]"], "Did you mean 'Entropy'?"),
        (["--run", "RUN", "--model.transforms", "[Elect]"], "Unknown method 'Elect'"),
        (["--run", "RUN", "--data.split", "tset"], "Did you mean 'test'?"),
        (["--run", "RUN", "--data.labels", "true"], "would teach what they are to score"),
        (["--run", "RUN", "--model.tasks", "[uprigth]"], "Did you mean 'upright'?"),
        (["--model", "AdaptiveMerge", "--data", "Digits"], "needs 'run' (--run FOLDER, a finished run)"),
        (["--run", "RUN", "--data.split", "dev", "--model.objectives", "[Supervised]"], "holds no labels"),
    ],
)
def test_what_cannot_be_learned_is_told_in_one_sentence(
    wrong: list[str], told: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(finished) if part == "RUN" else part for part in wrong]
    given += [] if given == ["--run"] else [*QUIET, "--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", *given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-merge fit: error: ")]
    assert len(lines) == 1 and told in lines[0]


@pytest.mark.parametrize("config", ["adamerging", "adamerging_pp", "distilled", "surgery"])
def test_an_adaptation_without_a_run_is_told_that_the_run_is_missing(
    config: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(Path(__file__).parents[1] / "configs" / "adapt" / f"{config}.yaml")
    assert main(["fit", "--config", path]) == 2
    assert "Missing: --run FOLDER, the output of lightning-merge run" in capsys.readouterr().err
    assert main(["fit", "--model.base", "x", "--config", path]) == 2
    capsys.readouterr()
    shutil.copytree(finished / "base", finished / "merged" / "task_arithmetic", dirs_exist_ok=True)
    assert main(["fit", "--config", path, "--run", str(finished), "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["model"]["init_args"]["output"] == f"runs/{config}"
    assert settings["trainer"]["enable_model_summary"] is False


def test_help_names_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "lightning-merge" in shown and "--model.base" in shown.replace("--model ", "--model.base")


def test_the_examples_are_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[1] / "configs" / "finetune"
    for example in sorted(root.glob("*.yaml")):
        assert main(["fit", "--config", str(example), "--print_config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"].endswith("FineTune")
