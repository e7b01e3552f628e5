"""The tokenizer of a merge, and which row of which model's embedding each of its tokens gets."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.errors import UserError, nearest
from lightning_merge.mergekit.grammar import Recipe, TokenRow
from lightning_merge.mergekit.models import Companions, Model, as_bytes
from lightning_merge.mergekit.values import Reference
from lightning_merge.weights import Finding
from lightning_merge.weights.views import GatheredRows, LazyTensor, Rows

TOKENIZER_FILES = frozenset(
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "chat_template.json",
    ]
)


@dataclass(frozen=True)
class Alignment:
    """How the tokens of the result lie in each model.

    Attributes:
        count: Number of tokens.
        size: Number of rows, rounded up as ``pad_to_multiple_of`` asks.
        own: For each model the row of every token, −1 where it has none.
        overrides: By token id, what the recipe says of its row.
        vocabularies: For each model its tokens and their ids.
        files: The tokenizer's files.
        findings: What is worth knowing.
    """

    count: int
    size: int
    own: Mapping[Reference, Tensor]
    overrides: Mapping[int, TokenRow]
    vocabularies: Mapping[Reference, Mapping[str, int]]
    files: Companions
    findings: tuple[Finding, ...] = field(default=())

    def without_tokenizer(self, companions: Companions) -> dict[str, Any]:
        """Return the companions of the donor without its own tokenizer."""
        return {name: content for name, content in companions.items() if name not in TOKENIZER_FILES}

    def gather(self, tensors: Mapping[Reference, LazyTensor], base: Reference | None) -> dict[Reference, LazyTensor]:
        """Return each model's tensor with its rows in the order of the tokens.

        A token that a model lacks gets the row of the base; of its sole owner; the mean of its owners; or zeros.
        """
        references, donors = list(tensors), list(tensors.values())
        own = torch.stack([self.own[reference] for reference in references])
        held = own >= 0
        owners = held.sum(0)
        donor, row = _defaults(
            own, held, owners, references.index(base) if base is not None and base in tensors else None
        )
        forced = torch.zeros(self.count, dtype=torch.bool)
        for token, override in self.overrides.items():
            forced[token] = override.force
            donor[token], row[token] = -1, 0
            if not override.zero and (override.force or int(owners[token]) < len(references)):
                donor[token], row[token] = self._overridden(token, override, references, donors)
        explicit = torch.zeros(self.count, dtype=torch.bool)
        explicit[list(self.overrides)] = True
        averaged = torch.nonzero((donor == -1) & (owners > 1) & (owners < len(references)) & ~explicit).reshape(-1)
        means = {
            int(token): [
                (position, int(own[position, token])) for position in range(len(references)) if held[position, token]
            ]
            for token in averaged
        }
        gathered: dict[Reference, LazyTensor] = {}
        for position, reference in enumerate(references):
            keep = held[position] & ~forced
            rows = Rows(
                _padded(torch.where(keep, position, donor), self.size),
                _padded(torch.where(keep, own[position], row), self.size),
                {token: mean for token, mean in means.items() if not keep[token]},
                self.size - self.count,
            )
            unchanged = donors[position].info.shape[0] == self.size == self.count
            if unchanged and bool(keep.all()) and torch.equal(own[position], torch.arange(self.count)):
                gathered[reference] = donors[position]
            else:
                gathered[reference] = GatheredRows(donors, rows)
        return gathered

    def _overridden(
        self, token: int, override: TokenRow, references: Sequence[Reference], donors: Sequence[LazyTensor]
    ) -> tuple[int, int]:
        """Return donor and row that the recipe names for a token."""
        name = next(name for name, at in self.vocabularies[_RESULT].items() if at == token)
        if override.model not in references:
            listed = [str(reference) for reference in references]
            raise UserError(
                f"tokenizer.tokens.{name}: '{override.model}' has no part in the embedding. "
                f"Expected one of {', '.join(listed)}.{nearest(str(override.model), listed)}"
            )
        assert override.model is not None
        position = references.index(override.model)
        wanted = name if override.token is None else override.token
        number = override.token_id
        if number is None:
            number = self.vocabularies[override.model].get(wanted)
        if number is None:
            hint = nearest(wanted, self.vocabularies[override.model])
            raise UserError(f"tokenizer.tokens.{name}: '{override.model}' has no token '{wanted}'.{hint}")
        if number >= donors[position].info.shape[0]:
            raise UserError(
                f"tokenizer.tokens.{name}: '{override.model}' has {donors[position].info.shape[0]} rows, none with the "
                f"number {number}."
            )
        return position, number


_RESULT = Reference("")


def _defaults(own: Tensor, held: Tensor, owners: Tensor, base: int | None) -> tuple[Tensor, Tensor]:
    """Return donor and row for a model that lacks a token; −1 where there is no single donor."""
    # With one owner it is the only True of its column.
    donor = torch.where(owners == 1, held.int().argmax(0), -1)
    if base is not None:
        donor = torch.where(held[base], base, donor)
    row = torch.where(donor >= 0, own.gather(0, donor.clamp(min=0)[None])[0], 0)
    return donor, row


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, torch.full((size - len(values),), -1, dtype=values.dtype)])


def align(recipe: Recipe, models: Sequence[Model], open_model: Callable[[Reference], Model]) -> Alignment | None:
    """Return how the tokens of the result lie in each model, or ``None`` where the recipe leaves tokenizers alone.

    Args:
        recipe: Its ``tokenizer`` entry says whose tokens the result has.
        models: The models, the base first.
        open_model: Opens the model whose tokenizer is asked for.

    Raises:
        UserError: There is no tokenizer, or it cannot be read.
    """
    choice = recipe.tokenizer
    if choice is None:
        return None
    tokenizers, findings = _tokenizers(models)
    sizes = {model.reference: model.vocabulary_size for model in models}
    vocabularies = {
        reference: _within(tokenizer.get_vocab(), sizes[reference]) for reference, tokenizer in tokenizers.items()
    }
    donor = open_model(choice.source) if isinstance(choice.source, Reference) else models[0]
    result = tokenizers.get(donor.reference) or _load(donor)
    complete = len(result.get_vocab())
    if not isinstance(choice.source, Reference):
        result = _stripped(result, donor)
    stripped = len(result.get_vocab()) < complete
    extra = _missing_tokens(result, tokenizers, vocabularies) if choice.source == "union" else []
    known = {*result.get_vocab(), *(str(token) for token in extra)}
    extra += [token for token in choice.tokens if token not in known]
    if extra or stripped:
        result = result if stripped else _load(donor)  # a copy, lest the donor's own vocabulary changes
        result.add_tokens(extra)
        files: dict[str, Any] = dict(_saved(result))
    else:
        files = {name: content for name, content in donor.companions.items() if name in TOKENIZER_FILES}
    tokens = result.get_vocab()
    count = max(tokens.values()) + 1
    multiple = choice.pad_to_multiple_of or 1
    own = {}
    for reference, vocabulary in vocabularies.items():
        rows = torch.full((count,), -1, dtype=torch.int64)
        pairs = [(at, vocabulary[token]) for token, at in tokens.items() if token in vocabulary]
        if pairs:
            places, numbers = torch.tensor(pairs).T
            rows[places] = numbers
        own[reference] = rows
    nowhere = (torch.stack(list(own.values())) < 0).all(0)
    orphans = [token for token, at in tokens.items() if nowhere[at] and token not in choice.tokens]
    if orphans:
        shown = ", ".join(repr(token) for token in sorted(orphans)[:3])
        findings.append(Finding("WARN", f"{len(orphans)} tokens ({shown}) are in no model: their rows are zeros."))
    overrides = {tokens[token]: row for token, row in choice.tokens.items()}
    size = -(-count // multiple) * multiple
    everything = {**vocabularies, _RESULT: tokens}
    return Alignment(count, size, own, overrides, everything, files, tuple(findings))


def _tokenizers(models: Sequence[Model]) -> tuple[dict[Reference, Any], list[Finding]]:
    """Read the tokenizer of each model; one that has none is taken to have that of the first."""
    tokenizers: dict[Reference, Any] = {}
    findings: list[Finding] = []
    first = models[0].reference
    for model in models:
        if any(name in TOKENIZER_FILES for name in model.companions):
            tokenizers[model.reference] = _load(model)
        elif model.reference == first:
            raise UserError(f"'{first}' holds no tokenizer, which the recipe's tokenizer entry needs.")
        else:
            findings.append(Finding("WARN", f"'{model.reference}' holds no tokenizer: that of '{first}' is taken."))
            tokenizers[model.reference] = tokenizers[first]
    return tokenizers, findings


def _within(vocabulary: Mapping[str, int], rows: int | None) -> dict[str, int]:
    """Leave out tokens for which the model has no row."""
    return {token: at for token, at in vocabulary.items() if rows is None or at < rows}


def _stripped(tokenizer: Any, model: Model) -> Any:
    """Leave out of a tokenizer the tokens for which its model has no row.

    Raises:
        UserError: They are part of a vocabulary that cannot do without them.
    """
    rows = model.vocabulary_size
    beyond = {token for token, at in tokenizer.get_vocab().items() if rows is not None and at >= rows}
    if not beyond:
        return tokenizer
    files = _saved(tokenizer)
    content = json.loads(files["tokenizer.json"])
    kind, vocabulary = content["model"].get("type"), content["model"].get("vocab")
    if any(token in beyond for token in vocabulary):
        if kind != "BPE":
            raise UserError(
                f"The {kind} tokenizer of '{model.reference}' has {len(beyond)} tokens ({min(beyond)!r}, ...) beyond "
                f"the model's {rows} rows. Expected one without them."
            )
        content["model"]["vocab"] = {token: at for token, at in vocabulary.items() if token not in beyond}
        pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in content["model"]["merges"]]
        content["model"]["merges"] = [merge for merge, pair in pairs if not beyond & {*pair, "".join(pair)}]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in beyond]
    files["tokenizer.json"] = json.dumps(content, ensure_ascii=False).encode()
    # Special tokens that other files name would be added again.
    for name in {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"} & set(files):
        files[name] = json.dumps(_without(json.loads(files[name]), beyond), ensure_ascii=False).encode()
    config = {name: content for name, content in model.companions.items() if name == "config.json"}
    return _load(Model(model.reference, model.source, {**files, **config}, in_place=False))


def _without(content: Any, tokens: set[str]) -> Any:
    """Leave out of JSON whatever is, or stands under, one of the tokens."""

    def is_one(value: Any) -> bool:
        return value in tokens if isinstance(value, str) else isinstance(value, dict) and value.get("content") in tokens

    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key not in tokens and not is_one(value)}
        return {key: _without(value, tokens) for key, value in kept.items()}
    if isinstance(content, list):
        return [_without(value, tokens) for value in content if not is_one(value)]
    return content


def _missing_tokens(
    base: Any, tokenizers: Mapping[Reference, Any], vocabularies: Mapping[Reference, Mapping[str, int]]
) -> list[Any]:
    """Return the tokens that the base lacks, special ones last, in the order of models and ids."""
    known = set(base.get_vocab())
    plain: list[Any] = []
    special: list[Any] = []
    for reference, tokenizer in tokenizers.items():
        marked = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        for token, _ in sorted(vocabularies[reference].items(), key=lambda pair: pair[1]):
            if token not in known:
                known.add(token)
                (special if token in marked else plain).append(marked.get(token, token))
    return plain + special


def _load(model: Model) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model.folder()), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        reason = str(error).split("\n")[0]
        raise UserError(f"The tokenizer of '{model.reference}' cannot be read ({reason}).") from error


def _saved(tokenizer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="lightning_merge.") as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def differing_vocabularies(models: Sequence[Model]) -> list[Finding]:
    """Note models whose tokens differ though nothing tells how to match them."""
    held = [model for model in models if "tokenizer.json" in model.companions]
    if len(held) < 2:
        return []
    texts = {model.reference: as_bytes(model.companions["tokenizer.json"]) for model in held}
    if len(set(texts.values())) == 1:
        return []
    first, *others = held
    expected = _stated_vocabulary(texts[first.reference])
    for model in others:
        if texts[model.reference] == texts[first.reference]:
            continue
        found = _stated_vocabulary(texts[model.reference])
        different = sorted({token for token, _ in expected ^ found})
        if different:
            return [
                Finding(
                    "WARN",
                    f"The tokenizers of '{first.reference}' and '{model.reference}' differ in {len(different)} tokens "
                    f"({different[0]!r}, ...), and the recipe has no tokenizer entry: rows are merged by number.",
                )
            ]
    return []


def _stated_vocabulary(text: bytes) -> set[tuple[str, int]]:
    """Return tokens and ids that a ``tokenizer.json`` states, where it states them."""
    try:
        content = json.loads(text)
    except ValueError:
        return set()
    vocabulary = content.get("model", {}).get("vocab", {})
    pairs = set(vocabulary.items()) if isinstance(vocabulary, dict) else {(v[0], i) for i, v in enumerate(vocabulary)}
    return pairs | {(token["content"], token["id"]) for token in content.get("added_tokens", [])}
