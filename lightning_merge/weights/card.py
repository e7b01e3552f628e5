"""The model card of a merged model: what it was made of, how, under which licences, and how well it does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_merge.weights.source import WeightSource

# From free to restrictive, by the names of the Hugging Face Hub; any licence not listed must be read by a person.
_PERMISSIVE = (
    "cc0-1.0", "unlicense", "wtfpl", "pddl", "0bsd", "mit-0", "mit", "isc", "zlib", "postgresql", "ncsa", "bsl-1.0",
    "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "afl-3.0", "ecl-2.0", "openmdw-1.0", "apache-2.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "etalab-2.0", "odc-by", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0",
    "cc-by-4.0",
)  # fmt: skip
# A changed work stays under the licence, works that only use it need not.
_WEAK_COPYLEFT = (
    "artistic-2.0", "ms-pl", "mpl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "lgpl", "lgpl-2.1", "lgpl-3.0",
    "cdla-sharing-1.0",
)  # fmt: skip
# Every derived work stays under the licence.
_COPYLEFT = (
    "odbl", "cc-by-sa-2.0", "cc-by-sa-2.5", "cc-by-sa-3.0", "cc-by-sa-4.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0",
    "osl-3.0", "agpl-3.0",
)  # fmt: skip
_NON_COMMERCIAL = (
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "fair-noncommercial-research-license",
)  # fmt: skip
_NO_DERIVATIVES = ("cc-by-nd-3.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0")
_ORDER = (*_PERMISSIVE, *_WEAK_COPYLEFT, *_COPYLEFT, *_NON_COMMERCIAL, *_NO_DERIVATIVES)
# Two different ones of these may be impossible to meet at once.
_DEMANDING = (*_WEAK_COPYLEFT, *_COPYLEFT, *_NON_COMMERCIAL, *_NO_DERIVATIVES)


@dataclass(frozen=True)
class SourceRecord:
    """One model that went into a merge; several licences stand in one text, with commas."""

    name: str
    reference: str
    sha256: str
    license: str | None
    license_link: str | None = None

    @classmethod
    def of(cls, name: str, source: WeightSource, sha256: str) -> SourceRecord:
        """Describe an opened source."""
        folder = source.card_folder or source.folder
        link = _front_matter(folder).get("license_link")
        return cls(name, source.label, sha256, stated_license(folder), ", ".join(map(str, _as_list(link))) or None)


@dataclass(frozen=True)
class Provenance:
    """How a merge came about, beyond its recipe.

    Attributes:
        versions: Of the packages that took part, by name.
        seeds: By what they were for.
        seconds: What the merge took, without hashing.
        hashing_seconds: What the sha256 of the sources took; little where they were remembered.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    hashing_seconds: float | None = None

    def lines(self, sources: Sequence[SourceRecord]) -> list[str]:
        """Return the items of the card's section, the full sha256 of the sources included."""
        seeds = ", ".join(f"{name} {seed}" for name, seed in self.seeds.items())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        facts = {
            "seeds": seeds,
            "versions": versions,
            "seconds of merging": "" if self.seconds is None else f"{self.seconds:.3f}",
            "seconds of hashing the sources, apart": (
                "" if self.hashing_seconds is None else f"{self.hashing_seconds:.3f}"
            ),
            **{f"sha256 of `{source.name}`": f"`{source.sha256}`" for source in sources},
        }
        return [f"- {name}: {value}" for name, value in facts.items() if value]


def stated_license(folder: Path | None) -> str | None:
    """Return the licence that a model's card states in its front matter, if it states one.

    Where the card says ``other``, this is the licence's own name (``license_name``); several are joined by commas.
    """
    stated = _front_matter(folder)
    names = [str(name) for name in _as_list(stated.get("license_name"))]
    licenses: list[str] = []
    for license in map(str, _as_list(stated.get("license"))):
        licenses += names if license.lower() == "other" and names else [license]
    # They will stand in a table of Markdown.
    return ", ".join(dict.fromkeys(re.sub(r"[\s|`]+", " ", name).strip() for name in licenses or names)) or None


def most_restrictive(licenses: Sequence[str | None]) -> str | None:
    """Return the licence that binds the merged model, or ``None`` where one is missing or needs a person to judge."""
    named = _names(licenses)
    if not named or not all(licenses) or any(license not in _ORDER for license in named):
        return None
    return max(named, key=_ORDER.index)


def licence_verdict(sources: Sequence[SourceRecord]) -> str:
    """Say in a few sentences which licence binds a merge of these sources, as far as names tell."""
    sentences = []
    known = [license for license in _names([source.license for source in sources]) if license in _ORDER]
    silent = [source.name for source in sources if not source.license]
    unknown = [
        f"{license} (`{source.name}`{', ' + source.license_link if source.license_link else ''})"
        for source in sources
        for license in _names([source.license])
        if license not in _ORDER
    ]
    whole = not silent and not unknown
    if known:
        which = (
            "The most restrictive licence stated is" if whole else "Of the licences known here the most restrictive is"
        )
        sentences.append(f"{which} {max(known, key=_ORDER.index)}.")
    if unknown:
        sentences.append(f"A person must judge: {'; '.join(unknown)}.")
    if silent:
        sentences.append(f"No licence is stated by: {', '.join(f'`{name}`' for name in silent)}.")
    if not whole or not known:
        sentences.append("Read them before sharing this model.")
    no_derivatives = [license for license in known if license in _NO_DERIVATIVES]
    if no_derivatives:
        sentences.append(f"{no_derivatives[0]} allows no derived works, and a merge is one.")
    demanding = sorted({license for license in known if license in _DEMANDING}, key=_ORDER.index)
    if len(demanding) > 1:
        sentences.append(f"A person must judge whether {' and '.join(demanding)} can be met at once.")
    return " ".join(sentences)


def _names(licenses: Sequence[str | None]) -> list[str]:
    """Return single licences in lower case, each once."""
    split = [name.strip().lower() for license in licenses if license for name in license.split(",")]
    return list(dict.fromkeys(name for name in split if name))


def _as_list(value: Any) -> list[Any]:
    """Return what the front matter holds as a list: one value, several, or none."""
    values = value if isinstance(value, list) else [value]
    return [value for value in values if isinstance(value, (str, int, float)) and str(value).strip()]


def _front_matter(folder: Path | None) -> dict[str, Any]:
    """Return the front matter of a model's card; of a damaged one the lines that can still be read."""
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff")
    found = re.match(r"\A---[ \t]*\r?\n(.*?)\n---", text, re.DOTALL)
    if found is None:
        return {}
    try:
        content = yaml.safe_load(found.group(1))
    except (yaml.YAMLError, ValueError):  # a date that is none is a ValueError
        lines = re.findall(r"^(license\w*):[ \t]*(\S.*?)\s*$", found.group(1), re.MULTILINE)
        return {key: value.strip("'\"") for key, value in lines}
    return content if isinstance(content, dict) else {}


def model_card(
    title: str,
    method: str,
    recipe: str,
    base: SourceRecord | None,
    models: Sequence[SourceRecord],
    facts: Mapping[str, str],
    results: str = "",
    provenance: Provenance | None = None,
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
        provenance: Seeds, versions and timings, if they shall stand in a section of their own.
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
        f"| {_linked(source)} |"
        for source in sources
    ]
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
        licence_verdict(sources),
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
    if provenance is not None:
        lines += ["## Provenance", "", *provenance.lines(sources), ""]
    if results:
        lines += ["## Results", "", results.strip(), ""]
    return "\n".join(lines)


def _linked(source: SourceRecord) -> str:
    if source.license is None:
        return "not stated"
    link = source.license_link
    return f"[{source.license}]({link})" if link and re.fullmatch(r"https?://[^\s()]+", link) else source.license


def with_results(card: str, results: str) -> str:
    """Return a card whose last section holds these results, in place of earlier ones."""
    below = re.sub(r"^## ", "### ", results.strip(), flags=re.MULTILINE)
    return card.partition("\n## Results\n")[0].rstrip() + "\n\n## Results\n\n" + below + "\n"
