"""The autoencoder against diffusers' with the same weights and images: encode, decode and a training step."""

import tempfile
from collections.abc import Callable, Iterator

import torch
from _compare import Comparison, main
from _networks import THREADS, forward, in_seconds_and_bytes, training_step
from diffusers import AutoencoderKL
from torch import Tensor

from conf.schema.networks import AutoencoderConfig
from models.autoencoder import Autoencoder

CONFIG = AutoencoderConfig(block_out_channels=[64, 128, 256], latent_channels=4)
SIDE, BATCH = 128, 4


def comparisons() -> Iterator[Comparison]:
    """Each in seconds and bytes."""
    torch.manual_seed(0)
    ours = Autoencoder(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        peer = AutoencoderKL.from_pretrained(folder).train()
    for parameter in (*ours.parameters(), *peer.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    side = SIDE // CONFIG.downscale
    latents = torch.randn(BATCH, CONFIG.latent_channels, side, side)
    noise = torch.randn(BATCH, CONFIG.latent_channels, side, side)

    def through_peer() -> Tensor:
        posterior = peer.encode(images).latent_dist
        return peer.decode(posterior.mean + posterior.std * noise).sample

    work: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], Callable]] = {
        "encode": (lambda: ours.encode(images), lambda: peer.encode(images).latent_dist.parameters, forward),
        "decode": (lambda: ours.decode(latents), lambda: peer.decode(latents).sample, forward),
        "training_step": (lambda: ours(images, noise)[0], through_peer, training_step),
    }
    for name, (mine, theirs, wrap) in work.items():
        torch.testing.assert_close(mine(), theirs(), rtol=1e-3, atol=1e-4)
        yield from in_seconds_and_bytes(name, mine, theirs, wrap)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    main(comparisons())
