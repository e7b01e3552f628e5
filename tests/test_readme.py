"""What the README shows is what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

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


class MyModule(L.LightningModule):
    """What the example of adaptation asks of a user's module: features, and a classifier of the task's own size."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder, self.classifier = nn.Linear(4, 8), nn.Linear(8, classes)

    def features(self, inputs: Tensor) -> Tensor:
        return self.encoder(inputs).tanh()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classifier(self.features(inputs))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def test_its_example_of_adaptation_runs_with_heads_of_different_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, and shorter; heads and the module's own classifier stay as they were loaded."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = MyModule()
    for name, classes in (("base", 2), ("cars", 5), ("sun", 3)):
        model = MyModule(classes)
        model.encoder.load_state_dict({n: v + 0.1 * torch.randn(v.shape) for n, v in base.encoder.state_dict().items()})
        trainer = L.Trainer(accelerator="cpu", logger=False)
        trainer.strategy.connect(model)
        trainer.save_checkpoint(f"{name}.ckpt")
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "CollapseGuard()" in code]
    shorter = example.replace('strategy="ddp"', 'accelerator="cpu"').replace("devices=4", "devices=1")
    shorter = shorter.replace("max_epochs=10", "max_epochs=1").replace(
        "limit_train_batches=50", "limit_train_batches=2"
    )
    shorter = shorter.replace("log_every", "enable_progress_bar=False, enable_checkpointing=False, log_every")
    assert len(shorter) != len(example)
    rows = torch.utils.data.TensorDataset(torch.randn(8, 4))
    loaders = {f"unlabeled_{task}": torch.utils.data.DataLoader(rows, 4) for task in ("cars", "sun")}
    found: dict[str, Any] = {"MyModule": MyModule, **loaders}
    exec(shorter, found)
    for task, classes in (("cars", 5), ("sun", 3)):
        kept = torch.load(f"{task}.ckpt", weights_only=True)["state_dict"]["classifier.weight"]
        assert torch.equal(found["heads"][task].weight, kept) and len(kept) == classes
    assert set(found["adamerging"].table()["cars"]) == {"encoder.weight", "encoder.bias"}
    merged = found["my_module"].state_dict()
    assert len(merged["classifier.weight"]) == 2 and {p.name for p in Path("trace").glob("*.png")} == {
        "trace.png",
        "coefficients.png",
    }
