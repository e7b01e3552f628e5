"""An adapter taken out of a full model is its change, to the error that is stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_merge.adapters import extract_adapter
from lightning_merge.errors import UserError
from lightning_merge.weights import open_weights
from lightning_merge.weights.adapters import open_adapter

peft = pytest.importorskip("peft")
from adapter_files import check_close, deltas_by_peft, finetune, lora, relative, save_adapter, save_base, truncated  # noqa: E402

KINDS = ("llama", "gpt2", "bert", "vit")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(folder / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 99])
def test_an_extracted_adapter_is_the_change_to_the_stated_error(
    kind: str, rank: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    tuned = finetune(tmp_path / "tuned", bases[kind], kind)
    report = extract_adapter(bases[kind], tuned, tmp_path / "adapter", rank=rank)
    start, model = open_weights(bases[kind]), open_weights(tuned)
    found = deltas_by_peft(tmp_path, bases[kind], kind, tmp_path / "adapter")
    ours = open_adapter(tmp_path / "adapter", start)
    assert len(report.errors) == len(ours.modules) > 0
    for name in start.tensors:
        change = model.read(name).double() - start.read(name).double()
        if name not in ours.modules:
            assert not found[name].any()
            assert report.lost[name] == pytest.approx(change.norm().item())
            continue
        error = report.errors[ours.modules[name].name]
        assert relative(found[name], change) == pytest.approx(error, abs=3e-7)
        matrix = change.T if ours.modules[name].transposed else change
        assert error == pytest.approx(relative(truncated(matrix, rank), matrix), abs=3e-7)
        assert (error < 1e-7) == (rank >= min(matrix.flatten(1).shape))
    assert set(report.lost) | set(ours.modules) == set(start.tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_matrix_can_be_saved_whole(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    tuned = finetune(tmp_path / "tuned", bases[kind], kind)
    target = r".*(attn|attention|mlp|intermediate|output|projection|head|classifier|pooler).*"
    report = extract_adapter(bases[kind], tuned, tmp_path / "adapter", rank=99, rest="save", target=target)
    start, model = open_weights(bases[kind]), open_weights(tuned)
    # a bare parameter beside modules belongs to none that could be saved, and a copy of a tied tensor would untie it
    unsaved = ("cls_token", "position_embeddings", "wte.weight")
    assert set(report.lost) == {name for name in start.tensors if name.endswith(unsaved)}
    assert bool(report.notes) == (kind in {"vit", "gpt2"})
    found = deltas_by_peft(tmp_path, bases[kind], kind, tmp_path / "adapter")
    for name in set(start.tensors) - set(report.lost):
        change = model.read(name).double() - start.read(name).double()
        assert relative(found[name], change) < 1e-6, name


def test_a_tied_embedding_is_extracted_with_a_word_of_warning(bases: dict[str, Path], tmp_path: Path) -> None:
    tuned = finetune(tmp_path / "tuned", bases["gpt2"], "gpt2", only="wte")
    report = extract_adapter(bases["gpt2"], tuned, tmp_path / "adapter", rank=99, target=["wte"])
    assert "output layer" in report.notes[0]
    found = deltas_by_peft(tmp_path, bases["gpt2"], "gpt2", tmp_path / "adapter")
    start, model = open_weights(bases["gpt2"]), open_weights(tuned)
    name = "transformer.wte.weight"
    assert relative(found[name], model.read(name).double() - start.read(name).double()) < 1e-6


def test_energy_chooses_a_rank_for_each_matrix(bases: dict[str, Path], tmp_path: Path) -> None:
    tuned = finetune(tmp_path / "tuned", bases["llama"], "llama", only="self_attn")
    report = extract_adapter(bases["llama"], tuned, tmp_path / "adapter", energy=0.8)
    start, model = open_weights(bases["llama"]), open_weights(tuned)
    ranks = set()
    for module, rank in report.ranks.items():
        change = model.read(f"{module}.weight").double() - start.read(f"{module}.weight").double()
        squares = torch.linalg.svdvals(change).square()
        held = squares.cumsum(0) / squares.sum()
        assert held[rank - 1] >= 0.8 and (rank == 1 or held[rank - 2] < 0.8)
        assert report.errors[module] == pytest.approx((1 - held[rank - 1].item()) ** 0.5)
        ranks.add(rank)
    assert len(ranks) > 1 and report.lost == {}
    found = deltas_by_peft(tmp_path, bases["llama"], "llama", tmp_path / "adapter")
    for module, error in report.errors.items():
        change = model.read(f"{module}.weight").double() - start.read(f"{module}.weight").double()
        assert relative(found[f"{module}.weight"], change) == pytest.approx(error, abs=1e-6)


def test_an_adapter_is_extracted_again_without_loss(bases: dict[str, Path], tmp_path: Path) -> None:
    """An opened adapter is a model like any other; what it changes has the rank it says."""
    base = open_weights(bases["llama"])
    adapter = save_adapter(tmp_path / "a", bases["llama"], "llama", lora(target_modules=["q_proj", "down_proj"]))
    report = extract_adapter(base, open_adapter(adapter, base), tmp_path / "again", rank=3)
    assert report.error < 1e-6 and report.lost == {}
    expected = deltas_by_peft(tmp_path, bases["llama"], "llama", adapter)
    check_close(deltas_by_peft(tmp_path, bases["llama"], "llama", tmp_path / "again"), expected, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"energy": 90.0}, r"energy must be in \(0, 1\], got 90. Did you mean 0.9"),
        ({"rank": 4, "energy": 0.9}, "Expected one of them"),
        ({"target": ["q_prj"]}, "'q_prj' names no module.*Did you mean 'q_proj'"),
        ({"rest": "keep"}, "Unknown rest 'keep'"),
    ],
)
def test_extraction_refuses_what_makes_no_sense(
    options: dict[str, Any], message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    tuned = finetune(tmp_path / "tuned", bases["llama"], "llama")
    with pytest.raises(UserError, match=message):
        extract_adapter(bases["llama"], tuned, tmp_path / "adapter", **options)
    with pytest.raises(UserError, match="equals"):
        extract_adapter(bases["llama"], bases["llama"], tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_large_matrices_are_truncated_as_well_as_small_ones() -> None:
    from lightning_merge.low_rank import truncate

    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(1100, 40, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(1060, 40, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -2, 40, dtype=torch.float64)
    low = truncate((left * values) @ right.T, 10)
    assert low.error == pytest.approx((values[10:].norm() / values.norm()).item(), rel=1e-6)
