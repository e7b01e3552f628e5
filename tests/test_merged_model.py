from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lightning_merge.errors import UserError
from lightning_merge.merged_model import load
from lightning_merge.modules import (
    ClassEmbeddingHead,
    Encoder,
    LinearHead,
    build_vit,
    orthonormal_embeddings,
    save_head,
)
from lightning_merge.modules.blocks import correctable_blocks
from lightning_merge.modules.corrected import corrected_encoder
from lightning_merge.modules.correctors import Correctors

WORDS = ("good", "bad", "film", "food", "very", "not", "the", "is")
TEXTS = ["the film is very very good", "bad", "not good food", "the food is bad"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny text model with two heads: one of each kind, pooled differently."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(vocabulary)}, model_max_length=64)
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=0.5,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path)
    mood = ClassEmbeddingHead(orthonormal_embeddings(2, 16), scale=20.0)
    save_head(mood, tmp_path / "heads" / "mood.safetensors", labels=["bad", "good"], task="mood", pooling="mean")
    topic = LinearHead(16, 3)
    labels = ["film", "food", "other"]
    save_head(
        topic, tmp_path / "heads" / "v1.topic.safetensors", labels=labels, task="v1.topic", pooling="cls", max_length=5
    )
    return tmp_path


def test_answers_equal_those_computed_by_hand(folder: Path) -> None:
    model = load(folder)
    assert model.tasks == ["mood", "v1.topic"]

    encoder = Encoder.from_pretrained(folder, "mean")
    weight = load_file(folder / "heads" / "mood.safetensors")["weight"]
    for batch_size in (1, 3, 64):  # order of the answers is that of the inputs, whatever the batches
        rows = []
        for text in TEXTS:
            feature = encoder(**encoder.preprocess([text]))[0].detach()
            rows.append((20 * weight @ feature / feature.norm()).softmax(-1))
        prediction = model(TEXTS, task="mood", batch_size=batch_size)
        torch.testing.assert_close(prediction.probabilities, torch.stack(rows), atol=1e-5, rtol=1e-5)
        assert prediction.classes == ("bad", "good") and len(prediction) == 4
        assert prediction.labels == [("bad", "good")[int(row.argmax())] for row in rows]


def test_each_head_gets_the_pooling_and_length_it_was_trained_with(folder: Path) -> None:
    encoder = Encoder.from_pretrained(folder, "cls", max_length=5)
    tensors = load_file(folder / "heads" / "v1.topic.safetensors")
    logits = encoder(**encoder.preprocess(TEXTS)) @ tensors["weight"].T + tensors["bias"]
    model = load(folder)
    torch.testing.assert_close(model(TEXTS, "v1.topic").probabilities, logits.softmax(-1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model.features(TEXTS, "mood"), model.features(TEXTS, "v1.topic"))


def test_the_backbone_is_there_once_and_nothing_trains(folder: Path) -> None:
    model = load(folder)
    stored = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == stored
    assert not any(parameter.requires_grad for parameter in model.parameters())
    first = model(TEXTS, "mood").probabilities
    assert torch.equal(first, model.train()(TEXTS, "mood").probabilities)  # dropout stays off
    torch.testing.assert_close(first.sum(-1), torch.ones(4))


def test_one_string_and_pairs_are_accepted(folder: Path) -> None:
    model = load(folder)
    single = model("bad", "mood")
    assert len(single) == 1
    torch.testing.assert_close(single.probabilities, model(["bad"], "mood").probabilities)
    assert len(model([("bad", "good"), ("film", "food")], "mood")) == 2
    with pytest.raises(UserError, match=r"one pair or two texts"):
        model(("bad", "good"), "mood")


def test_the_task_may_be_left_out_with_one_head_only(folder: Path) -> None:
    with pytest.raises(UserError, match=r"name one. Known: mood, v1.topic"):
        load(folder)(TEXTS)
    (folder / "heads" / "v1.topic.safetensors").unlink()
    assert load(folder)(TEXTS).task == "mood"


def test_an_unknown_task_is_refused_with_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match=r"Unknown task 'moood'. Known: mood, v1.topic. Did you mean 'mood'"):
        load(folder)(TEXTS, task="moood")


def test_heads_may_lie_elsewhere_and_none_gives_features_only(folder: Path) -> None:
    elsewhere = folder / "other"
    (folder / "heads").rename(elsewhere)
    model = load(folder)
    assert model.tasks == [] and model.features(TEXTS).shape == (4, 16)
    with pytest.raises(UserError, match=r"no heads"):
        model(TEXTS)
    assert load(folder, heads=elsewhere).tasks == ["mood", "v1.topic"]
    with pytest.raises(UserError, match=r"does not exist"):
        load(folder, heads=folder / "absent")


def test_a_head_that_does_not_fit_is_refused_by_name(folder: Path) -> None:
    save_head(LinearHead(8, 2), folder / "heads" / "wide.safetensors", labels=["a", "b"], task="wide")
    with pytest.raises(UserError, match=r"wide.safetensors.*8 features.*gives 16"):
        load(folder)
    save_head(LinearHead(16, 2), folder / "heads" / "wide.safetensors", labels=["a", "b"], task="mood")
    with pytest.raises(UserError, match=r"second one for task 'mood'"):
        load(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent' does not exist"):
        load(tmp_path / "absent")


def test_images_are_answered_alone_and_together(tmp_path: Path) -> None:
    build_vit(image_size=8, hidden_size=16, layers=1, heads=2).save_pretrained(tmp_path)
    head = ClassEmbeddingHead(orthonormal_embeddings(3, 16))
    save_head(head, tmp_path / "heads" / "shapes.safetensors", labels=["a", "b", "c"], task="shapes")
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8)).astype(np.uint8)
    model = load(tmp_path)
    together = model(images, batch_size=2).probabilities
    for index, image in enumerate(images):
        torch.testing.assert_close(model(image).probabilities[0], together[index], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(torch.as_tensor(images)).probabilities, together)
    colour = np.repeat(images[..., None], 3, axis=-1)
    torch.testing.assert_close(model(colour).probabilities, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(colour[0]).probabilities, together[:1], atol=1e-5, rtol=1e-5)


def test_an_empty_list_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"empty"):
        load(folder)([], "mood")


# --- with correctors ------------------------------------------------------------------------------------------------


def put_correctors(folder: Path, tasks: list[str], version: int) -> Correctors:
    """Correctors whose effect can be seen, beside a model."""
    encoder = Encoder.from_pretrained(folder)
    correctors = Correctors(tasks, correctable_blocks(encoder, "") if version == 2 else (), rank=8)
    generator = torch.Generator().manual_seed(0)
    for task in tasks:
        for site in correctors.sites:
            corrector = correctors.of(task, site)
            corrector.begin(16, torch.device("cpu"))
            corrector.up.data = torch.randn(16, 8, generator=generator)
    correctors.save(folder)
    return correctors


@pytest.mark.parametrize("version", [1, 2])
def test_correctors_beside_the_weights_answer_for_the_task_that_is_named(folder: Path, version: int) -> None:
    plain = load(folder)
    correctors = put_correctors(folder, ["mood", "v1.topic"], version)
    model = load(folder)
    for task, pooling, length in (("mood", "mean", 64), ("v1.topic", "cls", 5)):
        encoder = Encoder.from_pretrained(folder, pooling, max_length=length)  # type: ignore[arg-type]
        features = corrected_encoder(encoder, correctors, task)(**encoder.preprocess(TEXTS))
        torch.testing.assert_close(model.features(TEXTS, task), features, atol=1e-5, rtol=1e-5)
        if version == 1:
            by_hand = correctors(plain.features(TEXTS, task), task)
            torch.testing.assert_close(features, by_hand, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(plain(TEXTS, task).probabilities, model(TEXTS, task).probabilities)
    sites = 1 if version == 1 else 3
    assert correctors.size("mood") == sites * 2 * 8 * 16
    assert model.stored_parameters == plain.stored_parameters + 2 * correctors.size("mood")
    assert model.active_parameters == plain.active_parameters + correctors.size("mood")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_task_without_a_corrector_is_not_answered_in_silence(folder: Path) -> None:
    put_correctors(folder, ["mood"], 1)
    model = load(folder)
    assert len(model(TEXTS, "mood")) == 4
    with pytest.raises(UserError, match=r"Unknown task of a corrector 'v1.topic'. Known: mood"):
        model(TEXTS, "v1.topic")
    with pytest.raises(UserError, match=r"corrected for a task; name one. Known: mood"):
        model.features(TEXTS)


def test_correctors_of_another_model_are_refused(folder: Path) -> None:
    put_correctors(folder, ["mood"], 2)
    correctors = Correctors(["mood"], rank=3)
    correctors.of("mood").begin(8, torch.device("cpu"))
    correctors.save(folder)
    with pytest.raises(UserError, match="features of size 8, the encoder gives 16"):
        load(folder)
