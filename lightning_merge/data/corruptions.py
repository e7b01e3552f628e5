"""Corruptions of raw inputs, severity 1 to 5: what a model meets outside the benchmark.

Each row draws from its own counter-based stream, keyed by corruption, seed and row number, so neither the order of rows
nor the batch they stand in changes a result. A higher severity uses the same draws: it changes more, never elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lightning_merge.data.task import philox
from lightning_merge.errors import UserError, unknown

Image = np.ndarray  # (H, W) or (H, W, 3), float64 in 0..255

# One entry a severity. Lengths are relative to the image's shorter side, so that 8 and 224 pixels look alike.
NOISE_DEVIATION = (0.04, 0.08, 0.12, 0.18, 0.26)  # of the full range
IMPULSE_RATE = (0.01, 0.03, 0.06, 0.10, 0.17)  # of the pixels
BLUR_RADIUS = (0.015, 0.025, 0.035, 0.045, 0.060)  # standard deviation as part of the side
CONTRAST_FACTOR = (0.75, 0.60, 0.45, 0.30, 0.15)
PIXELATE_SIZE = (0.80, 0.65, 0.50, 0.40, 0.30)  # blocks a side, as part of the pixels
JPEG_QUALITY = (25, 18, 13, 9, 6)
TYPO_RATE = (0.02, 0.04, 0.07, 0.11, 0.16)  # of the letters
CASE_RATE = (0.05, 0.15, 0.30, 0.50, 0.80)  # of the letters
DROP_RATE = (0.05, 0.10, 0.20, 0.30, 0.40)  # of the words

# The luminance table of the JPEG standard (ITU-T T.81, table K.1).
JPEG_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    dtype=np.float64,
)


def gaussian_noise(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Add normal noise to every value."""
    return image + 255.0 * NOISE_DEVIATION[severity - 1] * generator.standard_normal(image.shape)


def impulse_noise(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Set some pixels to black or white."""
    draw = generator.random(image.shape[:2])
    value = np.where(generator.random(image.shape[:2]) < 0.5, 0.0, 255.0)
    hit = draw < IMPULSE_RATE[severity - 1]
    if image.ndim == 3:
        hit, value = hit[..., None], value[..., None]
    return np.where(hit, value, image)


def blur(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Smooth with a normal kernel."""
    from scipy.ndimage import gaussian_filter

    radius = BLUR_RADIUS[severity - 1] * min(image.shape[:2])
    return gaussian_filter(image, (radius, radius) + (0.0,) * (image.ndim - 2), mode="nearest")


def contrast(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Draw all values towards the image's mean."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return mean + CONTRAST_FACTOR[severity - 1] * (image - mean)


def pixelate(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Replace blocks of pixels by their mean."""
    for axis in (0, 1):
        side = image.shape[axis]
        blocks = max(1, round(side * PIXELATE_SIZE[severity - 1]))
        block = np.arange(side) * blocks // side
        sums = np.zeros((blocks, side))
        sums[block, np.arange(side)] = 1.0
        means = sums / sums.sum(axis=1, keepdims=True)
        image = np.moveaxis(np.tensordot(means[block], image, axes=(1, axis)), 0, axis)
    return image


def jpeg(image: Image, severity: int, generator: np.random.Generator) -> Image:
    """Round the cosine coefficients of 8x8 blocks as JPEG does (all channels alike, no file is made)."""
    from scipy.fft import dctn, idctn

    scale = 5000.0 / JPEG_QUALITY[severity - 1] if JPEG_QUALITY[severity - 1] < 50 else 100.0
    table = np.clip(np.floor((JPEG_TABLE * scale + 50.0) / 100.0), 1.0, 255.0)
    channels = image[..., None] if image.ndim == 2 else image
    height, width, depth = channels.shape
    padded = np.pad(channels, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge") - 128.0
    blocks = padded.reshape(padded.shape[0] // 8, 8, padded.shape[1] // 8, 8, depth)  # (rows, 8, columns, 8, C)
    spectrum = dctn(blocks, axes=(1, 3), norm="ortho")
    grid = table[None, :, None, :, None]
    restored = idctn(np.round(spectrum / grid) * grid, axes=(1, 3), norm="ortho").reshape(padded.shape) + 128.0
    return restored[:height, :width].reshape(image.shape)


def typos(text: str, severity: int, generator: np.random.Generator) -> str:
    """Leave out, double, exchange or replace single letters."""
    draw = generator.random(len(text))
    way = generator.integers(0, 4, len(text))
    letter = generator.integers(0, 26, len(text))
    result = []
    held = ""  # a letter that waits to come after its successor
    for position, character in enumerate(text):
        if not character.isalpha() or draw[position] >= TYPO_RATE[severity - 1]:
            result.append(character + held)
            held = ""
        elif way[position] == 0:
            result.append(held)
            held = ""
        elif way[position] == 1:
            result.append(character * 2 + held)
            held = ""
        elif way[position] == 2:
            result.append(held)
            held = character
        else:
            result.append(chr(ord("a") + int(letter[position])) + held)
            held = ""
    return "".join(result) + held


def case(text: str, severity: int, generator: np.random.Generator) -> str:
    """Swap upper and lower case of single letters (an uncased tokenizer does not see it)."""
    draw = generator.random(len(text))
    swapped = (
        character.swapcase() if draw[position] < CASE_RATE[severity - 1] else character
        for position, character in enumerate(text)
    )
    return "".join(swapped)


def word_drop(text: str, severity: int, generator: np.random.Generator) -> str:
    """Leave out single words; at least one stays."""
    words = text.split()
    draw = generator.random(len(words))
    kept = [word for word, value in zip(words, draw, strict=True) if value >= DROP_RATE[severity - 1]]
    if not kept and words:
        kept = [words[int(np.argmax(draw))]]
    return " ".join(kept)


IMAGE_CORRUPTIONS: dict[str, Callable[[Image, int, np.random.Generator], Image]] = {
    "blur": blur,
    "contrast": contrast,
    "gaussian_noise": gaussian_noise,
    "impulse_noise": impulse_noise,
    "jpeg": jpeg,
    "pixelate": pixelate,
}
TEXT_CORRUPTIONS: dict[str, Callable[[str, int, np.random.Generator], str]] = {
    "case": case,
    "typos": typos,
    "word_drop": word_drop,
}


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity, as a function of raw inputs and row numbers.

    Args:
        name: images: ``blur``, ``contrast``, ``gaussian_noise``, ``impulse_noise``, ``jpeg``, ``pixelate``; texts:
            ``case``, ``typos``, ``word_drop``.
        severity: 1 (mild) to 5 (heavy).
        seed: which random draws.

    Raises:
        UserError: an unknown name or a severity outside 1..5.
    """

    name: str
    severity: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        known = [*IMAGE_CORRUPTIONS, *TEXT_CORRUPTIONS]
        if self.name not in known:
            raise unknown("corruption", self.name, known)
        if isinstance(self.severity, bool) or not isinstance(self.severity, int) or not 1 <= self.severity <= 5:
            raise UserError(
                f"Corruption '{self.name}': severity must be a whole number from 1 to 5, got {self.severity}."
            )

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Corruption:
        """Return the corruption that ``str`` gave ``text``, such as ``"typos-3"`` or, at severity 3, ``"typos"``.

        Raises:
            UserError: an unknown name, or a severity that is no whole number from 1 to 5.
        """
        name, dash, severity = text.rpartition("-")
        if not dash:
            return cls(text, seed=seed)
        if not severity.isdecimal():
            raise UserError(f"Corruption '{text}': severity must be a whole number from 1 to 5, got '{severity}'.")
        return cls(name, int(severity), seed)

    @property
    def kind(self) -> Literal["text", "image"]:
        """What kind of task it applies to."""
        return "image" if self.name in IMAGE_CORRUPTIONS else "text"

    def __str__(self) -> str:
        return f"{self.name}-{self.severity}"

    def __call__(self, inputs: Sequence[Any] | np.ndarray, indices: Sequence[int] | np.ndarray) -> Any:
        """Return the corrupted inputs; the given ones stay as they are.

        Args:
            inputs: ``B`` texts, pairs of texts, or uint8 images of shape ``(B, H, W)`` or ``(B, H, W, 3)``.
            indices: the row number of each, shape ``(B,)``.

        Raises:
            UserError: a text corruption of images or the reverse.
        """
        is_image = isinstance(inputs, np.ndarray)
        if is_image != (self.kind == "image"):
            given = "images" if is_image else "texts"
            accepted = sorted(IMAGE_CORRUPTIONS if is_image else TEXT_CORRUPTIONS)
            raise UserError(f"Corruption '{self.name}' does not apply to {given}. Accepted: {', '.join(accepted)}.")
        if is_image:
            result = np.empty_like(inputs)
            change = IMAGE_CORRUPTIONS[self.name]
            for row, index in enumerate(indices):
                image = change(inputs[row].astype(np.float64), self.severity, self._stream(index, 0))
                result[row] = np.clip(np.rint(image), 0, 255).astype(np.uint8)
            return result
        return [self._corrupt_text(value, index) for value, index in zip(inputs, indices, strict=True)]

    def _stream(self, index: int, part: int) -> np.random.Generator:
        # The severity is not in the key: the same draws against a higher threshold change a superset.
        return philox("corruption", self.name, self.seed, int(index), part)

    def _corrupt_text(self, value: str | tuple[str, ...], index: int) -> str | tuple[str, ...]:
        change = TEXT_CORRUPTIONS[self.name]
        if isinstance(value, str):
            return change(value, self.severity, self._stream(index, 0))
        return tuple(change(part, self.severity, self._stream(index, number)) for number, part in enumerate(value))
