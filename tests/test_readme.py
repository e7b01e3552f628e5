"""What the README shows is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_merge.cli import VERBS
from lightning_merge.method_pages import method_markdown
from lightning_merge.methods import available_methods

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_method_table_is_the_generated_one() -> None:
    shown = re.search(r"<!-- methods:begin -->\n(.*?)<!-- methods:end -->", README, re.DOTALL)
    assert shown is not None
    # Other tests define methods of their own, and those are found too.
    ours = {name: kind for name, kind in available_methods().items() if kind.__module__.startswith("lightning_merge.")}
    assert shown.group(1).strip() == method_markdown(ours).strip(), "run: python benchmarks/readme_tables.py"


def test_its_verbs_and_configs_exist() -> None:
    assert set(re.findall(r"lightning-merge (\w+)", README)) <= set(VERBS)
    configs = re.findall(r"configs/[\w/]+\.yaml", README)
    assert configs and all((ROOT / config).is_file() for config in configs)


def test_its_pictures_and_links_exist() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.stem)
def test_every_config_says_what_it_is_for(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("#")
