"""Guidance: wrappers that bind a conditional network to its conditions and leave a `Network` for the process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.conditions import Conditioning
from models.diffusion.process import Network, Process

# (x_t [B, C, h, w], timesteps [B], conditioning of each row) -> prediction [B, C, h, w]
ConditionalNetwork = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True, slots=True)
class Joined:
    """Prompts that make one image together (Liu et al. 2022, "Composable diffusion"): R prompts for B images."""

    images: Tensor  # [R] int64, the image of each prompt
    weights: Tensor  # [R]

    def composed(self, cond: Tensor, uncond: Tensor | None, count: int) -> Tensor:
        """Predictions [B, C, h, w] of B images by those of their prompts: uncond + sum of weight (cond_i - uncond).

        Where the weights of each image have the sum 1, `uncond` falls out and may be None.
        """
        weights = self.weights.to(cond.dtype).view(-1, 1, 1, 1)
        if uncond is None:
            return cond.new_zeros(count, *cond.shape[1:]).index_add(0, self.images, weights * cond)
        return uncond.index_add(0, self.images, weights * (cond - uncond[self.images]))


def classifier_free(
    network: ConditionalNetwork,
    conditioning: Conditioning,
    null: Conditioning | None,
    scale: float,
    prepare: Callable[[Conditioning], Conditioning] = lambda conditioning: conditioning,
    *,
    rescale: float = 0.0,
    joined: Joined | None = None,
) -> Network:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): uncond + scale (cond - uncond), in one batched call.

    Args:
        network: the conditional network.
        conditioning: of the B images; with `joined` of all R prompts.
        null: what guidance leads away from, of the B images: dropped conditions, or a negative prompt; None for scale
            1, where the weights of prompts that are joined have the sum 1 for each image.
        scale: 1 is the plain conditional network, called once per image; more follows the prompt more closely.
        prepare: what to compute once for all calls, such as `Denoiser.prepared`.
        rescale: 0-1, how far the result gets the standard deviation of the conditional prediction (`rescaled`).
        joined: prompts that share an image; cond is then uncond + sum of weight (cond_i - uncond).
    """
    if null is None or (scale == 1 and joined is None):
        prepared = prepare(conditioning)

        def unguided(x_t: Tensor, timesteps: Tensor) -> Tensor:
            if joined is None:
                return network(x_t, timesteps, prepared)
            return joined.composed(network(x_t[joined.images], timesteps[joined.images], prepared), None, len(x_t))

        return unguided
    both = prepare(null.followed_by(conditioning))  # of B + R rows

    def guided(x_t: Tensor, timesteps: Tensor) -> Tensor:
        count = len(x_t)
        images = torch.arange(count, device=x_t.device) if joined is None else joined.images
        rows = torch.cat([torch.arange(count, device=x_t.device), images])
        predictions = network(x_t[rows], timesteps[rows], both)  # [B + R, C, h, w]
        uncond, cond = predictions[:count], predictions[count:]
        if joined is not None:
            cond = joined.composed(cond, uncond, count)
        return rescaled(uncond + scale * (cond - uncond), cond, rescale)

    return guided


def stepping(network: ConditionalNetwork, process: Process, sigmas: Tensor) -> ConditionalNetwork:
    """A mean flow that is told, at each of the noise levels sigmas [steps + 1], the length of the step to the next."""
    levels = torch.tensor([process.timestep(sigma) for sigma in sigmas.tolist()])

    def told(x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        nearest = (levels[:-1].to(timesteps.device) - timesteps[:, None]).abs().argmin(dim=1)  # [B]
        lengths = process.told(timesteps, levels[1:].to(timesteps.device)[nearest])
        return network(x_t, timesteps, conditioning._replace(guidance=lengths))

    return told


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


def by_step(timesteps: Sequence[float], makers: Sequence[Callable[[], Network]]) -> Network:
    """A network for each of the timesteps that sampling visits, made when it gets there; one maker: for all.

    All timesteps of a call are the same, as they are in sampling; between two of them it is the nearer one's.
    """
    if len(makers) == 1:
        return makers[0]()

    def network(x_t: Tensor, time: Tensor) -> Tensor:
        distances = [abs(level - float(time[0])) for level in timesteps]
        return makers[distances.index(min(distances))]()(x_t, time)

    return network
