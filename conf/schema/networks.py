"""Configurations of the networks: field names are those of diffusers' `config.json`."""

from dataclasses import dataclass, field

from conf.errors import UserError

BLOCK_TYPES = {  # without attention, with text, with self-attention only, changing the size in a residual block
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
CHOICES: dict[str, tuple[str | None, ...]] = {
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "class_embed_type": (None, "timestep", "projection"),
    "addition_embed_type": (None, "text_time"),
}

SIZES = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups")


def _require_positive(cfg: object, *names: str) -> None:
    """Refuse a number, or one in a list, below 1."""
    for name in names:
        value = getattr(cfg, name)
        if value == []:
            raise UserError(f"model.{name}=[]: needs an entry for each level")
        if any(number < 1 for number in (value if isinstance(value, list) else [value]) if number is not None):
            raise UserError(f"model.{name}={value}: must be at least 1")


def resizes_in_resnet(block_type: str, attention_option: str) -> bool:
    """Whether a level of the U-Net changes the size in a residual block; `attention_option`: downsample_type or so."""
    return block_type.startswith("Resnet") or (block_type.startswith("Attn") and attention_option == "resnet")


@dataclass(kw_only=True, slots=True)
class AutoencoderConfig:
    """KL autoencoder, or with a codebook VQ; the defaults are Stable Diffusion's KL f8 (83,653,863 parameters)."""

    in_channels: int = 3  # of the image
    out_channels: int = 3  # of the reconstruction
    latent_channels: int = 4  # C; the encoder of a KL autoencoder puts out mean and log-variance of each
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])  # one level each
    layers_per_block: int = 2  # residual blocks per encoder level; the decoder has one more
    norm_num_groups: int = 32  # groups of each group norm; divides all block_out_channels
    attention_levels: list[int] = field(default_factory=list)  # self-attention in these levels; 0: the image's size
    mid_block_add_attention: bool = True  # self-attention at the smallest size
    num_vq_embeddings: int | None = None  # vectors of the codebook; null: a KL autoencoder
    vq_embed_dim: int | None = None  # channels of a vector; null: latent_channels

    @property
    def downscale(self) -> int:
        """Pixels of the image per pixel of the latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def cached_channels(self) -> int:
        """C of the latents that a diffusion model works on."""
        return self.vq_embed_dim or self.latent_channels

    def __post_init__(self) -> None:
        _require_positive(self, *SIZES, "latent_channels", "num_vq_embeddings", "vq_embed_dim")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise UserError(
                    f"model.block_out_channels: {channels} is not divisible by norm_num_groups={self.norm_num_groups}"
                )
        for level in self.attention_levels:
            if level not in range(len(self.block_out_channels)):
                raise UserError(
                    f"model.attention_levels: there is no level {level} in {len(self.block_out_channels)} "
                    "model.block_out_channels, which count from 0"
                )
        if self.vq_embed_dim is not None and self.num_vq_embeddings is None:
            raise UserError("model.vq_embed_dim needs model.num_vq_embeddings, the size of the codebook")


@dataclass(kw_only=True, slots=True)
class DiscriminatorConfig:
    """PatchGAN: 3 layers see patches of 70 x 70 pixels."""

    channels: int = 64  # of the first layer; doubled by each layer up to 8 times
    layers: int = 3  # convolutions that halve the image


@dataclass(kw_only=True, slots=True)
class UNetConfig:
    """U-Net; the defaults are Stable Diffusion 1.x (859,520,964 parameters).

    With `cross_attention_dim` it is diffusers' UNet2DConditionModel, without it UNet2DModel.
    """

    sample_size: int = 64  # side of the latent in training
    in_channels: int = 4  # of the latent, with all that is concatenated to it
    out_channels: int = 4  # of the prediction
    block_out_channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    layers_per_block: int = 2  # residual blocks per level on the way down; one more on the way up
    # CrossAttn...: sees the caption; Attn...: only the other pixels; Resnet...: changes the size in a residual block.
    down_block_types: list[str] = field(  # one per level, from the largest
        default_factory=lambda: ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    )
    up_block_types: list[str] = field(  # one per level, from the smallest
        default_factory=lambda: ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    )
    cross_attention_dim: int | None = 768  # D, width of the text states: CLIP's model.text_width; null: no text
    attention_head_dim: list[int] = field(default_factory=lambda: [8])  # heads, per level or one for all
    head_channels: int | None = None  # channels of every head, instead of attention_head_dim heads
    transformer_layers_per_block: list[int] = field(default_factory=lambda: [1])  # depth, per level or one for all
    use_linear_projection: bool = False  # around a transformer: linear layers instead of 1 x 1 convolutions
    norm_num_groups: int = 32  # groups of each group norm; divides all block_out_channels
    norm_eps: float = 1e-5  # of the group norms outside transformers
    flip_sin_to_cos: bool = True  # cosines before sines in the timestep's embedding
    freq_shift: int = 0  # of the embedding's frequencies; 0 or 1
    resnet_time_scale_shift: str = "default"  # the time is added before the second norm; scale_shift: scales after it
    downsample_type: str = "conv"  # of AttnDownBlock2D; resnet: in a residual block
    upsample_type: str = "conv"  # of AttnUpBlock2D; resnet: in a residual block
    num_class_embeds: int | None = None  # classes, each with a learned vector beside the time's
    class_embed_type: str | None = None  # timestep: the label is a number such as a time; projection: a vector
    addition_embed_type: str | None = None  # text_time: SDXL's pooled text and sizes beside the time's embedding
    addition_time_embed_dim: int | None = None  # channels of the embedding of each of those sizes
    projection_class_embeddings_input_dim: int | None = None  # width of what projection or text_time projects
    time_cond_proj_dim: int | None = None  # width of the embedding of a scale of guidance, or of a step's length

    @property
    def downscale(self) -> int:
        """The latent's side must be a multiple of this."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def heads(self) -> list[int]:
        """Attention heads per level."""
        if self.head_channels is not None:
            return [channels // self.head_channels for channels in self.block_out_channels]
        return self._per_level(self.attention_head_dim)

    @property
    def depths(self) -> list[int]:
        """Transformer layers after each residual block, per level."""
        return self._per_level(self.transformer_layers_per_block)

    @property
    def projected_width(self) -> int:
        """Width of what projection or text_time projects; the checks see to it that there is one."""
        assert self.projection_class_embeddings_input_dim is not None
        return self.projection_class_embeddings_input_dim

    def _per_level(self, values: list[int]) -> list[int]:
        return values * len(self.block_out_channels) if len(values) == 1 else values

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        numbers = ("sample_size", "cross_attention_dim", "head_channels", "num_class_embeds", "time_cond_proj_dim")
        _require_positive(self, *SIZES, *numbers, "attention_head_dim", "transformer_layers_per_block")
        for name, kinds in BLOCK_TYPES.items():
            self._check_blocks(name, kinds, levels)
        for name in ("attention_head_dim", "transformer_layers_per_block"):
            if len(getattr(self, name)) not in (1, levels):
                raise UserError(f"model.{name}: needs 1 or {levels} entries")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                listed = ", ".join("null" if choice is None else choice for choice in known)
                raise UserError(f"model.{name}={getattr(self, name)}: must be one of {listed}")
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % self.norm_num_groups:
                raise UserError(
                    f"model.block_out_channels: {channels} is not divisible by norm_num_groups={self.norm_num_groups}"
                )
            if self.head_channels is not None and channels % self.head_channels:
                raise UserError(
                    f"model.block_out_channels: {channels} is not divisible by head_channels={self.head_channels}"
                )
            if channels % heads:
                raise UserError(f"model.block_out_channels: {channels} is not divisible by {heads} heads")
        self._check_vectors()

    def _check_blocks(self, name: str, kinds: tuple[str, ...], levels: int) -> None:
        types = getattr(self, name)
        if len(types) != levels:
            raise UserError(f"model.{name}: needs one entry for each of the {levels} model.block_out_channels")
        _, cross, own, _ = kinds
        refused = own if self.cross_attention_dim is not None else cross
        for kind in types:
            if kind not in kinds:
                raise UserError(f"model.{name}: {kind!r} is not one of {', '.join(kinds)}")
            if kind == refused:
                text = "null" if self.cross_attention_dim is None else self.cross_attention_dim
                raise UserError(f"model.{name}: {kind!r} does not go with cross_attention_dim={text}")

    def _check_vectors(self) -> None:
        """What goes into the time's embedding beside the time must be described completely."""
        width = "projection_class_embeddings_input_dim"
        for name, kind, needed in (
            ("class_embed_type", "projection", (width,)),
            ("addition_embed_type", "text_time", (width, "addition_time_embed_dim")),
        ):
            missing = [option for option in needed if getattr(self, option) is None]
            if getattr(self, name) == kind and missing:
                raise UserError(f"model.{name}={kind} needs model.{' and model.'.join(missing)}")
            if getattr(self, name) == kind and self.cross_attention_dim is None:
                raise UserError(f"model.{name}={kind} needs model.cross_attention_dim")
        if self.num_class_embeds is not None and self.class_embed_type is not None:
            raise UserError(f"model.num_class_embeds and model.class_embed_type={self.class_embed_type}: give one")


@dataclass(kw_only=True, slots=True)
class ClipConfig:
    """An open_clip model: a pretrained one by name or path, or one of these sizes from scratch."""

    pretrained: str | None = None  # "ViT-B-32/laion2b_s34b_b79k", or a folder that save_pretrained wrote
    embed_dim: int = 512  # E, width of the space that images and texts share
    image_size: int = 224  # pixels; other images are resized to it
    vision_layers: int = 12  # transformer layers of the image tower
    vision_width: int = 768  # channels of the image tower; a multiple of 32
    patch_size: int = 32  # pixels along a patch; divides image_size
    text_layers: int = 12  # transformer layers of the text tower
    text_width: int = 512  # D, channels of the text tower and of its states
    text_heads: int = 8  # attention heads of the text tower; divide text_width
    context_length: int = 77  # tokens, with the start and end token
    skip_last: int = 0  # transformer layers that the text states leave out; 1: "penultimate", as Stable Diffusion 2
