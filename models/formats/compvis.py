"""The names that the code of the latent diffusion paper and of Stable Diffusion (CompVis) gives to the same weights.

Two things change more than their names: linear layers around attention without text are 1x1 convolutions there, and
its queries, keys and values are one layer there in the U-Net, head by head.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from conf.schema.networks import AutoencoderConfig, UNetConfig, resizes_in_resnet
from models.formats.weights import check_names

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."  # before the names in a whole checkpoint


class Pair(NamedTuple):
    """A module under both names; an empty name is the module around it."""

    theirs: str
    ours: str
    ones: int = 0  # dimensions of size 1 that their weight has more, since it is a convolution's
    heads: int = 0  # of a layer that holds queries, keys and values of each head; ours then are to_q, to_k and to_v


UNET_RESNET = [
    Pair("in_layers.0", "norm1"),
    Pair("in_layers.2", "conv1"),
    Pair("emb_layers.1", "time_emb_proj"),
    Pair("out_layers.0", "norm2"),
    Pair("out_layers.3", "conv2"),
    Pair("skip_connection", "conv_shortcut"),
]
AUTOENCODER_RESNET = [
    *(Pair(name, name) for name in ("norm1", "conv1", "norm2", "conv2")),
    Pair("nin_shortcut", "conv_shortcut"),
]
AUTOENCODER_ATTENTION = [
    Pair("norm", "group_norm"),
    Pair("q", "to_q", ones=2),
    Pair("k", "to_k", ones=2),
    Pair("v", "to_v", ones=2),
    Pair("proj_out", "to_out.0", ones=2),
]


def _unet_attention(cfg: UNetConfig, level: int) -> list[Pair]:
    if cfg.cross_attention_dim is not None:
        return [Pair("", "")]  # the same names inside
    return [
        Pair("norm", "group_norm"),
        Pair("qkv", "", ones=1, heads=cfg.heads[level]),
        Pair("proj_out", "to_out.0", ones=1),
    ]


def unet_pairs(cfg: UNetConfig) -> list[Pair]:
    """The modules of a U-Net."""
    pairs = [
        Pair("time_embed.0", "time_embedding.linear_1"),
        Pair("time_embed.2", "time_embedding.linear_2"),
        Pair("input_blocks.0.0", "conv_in"),
        Pair("out.0", "conv_norm_out"),
        Pair("out.2", "conv_out"),
        *_inside("middle_block.0", "mid_block.resnets.0", UNET_RESNET),
        *_inside("middle_block.1", "mid_block.attentions.0", _unet_attention(cfg, -1)),
        *_inside("middle_block.2", "mid_block.resnets.1", UNET_RESNET),
        *_vectors(cfg),
    ]
    blocks = count(1)
    last = len(cfg.block_out_channels) - 1
    for level, kind in enumerate(cfg.down_block_types):
        for layer in range(cfg.layers_per_block):
            pairs += _unet_layer(cfg, f"input_blocks.{next(blocks)}", f"down_blocks.{level}", level, layer, kind)
        if level < last:
            inside = UNET_RESNET if resizes_in_resnet(kind, cfg.downsample_type) else [Pair("op", "conv")]
            pairs += _inside(f"input_blocks.{next(blocks)}.0", f"down_blocks.{level}.downsamplers.0", inside)
    blocks = count(0)
    for number, kind in enumerate(cfg.up_block_types):
        for layer in range(cfg.layers_per_block + 1):
            theirs = f"output_blocks.{next(blocks)}"
            pairs += _unet_layer(cfg, theirs, f"up_blocks.{number}", last - number, layer, kind)
        if number < last:
            inside = UNET_RESNET if resizes_in_resnet(kind, cfg.upsample_type) else [Pair("conv", "conv")]
            pairs += _inside(f"{theirs}.{2 if 'Attn' in kind else 1}", f"up_blocks.{number}.upsamplers.0", inside)
    return pairs


def _unet_layer(cfg: UNetConfig, theirs: str, ours: str, level: int, layer: int, kind: str) -> Iterator[Pair]:
    """A residual block and the attention after it."""
    yield from _inside(f"{theirs}.0", f"{ours}.resnets.{layer}", UNET_RESNET)
    if "Attn" in kind:
        yield from _inside(f"{theirs}.1", f"{ours}.attentions.{layer}", _unet_attention(cfg, level))


def _vectors(cfg: UNetConfig) -> list[Pair]:
    """Their names for what joins the time's embedding."""
    if cfg.num_class_embeds is not None:
        return [Pair("label_emb", "class_embedding")]
    ours = "add_embedding" if cfg.addition_embed_type is not None else "class_embedding"
    if cfg.addition_embed_type is None and cfg.class_embed_type is None:
        return []
    return [Pair("label_emb.0.0", f"{ours}.linear_1"), Pair("label_emb.0.2", f"{ours}.linear_2")]


def autoencoder_pairs(cfg: AutoencoderConfig) -> list[Pair]:
    """The modules of an autoencoder; the decoder's levels count from the other end."""
    levels = len(cfg.block_out_channels)
    pairs = [Pair(name, name) for name in ("quant_conv", "post_quant_conv")]
    if cfg.num_vq_embeddings is not None:
        pairs.append(Pair("quantize.embedding", "quantize.embedding"))
    for side, way, step, layers in (
        ("encoder", "down", "downsample", cfg.layers_per_block),
        ("decoder", "up", "upsample", cfg.layers_per_block + 1),
    ):
        pairs += [Pair(f"{side}.{name}", f"{side}.{name}") for name in ("conv_in", "conv_out")]
        pairs.append(Pair(f"{side}.norm_out", f"{side}.conv_norm_out"))
        for number in (1, 2):
            ours = f"{side}.mid_block.resnets.{number - 1}"
            pairs += _inside(f"{side}.mid.block_{number}", ours, AUTOENCODER_RESNET)
        if cfg.mid_block_add_attention:
            pairs += _inside(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", AUTOENCODER_ATTENTION)
        for level in range(levels):
            ours = f"{side}.{way}_blocks.{level if side == 'encoder' else levels - 1 - level}"
            for layer in range(layers):
                theirs = f"{side}.{way}.{level}"
                pairs += _inside(f"{theirs}.block.{layer}", f"{ours}.resnets.{layer}", AUTOENCODER_RESNET)
                if level in cfg.attention_levels:
                    pairs += _inside(f"{theirs}.attn.{layer}", f"{ours}.attentions.{layer}", AUTOENCODER_ATTENTION)
            pairs.append(Pair(f"{side}.{way}.{level}.{step}.conv", f"{ours}.{step}rs.0.conv"))
    return pairs


def _inside(theirs: str, ours: str, pairs: Iterable[Pair]) -> Iterator[Pair]:
    for pair in pairs:
        yield pair._replace(theirs=_joined(theirs, pair.theirs), ours=_joined(ours, pair.ours))


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


class Tensors(NamedTuple):
    """A tensor of theirs and those of ours that it holds."""

    theirs: str
    ours: list[str]
    pair: Pair


def _tensors(pairs: Iterable[Pair], weights: Mapping[str, Tensor]) -> Iterator[Tensors]:
    """Their tensors, with those of our state dict `weights` that each holds."""
    inside: dict[str, list[str]] = {}  # module -> names of what it and all modules in it hold
    for name in weights:
        parts = name.split(".")
        for end in range(1, len(parts)):
            inside.setdefault(".".join(parts[:end]), []).append(".".join(parts[end:]))
    for pair in pairs:
        if pair.heads:
            for kind in ("weight", "bias"):
                parts = [f"{pair.ours}.to_{part}.{kind}" for part in "qkv"]
                yield Tensors(f"{pair.theirs}.{kind}", parts, pair)
        else:
            for rest in inside.get(pair.ours, []):
                yield Tensors(f"{pair.theirs}.{rest}", [f"{pair.ours}.{rest}"], pair)


def to_compvis(pairs: Iterable[Pair], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict of ours, without the prefix of a whole checkpoint."""
    made: dict[str, Tensor] = {}
    for theirs, ours, pair in _tensors(pairs, weights):
        tensor = weights[ours[0]]
        if pair.heads:
            split = [weights[name].unflatten(0, (pair.heads, -1)) for name in ours]  # [heads, C/heads, ...] each
            tensor = torch.stack(split, dim=1).flatten(0, 2)  # [3·C, ...]
        more = pair.ones if theirs.endswith(".weight") else 0
        made[theirs] = tensor.reshape(*tensor.shape, *[1] * more)
    return made


def from_compvis(
    where: str, pairs: Iterable[Pair], weights: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our state dict of theirs.

    Args:
        where: name of the file, for the message.
        pairs: of the network.
        weights: theirs, without the prefix of a whole checkpoint.
        like: our state dict, for its names and shapes; may lie on the meta device.

    Raises:
        UserError: missing, surplus or misshapen weights, by their names.
    """
    pairs = list(pairs)
    check_names(where, to_compvis(pairs, like), weights)
    found: dict[str, Tensor] = {}
    for theirs, ours, pair in _tensors(pairs, like):
        tensor = weights[theirs]
        parts = tensor.unflatten(0, (pair.heads, 3, -1)).unbind(1) if pair.heads else [tensor]
        for name, part in zip(ours, parts, strict=True):
            found[name] = part.reshape(like[name].shape)
    return found
