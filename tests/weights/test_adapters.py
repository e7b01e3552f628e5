"""An adapter over its base is the model that PEFT makes of the two."""

from __future__ import annotations

import json
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import run_python
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.methods import Dare, SimpleAverage, TaskArithmetic, Ties
from lightning_merge.weights import open_weights, sha256_of_source
from lightning_merge.weights.adapters import AdapterSource, open_adapter

peft = pytest.importorskip("peft")
from adapter_files import edit_config, edit_weights, load, lora, merged_by_peft, save_adapter, save_base  # noqa: E402

KINDS = ("llama", "gpt2", "bert", "vit")
MIXED = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value", "output.dense"],
    "vit": ["q_proj", "v_proj", "fc2", "projection"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(folder / kind, kind) for kind in KINDS}


CASES: dict[str, tuple[str, Any]] = {
    **{f"{kind}-plain": (kind, lora(target_modules=MIXED[kind])) for kind in KINDS},
    **{f"{kind}-rslora": (kind, lora(target_modules=MIXED[kind], use_rslora=True)) for kind in KINDS},
    **{f"{kind}-dora": (kind, lora(target_modules=MIXED[kind], use_dora=True)) for kind in KINDS},
    **{f"{kind}-all-linear": (kind, lora(target_modules="all-linear")) for kind in KINDS},
    "llama-regex": ("llama", lora(target_modules=r".*layers\.1\.self_attn\.(q|k)_proj")),
    "llama-layers": ("llama", lora(target_modules=["q_proj", "up_proj"], layers_to_transform=[1])),
    "llama-layer-pattern": (
        "llama",
        lora(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers"),
    ),
    "llama-patterns": (
        "llama",
        lora(
            target_modules=["q_proj", "v_proj", "up_proj"],
            rank_pattern={"v_proj": 2, r"^model\.layers\.1\.mlp\.up_proj": 4},
            alpha_pattern={"layers.0.self_attn.q_proj": 11},
            use_rslora=True,
        ),
    ),
    "llama-embedding": ("llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "llama-embedding-dora": ("llama", lora(target_modules=["embed_tokens"], use_dora=True)),
    "gpt2-tied-embedding": ("gpt2", lora(target_modules=["wte", "c_fc"])),
    "gpt2-positions": ("gpt2", lora(target_modules=["wpe"], fan_in_fan_out=True)),
    "llama-whole": ("llama", lora(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "bert-head": ("bert", lora(target_modules=["query"], modules_to_save=["classifier"])),
    "bert-head-and-biases": (
        "bert",
        lora(target_modules=["query", "dense"], modules_to_save=["classifier"], bias="all"),
    ),
    "bert-biases": ("bert", lora(target_modules=["query", "dense"], bias="lora_only")),
    "bert-bias-of-factors": ("bert", lora(target_modules=["query", "dense"], lora_bias=True)),
    "vit-convolution-dora": ("vit", lora(target_modules=["projection"], use_dora=True)),
    "llama-orthogonal": ("llama", lora(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal")),
    "llama-ia3": (
        "llama",
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "llama-ia3-square": ("llama", peft.IA3Config(target_modules=["q_proj", "o_proj"], feedforward_modules=["o_proj"])),
    "gpt2-ia3": ("gpt2", peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "bert-ia3": (
        "bert",
        peft.IA3Config(
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
            modules_to_save=["classifier"],
        ),
    ),
    "vit-ia3-convolution": ("vit", peft.IA3Config(target_modules=["projection", "fc1"], feedforward_modules=[])),
    "vit-ia3-convolution-in": (
        "vit",
        peft.IA3Config(target_modules=["projection"], feedforward_modules=["projection"]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_adapter_is_what_peft_makes_of_it(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    kind, config = CASES[case]
    adapter = save_adapter(tmp_path / "adapter", bases[kind], kind, config)
    theirs = merged_by_peft(tmp_path / "merged", bases[kind], kind, adapter)
    base = open_weights(bases[kind])
    ours = open_adapter(adapter, base)
    assert set(ours.tensors) == set(theirs.tensors)
    changed = 0
    for name in theirs.tensors:
        expected = theirs.read(name).float()
        found = ours.read(name)
        assert found.shape == ours.tensors[name].shape and found.dtype == ours.tensors[name].dtype
        torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        changed += not torch.equal(expected, base.read(name))
    assert changed
    assert set(ours.layout.updated) >= {n for n in theirs.tensors if not torch.equal(ours.read(n), base.read(n))}


def test_nothing_but_headers_is_read_when_opening_and_the_rest_is_the_base_itself(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", bases["llama"], "llama", lora(target_modules=["q_proj"]))
    base = open_weights(bases["llama"])
    read: list[str] = []
    plain = base.read
    base.read = lambda name: read.append(name) or plain(name)  # type: ignore[method-assign,func-returns-value]
    source = open_adapter(adapter, base)
    assert read == [] and source.label == str(adapter)
    untouched = "model.norm.weight"
    assert source.read(untouched).data_ptr() == plain(untouched).data_ptr()
    assert read == [untouched]
    assert torch.equal(source.read_flat(untouched, 3, 7), plain(untouched)[3:7])


def test_threads_that_ask_for_pieces_of_one_matrix_compute_it_once(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", bases["llama"], "llama", lora(target_modules="all-linear"))
    source = open_adapter(adapter, open_weights(bases["llama"]))
    computed: list[str] = []
    plain = source._compute

    def compute(name: str) -> torch.Tensor:
        computed.append(name)
        time.sleep(0.2)  # the others are asking by now
        return plain(name)

    source._compute = compute  # type: ignore[method-assign]
    name = next(iter(source.modules))
    pieces: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: pieces.append(source.read_flat(name, 0, source.tensors[name].numel)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed == [name] and len(pieces) == 8 and all(torch.equal(piece, pieces[0]) for piece in pieces)


def test_of_large_matrices_only_the_last_is_kept(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_merge.weights.adapters.CACHE_BYTES", 1)
    adapter = save_adapter(tmp_path / "a", bases["llama"], "llama", lora(target_modules=["q_proj"]))
    source = open_adapter(adapter, open_weights(bases["llama"]))
    for name in source.modules:
        source.read(name)
    assert list(source._computed) == [list(source.modules)[-1]]


def test_a_failed_computation_is_told_and_tried_again(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", bases["llama"], "llama", lora(target_modules=["q_proj"]))
    source = open_adapter(adapter, open_weights(bases["llama"]))
    plain, name = source._compute, next(iter(source.modules))

    def fails(name: str) -> torch.Tensor:
        raise OSError("the disk is gone")

    source._compute = fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the disk is gone"):
        source.read(name)
    source._compute = plain  # type: ignore[method-assign]
    assert source.read(name).isfinite().all()


def test_the_number_of_threads_changes_no_bit(bases: dict[str, Path], tmp_path: Path) -> None:
    big = {"layer.weight": torch.randn(700, 900, generator=torch.Generator().manual_seed(0))}
    save_file(big, tmp_path / "base.safetensors")
    (tmp_path / "a").mkdir()
    generator = torch.Generator().manual_seed(1)
    factors = {
        "base_model.model.layer.lora_A.weight": torch.randn(33, 900, generator=generator),
        "base_model.model.layer.lora_B.weight": torch.randn(700, 33, generator=generator),
    }
    save_file(factors, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 33, "lora_alpha": 7, "target_modules": ["layer"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(open_adapter(tmp_path / "a", tmp_path / "base.safetensors").read("layer.weight"))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


def test_small_updates_of_a_bf16_base_are_not_rounded_away(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "a", base, "llama", lora(target_modules=["q_proj"]))
    edit_weights(adapter, lambda held: {key: value.float() * 0.01 for key, value in held.items()})
    source = open_adapter(adapter, base)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert source.tensors[name].dtype == torch.float32 == source.read(name).dtype
    delta = source.read(name) - open_weights(base).read(name).float()
    expected = source.delta(name)
    assert (delta - expected).norm() < 1e-4 * expected.norm()
    rounded = source.read(name).bfloat16().float() - open_weights(base).read(name).float()
    assert (rounded - expected).norm() > 0.1 * expected.norm()
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert source.tensors[untouched].dtype == torch.bfloat16 == source.read(untouched).dtype


def test_an_fp64_base_gives_fp64_and_an_update_of_zero_every_bit_of_the_base(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = {name: value.double() for name, value in load(bases["llama"], "llama").state_dict().items()}
    adapter = save_adapter(tmp_path / "a", bases["llama"], "llama", lora(target_modules=["q_proj"]))
    name = "model.layers.0.self_attn.q_proj.weight"
    base[name][0, 0] = -0.0
    source = open_adapter(adapter, base)
    assert source.read(name).dtype == torch.float64 == source.tensors[name].dtype
    torch.testing.assert_close(source.read(name) - base[name], source.delta(name), rtol=1e-12, atol=1e-12)
    edit_weights(adapter, lambda held: {k: v * ("lora_A" in k) for k, v in held.items()})
    unchanged = open_adapter(adapter, base).read(name)
    assert torch.equal(unchanged.view(torch.int64), base[name].view(torch.int64))


def test_dora_of_a_row_of_zeros_is_a_row_of_zeros(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", bases["llama"], "llama", lora(target_modules=["q_proj"], use_dora=True))
    base = {name: value.clone() for name, value in load(bases["llama"], "llama").state_dict().items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    base[name][2] = 0.0
    edit_weights(adapter, lambda held: {k: v * ("lora_B" not in k) for k, v in held.items()})
    found = open_adapter(adapter, base).read(name)
    assert found.isfinite().all() and not found[2].any() and found[1].any()


def test_an_opened_adapter_is_a_model_for_every_method(bases: dict[str, Path], tmp_path: Path) -> None:
    """Dare by its seed, whole-model TIES and a plain mean, as over the full models; and it travels by pickle."""
    base = open_weights(bases["llama"])
    adapters, full = {}, {}
    for seed, name in enumerate(("a", "b")):
        path = save_adapter(tmp_path / name, bases["llama"], "llama", lora(target_modules=MIXED["llama"]), seed)
        adapters[name] = pickle.loads(pickle.dumps(open_adapter(path, base)))
        assert isinstance(adapters[name], AdapterSource)
        full[name] = {key: adapters[name].read(key) for key in adapters[name].tensors}
    opened = TaskVectors.open(base, adapters)
    expected = TaskVectors.open(base, full)
    for method, transforms in [
        (SimpleAverage(), []),
        (TaskArithmetic(scale={"a": 0.5, "b": -1.0}), [Dare(drop_rate=0.5)]),
        (Ties(density=0.3), []),
    ]:
        found = method(opened, transforms, seed=3)
        again = method(expected, transforms, seed=3)
        assert all(torch.equal(found[name], again[name]) for name in again)
    assert opened["a"].norm() == pytest.approx(
        sum(adapters["a"].delta(name).square().sum().item() for name in adapters["a"].modules) ** 0.5
    )


def test_the_hash_of_an_adapter_covers_its_config(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", bases["llama"], "llama", lora(target_modules=["q_proj"]))
    before = sha256_of_source(open_adapter(adapter, bases["llama"]))
    edit_config(adapter, lora_alpha=6)
    assert sha256_of_source(open_adapter(adapter, bases["llama"])) != before


def test_a_bin_file_is_read_without_running_code(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", bases["llama"], "llama", lora(target_modules=["q_proj"]))
    expected = open_adapter(adapter, bases["llama"]).read("model.layers.1.self_attn.q_proj.weight")
    held = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(held, adapter / "adapter_model.bin")
    assert torch.equal(open_adapter(adapter, bases["llama"]).read("model.layers.1.self_attn.q_proj.weight"), expected)
    torch.save({**held, "evil": nn.Linear}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="could run code"):
        open_adapter(adapter, bases["llama"])
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="lacks its weights"):
        open_adapter(adapter, bases["llama"])


def test_peft_and_transformers_are_not_needed(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", bases["vit"], "vit", lora(target_modules=MIXED["vit"]))
    code = """
import sys
sys.modules["peft"] = sys.modules["transformers"] = None
from lightning_merge.weights.adapters import open_adapter
source = open_adapter(sys.argv[1], sys.argv[2])
print(sum(source.read(name).sum().item() for name in source.tensors))
"""
    done = run_python(code, adapter, bases["vit"])
    assert done.returncode == 0, done.stderr
