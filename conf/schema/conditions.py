"""What a U-Net is told beside the noisy latent: one section per condition, absent where the network does without.

Each has its counterpart in `models/conditions/`, where a new one is added, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from conf.schema.choices import Degradation, MaskStyle
from conf.schema.shared import require, require_positive


@dataclass(kw_only=True, slots=True)
class CaptionConfig:
    """Text states of the caption, as tokens for cross-attention."""

    drop: float = 0.1  # share of samples trained with its null instead, for classifier-free guidance


@dataclass(kw_only=True, slots=True)
class ClassConfig:
    """The class of the image, learned: a token for cross-attention, or a vector that joins the time's embedding."""

    classes: int = 1000  # class ids are 0 to classes - 1
    drop: float = 0.1


@dataclass(kw_only=True, slots=True)
class FramingConfig:
    """Size of the original image and corner of its cut, as a vector that joins the time's embedding (SDXL, 2.2)."""

    drop: float = 0.0


@dataclass(kw_only=True, slots=True)
class BoxesConfig:
    """Boxes around what the image shall show, each as one token for cross-attention: class and corners."""

    classes: int = 1000  # class ids of boxes are 0 to classes - 1
    most: int = 30  # boxes of an image, the largest first; there are always so many tokens
    drop: float = 0.1


@dataclass(kw_only=True, slots=True)
class BoxMapConfig:
    """Boxes filled with their class, as learned channels beside the latent: where `boxes` alone learn too slowly."""

    classes: int = 182  # class ids of boxes are 0 to classes - 1
    channels: int = 3  # that the map becomes
    drop: float = 0.1

    def __post_init__(self) -> None:
        require(0 < self.classes < 256, f"conditions.box_map.classes={self.classes}: must be in [1, 255]")


@dataclass(kw_only=True, slots=True)
class ImageEmbeddingConfig:
    """The CLIP embedding of an image, as one token for cross-attention."""

    width: int = 512  # E, channels of the embedding: CLIP's model.embed_dim
    drop: float = 0.1


@dataclass(kw_only=True, slots=True)
class LowResolutionConfig:
    """A small version of the image, as channels beside the latent: super-resolution."""

    factor: int = 4  # by which each side is smaller; that of the autoencoder, so that it has the latent's size
    degradation: Degradation = Degradation.bicubic  # how it is made of the image
    noise_levels: int = 0  # of 1000: noise up to this level is added in training, and the level told; 0: none
    sampling_level: int = 0  # that is told in sampling, where nothing is added: how noisy the given images are
    back_projection: bool = False  # correct drawn images by what they lack, made small, of the given ones
    drop: float = 0.0

    def __post_init__(self) -> None:
        require(self.factor > 1, f"conditions.low_resolution.factor={self.factor}: must be at least 2")
        highest, level = self.noise_levels, self.sampling_level
        require(0 <= highest <= 1000, f"conditions.low_resolution.noise_levels={highest}: must be in [0, 1000]")
        require(
            0 <= level <= max(highest - 1, 0),
            f"conditions.low_resolution.sampling_level={level}: must be below noise_levels={highest}",
        )
        require(
            not self.back_projection or self.degradation is Degradation.bicubic,
            "conditions.low_resolution.back_projection: would give an image the noise of the small one; set "
            "degradation=bicubic or back_projection=false",
        )


@dataclass(kw_only=True, slots=True)
class MaskedConfig:
    """A mask and the latent of what it leaves of the image, as channels beside the latent: inpainting."""

    style: MaskStyle = MaskStyle.medium  # of the random masks of training
    drop: float = 0.0


@dataclass(kw_only=True, slots=True)
class SegmentsConfig:
    """A map with the class of each pixel, as learned channels beside the latent: semantic synthesis."""

    classes: int = 182  # classes of pixels are 0 to classes - 1, and 255: unlabelled
    channels: int = 3  # that the map becomes
    drop: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.classes < 256, f"conditions.segments.classes={self.classes}: must be in [1, 255]")


@dataclass(kw_only=True, slots=True)
class ConditionsConfig:
    """All that the network is told; several go together."""

    caption: CaptionConfig | None = field(default_factory=CaptionConfig)  # null: a network without text
    class_token: ClassConfig | None = None
    class_vector: ClassConfig | None = None
    framing: FramingConfig | None = None
    boxes: BoxesConfig | None = None
    box_map: BoxMapConfig | None = None
    image_embedding: ImageEmbeddingConfig | None = None
    low_resolution: LowResolutionConfig | None = None
    masked: MaskedConfig | None = None
    segments: SegmentsConfig | None = None

    def __post_init__(self) -> None:
        for name, section in self.chosen():
            require(0 <= section.drop < 1, f"conditions.{name}.drop={section.drop}: must be in [0, 1)")
            sizes = [size for size in ("classes", "most", "width", "channels") if hasattr(section, size)]
            require_positive(section, *sizes, group=f"conditions.{name}.")

    def chosen(self) -> Iterator[tuple[str, Any]]:
        """Names and sections of those that are there."""
        for option in fields(self):
            if (section := getattr(self, option.name)) is not None:
                yield option.name, section
