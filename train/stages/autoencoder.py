"""The first training of the LDM paper: KL autoencoder with perceptual and adversarial loss (section 3.1)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import AutoencoderRun, Reconstruction
from data.datasets import ImageDataset
from data.streams import image_stream
from models.autoencoder import Autoencoder, kl
from models.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from models.losses import perceptual_distance, psnr, ssim
from train.engine.draws import normal
from train.engine.journal import Journal
from train.engine.pictures import grid, to_uint8
from train.engine.provenance import require_same
from train.engine.runtime import Runtime
from train.engine.trainable import Trainable

PREVIEW = 8  # held-out images in the picture of reconstructions
HELDOUT = 256  # held-out images behind the metrics, at most


class AutoencoderStage:
    """Generator and discriminator, each a network with its own optimiser."""

    name = "autoencoder"

    def __init__(self, cfg: AutoencoderRun, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        self.dataset = image_stream(cfg.shards, cfg.images, cfg.seed, cfg.stream)
        self.heldout = ImageDataset(f"{cfg.shards}/heldout", cfg.images, cfg.seed, cfg.stream)
        torch.manual_seed(cfg.seed)  # initial weights
        self.autoencoder = Autoencoder(cfg.model)
        if cfg.init_from is not None:
            self.autoencoder = Autoencoder.from_pretrained(cfg.init_from)
            require_same("init_from", cfg.model, self.autoencoder.cfg)
        total = cfg.loop.samples
        self.generator = Trainable(runtime, self.autoencoder, cfg.optim, cfg.batch, total, name="generator")
        self.trainables = {"generator": self.generator}
        self.adversarial = cfg.loss.adversarial_weight > 0
        if self.adversarial:
            critic = PatchDiscriminator(cfg.discriminator, cfg.model.out_channels)
            if cfg.images.resolution < critic.smallest_image:
                raise UserError(
                    f"discriminator.layers={cfg.discriminator.layers}: needs images.resolution>="
                    f"{critic.smallest_image}, it is {cfg.images.resolution}"
                )
            self.critic = Trainable(runtime, critic, cfg.discriminator_optim, cfg.batch, total, name="discriminator")
            self.trainables["discriminator"] = self.critic
        self.judging = False  # whether the discriminator takes part in this step
        self.perceptual = perceptual_distance(cfg.loss.perceptual)
        if self.perceptual is not None:
            self.perceptual.to(runtime.device)

    def micro_step(self, batch: dict[str, Any], last: bool, samples_seen: int) -> dict[str, Tensor]:
        """Forward and backward pass of one micro-batch through both networks."""
        images = batch["image"].to(self.runtime.device)  # [B, 3, H, W]
        factor = self.cfg.model.downscale
        shape = (self.cfg.model.latent_channels, images.shape[2] // factor, images.shape[3] // factor)
        noise = normal(self.cfg.seed, batch["position"], shape, "posterior").to(images.device)
        reconstruction, moments = self.generator(images, noise)
        metrics, likelihood, loss = self.reconstruction_loss(images, reconstruction, moments)
        self.judging = self.adversarial and samples_seen >= self.cfg.loss.adversarial_start
        if not self.judging:
            self.generator.backward(loss, last)
            return metrics
        self.critic.module.requires_grad_(False)
        fooled = generator_loss(self.critic.module(reconstruction))
        weight = adaptive_weight(likelihood, fooled, self.autoencoder.last_layer)
        self.generator.backward(loss + self.cfg.loss.adversarial_weight * weight * fooled, last)
        self.critic.module.requires_grad_(True)
        judged = self.critic(torch.cat([images, reconstruction.detach()]))
        real, fake = judged.chunk(2)
        critic_loss = discriminator_loss(real, fake)
        self.critic.backward(critic_loss, last)
        return metrics | {
            "train/gan_generator": fooled.detach(),
            "train/gan_discriminator": critic_loss.detach(),
            "train/gan_weight": weight,
            "train/logits_real": real.detach().mean(),
            "train/logits_fake": fake.detach().mean(),
        }

    def reconstruction_loss(
        self, images: Tensor, output: Tensor, moments: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Metrics, reconstruction term and whole loss; means per pixel: the paper's sums / number of pixel values."""
        cfg = self.cfg.loss
        error = output.float() - images
        distance = error.abs().mean() if cfg.reconstruction is Reconstruction.l1 else error.square().mean()
        divergence = kl(moments).mean()  # sum over the latent, mean over the batch
        metrics = {"train/reconstruction": distance.detach(), "train/kl": divergence.detach()}
        likelihood = distance
        if self.perceptual is not None and cfg.perceptual_weight > 0:
            feature_distance = self.perceptual(output.float(), images).mean()
            likelihood = likelihood + cfg.perceptual_weight * feature_distance
            metrics["train/perceptual"] = feature_distance.detach()
        loss = likelihood + cfg.kl_weight * divergence / images[0].numel()
        metrics |= {"train/loss": loss.detach(), "train/psnr": psnr(output.detach().float(), images).mean()}
        return metrics, likelihood, loss

    def finish_step(self, samples_seen: int) -> dict[str, float]:
        """One optimiser step of each network that learned something."""
        metrics = {"train/grad_norm": self.generator.step(samples_seen), "train/lr": self.generator.lr}
        if self.judging:
            metrics["train/grad_norm_discriminator"] = self.critic.step(samples_seen)
        return metrics

    @torch.no_grad()
    def evaluate(self, samples_seen: int, journal: Journal) -> dict[str, float]:
        """PSNR, SSIM and perceptual distance of held-out reconstructions (from the mean of the posterior)."""
        network, device = self.autoencoder.eval(), self.runtime.device
        count = min(HELDOUT, self.heldout.samples)
        measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"eval/psnr": psnr, "eval/ssim": ssim}
        if self.perceptual is not None:
            measures[f"eval/{self.cfg.loss.perceptual.value}"] = self.perceptual
        sums = dict.fromkeys(measures, 0.0)  # a rank without pictures joins the sum with the same names
        for index in range(self.runtime.rank, count, self.runtime.world):
            image = self.heldout.at(index)["image"][None].to(device)  # [1, 3, H, W]
            output = network.decode(network.encode(image).chunk(2, dim=1)[0]).clamp(-1, 1)
            for name, measure in measures.items():
                sums[name] += float(measure(output, image).sum())
        if self.runtime.is_main:
            journal.image("reconstructions", self.preview(), samples_seen, "held-out images above what is decoded")
        network.train()
        return {name: total / count for name, total in self.runtime.sum(sums).items()}

    def preview(self) -> np.ndarray:
        """Originals above their reconstructions."""
        count = min(PREVIEW, self.heldout.samples)
        images = torch.stack([self.heldout.at(i)["image"] for i in range(count)]).to(self.runtime.device)
        output = self.autoencoder.decode(self.autoencoder.encode(images).chunk(2, dim=1)[0])
        return np.asarray(grid(to_uint8(torch.cat([images, output])), columns=count, scale=2))

    def export(self, folder: Path) -> None:
        """The generator in diffusers' format."""
        if self.runtime.is_main:
            self.autoencoder.save_pretrained(folder)
