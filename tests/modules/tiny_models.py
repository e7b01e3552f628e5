"""Tiny bases of each kind, made from configs, and raw batches as the data room gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

WORDS = ("good", "bad", "film", "food", "very", "not", "a", "the", "is", "red", "blue", "green")


def save_bert(folder: Path, seed: int = 0, dropout: float = 0.0) -> Path:
    """Write a two-layer BERT with a WordPiece tokenizer over a dozen words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(vocabulary)}, model_max_length=64)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    return folder


def clip_config(projection: int = 6) -> Any:
    from transformers import CLIPConfig

    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def loader(inputs: Any, labels: Any, batch_size: int = 8) -> DataLoader:
    """Batches of the data room's contract: raw inputs, labels, row numbers; in order."""

    def collate(rows: list[int]) -> dict[str, Any]:
        if isinstance(inputs, np.ndarray):
            chosen: Any = torch.as_tensor(inputs[rows])
        else:
            chosen = [inputs[row] for row in rows]
        return {"inputs": chosen, "labels": torch.as_tensor(np.asarray(labels)[rows]), "index": torch.tensor(rows)}

    return DataLoader(range(len(labels)), batch_size=batch_size, collate_fn=collate)


def sentences(count: int = 32) -> tuple[list[str], np.ndarray]:
    """Sentences whose class is one word of theirs."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, count)
    texts = [
        f"the {generator.choice(['film', 'food'])} is {'very ' * int(generator.integers(0, 3))}{('bad', 'good')[label]}"
        for label in labels
    ]
    return texts, labels


def make_trainer(folder: Path, **options: Any) -> Any:
    import lightning as L

    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "max_epochs": 1,
    }
    return L.Trainer(**(defaults | options))
