"""The U-Net of latent diffusion (Rombach et al. 2022, section 3.3): unconditional, and as Stable Diffusion 1, 2 and XL.

Parameter names and `config.json` are those of diffusers' UNet2DConditionModel, without text those of UNet2DModel.
Shapes: B samples, C channels, h x w the latent's size, E width of the time embedding, L tokens of the text, D width of
the text states.
"""

import math
from collections.abc import Callable, Mapping
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from conf.errors import UserError
from conf.schema.networks import UNetConfig, resizes_in_resnet
from models.attention import Attention, AttentionControl, Context, ImageSelfAttention, SpatialTransformer
from models.formats.unet import FORMATS, to_json
from models.formats.weights import Weights, load_folder, read_config, read_folder, save_folder
from models.layers import Downsample, ResBlock, SiluConv2d, Upsample, double, halve, laid_out

# -------------------- the network -------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Predicts from a noisy latent, its timestep and its conditions what the diffusion process asks for."""

    around = ("features", "prediction")  # what it computes itself before and after its levels: compiled like blocks
    class_embedding: nn.Module | None
    add_embedding: "VectorEmbedding | None"

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        widths, layers = cfg.block_out_channels, cfg.layers_per_block
        self.conv_in = nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.time_embedding = VectorEmbedding(widths[0], 4 * widths[0], cfg.time_cond_proj_dim)
        self.class_embedding, self.add_embedding = _vector_embeddings(cfg)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]  # channels of the feature maps that the way up takes back, last one first
        for level, width in enumerate(widths):
            down = DownLevel(cfg, level, [skips[-1]] + [width] * (layers - 1))
            self.down_blocks.append(down)
            skips += [width] * (layers + len(down.downsamplers))
        self.mid_block = MidLevel(cfg)
        previous = widths[-1]
        for level in reversed(range(len(widths))):
            inputs = [width + skips.pop() for width in [previous] + [widths[level]] * layers]
            self.up_blocks.append(UpLevel(cfg, level, inputs))
            previous = widths[level]
        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, widths[0], cfg.norm_eps)
        self.conv_out = SiluConv2d(widths[0], cfg.out_channels)
        self._prepare()

    def _prepare(self) -> None:
        """Start every residual branch and the output at zero, as the LDM code does; tell each attention its name."""
        last = ["conv_out"] + ["time_embedding.cond_proj"] * (self.time_embedding.cond_proj is not None)
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                module.name = name
            if isinstance(module, ResBlock):
                last.append(f"{name}.conv2")
            elif isinstance(module, SpatialTransformer):
                last.append(f"{name}.proj_out")
            elif isinstance(module, ImageSelfAttention):
                last.append(f"{name}.to_out.0")
        self.zero = frozenset(last)  # layers that begin at zero
        for name in last:
            for parameter in self.get_submodule(name).parameters():
                nn.init.zeros_(parameter)

    def initial(self, name: str, seed: int) -> Tensor:
        """One parameter as a training begins with it, drawn as torch draws it, whatever device this network is on.

        A function of the seed and the name: any process can make any of them, without those before.
        """
        owner, _, kind = name.rpartition(".")
        layer, shape = self.get_submodule(owner), self.get_parameter(name).shape
        if owner in self.zero or (isinstance(layer, nn.GroupNorm | nn.LayerNorm) and kind == "bias"):
            return torch.zeros(shape)
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1)
        assert isinstance(layer, nn.Linear | nn.Conv2d), name
        # Not from the weight: it may be cut already, and to look at a cut one may be an exchange between processes.
        inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels * math.prod(layer.kernel_size)
        bound = inputs**-0.5  # of weights and biases
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def checkpoint_gradients(self, enabled: bool = True) -> None:
        """Train in less memory and more time: each residual block with its attention is computed again going back."""
        for module in self.modules():
            if isinstance(module, Level):
                module.gradient_checkpointing = enabled

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        context: Context | None = None,
        attn_control: AttentionControl | None = None,
        *,
        class_labels: Tensor | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The network's prediction.

        Args:
            sample: noisy latents [B, in_channels, h, w].
            timesteps: [B], in [0, T), fractions allowed.
            context: text states [B, L, D], or what `keys_values` made of them; None for a network without text.
            attn_control: computes every attention layer in place of the usual attention (`models.attention`).
            class_labels: [B] int64 with num_class_embeds, [B] numbers with class_embed_type=timestep,
                [B, projection_class_embeddings_input_dim] with projection.
            pooled: SDXL's pooled text states [B, P].
            sizes: SDXL's sizes and cuts [B, S] in pixels: original h, w, crop top, left, target h, w.
            vector: what further conditions add to the time's embedding [B, E].
            guidance: with time_cond_proj_dim, scales [B] of the guidance that the prediction is to have, or what a mean
                flow is told of its steps (`Process.told`); None: 1, no guidance and no step.

        Returns:
            [B, out_channels, h, w].

        Raises:
            UserError: h or w is not a multiple of the configuration's downscale factor.
        """
        if any(side % self.cfg.downscale for side in sample.shape[2:]):
            size = f"{sample.shape[2]} x {sample.shape[3]}"
            raise UserError(f"latents of {size}: both sides must be multiples of {self.cfg.downscale}")
        inputs = LevelInputs(
            self._vector(sample, timesteps, class_labels, pooled, sizes, vector, guidance), context, attn_control
        )
        skips = [self.features(sample)]
        for level in self.down_blocks:
            skips += level(skips[-1], inputs)
        x = self.mid_block(skips[-1], inputs)  # [B, widths[-1], h/f, w/f]
        blocks = self.cfg.layers_per_block + 1  # of a level on the way up
        for level in self.up_blocks:
            skips, taken = skips[:-blocks], skips[-blocks:]
            x = level(x, taken, inputs)
        return self.prediction(x)

    def features(self, sample: Tensor) -> Tensor:
        """[B, in_channels, h, w] -> the first feature map [B, widths[0], h, w]."""
        features: Tensor = self.conv_in(laid_out(sample))
        return features

    def prediction(self, x: Tensor) -> Tensor:
        """The last feature map [B, widths[0], h, w] -> [B, out_channels, h, w]."""
        output: Tensor = self.conv_out(self.conv_norm_out(x))
        return output

    def _vector(
        self,
        sample: Tensor,
        timesteps: Tensor,
        class_labels: Tensor | None,
        pooled: Tensor | None,
        sizes: Tensor | None,
        vector: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """The vector [B, E] of all residual blocks: time, class, SDXL's pooled text and sizes; SiLU once for all."""
        cfg = self.cfg
        waves = self._waves(timesteps, cfg.block_out_channels[0], sample)
        if self.time_embedding.cond_proj is not None:
            assert cfg.time_cond_proj_dim is not None
            guidance = torch.ones_like(timesteps) if guidance is None else guidance
            told = guidance_embedding(guidance, cfg.time_cond_proj_dim).to(sample.dtype)
            waves = waves + self.time_embedding.cond_proj(told)
        time = self.time_embedding(waves)  # [B, E]
        if self.class_embedding is not None:
            assert class_labels is not None
            if cfg.class_embed_type == "timestep":
                class_labels = self._waves(class_labels, cfg.block_out_channels[0], sample)
            time = time + self.class_embedding(class_labels)
        if self.add_embedding is not None:
            assert pooled is not None and sizes is not None and cfg.addition_time_embed_dim is not None
            waves = self._waves(sizes.flatten(), cfg.addition_time_embed_dim, sample).unflatten(0, sizes.shape)
            time = time + self.add_embedding(torch.cat([pooled, waves.flatten(1)], dim=1))
        return F.silu(time if vector is None else time + vector)

    def _waves(self, numbers: Tensor, channels: int, sample: Tensor) -> Tensor:
        """[B] -> [B, channels] in the sample's dtype."""
        waves = timestep_embedding(numbers, channels, self.cfg.flip_sin_to_cos, self.cfg.freq_shift)
        return waves.to(sample.dtype)

    def keys_values(self, context: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Keys and values of the text [B, L, D] by layer, to be given in its place call after call."""
        layers = (module for module in self.modules() if isinstance(module, Attention) and module.is_cross)
        return {layer.name: layer.keys_values(context) for layer in layers}

    def save_pretrained(
        self, folder: str | Path, weights: Weights | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write the folder; `weights` (an average, or gathered from shards) instead of the module's own."""
        save_folder(folder, to_json(self.cfg), self.state_dict() if weights is None else weights, metadata=metadata)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read such a folder, or a U-Net in diffusers' format; errors as in `models.formats.weights`."""
        cfg = read_config(folder, UNetConfig, *FORMATS)
        return load_folder(folder, lambda: cls(cfg))

    @classmethod
    def read(cls, folder: str | Path) -> tuple[UNetConfig, dict[str, Tensor]]:
        """Configuration and weights of such a folder, as its file has them; neither is in memory then."""
        cfg = read_config(folder, UNetConfig, *FORMATS)
        with torch.device("meta"):
            expected = cls(cfg).state_dict()
        return cfg, read_folder(folder, expected)


# -------------------- levels ------------------------------------------------------------------------------------------


class LevelInputs(NamedTuple):
    """Inputs that every level shares."""

    time: Tensor  # [B, E], through its SiLU
    context: Context | None  # of the text [B, L, D], if the network has one
    attn_control: AttentionControl | None


class Level(nn.Module):
    """Residual blocks, and attention after each where the level attends: common to the levels of all three kinds.

    Args:
        level: index into the configuration's lists.
        inputs: input channels of each residual block.
        attend: whether attention follows each of them: to the text where the network has one, else to the pixels only.
    """

    gradient_checkpointing = False  # keep only what a residual block with its attention is given, and compute it again

    def __init__(self, cfg: UNetConfig, level: int, inputs: list[int], attend: bool) -> None:
        super().__init__()
        self.cfg, self.channels = cfg, cfg.block_out_channels[level]
        self.attentions = nn.ModuleList(self._attention(level) for _ in inputs if attend)
        self.resnets = nn.ModuleList(self._resnet(width) for width in inputs)

    def _attention(self, level: int) -> nn.Module:
        cfg, heads = self.cfg, self.cfg.heads[level]
        if cfg.cross_attention_dim is None:
            return ImageSelfAttention(self.channels, heads, cfg.norm_num_groups, cfg.norm_eps)
        return SpatialTransformer(
            self.channels,
            heads,
            cfg.cross_attention_dim,
            cfg.depths[level],
            cfg.norm_num_groups,
            cfg.use_linear_projection,
        )

    def _resnet(self, inputs: int, resample: Callable[[Tensor], Tensor] | None = None) -> ResBlock:
        cfg = self.cfg
        time_channels = 4 * cfg.block_out_channels[0]
        scale_shift = cfg.resnet_time_scale_shift == "scale_shift"
        return ResBlock(
            inputs,
            self.channels,
            time_channels,
            cfg.norm_num_groups,
            cfg.norm_eps,
            scale_shift=scale_shift,
            resample=resample,
        )

    def _block(self, resnet: nn.Module, attention: nn.Module | None, x: Tensor, inputs: LevelInputs) -> Tensor:
        """A residual block and its attention."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(_run, resnet, attention, x, inputs, use_reentrant=False)
        return _run(resnet, attention, x, inputs)


def _run(resnet: nn.Module, attention: nn.Module | None, x: Tensor, inputs: LevelInputs) -> Tensor:
    x = resnet(x, inputs.time)  # [B, C, h, w]
    return x if attention is None else attention(x, inputs.context, inputs.attn_control)


class DownLevel(Level):
    """A level on the way down; all but the last lead to the next with `downsamplers`."""

    def __init__(self, cfg: UNetConfig, level: int, inputs: list[int]) -> None:
        kind = cfg.down_block_types[level]
        super().__init__(cfg, level, inputs, "Attn" in kind)
        self.downsamplers = nn.ModuleList()
        in_resnet = resizes_in_resnet(kind, cfg.downsample_type)
        if level < len(cfg.block_out_channels) - 1:
            self.downsamplers.append(
                self._resnet(self.channels, halve) if in_resnet else Downsample(self.channels, padding=1)
            )

    def forward(self, x: Tensor, inputs: LevelInputs) -> list[Tensor]:
        """Every result on the way; the next level goes on from the last one.

        They are returned, not appended to a list that is given: ZeRO stage 3 hands a module a copy of its lists.
        """
        results = [x]
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            results.append(self._block(resnet, attention, results[-1], inputs))
        for downsample in self.downsamplers:
            results.append(_resized(downsample, results[-1], inputs.time))  # [B, C, h/2, w/2]
        return results[1:]


class UpLevel(Level):
    """A level on the way up; all but the last lead to the next with `upsamplers`."""

    def __init__(self, cfg: UNetConfig, level: int, inputs: list[int]) -> None:
        kind = cfg.up_block_types[-1 - level]
        super().__init__(cfg, level, inputs, "Attn" in kind)
        self.upsamplers = nn.ModuleList()
        in_resnet = resizes_in_resnet(kind, cfg.upsample_type)
        if level > 0:
            self.upsamplers.append(self._resnet(self.channels, double) if in_resnet else Upsample(self.channels))

    def forward(self, x: Tensor, skips: list[Tensor], inputs: LevelInputs) -> Tensor:
        """`x` [B, C', h, w] -> [B, C, 2h, 2w]; each residual block takes its own of `skips`, the last first."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = self._block(resnet, attention, torch.cat([x, skips.pop()], dim=1), inputs)
        for upsample in self.upsamplers:
            x = _resized(upsample, x, inputs.time)
        return x


class MidLevel(Level):
    """Residual block, attention, residual block at the smallest size."""

    def __init__(self, cfg: UNetConfig) -> None:
        channels = cfg.block_out_channels[-1]
        super().__init__(cfg, -1, [channels], attend=True)
        self.resnets.append(self._resnet(channels))

    def forward(self, x: Tensor, inputs: LevelInputs) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = self._block(resnet, attention, x, inputs)
        return x


def _resized(layer: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    return layer(x, time) if isinstance(layer, ResBlock) else layer(x)


# -------------------- embeddings of the time and of other vectors -----------------------------------------------------


def timestep_embedding(timesteps: Tensor, channels: int, flip_sin_to_cos: bool, freq_shift: int) -> Tensor:
    """Sines and cosines of falling frequencies (Vaswani et al. 2017): `timesteps` [B] -> [B, channels]."""
    half = channels // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(exponent / (half - freq_shift))  # [B, half]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


def guidance_embedding(scales: Tensor, channels: int) -> Tensor:
    """Scales of guidance [B] -> [B, channels], as diffusers' pipelines embed them (Luo et al. 2023, "LCM")."""
    return timestep_embedding(1000.0 * (scales - 1.0), channels, flip_sin_to_cos=False, freq_shift=1)


class VectorEmbedding(nn.Module):
    """Two linear layers, on the sinusoidal embedding of a time or on any other vector.

    Args:
        told: width of what is projected and added to the embedding of the time; None: nothing is.
    """

    def __init__(self, channels: int, time_channels: int, told: int | None = None) -> None:
        super().__init__()
        self.cond_proj = None if told is None else nn.Linear(told, channels, bias=False)
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels] -> [B, E]."""
        return self.linear_2(F.silu(self.linear_1(x)))


def _vector_embeddings(cfg: UNetConfig) -> tuple[nn.Module | None, VectorEmbedding | None]:
    """Layers for what joins the time's embedding: the class, and SDXL's pooled text and sizes."""
    channels = cfg.block_out_channels[0]
    label: nn.Module | None = None
    if cfg.num_class_embeds is not None:
        label = nn.Embedding(cfg.num_class_embeds, 4 * channels)
    elif cfg.class_embed_type == "timestep":
        label = VectorEmbedding(channels, 4 * channels)
    elif cfg.class_embed_type == "projection":
        label = VectorEmbedding(cfg.projected_width, 4 * channels)
    added = None if cfg.addition_embed_type is None else VectorEmbedding(cfg.projected_width, 4 * channels)
    return label, added
