"""How many floating-point operations a network takes: a U-Net from its configuration alone, others counted by torch.

Convolutions, matrix products and attention, a multiplication and an addition counted apart; norms, activations and
sums are left out, as torch's own counter leaves them out. Shapes: h x w the latent, L the tokens of the text.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from conf.schema.networks import UNetConfig, resizes_in_resnet


def counted_flops(network: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of one forward pass on `inputs`, which are on the meta device: nothing is computed."""
    state = {name: tensor.to("meta") for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(network, state, inputs)
    return int(counter.get_total_flops())


def unet_flops(cfg: UNetConfig, height: int, width: int, tokens: int = 0) -> int:
    """FLOPs of one forward pass on one latent; a training step takes three times as many.

    Args:
        cfg: the network.
        height: h.
        width: w.
        tokens: L; 0 for a network without text.
    """
    widths, layers = cfg.block_out_channels, cfg.layers_per_block
    first = widths[0]
    pixels = [height * width // 4**level for level in range(len(widths))]
    total = _conv(9, cfg.in_channels, first, pixels[0]) + _conv(9, first, cfg.out_channels, pixels[0])
    total += _vectors(cfg)
    skips = [first]
    for level, channels in enumerate(widths):
        for _ in range(layers):
            total += _resnet(cfg, skips[-1], channels, pixels[level])
            total += _attention(cfg, level, pixels[level], tokens, cfg.down_block_types[level])
            skips.append(channels)
        if level < len(widths) - 1:
            in_resnet = resizes_in_resnet(cfg.down_block_types[level], cfg.downsample_type)
            resize = _resnet(cfg, channels, channels, pixels[level + 1])
            total += resize if in_resnet else _conv(9, channels, channels, pixels[level + 1])
            skips.append(channels)
    middle = widths[-1]
    total += 2 * _resnet(cfg, middle, middle, pixels[-1]) + _attention(cfg, -1, pixels[-1], tokens)
    previous = middle
    for number, kind in enumerate(cfg.up_block_types):
        level = len(widths) - 1 - number
        for _ in range(layers + 1):
            total += _resnet(cfg, previous + skips.pop(), widths[level], pixels[level])
            total += _attention(cfg, level, pixels[level], tokens, kind)
            previous = widths[level]
        if level > 0 and resizes_in_resnet(kind, cfg.upsample_type):
            total += _resnet(cfg, previous, previous, pixels[level - 1])
        elif level > 0:  # four 2x2 convolutions in place of a 3x3 one on four times the pixels (`NearestConv2d`)
            rim = (height // 2**level + 1) * (width // 2**level + 1)
            total += _conv(16, previous, previous, rim)
    return total


def _conv(taps: int, inputs: int, outputs: int, pixels: int) -> int:
    return 2 * taps * inputs * outputs * pixels


def _resnet(cfg: UNetConfig, inputs: int, outputs: int, pixels: int) -> int:
    """A residual block whose output has so many pixels."""
    shortcut = _conv(1, inputs, outputs, pixels) if inputs != outputs else 0
    time = 2 * 4 * cfg.block_out_channels[0] * outputs * (2 if cfg.resnet_time_scale_shift == "scale_shift" else 1)
    return _conv(9, inputs, outputs, pixels) + _conv(9, outputs, outputs, pixels) + shortcut + time


def _attention(cfg: UNetConfig, level: int, pixels: int, tokens: int, kind: str = "Attn") -> int:
    """The attention after one residual block of a level, if that kind of level attends."""
    channels = cfg.block_out_channels[level]
    if "Attn" not in kind:
        return 0
    to_pixels = 4 * _conv(1, channels, channels, pixels) + 4 * pixels * pixels * channels
    if cfg.cross_attention_dim is None:
        return to_pixels
    to_text = 2 * _conv(1, channels, channels, pixels) + 4 * pixels * tokens * channels
    to_text += 2 * _conv(1, cfg.cross_attention_dim, channels, tokens)
    feed_forward = _conv(1, channels, 8 * channels, pixels) + _conv(1, 4 * channels, channels, pixels)
    projections = 2 * _conv(1, channels, channels, pixels)
    return cfg.depths[level] * (to_pixels + to_text + feed_forward) + projections


def _vectors(cfg: UNetConfig) -> int:
    """The time's embedding and what joins it."""
    first = cfg.block_out_channels[0]
    embedding = 4 * first
    total = 2 * embedding * (first + embedding)
    if cfg.class_embed_type == "timestep":
        total += 2 * embedding * (first + embedding)
    elif cfg.class_embed_type == "projection" or cfg.addition_embed_type is not None:
        total += 2 * embedding * (cfg.projected_width + embedding)
    return total
