"""A pretrained transformers encoder as one function from raw inputs of a data batch to feature vectors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_merge.errors import UserError, unknown
from lightning_merge.modules.folder import resolve_folder
from lightning_merge.weights import open_weights
from lightning_merge.weights.folder import copy_companions, quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Pooling = Literal["mean", "cls", "pooler"]
POOLINGS = ("cls", "mean", "pooler")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, for a colour image shown to a one-channel model


@dataclass(frozen=True)
class TextProcessor:
    """Texts or text pairs to token tensors, padded to the longest of the batch.

    Args:
        tokenizer: the tokenizer that came with the model.
        max_length: tokens kept of each input, special tokens included.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, inputs: Sequence[str] | Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        if isinstance(inputs, (Tensor, np.ndarray)):
            raise UserError("A text model got images. Accepted: a list of strings, or of pairs of strings.")
        if not inputs:
            raise UserError("A text model got an empty list. Accepted: one string or more.")
        if isinstance(inputs[0], str):
            texts: tuple[list[str], ...] = (list(inputs),)  # type: ignore[arg-type]
        else:
            first, second = zip(*inputs, strict=True)
            texts = (list(first), list(second))
        tokens = self.tokenizer(*texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return dict(tokens)


@dataclass(frozen=True)
class ImageProcessor:
    """uint8 images to normalised float tensors of the model's size.

    The whole image is stretched to the model's size (bilinear, antialiased); nothing is cropped.

    Args:
        size: height and width in pixels that the model takes.
        channels: colour channels that the model takes; grey images are repeated, colour ones reduced to luma for 1.
        mean: subtracted from pixels scaled to [0, 1]; one value, or one a channel.
        std: divides what remains; one value, or one a channel.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __call__(self, inputs: Tensor | np.ndarray) -> dict[str, Tensor]:
        if not isinstance(inputs, (Tensor, np.ndarray)):
            raise UserError("An image model got texts. Accepted: a uint8 array of shape (N, H, W) or (N, H, W, 3).")
        images = torch.as_tensor(inputs)
        if images.dtype != torch.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] != 3):
            raise UserError(
                f"Images have dtype {images.dtype} and shape {tuple(images.shape)}. "
                "Accepted: uint8 of shape (N, H, W) or (N, H, W, 3)."
            )
        pixels = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)  # (N, 1 or 3, H, W)
        pixels = pixels.float() / 255
        if tuple(pixels.shape[-2:]) != self.size:
            pixels = nn.functional.interpolate(pixels, size=self.size, mode="bilinear", antialias=True)
        if pixels.shape[1] == 3 and self.channels == 1:
            pixels = (pixels * pixels.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        pixels = pixels.expand(-1, self.channels, -1, -1)
        mean, std = pixels.new_tensor(self.mean)[:, None, None], pixels.new_tensor(self.std)[:, None, None]
        return {"pixel_values": (pixels - mean) / std}


class Encoder(nn.Module):
    """A transformers encoder with its tokenizer or image normaliser, pooled to one vector an input.

    Args:
        backbone: the transformers model; its parameters are this module's only parameters.
        processor: raw inputs to the backbone's tensors.
        pooling: ``"mean"`` over the tokens that are not padding, ``"cls"`` the first token of the last layer, or
            ``"pooler"`` the model's own (CLIP: its projected embedding).
        folder: where the weights came from, if from a folder.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        processor: TextProcessor | ImageProcessor,
        pooling: Pooling,
        folder: Path | None = None,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise unknown("pooling", str(pooling), POOLINGS)
        self.backbone = backbone
        self.processor = processor
        self.pooling = pooling
        self.folder = folder
        config = backbone.config
        projects = pooling == "pooler" and hasattr(backbone, "visual_projection")
        self.dim: int = config.projection_dim if projects else config.hidden_size

    @property
    def kind(self) -> Literal["text", "image"]:
        """What the encoder takes."""
        return "text" if isinstance(self.processor, TextProcessor) else "image"

    @property
    def max_length(self) -> int | None:
        """Tokens kept of each text; None for images."""
        return self.processor.max_length if isinstance(self.processor, TextProcessor) else None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        pooling: Pooling | None = None,
        max_length: int = 64,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Encoder:
        """Load an encoder in fp32 and in evaluation mode from a Hugging Face folder.

        Args:
            folder: a folder with ``config.json``, safetensors weights and, for text, tokenizer files; or a Hub name.
            pooling: by default ``"mean"`` for text, ``"cls"`` for ViT-like models, ``"pooler"`` for CLIP's vision.
            max_length: tokens kept of each text, at least 2.
            tensors: weights to use in place of the folder's, under the names of its files (what a merge gives). A
                tensor that is absent is taken from the folder.

        Raises:
            UserError: the folder, its weights or its tokenizer are missing or unreadable, or the model is not an
                encoder of text or images.
        """
        source = resolve_folder(folder)
        files = open_weights(source).files
        if pooling is not None and pooling not in POOLINGS:
            raise unknown("pooling", pooling, POOLINGS)
        model_class, config, kind = _architecture(source)
        chosen: Pooling = pooling or (
            "mean" if kind == "text" else "pooler" if config.model_type == "clip_vision_model" else "cls"
        )
        processor = _text_processor(source, config, max_length) if kind == "text" else _image_processor(source, config)
        arguments: dict[str, Any] = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        try:
            # new layers (a pooler the folder lacks) must not depend on, or move, the caller's random state
            with torch.random.fork_rng(devices=[]), quiet_transformers():
                torch.manual_seed(0)
                if tensors is None:
                    backbone, report = model_class.from_pretrained(source, **arguments)
                else:
                    from safetensors.torch import load_file

                    complete = {name: tensor for file in files for name, tensor in load_file(str(file)).items()}
                    for name in tensors:
                        if name not in complete:
                            raise unknown("tensor", name, complete)
                    # transformers makes parameters of the very tensors it is given
                    complete.update({name: tensor.detach().clone() for name, tensor in tensors.items()})
                    backbone, report = _concrete(model_class, config).from_pretrained(
                        None, state_dict=complete, **arguments
                    )
        except UserError:
            raise
        except Exception as error:  # transformers raises OSError, RuntimeError, ValueError, SafetensorError and others
            raise UserError(f"Cannot load the model in '{source}': {_first_line(error)}") from error
        missing = sorted(report["missing_keys"])
        needed = [name for name in missing if chosen == "pooler" or not name.startswith("pooler.")]
        if needed:
            raise UserError(
                f"The weights in '{source}' lack the tensor '{needed[0]}' ({len(needed)} missing in all), "
                "which this model needs."
            )
        if chosen == "pooler" and kind == "text" and getattr(backbone, "pooler", None) is None:
            raise UserError(
                f"Pooling 'pooler' needs a pooler layer, which the {config.model_type} model in '{source}' "
                "does not have. Accepted: 'cls', 'mean'."
            )
        return cls(backbone, processor, chosen, source).eval()

    def reconfigured(self, pooling: Pooling | None = None, max_length: int | None = None) -> Encoder:
        """Return an encoder over the same backbone (shared, not copied) with another pooling or length of text."""
        processor = self.processor
        if isinstance(processor, TextProcessor) and max_length is not None:
            processor = TextProcessor(processor.tokenizer, max_length)
        return Encoder(self.backbone, processor, pooling or self.pooling, self.folder).train(self.training)

    def preprocess(self, inputs: Any) -> dict[str, Tensor]:
        """Turn the raw inputs of a data batch into the backbone's tensors, on the CPU.

        Args:
            inputs: strings, pairs of strings, or uint8 images of shape (N, H, W) or (N, H, W, 3).
        """
        return self.processor(inputs)

    def forward(self, **tensors: Tensor) -> Tensor:
        """Return the features, of shape (N, dim), of the tensors that ``preprocess`` made."""
        output = self.backbone(**tensors)
        if self.pooling == "pooler":
            projected = getattr(output, "image_embeds", None)
            return output.pooler_output if projected is None else projected
        hidden = output.last_hidden_state  # (N, tokens, dim)
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.kind == "image":
            return hidden.mean(1)
        mask = tensors["attention_mask"].unsqueeze(-1).to(hidden.dtype)  # (N, tokens, 1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def unused_parameters(self) -> list[str]:
        """Name the trainable parameters that the features do not depend on, such as a pooler that is not asked for.

        Found by one backward pass of one small input, so it holds for any architecture and for adapters.
        """
        example: Any = ["a"] if self.kind == "text" else torch.zeros(1, *_image_size(self.processor), dtype=torch.uint8)
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        if not named:
            return []
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            device = named[0][1].device
            with torch.inference_mode(False), torch.enable_grad():
                features = self(**{name: tensor.to(device) for name, tensor in self.preprocess(example).items()})
                gradients = torch.autograd.grad(
                    features.sum(), [parameter for _, parameter in named], allow_unused=True
                )
        finally:
            for module, mode in modes:
                module.training = mode
        return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write weights, config and tokenizer or normalisation as a Hugging Face folder (a base for fine-tuning)."""
        target = Path(folder)
        with quiet_transformers():
            self.backbone.save_pretrained(target)
        if isinstance(self.processor, ImageProcessor):
            values: dict[str, Any] = {"image_mean": list(self.processor.mean), "image_std": list(self.processor.std)}
            height, width = self.processor.size
            values |= {"size": {"height": height, "width": width}}
            (target / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")
        elif self.folder is not None:
            # config.json was just written; only the tokenizer's own files are wanted, byte for byte
            written = (target / "config.json").read_bytes()
            copy_companions(self.folder, target)
            (target / "config.json").write_bytes(written)
        else:
            self.processor.tokenizer.save_pretrained(target)


def build_vit(
    image_size: int = 16,
    num_channels: int = 1,
    hidden_size: int = 64,
    layers: int = 4,
    heads: int = 4,
    patch_size: int = 4,
    seed: int = 0,
) -> Encoder:
    """Make a small vision transformer with random weights, without dropout: a base to pretrain.

    Args:
        image_size: side of the square image in pixels, a multiple of ``patch_size``.
        num_channels: 1 for grey, 3 for colour.
        hidden_size: features of each token, a multiple of ``heads``; the perceptron between is four times as wide.
        layers: transformer blocks.
        heads: attention heads a block.
        patch_size: side of a patch in pixels.
        seed: of the random weights; the caller's random state is neither read nor moved.

    Raises:
        UserError: a size is not a multiple of what must divide it.
    """
    for name, value, divisor_name, divisor in (
        ("image_size", image_size, "patch_size", patch_size),
        ("hidden_size", hidden_size, "heads", heads),
    ):
        if divisor < 1 or value < 1 or value % divisor:
            raise UserError(
                f"build_vit: {name} must be a positive multiple of {divisor_name}, got {value} and {divisor}."
            )
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=image_size,
        num_channels=num_channels,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        patch_size=patch_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = ViTModel(config)
    return Encoder(backbone, ImageProcessor((image_size, image_size), num_channels), "cls").eval()


def _architecture(folder: Path) -> tuple[Any, PretrainedConfig, Literal["text", "image"]]:
    """Choose the transformers class, its config and the kind of input for a folder."""
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"Cannot read the config in '{folder}': {_first_line(error)}") from error
    architectures = config.architectures or []
    if config.model_type == "clip":
        vision = config.vision_config
        vision.projection_dim = config.projection_dim  # the outer value is the one CLIPModel itself uses
        return CLIPVisionModelWithProjection, vision, "image"
    if config.model_type == "clip_vision_model":
        projects = "CLIPVisionModelWithProjection" in architectures
        return CLIPVisionModelWithProjection if projects else AutoModel, config, "image"
    accepted = "Accepted: an encoder of text (BERT, RoBERTa, ...), a ViT, or CLIP."
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"The {config.model_type} model in '{folder}' is an encoder-decoder. {accepted}")
    if hasattr(config, "image_size") and hasattr(config, "num_channels"):
        return AutoModel, config, "image"
    if hasattr(config, "vocab_size") and hasattr(config, "hidden_size"):
        return AutoModel, config, "text"
    raise UserError(f"The {config.model_type} model in '{folder}' takes neither text nor images alone. {accepted}")


def _concrete(model_class: Any, config: PretrainedConfig) -> Any:
    """Return the class that an Auto class stands for; only that can be loaded without a folder."""
    if not model_class.__name__.startswith("Auto"):
        return model_class
    with torch.device("meta"):
        return type(model_class.from_config(config))


def _text_processor(folder: Path, config: PretrainedConfig, max_length: int) -> TextProcessor:
    """Load the tokenizer of a folder and check the length against what the model can position."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"Cannot load the tokenizer in '{folder}': {_first_line(error)}") from error
    longest = min(
        tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    )
    if not 2 <= max_length <= longest:
        raise UserError(f"max_length must be from 2 to {longest} tokens for the model in '{folder}', got {max_length}.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TextProcessor(tokenizer, max_length)


def _image_processor(folder: Path, config: PretrainedConfig) -> ImageProcessor:
    """Read size and channels from the config, and the normalisation from the preprocessor where there is one."""
    size = (config.image_size, config.image_size) if isinstance(config.image_size, int) else tuple(config.image_size)
    path = folder / "preprocessor_config.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    mean, std = tuple(stored.get("image_mean") or (0.5,)), tuple(stored.get("image_std") or (0.5,))
    for name, values in (("image_mean", mean), ("image_std", std)):
        if len(values) not in (1, config.num_channels):
            raise UserError(
                f"{name} in '{path}' has {len(values)} values; the model takes {config.num_channels} channels."
            )
    return ImageProcessor(size, config.num_channels, mean, std)


def _image_size(processor: TextProcessor | ImageProcessor) -> tuple[int, int]:
    return processor.size if isinstance(processor, ImageProcessor) else (0, 0)


def _first_line(error: Exception) -> str:
    """The first line of an exception's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
