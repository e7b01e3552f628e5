"""Recipes run unchanged by mergekit 0.1.5 and by us, on small Llama, GPT-2, BERT and ViT checkpoints.

(``pip install -e '.[parity]'``; skipped without mergekit.) Every shape of recipe is here. What is compared is the
weights, tensor by tensor, within the rounding of the dtype they are computed in, and the config and tokenizer of the
result. What differs, and why:

- In 16 bits: mergekit rounds the inputs to ``dtype`` and computes in it; we compute in fp32 and round once. Results
  differ by up to two units in the last place of the largest entries of a tensor.
- ViT: the names in a checkpoint differ from those of the modules of transformers 5, and mergekit then leaves every
  layer out without a word. They are compared on checkpoints with the modules' names.
- Union tokenizers: mergekit numbers new tokens in the arbitrary order of a hash table, we in that of models and ids.
  Rows are compared token by token.
- ``dare_*`` and ``della*`` draw from torch's global generator in the order of its graph, we from a counter by seed,
  model, tensor and position. They are compared where nothing is drawn, and in the mean where something is.
- ``arcee_fusion``: entries within rounding of the threshold may fall on either side.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import recipe_models as made
import torch
import yaml
from recipe_texts import RECIPES
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoTokenizer

pytest.importorskip("mergekit")
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts import multimerge

from lightning_merge.mergekit import RecipePlan, read_recipe
from lightning_merge.mergekit.models import as_bytes
from lightning_merge.weights import save_safetensors

pytestmark = pytest.mark.filterwarnings("ignore")
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of four architectures, an adapter, and Llamas whose vocabularies differ."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2", "bert", "vit"):
        made.save_family(root, kind)
    made.save_adapter(root / "lora", root / "llama" / "base")
    made.save_vocabularies(root / "words")
    return root


def theirs(text: str, out: Path, **options: Any) -> State:
    """Run a recipe by mergekit."""
    options = {"write_model_card": False, "quiet": True, "clone_tensors": True, **options}
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), MergeOptions(**options))
    return load_file(out / "model.safetensors")


def ours(plan: RecipePlan, out: Path, seed: int = 0) -> State:
    """Run a plan of ours in memory, and write what belongs into the folder."""
    merged = plan.merge(seed=seed)
    out.mkdir(parents=True)
    save_safetensors(merged, out / "model.safetensors")
    for name, content in plan.companions.items():
        (out / name).write_bytes(as_bytes(content))
    return merged


def agree(mine: State, other: State, dtype: torch.dtype = torch.float32) -> None:
    """Compare tensor by tensor, in units of the last place of each tensor's largest entry."""
    assert set(mine) == set(other)
    for name, value in mine.items():
        assert value.dtype == other[name].dtype, name
        scale = float(other[name].double().abs().max())
        units = 4 if dtype == torch.float32 else 1  # of eps, which is two units of entries just below a power of two
        atol = units * torch.finfo(dtype).eps * max(scale, 1e-3)
        torch.testing.assert_close(value.double(), other[name].double(), rtol=0, atol=atol, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, root: Path, tmp_path: Path) -> None:
    text, dtype = RECIPES[name]
    text = text.format(root=root)
    (plan,) = read_recipe(text)
    agree(ours(plan, tmp_path / "ours"), theirs(text, tmp_path / "theirs"), dtype)
    mine, other = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    for key in ("num_hidden_layers", "n_layer", "vocab_size", "model_type", "dtype", "architectures"):
        assert mine.get(key) == other.get(key), key


METHODS = {
    "linear": "weight: 0.4",
    "multislerp": "weight: 0.4",
    "karcher": "max_iter: 20",
    "task_arithmetic": "{weight: 0.4, lambda: 0.7, normalize: true}",
    "ties": "{weight: 0.4, density: 0.3, rescale: true, normalize: false}",
    "dare_linear": "{weight: 0.4}",
    "dare_ties": "{weight: 0.4}",
    "breadcrumbs": "{weight: 0.4, density: 0.7, gamma: 0.02}",
    "breadcrumbs_ties": "{weight: 0.4, density: 0.7}",
    "della": "{weight: 0.4}",
    "della_linear": "{weight: 0.4}",
    "sce": "select_topk: 0.3",
    "model_stock": "filter_wise: true",
    "ram": "epsilon: 1e-3",
    "ramplus_tl": "{r: 0.3, alpha: 0.5, epsilon: 1e-3}",
    "slerp": "t: 0.3",
    "nuslerp": "weight: 0.3",
    "nearswap": "t: 0.003",
    "arcee_fusion": "{}",
    "passthrough": "scale: 0.9",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, root: Path, tmp_path: Path) -> None:
    """Each of their twenty names, over as many models as it takes."""
    parameters = METHODS[method] if METHODS[method].startswith("{") else f"{{{METHODS[method]}}}"
    count = {"slerp": 1, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1, "nuslerp": 2}.get(method, 3)
    models = "\n".join(f"  - model: {root}/llama/{name}" for name in "abc"[:count])
    based = method not in ("linear", "karcher", "passthrough")
    base = f"base_model: {root}/llama/base\n" if based else ""
    text = f"merge_method: {method}\n{base}models:\n{models}\nparameters: {parameters}\n"
    (plan,) = read_recipe(text)
    mine, other = ours(plan, tmp_path / "ours"), theirs(text, tmp_path / "theirs")
    if method == "arcee_fusion":
        for name, value in mine.items():
            same = torch.isclose(value, other[name], rtol=0, atol=1e-6).double().mean()
            assert same >= 1 - 2 / value.numel(), name
        return
    agree(mine, other)


def test_a_base_that_linear_takes_for_a_model(root: Path, tmp_path: Path) -> None:
    text = f"merge_method: karcher\nbase_model: {root}/gpt2/base\nmodels:\n  - model: {root}/gpt2/a\n"
    (plan,) = read_recipe(text)
    mine = ours(plan, tmp_path / "ours")
    agree(mine, theirs(text, tmp_path / "theirs"))
    alone = load_file(root / "gpt2" / "a" / "model.safetensors")
    assert not torch.allclose(mine["transformer.wte.weight"], alone["transformer.wte.weight"], atol=1e-4)


def test_draws_agree_in_the_mean(root: Path, tmp_path: Path) -> None:
    """DARE keeps the share that is asked for and restores the norm of each tensor, in both."""
    text = f"""
merge_method: dare_linear
base_model: {root}/llama/base
models:
  - {{model: {root}/llama/a, parameters: {{weight: 1, density: 0.4}}}}
"""
    (plan,) = read_recipe(text)
    base, model = (load_file(root / "llama" / name / "model.safetensors") for name in ("base", "a"))
    results = ours(plan, tmp_path / "ours"), theirs(text, tmp_path / "theirs", random_seed=0)
    kept: list[float] = []
    for merged in results:
        changed = sum(int((merged[name] != base[name]).sum()) for name in base)
        kept.append(changed / sum(value.numel() for value in base.values()))
        for name in base:
            norms = [(one[name] - base[name]).abs().sum().item() for one in (merged, model)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-3), name
    deviation = math.sqrt(0.4 * 0.6 / sum(value.numel() for value in base.values()))
    assert kept == pytest.approx([0.4, 0.4], abs=4 * deviation)


VIT = """
merge_method: della_linear
base_model: {root}/{kind}/base
models:
  - {{model: {root}/{kind}/a, parameters: {{weight: [0.1, 1]}}}}
  - {{model: {root}/{kind}/b, parameters: {{weight: 0.5, density: 1}}}}
parameters: {{density: 1, lambda: 0.7}}
"""


def test_vit(root: Path, tmp_path: Path) -> None:
    """No JSON file of theirs describes a ViT: layers are found by name in both."""
    for name in ("base", "a", "b"):  # with the names of the modules, see below
        module = AutoModelForImageClassification.from_pretrained(root / "vit" / name)
        (root / "modules" / name).mkdir(parents=True)
        save_safetensors(module.state_dict(), root / "modules" / name / "model.safetensors")
        shutil.copy(root / "vit" / name / "config.json", root / "modules" / name)
    text = VIT.format(root=root, kind="modules")
    (plan,) = read_recipe(text)
    agree(ours(plan, tmp_path / "ours"), theirs(text, tmp_path / "theirs", copy_tokenizer=False))


def test_vit_as_it_is_stored(root: Path, tmp_path: Path) -> None:
    """Where the names in a checkpoint are not those of the modules, mergekit leaves all layers out; we do not."""
    text = VIT.format(root=root, kind="vit")
    (plan,) = read_recipe(text)
    mine, other = ours(plan, tmp_path / "ours"), theirs(text, tmp_path / "theirs", copy_tokenizer=False)
    layers = {name for name in mine if ".layer." in name}
    assert len(layers) == 48
    assert set(other) == set(mine) - layers
    agree({name: mine[name] for name in other}, other)
    AutoModelForImageClassification.from_pretrained(tmp_path / "ours")


def test_an_adapter_over_a_model(root: Path, tmp_path: Path) -> None:
    text = f"""
merge_method: task_arithmetic
base_model: {root}/llama/base
models:
  - {{model: {root}/llama/base+{root}/lora, parameters: {{weight: 0.8}}}}
  - {{model: {root}/llama/b, parameters: {{weight: 0.5}}}}
"""
    (plan,) = read_recipe(text)
    other = theirs(text, tmp_path / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    agree(ours(plan, tmp_path / "ours"), other)


def test_several_documents(root: Path, tmp_path: Path) -> None:
    """mergekit-multi: documents in any order, one merge in the next."""
    text = f"""
merge_method: slerp
base_model: first
models:
  - model: first
  - model: second
parameters: {{t: 0.4}}
---
name: second
merge_method: ties
base_model: {root}/llama/base
models:
  - {{model: {root}/llama/b, parameters: {{weight: 1, density: 0.5}}}}
  - {{model: first, parameters: {{weight: 0.5, density: 0.8}}}}
---
name: first
merge_method: linear
models:
  - {{model: {root}/llama/a, parameters: {{weight: 1}}}}
  - {{model: {root}/llama/c, parameters: {{weight: 2}}}}
"""
    (tmp_path / "recipe.yml").write_text(text)
    arguments = [tmp_path / "recipe.yml", "--out-path", tmp_path / "theirs", "-I", tmp_path / "between"]
    result = CliRunner().invoke(multimerge.main, [*map(str, arguments), "--no-write-model-card", "--quiet"])
    assert result.exit_code == 0, result.output
    plans = read_recipe(tmp_path / "recipe.yml")
    assert [plan.name for plan in plans] == ["first", "second", None]
    for plan in plans:
        folder = tmp_path / "ours" / (plan.name or "last")
        merged = ours(plan, folder)
        plan.planned.written(folder)
    agree(merged, load_file(tmp_path / "theirs" / "model.safetensors"))


TWO = """models:
  - {{model: {root}/words/a, parameters: {{weight: 0.6}}}}
  - {{model: {root}/words/b, parameters: {{weight: 0.4}}}}
"""
THREE = TWO + "  - {{model: {root}/words/base, parameters: {{weight: 0.2}}}}\n"
BASE = "base_model: {root}/words/base\n"
TOKENIZERS = {
    # no base: tokens that two of three models have are averaged; rows up to a multiple are means
    "union": f"merge_method: linear\n{THREE}tokenizer: {{{{source: union, pad_to_multiple_of: 8}}}}\n",
    "union over a base": f"merge_method: task_arithmetic\n{BASE}{TWO}tokenizer_source: union\n",
    "base": f"merge_method: ties\n{BASE}{TWO}tokenizer: {{{{source: base}}}}\n",
    "a model's, with rows by hand": f"merge_method: linear\n{THREE}"
    + """tokenizer:
  source: {root}/words/a
  pad_to_multiple_of: 4
  tokens:
    x1:
      source: {{kind: zero}}
    x2:
      source: {root}/words/b
      force: true
    w3:
      source: {{kind: model_token, model: {root}/words/base, token: w4}}
      force: true
    "<|im_end|>":
      source: {{kind: model_token, model: {root}/words/b, token_id: 5}}
    new:
      source: {{kind: model_token, model: {root}/words/a, token: w7}}
""",
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer(name: str, root: Path, tmp_path: Path) -> None:
    text = TOKENIZERS[name].format(root=root)
    (plan,) = read_recipe(text)
    mine, other = ours(plan, tmp_path / "ours"), theirs(text, tmp_path / "theirs")
    first, second = (AutoTokenizer.from_pretrained(tmp_path / who).get_vocab() for who in ("ours", "theirs"))
    assert set(first) == set(second)
    at = torch.tensor([[first[token], second[token]] for token in sorted(first)])
    size = mine["lm_head.weight"].shape[0]
    padding = torch.arange(len(first), size)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        mine[key] = mine[key][torch.cat([at[:, 0], padding])]
        other[key] = other[key][torch.cat([at[:, 1], padding])]
    agree(mine, other)
    sizes = [json.loads((tmp_path / who / "config.json").read_text())["vocab_size"] for who in ("ours", "theirs")]
    assert sizes == [size, size]


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "alpaca", "exaone", "auto"])
def test_chat_template(template: str, root: Path, tmp_path: Path) -> None:
    """Our templates are our own: they write a conversation as theirs do, without their stray spaces and line ends."""
    text = TOKENIZERS["union over a base"].format(root=root) + f"chat_template: {template}\n"
    (plan,) = read_recipe(text)
    ours(plan, tmp_path / "ours")
    theirs(text, tmp_path / "theirs")
    talk = [
        {"role": "system", "content": "w1"},
        {"role": "user", "content": "w2 w3"},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": "w5"},
    ]
    written = []
    for who in ("ours", "theirs"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / who)
        written.append(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    assert written[0].split() and "".join(written[0].split()) == "".join(written[1].split())
    if template in ("chatml", "auto"):
        assert written[0] == written[1]
