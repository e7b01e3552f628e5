"""What all rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# They hold no doctests, and as modules they would all be called alike.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]


@pytest.fixture(autouse=True, scope="session")
def one_thread_of_torch() -> None:
    """Models this small only lose by sharing work between threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def hashes_are_remembered_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's own cache of digests is left alone; processes that tests start inherit the place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_MERGE_CACHE", str(tmp_path_factory.mktemp("hashes")))
        yield
