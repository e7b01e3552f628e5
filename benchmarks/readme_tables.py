"""Write the method table, and the table and picture of a finished quick start, into the README.

python benchmarks/readme_tables.py [runs/quickstart]
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from lightning_merge.method_pages import method_markdown
from lightning_merge.methods import available_methods

ROOT = Path(__file__).resolve().parent.parent


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between the markers of ``name``."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match.group(1)}\n{content.strip()}\n\n{match.group(2)}", text)


def main() -> None:
    """Fill the README in place."""
    readme = ROOT / "README.md"
    text = fill(readme.read_text(encoding="utf-8"), "methods", method_markdown(available_methods()))
    if len(sys.argv) > 1:
        run = Path(sys.argv[1])
        picture = ROOT / "benchmarks" / "quickstart_tasks.png"
        shutil.copyfile(run / "plots" / "tasks.png", picture)
        table = (run / "results.md").read_text(encoding="utf-8")
        table = re.sub(r"^## ", "### ", table.strip(), flags=re.MULTILINE)
        shown = f"{table}\n\n![Accuracy of each model on each task](benchmarks/quickstart_tasks.png)"
        text = fill(text, "quickstart", shown)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
