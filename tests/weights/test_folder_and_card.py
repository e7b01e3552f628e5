from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from model_files import listing, save_bert

from lightning_merge.weights import open_weights
from lightning_merge.weights.card import (
    Provenance,
    SourceRecord,
    licence_verdict,
    model_card,
    most_restrictive,
    stated_license,
    with_results,
)
from lightning_merge.weights.folder import copy_companions, copy_model, replace_folder, write_text


def test_companions_come_along_without_weights_code_or_pickles(tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "copy"
    (source / "1_Pooling").mkdir(parents=True)
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "deeper").mkdir()
    (source / "deeper" / "config.json").write_text("{}")
    wanted = ["config.json", "tokenizer.json", "vocab.txt", "spiece.model", "chat_template.jinja"]
    unwanted = [
        "model.safetensors", "pytorch_model.bin", "modeling.py", "optimizer.pt", "README.md", "merge.json",
        "merge.yaml", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    ]  # fmt: skip
    for name in [*wanted, *unwanted]:
        (source / name).write_text("{}")
    copied = copy_companions(source, target)
    assert sorted(copied) == sorted([*wanted, "1_Pooling/config.json"])
    assert {name for name in listing(target) if (target / name).is_file()} == set(copied)


def test_the_config_states_the_dtype_of_the_weights(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert")
    before = json.loads((folder / "config.json").read_text())
    copy_companions(folder, tmp_path / "copy", torch.bfloat16)
    after = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert after.pop("dtype") == "bfloat16" and before.pop("dtype") == "float32" and after == before
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_copied_model_loads_like_the_original(tmp_path: Path, shard: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = save_bert(tmp_path / "bert", shard=shard)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    source = open_weights(folder)
    copy_model(source.files, folder, tmp_path / "copy")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "copy")("a good film", return_tensors="pt")
    outputs = [AutoModel.from_pretrained(f)(**tokens).last_hidden_state for f in (folder, tmp_path / "copy")]
    assert torch.equal(*outputs)
    assert stated_license(tmp_path / "copy") == "mit"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "copy"]


def test_a_folder_is_replaced_whole_and_put_back_if_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = tmp_path / "new", tmp_path / "place"
    for folder, text in ((new, "new"), (old, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)
        (folder / f"only-{text}").write_text("")
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if source == new:
            raise OSError("no more room")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="no more room"):
            replace_folder(new, old)
    assert (old / "file").read_text() == "old" and (new / "file").read_text() == "new"
    replace_folder(new, old)
    assert listing(tmp_path) == {"place": b"", "place/file": b"new", "place/only-new": b""}


def test_a_text_appears_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "λ")
    write_text(tmp_path / "a.txt", "τ")
    assert listing(tmp_path) == {"a.txt": "τ".encode()}


def record(name: str, license: str | None, reference: str = "runs/x") -> SourceRecord:
    return SourceRecord(name, reference, name * 64, license)


@pytest.mark.parametrize(
    ("licenses", "binding"),
    [
        (["mit", "apache-2.0"], "apache-2.0"),
        (["Apache-2.0", "mit", "cc-by-4.0"], "cc-by-4.0"),
        (["mit"], "mit"),
        (["mit", None], None),  # a source that states nothing binds to nothing that could be named
        (["mit", "llama3"], None),
        (["mit", "mpl-2.0"], "mpl-2.0"),  # permissive < weak copyleft < copyleft < non-commercial
        (["lgpl-3.0", "gpl-2.0", "cc-by-4.0"], "gpl-2.0"),
        (["agpl-3.0", "cc-by-nc-4.0", "mit"], "cc-by-nc-4.0"),
        (["gpl-3.0", "agpl-3.0"], "agpl-3.0"),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0"),
        (["mit, cc-by-sa-4.0", "apache-2.0"], "cc-by-sa-4.0"),  # several of one source
        (["mit, llama3"], None),
        (["other"], None),
        ([], None),
    ],
)
def test_the_most_restrictive_licence_is_named_only_where_it_is_certain(
    licenses: list[str | None], binding: str | None
) -> None:
    assert most_restrictive(licenses) == binding


def test_a_licence_is_read_from_the_card(tmp_path: Path) -> None:
    assert stated_license(None) is None and stated_license(tmp_path) is None
    card = tmp_path / "README.md"
    for text, stated in [
        ("---\ntags:\n- x\nlicense: 'mit'\n---\nlicense: gpl\n", "mit"),
        ("no front matter\nlicense: gpl\n", None),
        ("---\ntags: []\n---\n", None),
        ("---\r\nlicense: MIT\r\n---\r\n", "MIT"),
        ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", "mit, cc-by-4.0"),
        ("---\nlicense: [mit]\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\n---\n", "llama3.1"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: mit\nlicense_name: not for us\n---\n", "mit"),
        ("---\nlicense_name: tongyi\n---\n", "tongyi"),
        ("---\nlicense: [mit, other]\nlicense_name: [a, b]\n---\n", "mit, a, b"),
        ("---\nlicense: null\n---\n", None),
        ("---\ndate: 2024-13-99\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: 'my |\n\n  own'\n---\n", "my own"),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: mit # free\n---\n", "mit"),
        ("---\ntags: [unclosed\nlicense: 'mit'\n---\n", "mit"),  # damaged, but that line can be read
    ]:
        card.write_text(text)
        assert stated_license(tmp_path) == stated


def test_a_card_names_sources_licences_and_recipe() -> None:
    text = model_card(
        "My merge", "Method: Ties(density=0.2).", "method: Ties\nseed: 0\n", record("base", "mit", "owner/name@v1"),
        [record("a", "apache-2.0"), record("b", "mit", "owner/b@main")], {"seed": "0"}, "| x |\n",
    )  # fmt: skip
    front = yaml.safe_load(text.split("---")[1])
    assert front["tags"] == ["merge", "lightning-merge"] and front["license"] == "apache-2.0"
    assert front["base_model"] == ["owner/name", "owner/b"] and front["base_model_relation"] == "merge"
    assert (
        "| base | base | `owner/name@v1` |" in text
        and "| model | a | `runs/x` | `aaaaaaaaaaaaaaaa…` | apache-2.0 |" in text
    )
    assert "```yaml\nmethod: Ties\nseed: 0\n```" in text and "# My merge\n" in text
    assert text.endswith("## Results\n\n| x |\n")
    unclear = model_card("t", "m", "r", None, [record("a", None)], {})
    assert "license" not in yaml.safe_load(unclear.split("---")[1]) and "not stated" in unclear
    assert "base_model" not in unclear and "## Results" not in unclear


def test_results_are_put_into_a_card_once() -> None:
    text = model_card("t", "m", "r", None, [record("a", "mit")], {})
    twice = with_results(with_results(text, "| old |"), "| new |")
    assert twice.endswith("## Results\n\n| new |\n") and "old" not in twice and twice.count("## Results") == 1
    assert twice.startswith(text.rstrip())


def verdict(*licenses: str | None, link: str | None = None) -> str:
    named = zip("abc", licenses, strict=False)
    return licence_verdict([SourceRecord(name, "runs/x", name * 64, license, link) for name, license in named])


def test_the_verdict_names_the_most_restrictive_and_what_a_person_must_judge() -> None:
    assert verdict("mit", "apache-2.0") == "The most restrictive licence stated is apache-2.0."
    assert verdict("mit", "llama3", link="https://example.org/l") == (
        "Of the licences known here the most restrictive is mit. A person must judge: "
        "llama3 (`b`, https://example.org/l). Read them before sharing this model."
    )
    assert verdict("mit", None, None) == (
        "Of the licences known here the most restrictive is mit. No licence is stated by: `b`, `c`. "
        "Read them before sharing this model."
    )
    assert (
        verdict("gemma, llama3")
        == "A person must judge: gemma (`a`); llama3 (`a`). Read them before sharing this model."
    )
    assert verdict(None) == "No licence is stated by: `a`. Read them before sharing this model."


def test_licences_that_may_contradict_each_other_are_named() -> None:
    assert verdict("gpl-3.0", "cc-by-nc-4.0", "mit").endswith(
        "is cc-by-nc-4.0. A person must judge whether gpl-3.0 and cc-by-nc-4.0 can be met at once."
    )
    assert "at once" not in verdict("gpl-3.0", "GPL-3.0", "apache-2.0")
    assert verdict("cc-by-nd-4.0").endswith("cc-by-nd-4.0 allows no derived works, and a merge is one.")


def test_a_card_shows_where_a_merge_came_from(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert")
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3.1\nlicense_link: https://example.org/l\n---\n"
    )
    source = SourceRecord.of("a", open_weights(folder), "a" * 64)
    assert source.license == "llama3.1" and source.license_link == "https://example.org/l"
    provenance = Provenance({"lightning_merge": "0.1.0", "torch": "2.13.0"}, {"merge": 7}, 1.23456, 0.5)
    text = model_card("t", "m", "seed: 7", record("base", "mit"), [source], {}, "| x |", provenance)
    assert "| `aaaaaaaaaaaaaaaa…` | [llama3.1](https://example.org/l) |" in text
    assert text.partition("## Provenance\n\n")[2].startswith(
        "- seeds: merge 7\n- versions: lightning_merge 0.1.0, torch 2.13.0\n- seconds of merging: 1.235\n"
        "- seconds of hashing the sources, apart: 0.500\n"
        f"- sha256 of `base`: `{'base' * 64}`\n- sha256 of `a`: `{'a' * 64}`\n"
    )
    assert text.index("## Recipe") < text.index("## Provenance") < text.index("## Results")
    assert "## Provenance" in with_results(text, "| y |")
    assert "## Provenance" not in model_card("t", "m", "r", None, [source], {})
    bare = Provenance().lines([source])
    assert bare == [f"- sha256 of `a`: `{'a' * 64}`"]


def test_a_link_that_is_no_address_is_not_made_one() -> None:
    for link in ("LICENSE", "javascript:alert(1)", "https://x.org/) <b>"):
        text = model_card("t", "m", "r", None, [SourceRecord("a", "runs/x", "a" * 64, "llama3", link)], {})
        assert "| llama3 |" in text and "](" not in text.split("## Recipe")[0]
