from __future__ import annotations

import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from model_files import Runs, nudged, save_bert, tiny_bert, tiny_gpt2, weights
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_merge.errors import UserError
from lightning_merge.weights import TensorInfo, WeightSource, open_weights, sha256_of_file, sha256_of_source
from lightning_merge.weights import opening as source_module


def assert_holds(source: WeightSource, expected: dict[str, torch.Tensor]) -> None:
    """Names, shapes, dtypes and bits."""
    assert source.tensors == {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in expected.items()}
    for name, value in expected.items():
        assert torch.equal(source.read(name), value)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(weights(), path)
    return path


# --- what opens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shard", "files"), [("1GB", 1), ("20KB", 4)])
def test_a_folder_opens_in_one_piece_or_in_shards(tmp_path: Path, shard: str, files: int) -> None:
    folder = save_bert(tmp_path / "bert", shard=shard)
    source = open_weights(folder)
    assert len(source.files) >= files and source.folder == folder
    assert source.config is not None and source.config["model_type"] == "bert"
    expected = tiny_bert().state_dict()
    stored = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    assert_holds(source, stored)
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    assert source.numel == sum(value.numel() for value in stored.values()) and source.nbytes == 4 * source.numel


def test_a_file_opens_and_knows_the_folder_of_a_model(tmp_path: Path, single: Path) -> None:
    assert_holds(open_weights(single), weights())
    assert_holds(open_weights(str(single)), weights())
    assert open_weights(single).folder is None and open_weights(single).config is None
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert open_weights(single).folder == tmp_path


def test_a_lone_safetensors_file_in_a_folder_is_its_model(tmp_path: Path, single: Path) -> None:
    single.rename(tmp_path / "weights.safetensors")
    assert_holds(open_weights(tmp_path), weights())


def test_a_module_opens_without_a_copy_and_tells_its_buffers() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    source = open_weights(module)
    assert_holds(source, module.state_dict())
    assert source.buffers == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert source.read("0.weight").data_ptr() == module[0].weight.data_ptr()
    assert not source.read("0.weight").requires_grad
    assert open_weights(source) is source


def test_a_state_dict_opens_and_what_is_no_tensor_is_left_out() -> None:
    assert_holds(open_weights({**weights(), "scaler._extra_state": {"step": 3}}), weights())


def test_a_checkpoint_of_lightning_opens_with_its_prefix(tmp_path: Path) -> None:
    import lightning as L

    class Wrapper(L.LightningModule):
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Sequential(nn.Linear(width, 3), nn.BatchNorm1d(3))
            self.head = nn.Linear(3, 2)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.head(self.model(batch[0])).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    rows = torch.utils.data.TensorDataset(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="own")],
    )  # fmt: skip
    module = Wrapper()
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    path = tmp_path / "own.ckpt"
    assert_holds(open_weights(path), module.state_dict())
    inner = open_weights(path, prefix="model.")
    assert_holds(inner, module.model.state_dict())
    assert inner.prefix == "model." and inner.files == (path,)
    with pytest.raises(
        UserError, match=r"No tensor of '.*own.ckpt' begins with the prefix 'net.'. Its first is 'model"
    ):
        open_weights(path, prefix="net.")


@pytest.mark.parametrize("zipped", [True, False])
def test_other_files_of_torch_save_open(tmp_path: Path, zipped: bool) -> None:
    torch.save(weights(), tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert_holds(open_weights(tmp_path / "model.pt"), weights())


def test_a_folder_of_an_installed_package_opens_without_importing_it(
    tmp_path: Path, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "holds_weights"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    single.rename(package / "model" / "model.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert_holds(open_weights("package:holds_weights/model"), weights())
    assert "holds_weights" not in sys.modules
    with pytest.raises(UserError, match="The package 'holds_weights' holds no 'absent'"):
        open_weights("package:holds_weights/absent")
    with pytest.raises(UserError, match=r"'absent_package', which is not installed. Try: pip install absent-package"):
        open_weights("package:absent_package/model")
    with pytest.raises(UserError, match="names no top-level package"):
        open_weights("package:holds_weights.model/model")


def test_a_reference_to_the_hub_fetches_weights_and_never_code(
    tmp_path: Path, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot(repository: str, revision: str, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        if repository == "owner/absent":
            raise OSError("offline")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert_holds(open_weights("owner/name@v1.0"), weights())
    assert asked["repository"] == "owner/name" and asked["revision"] == "v1.0"
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".ckpt", ".pkl", "*")) for pattern in asked["patterns"])
    with pytest.raises(UserError, match="'owner/absent@main' could not be fetched from the Hub: offline"):
        open_weights("owner/absent@main")


# --- laziness ---------------------------------------------------------------------------------------------------


def test_opening_reads_headers_only(tmp_path: Path, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = single.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    single.write_bytes(raw[:start] + b"\xff" * (len(raw) - start))  # every value is now NaN

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the values were touched")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "safe_open", refuse)
        source = open_weights(single)
        assert source.tensors["layer.weight"] == TensorInfo((8, 16), torch.float32)
        assert source.numel == 700 * 400 + 8 * 16 + 8 + 1 + 4 and source.stored_name("layer.bias") == "layer.bias"
        with pytest.raises(AssertionError):
            source.read("layer.bias")
    assert source.read("layer.bias").isnan().all()


def test_a_checkpoint_is_memory_mapped_and_never_unpickled_freely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": weights()}, tmp_path / "model.ckpt")
    load, options = torch.load, {}

    def spy(*arguments: Any, **given: Any) -> Any:
        options.update(given)
        return load(*arguments, **given)

    monkeypatch.setattr(source_module.torch, "load", spy)
    assert_holds(open_weights(tmp_path / "model.ckpt"), weights())
    assert options["mmap"] is True and options["weights_only"] is True


def test_an_open_source_travels_to_another_process(single: Path) -> None:
    source = open_weights(single)
    source.read("layer.bias")
    assert_holds(pickle.loads(pickle.dumps(source)), weights())


# --- tied weights -----------------------------------------------------------------------------------------------


def test_tied_weights_are_one_tensor_with_two_names(tmp_path: Path) -> None:
    model = tiny_gpt2()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "gpt2.ckpt")
    for source in (open_weights(model), open_weights(model.state_dict()), open_weights(tmp_path / "gpt2.ckpt")):
        assert source.aliases == {"lm_head.weight": "transformer.wte.weight"}
        assert "lm_head.weight" not in source.tensors
        assert source.stored_name("lm_head.weight") == "transformer.wte.weight"
        assert torch.equal(source.read("lm_head.weight"), model.lm_head.weight)
        assert source.numel == sum(parameter.numel() for parameter in model.parameters())


def test_equal_shapes_and_views_are_not_taken_for_tied() -> None:
    whole = torch.zeros(4, 4)
    state_dict = {
        "a": whole, "half": whole[:2], "transposed": whole[:, :2].T, "twin": torch.zeros(4, 4),
        "empty": torch.empty(0), "nothing": torch.empty(0),
    }  # fmt: skip
    assert open_weights(state_dict).aliases == {}


# --- what does not open -----------------------------------------------------------------------------------------


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return rewrite


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        raw = path.read_bytes()
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8:start])
        text = json.dumps(change(header) or header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[start:])

    return rewrite


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged(lambda raw: raw[:-5]), r"is truncated: its header announces \d+ bytes, the file holds \d+"),
        (damaged(lambda raw: raw[:100]), "is truncated or not a safetensors file: its header should take"),
        (damaged(lambda raw: b""), "is not a safetensors file: its first 8 bytes state no header length"),
        (damaged(lambda raw: b"no weights at all" * 100), "is not a safetensors file"),
        (damaged(lambda raw: pickle.dumps({"a": 1})), "not a safetensors file"),
        (damaged(lambda raw: raw[:8] + b"[" + raw[9:]), "is not a safetensors file: its header cannot be read"),
        (with_header(lambda header: [header]), "is not a safetensors file: its header cannot be read"),
        (with_header(lambda header: header["layer.bias"].update(shape=[9])), "takes 32 bytes .* needs 36"),
        (with_header(lambda header: header["layer.bias"].update(dtype="F3")), "'layer.bias' .* has dtype F3"),
        (with_header(lambda header: header["layer.bias"].pop("shape") and None), "header cannot be read .*shape"),
        (Path.unlink, "Nothing is at '.*model.safetensors'. Accepted: a Hugging Face folder"),
    ],
)  # fmt: skip
def test_a_damaged_safetensors_file_is_refused_by_name(
    single: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(single)
    with pytest.raises(UserError, match=message) as caught:
        open_weights(single)
    assert str(single) in str(caught.value)


def test_damage_that_only_reading_shows_is_refused_too(single: Path) -> None:
    # Two tensors that overlap pass a look at each alone; the format forbids them.
    with_header(lambda header: header["layer.bias"].update(data_offsets=[0, 32]))(single)
    with pytest.raises(UserError, match=r"Tensor 'layer.bias' cannot be read from '.*model.safetensors'"):
        open_weights(single).read("layer.bias")


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin"])
@pytest.mark.parametrize("how", ["zip", "legacy", "raw"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, how: str, suffix: str) -> None:
    path, witness = tmp_path / f"model.{suffix}", tmp_path / "ran"
    content = {"state_dict": {"w": torch.zeros(2)}, "callback": Runs(witness)}
    if how == "raw":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(
        UserError, match=r"holds an object.*could run code, so it is not loaded. Expected plain"
    ) as caught:
        open_weights(path)
    assert not witness.exists() and str(path) in str(caught.value)
    assert how == "raw" or "system" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty. Expected a checkpoint with a state_dict"),
        (b"hello world " * 50, r"cannot be read as a checkpoint \(it was not written by torch.save\)"),
        (b"P" * 100, "cannot be read as a checkpoint"),
        ([1, 2], "holds a list. Expected a checkpoint or a state dict"),
        ({"epoch": 3}, "holds no tensors. Expected a checkpoint with a state_dict"),
    ],
)
def test_a_checkpoint_without_weights_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=message):
        open_weights(path)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights()}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        open_weights(path)


def test_shards_must_be_complete(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert", shard="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["pooler.extra"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"lacks the tensor 'pooler.extra' \(1 missing\), which its index places in 'model-"
    ):
        open_weights(folder)
    del content["weight_map"]["pooler.extra"]
    index.write_text(json.dumps(content))
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match=r"lacks the shard 'model-00002-of.*', in which its index"):
        open_weights(folder)
    for text in ("[]", '{"weight_map": 3}', "{", "{}"):
        index.write_text(text)
        with pytest.raises(UserError, match="is no index of shards"):
            open_weights(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.zeros(2)}, tmp_path / name)
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"Tensor 'w' stands in two shards of '.*': a.safetensors and b.safetensors"):
        open_weights(tmp_path)


def test_what_holds_no_weights_is_refused_with_what_is_accepted(tmp_path: Path, single: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for ref, message in [
        (tmp_path / "notes.txt", "has the unknown suffix '.txt'. Accepted: "),
        (tmp_path / "absent", "Nothing is at '.*absent'. Accepted: "),
        (3, "An object of type int holds no weights that can be opened. Accepted: "),
        ("", "'' names no model. Accepted: "),
    ]:
        with pytest.raises(UserError, match=message):
            open_weights(ref)
    single.unlink()
    with pytest.raises(UserError, match=r"holds no model.safetensors \(it holds notes.txt\)"):
        open_weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a PEFT adapter, not a full model. Expected it among the --models"):
        open_weights(tmp_path)


def test_a_broken_config_is_refused_by_name(tmp_path: Path, single: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json' is no JSON"):
        _ = open_weights(tmp_path).config


# --- hashes -----------------------------------------------------------------------------------------------------


def test_a_hash_follows_the_bytes(tmp_path: Path, single: Path) -> None:
    import hashlib

    assert sha256_of_file(single) == hashlib.sha256(single.read_bytes()).hexdigest()
    before = sha256_of_source(open_weights(single))
    save_file(nudged(weights(), 5), single)
    assert sha256_of_source(open_weights(single)) != before


def test_a_hash_in_memory_follows_names_values_and_dtypes_but_not_their_order() -> None:
    tensors = weights()
    one = sha256_of_source(open_weights(tensors))
    assert one == sha256_of_source(open_weights(dict(reversed(tensors.items()))))
    assert one != sha256_of_source(open_weights({**tensors, "temperature": tensors["temperature"] + 1}))
    assert one != sha256_of_source(open_weights({**tensors, "layer.bias": tensors["layer.bias"].reshape(2, 4)}))


def test_a_hash_of_shards_does_not_depend_on_where_they_stand(tmp_path: Path) -> None:
    first, second = (sha256_of_source(open_weights(save_bert(tmp_path / name, shard="20KB"))) for name in "ab")
    assert first == second
