"""The model card of a merged model: what it was made of, how, under which licences, and how well it does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_merge.weights.source import WeightSource

# From free to restrictive, as far as a name tells; anything not listed must be read by a person.
_PERMISSIVE = ("cc0-1.0", "unlicense", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0", "cc-by-4.0")


@dataclass(frozen=True)
class SourceRecord:
    """One model that went into a merge."""

    name: str
    reference: str
    sha256: str
    license: str | None

    @classmethod
    def of(cls, name: str, source: WeightSource, sha256: str) -> SourceRecord:
        """Describe an opened source."""
        return cls(name, source.label, sha256, stated_license(source.folder))


def stated_license(folder: Path | None) -> str | None:
    """Return the licence that a model's card states in its front matter, if it states one."""
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return None
    front_matter = re.match(r"\A---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*(\S+)", front_matter.group(1), re.MULTILINE) if front_matter else None
    return found.group(1).strip("'\"") if found else None


def most_restrictive(licenses: Sequence[str | None]) -> str | None:
    """Return the licence that binds the merged model, or ``None`` where one is missing or needs a person to judge."""
    named = [license.lower() for license in licenses if license]
    if len(named) < len(licenses) or not named or any(license not in _PERMISSIVE for license in named):
        return None
    return max(named, key=_PERMISSIVE.index)


def model_card(
    title: str,
    method: str,
    recipe: str,
    base: SourceRecord | None,
    models: Sequence[SourceRecord],
    facts: Mapping[str, str],
    results: str = "",
) -> str:
    """Return the card's Markdown.

    Args:
        title: Its heading.
        method: One line naming the method and its paper.
        recipe: The resolved recipe in YAML, shown as it is.
        base: The pretrained model, if any.
        models: The fine-tuned models.
        facts: Further lines, such as the number of parameters.
        results: A Markdown table, if results are known.
    """
    sources = [*([base] if base else []), *models]
    binding = most_restrictive([source.license for source in sources])
    front = ["---", "library_name: transformers", "tags:", "- merge", "- lightning-merge"]
    public = [source.reference for source in sources if re.fullmatch(r"[\w.-]+/[\w.-]+@\S+", source.reference)]
    if public:
        front += ["base_model:", *(f"- {reference.partition('@')[0]}" for reference in public)]
        front += ["base_model_relation: merge"]
    if binding:
        front += [f"license: {binding}"]
    rows = [
        f"| {'base' if source is base else 'model'} | {source.name} | `{source.reference}` | `{source.sha256[:16]}…` "
        f"| {source.license or 'not stated'} |"
        for source in sources
    ]
    licences = (
        f"The most restrictive licence stated is {binding}."
        if binding
        else (
            "At least one source states no licence, or one that a person must judge: "
            "read them before sharing this model."
        )
    )
    lines = [
        *front,
        "---",
        "",
        f"# {title}",
        "",
        f"Merged with lightning_merge. {method}",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "## Sources",
        "",
        "| role | name | reference | sha256 | licence |",
        "|---|---|---|---|---|",
        *rows,
        "",
        licences,
        "",
        "## Recipe",
        "",
        "Save as `merge.yaml` and run `lightning-merge merge --config merge.yaml --output OUT`.",
        "",
        "```yaml",
        recipe.strip(),
        "```",
        "",
    ]
    if results:
        lines += ["## Results", "", results.strip(), ""]
    return "\n".join(lines)


def with_results(card: str, results: str) -> str:
    """Return a card whose last section holds these results, in place of earlier ones."""
    below = re.sub(r"^## ", "### ", results.strip(), flags=re.MULTILINE)
    return card.partition("\n## Results\n")[0].rstrip() + "\n\n## Results\n\n" + below + "\n"
