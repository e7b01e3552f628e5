"""CPU seconds of ``lightning-merge --help`` and ``methods`` above ``python -c "import torch"``; medians in one run.

python benchmarks/startup.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "--help": [str(Path(sys.executable).with_name("lightning-merge")), "--help"],
    "methods": [str(Path(sys.executable).with_name("lightning-merge")), "methods"],
    "merge --help": [str(Path(sys.executable).with_name("lightning-merge")), "merge", "--help"],
}


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one whole process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    measured: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):  # in turn, so that a drift of the machine meets all alike
        for name, command in COMMANDS.items():
            measured[name].append(cpu_seconds(command))
    floor = statistics.median(measured["import torch"])
    for name, values in measured.items():
        median = statistics.median(values)
        print(f"{name:<14} {median:5.2f} CPU s   {median - floor:+.2f} s to import torch")


if __name__ == "__main__":
    main()
