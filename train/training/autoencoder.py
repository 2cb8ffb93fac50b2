"""The first training of the LDM paper: KL or VQ autoencoder with perceptual and adversarial loss (section 3.1)."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from conf.process import tell
from conf.schema import AutoencoderRun, Reconstruction
from conf.schema.networks import AutoencoderConfig
from data.image_dataset import Batch, ImageDataset
from data.images import in_range
from data.streams import image_stream
from models.autoencoder import Autoencoder, Quantised, codebook_use, kl
from models.conditions import Wanted
from models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    r1_penalty,
)
from models.flops import counted_flops
from models.formats.single_file import is_single_file, load_autoencoder_file
from models.losses import perceptual_distance, psnr, ssim
from train.engine.backend.distribute import require_compiler
from train.engine.image_grid import grid, to_uint8
from train.engine.metric_log import MetricLog
from train.engine.runtime import Runtime
from train.engine.sample_rng import Draws, SampleRng
from train.engine.trainable import Trainable
from train.latents.provenance import require_same

PREVIEW = 8  # held-out images in the image of reconstructions
LECAM_HALF_LIFE = 10_000  # samples after which a verdict counts half in the running means
HELDOUT = 256  # held-out images behind the metrics, at most


def pretrained_autoencoder(source: str, cfg: AutoencoderConfig) -> Autoencoder:
    """Another training's autoencoder: a folder in diffusers' format or a checkpoint in one file."""
    if is_single_file(source):
        return load_autoencoder_file(source, cfg)
    network = Autoencoder.from_pretrained(source)
    require_same("init_from", asdict(cfg), asdict(network.cfg))
    return network


def latent_shape(images: Tensor, cfg: AutoencoderConfig) -> tuple[int, int, int]:
    """(C, h, w) of one latent of images [B, 3, H, W]."""
    return cfg.cached_channels, images.shape[2] // cfg.downscale, images.shape[3] // cfg.downscale


def wanted_of(batch: Batch, cfg: AutoencoderConfig) -> Wanted:
    """The random numbers that training asks for of a batch."""
    return {"posterior": latent_shape(batch["pixels"], cfg)}


class AutoencoderStage:
    """Generator and discriminator, each a network with its own optimiser."""

    name = "autoencoder"

    def __init__(self, cfg: AutoencoderRun, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        self.dataset = image_stream(cfg.shards, cfg.images, cfg.seed, cfg.stream, cfg.batch.global_batch_size)
        self.heldout = ImageDataset(f"{cfg.shards}/heldout", cfg.images, cfg.seed, cfg.stream)
        self.extend = Draws(cfg.seed, partial(wanted_of, cfg=cfg.model))
        torch.manual_seed(cfg.seed)  # initial weights
        self.autoencoder = Autoencoder(cfg.model)
        if cfg.init_from is not None:
            self.autoencoder = pretrained_autoencoder(cfg.init_from, cfg.model)
        side, total = cfg.images.resolution, cfg.loop.samples
        image = torch.empty(1, cfg.model.in_channels, side, side, device="meta")
        latent = torch.empty(1, *latent_shape(image, cfg.model), device="meta")
        self.bound_to = dict[str, Any]()
        self.flops_per_sample = 3.0 * counted_flops(self.autoencoder, image, latent)  # of the autoencoder alone
        if cfg.runtime.gradient_checkpointing:
            self.autoencoder.checkpoint_gradients()
        if cfg.runtime.compile:
            require_compiler()
            # Each level by itself: the adaptive weight asks for gradients at the last layer and keeps the graph, which
            # a compiled one cannot do. Nor has it second derivatives (R1), so that the discriminator stays as it is.
            for level in self.autoencoder.levels():
                level.compile()
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
            self.verdict_means = critic.verdict_means  # [2], on the device by now
        self.judging = False  # whether the discriminator takes part in this step
        self.verdicts: list[Tensor] = []  # [2] each, mean real and mean fake verdict of this step's micro-batches
        self.perceptual = perceptual_distance(cfg.loss.perceptual)
        if self.perceptual is not None:
            self.perceptual.to(runtime.device)

    def micro_step(self, batch: dict[str, Any], last: bool, samples_seen: int) -> dict[str, Tensor]:
        """Forward and backward pass of one micro-batch through both networks."""
        images = in_range(batch["pixels"])  # [B, 3, H, W]
        draws = SampleRng.of(batch, self.cfg.seed, images.device)
        noise = draws.normal("posterior", latent_shape(images, self.cfg.model))
        reconstruction, latents = self.generator(images, noise)
        metrics, likelihood, loss = self.reconstruction_loss(images, reconstruction, latents)
        self.judging = self.adversarial and samples_seen >= self.cfg.loss.adversarial_start
        if not self.judging:
            self.generator.backward(loss, last)
            return metrics
        self.critic.module.requires_grad_(False)
        fooled = generator_loss(self.critic.module(reconstruction), self.cfg.loss.adversarial)
        weight = adaptive_weight(likelihood, fooled, self.autoencoder.last_layer)
        self.generator.backward(loss + self.cfg.loss.adversarial_weight * weight * fooled, last)
        self.critic.module.requires_grad_(True)
        judgement, critic_loss = self.judge(images, reconstruction.detach())
        self.critic.backward(critic_loss, last)
        return metrics | judgement | {"train/gan_generator": fooled.detach(), "train/gan_weight": weight}

    def judge(self, images: Tensor, reconstruction: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Metrics and loss of the discriminator on one micro-batch of both kinds."""
        cfg = self.cfg.loss
        judged = torch.cat([images, reconstruction]).requires_grad_(cfg.r1_weight > 0)
        real, fake = self.critic(judged).chunk(2)  # [B, 1, h, w] each
        loss = discriminator_loss(real, fake, cfg.adversarial)
        metrics = {
            "train/gan_discriminator": loss.detach(),
            "train/logits_real": real.detach().mean(),
            "train/logits_fake": fake.detach().mean(),
        }
        if cfg.r1_weight > 0:
            penalty = r1_penalty(real, judged)
            metrics["train/r1"] = penalty.detach()
            loss = loss + cfg.r1_weight * penalty
        if cfg.lecam_weight > 0:
            penalty = lecam_penalty(real, fake, *self.verdict_means.unbind())
            metrics["train/lecam"] = penalty.detach()
            loss = loss + cfg.lecam_weight * penalty
            self.verdicts.append(torch.stack([real.detach().mean(), fake.detach().mean()]))
        return metrics, loss

    def follow_verdicts(self) -> None:
        """Move the discriminator's running means by this step's verdicts, those of all processes."""
        weighted = [weight * one for weight, one in zip(self.critic.micro_weights, self.verdicts, strict=True)]
        now = self.runtime.summed(torch.stack(weighted).mean(dim=0)) / self.runtime.world  # [2]
        keep = 0.5 ** (self.cfg.batch.global_batch_size / LECAM_HALF_LIFE)
        # A step that is left out leaves no trace.
        self.verdict_means.lerp_(torch.where(now.isfinite().all(), now, self.verdict_means), 1 - keep)
        self.verdicts.clear()

    def reconstruction_loss(
        self, images: Tensor, output: Tensor, latents: Tensor | Quantised
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Metrics, reconstruction term and whole loss; means per pixel: the paper's sums / number of pixel values."""
        cfg = self.cfg.loss
        error = output.float() - images
        distance = error.abs().mean() if cfg.reconstruction is Reconstruction.l1 else error.square().mean()
        metrics = {"train/reconstruction": distance.detach()}
        likelihood = distance
        if self.perceptual is not None and cfg.perceptual_weight > 0:
            feature_distance = self.perceptual(output.float(), images).mean()
            likelihood = likelihood + cfg.perceptual_weight * feature_distance
            metrics["train/perceptual"] = feature_distance.detach()
        if isinstance(latents, Quantised):
            loss = likelihood + cfg.codebook_weight * latents.loss
            use = codebook_use(latents.indices, self.cfg.model.num_vq_embeddings or 0)
            metrics |= {"train/codebook": latents.loss.detach(), "train/codebook_use": use}
        else:
            divergence = kl(latents).mean()  # sum over the latent, mean over the batch
            loss = likelihood + cfg.kl_weight * divergence / images[0].numel()
            metrics["train/kl"] = divergence.detach()
        metrics |= {"train/loss": loss.detach(), "train/psnr": psnr(output.detach().float(), images).mean()}
        return metrics, likelihood, loss

    def finish_step(self, samples_seen: int) -> dict[str, Tensor | float]:
        """One optimiser step of each network that learned something."""
        norm = self.generator.step(samples_seen)
        metrics: dict[str, Tensor | float] = {"train/grad_norm": norm, "train/lr": self.generator.lr}
        if self.judging:
            metrics["train/grad_norm_discriminator"] = self.critic.step(samples_seen)
            if self.verdicts:
                self.follow_verdicts()
        return metrics

    @torch.no_grad()
    def evaluate(self, samples_seen: int, journal: MetricLog) -> dict[str, float]:
        """PSNR, SSIM and perceptual distance of held-out reconstructions (from the mean of the posterior)."""
        network, device = self.autoencoder.eval(), self.runtime.device
        count = min(HELDOUT, self.heldout.samples)
        measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"eval/psnr": psnr, "eval/ssim": ssim}
        if self.perceptual is not None:
            measures[f"eval/{self.cfg.loss.perceptual.value}"] = self.perceptual
        used = torch.zeros(self.cfg.model.num_vq_embeddings or 0, device=device)  # vectors of the codebook that occur
        sums = dict.fromkeys(measures, 0.0)  # a rank without judged joins the sum with the same names
        for index in range(self.runtime.rank, count, self.runtime.world):
            tell("evaluating", index, count)
            image = self.heldout.at(index)["image"][None].to(device)  # [1, 3, H, W]
            latents = network.encode(image).chunk(2, dim=1)[0]
            output = network.decode(latents).clamp(-1, 1)
            if network.quantize is not None:
                used[network.quantize(latents).indices.flatten()] = 1
            for name, measure in measures.items():
                sums[name] += float(measure(output, image).sum())
        if self.runtime.is_main:
            journal.image("reconstructions", self.preview(), samples_seen, "held-out images above what is decoded")
        network.train()
        metrics = {name: total / count for name, total in self.runtime.sum(sums).items()}
        if len(used):
            occurring = [i for part in self.runtime.gather_objects(used.nonzero().flatten().tolist()) for i in part]
            metrics["eval/codebook_use"] = len(set(occurring)) / len(used)
        return metrics

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
