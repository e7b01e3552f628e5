"""What tests of callbacks share: the user's checkpoints, trained once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import users_code


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and one fine-tuning of it for each view, as the user's own trainer saved them."""
    return users_code.finetuned_checkpoints(tmp_path_factory.mktemp("users"))


@pytest.fixture(autouse=True)
def ctrl_c_stays_what_it_was() -> Iterator[None]:
    """Lightning ignores further interrupts after the first."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
