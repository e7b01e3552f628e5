from __future__ import annotations

import hashlib
import json
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_files import as_option, listing, nudged, run_python, save_bert, save_finetuned, save_three, weights
from safetensors.torch import load_file

from lightning_merge import TaskVectors, merge, tensor_view
from lightning_merge.cli import main
from lightning_merge.errors import UserError
from lightning_merge.journal import Workplace
from lightning_merge.methods import (
    Breadcrumbs,
    Dare,
    GreedySoup,
    LwPTV,
    MergeMethod,
    SimpleAverage,
    TaskArithmetic,
    Ties,
)
from lightning_merge.weights import save_safetensors
from lightning_merge.weights.output_files import OutputFiles


@pytest.fixture
def three(tmp_path: Path) -> TaskVectors:
    base, models = save_three(tmp_path / "in")
    return TaskVectors.open(base, models)


def same(written: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return written.keys() == expected.keys() and all(
        written[name].dtype == value.dtype and torch.equal(written[name], value) for name, value in expected.items()
    )


# --- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder_loads_in_transformers_and_equals_the_merge_in_memory(tmp_path: Path, shard: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    base = save_bert(tmp_path / "base", shard=shard)
    models = {name: save_finetuned(tmp_path / name, base, seed, shard) for seed, name in enumerate("ab")}
    vectors = TaskVectors.open(base, models)
    report = merge(Ties(density=0.2, scale=0.3), vectors, tmp_path / "out", transforms=[Dare(drop_rate=0.5)], seed=3)
    expected = Ties(density=0.2, scale=0.3)(vectors, transforms=[Dare(drop_rate=0.5)], seed=3)

    assert same(load_file(tmp_path / "out" / "model.safetensors"), expected)
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("a good film", return_tensors="pt")
    assert model(**tokens).last_hidden_state.isfinite().all()

    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "merge.yaml", "merge.json", "README.md"} < names
    assert not any("index" in name or "partial" in name for name in names)
    assert report.output == tmp_path / "out" and not report.already_there
    assert report.bytes_written == sum(value.nbytes for value in expected.values())


def test_a_safetensors_file_equals_the_merge_in_memory(tmp_path: Path, three: TaskVectors) -> None:
    merge(TaskArithmetic(scale=0.4), three, tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), TaskArithmetic(scale=0.4)(three))
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out.safetensors", "out.safetensors.merge.json"}


def test_a_checkpoint_keeps_the_hyperparameters_of_the_base_and_no_optimizer(tmp_path: Path) -> None:
    paths = []
    for seed in range(3):
        state_dict = {f"model.{name}": value for name, value in nudged(weights(), seed).items()}
        content = {
            "state_dict": {**state_dict, "head.weight": torch.full((2,), float(seed))}, "epoch": 4,
            "hyper_parameters": {"width": seed}, "pytorch-lightning_version": "2.1.0",
            "optimizer_states": [{"state": {}}], "lr_schedulers": [{}], "loops": {}, "callbacks": {"x": {}},
        }  # fmt: skip
        paths.append(tmp_path / f"{seed}.ckpt")
        torch.save(content, paths[-1])
    vectors = TaskVectors.open(paths[0], {"a": paths[1], "b": paths[2]}, prefix="model.")
    merge(SimpleAverage(), vectors, tmp_path / "out.ckpt")
    merged = torch.load(tmp_path / "out.ckpt", weights_only=True)
    expected = {f"model.{name}": value for name, value in SimpleAverage()(vectors).items()}
    assert same(merged.pop("state_dict"), {**expected, "head.weight": torch.zeros(2)})  # what was not merged stays
    assert merged == {
        "epoch": 4, "global_step": 0, "hyper_parameters": {"width": 0}, "pytorch-lightning_version": "2.1.0",
    }  # fmt: skip


def test_a_checkpoint_made_of_other_files_names_a_version_lightning_can_migrate(
    tmp_path: Path, three: TaskVectors
) -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(700, 400)
            self.layer = torch.nn.Linear(16, 8)
            self.temperature = torch.nn.Parameter(torch.zeros(()))
            self.register_buffer("position_ids", torch.zeros(4, dtype=torch.int64))

    merge(SimpleAverage(), three, tmp_path / "out.ckpt")
    module = Module.load_from_checkpoint(tmp_path / "out.ckpt", strict=True)
    assert same(dict(module.state_dict()), SimpleAverage()(three))


def test_tied_weights_are_written_under_both_names_where_no_config_ties_them(tmp_path: Path) -> None:
    from model_files import tiny_gpt2

    base, tuned = tiny_gpt2(0), tiny_gpt2(0)
    tuned.load_state_dict(nudged(tuned.state_dict(), 1, 0.01))
    vectors = TaskVectors.open(base, {"a": tuned})
    for name in ("out.safetensors", "out.ckpt"):
        merge(TaskArithmetic(scale=0.5), vectors, tmp_path / name)
    expected = TaskArithmetic(scale=0.5)(vectors)
    assert same(load_file(tmp_path / "out.safetensors"), expected)
    assert same(torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"], expected)
    assert torch.equal(expected["lm_head.weight"], expected["transformer.wte.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_the_dtype_is_rounded_to_once_and_stated(tmp_path: Path, dtype: Any) -> None:
    from transformers import AutoModel

    base = save_bert(tmp_path / "base")
    vectors = TaskVectors.open(base, {"a": save_finetuned(tmp_path / "a", base, 1)})
    report = merge(TaskArithmetic(), vectors, tmp_path / "out", dtype=dtype)
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert same(written, {name: value.to(wanted) for name, value in TaskArithmetic()(vectors).items()})
    assert AutoModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    assert report.recipe["dtype"] == str(wanted).removeprefix("torch.")


def test_integers_keep_their_dtype(tmp_path: Path, three: TaskVectors) -> None:
    merge(TaskArithmetic(), three, tmp_path / "out.safetensors", dtype="float16")
    written = load_file(tmp_path / "out.safetensors")
    assert written["position_ids"].dtype == torch.int64 and torch.equal(written["position_ids"], torch.arange(4))
    assert written["temperature"].dtype == torch.float16
    for dtype, message in [("half", "Unknown dtype 'half'. Known: bfloat16"), (torch.int8, "Unknown dtype 'int8'")]:
        with pytest.raises(UserError, match=message):
            merge(TaskArithmetic(), three, tmp_path / "other.safetensors", dtype=dtype)


# --- the recipe and the record ----------------------------------------------------------------------------------


def test_a_recipe_runs_again_to_the_same_bytes(tmp_path: Path) -> None:
    base = save_bert(tmp_path / "base")
    models = {name: save_finetuned(tmp_path / name, base, seed) for seed, name in enumerate("ab")}
    vectors = TaskVectors.open(base, models, ignore=["pooler"], batch_norm="base")
    transforms = [LwPTV(eta=0.5), Dare(drop_rate=0.5)]
    merge(TaskArithmetic(scale={"a": 0.5, "b": 0.1}), vectors, tmp_path / "one", transforms, seed=7, dtype="bfloat16")
    assert main(["merge", "--config", str(tmp_path / "one" / "merge.yaml"), "--output", str(tmp_path / "two")]) == 0
    one, two = listing(tmp_path / "one"), listing(tmp_path / "two")
    assert {name for name in one if one[name] != two[name]} <= {"merge.json", "README.md"}
    assert one.keys() == two.keys()
    recipe = yaml.safe_load(one["merge.yaml"])
    assert recipe["method"]["class_path"] == "TaskArithmetic"
    assert recipe["method"]["init_args"]["scale"] == {"a": 0.5, "b": 0.1}
    assert [step["class_path"] for step in recipe["transforms"]] == ["LwPTV", "Dare"]
    assert recipe["models"] == {name: str(path) for name, path in models.items()} and recipe["base"] == str(base)
    assert (recipe["ignore"], recipe["batch_norm"], recipe["seed"], recipe["dtype"]) == (
        ["pooler"],
        "base",
        7,
        "bfloat16",
    )


def test_a_recipe_keeps_the_prefix_of_whichever_source_has_it(tmp_path: Path) -> None:
    base, models = save_three(tmp_path)
    prefixed = {f"model.{name}": value for name, value in load_file(models["sun"]).items()}
    torch.save({"state_dict": prefixed}, tmp_path / "sun.ckpt")
    vectors = TaskVectors.open(base, {"cars": models["cars"], "sun": tmp_path / "sun.ckpt"}, prefix="model.")
    merge(TaskArithmetic(), vectors, tmp_path / "one")
    assert main(["merge", "--config", str(tmp_path / "one/merge.yaml"), "--output", str(tmp_path / "two")]) == 0
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_the_record_names_sources_with_their_hashes(tmp_path: Path, three: TaskVectors) -> None:
    from lightning_merge import __version__

    report = merge(Ties(), three, tmp_path / "out", seed=5)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    files = {name: tmp_path / "in" / f"{name}.safetensors" for name in ("base", "cars", "sun")}
    assert record["sources"] == {
        name: {"reference": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in files.items()
    }
    assert record["recipe"] == report.recipe and record["recipe"]["seed"] == 5
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["lightning_merge"] == __version__
    assert record["passes"] == report.passes == 4 and record["bytes_written"] == report.bytes_written
    assert record["peak_memory_bytes"] > 0 and record["seconds"] >= 0
    assert [finding["level"] for finding in record["findings"]] == ["INFO", "INFO"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Ties(density=0.2" in card and "arXiv 2306.01708" in card and record["sources"]["sun"]["sha256"][:16] in card


# --- the place it goes to ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.ckpt"])
def test_asked_again_it_is_already_there_and_another_recipe_is_refused(
    tmp_path: Path, three: TaskVectors, name: str
) -> None:
    out = tmp_path / name
    assert not merge(TaskArithmetic(), three, out).already_there
    before = listing(tmp_path)
    assert merge(TaskArithmetic(), three, out).already_there
    with pytest.raises(UserError, match=r"already holds another merge. Expected a new place, or --overwrite"):
        merge(TaskArithmetic(scale=0.5), three, out)
    assert listing(tmp_path) == before
    assert not merge(TaskArithmetic(scale=0.5), three, out, overwrite=True).already_there
    after = listing(tmp_path)
    assert after.keys() == before.keys() and merge(TaskArithmetic(scale=0.5), three, out).already_there
    weights_file = f"{name}/model.safetensors" if name == "out" else name
    assert after[weights_file] != before[weights_file]
    (tmp_path / weights_file).write_bytes(b"damaged")  # overwriting does it again, whatever the record says
    assert not merge(TaskArithmetic(scale=0.5), three, out, overwrite=True).already_there
    assert listing(tmp_path)[weights_file] == after[weights_file]


def test_a_source_that_changed_is_another_merge(tmp_path: Path, three: TaskVectors) -> None:
    merge(TaskArithmetic(), three, tmp_path / "out")
    save_safetensors(nudged(weights(), 9), tmp_path / "in" / "sun.safetensors")
    changed = TaskVectors.open(three.base, {name: tmp_path / "in" / f"{name}.safetensors" for name in ("cars", "sun")})
    with pytest.raises(UserError, match="already holds another merge"):
        merge(TaskArithmetic(), changed, tmp_path / "out")


def test_task_vectors_of_algebra_are_told_apart_by_their_values(tmp_path: Path, three: TaskVectors) -> None:
    negated = TaskVectors.of(three, {"cars": -three["cars"], "sun": three["sun"]})
    merge(TaskArithmetic(), three, tmp_path / "plain")
    with pytest.raises(UserError, match="already holds another merge"):
        merge(TaskArithmetic(), negated, tmp_path / "plain")
    merge(TaskArithmetic(), negated, tmp_path / "negated")
    assert merge(TaskArithmetic(), negated, tmp_path / "negated").already_there
    assert same(load_file(tmp_path / "negated" / "model.safetensors"), TaskArithmetic()(negated))
    opposite = TaskVectors.of(three, {"cars": three["cars"] * -2.0, "sun": three["sun"]})
    with pytest.raises(UserError, match="already holds another merge"):
        merge(TaskArithmetic(), opposite, tmp_path / "negated")
    # Its recipe names no file for what Python computed: run again, it is refused instead of giving the plain merge.
    again = ["merge", "--config", str(tmp_path / "negated" / "merge.yaml"), "--output", str(tmp_path / "again")]
    assert main(again) == 2 and not (tmp_path / "again").exists()
    record = json.loads((tmp_path / "negated" / "merge.json").read_text())
    assert record["sources"]["cars"]["reference"] == "(a task vector computed in Python)"
    analogy = TaskVectors.of(three, {"new": three.analogy("cars", "sun", "cars")})
    merge(TaskArithmetic(scale=1.0), analogy, tmp_path / "analogy.safetensors")
    assert same(load_file(tmp_path / "analogy.safetensors"), TaskArithmetic(scale=1.0)(analogy))


def test_what_is_not_a_merge_of_ours_is_never_replaced(tmp_path: Path, three: TaskVectors) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file.safetensors").write_text("mine")
    before = listing(tmp_path)
    for name in ("folder", "file.safetensors"):
        for options in ({}, {"overwrite": True}, {"dry_run": True}):
            with pytest.raises(
                UserError, match=rf"{name}' already holds something else. Expected a new or empty place"
            ):
                merge(TaskArithmetic(), three, tmp_path / name, **options)
    assert listing(tmp_path) == before
    (tmp_path / "empty").mkdir()
    merge(TaskArithmetic(), three, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_source_is_never_the_output(tmp_path: Path, three: TaskVectors) -> None:
    merge(TaskArithmetic(), three, tmp_path / "first")
    for place in (tmp_path / "first", tmp_path / "first" / "model.safetensors"):
        vectors = TaskVectors.open(three.base, {"a": tmp_path / "first"})
        with pytest.raises(UserError, match=r"is or holds a model being merged. Expected another place"):
            merge(SimpleAverage(), vectors, place, overwrite=True)
    (tmp_path / "first" / "deeper").mkdir()
    (tmp_path / "in" / "sun.safetensors").rename(tmp_path / "first" / "deeper" / "sun.safetensors")
    vectors = TaskVectors.open(three.base, {"a": tmp_path / "first" / "deeper" / "sun.safetensors"})
    with pytest.raises(UserError, match="is or holds a model being merged"):
        merge(SimpleAverage(), vectors, tmp_path / "first", overwrite=True)
    assert (tmp_path / "first" / "deeper" / "sun.safetensors").is_file()


def test_a_place_that_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path, three: TaskVectors) -> None:
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"The output '.*base.safetensors/out' cannot be written \("):
        merge(TaskArithmetic(), three, tmp_path / "in" / "base.safetensors" / "out")
    assert listing(tmp_path) == before


# --- nothing left behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["new/deep/out", "new/deep/out.safetensors", "new/deep/out.ckpt"])
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [TaskArithmetic(), Ties(), SimpleAverage()], ids=lambda m: type(m).__name__)
def test_a_source_with_nan_is_named_and_nothing_is_written(
    tmp_path: Path, name: str, damage: float, method: MergeMethod
) -> None:
    base, models = save_three(tmp_path)
    broken = load_file(models["sun"])
    broken["layer.weight"][3, 5] = damage  # the last but one in the order of merging
    save_safetensors(broken, models["sun"])
    vectors = TaskVectors.open(base, models)
    before = listing(tmp_path)
    what = "NaN" if damage != damage else "infinity"
    with pytest.raises(UserError, match=rf"Tensor 'layer.weight' of '.*sun.safetensors' holds {what}"):
        merge(method, vectors, tmp_path / name)
    assert listing(tmp_path) == before


def interrupted(error: type[BaseException], after: int = 0) -> Any:
    """A report of progress that stops the merge once some entries are written."""

    def interrupt(done: int, total: int) -> None:
        assert 0 < done <= total
        if done > after:
            raise error

    return interrupt


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.ckpt"])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_an_error_leaves_the_earlier_merge_as_it_was(
    tmp_path: Path, three: TaskVectors, name: str, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        merge(TaskArithmetic(), three, tmp_path / name, on_progress=interrupted(error))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    merge(TaskArithmetic(), three, tmp_path / name)
    before = listing(tmp_path)
    with pytest.raises(error):
        merge(Ties(), three, tmp_path / name, overwrite=True, on_progress=interrupted(error))
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.ckpt"])
def test_an_interrupted_merge_goes_on_where_it_stopped(
    tmp_path: Path, three: TaskVectors, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_merge.merging.SECONDS_BETWEEN_REPORTS", -1)
    merge(TaskArithmetic(), three, tmp_path / "straight" / name)
    stop = interrupted(KeyboardInterrupt, after=three.numel // 2)
    with pytest.raises(KeyboardInterrupt):
        merge(TaskArithmetic(), three, tmp_path / name, threads=1, on_progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", f"{name}.partial", "straight"]
    seen: list[int] = []
    report = merge(TaskArithmetic(), three, tmp_path / name, on_progress=lambda done, _: seen.append(done))
    assert 0 < report.resumed_tensors < len(three.template.tensors) and seen[0] > three.numel // 3
    assert sorted(path.name for path in (tmp_path / "straight").iterdir()) == sorted(
        path.name for path in tmp_path.iterdir() if path.name.startswith("out")
    )
    for path in [tmp_path / name, *(tmp_path / name).rglob("*.safetensors")]:
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "straight" / path.relative_to(tmp_path)).read_bytes()


@pytest.mark.parametrize("change", ["recipe", "source", "boot", "file"])
def test_what_was_begun_counts_only_for_the_very_same_merge(
    tmp_path: Path, three: TaskVectors, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_merge.merging.SECONDS_BETWEEN_REPORTS", -1)
    stop = interrupted(KeyboardInterrupt, after=three.numel // 2)
    with pytest.raises(KeyboardInterrupt):
        merge(TaskArithmetic(), three, tmp_path / "out", threads=1, on_progress=stop)
    method, vectors = TaskArithmetic(), three
    if change == "recipe":
        method = TaskArithmetic(scale=0.5)
    elif change == "source":
        save_safetensors(nudged(weights(), 9), tmp_path / "in" / "sun.safetensors")
        vectors = TaskVectors.open(three.base, {n: tmp_path / "in" / f"{n}.safetensors" for n in ("cars", "sun")})
    elif change == "boot":
        monkeypatch.setattr("lightning_merge.journal._boot", lambda: "another")
    else:
        begun = tmp_path / "out.partial" / "files" / "model.safetensors"
        begun.write_bytes(begun.read_bytes()[:-1])
    assert merge(method, vectors, tmp_path / "out").resumed_tensors == 0
    assert same(load_file(tmp_path / "out" / "model.safetensors"), method(vectors))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_two_processes_never_merge_into_one_place(tmp_path: Path, three: TaskVectors) -> None:
    with Workplace(tmp_path / "out", "somebody else's"):
        with pytest.raises(UserError, match=r"Another process is merging into '.*out' right now"):
            merge(TaskArithmetic(), three, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    merge(TaskArithmetic(), three, tmp_path / "out")


def test_a_failure_while_writing_stops_the_merge_and_leaves_nothing(
    tmp_path: Path, three: TaskVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OutputFiles, "write", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device"):
        merge(TaskArithmetic(), three, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_killed_merge_leaves_nothing_under_the_name_of_the_output(tmp_path: Path) -> None:
    base, models = save_three(tmp_path / "in")
    code = """
import os, signal, sys
from lightning_merge import TaskVectors, merge
from lightning_merge.methods import TaskArithmetic
base, a, out = sys.argv[1:]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
merge(TaskArithmetic(), TaskVectors.open(base, {"a": a}), out, on_progress=kill)
"""
    done = run_python(code, base, models["cars"], tmp_path / "out")
    assert done.returncode == -9, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.partial"]
    # Another merge into this place clears it away; so does the same, which may have found something done.
    shutil.copytree(tmp_path / "out.partial", tmp_path / "two.partial")
    merge(TaskArithmetic(), TaskVectors.open(base, {"a": models["cars"]}), tmp_path / "out")
    merge(TaskArithmetic(scale=0.1), TaskVectors.open(base, {"a": models["cars"]}), tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "two"]


def test_a_dry_run_reads_no_hash_and_writes_nothing(
    tmp_path: Path, three: TaskVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a source was hashed")

    monkeypatch.setattr("lightning_merge.digests.sha256_of_source", refuse)
    before = listing(tmp_path)
    report = merge(Ties(), three, tmp_path / "new" / "out.safetensors", dry_run=True)
    assert report.bytes_written == three.template.nbytes and listing(tmp_path) == before
    merge(GreedySoup(), three, tmp_path / "out", dry_run=True)  # candidates are not scored


def test_what_does_not_fit_the_method_is_refused_before_anything_is_read(tmp_path: Path, three: TaskVectors) -> None:
    no_base = TaskVectors.open(None, three.models)
    for method, vectors, message in [
        (Ties(), no_base, "Ties needs a base model"),
        (TaskArithmetic(scale={"cars": 1.0}), three, "TaskArithmetic: scale has no value for the model 'sun'"),
        (GreedySoup(), three, "GreedySoup selects by validation and needs a score"),
    ]:
        with pytest.raises(UserError, match=message):
            merge(method, vectors, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(SimpleAverage(), no_base, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["sources"].keys() == {"cars", "sun"}


# --- the same bytes ---------------------------------------------------------------------------------------------

EVERY_REACH = [
    (Ties(density=0.2), [Dare(drop_rate=0.5)]),
    (Ties(density=0.2, scope="tensor"), []),
    (TaskArithmetic(), [LwPTV(eta=0.3), Breadcrumbs()]),
]


@pytest.mark.parametrize(("method", "transforms"), EVERY_REACH)
def test_neither_threads_nor_chunks_nor_the_order_of_models_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: MergeMethod, transforms: list[Any]
) -> None:
    base, models = save_three(tmp_path / "in")
    results = []
    for threads, listed in [(1, models), (4, dict(reversed(models.items())))]:
        out = tmp_path / f"{threads}.safetensors"
        merge(method, TaskVectors.open(base, listed), out, transforms, threads=threads)
        results.append(out.read_bytes())
    chunks = TaskVectors.chunks
    monkeypatch.setattr(TaskVectors, "chunks", lambda self, name, size=tensor_view.GRID: chunks(self, name, size))
    merge(method, TaskVectors.open(base, models), tmp_path / "chunks.safetensors", transforms)
    assert results[0] == results[1] == (tmp_path / "chunks.safetensors").read_bytes()


def test_two_processes_that_hash_differently_write_the_same_bytes(tmp_path: Path) -> None:
    base, models = save_three(tmp_path / "in")
    code = """
import sys
from lightning_merge.cli import main
base, models, out = sys.argv[1:]
for name in ("m.safetensors", "m.ckpt", "folder"):
    given = ["--transforms+=Dare", "--transforms.drop_rate=0.5", "--base", base, "--models", models]
    assert main(["merge", "--method", "Ties", *given, "--output", f"{out}/{name}"]) == 0
"""
    written = []
    for seed in ("1", "2"):
        place = tmp_path / seed / "out"  # records and recipes name no place of the output
        done = run_python(code, base, as_option(models), place, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        timed = ("merge.json", "README.md")
        written.append({k: v for k, v in listing(place).items() if not k.endswith(timed)})
    assert written[0] == written[1]
    assert written[0].keys() == {"m.safetensors", "m.ckpt", "folder"} | {
        f"folder/{name}" for name in ("model.safetensors", "merge.yaml")
    }
    merge(Ties(), TaskVectors.open(base, models), tmp_path / "here.safetensors", transforms=[Dare(drop_rate=0.5)])
    assert (tmp_path / "here.safetensors").read_bytes() == written[0]["m.safetensors"]


@pytest.mark.parametrize(("method", "transforms"), EVERY_REACH)
def test_two_processes_write_the_bytes_of_one(
    tmp_path: Path, three: TaskVectors, method: MergeMethod, transforms: list[Any]
) -> None:
    merge(method, three, tmp_path / "one", transforms)
    seen: list[int] = []
    report = merge(
        method, three, tmp_path / "two", transforms, num_workers=2, on_progress=lambda done, _: seen.append(done)
    )
    expected, found = listing(tmp_path / "one"), listing(tmp_path / "two")
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert report.passes == json.loads((tmp_path / "one" / "merge.json").read_text())["passes"]
    assert seen[-1] == three.numel and sorted(seen) == seen


def test_what_a_process_finds_wrong_reaches_the_user(tmp_path: Path) -> None:
    base, models = save_three(tmp_path / "in")
    broken = load_file(models["sun"])
    broken["layer.weight"][3, 5] = float("nan")
    save_safetensors(broken, models["sun"])
    with pytest.raises(UserError, match=r"Tensor 'layer.weight' of '.*sun.safetensors' holds NaN"):
        merge(Ties(), TaskVectors.open(base, models), tmp_path / "out", num_workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_values_of_algebra_cannot_be_shared_out(tmp_path: Path, three: TaskVectors) -> None:
    negated = TaskVectors.of(three, {"cars": -three["cars"]})
    with pytest.raises(UserError, match=r"cannot be shared out over processes .*--num_workers 1"):
        merge(TaskArithmetic(), negated, tmp_path / "out", num_workers=2)


# --- files ------------------------------------------------------------------------------------------------------


def test_shards_hold_the_same_tensors_and_load(tmp_path: Path) -> None:
    from transformers import AutoModel

    base = save_bert(tmp_path / "base")
    vectors = TaskVectors.open(base, {"a": save_finetuned(tmp_path / "a", base, 1, "1GB")})
    merge(TaskArithmetic(), vectors, tmp_path / "one")
    merge(TaskArithmetic(), vectors, tmp_path / "many", max_shard_size="20KB", num_workers=2)
    one = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in one.values())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for name in files:
        held = load_file(tmp_path / "many" / name)
        assert held.keys() == {key for key, file in index["weight_map"].items() if file == name}
        assert all(torch.equal(value, one[key]) for key, value in held.items())
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 20_000
    assert same(
        AutoModel.from_pretrained(tmp_path / "many").state_dict(),
        AutoModel.from_pretrained(tmp_path / "one").state_dict(),
    )
    assert TaskVectors.open(tmp_path / "many", {"a": tmp_path / "one"})["a"].norm() == 0


@pytest.mark.parametrize("size", ["five", "0GB", "-1", "5 apples"])
def test_a_size_that_is_none_is_refused(tmp_path: Path, three: TaskVectors, size: str) -> None:
    with pytest.raises(UserError, match=r"is no size. Expected a number of bytes, or one such as 5GB"):
        merge(TaskArithmetic(), three, tmp_path / "out", max_shard_size=size)


def test_a_disk_too_small_is_noticed_before_any_work(
    tmp_path: Path, three: TaskVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_merge.planning._free", lambda output: 1000)
    message = r"The output takes .* MB and the disk of '.*out' has 0.0 MB left"
    report = merge(TaskArithmetic(), three, tmp_path / "out", dry_run=True)
    assert [finding.level for finding in report.findings if "disk" in finding.message] == ["ERROR"]
    with pytest.raises(UserError, match=message):
        merge(TaskArithmetic(), three, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    "method", [TaskArithmetic(), Ties(scope="tensor", density=0.999), SimpleAverage()], ids=lambda m: type(m).__name__
)
def test_the_plan_foretells_what_is_read(tmp_path: Path, three: TaskVectors, method: MergeMethod) -> None:
    foreseen = merge(method, three, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists() and foreseen.plan is not None
    done = merge(method, three, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert foreseen.bytes_written == done.bytes_written <= written
    if isinstance(method, TaskArithmetic):
        merged = sum(three.info(name).nbytes for name in three.tensor_names)
        assert done.bytes_read == 3 * merged and done.bytes_read <= foreseen.bytes_read


# --- rounding ---------------------------------------------------------------------------------------------------


def test_stochastic_rounding_keeps_small_updates_on_average(tmp_path: Path) -> None:
    """bf16 near 1 has steps of 2⁻⁷: a merged change of a twentieth of that is lost by rounding to the nearest."""
    count = 200_000
    base = {"norm.weight": torch.ones(count, dtype=torch.bfloat16)}
    model = {"norm.weight": torch.full((count,), 1 + 2**-7, dtype=torch.bfloat16)}
    vectors = TaskVectors.open(base, {"a": model}, check=False)
    for rounding in ("nearest", "stochastic"):
        merge(TaskArithmetic(scale=0.05), vectors, tmp_path / f"{rounding}.safetensors", rounding=rounding, seed=3)
    nearest, stochastic = (
        load_file(tmp_path / f"{rounding}.safetensors")["norm.weight"].double()
        for rounding in ("nearest", "stochastic")
    )
    assert (nearest == 1).all()
    assert set(stochastic.unique().tolist()) == {1.0, 1 + 2**-7}
    moved = (stochastic > 1).double().mean().item()
    assert abs(moved - 0.05) < 5 * (0.05 * 0.95 / count) ** 0.5
    merge(TaskArithmetic(scale=0.05), vectors, tmp_path / "again.safetensors", rounding="stochastic", seed=3)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "stochastic.safetensors").read_bytes()
    # What bf16 holds exactly stays as it is.
    merge(TaskArithmetic(scale=1.0), vectors, tmp_path / "exact.safetensors", rounding="stochastic")
    assert torch.equal(load_file(tmp_path / "exact.safetensors")["norm.weight"], model["norm.weight"])


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "transforms"), EVERY_REACH)
def test_pieces_are_let_go_as_the_merge_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: MergeMethod, transforms: list[Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"layer{i}.weight": torch.randn(40, 10, generator=generator) for i in range(60)}
    vectors = TaskVectors.open(base, {name: nudged(base, seed) for seed, name in enumerate("ab")})
    alive: set[int] = set()
    lock, made, most = threading.Lock(), 0, 0
    begin = tensor_view.TensorView.__init__

    def counting(self: tensor_view.TensorView, *at: Any) -> None:
        nonlocal made, most
        begin(self, *at)
        with lock:
            made += 1
            alive.add(id(self))
            most = max(most, len(alive))
        weakref.finalize(self, alive.discard, id(self))

    monkeypatch.setattr(tensor_view.TensorView, "__init__", counting)
    merge(method, vectors, tmp_path / "out.safetensors", transforms, threads=2)
    assert made >= 60 * (len(transforms) + 1)
    assert most <= 2 * 2 * (len(transforms) + 1)  # a few for each of the two threads, never one for each tensor
