"""Guidance: wrappers that bind a conditional network to its conditions and leave a `Network` for the process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.process import Network

# (x_t [B, C, h, w], timesteps [B], context [B, L, D] or what was prepared of it) -> prediction [B, C, h, w]
ConditionalNetwork = Callable[[Tensor, Tensor, Any], Tensor]


def classifier_free(
    network: ConditionalNetwork,
    context: Tensor,
    null_context: Tensor,
    scale: float,
    prepare: Callable[[Tensor], Any] = lambda context: context,
) -> Network:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): uncond + scale (cond - uncond), in one batched call.

    Args:
        network: the conditional network.
        context: text states of the prompts [B, L, D].
        null_context: text states of the empty caption [1 or B, L, D].
        scale: 1 is the plain conditional network, called once per picture; more follows the prompt more closely.
        prepare: what of the texts to compute once for all calls, such as `UNet.keys_values`.
    """
    if scale == 1:
        prepared = prepare(context)
        return lambda x_t, timesteps: network(x_t, timesteps, prepared)
    contexts = prepare(torch.cat([null_context.expand_as(context), context]))  # of [2B, L, D]

    def guided(x_t: Tensor, timesteps: Tensor) -> Tensor:
        predictions = network(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), contexts)  # [2B, C, h, w]
        uncond, cond = predictions.chunk(2)
        return uncond + scale * (cond - uncond)

    return guided
