"""Fixtures of this room; tiny_models.py has what tests import, under a name of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import save_bert


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by sharing work, and processes must not fork with a pool of threads in use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_bert(tmp_path / "bert")


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    from lightning_merge.modules import build_vit

    build_vit(image_size=8, hidden_size=16, layers=2, heads=2, patch_size=4, seed=1).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"
