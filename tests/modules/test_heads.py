from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_bert

from lightning_merge.errors import UserError
from lightning_merge.modules import (
    ClassEmbeddingHead,
    Encoder,
    LinearHead,
    class_embeddings,
    load_head,
    orthonormal_embeddings,
    save_head,
)
from lightning_merge.modules.heads import label_seed


def test_logits_are_scaled_cosines_worked_by_hand() -> None:
    head = ClassEmbeddingHead(torch.tensor([[2.0, 0.0], [3.0, 3.0]]), scale=10.0)
    logits = head(torch.tensor([[0.0, 5.0], [4.0, 3.0]]))
    expected = torch.tensor([[0.0, 10 / 2**0.5], [8.0, 7 / 5 / 2**0.5 * 10]])
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("factor", [1e-15, 1e-3, 7.0, 1e10])
def test_logits_do_not_depend_on_the_length_of_the_features(factor: float) -> None:
    head = ClassEmbeddingHead(orthonormal_embeddings(3, 5, seed=2))
    features = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(features * factor), head(features), rtol=1e-4, atol=1e-4)


def test_a_zero_feature_gives_no_nan() -> None:
    assert torch.equal(ClassEmbeddingHead(torch.eye(3))(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_logits_keep_fp32_under_autocast() -> None:
    head = ClassEmbeddingHead(orthonormal_embeddings(4, 64), scale=100.0)
    features = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(features))


def test_the_class_embedding_head_is_frozen_and_lets_gradients_through() -> None:
    head = ClassEmbeddingHead(torch.eye(3))
    features = torch.randn(2, 3, requires_grad=True)
    torch.nn.functional.cross_entropy(head(features), torch.tensor([0, 1])).backward()
    assert list(head.parameters()) == []
    assert features.grad is not None and features.grad.abs().sum() > 0
    assert set(head.state_dict()) == {"weight", "scale"}


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(UserError, match=r"scale"):
        ClassEmbeddingHead(torch.eye(2), scale)


def test_a_zero_class_embedding_is_refused() -> None:
    with pytest.raises(UserError, match=r"non-zero"):
        ClassEmbeddingHead(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_orthonormal_rows_are_orthonormal_seeded_and_leave_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    rows = orthonormal_embeddings(10, 64, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(rows.double() @ rows.double().T, torch.eye(10, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(rows, orthonormal_embeddings(10, 64, seed=3))
    assert not torch.equal(rows, orthonormal_embeddings(10, 64, seed=4))


def test_the_sign_that_qr_leaves_open_is_fixed() -> None:
    """With one class the answer is the Gaussian draw itself at unit length, not its opposite."""
    drawn = torch.randn(16, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(orthonormal_embeddings(1, 16, seed=5), (drawn / drawn.norm()).T.float())


def test_more_classes_than_dimensions_gives_unit_rows() -> None:
    rows = orthonormal_embeddings(20, 8)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(20))
    assert torch.linalg.matrix_rank(rows) == 8


def test_equal_classes_share_vectors_and_other_classes_do_not() -> None:
    assert label_seed(["a", "b"]) == label_seed(("a", "b"))
    assert (
        len({label_seed(["a", "b"]), label_seed(["b", "a"]), label_seed(["ab"]), label_seed(["a", "b"], seed=1)}) == 4
    )


def test_an_embedded_phrase_is_classified_as_its_class(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(save_bert(tmp_path / "bert"))
    phrases = ["good film", "bad food", "red", "the blue is very green"]
    rows = class_embeddings(encoder, phrases, batch_size=3)
    head = ClassEmbeddingHead(rows, scale=20.0)
    logits = head(encoder(**encoder.preprocess(phrases)))
    assert logits.argmax(-1).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(logits.diagonal(), torch.full((4,), 20.0), atol=1e-3, rtol=0)


def test_class_embeddings_are_computed_in_evaluation_mode_which_is_then_restored(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(save_bert(tmp_path / "bert", dropout=0.5)).train()
    first, second = class_embeddings(encoder, ["good", "bad"]), class_embeddings(encoder, ["good", "bad"])
    assert torch.equal(first, second)
    assert encoder.training and encoder.backbone.training


def test_a_phrase_for_two_classes_is_refused(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(save_bert(tmp_path / "bert"))
    with pytest.raises(UserError, match=r"'good' stands for two classes"):
        class_embeddings(encoder, ["good", "bad", "good"])


@pytest.mark.parametrize("kind", ["class_embedding", "linear"])
def test_a_saved_head_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    head = (
        LinearHead(5, 3, seed=1) if kind == "linear" else ClassEmbeddingHead(orthonormal_embeddings(3, 5), scale=12.5)
    )
    labels = ["a", "b, c", "ü"]
    path = tmp_path / "heads" / "task.safetensors"
    save_head(
        head, path, labels=labels, task="t", label_texts=["x", "y", "z"], base_sha256="ff", pooling="cls", max_length=9
    )
    loaded, info = load_head(path)
    assert type(loaded) is type(head)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in head.state_dict().items())
    assert info.labels == tuple(labels) and info.label_texts == ("x", "y", "z")
    assert (info.kind, info.task, info.dim, info.base_sha256, info.pooling, info.max_length) == (
        kind,
        "t",
        5,
        "ff",
        "cls",
        9,
    )
    assert info.scale == (12.5 if kind == "class_embedding" else None)
    assert [file.name for file in path.parent.iterdir()] == ["task.safetensors"]


def test_saving_with_the_wrong_number_of_labels_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 labels for 3 classes"):
        save_head(LinearHead(4, 3), tmp_path / "h.safetensors", labels=["a", "b"], task="t")
    assert list(tmp_path.iterdir()) == []


def good_metadata() -> dict[str, str]:
    return {"kind": "class_embedding", "task": "t", "labels": json.dumps(["a", "b"]), "dim": "3", "scale": "20.0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": None}, "no 'kind'"),
        ({"kind": "bilinear"}, "unknown kind 'bilinear'"),
        ({"labels": "[1, 2]"}, "list of strings"),
        ({"labels": "not json"}, "unreadable"),
        ({"labels": '["a"]'}, "shape"),
        ({"dim": "4"}, "shape"),
        ({"scale": "-2.0"}, "scale"),
        ({"scale": None}, "scale"),
        ({"pooling": "max"}, "pooling"),
        ({"label_texts": '["a"]'}, "1 label_texts for 2 labels"),
    ],
)
def test_a_contradictory_head_file_is_refused_by_name(
    tmp_path: Path, change: dict[str, str | None], message: str
) -> None:
    path = tmp_path / "broken.safetensors"
    metadata = {key: value for key, value in (good_metadata() | change).items() if value is not None}
    save_file({"weight": torch.eye(2, 3)}, path, metadata)
    with pytest.raises(UserError, match=message) as caught:
        load_head(path)
    assert "broken.safetensors" in str(caught.value)


def test_a_missing_truncated_or_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    save_head(LinearHead(4, 3), tmp_path / "whole.safetensors", labels=["a", "b", "c"], task="t")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-8])
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("cut", "text", "absent"):
        with pytest.raises(UserError, match=f"{name}.safetensors"):
            load_head(tmp_path / f"{name}.safetensors")


def test_a_head_with_nan_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.full((2, 3), float("nan"))}, tmp_path / "h.safetensors", good_metadata())
    with pytest.raises(UserError, match=r"not finite"):
        load_head(tmp_path / "h.safetensors")


def test_the_linear_head_is_an_affine_map_in_its_file(tmp_path: Path) -> None:
    head = LinearHead(4, 3, seed=5)
    save_head(head, tmp_path / "h.safetensors", labels=["a", "b", "c"], task="t")
    stored = load_file(tmp_path / "h.safetensors")
    features = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(features), features @ stored["weight"].T + stored["bias"])
