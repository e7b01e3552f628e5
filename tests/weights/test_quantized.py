from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_files import weights
from safetensors.torch import save_file
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.weights import MemorySource, SafetensorsSource, WeightSource, open_weights, sha256_of_source
from lightning_merge.weights.quantized import (
    DequantisedSource,
    quantization_settings,
    refuse_quantized_file,
    restored,
    without_quantization,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def folder_of(path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None = None) -> WeightSource:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    config = {"model_type": "llama"} | ({"quantization_config": quantization} if quantization else {})
    (path / "config.json").write_text(json.dumps(config))
    # The files as they are, whatever open_weights makes of them.
    return SafetensorsSource(str(path), [path / "model.safetensors"], folder=path)


def codes(*shape: int, seed: int = 0, dtype: torch.dtype = E4M3) -> Tensor:
    return (30 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def scales(*shape: int, seed: int = 1) -> Tensor:
    return 0.01 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(code: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Entry by entry: the code times the scale of its block, rounded once to fp32."""
    values, factors = code.float().numpy().astype(np.float64), scale.float().numpy().astype(np.float64)
    out = np.empty(values.shape)
    for index in np.ndindex(*values.shape):
        out[index] = values[index] * factors[(*index[:-2], index[-2] // block[0], index[-1] // block[1])]
    return torch.from_numpy(out.astype(np.float32))


def assert_reads(source: WeightSource, name: str, expected: Tensor) -> None:
    """Whole, and in pieces that begin and end anywhere."""
    assert source.tensors[name].dtype == torch.float32 and source.tensors[name].shape == tuple(expected.shape)
    assert source.read(name).dtype == torch.float32 and torch.equal(source.read(name), expected)
    flat, step = expected.reshape(-1), max(1, expected.numel() // 23)
    for start in range(0, expected.numel(), step):
        for stop in range(start, expected.numel() + 1, step):
            assert torch.equal(source.read_flat(name, start, stop), flat[start:stop]), (start, stop)


# --- plain 8-bit floats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_all_codes_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    source = restored(folder_of(tmp_path, {"a.weight": every.reshape(16, 16), "a.bias": torch.ones(16)}))
    read = source.read("a.weight")
    assert torch.equal(torch.nan_to_num(read), torch.nan_to_num(every.float().reshape(16, 16)))
    if dtype == E4M3:  # checked by hand: 0 1110 111 is (1 + 7/8) 2^7, 0 0000 001 is 2^-9
        assert read[7, 7] == 240 and read[7, 14] == 448 and read[0, 1] == 2**-9 and read[8, 1] == -(2**-9)
    assert source.read("a.bias").dtype == torch.float32
    assert source.tensors["a.weight"].dtype == torch.float32


def test_what_holds_no_codes_stays_as_it_is(tmp_path: Path) -> None:
    source = folder_of(tmp_path, {**weights(), "norm.scale": torch.ones(3), "layer.weight_scale": torch.ones(1)})
    assert restored(source) is source
    fp8_config = folder_of(tmp_path / "x", weights(), {"quant_method": "fp8"})  # restored, but the config still says so
    assert restored(fp8_config) is fp8_config


# --- codes with scales -------------------------------------------------------------------------------------------


def test_blocks_as_deepseek_and_qwen_store_them(tmp_path: Path) -> None:
    tensors = {
        "a.weight": codes(10, 13), "a.weight_scale_inv": scales(3, 3),
        "b.weight": codes(4, 5, seed=2), "b.weight_scale_inv": scales(1, 1, seed=3).bfloat16(),
        "norm.weight": torch.ones(5).bfloat16(),
    }  # fmt: skip
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 6], "activation_scheme": "dynamic"}
    source = restored(folder_of(tmp_path, tensors, settings))
    assert set(source.tensors) == {"a.weight", "b.weight", "norm.weight"}
    assert_reads(source, "a.weight", by_hand(tensors["a.weight"], tensors["a.weight_scale_inv"], (4, 6)))
    assert_reads(source, "b.weight", by_hand(tensors["b.weight"], tensors["b.weight_scale_inv"], (4, 6)))
    assert source.read("norm.weight").dtype == torch.bfloat16
    assert isinstance(source, DequantisedSource) and source.numel == 10 * 13 + 4 * 5 + 5
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.read("a.weight"), source.read("a.weight"))


def test_large_tensors_are_restored_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_merge.weights.quantized.RESTORED_ENTRIES", 11)
    tensors = {"a.weight": codes(10, 13), "a.weight_scale_inv": scales(3, 3)}
    source = restored(folder_of(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [4, 6]}))
    assert_reads(source, "a.weight", by_hand(tensors["a.weight"], tensors["a.weight_scale_inv"], (4, 6)))


@pytest.mark.parametrize(
    ("shape", "scale", "block"),
    [
        ((6, 5), (), (6, 5)),
        ((6, 5), (1,), (6, 5)),
        ((6, 5), (1, 1), (6, 5)),
        ((6, 5), (6, 1), (1, 5)),
        ((6, 5), (6,), (1, 5)),
        ((5, 5), (5,), (1, 5)),  # a scale for each output, not for each input
        ((6, 5), (1, 5), (6, 1)),
        ((3, 6, 5), (3, 6, 1), (1, 5)),
        ((3, 6, 5), (3, 1, 5), (6, 1)),
        ((3, 6, 5), (3, 1, 1), (6, 5)),
        ((3, 6, 5), (3,), (6, 5)),  # a scale for each expert
        ((3, 6, 5), (), (6, 5)),
    ],
)
def test_one_scale_for_a_tensor_a_row_or_a_column(
    tmp_path: Path, shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]
) -> None:
    tensors = {"a.weight": codes(*shape), "a.weight_scale": scales(*scale)}
    source = restored(folder_of(tmp_path, tensors, {"quant_method": "fp8"}))
    height, width = shape[-2:]
    full = tensors["a.weight_scale"].reshape(
        *([1] if len(shape) == 2 else [shape[0] if tensors["a.weight_scale"].numel() > 1 else 1]),
        -(-height // block[0]),
        -(-width // block[1]),
    )
    full = full.expand(*(shape[:-2] or (1,)), *full.shape[1:])
    expected = by_hand(tensors["a.weight"].reshape(-1, height, width), full, block).reshape(shape)
    assert_reads(source, "a.weight", expected)


def test_blocks_of_experts(tmp_path: Path) -> None:
    tensors = {"experts.up": codes(2, 7, 9), "experts.up_scale_inv": scales(2, 2, 3)}
    source = restored(folder_of(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [4, 4]}))
    assert set(source.tensors) == {"experts.up"}
    assert_reads(source, "experts.up", by_hand(tensors["experts.up"], tensors["experts.up_scale_inv"], (4, 4)))


def test_scales_of_activations_are_hidden_where_weights_are_codes(tmp_path: Path) -> None:
    tensors = {
        "a.weight": codes(2, 2), "a.weight_scale": scales(1), "a.input_scale": scales(1),
        "attention.k_scale": scales(1), "other.input_scale": scales(1),
    }  # fmt: skip
    assert set(restored(folder_of(tmp_path / "x", tensors, {"quant_method": "fp8"})).tensors) == {"a.weight"}
    # Without a config only what stands beside a code is known to be such a scale.
    assert set(restored(MemorySource("x", tensors)).tensors) == {"a.weight", "attention.k_scale", "other.input_scale"}
    plain = {"a.weight": torch.ones(2, 2), "a.input_scale": scales(1)}
    assert set(restored(MemorySource("x", plain)).tensors) == set(plain)


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {**COMPRESSED, "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}},
        {**COMPRESSED, "config_groups": {}, "sparsity_config": {"format": "dense"}},
    ],
)
def test_plain_8_bit_floats_of_other_tools_are_restored(tmp_path: Path, settings: dict[str, Any]) -> None:
    tensors = {"a.weight": codes(6, 5), "a.weight_scale": scales(6, 1)}
    source = restored(folder_of(tmp_path, tensors, settings))
    assert_reads(source, "a.weight", by_hand(tensors["a.weight"], tensors["a.weight_scale"], (1, 5)))


def test_the_block_of_compressed_tensors(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 6]}
    tensors = {"a.weight": codes(10, 13), "a.weight_scale": scales(3, 3)}
    source = restored(folder_of(tmp_path, tensors, {**COMPRESSED, "config_groups": {"g": {"weights": scheme}}}))
    assert_reads(source, "a.weight", by_hand(tensors["a.weight"], tensors["a.weight_scale"], (4, 6)))


def test_restored_weights_merge_and_the_config_no_longer_says_otherwise(tmp_path: Path) -> None:
    from lightning_merge.methods import TaskArithmetic

    tensors = {"a.weight": codes(8, 8), "a.weight_scale_inv": scales(2, 2)}
    source = restored(folder_of(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [4, 4]}))
    assert source.config == {"model_type": "llama"} and source.folder == tmp_path
    base = by_hand(tensors["a.weight"], tensors["a.weight_scale_inv"], (4, 4))
    merged = TaskArithmetic(scale=0.5)(TaskVectors.open(source, {"a": {"a.weight": base + 1}}))
    assert merged["a.weight"].dtype == torch.float32
    torch.testing.assert_close(merged["a.weight"], base + 0.5)


def test_settings_are_found_and_dropped_under_all_their_names() -> None:
    config = {"a": 1, "text_config": {"b": 2, "quantization_config": {"quant_method": "fp8"}}}
    assert quantization_settings(config) == {"quant_method": "fp8"}
    assert quantization_settings({"compression_config": {"x": 1}}) == {"x": 1}
    assert quantization_settings({"quantization_config": None}) == {} == quantization_settings({})
    assert without_quantization(config) == {"a": 1, "text_config": {"b": 2}}
    assert "quantization_config" in config["text_config"]  # type: ignore[operator]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes \(4 bit\)"),
        ({"load_in_8bit": True}, r"bitsandbytes \(8 bit\)"),
        ({"quant_method": "gptq", "bits": 4}, r"GPTQ \(4 bit\)"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, r"AWQ \(4 bit\)"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "torchao", "quant_type": "int4"}, "torchao"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"modelopt \(NVFP4\)"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"compressed-tensors \(pack-quantized\)"),
        (
            {**COMPRESSED, "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}}},
            r"compressed-tensors \(float-quantized\)",
        ),
        ({**COMPRESSED, "sparsity_config": {"format": "sparse-bitmask"}}, r"compressed-tensors \(sparse-bitmask\)"),
        ({"quant_method": "something_new"}, "something_new"),
        ({"modules": 1}, "a method it does not name"),
    ],
)
def test_other_quantisations_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    source = folder_of(tmp_path / "model", {"a.weight": torch.ones(2, 2)}, settings)
    with pytest.raises(UserError, match=rf"model' is quantised by {named}, as its config.json says. .*dequantise the"):
        restored(source)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"a.weight": torch.ones(4, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(1)}, "bitsandbytes"),
        ({"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.SCB": torch.ones(4)}, "bitsandbytes"),
        ({"a.g_idx": torch.ones(4), "a.qweight": torch.ones(4, 4, dtype=torch.int32)}, "GPTQ"),
        ({"a.qweight": torch.ones(4, 4, dtype=torch.int32), "a.scales": torch.ones(4)}, "GPTQ or AWQ"),
        (
            {
                "e.up_blocks": torch.ones(2, 4, dtype=torch.uint8),
                "e.up_scales": torch.ones(2, dtype=torch.uint8),
            },
            "MXFP4",
        ),
        ({"a.weight_packed": torch.ones(4, 4, dtype=torch.int32)}, "compressed-tensors"),
        ({"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)}, "8-bit integers"),
        ({"a.weight": torch.ones(4, 2, dtype=torch.uint8), "a.weight_scale_2": torch.ones(1)}, "NVFP4"),
    ],
)
def test_names_give_a_quantisation_away(tensors: dict[str, Tensor], named: str) -> None:
    with pytest.raises(UserError, match=rf"'x' is quantised by {named}.*as its tensor 'e?\.?a?.*' shows. Expected"):
        restored(MemorySource("x", tensors))
    blocks = {"transformer.h_blocks": torch.ones(2), "blocks": torch.ones(2, dtype=torch.uint8)}
    assert set(restored(MemorySource("x", blocks)).tensors) == set(blocks)


def test_codes_are_not_taken_for_weights(tmp_path: Path) -> None:
    code = {"a.weight": codes(4, 4)}
    with pytest.raises(UserError, match=r"'a.weight' of .* states a quantisation, but the scale 'a.weight_scale' or"):
        restored(folder_of(tmp_path / "x", code, {"quant_method": "fp8"}))
    with pytest.raises(UserError, match=r"'a.weight' of 'x' is an 8-bit float, and beside it stands 'a.qscale_weight'"):
        restored(MemorySource("x", {**code, "a.qscale_weight": scales(1)}))
    assert set(restored(MemorySource("x", {**code, "norm.scale": scales(1)})).tensors) == {"a.weight", "norm.scale"}


@pytest.mark.parametrize(
    ("scale", "block"), [(scales(2, 2), None), (scales(2, 2), [3, 3]), (scales(3), [2, 2]), (codes(1), [2, 2])]
)
def test_a_scale_that_does_not_fit_is_named(tmp_path: Path, scale: Tensor, block: list[int] | None) -> None:
    if scale.dtype == E4M3:
        scale = torch.ones(1, dtype=torch.uint8)  # an exponent, perhaps
    settings = {"quant_method": "fp8"} | ({"weight_block_size": block} if block else {})
    source = folder_of(tmp_path / "x", {"a.weight": codes(7, 7), "a.weight_scale_inv": scale}, settings)
    with pytest.raises(
        UserError, match=r"'a.weight' of .* has shape \[7, 7\], its scale 'a.weight_scale_inv' shape \[.*do not fit"
    ):
        restored(source)


def test_files_of_llama_cpp_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03")
    (tmp_path / "model.bin").write_bytes(b"GGUF\x03")
    for name in ("model.gguf", "model.bin", "absent.gguf"):
        with pytest.raises(UserError, match=r"is a GGUF file, which holds a model quantised for llama.cpp. Expected"):
            refuse_quantized_file(tmp_path / name)
    (tmp_path / "model.bin").write_bytes(b"PK")
    refuse_quantized_file(tmp_path / "model.bin")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "q4.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(UserError, match=r"folder/q4.gguf' is a GGUF file"):
        refuse_quantized_file(tmp_path / "folder")
    save_file(weights(), tmp_path / "folder" / "model.safetensors")
    refuse_quantized_file(tmp_path / "folder")  # which holds the weights, too
    with pytest.raises(UserError, match=r"model.gguf' is a GGUF file"):
        open_weights(tmp_path / "model.gguf")


def test_whatever_is_opened_is_restored(tmp_path: Path) -> None:
    tensors = {"a.weight": codes(10, 13), "a.weight_scale_inv": scales(3, 3)}
    stored = folder_of(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [4, 6]})
    expected = by_hand(tensors["a.weight"], tensors["a.weight_scale_inv"], (4, 6))
    for ref in (tmp_path, tmp_path / "model.safetensors"):
        source = open_weights(ref)
        assert_reads(source, "a.weight", expected)
        assert sha256_of_source(source) == sha256_of_source(stored)


def test_a_module_is_looked_at_like_a_file() -> None:
    source = open_weights(torch.nn.Linear(2, 2))
    assert restored(source) is source
