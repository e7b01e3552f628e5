"""Where a merge is made: a folder beside its output, one process at a time, with a journal of what is finished.

A process that is killed leaves the folder behind; the same command finds it, sees that the journal belongs to the same
merge, and goes on. What the kernel has taken from a killed process reaches the disk; after a crash of the machine that
is not certain, so a journal of an earlier boot counts for nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from lightning_merge.errors import ResumableError, UserError

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Workplace:
    """``OUTPUT.partial/``, locked for as long as this object is entered.

    Args:
        output: What is to be made.
        identity: A digest of everything that decides the output's bytes.

    Attributes:
        files: Where the files of the output are made, under their own names.
        done: The tensors that an earlier process has finished.

    Raises:
        UserError: On entering, when another process is merging into the same place.
    """

    def __init__(self, output: Path, identity: str) -> None:
        self.output, self.identity = output, identity
        self.folder = output.with_name(output.name + ".partial")
        self.files = self.folder / "files"
        self.replaced = self.folder / "replaced"
        self.done: set[str] = set()
        # Whether all tensors are made: what is left is quickly done, and must not cost the rest if it fails.
        self.whole = False
        # What an earlier process had begun here and is of no use to this merge.
        self.discarded = 0
        self._lock = self._journal = -1
        self._made: list[Path] = []

    @property
    def lock(self) -> int:
        """The descriptor that holds the lock: whoever inherits it, holds it too."""
        return self._lock

    def __enter__(self) -> Workplace:
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "lock").is_file():
            raise UserError(
                f"'{self.folder}' is in the way: work on '{self.output.name}' happens there, and it holds something "
                "else. Expected another output, or that folder to be moved."
            )
        self._made = [parent for parent in self.output.parents if not parent.exists()]
        self._acquire()
        self.done = self._read()
        if not self.done:
            self._begin_anew()
        self._journal = os.open(self._journal_file, os.O_WRONLY | os.O_APPEND)
        return self

    @property
    def _journal_file(self) -> Path:
        return self.folder / "journal.jsonl"

    def _acquire(self) -> None:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process has just finished and removed the folder
                lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(lock).st_ino == os.stat(self.folder / "lock").st_ino:
                        self._lock = lock
                        return
                except BlockingIOError as error:
                    os.close(lock)
                    raise UserError(
                        f"Another process is merging into '{self.output}' right now. Expected another place, or "
                        "to wait for it."
                    ) from error
                except FileNotFoundError:
                    pass
                os.close(lock)

    def _read(self) -> set[str]:
        """Return the tensors finished by an earlier process that made the same merge since the machine started."""
        try:
            lines = self._journal_file.read_text(encoding="utf-8").splitlines()
            first = json.loads(lines[0])
        except (OSError, ValueError, IndexError):
            return set()
        done = set()
        for line in lines[1:]:
            with suppress(ValueError, KeyError, TypeError):  # the last line may have been cut short
                done.add(json.loads(line)["done"])
        if first != {"identity": self.identity, "boot": _boot()} or not first["boot"]:
            self.discarded = len(done)
            return set()
        return done

    def _begin_anew(self) -> None:
        self.done = set()
        shutil.rmtree(self.files, ignore_errors=True)
        self.files.mkdir()
        lines = [{"identity": self.identity, "boot": _boot()}]
        if begun(self.output):  # what stands there under the output's name is still a merge's own
            lines.append({"placing": self.output.name})
        self._journal_file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def forget(self) -> None:
        """Begin anew after all: what the journal speaks of does not stand there."""
        self._begin_anew()

    def placing(self) -> None:
        """Note that the weights are about to take the output's name."""
        os.write(self._journal, (json.dumps({"placing": self.output.name}) + "\n").encode())

    def record(self, name: str) -> None:
        """Note that a tensor is written whole."""
        os.write(self._journal, (json.dumps({"done": name}) + "\n").encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._journal >= 0:
            os.close(self._journal)
        # An interrupt by the user leaves what is finished, as a kill does; so does what fails at the very end. Another
        # error would only come again.
        keeps = kind is not None and (self.whole or not issubclass(kind, Exception) or issubclass(kind, ResumableError))
        if self.replaced.exists() and not self.output.exists():
            os.replace(self.replaced, self.output)
        if not keeps:
            _remove(self.folder)
        if kind is not None and not keeps:
            for parent in self._made:
                with suppress(OSError):
                    parent.rmdir()
        if self._lock >= 0:
            os.close(self._lock)


def begun(output: Path) -> bool:
    """Tell whether a merge was killed while its weights took this name: what stands there is then its own."""
    try:
        lines = (output.with_name(output.name + ".partial") / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return json.dumps({"placing": output.name}) in lines


def _remove(folder: Path) -> None:
    """Remove a workplace; the journal goes when the files are gone, and the lock last."""
    for name in ("files", "replaced"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("journal.jsonl", "lock"):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # whatever else stands there is not ours
        folder.rmdir()


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _boot() -> str:
    """Return what names this run of the machine, or nothing where no system tells."""
    return _BOOT.read_text(encoding="ascii").strip() if _BOOT.is_file() else ""


def remove_leftovers(output: Path) -> None:
    """Remove what killed merges into a place have left beside it, unless one is at work there."""
    folder = output.with_name(output.name + ".partial")
    if (folder / "lock").is_file() or (folder / "journal.jsonl").is_file() or _is_empty(folder):
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
