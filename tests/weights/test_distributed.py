from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from model_files import Runs, nudged, run_python, weights
from safetensors.torch import save_file
from torch import Tensor

from lightning_merge import TaskVectors
from lightning_merge.errors import UserError
from lightning_merge.weights import TensorInfo, WeightSource, open_weights, save_safetensors
from lightning_merge.weights.distributed import is_distributed, open_distributed

# What two processes save: shards of unequal and of no rows, cut along either axis, whole copies, scalars; then a
# module under FSDP2 with its optimizer, as Lightning lays it out; then parts in safetensors files.
TWO_PROCESSES = """
import sys, torch, warnings
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._composable.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
warnings.simplefilter("ignore")
folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
g = torch.Generator().manual_seed(0)
whole = {
    "rows.weight": torch.randn(7, 5, generator=g), "columns.weight": torch.randn(3, 9, 2, generator=g),
    "first.weight": torch.randn(1, 1, 9, 4, generator=g), "one.bias": torch.randn(1, generator=g),
    "half.weight": torch.randn(6, 4, generator=g).bfloat16(), "whole.bias": torch.randn(4, generator=g),
    "scale": torch.randn((), generator=g), "steps": torch.arange(5),
}
cuts = {"columns.weight": Shard(1), "first.weight": Shard(2), "whole.bias": Replicate(), "scale": Replicate()}
cut = {name: distribute_tensor(value, mesh, [cuts.get(name, Shard(0))]) for name, value in whole.items()}
dcp.save(dict(cut), checkpoint_id=folder + "/flat")
module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
torch.manual_seed(0)
for parameter in module.parameters():
    nn.init.normal_(parameter)
if rank == 0:
    torch.save({"flat": whole, "module": module.state_dict()}, folder + "/expected.pt")
fully_shard(module, mesh=mesh)
optimizer = torch.optim.Adam(module.parameters())
module(torch.ones(2, 5)).sum().backward()
lightning = {"state_dict": {"model." + name: value for name, value in module.state_dict().items()}}
optimizer.param_groups[0]["lr"] = 0.0
optimizer.step()
lightning["optimizer_0"] = optimizer.state_dict()
dcp.save(lightning, checkpoint_id=folder + "/lightning")
if hasattr(dcp, "HuggingFaceStorageWriter"):
    writer = dcp.HuggingFaceStorageWriter(folder + "/safetensors", save_distributed=True)
    dcp.save(dict(cut), storage_writer=writer)
dist.barrier()
dist.destroy_process_group()
"""


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders that two processes wrote, and what is in them."""
    folder = tmp_path_factory.mktemp("saved")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(folder), rank],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in processes:
        assert process.communicate(timeout=300)[1] == "" or process.returncode == 0, process.returncode
    return folder


def save(folder: Path, state: dict[str, Any]) -> Path:
    with quiet():
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def edit_metadata(folder: Path, edit: Any) -> Path:
    """Change what the metadata of a folder says."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))
    return folder


def assert_holds(source: WeightSource, expected: dict[str, Tensor]) -> None:
    """Names, shapes, dtypes and bits; and every piece of every tensor."""
    assert source.tensors == {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in expected.items()}
    for name, value in expected.items():
        read = source.read(name)
        assert read.shape == value.shape and torch.equal(read, value), name
        step = max(1, value.numel() // 17)
        for start in range(0, value.numel(), step):
            for stop in range(start, value.numel() + 1, step):
                piece = source.read_flat(name, start, stop)
                assert piece.dtype == value.dtype and torch.equal(piece, value.reshape(-1)[start:stop]), (start, stop)


# --- what opens -------------------------------------------------------------------------------------------------


def test_shards_of_two_processes_are_put_together(saved: Path) -> None:
    expected = torch.load(saved / "expected.pt", weights_only=True)["flat"]
    source = open_distributed(saved / "flat", "flat")
    assert len(source.files) == 3  # one of each process, and the metadata: a hash of the source covers them
    assert_holds(source, expected)
    assert_holds(pickle.loads(pickle.dumps(source)), expected)  # as it travels to a worker


def test_of_a_training_checkpoint_the_model_is_taken(saved: Path) -> None:
    expected = torch.load(saved / "expected.pt", weights_only=True)["module"]
    source = open_distributed(saved / "lightning", "lightning")
    assert_holds(source, {"model." + name: value for name, value in expected.items()})
    inner = open_distributed(saved / "lightning", "lightning", prefix="model.")
    assert_holds(inner, expected)
    assert inner.prefix == "model." and inner.folder is None
    with pytest.raises(UserError, match=r"No tensor of 'x' begins with the prefix 'net.'. Its first is 'model.0."):
        open_distributed(saved / "lightning", "x", prefix="net.")


def test_a_folder_opens_like_any_other_reference(saved: Path) -> None:
    expected = torch.load(saved / "expected.pt", weights_only=True)
    assert_holds(open_weights(saved / "flat"), expected["flat"])
    assert_holds(open_weights(str(saved / "lightning"), prefix="model."), expected["module"])


def test_parts_in_safetensors_files_are_put_together(saved: Path) -> None:
    if not (saved / "safetensors").is_dir():
        pytest.skip("this torch has no HuggingFaceStorageWriter")
    assert is_distributed(saved / "safetensors") and len(list((saved / "safetensors").iterdir())) == 2
    expected = torch.load(saved / "expected.pt", weights_only=True)["flat"]
    assert_holds(open_distributed(saved / "safetensors", "parts"), expected)


def test_a_grid_of_parts_in_three_axes_is_put_together(tmp_path: Path) -> None:
    value = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    count = 0
    for rows in ((0, 2), (2, 5)):
        for columns in ((0, 1), (1, 6)):
            for depths in ((0, 3), (3, 4), (4, 7)):
                part = value[slice(*rows), slice(*columns), slice(*depths)].contiguous()
                info = {"x": {"saved_offsets": [rows[0], columns[0], depths[0]]}}
                count += 1
                save_file({"x": part}, tmp_path / f"{count}.safetensors", {"DCP_SHARDING_INFO": json.dumps(info)})
    assert_holds(open_distributed(tmp_path, "grid"), {"x": value})
    (tmp_path / "5.safetensors").unlink()
    with pytest.raises(UserError, match=r"The 11 shards of tensor 'x' in 'grid' do not make up its shape \[5, 6, 7\]"):
        open_distributed(tmp_path, "grid")


def test_what_is_no_sharded_folder_is_left_to_others(tmp_path: Path) -> None:
    assert not is_distributed(tmp_path)
    save_safetensors(weights(), tmp_path / "model.safetensors")
    assert not is_distributed(tmp_path)
    if hasattr(dcp, "HuggingFaceStorageWriter"):
        with quiet():  # one process: an ordinary Hugging Face folder with an index
            dcp.save(weights(), storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "whole")), no_dist=True)
        assert not is_distributed(tmp_path / "whole")
        assert_holds(open_weights(tmp_path / "whole"), weights())


@pytest.mark.parametrize(
    ("state", "names"),
    [
        # A dict of names, whose first word says nothing: nothing is dropped from them.
        ({"model.a": torch.ones(2), "lm_head.weight": torch.ones(1)}, {"model.a", "lm_head.weight"}),
        ({"model": {"model.a": torch.ones(2)}, "optim": {"state": {"a": torch.ones(2)}}}, {"model.a"}),
        ({"state_dict": {"a": torch.ones(2)}, "model": {"b": torch.ones(2)}}, {"a"}),
        (
            {
                "a.weight": torch.ones(2),
                "optimizer.state.a": torch.ones(1),
                "lr_schedulers_0": {"last": torch.ones(1)},
                "loops": {"fit": {"x": torch.ones(1)}},
                "optimal.weight": torch.ones(2),
                "step": 3,
            },
            {"a.weight", "optimal.weight"},
        ),
        ({"model": torch.ones(2), "b": torch.ones(1)}, {"model", "b"}),
        ({"encoder": {"a": torch.ones(2)}, "decoder": {"a": torch.ones(2)}}, {"encoder.a", "decoder.a"}),
    ],
)
def test_names_are_those_of_the_model(tmp_path: Path, state: dict[str, Any], names: set[str]) -> None:
    assert set(open_distributed(save(tmp_path / "x", state), "x").tensors) == names


def test_without_a_record_of_the_nesting_lightnings_own_name_is_dropped(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", {"state_dict": {"a.b": torch.ones(2)}, "optimizer_0": {"x": torch.ones(2)}})
    edit_metadata(folder, lambda metadata: setattr(metadata, "planner_data", None))
    assert set(open_distributed(folder, "x").tensors) == {"a.b"}


def test_values_of_any_layout_and_dtype_come_back(tmp_path: Path) -> None:
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    state = {
        "transposed": matrix.t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "part": matrix[2:4],
        "float8": matrix.to(torch.float8_e4m3fn),
        "flags": matrix > 0,
        "empty": torch.zeros(0, 3),
        "numbers": torch.arange(7, dtype=torch.uint8),
    }
    source = open_distributed(save(tmp_path / "x", dict(state)), "x")
    assert source.tensors["float8"].dtype == torch.float8_e4m3fn
    for name, value in state.items():
        assert torch.equal(source.read(name).float(), value.float()) and source.read(name).dtype == value.dtype, name
        flat = source.read_flat(name, 1, value.numel())
        assert torch.equal(flat.float(), value.reshape(-1)[1:].float()), name


def test_a_record_that_holds_more_than_its_shard_is_read_where_the_shard_begins(tmp_path: Path) -> None:
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    folder = save(tmp_path / "x", {"a": matrix[2:4].clone()})
    torch.save(matrix[2:4], folder / "__0_0.distcp")  # with all of the matrix

    def announce(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, (folder / "__0_0.distcp").stat().st_size

    assert_holds(open_distributed(edit_metadata(folder, announce), "x"), {"a": matrix[2:4]})


def test_only_the_files_a_piece_lies_in_are_read(saved: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(saved / "flat", folder)
    source = open_distributed(folder, "copy")
    holder = {shard.offsets: shard.file for shard in source._shards["rows.weight"]}  # type: ignore[attr-defined]
    holder[4, 0].unlink()
    expected = torch.load(saved / "expected.pt", weights_only=True)["flat"]["rows.weight"]
    assert torch.equal(source.read_flat("rows.weight", 3, 20), expected.reshape(-1)[3:20])
    with pytest.raises(UserError, match=r"Tensor 'rows.weight' cannot be read from"):
        source.read_flat("rows.weight", 3, 21)


def test_a_checkpoint_merges_like_the_file_it_was_made_from(tmp_path: Path) -> None:
    from lightning_merge.methods import TaskArithmetic

    base, tuned = weights(), nudged(weights(), 1)
    save(tmp_path / "tuned", {"state_dict": dict(tuned), "optimizer_0": {"x": torch.ones(2)}})
    (tmp_path / "tuned" / "config.json").write_text('{"model_type": "bert"}')
    source = open_distributed(tmp_path / "tuned", "tuned")
    assert source.config == {"model_type": "bert"} and source.folder == tmp_path / "tuned"
    merged = TaskArithmetic(scale=0.5)(TaskVectors.open(base, {"a": source}))
    expected = TaskArithmetic(scale=0.5)(TaskVectors.open(base, {"a": tuned}))
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


def test_opening_needs_neither_a_process_group_nor_torchs_reader(saved: Path) -> None:
    code = """
import sys
from pathlib import Path
from lightning_merge.weights.distributed import open_distributed
source = open_distributed(Path(sys.argv[1]), "x")
print(source.read("rows.weight").shape, [m for m in sys.modules if m.startswith("torch.distributed.checkpoint")])
"""
    done = run_python(code, saved / "flat")
    assert done.stdout == "torch.Size([7, 5]) []\n", done.stderr


@pytest.mark.slow
def test_what_lightnings_trainer_saves_opens(tmp_path: Path) -> None:
    code = """
import sys, torch, lightning as L
from torch import nn
from torch.distributed._composable.fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from lightning.pytorch.strategies import ModelParallelStrategy

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.head = nn.Sequential(nn.Linear(5, 7), nn.GELU()), nn.Linear(7, 1)
    def configure_model(self):
        for part in (self.model, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])
    def training_step(self, batch, _):
        return self.head(self.model(batch[0])).square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

if __name__ == "__main__":
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    module, rows = Module(), torch.utils.data.TensorDataset(torch.randn(8, 5))
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    trainer.save_checkpoint(sys.argv[1] + "/saved")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    expected = get_model_state_dict(module, options=options)
    if trainer.global_rank == 0:
        torch.save(expected, sys.argv[1] + "/expected.pt")
"""
    (tmp_path / "train.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "train.py"), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "saved" / "meta.pt").is_file() and is_distributed(tmp_path / "saved")
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert_holds(open_distributed(tmp_path / "saved", "saved"), dict(expected))


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["alone", "planner_data", "storage_data", "properties"])
def test_metadata_with_code_in_it_is_refused_by_name_and_does_not_run(tmp_path: Path, where: str) -> None:
    folder, witness = save(tmp_path / "x", weights()), tmp_path / "witness"
    if where == "alone":
        (folder / ".metadata").write_bytes(pickle.dumps(Runs(witness)))
    elif where == "properties":
        edit_metadata(
            folder,
            lambda metadata: setattr(metadata.state_dict_metadata["layer.weight"].properties, "layout", Runs(witness)),
        )
    else:
        edit_metadata(folder, lambda metadata: getattr(metadata, where).update(code=Runs(witness)))
    with pytest.raises(UserError, match=r"metadata' holds an object of posix.system, and rebuilding it could run code"):
        open_distributed(folder, "x")
    assert not witness.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__class__'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch.distributed.checkpoint.metadata\nos.system\n(S'true'\ntR.",
        b"\x80\x04\x8c\x26torch.distributed.checkpoint.metadata\x8c\x09os.system\x93.",
        b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        b"ccollections\nnamedtuple\n.",
    ],
)
def test_no_other_function_can_be_reached(tmp_path: Path, code: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(UserError, match=r"could run code|cannot be read as metadata"):
        open_distributed(tmp_path, "x")


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", pickle.dumps({"a": 1}), pickle.dumps(torch.Size([2])), b"\x80\x04N.", b"\x80\x04Q."]
)
def test_other_metadata_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"/.metadata' cannot be read as metadata \(.*Expected the whole folder"):
        open_distributed(tmp_path, "x")


def test_records_with_code_in_them_are_not_run(tmp_path: Path) -> None:
    folder, witness = save(tmp_path / "x", {"a": torch.ones(3)}), tmp_path / "witness"
    torch.save(Runs(witness), folder / "__0_0.distcp")

    def announce(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, (folder / "__0_0.distcp").stat().st_size

    edit_metadata(folder, announce)
    with pytest.raises(UserError, match=r"Tensor 'a' cannot be read from '.*__0_0.distcp'"):
        open_distributed(folder, "x").read("a")
    assert not witness.exists()


def test_missing_truncated_and_unfinished_folders_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", weights())
    data = folder / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"__0_0.distcp' is truncated: tensor '\w+.*' ends at byte \d+, the file holds"):
        open_distributed(folder, "x")
    data.unlink()
    with pytest.raises(UserError, match=r"'x' lacks the file '__0_0.distcp', which holds a part of '"):
        open_distributed(folder, "x")
    data.write_bytes(whole)
    (folder / ".metadata").unlink()
    assert is_distributed(folder)
    with pytest.raises(UserError, match=r"'x' lacks '.metadata': its save was not finished"):
        open_distributed(folder, "x")
    with pytest.raises(UserError, match=r"'y' holds no tensors of a model"):
        open_distributed(save(tmp_path / "y", {"optimizer": {"a": torch.ones(2)}}), "y")


def test_shards_that_leave_a_gap_or_overlap_are_named(saved: Path, tmp_path: Path) -> None:
    import shutil

    for number, edit in enumerate(
        [
            lambda chunks: chunks.pop(),
            lambda chunks: chunks.append(chunks[0]),
            lambda chunks: chunks.__setitem__(1, chunks[0]),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(saved / "flat", folder)
        edit_metadata(folder, lambda metadata, edit=edit: edit(metadata.state_dict_metadata["rows.weight"].chunks))
        with pytest.raises(UserError, match=r"shards of tensor 'rows.weight' in 'x' do not make up its shape \[7, 5\]"):
            open_distributed(folder, "x")


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "inner/../../secret"])
def test_shards_outside_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    folder = save(tmp_path / "x", {"a": torch.ones(3)})
    (folder / "__0_0.distcp").rename(tmp_path / "secret")

    def move(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = place

    with pytest.raises(UserError, match=rf"places the tensor 'a' in '{place}', outside its folder"):
        open_distributed(edit_metadata(folder, move), "x")


def test_compressed_shards_are_refused_by_name(tmp_path: Path) -> None:
    def compress(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["stream.zstd/1"]

    folder = edit_metadata(save(tmp_path / "x", {"a": torch.ones(3)}), compress)
    with pytest.raises(UserError, match=r"Tensor 'a' in .* was stored through stream.zstd/1. Expected shards as they"):
        open_distributed(folder, "x")
