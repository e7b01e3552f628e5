"""Small checkpoints that the tests of recipes share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import recipe_models as made

from lightning_merge.mergekit import RecipePlan, read_recipe
from lightning_merge.weights import SafetensorsSource


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llamas, GPT-2s and BERTs with fine-tunings, an adapter, and Llamas whose vocabularies differ."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2", "bert"):
        made.save_family(root, kind)
    made.save_adapter(root / "lora", root / "llama" / "base")
    made.save_vocabularies(root / "words")
    return root


@pytest.fixture
def plan(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[RecipePlan]]:
    """Plan a recipe in which ``ROOT`` stands for the folder, while no weight may be read."""

    def planned(text: str) -> list[RecipePlan]:
        with monkeypatch.context() as patched:
            for name in ("read", "read_flat"):
                patched.setattr(SafetensorsSource, name, lambda *_: pytest.fail("a weight was read"))
            return read_recipe(text.replace("ROOT", str(root)))

    return planned
