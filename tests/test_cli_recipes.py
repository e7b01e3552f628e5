"""Recipes of mergekit from the command line: files in, a model that loads out, and the same again from merge.yaml."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from recipe_models import save_adapter, save_family
from safetensors.torch import load_file

from lightning_merge.cli import main
from lightning_merge.mergekit.plan import read_recipe

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama with fine-tunes, and the current folder beside them, as recipes are usually run."""
    save_family(tmp_path, "llama", count=2)
    folder = tmp_path / "llama"
    for old, new in (("a", "ft1"), ("b", "ft2")):
        (folder / old).rename(folder / new)
    monkeypatch.chdir(folder)
    return folder


def recipe(family: Path, text: str, name: str = "recipe.yml") -> str:
    (family / name).write_text(text, encoding="utf-8")
    return name


TIES = """
models:
  - model: ft1
    parameters: {weight: [0.2, 0.8], density: 0.5}
  - model: ft2
    parameters: {weight: 0.5, density: 0.3}
merge_method: ties
base_model: base
dtype: float32
"""
STACKED = """
slices:
  - sources: [{model: ft1, layer_range: [0, 3]}]
  - sources: [{model: ft2, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float32
"""
TWO = """
name: half
models:
  - {model: ft1, parameters: {weight: 0.5}}
  - {model: ft2, parameters: {weight: 0.5}}
merge_method: linear
dtype: float32
---
models: [{model: half}]
merge_method: slerp
base_model: base
parameters: {t: 0.5}
dtype: float32
"""


@pytest.mark.parametrize("text", [TIES, STACKED, TWO], ids=["ties", "stacked", "two-documents"])
def test_a_recipe_makes_a_model_that_loads(family: Path, text: str, capsys: Capture) -> None:
    from transformers import AutoModelForCausalLM

    name = recipe(family, text)
    if text is not TWO:
        expected = read_recipe(name)[0].merge()
    assert main(["merge", "--recipe", name, "--output", "out", "--num_workers", "1"]) == 0
    assert "Merged in" in capsys.readouterr().out
    found = load_file("out/model.safetensors")
    if text is not TWO:
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.num_hidden_layers == (6 if text is STACKED else 4)
    assert {path.name for path in Path().iterdir() if path.name.startswith("out")} == {"out"}
    assert Path("out/mergekit_config.yml").read_text().strip() in text.strip()
    # The same again is there already; the recipe that the output carries makes the same bytes elsewhere.
    assert main(["merge", "--recipe", name, "--output", "out"]) == 0
    assert "already holds this very merge" in capsys.readouterr().out
    assert main(["merge", "--config", "out/merge.yaml", "--output", "again"]) == 0
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def test_documents_that_all_have_names_stand_side_by_side(family: Path) -> None:
    text = TWO.replace("---\n", "---\nname: whole\n")
    assert main(["merge", "--recipe", recipe(family, text), "--output", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["half", "whole"]
    assert load_file("out/whole/model.safetensors").keys() == load_file("base/model.safetensors").keys()


def test_an_adapter_beside_a_model(family: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save_adapter(family / "lora", family / "base")
    text = "models: [{model: base+lora}]\nmerge_method: passthrough\ndtype: float32\n"
    assert main(["merge", "--recipe", recipe(family, text), "--output", "out"]) == 0
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "lora").merge_and_unload()
    found = load_file("out/model.safetensors")
    for key, value in theirs.state_dict().items():
        if key in found:
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)


def test_a_dry_run_of_a_recipe_writes_nothing(family: Path, capsys: Capture) -> None:
    before = sorted(family.rglob("*"))
    assert main(["merge", "--recipe", recipe(family, TIES, "r.yml"), "--output", "out", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "Ties measures" in out and "peak memory about" in out and "Nothing was written" in out
    assert sorted(family.rglob("*")) == sorted([*before, family / "r.yml"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TIES.replace("density", "densty"), "Did you mean 'density'?"),
        (TIES.replace("merge_method: ties", "merge_method: tise"), "Did you mean 'ties'?"),
        (TIES.replace("dtype: float32", "dtyppe: float32"), "Did you mean 'dtype'?"),
        (STACKED.replace("[1, 4]", "[1, 9]"), "4 layers"),
        (TIES.replace("model: ft2", "model: ft9"), "ft9"),
    ],
)
def test_what_a_recipe_gets_wrong_is_said_before_any_work(family: Path, text: str, said: str, capsys: Capture) -> None:
    name = recipe(family, text)
    before = sorted(family.rglob("*"))
    assert main(["merge", "--recipe", name, "--output", "out"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert sorted(family.rglob("*")) == before


def test_a_recipe_makes_a_folder_and_its_record_names_it(family: Path, capsys: Capture) -> None:
    name = recipe(family, TIES)
    assert main(["merge", "--recipe", name, "--output", "out.safetensors"]) == 2
    assert "A recipe makes a model's folder" in capsys.readouterr().err
    assert main(["merge", "--recipe", name, "--output", "out"]) == 0
    record = json.loads(Path("out/merge.json").read_text())
    assert {source["reference"] for source in record["sources"].values()} == {"base", "ft1", "ft2"}
    written = yaml.safe_load(Path("out/merge.yaml").read_text())
    assert yaml.safe_load(written["recipe"])["merge_method"] == "ties"
    card = Path("out/README.md").read_text()
    assert "0.2 to 0.8, by tensor" in card and "merge_method: ties" in card
