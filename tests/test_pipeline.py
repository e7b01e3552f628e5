"""The stages of ``run``, on digits with a model of fifty thousand weights."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import lightning_merge
from lightning_merge import pipeline
from lightning_merge.cli import main
from lightning_merge.data import Digits, Task
from lightning_merge.evaluation import Results
from lightning_merge.methods import SimpleAverage, WeightedAverage

MERGES: list[dict[str, Any]] = [
    {"name": "average", "method": "SimpleAverage"},
    {"name": "ties", "method": {"class_path": "Ties", "init_args": {"density": 0.3}},
     "grid": {"method.scale": [0.5, 1]}},
    {"name": "dare", "method": "TaskArithmetic", "transforms": ["Dare"],
     "grid": {"transforms.0.drop_rate": [0.3, 0.6]}},
    {"name": "lwptv", "method": "TaskArithmetic", "transforms": ["LwPTV"]},  # the pooler never moves: no layer of any τ
    {"name": "soup", "method": "GreedySoup", "models": ["upright", "upright_2"]},
]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "data": {
        "class_path": "Digits",
        "init_args": {
            "tasks": ["upright", "rotated"], "eval_batch_size": 200, "pretrain_rows": 150,
            "max_train": 300, "max_dev": 60, "max_test": 80,
        },
    },
    "pretrain": {
        "vit": {"image_size": 16, "hidden_size": 64, "layers": 1, "heads": 2, "patch_size": 4},
        "module": {"learning_rate": 3e-3, "head_scale": 16.0},
        "max_epochs": 12,
    },
    "finetune": {"module": {"learning_rate": 2e-3, "head_scale": 16.0}, "max_epochs": 2},
    "variants": {"upright_2": {"task": "upright", "seed": 1}},
    "merges": MERGES,
    "evaluate": {"corruptions": ["blur-3"]},
}  # fmt: skip
ROWS = {"pretrained", "individual", "average", "ties", "dare", "lwptv", "soup"}


class ShuffledTestLabels(Digits):
    """Digits whose test labels say nothing."""

    def load(self, name: str) -> Task:
        task = super().load(name)
        test = task.splits["test"]
        rolled = type(test)(test.inputs, np.roll(test.labels, 1))
        return Task(task.name, task.kind, task.labels, task.label_texts, {**task.splits, "test": rolled})


class Poisoned(SimpleAverage):
    """An average that has gone wrong."""

    def apply(self, view: Any, context: Any) -> torch.Tensor:
        return super().apply(view, context) * float("nan")


class Unusable(WeightedAverage):
    """A method that fails on every candidate of its grid."""

    def apply(self, view: Any, context: Any) -> torch.Tensor:
        raise RuntimeError("not today")


class Pair(SimpleAverage):
    """A method for two models, no more and no fewer."""

    min_models = 2
    max_models = 2


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    return path


def run(settings: Path, output: Path, *more: str) -> int:
    return main(["run", "--config", str(settings), "--output", str(output), *more])


def times(folder: Path) -> dict[str, int]:
    """When each file below a folder was last written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run; tests look at it, or work on a copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pipeline")
    assert run(write(folder), folder / "run") == 0
    torch.set_num_threads(threads)
    return folder / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- what a run leaves --------------------------------------------------------------------------------------------


def test_the_layout_is_the_documented_one(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "run.yaml", "base", "finetuned", "heads", "merged", "results.json", "results.csv", "results.md", "plots",
        "report.html", ".stages",
    }  # fmt: skip
    assert {path.name for path in (finished / "finetuned").iterdir()} == {"upright", "rotated", "upright_2"}
    assert {path.name for path in (finished / "heads").iterdir()} == {"upright.safetensors", "rotated.safetensors"}
    for merged in (finished / "merged").iterdir():
        assert {"model.safetensors", "config.json", "merge.yaml", "merge.json", "README.md", "heads"} <= {
            path.name for path in merged.iterdir()
        }
        assert {path.stem for path in (merged / "heads").iterdir()} == {"upright", "rotated"}
        assert "| ties |" in (merged / "README.md").read_text()  # the table is in each card
    assert list((finished / "plots").glob("*.png"))


def test_transformers_reads_a_merged_folder(finished: Path) -> None:
    from transformers import AutoModel

    assert AutoModel.from_pretrained(finished / "merged" / "ties").config.hidden_size == 64


def test_every_model_has_its_rows(finished: Path) -> None:
    with (finished / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == ROWS
    for model in ROWS:
        own = {(row["task"], row["split"]) for row in rows if row["model"] == model}
        assert own == {(task, split) for task in ("upright", "rotated") for split in ("id", "ood", "corrupted")}
    chosen = {row["model"]: row["selection"] for row in rows}
    assert chosen["average"] == "none" == chosen["individual"]
    assert chosen["ties"] == chosen["soup"] == "validation labels"


def test_training_has_taught_something(finished: Path) -> None:
    results = Results.load(finished)
    assert (results.mean("individual") or 0) > 0.3  # chance is 0.1


def test_a_variant_differs_in_its_order_of_rows_and_shares_the_head_of_its_task(finished: Path) -> None:
    """With another head's fixed vectors its features would point elsewhere, and no soup could use it."""
    own = lightning_merge.load(finished / "finetuned" / "upright_2")
    shared = lightning_merge.load(finished / "finetuned" / "upright_2", heads=finished / "heads")
    images = np.asarray(Digits(tasks=["upright"], max_test=80).get("upright").splits["test"].inputs)
    assert own(images, task="upright").labels == shared(images, task="upright").labels
    assert weights(finished / "finetuned" / "upright") != weights(finished / "finetuned" / "upright_2")


def test_the_merged_model_answers_as_the_table_says(finished: Path) -> None:
    data = Digits(tasks=["upright", "rotated"], max_test=80)
    model = lightning_merge.load(finished / "merged" / "ties")
    for task in ("upright", "rotated"):
        test = data.get(task).splits["test"]
        answers = model(np.asarray(test.inputs), task=task).probabilities.argmax(-1).numpy()
        assert float((answers == test.labels).mean()) == Results.load(finished).accuracy("ties", task)


# --- done once ----------------------------------------------------------------------------------------------------


def test_a_second_call_does_nothing_again(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, results = times(copied), (copied / "results.csv").read_text()
    assert run(write(copied.parent), copied) == 0
    after = times(copied)
    for folder in ("base", "finetuned", "heads", ".stages"):
        assert {k: v for k, v in after.items() if k.startswith(folder)} == {
            k: v for k, v in before.items() if k.startswith(folder)
        }
    changed = {name for name in after if after[name] != before.get(name)}
    assert not any(name.endswith(".safetensors") for name in changed)
    assert (copied / "results.csv").read_text() == results
    lines = [line for line in capsys.readouterr().err.splitlines() if line.split(":")[0] in stages_of(copied)]
    assert len(lines) == len(stages_of(copied)) and all(line.endswith("done before") for line in lines)


def stages_of(run_folder: Path) -> set[str]:
    return {path.stem for path in (run_folder / ".stages").glob("*.json")}


def test_run_yaml_goes_on_where_the_run_stopped(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(copied / "run.yaml"), "--output", str(copied)]) == 0
    assert "finetune-upright: done before" in capsys.readouterr().err
    assert "overwrite" not in yaml.safe_load((copied / "run.yaml").read_text())


def test_one_changed_merge_is_redone_alone(copied: Path) -> None:
    changed = [{**spec, "grid": {"method.scale": [0.7]}} if spec["name"] == "ties" else spec for spec in MERGES]
    before = times(copied / ".stages")
    assert run(write(copied.parent, merges=changed), copied) == 0
    after = times(copied / ".stages")
    assert {name for name in after if after[name] != before[name]} == {"merge-ties.json", "evaluate-ties.json"}
    assert Results.load(copied).facts("ties").selected == {"method.scale": 0.7}


def test_another_learning_rate_trains_again_and_keeps_the_base(copied: Path) -> None:
    finetune = {"module": {"learning_rate": 1e-3, "head_scale": 16.0}, "max_epochs": 1}
    before = times(copied / ".stages")
    assert run(write(copied.parent, finetune=finetune, merges=MERGES[:1]), copied) == 0
    after = times(copied / ".stages")
    changed = {name for name in after if after[name] != before[name]}
    assert {"finetune-upright.json", "finetune-rotated.json", "merge-average.json"} <= changed
    assert not {"base.json", "evaluate-pretrained.json"} & changed


def test_stopped_in_a_stage_it_goes_on_to_the_same_bytes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real = tmp_path / "run", pipeline.merge

    def stopped(method: Any, vectors: Any, folder: Path, *rest: Any, **options: Any) -> Any:
        if folder.name == "ties":
            raise KeyboardInterrupt
        return real(method, vectors, folder, *rest, **options)

    monkeypatch.setattr(pipeline, "merge", stopped)
    assert run(write(tmp_path), output) == 130
    before = times(output)
    monkeypatch.setattr(pipeline, "merge", real)
    assert run(write(tmp_path), output) == 0
    after = times(output)
    for name in before:
        if name.startswith(("base", "finetuned", "heads", "merged/average")) and not name.endswith("README.md"):
            assert after[name] == before[name], name
    assert weights(output) == weights(finished)


def test_killed_it_goes_on_to_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-c", "from lightning_merge.cli import entry; entry()", "run"]
    command += ["--config", str(write(tmp_path)), "--output", str(output)]
    started = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    record = output / ".stages" / "finetune-upright.json"
    while not record.is_file() and started.poll() is None:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert record.is_file() and not (output / "results.json").exists()
    before = times(output / "finetuned" / "upright") | times(output / "base")
    assert run(write(tmp_path), output) == 0
    assert times(output / "finetuned" / "upright") | times(output / "base") == before
    assert weights(output) == weights(finished)


# --- chosen on validation rows, not on test rows ------------------------------------------------------------------


def test_test_labels_choose_nothing(finished: Path, copied: Path) -> None:
    data = {"class_path": f"{__name__}.ShuffledTestLabels", "init_args": SETTINGS["data"]["init_args"]}
    assert run(write(copied.parent, data=data), copied) == 0
    told, honest = Results.load(copied), Results.load(finished)
    assert told.mean("individual") != honest.mean("individual")  # the table did see other labels
    for name in ("ties", "dare", "soup"):
        assert told.facts(name).selected == honest.facts(name).selected
    assert weights(copied / "merged") == weights(finished / "merged")


def test_merging_asks_for_validation_rows_only(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    stage = [""]
    loader, do = Digits.loader, pipeline.Stages.do

    def watched(self: Any, name: str, split: str, *rest: Any, **options: Any) -> Any:
        asked.append((stage[0], split))
        return loader(self, name, split, *rest, **options)

    def named(self: Any, name: str, *rest: Any, **options: Any) -> Any:
        stage[0] = name.split("-")[0]
        return do(self, name, *rest, **options)

    monkeypatch.setattr(Digits, "loader", watched)
    monkeypatch.setattr(pipeline.Stages, "do", named)
    assert run(write(copied.parent), copied, "--overwrite") == 0
    assert {split for where, split in asked if where == "merge"} == {"dev"}
    assert {split for where, split in asked if where == "finetune"} == {"train"}
    assert "test" in {split for where, split in asked if where == "evaluate"}


# --- what fails, and what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("poisoned", ["weights", "score"])
def test_a_failing_merge_leaves_the_others(copied: Path, poisoned: str, capsys: pytest.CaptureFixture[str]) -> None:
    broken: dict[str, Any] = {"name": "broken", "method": f"{__name__}.Poisoned"}
    if poisoned == "score":
        broken = {"name": "broken", "method": f"{__name__}.Unusable", "grid": {"method.normalize": [True]}}
    assert run(write(copied.parent, merges=[*MERGES, broken]), copied) == 1
    results = Results.load(copied)
    assert set(results.models) == {*ROWS, "broken"}
    assert results.facts("broken").error and results.mean("broken") is None
    assert results.mean("ties") is not None
    shown = capsys.readouterr()
    assert "The merge 'broken' failed" in shown.err and "failed" in shown.out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"merges": [{"name": "a", "method": "Tyes"}]}, "Did you mean 'Ties'?"),
        ({"merges": [{"name": "a", "method": "Ties", "grid": {"method.densty": [0.1]}}]}, "Did you mean 'density'?"),
        ({"merges": [{"name": "a", "method": "Ties", "grid": {"methods.density": [0.1]}}]}, "methods.density"),
        ({"merges": [{"name": "a", "method": "Ties", "grid": {"transforms.0.eta": [0.1]}}]}, "transforms.0.eta"),
        ({"merges": [{"name": "a", "method": "Ties", "grid": {"method.density": [20]}}]}, "Did you mean 0.2?"),
        ({"merges": [{"name": "a", "method": "Ties", "grid": {"method.density": []}}]}, "no values"),
        ({"merges": [{"name": "a", "method": "SoupOf", "models": ["upright"]}]}, "Unknown method 'SoupOf'"),
        ({"merges": [{"name": "a", "method": "Ties", "models": ["uprigt"]}]}, "Did you mean 'upright'?"),
        ({"merges": [{"name": "a", "method": "Ties"}, {"name": "a", "method": "Ties"}]}, "each name once"),
        ({"merges": [{"name": "a", "method": "Ties", "transforms": ["SimpleAverage"]}]}, "not a transform"),
        (
            {"merges": [{"name": "a", "method": "WeightedAverage", "grid": {"method.weights": [{"uprigt": 1.0}]}}]},
            "Did you mean 'upright'?",
        ),
        ({"merges": [{"name": "a", "method": f"{__name__}.Pair", "models": ["upright"]}]}, "Merge 'a': Pair takes"),
        (
            {
                "merges": [
                    {
                        "name": "a",
                        "method": "Ties",
                        "models": ["upright"],
                        "transforms": ["Dare", {"class_path": "LwPTV", "init_args": {"saliency": "distance"}}],
                    }
                ]
            },
            "at least 2 models, got 1",
        ),
        ({"merges": [{"name": "individual", "method": "Ties"}]}, "'individual'"),
        ({"merges": [{"name": "a/b", "method": "Ties"}]}, "a/b"),
        ({"data": {"class_path": "Digits", "init_args": {"tasks": ["uprigt"]}}}, "Did you mean 'upright'?"),
        ({"data": {"class_path": "Digitz"}}, "Did you mean 'Digits'?"),
        ({"finetune": {"module": {"learning_rat": 1.0}}}, "Did you mean 'learning_rate'?"),
        ({"finetune": {"trainer": {"max_step": 1}}}, "Did you mean 'max_steps'?"),
        ({"finetune": {"trainer": {"strategy": "fsdp"}}}, "strategy 'fsdp'"),
        ({"finetune": {"trainer": {"max_epochs": 1}}}, "Set finetune.max_epochs."),
        ({"finetune": {"trainer": {"precision": "bf16-mixed"}}}, "Set finetune.precision."),
        ({"finetune": {"trainer": {"callbacks": []}}}, "Set finetune.patience"),
        ({"pretrain": {"trainer": {"max_epochs": 1}}}, "Set pretrain.max_epochs."),
        ({"finetune": {"precision": "bf16-mixd"}}, "Did you mean 'bf16-mixed'?"),
        ({"finetune": {"module": {"lora": {"rnk": 2}}}}, "Did you mean 'rank'?"),
        ({"finetune": {"module": {"lora": {"rank": 0}}}}, "finetune.module.lora: LoraSettings: rank must be"),
        ({"finetune": {"module": {"lora": {"rank": "big"}}}}, "finetune.module.lora has a value of the wrong type"),
        ({"finetune": {"module": {"lora": 8}}}, "finetune.module.lora must be a mapping"),
        ({"variants": {"x": {"task": "upright", "module": {"lora": {"rnk": 2}}}}}, "variants.x.module.lora"),
        ({"finetune": {"max_epochs": 0}}, "max_epochs must be at least 1"),
        ({"pretrain": {"vit": {"hiden_size": 3}}}, "Did you mean 'hidden_size'?"),
        ({"pretrain": None}, "either 'base'"),
        ({"pretrain": None, "base": "no/such/folder"}, "no/such/folder"),
        ({"variants": {"upright": {"task": "upright"}}}, "no task's name"),
        ({"variants": {"x": {"task": "uprigt"}}}, "Did you mean 'upright'?"),
        ({"variants": {"x": {"task": "upright", "module": {"lr": 1.0}}}}, "variants.x.module"),
        ({"evaluate": {"corruptions": ["blurr-3"]}}, "Did you mean 'blur'?"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    changes: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(write(tmp_path, **changes), tmp_path / "run") == 2
    shown = capsys.readouterr().err
    assert shown.count("lightning-merge run: error: ") == 1 and "\n" not in shown.strip()
    assert told in shown
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert run(write(tmp_path), tmp_path / "mine") == 2
    assert "already holds something else" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_one_process_of_torchrun_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(write(tmp_path), tmp_path / "run") == 2
    assert "finetune.trainer" in capsys.readouterr().err


# --- the other verbs on a run -------------------------------------------------------------------------------------


def test_evaluate_prints_the_table_and_adds_a_model(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = times(finished)
    models = f"{{mine: {finished / 'merged' / 'ties'}}}"
    assert main(["evaluate", "--run", str(finished), "--models", models, "--output", str(tmp_path / "table")]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*ROWS, "mine"))
    results = Results.load(tmp_path / "table")
    assert [results.accuracy("mine", task) for task in results.tasks] == [
        results.accuracy("ties", task) for task in results.tasks
    ]
    assert times(finished) == before
    assert main(["evaluate", "--run", str(tmp_path)]) == 2
    assert main(["evaluate", "--run", str(finished), "--models", "{individual: x}"]) == 2


def test_the_merge_verb_gives_the_runs_bytes(finished: Path, tmp_path: Path) -> None:
    chosen = Results.load(finished).facts("ties").selected["method.scale"]
    models = f"{{upright: {finished / 'finetuned' / 'upright'}, rotated: {finished / 'finetuned' / 'rotated'}}}"
    arguments = ["merge", "--method", "Ties", "--method.density", "0.3", "--method.scale", str(chosen)]
    arguments += ["--base", str(finished / "base"), "--models", models, "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    ours, runs = tmp_path / "out" / "model.safetensors", finished / "merged" / "ties" / "model.safetensors"
    assert ours.read_bytes() == runs.read_bytes()


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork", "ddp_spawn"])
def test_two_processes_leave_what_one_leaves(strategy: str, finished: Path, tmp_path: Path) -> None:
    """With patience, so that the best checkpoint must come back from where it was made."""
    trainer = {"devices": 2, "accelerator": "cpu", "strategy": strategy}
    finetune = {**SETTINGS["finetune"], "patience": 1, "trainer": trainer}
    settings, output = write(tmp_path, finetune=finetune), tmp_path / "run"
    script = tmp_path / "command.py"  # ddp starts the very command again, so it must be a file
    script.write_text("from lightning_merge.cli import entry\n\nif __name__ == '__main__':\n    entry()\n")
    command = [sys.executable, str(script), "run", "--config", str(settings), "--output", str(output)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finetune-rotated: ") == 1  # the second process is silent
    assert done.stdout.count("Accuracy by task") == 1

    def layout(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*")}

    assert layout(output) == layout(finished)
    assert weights(output / "base") == weights(finished / "base")  # pretrained by one process, as there
    record = json.loads((output / ".stages" / "finetune-upright.json").read_text())["result"]
    assert 0 < record["validation_accuracy"] <= 1
