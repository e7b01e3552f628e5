from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from model_files import run_python, weights
from torch import nn

from lightning_merge.weights import MemorySource, open_weights, save_safetensors
from lightning_merge.weights import hashing as hashing_module
from lightning_merge.weights.hashing import cache_folder, fingerprint, sha256_of_file, sha256_of_source

LARGE = 1 << 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own: the user's is neither read nor written."""
    monkeypatch.setenv("LIGHTNING_MERGE_CACHE", str(tmp_path / "cache"))
    hashing_module._known.clear()
    yield tmp_path / "cache"
    hashing_module._known.clear()


def large_file(path: Path, byte: bytes = b"a") -> Path:
    path.write_bytes(byte * LARGE)
    settle(path)
    return path


def settle(path: Path) -> None:
    """Wait until the file is old enough to be remembered."""
    while time.time_ns() - path.stat().st_ctime_ns <= hashing_module.SETTLED_NS:
        time.sleep(0.01)


def forget() -> None:
    """What another process knows: nothing but what stands on the disk."""
    hashing_module._known.clear()


class Reads:
    """Counts how often a file's content is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = hashlib.sha256

        def counting(*arguments: bytes) -> object:
            self.count += 1
            return original(*arguments)

        monkeypatch.setattr(hashing_module.hashlib, "sha256", counting)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 7])
def test_a_file_has_the_sha256_that_others_compute(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "x").write_bytes(content)
    assert sha256_of_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_a_source_is_its_file_its_shards_or_its_values(tmp_path: Path) -> None:
    save_safetensors(weights(), tmp_path / "a.safetensors")
    single = open_weights(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    assert sha256_of_source(single) == hashlib.sha256(content).hexdigest()
    save_safetensors(weights(1), tmp_path / "b.safetensors")
    for order in (1, -1):  # the order in which shards are listed says nothing
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"][::order]
        several = MemorySource("x", {}, files=tuple(files))
        each = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)]
        text = f"a.safetensors:{each[0]};b.safetensors:{each[1]};"
        assert sha256_of_source(several) == hashlib.sha256(text.encode()).hexdigest()
    memory = sha256_of_source(open_weights(weights()))
    assert memory == sha256_of_source(open_weights(dict(reversed(weights().items()))))
    assert memory != sha256_of_source(open_weights({**weights(), "temperature": torch.tensor(1.0)}))
    assert memory != sha256_of_source(open_weights({**weights(), "layer.bias": weights()["layer.bias"].reshape(8, 1)}))
    assert sha256_of_source(open_weights({"a": torch.ones(2, 3).t()})) == sha256_of_source(
        open_weights({"a": torch.ones(3, 2)})
    )


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_a_file_is_read_once_by_all_processes(tmp_path: Path, reads: Reads, own_cache: Path) -> None:
    path = large_file(tmp_path / "x")
    first = sha256_of_file(path)
    assert sha256_of_file(path) == first and reads.count == 1
    forget()
    assert sha256_of_file(path) == first and reads.count == 1
    (tmp_path / "link").symlink_to(path)
    assert sha256_of_file(tmp_path / "link") == first and reads.count == 1
    assert [file.name for file in own_cache.iterdir() if not file.name.endswith(".lock")] == ["sha256.json"]
    code = "import hashlib, sys, pathlib\nhashlib.sha256 = None\nfrom lightning_merge.weights.hashing import *\n"
    done = run_python(code + "print(sha256_of_file(pathlib.Path(sys.argv[1])))", path)
    assert done.stdout.strip() == first, done.stderr


def test_any_change_is_noticed(tmp_path: Path) -> None:
    path = large_file(tmp_path / "x")
    known = {sha256_of_file(path)}

    def changed() -> None:
        forget()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert sha256_of_file(path) == digest and digest not in known
        known.add(digest)
        settle(path)
        sha256_of_file(path)

    large_file(path, b"b")  # in place, with the same size
    changed()
    times = path.stat().st_mtime_ns
    path.write_bytes(b"c" * LARGE)
    os.utime(path, ns=(times, times))  # and the same time, as copying with times does
    changed()
    other = large_file(tmp_path / "other", b"d")
    os.utime(other, ns=(times, times))
    os.replace(other, path)  # another file under the same name
    changed()
    path.write_bytes(b"c" * (LARGE + 1))
    changed()


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing_module, "SETTLED_NS", 10**15)
    path = tmp_path / "x"
    path.write_bytes(b"a" * LARGE)
    sha256_of_file(path)
    assert not hashing_module._known and not (cache_folder() / "sha256.json").exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = large_file(tmp_path / "x")
    original = hashlib.sha256

    def meddling(*arguments: bytes) -> object:
        with path.open("ab") as stream:
            stream.write(b"more")
        return original(*arguments)

    monkeypatch.setattr(hashing_module.hashlib, "sha256", meddling)
    sha256_of_file(path)
    assert not hashing_module._known


def test_small_files_are_not_worth_a_place_on_the_disk(tmp_path: Path, own_cache: Path, reads: Reads) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    settle(path)
    assert sha256_of_file(path) == sha256_of_file(path) and reads.count == 1
    assert not own_cache.exists()


def test_the_oldest_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(hashing_module, "MOST_REMEMBERED", 2)
    for name in ("a", "b", "a", "c"):
        sha256_of_file(large_file(tmp_path / name))
    kept = json.loads((own_cache / "sha256.json").read_text())
    assert [Path(place).name for place in kept] == ["a", "c"]


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "[" * 100_000, '{"PATH": 3}', '{"PATH": [1, 2, 3, 4, "x"]}', '{"PATH": []}',
        '{"PATH": [SIZE, "MTIME", 0, 0, "' + "0" * 64 + '"]}',
    ],
)  # fmt: skip
def test_a_damaged_cache_is_replaced(tmp_path: Path, own_cache: Path, content: str) -> None:
    path = large_file(tmp_path / "x")
    own_cache.mkdir()
    text = content.replace("PATH", str(path)).replace("SIZE", str(LARGE))
    (own_cache / "sha256.json").write_text(text)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256_of_file(path) == expected
    assert json.loads((own_cache / "sha256.json").read_text())[str(path)][4] == expected


def test_binary_rubbish_in_the_cache_is_no_harm(tmp_path: Path, own_cache: Path) -> None:
    own_cache.mkdir()
    (own_cache / "sha256.json").write_bytes(b"\xff\xfe\x00")
    path = large_file(tmp_path / "x")
    assert sha256_of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["a file in its place", "a folder in place of the file", "a parent that is a file"])
def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, kind: str
) -> None:
    path = large_file(tmp_path / "x")
    if kind == "a file in its place":
        own_cache.write_text("")
    elif kind == "a folder in place of the file":
        (own_cache / "sha256.json").mkdir(parents=True)
    else:
        monkeypatch.setenv("LIGHTNING_MERGE_CACHE", str(path / "cache"))
    assert sha256_of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not list(tmp_path.rglob("*.partial"))


def test_the_cache_changes_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    sha256_of_file(large_file(tmp_path / "a"))
    before = (own_cache / "sha256.json").read_bytes()

    def failing(source: Path, target: Path) -> None:
        raise OSError("the process was stopped here")

    monkeypatch.setattr(os, "replace", failing)
    second = large_file(tmp_path / "b", b"b")
    assert sha256_of_file(second) == hashlib.sha256(second.read_bytes()).hexdigest()
    assert (own_cache / "sha256.json").read_bytes() == before and not list(own_cache.glob("*.partial"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_done_without(tmp_path: Path, own_cache: Path) -> None:
    own_cache.mkdir()
    own_cache.chmod(stat.S_IREAD)
    path = large_file(tmp_path / "x")
    assert sha256_of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_threads_and_processes_do_not_lose_each_others_entries(tmp_path: Path, own_cache: Path) -> None:
    files = [tmp_path / f"{number}.bin" for number in range(24)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * LARGE)
    settle(files[-1])
    code = "import sys, pathlib\nfrom lightning_merge.weights.hashing import sha256_of_file\n"
    code += "for name in sys.argv[1:]: sha256_of_file(pathlib.Path(name))"
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(run_python, code, *files[8 * part : 8 * part + 8]) for part in (1, 2)]
        for digest in [pool.submit(sha256_of_file, file) for file in files[:8]]:
            digest.result()
        assert all(other.result().returncode == 0 for other in others)
    kept = json.loads((own_cache / "sha256.json").read_text())
    assert {place: entry[4] for place, entry in kept.items()} == {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    assert not list(own_cache.glob("*.partial"))


def test_a_cache_that_another_holds_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    import fcntl

    monkeypatch.setattr(hashing_module, "SECONDS_TO_WAIT_FOR_OTHERS", 0.05)
    path = large_file(tmp_path / "x")
    own_cache.mkdir()
    with (own_cache / "sha256.json.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert sha256_of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not (own_cache / "sha256.json").exists()


def test_the_cache_stands_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_MERGE_CACHE", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "elsewhere"
    monkeypatch.setenv("LIGHTNING_MERGE_CACHE", "")
    assert cache_folder() == tmp_path / "xdg" / "lightning_merge"
    for base in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert cache_folder() == tmp_path / ".cache" / "lightning_merge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LIGHTNING_MERGE_CACHE")
    assert cache_folder() == tmp_path / ".cache" / "lightning_merge"


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_paths_sizes_and_times_and_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors(weights(), path)
    source = open_weights(path)
    with monkeypatch.context() as patch:
        patch.setattr(source, "read", None)
        patch.setattr(hashing_module, "sha256_of_file", None)
        first = fingerprint(source)
    assert first == fingerprint(open_weights(path)) == fingerprint(open_weights(str(path)))
    os.utime(path, ns=(1, 1))
    second = fingerprint(source)
    save_safetensors(weights(), tmp_path / "b.safetensors")
    assert len({first, second, fingerprint(open_weights(tmp_path / "b.safetensors"))}) == 3
    torch.save({f"model.{name}": value for name, value in weights().items()}, tmp_path / "c.ckpt")
    prefixes = [fingerprint(open_weights(tmp_path / "c.ckpt", prefix=prefix)) for prefix in ("", "model.")]
    assert prefixes[0] != prefixes[1]


def test_in_memory_a_fingerprint_is_the_content() -> None:
    module = nn.Linear(3, 2)
    first = fingerprint(open_weights(module))
    assert first == fingerprint(open_weights({name: value.clone() for name, value in module.state_dict().items()}))
    with torch.no_grad():
        module.weight[0, 0] += 1
    assert fingerprint(open_weights(module)) != first
