"""Digests of everything that goes into a merge, taken beside it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence

from lightning_merge.errors import UserError
from lightning_merge.execution import Part
from lightning_merge.task_vectors import TaskVector
from lightning_merge.weights import WeightSource, fingerprint, sha256_of_source


class Digests:
    """Digests of all sources, taken beside the merge by a thread of their own."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.sources: dict[str, WeightSource] = {}
        self.seconds = 0.0
        computed = {}
        for part in parts:
            vectors = part.task_vectors
            if vectors.base is not None:
                self.sources.setdefault("", vectors.base)
            for name, vector in vectors.items():
                if name not in vectors.models:
                    computed[name] = vector
                else:
                    self.sources.setdefault(name, vectors.models[name])
        self._hashes = {name: sha256_of_values(vector) for name, vector in computed.items()}
        # How the tensors of a source are named and shaped here, which its files do not tell: prefixes, new names.
        self.layouts = {name: _layout(source) for name, source in self.sources.items()}
        self.fingerprints = {name: fingerprint(source) for name, source in self.sources.items()} | self._hashes
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        started = time.perf_counter()
        try:
            self._hashes |= {name: sha256_of_source(source) for name, source in self.sources.items()}
        except Exception as error:
            self._error = error
        self.seconds = time.perf_counter() - started

    def refuse_changed(self) -> None:
        """Check that no source has changed since the merge began.

        Raises:
            UserError: With the source.
        """
        for name, source in self.sources.items():
            if fingerprint(source) != self.fingerprints[name]:
                raise UserError(
                    f"'{source.label}' was changed while it was merged. Expected sources that are left alone meanwhile."
                )

    def result(self) -> dict[str, str]:
        """Wait for the digests and return them; the base is called by the empty name."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return dict(sorted(self._hashes.items()))


def _layout(source: WeightSource) -> str:
    """Return a digest of the names, shapes and dtypes of a source's tensors."""
    found = hashlib.sha256(source.prefix.encode())
    for name, info in sorted(source.tensors.items()):
        found.update(f"{name}:{info.shape}:{info.dtype};".encode())
    return found.hexdigest()


def sha256_of_values(vector: TaskVector) -> str:
    """Return the sha256 of a task vector that algebra made: of its values, since no file holds them."""
    found = hashlib.sha256()
    for name in vector.space.tensor_names:
        found.update(f"{name}:{vector.space.shape(name)};".encode())
        for start, stop in vector.space.chunks(name):
            found.update(vector.read(name, start, stop).contiguous().numpy().tobytes())
    return found.hexdigest()
