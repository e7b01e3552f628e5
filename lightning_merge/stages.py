"""Stages of a run: done once, remembered by the hash of everything that goes into them."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from lightning_merge import __version__
from lightning_merge.errors import UserError
from lightning_merge.weights import peak_memory_bytes, reset_peak_memory
from lightning_merge.weights.folder import write_text

STAGE = "LIGHTNING_MERGE_STAGE"


class Stages:
    """Remembers which stages of a run are done, by the hash of their inputs.

    Under Lightning's ``ddp`` the command is started once more for each further process, at the first fit. Such a
    follower trains along from that stage on and writes nothing; what is done already it decides from the same records.

    Args:
        folder: Where the records stand.
        overwrite: Do every stage again.
    """

    def __init__(self, folder: Path, overwrite: bool) -> None:
        self.folder, self.overwrite = folder, overwrite
        self.peak_memory_bytes = 0
        self._waiting_for = os.environ.get(STAGE) if is_follower() else None

    @property
    def waiting(self) -> bool:
        """Whether this follower has not yet come to the stage that it was started in."""
        return self._waiting_for is not None

    def result(self, name: str) -> Any:
        """Return what a stage that is done has returned; ``None`` where it is not."""
        known = _read(self.folder / f"{name}.json")
        return None if known is None else known["result"]

    def do(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: list[Path],
        work: Callable[[], Any],
        trains: bool = False,
    ) -> Any:
        """Do a stage, unless its record says that it was done with the same inputs and its outputs are there.

        Args:
            name: The stage's name, and its record's.
            inputs: Everything that the result depends on, as plain data and dataclasses.
            outputs: Files that must exist for the stage to count as done.
            work: Does it and returns plain data.
            trains: Whether further processes may take part.

        Returns:
            What ``work`` returned, now or then; ``None`` in a follower.
        """
        # Another version may compute something else from the same inputs.
        known_inputs = json.dumps({"version": __version__, **inputs}, sort_keys=True, default=_plain)
        key = hashlib.sha256(known_inputs.encode()).hexdigest()
        record = self.folder / f"{name}.json"
        known = None if self.overwrite else _read(record)
        done = known is not None and known["key"] == key and all(path.exists() for path in outputs)
        if is_follower():
            if name == self._waiting_for:
                self._waiting_for = None
                done = False
            if trains and not done and self._waiting_for is None:
                work()
            return None
        if done and known is not None:
            say(f"{name}: done before")
            return known["result"]
        started = time.monotonic()
        record.unlink(missing_ok=True)
        if trains:
            os.environ[STAGE] = name
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory_bytes())
        reset_peak_memory()  # what a stage reports is its own peak
        result = work()
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory_bytes())
        # Task vectors refer to each other in circles, and would keep their files mapped until Python happens to look.
        gc.collect()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps({"key": key, "result": result}, default=_plain))
        say(f"{name}: {time.monotonic() - started:.1f} s")
        return json.loads(json.dumps(result, default=_plain))


def is_follower() -> bool:
    """Whether another process of the same run started this one to train with it."""
    return STAGE in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def refuse_launchers() -> None:
    """Refuse to run once for each process, as torchrun and srun would have it.

    Raises:
        UserError: One of several processes, and not started by a run.
    """
    processes = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
    if STAGE not in os.environ and processes != "1" and {"LOCAL_RANK", "SLURM_PROCID"} & set(os.environ):
        raise UserError(
            f"lightning-merge run was started as one of {processes} processes (by torchrun or srun). Start it once: "
            "finetune.trainer with devices and strategy (ddp, ddp_spawn, ddp_fork) makes the processes that train."
        )


@contextmanager
def training() -> Iterator[None]:
    """Around fits that may use several processes: leave their group and their environment variables afterwards.

    Later stages, and a later run in this process, would otherwise take this process for one of several.
    """
    import torch.distributed

    before = dict(os.environ)
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        yield
    finally:
        if not grouped and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if not is_follower():
            for name in set(os.environ) - set(before):
                del os.environ[name]
            os.environ.update(before)


def say(line: str) -> None:
    """Print one line of progress; followers are silent."""
    if not is_follower():
        print(line, file=sys.stderr, flush=True)


def _read(record: Path) -> dict[str, Any] | None:
    """Read a record; one that cannot be read counts as absent."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _plain(value: Any) -> Any:
    """Turn settings into plain data for hashing and records."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    # A repr may hold an address, and a stage would never be recognised again.
    raise TypeError(f"{type(value).__name__} cannot stand in the inputs or the result of a stage.")
