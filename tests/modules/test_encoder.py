from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import clip_config, save_bert

from lightning_merge.errors import UserError
from lightning_merge.modules import Encoder, ImageProcessor, base_sha256, build_vit


def test_mean_pooling_ignores_padding(bert: Path) -> None:
    encoder = Encoder.from_pretrained(bert)
    texts = ["good", "the film is very very good"]
    together = encoder(**encoder.preprocess(texts))
    apart = torch.cat([encoder(**encoder.preprocess([text])) for text in texts])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    hidden = encoder.backbone(**encoder.preprocess(texts[:1])).last_hidden_state
    torch.testing.assert_close(together[:1], hidden.mean(1), atol=1e-5, rtol=1e-5)


def test_the_poolings_are_what_they_say(bert: Path) -> None:
    for pooling in ("mean", "cls", "pooler"):
        encoder = Encoder.from_pretrained(bert, pooling)
        tensors = encoder.preprocess(["good film"])
        output = encoder.backbone(**tensors)
        expected = {
            "mean": output.last_hidden_state.mean(1),
            "cls": output.last_hidden_state[:, 0],
            "pooler": output.pooler_output,
        }
        torch.testing.assert_close(encoder(**tensors), expected[pooling])
    with pytest.raises(UserError, match=r"Unknown pooling 'clss'.*Did you mean 'cls'"):
        Encoder.from_pretrained(bert, "clss")  # type: ignore[arg-type]


def test_pairs_are_two_segments_and_differ_from_their_joined_text(bert: Path) -> None:
    encoder = Encoder.from_pretrained(bert)
    tensors = encoder.preprocess([("good film", "bad")])
    assert tensors["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]
    assert tensors["input_ids"].shape == (1, 6)  # [CLS] good film [SEP] bad [SEP]
    swapped = encoder(**encoder.preprocess([("bad", "good film")]))
    assert not torch.allclose(encoder(**tensors), swapped)


def test_texts_are_cut_at_max_length_and_a_length_the_model_lacks_is_refused(bert: Path) -> None:
    assert Encoder.from_pretrained(bert, max_length=4).preprocess(["the film is very good"])["input_ids"].shape == (
        1,
        4,
    )
    with pytest.raises(UserError, match=r"from 2 to 64 tokens.*got 65"):
        Encoder.from_pretrained(bert, max_length=65)


def test_only_the_pooler_is_unused_and_only_where_it_is_not_asked_for(bert: Path, vit: Path) -> None:
    for folder in (bert, vit):
        assert sorted(Encoder.from_pretrained(folder, "cls").unused_parameters()) == [
            "backbone.pooler.dense.bias",
            "backbone.pooler.dense.weight",
        ]
    assert Encoder.from_pretrained(bert, "pooler").unused_parameters() == []


def test_loading_is_silent_and_leaves_random_state_and_settings_alone(
    bert: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    state, shown, level = torch.random.get_rng_state(), logging.is_progress_bar_enabled(), logging.get_verbosity()
    encoder = Encoder.from_pretrained(bert)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert torch.equal(state, torch.random.get_rng_state())
    assert (shown, level) == (logging.is_progress_bar_enabled(), logging.get_verbosity())
    assert not encoder.training
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_a_base_without_pooler_loads_for_mean_and_is_refused_for_pooler(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "pooler" not in name},
        bert / "model.safetensors",
        {"format": "pt"},
    )
    first, second = Encoder.from_pretrained(bert), Encoder.from_pretrained(bert)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(UserError, match=r"pooler.dense"):
        Encoder.from_pretrained(bert, "pooler")


def test_a_missing_layer_is_refused_by_name(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack the tensor 'encoder.layer.1.output.dense.weight'"):
        Encoder.from_pretrained(bert)


def test_given_tensors_replace_the_folders_under_the_names_of_its_files(vit: Path, bert: Path) -> None:
    for folder in (vit, bert):
        stored = load_file(folder / "model.safetensors")
        doubled = {name: 2 * value for name, value in stored.items()}
        encoder = Encoder.from_pretrained(folder, tensors=doubled)
        plain = Encoder.from_pretrained(folder)
        for (name, value), (_, other) in zip(encoder.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(value, 2 * other, msg=name)
        # and are copied: training the encoder must not write into what the caller holds
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.zero_()
        assert all(torch.equal(value, 2 * stored[name]) for name, value in doubled.items())
        # what is not given stays the folder's
        name = next(name for name in stored if name.endswith("key.weight"))
        changed = [
            key
            for (key, value), (_, other) in zip(
                Encoder.from_pretrained(folder, tensors={name: doubled[name]}).named_parameters(),
                plain.named_parameters(),
                strict=True,
            )
            if not torch.equal(value, other)
        ]
        assert len(changed) == 1
    with pytest.raises(UserError, match=r"Unknown tensor 'pooler.dense.weigth'.*Did you mean 'pooler.dense.weight'"):
        Encoder.from_pretrained(bert, tensors={"pooler.dense.weigth": torch.zeros(1)})


def test_what_cannot_be_a_base_is_refused(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(UserError, match=r"Nothing is at"):
        Encoder.from_pretrained(tmp_path / "absent")
    with pytest.raises(UserError, match=r"Nothing is at"):  # its parent is a folder here: no look-up on the network
        Encoder.from_pretrained(f"{tmp_path}/absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config.json"):
        Encoder.from_pretrained(tmp_path / "empty")
    whole = (bert / "model.safetensors").read_bytes()
    (bert / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"is truncated"):
        Encoder.from_pretrained(bert)
    (bert / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model.safetensors"):
        Encoder.from_pretrained(bert)


def test_inputs_of_the_wrong_kind_are_refused(bert: Path, vit: Path) -> None:
    with pytest.raises(UserError, match=r"text model got images"):
        Encoder.from_pretrained(bert).preprocess(torch.zeros(1, 8, 8, dtype=torch.uint8))
    images = Encoder.from_pretrained(vit)
    with pytest.raises(UserError, match=r"image model got texts"):
        images.preprocess(["good"])
    with pytest.raises(UserError, match=r"torch.float32"):
        images.preprocess(torch.zeros(1, 8, 8))


# --- images -----------------------------------------------------------------------------------------------------


def test_pixels_are_scaled_and_normalised_worked_by_hand() -> None:
    image = np.full((1, 2, 2, 3), (0, 255, 51), dtype=np.uint8)
    processor = ImageProcessor((2, 2), 3, mean=(0.5, 0.5, 0.1), std=(0.5, 0.25, 0.2))
    pixels = processor(image)["pixel_values"]
    assert pixels.shape == (1, 3, 2, 2)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-1.0, 2.0, 0.5]))


def test_grey_is_repeated_and_colour_becomes_luma() -> None:
    grey = torch.arange(4, dtype=torch.uint8).reshape(1, 2, 2) * 60
    pixels = ImageProcessor((2, 2), 3)(grey)["pixel_values"]
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    red = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    red[..., 0] = 255
    torch.testing.assert_close(
        ImageProcessor((2, 2), 1, (0.0,), (1.0,))(red)["pixel_values"], torch.full((1, 1, 2, 2), 0.299)
    )


def test_resizing_keeps_constants_and_orientation() -> None:
    processor = ImageProcessor((8, 8), 1, (0.0,), (1.0,))
    constant = processor(torch.full((1, 28, 28), 102, dtype=torch.uint8))["pixel_values"]
    torch.testing.assert_close(constant, torch.full((1, 1, 8, 8), 0.4))
    top = torch.zeros(1, 28, 28, dtype=torch.uint8)
    top[:, :14] = 255
    halves = processor(top)["pixel_values"][0, 0]
    assert halves[:3].min() > 0.95 and halves[5:].max() < 0.05


def test_normalisation_is_read_from_the_folder(vit: Path) -> None:
    assert Encoder.from_pretrained(vit).processor.mean == (0.5,)
    (vit / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1], "image_std": [0.2]}))
    white = Encoder.from_pretrained(vit).preprocess(torch.full((1, 8, 8), 255, dtype=torch.uint8))["pixel_values"]
    torch.testing.assert_close(white, torch.full((1, 1, 8, 8), 4.5))
    (vit / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2]}))
    with pytest.raises(UserError, match=r"image_mean.*3 values.*1 channels"):
        Encoder.from_pretrained(vit)


def test_a_built_vit_is_seeded_and_round_trips_as_a_base(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    first, second = build_vit(seed=3), build_vit(seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(build_vit(seed=4).parameters())) or any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), build_vit(seed=4).parameters(), strict=True)
    )
    first.save_pretrained(tmp_path / "base")
    loaded = Encoder.from_pretrained(tmp_path / "base")
    images = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    assert loaded.pooling == "cls" and loaded.dim == 64 and loaded.kind == "image"
    torch.testing.assert_close(loaded(**loaded.preprocess(images)), first(**first.preprocess(images)), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [{"image_size": 15}, {"heads": 3}, {"patch_size": 0}])
def test_sizes_that_do_not_divide_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"multiple"):
        build_vit(**wrong)


def test_the_vision_tower_of_a_full_clip_model_is_its_image_embedding(tmp_path: Path) -> None:
    from transformers import CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(clip_config(projection=6)).eval()
    model.save_pretrained(tmp_path / "clip")
    encoder = Encoder.from_pretrained(tmp_path / "clip")
    assert encoder.kind == "image" and encoder.dim == 6 and encoder.pooling == "pooler"
    tensors = encoder.preprocess(torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8))
    expected = model.get_image_features(**tensors)
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    torch.testing.assert_close(encoder(**tensors), expected)


def test_clip_vision_folders_load_with_and_without_projection(tmp_path: Path) -> None:
    from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

    vision = clip_config().vision_config
    vision.projection_dim = 6
    for model_class, dim in ((CLIPVisionModelWithProjection, 6), (CLIPVisionModel, 8)):
        folder = tmp_path / model_class.__name__
        model = model_class(vision).eval()
        model.save_pretrained(folder)
        encoder = Encoder.from_pretrained(folder)
        tensors = encoder.preprocess(torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8))
        output = model(**tensors)
        assert encoder.dim == dim
        torch.testing.assert_close(encoder(**tensors), output.image_embeds if dim == 6 else output.pooler_output)


# --- hashes -----------------------------------------------------------------------------------------------------


def test_the_hash_is_sha256_of_the_file_and_follows_a_change(bert: Path) -> None:
    import hashlib

    path = bert / "model.safetensors"
    assert base_sha256(bert) == hashlib.sha256(path.read_bytes()).hexdigest()
    weights = load_file(path)
    weights["pooler.dense.bias"] = weights["pooler.dense.bias"] + 1
    save_file(weights, path, {"format": "pt"})
    assert base_sha256(bert) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_shards_have_one_hash_and_a_missing_one_is_named(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = save_bert(tmp_path / "bert")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            (tmp_path / "sharded" / name).write_bytes((folder / name).read_bytes())
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    assert len(base_sha256(tmp_path / "sharded")) == 64
    whole, parts = Encoder.from_pretrained(folder), Encoder.from_pretrained(tmp_path / "sharded")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    shards[0].unlink()
    with pytest.raises(UserError, match=shards[0].name):
        Encoder.from_pretrained(tmp_path / "sharded")
