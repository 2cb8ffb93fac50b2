"""Guidance: wrappers that bind a conditional network to its conditions and leave a `Network` for the process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.process import Network

# (x_t [B, C, h, w], timesteps [B], context [B, L, D] or what was prepared of it) -> prediction [B, C, h, w]
ConditionalNetwork = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Joined:
    """Which prompts make one picture together (Liu et al. 2022, "Composable diffusion"): R prompts for B pictures."""

    pictures: Tensor  # [R] int64, the picture of each prompt
    weights: Tensor  # [R]


def classifier_free(
    network: ConditionalNetwork,
    context: Tensor,
    null_context: Tensor,
    scale: float,
    prepare: Callable[[Tensor], Any] = lambda context: context,
    *,
    rescale: float = 0.0,
    joined: Joined | None = None,
) -> Network:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): uncond + scale (cond - uncond), in one batched call.

    Args:
        network: the conditional network.
        context: text states of the prompts [B, L, D], of all R prompts [R, L, D] with `joined`.
        null_context: text states of the empty caption or of a negative prompt [1 or B, L, D].
        scale: 1 is the plain conditional network, called once per picture; more follows the prompt more closely.
        prepare: what of the texts to compute once for all calls, such as `UNet.keys_values`.
        rescale: 0-1, how far the result gets the standard deviation of the conditional prediction (`rescaled`).
        joined: prompts that share a picture; cond is then uncond + sum of weight (cond_i - uncond).
    """
    if scale == 1 and joined is None:
        prepared = prepare(context)
        return lambda x_t, timesteps: network(x_t, timesteps, prepared)
    pictures = torch.arange(len(context), device=context.device) if joined is None else joined.pictures
    count = int(pictures.max()) + 1
    contexts = prepare(torch.cat([null_context.expand(count, -1, -1), context]))  # [B + R, L, D]
    rows = torch.cat([torch.arange(count, device=pictures.device), pictures])

    def guided(x_t: Tensor, timesteps: Tensor) -> Tensor:
        predictions = network(x_t[rows], timesteps[rows], contexts)  # [B + R, C, h, w]
        uncond, cond = predictions[:count], predictions[count:]
        if joined is not None:
            apart = joined.weights.to(cond.dtype).view(-1, 1, 1, 1) * (cond - uncond[pictures])
            cond = uncond.index_add(0, pictures, apart)
        return rescaled(uncond + scale * (cond - uncond), cond, rescale)

    return guided


def rescaled(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """Guided predictions [B, C, h, w] with the deviation of those without guidance (Lin et al. 2024, section 3.4)."""
    if share == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    factor = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (share * factor + 1 - share)


def within(interval: tuple[float, float], inside: Network, outside: Network) -> Network:
    """Guidance in a limited interval (Kynkäänniemi et al. 2024): `inside` at low < timestep <= high.

    All timesteps of a call are the same, as they are in sampling.
    """
    low, high = interval

    def network(x_t: Tensor, timesteps: Tensor) -> Tensor:
        return (inside if low < float(timesteps[0]) <= high else outside)(x_t, timesteps)

    return network
