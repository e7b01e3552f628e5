"""The sha256 of files and sources, remembered on disk: hashing a model costs about as much as merging it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # sources hash themselves with this
    from lightning_merge.weights.source import WeightSource

CACHE_VARIABLE = "LIGHTNING_MERGE_CACHE"
CACHE_FILE = "sha256.json"
# A smaller file is hashed again in a new process: that takes less time than reading and writing what is remembered.
SMALLEST_REMEMBERED = 1 << 20
MOST_REMEMBERED = 4096
BLOCK = 1 << 22
# A file that was changed this recently may be changed once more without its times showing it.
SETTLED_NS = 50_000_000
SETTLED_ON_COARSE_CLOCKS_NS = 2_000_000_000
SECONDS_TO_WAIT_FOR_OTHERS = 2.0

# What identifies the content of a file without reading it.
_Identity = tuple[int, int, int, int]
_known: dict[str, tuple[_Identity, str]] = {}
_lock = threading.Lock()


def cache_folder() -> Path:
    """Return where hashes are remembered: ``LIGHTNING_MERGE_CACHE``, else ``lightning_merge`` in the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")  # the standard has relative paths ignored
    return (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "lightning_merge"


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file as hex; remembered, on disk too, while path, size, times and inode stay the same.

    A cache that is damaged or cannot be written costs time, never a wrong answer.

    Cost: one sequential read, the first time.
    """
    path = path.resolve()
    place, identity = str(path), _identity(path)
    entry = _known.get(place)
    if (entry is None or entry[0] != identity) and identity[0] >= SMALLEST_REMEMBERED:
        entry = _read_cache().get(place)
    if entry is not None and entry[0] == identity:
        _known[place] = entry
        return entry[1]
    started = time.time_ns()
    digest = hashlib.sha256()
    block = bytearray(min(BLOCK, max(1, identity[0])))
    view = memoryview(block)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(view[:count])
    result = digest.hexdigest()
    coarse = identity[1] % 1_000_000_000 == 0
    age = started - max(identity[1], identity[2])
    if _identity(path) == identity and age > (SETTLED_ON_COARSE_CLOCKS_NS if coarse else SETTLED_NS):
        _known[place] = (identity, result)
        if identity[0] >= SMALLEST_REMEMBERED:
            _remember(place, identity, result)
    return result


def sha256_of_source(source: WeightSource) -> str:
    """Return one sha256 for a source: of its file, of its shards in name order, or of names and values in memory."""
    if len(source.files) == 1:
        return sha256_of_file(source.files[0])
    digest = hashlib.sha256()
    if source.files:
        for file in sorted(source.files, key=lambda path: path.name):
            digest.update(f"{file.name}:{sha256_of_file(file)};".encode())
        return digest.hexdigest()
    for name in sorted(source.tensors):
        value = source.read(name).cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(source: WeightSource) -> str:
    """Return what identifies a source for as long as its files are left alone: cheap, for journals.

    Of files it is a hash of paths, sizes and times; the values are read only where there are no files.

    Cost: one look at each file; for a source in memory, its sha256.
    """
    digest = hashlib.sha256(f"{type(source).__name__}:{source.prefix};".encode())
    if not source.files:
        digest.update(sha256_of_source(source).encode())
    for file in sorted(source.files):
        place = file.resolve()
        digest.update(f"{place}:{_identity(place)};".encode())
    return digest.hexdigest()


def _identity(path: Path) -> _Identity:
    status = path.stat()
    # The time of the last change of status is there because the time of the content can be set back by hand.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


# --- the cache on disk -----------------------------------------------------------------------------------------------


def _read_cache() -> dict[str, tuple[_Identity, str]]:
    """Return what the disk remembers; whatever is not of the right form is as good as absent."""
    try:
        content = json.loads((cache_folder() / CACHE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {place: (tuple(entry[:4]), entry[4]) for place, entry in content.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 5
        and all(type(number) is int for number in entry[:4])
        and isinstance(entry[4], str)
        and len(entry[4]) == 64
        and all(character in "0123456789abcdef" for character in entry[4])
    )


def _remember(place: str, identity: _Identity, sha256: str) -> None:
    """Add one entry to the cache on disk, which other threads and processes may be doing, too."""
    with contextlib.suppress(OSError, RuntimeError), _alone():
        content = {other: (*entry[0], entry[1]) for other, entry in _read_cache().items() if other != place}
        content[place] = (*identity, sha256)  # the youngest stands last
        kept = list(content.items())[-MOST_REMEMBERED:]
        file = cache_folder() / CACHE_FILE
        partial = file.with_name(f"{CACHE_FILE}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            partial.write_text(json.dumps(dict(kept)), encoding="utf-8")
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep other threads and processes from writing; a process that holds the cache for long is not waited for.

    Raises:
        OSError: The cache cannot be written, or is in use.
    """
    try:
        import fcntl
    except ImportError:  # systems without it may lose an entry, no more: files are replaced whole
        with _lock:
            cache_folder().mkdir(parents=True, exist_ok=True)
            yield
        return
    with _lock:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{CACHE_FILE}.lock").open("w") as lock:
            deadline = time.monotonic() + SECONDS_TO_WAIT_FOR_OTHERS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
            yield
