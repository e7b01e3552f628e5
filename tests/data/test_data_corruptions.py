"""Corruptions: a result depends on row, seed and severity alone; more severity changes more; nothing is mutated."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from lightning_merge.data import IMAGE_CORRUPTIONS, TEXT_CORRUPTIONS, Corruption
from lightning_merge.errors import UserError

TEXTS = [f"The quick brown fox number {row} jumps over many lazy dogs and returns home again" for row in range(40)]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    return zoom(load_digits().images[:24] * 15.9, (1, 3, 3), order=1).astype(np.uint8)  # (24, 24, 24)


def clean(name: str, images: np.ndarray) -> object:
    return images if name in IMAGE_CORRUPTIONS else TEXTS


def same(left: object, right: object) -> bool:
    return bool(np.array_equal(left, right)) if isinstance(left, np.ndarray) else left == right


NAMES = [*IMAGE_CORRUPTIONS, *TEXT_CORRUPTIONS]


@pytest.mark.parametrize("name", NAMES)
def test_batch_and_order_do_not_matter(name: str, images: np.ndarray) -> None:
    inputs = clean(name, images)
    before = inputs.copy()  # type: ignore[attr-defined]
    corruption = Corruption(name, 4, seed=1)
    rows = np.arange(len(inputs))  # type: ignore[arg-type]
    whole = corruption(inputs, rows)
    assert same(inputs, before), "the given inputs must stay as they are"
    order = np.random.default_rng(0).permutation(rows)
    for row in order[:8]:
        alone = corruption(inputs[row : row + 1], [row])  # type: ignore[index]
        assert same(alone[0], whole[row])
    assert not same(whole, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_severity_is_monotone(name: str, images: np.ndarray) -> None:
    inputs = clean(name, images)
    rows = np.arange(len(inputs))  # type: ignore[arg-type]
    amounts = []
    for severity in range(1, 6):
        result = Corruption(name, severity)(inputs, rows)
        if isinstance(result, np.ndarray):
            amounts.append(np.abs(result.astype(float) - images).mean())
        elif name == "word_drop":
            amounts.append(sum(len(a.split()) - len(b.split()) for a, b in zip(TEXTS, result, strict=True)))
        elif name == "case":
            amounts.append(sum(x != y for a, b in zip(TEXTS, result, strict=True) for x, y in zip(a, b, strict=True)))
        else:
            words = [zip(a.split(), b.split(), strict=False) for a, b in zip(TEXTS, result, strict=True)]
            amounts.append(sum(x != y for pairs in words for x, y in pairs))
    assert all(low < high for low, high in pairwise(amounts)), amounts
    assert amounts[0] > 0


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", *TEXT_CORRUPTIONS])
def test_random_corruptions_differ_by_seed_and_row(name: str, images: np.ndarray) -> None:
    inputs = clean(name, images)
    rows = np.arange(len(inputs))  # type: ignore[arg-type]
    assert not same(Corruption(name, 3, seed=0)(inputs, rows), Corruption(name, 3, seed=1)(inputs, rows))
    assert not same(Corruption(name, 3)(inputs, rows), Corruption(name, 3)(inputs, rows + 1000))


def test_a_heavier_impulse_hits_a_superset_of_pixels(images: np.ndarray) -> None:
    grey = np.full_like(images, 128)
    hits = [Corruption("impulse_noise", severity)(grey, range(24)) != 128 for severity in (1, 5)]
    assert hits[1][hits[0]].all()
    assert hits[1].mean() == pytest.approx(0.17, abs=0.01)


def test_worked_values() -> None:
    image = np.array([[[0, 100], [100, 200]]], dtype=np.uint8)
    assert Corruption("contrast", 2)(image, [0]).tolist() == [[[40, 100], [100, 160]]]  # 100 + 0.6 (x - 100)
    ramp = np.tile(np.arange(0, 100, 10, dtype=np.uint8), (10, 1))[None]
    assert Corruption("pixelate", 3)(ramp, [0])[0, 0].tolist() == [5, 5, 25, 25, 45, 45, 65, 65, 85, 85]  # halves
    flat = np.full((1, 11, 9), 77, dtype=np.uint8)
    for name in ("blur", "contrast", "pixelate"):
        assert (Corruption(name, 5)(flat, [0]) == 77).all()
    middle = np.full((1, 11, 9), 128, dtype=np.uint8)
    assert (Corruption("jpeg", 5)(middle, [0]) == 128).all()


def test_colour_images_keep_shape_and_grey_stays_grey(images: np.ndarray) -> None:
    colour = np.repeat(images[..., None], 3, axis=-1)
    for name in IMAGE_CORRUPTIONS:
        result = Corruption(name, 3)(colour, range(24))
        assert result.shape == colour.shape and result.dtype == np.uint8
        if name != "gaussian_noise":
            assert (result[..., 0] == result[..., 2]).all()


def test_texts_keep_what_they_must() -> None:
    assert Corruption("word_drop", 5)(["alone", ""], [0, 1]) == ["alone", ""]
    result = Corruption("typos", 5)(["1234 567, 89!"], [0])
    assert result == ["1234 567, 89!"], "only letters are touched"
    swapped = Corruption("case", 5)(TEXTS, range(40))
    assert [text.lower() for text in swapped] == [text.lower() for text in TEXTS]


def test_pairs_are_corrupted_part_by_part() -> None:
    pair = (TEXTS[0], TEXTS[0])
    ((first, second),) = Corruption("typos", 5)([pair], [0])
    assert first != second and first != TEXTS[0] and second != TEXTS[0]


def test_names_severities_and_kinds_are_checked() -> None:
    with pytest.raises(UserError, match="Did you mean 'typos'"):
        Corruption("typo")
    for severity in (0, 6, 2.5, True):
        with pytest.raises(UserError, match="1 to 5"):
            Corruption("blur", severity)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="got 'x'"):
        Corruption.parse("typos-x")
    with pytest.raises(UserError, match="does not apply to texts"):
        Corruption("blur")(TEXTS, range(40))
    assert str(Corruption("word_drop", 2)) == "word_drop-2"
    assert Corruption.parse("word_drop-2") == Corruption("word_drop", 2)
    assert Corruption.parse("word_drop") == Corruption("word_drop", 3)
