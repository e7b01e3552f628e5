"""Carry out a planned merge: in this process, or in several that own disjoint tensors and give the same bytes.

Every process writes its tensors into the files that were reserved for all. Where a step measures the whole model, each
process measures its own tensors and they add up what they found; sums do not depend on who took which.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from lightning_merge.errors import ResumableError, UserError
from lightning_merge.methods import MergeMethod, Transform
from lightning_merge.methods.base import Partial, Step
from lightning_merge.methods.streaming import Chain, Exchange, Rounding, add_partial, round_to, rounded
from lightning_merge.task_vectors import TaskVectors
from lightning_merge.weights import private_memory_bytes
from lightning_merge.weights.output_files import OutputFiles


@dataclass(frozen=True)
class Part:
    """Some tensors of the output: which models they are merged from, and how; all of them in an ordinary merge."""

    method: MergeMethod
    task_vectors: TaskVectors
    transforms: tuple[Transform, ...] = ()


@dataclass
class Job:
    """A merge that is planned: for each part its steps and models, and where everything goes.

    Attributes:
        parts: Steps and models; every part makes the tensors of its template.
        names: The output's names of each tensor: its own, and those tied to it that are written out.
        output: The files.
        seed: Of the methods that draw at random.
        rounding: How results are rounded into the output's dtype.
        device: Where the arithmetic happens.
    """

    parts: list[tuple[list[Step], TaskVectors]]
    names: list[dict[str, list[str]]]
    output: OutputFiles
    seed: int = 0
    rounding: Rounding = "nearest"
    device: str = "cpu"

    @property
    def tensors(self) -> list[tuple[int, str]]:
        """Every tensor that has to be made, by the number of its part."""
        return [(number, name) for number, names in enumerate(self.names) for name in names]


PIECES_BETWEEN_LOOKS = 32


@dataclass
class Done:
    """What carrying out a job took; memory is private memory, sampled."""

    passes: int = 0
    bytes_read: int = 0
    peak_memory_bytes: int = 0


def carry_out(
    job: Job,
    wanted: Sequence[tuple[int, str]],
    threads: int | None = None,
    workers: int = 1,
    on_done: Callable[[int, str], None] = lambda part, name: None,
    on_entries: Callable[[int], None] = lambda count: None,
    inherited: Sequence[int] = (),
) -> Done:
    """Make the wanted tensors.

    Args:
        job: The merge.
        wanted: Part and name of each tensor to make; the others stand already.
        threads: How many work side by side in each process; by default the cores are shared out.
        workers: How many processes.
        on_done: Called when a tensor is written whole.
        on_entries: Called now and then with the entries written since the last call.
        inherited: Descriptors that every process keeps open: the lock on the place, which must outlive this process
            for as long as another of them may still write.

    Raises:
        UserError: A model cannot be read, or its values cannot be merged.
        ResumableError: A process has ended before its work was done.
    """
    workers = max(1, min(workers, len(wanted)))
    if workers == 1:
        return _make(job, wanted, job.tensors, threads or cores(), None, on_done, on_entries)
    return _in_processes(job, wanted, threads or max(1, cores() // workers), workers, on_done, on_entries, inherited)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make(
    job: Job,
    wanted: Sequence[tuple[int, str]],
    measured: Sequence[tuple[int, str]],
    threads: int,
    exchange: Exchange | None,
    on_done: Callable[[int, str], None],
    on_entries: Callable[[int], None],
    active: frozenset[int] | None = None,
) -> Done:
    """Make some tensors in this process; model-wide steps measure ``measured``."""
    done = Done()
    sources = {id(source): source for _, vectors in job.parts for source in vectors.sources}
    before = sum(source.bytes_read for source in sources.values())
    active = frozenset(number for number, _ in wanted) if active is None else active
    count = 0
    for number, (steps, vectors) in enumerate(job.parts):
        if number not in active:
            continue
        chain = Chain(steps, vectors, job.seed, threads, None if job.device == "cpu" else job.device)
        merged = set(vectors.tensor_names)
        here = [name for part, name in wanted if part == number]
        to_measure = [name for part, name in measured if part == number]
        for name, start, values, last in _pieces(chain, here, to_measure, job, number, exchange):
            for written in job.names[number][name]:
                job.output.write(written, values, start)
            if name in merged:
                on_entries(values.numel())
            if last:
                on_done(number, name)
            # Pages of files that the system keeps mapped are not counted: it takes them back when it needs them.
            if count % PIECES_BETWEEN_LOOKS == 0:
                done.peak_memory_bytes = max(done.peak_memory_bytes, private_memory_bytes())
            count += 1
        done.passes = max(done.passes, chain.passes)
    done.bytes_read = sum(source.bytes_read for source in sources.values()) - before
    done.peak_memory_bytes = max(done.peak_memory_bytes, private_memory_bytes())
    return done


def _pieces(
    chain: Chain, names: Sequence[str], measured: Sequence[str], job: Job, part: int, exchange: Exchange | None
) -> Iterator[tuple[str, int, Tensor, bool]]:
    """Yield every piece of the named tensors in the output's dtype, and whether it is its tensor's last."""
    vectors = chain.task_vectors
    merged = set(vectors.tensor_names)

    def dtype(name: str) -> torch.dtype:
        return job.output.tensors[job.names[part][name][0]].dtype

    for name in names:
        if name not in merged:
            yield name, 0, round_to(vectors.unmerged(name).reshape(-1), dtype(name), name), True
        elif not vectors.info(name).numel:
            yield name, 0, torch.empty(0, dtype=dtype(name)), True
    filled = [name for name in names if name in merged and vectors.info(name).numel]
    to_measure = [name for name in measured if name in merged]
    if not filled and exchange is None:
        return
    for name, start, values in chain.run(filled, to_measure, exchange):
        last = start + values.numel() == vectors.info(name).numel
        yield name, start, rounded(values, dtype(name), name, start, job.rounding, job.seed), last


# --- several processes --------------------------------------------------------------------------------------------


def shared_out(job: Job, tensors: Iterable[tuple[int, str]], workers: int) -> list[list[tuple[int, str]]]:
    """Give each process tensors of about the same size altogether; the largest first, to whoever has least."""
    shares: list[list[tuple[int, str]]] = [[] for _ in range(workers)]
    loads = [0] * workers

    def size(at: tuple[int, str]) -> int:
        return job.parts[at[0]][1].info(at[1]).numel

    for at in sorted(tensors, key=lambda at: (-size(at), at)):
        least = loads.index(min(loads))
        shares[least].append(at)
        loads[least] += size(at) + 1
    return shares


def _in_processes(
    job: Job,
    wanted: Sequence[tuple[int, str]],
    threads: int,
    workers: int,
    on_done: Callable[[int, str], None],
    on_entries: Callable[[int], None],
    inherited: Sequence[int],
) -> Done:
    active = frozenset(number for number, _ in wanted)
    makes = shared_out(job, wanted, workers)
    measures = shared_out(job, job.tensors, workers)
    try:
        payload = pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"This merge cannot be shared out over processes ({error}). Expected models from files, or --num_workers 1."
        ) from error
    started = [_start(inherited) for _ in range(workers)]
    total = Done(passes=0)
    try:
        connections = [connection for connection, _ in started]
        for connection, make, measure in zip(connections, makes, measures, strict=True):
            with suppress(ConnectionError):  # one that has ended already is noticed below
                connection.send_bytes(payload)
                connection.send((make, measure, threads, active))
        running = set(range(workers))
        found: dict[int, Partial] = {}
        while running:
            for ready in wait([connections[number] for number in running]):
                number = connections.index(ready)  # type: ignore[arg-type]
                try:
                    kind, content = connections[number].recv()
                except (EOFError, ConnectionError):
                    raise ResumableError(
                        "A process of the merge has ended before its work was done (killed, or out of memory?). "
                        "The same command goes on from there."
                    ) from None
                if kind == "refused":
                    raise UserError(content)
                if kind == "error":
                    raise RuntimeError(f"A process of the merge failed:\n{content}")
                if kind == "entries":
                    on_entries(content)
                elif kind == "done":
                    on_done(*content)
                elif kind == "measured":
                    found[number] = content
                else:
                    running.discard(number)
                    total.passes = max(total.passes, content.passes)
                    total.bytes_read += content.bytes_read
                    total.peak_memory_bytes += content.peak_memory_bytes
            if len(found) == workers:
                everything: Partial = {}
                for _, partial in sorted(found.items()):
                    add_partial(everything, partial)
                found.clear()
                for connection in connections:
                    with suppress(ConnectionError):
                        connection.send(everything)
        total.peak_memory_bytes += private_memory_bytes()
        return total
    finally:
        for connection, process in started:
            connection.close()
            process.kill() if process.poll() is None else None
            process.wait()


def _start(inherited: Sequence[int]) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start a process that waits for its work at the other end of a connection.

    It imports this package only: unlike multiprocessing's spawn it never runs the caller's script a second time, and
    unlike ``python -m`` nothing from the current folder.
    """
    code = f"import sys; sys.path[:] = {[path for path in sys.path if path]!r}; "
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{code}from lightning_merge.execution import work; work({theirs.fileno()})"],
            pass_fds=[theirs.fileno(), *inherited],
        )
    return Connection(ours.detach()), process


def work(descriptor: int) -> None:
    """Do the share of one process, told at the other end of a connection."""
    connection = Connection(descriptor)
    torch.set_num_threads(1)

    def exchange(partial: Partial) -> Any:
        connection.send(("measured", partial))
        return connection.recv()

    try:
        payload = connection.recv_bytes()
        make, measure, threads, active = connection.recv()
        try:
            # Nobody else can write here: the socket is one end of a pair that the parent made and handed down. Taken
            # apart from receiving, so that what cannot be rebuilt is told from a parent that is gone.
            job: Job = pickle.loads(payload)
        except (AttributeError, ImportError) as error:
            raise UserError(
                f"This merge cannot be shared out over processes ({error}). Expected methods from a module that can be "
                "imported, or --num_workers 1."
            ) from error
        done = _make(
            job,
            make,
            measure,
            threads,
            exchange,
            lambda part, name: connection.send(("done", (part, name))),
            lambda count: connection.send(("entries", count)),
            active,
        )
        job.output.close()
        connection.send(("finished", done))
    except (ConnectionError, EOFError, KeyboardInterrupt):
        pass  # whoever asked for the work is gone, or everybody was told to stop
    except UserError as error:
        connection.send(("refused", str(error)))
    except BaseException:
        with suppress(ConnectionError):
            connection.send(("error", traceback.format_exc()))
