"""What all rooms share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread_of_torch() -> None:
    """Models this small only lose by sharing work between threads."""
    torch.set_num_threads(1)
