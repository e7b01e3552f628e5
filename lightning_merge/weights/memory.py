"""How much memory this process has needed."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process, since it began or since :func:`reset_peak_memory`."""
    if _STATUS.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
        if found:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Begin to measure the peak anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def private_memory_bytes() -> int:
    """Return what this process holds now apart from pages of files, or its peak where the system does not tell."""
    if _STATUS.is_file():
        found = re.search(r"RssAnon:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
        if found:
            return int(found.group(1)) * 1024
    return peak_memory_bytes()
