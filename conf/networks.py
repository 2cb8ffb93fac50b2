"""Configurations of the networks: field names are those of diffusers' `config.json`."""

from dataclasses import dataclass, field

from conf.errors import UserError


@dataclass(kw_only=True, slots=True)
class AutoencoderConfig:
    """KL autoencoder; the defaults are Stable Diffusion's f8 (83,653,863 parameters)."""

    in_channels: int = 3  # of the image
    out_channels: int = 3  # of the reconstruction
    latent_channels: int = 4  # C; the encoder puts out mean and log-variance of each
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])  # one level each
    layers_per_block: int = 2  # residual blocks per encoder level; the decoder has one more
    norm_num_groups: int = 32  # groups of each group norm; divides all block_out_channels
    mid_block_add_attention: bool = True  # self-attention at the smallest size

    @property
    def downscale(self) -> int:
        """Pixels of the image per pixel of the latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self) -> None:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise UserError(
                    f"model.block_out_channels: {channels} is not divisible by norm_num_groups={self.norm_num_groups}"
                )


@dataclass(kw_only=True, slots=True)
class DiscriminatorConfig:
    """PatchGAN: 3 layers see patches of 70 x 70 pixels."""

    channels: int = 64  # of the first layer; doubled by each layer up to 8 times
    layers: int = 3  # convolutions that halve the picture


@dataclass(kw_only=True, slots=True)
class UNetConfig:
    """Cross-attention U-Net; the defaults are Stable Diffusion 1.x (859,520,964 parameters)."""

    sample_size: int = 64  # side of the latent in training
    in_channels: int = 4  # of the latent
    out_channels: int = 4  # of the prediction; that of in_channels
    block_out_channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    layers_per_block: int = 2  # residual blocks per level on the way down; one more on the way up
    down_block_types: list[str] = field(  # one per level, from the largest; CrossAttn: sees the caption
        default_factory=lambda: ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    )
    up_block_types: list[str] = field(  # likewise, from the smallest
        default_factory=lambda: ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    )
    cross_attention_dim: int = 768  # D, width of the text states: CLIP's model.text_width
    attention_head_dim: list[int] = field(default_factory=lambda: [8])  # heads, per level or one for all
    transformer_layers_per_block: int = 1  # transformer layers after each residual block
    use_linear_projection: bool = False  # around a transformer: linear layers instead of 1 x 1 convolutions
    norm_num_groups: int = 32  # groups of each group norm; divides all block_out_channels
    flip_sin_to_cos: bool = True  # cosines before sines in the timestep's embedding
    freq_shift: int = 0  # of the embedding's frequencies; 0 or 1

    @property
    def downscale(self) -> int:
        """The latent's side must be a multiple of this."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != levels:
                raise UserError(f"model.{name}: needs one entry for each of the {levels} model.block_out_channels")
        if len(self.attention_head_dim) not in (1, levels):
            raise UserError(f"model.attention_head_dim: needs 1 or {levels} entries")
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % self.norm_num_groups:
                raise UserError(
                    f"model.block_out_channels: {channels} is not divisible by norm_num_groups={self.norm_num_groups}"
                )
            if channels % heads:
                raise UserError(f"model.block_out_channels: {channels} is not divisible by {heads} heads")

    @property
    def heads(self) -> list[int]:
        """Attention heads per level."""
        one = len(self.attention_head_dim) == 1
        return self.attention_head_dim * len(self.block_out_channels) if one else self.attention_head_dim


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
