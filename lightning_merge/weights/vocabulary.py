"""Which tensors belong to a model's vocabulary, which of them are tied, and what its tokenizer numbers how."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_merge.errors import UserError
from lightning_merge.weights.hashing import sha256_of_file
from lightning_merge.weights.source import WeightSource
from lightning_merge.weights.tensor_info import TensorInfo

TOKENIZER_FILE = "tokenizer.json"
# The last part of the name of a table with a row for each token.
_INPUT = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight")
# A layer with a score for each token; what stands before it varies.
_OUTPUT = re.compile(
    r"(.*\.)?(lm_head|lm_head\.decoder|embed_out|proj_out|predictions\.decoder|vocab_projector)\.weight|output\.weight"
)
_OF_VOCABULARY = re.compile(
    r"(.*\.)?(\w*embed(ding|dings|_tokens)?|embed_(in|out|tokens)|wte|tok_embeddings|shared|lm_head|lm_head\.decoder|proj_out"
    r"|predictions(\.decoder)?|vocab_(projector|bias)|final_logits)\.?(weight|bias|_bias)|output\.weight"
)
_OF_PLACES = re.compile(r"position|token_type|patch|(^|\.)(wpe|pos_embed)")
# Made anew from the config whenever a model is built, whether or not a file holds them.
_REBUILT = re.compile(r"(^|\.)(inv_freq|position_ids|token_type_ids|masked_bias)$|(^|\.)rotary\w*\.(cos|sin)_cached$")
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")


def of_vocabulary(name: str) -> bool:
    """Tell from its name whether a tensor has an entry for each token along its first axis."""
    return _OF_VOCABULARY.fullmatch(name) is not None and _OF_PLACES.search(name) is None


def is_rebuilt(name: str, info: TensorInfo) -> bool:
    """Tell whether a tensor is one that a model makes itself (rotary frequencies, positions, causal masks)."""
    mask = _CAUSAL_MASK.search(name) is not None and len(info.shape) == 4 and info.shape[:2] == (1, 1)
    return mask or _REBUILT.search(name) is not None


def is_tied_by_config(config: Mapping[str, Any] | None) -> bool:
    """Tell whether a ``config.json`` ties the output layer to the embedding.

    Earlier versions of transformers leave the entry out where it has its default, which is that they are tied.
    """
    if not config or "model_type" not in config:
        return False
    inner = config.get("text_config")
    stated = [part["tie_word_embeddings"] for part in (config, inner) if part and "tie_word_embeddings" in part]
    return bool(stated[0]) if stated else True


def tied_name(source: WeightSource, name: str) -> str | None:
    """Return the embedding that stands for the output layer ``name`` in a source whose config ties the two."""
    if not _OUTPUT.fullmatch(name) or not is_tied_by_config(source.config):
        return None
    tables = [stored for stored in source.tensors if _INPUT.fullmatch(stored)]
    return tables[0] if len(tables) == 1 else None


def tokens_by_id(folder: Path) -> dict[int, str]:
    """Return the token of each number, as the ``tokenizer.json`` of a model's folder has them.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / TOKENIZER_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tokens = {int(number): str(token) for token, number in vocabulary.items()}
        else:  # a list of tokens with their scores, in the order of the numbers
            tokens = {number: str(entry[0]) for number, entry in enumerate(vocabulary)}
        tokens |= {int(entry["id"]): str(entry["content"]) for entry in content.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"'{path}' cannot be read ({type(error).__name__}: {error}). "
            "Expected the tokenizer of a Hugging Face model, with a vocabulary in 'model'."
        ) from error
    return tokens


def tokenizers_differ(first: Path | None, second: Path | None) -> bool | None:
    """Tell whether two folders hold different ``tokenizer.json`` files, or ``None`` where one has none."""
    files = [folder / TOKENIZER_FILE for folder in (first, second) if folder is not None]
    if len(files) < 2 or not all(file.is_file() for file in files):
        return None
    return sha256_of_file(files[0]) != sha256_of_file(files[1])
