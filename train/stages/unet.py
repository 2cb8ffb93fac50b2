"""The third training: the cross-attention U-Net learns to denoise cached latents (LDM paper, eq. 3)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from conf.networks import UNetConfig
from conf.schema import UNetRun
from data.latent_dataset import LatentDataset
from data.streams import latent_stream
from models.autoencoder import load_autoencoder, sample_moments
from models.film import Film
from models.flops import unet_flops
from models.lora import add_adapters, merged, save_adapters
from models.pipeline import TextToImage
from models.process import Process
from models.single_file import is_single_file, load_unet_file
from models.text import load_text_tower
from models.unet import UNet
from models.unet_format import architecture
from train.engine.draws import normal, uniform
from train.engine.journal import Journal
from train.engine.pictures import captioned, film_strips, to_uint8
from train.engine.provenance import check_latents, require_same
from train.engine.runtime import Runtime
from train.engine.trainable import Trainable
from train.evaluation.in_loop import evaluate_in_loop, require_inputs

VALIDATION = 256  # held-out latents behind the validation loss, at most
CHUNK = 32  # of them at once
FILMED = 2  # of the pictures drawn at an evaluation
FILM_FRAMES = 8


def begin_from(source: str, cfg: UNetConfig) -> UNet:
    """Another training's U-Net: a folder in diffusers' format or a whole checkpoint in one file."""
    if is_single_file(source):
        return load_unet_file(source, cfg)
    network = UNet.from_pretrained(source)
    require_same("init_from", architecture(cfg), architecture(network.cfg))
    return network


def by_timestep(losses: Tensor, times: Tensor) -> dict[str, Tensor]:
    """Sum and number [2] of the losses [B] in each quarter of the times [B] in [0, 1); 4 is nearly all noise."""
    quarters = F.one_hot((4 * times).long().clamp(0, 3), 4).to(losses.dtype)  # [B, 4]
    pairs = torch.stack([losses @ quarters, quarters.sum(dim=0)], dim=1)  # [4, 2]
    return {f"train/loss_by_timestep/{quarter}": pair for quarter, pair in enumerate(pairs, start=1)}


class UNetStage:
    """Denoising, sharded as `runtime.backend` says, with an average of the weights."""

    name = "unet"

    def __init__(self, cfg: UNetRun, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        self.dataset, manifests = latent_stream(cfg.latents, cfg.seed, cfg.stream, cfg.batch.global_batch_size)
        self.heldout = LatentDataset(f"{cfg.latents}/heldout", cfg.seed, cfg.stream)
        self.info, *_ = (check_latents(cfg, manifest) for manifest in manifests)
        self.mean, self.std = (self.channels(values) for values in (self.info.latent_mean, self.info.latent_std))
        self.null_text = self.info.null_text(cfg.latents).to(runtime.device)  # [L, D]
        self.process = Process(cfg.process)
        side = cfg.model.sample_size
        passes = 3.0 if cfg.lora.rank == 0 else 2.0  # backward: twice forward, once for weights that are frozen
        self.flops_per_sample = passes * unet_flops(cfg.model, side, side, len(self.null_text))
        self.process.sigmas(cfg.sampling.steps, cfg.sampling.spacing, cfg.sampling.shift)  # refused now or in hours
        require_inputs(cfg)
        torch.manual_seed(cfg.seed)  # initial weights
        self.network = UNet(cfg.model)
        if cfg.init_from is not None:
            self.network = begin_from(cfg.init_from, cfg.model)
        if cfg.lora.rank > 0:
            add_adapters(self.network, cfg.lora)
        self.network.checkpoint_gradients(cfg.runtime.gradient_checkpointing)
        self.unet = Trainable(
            runtime, self.network, cfg.optim, cfg.batch, cfg.loop.samples, cfg.runtime, cfg.ema, name="unet"
        )
        self.trainables = {"unet": self.unet}
        self.text_tower = None if "text" in self.dataset.layout else self.frozen(load_text_tower(cfg.clip))

    @property
    def averages(self) -> bool:
        """Whether the weights that are evaluated and exported are an average."""
        return self.cfg.ema.half_life_samples > 0

    def channels(self, values: list[float]) -> Tensor:
        return torch.tensor(values, device=self.runtime.device).view(1, -1, 1, 1)

    def frozen(self, network: Any) -> Any:
        return network.eval().requires_grad_(False).to(self.runtime.device)

    def noisy(self, batch: dict[str, Any], seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised latents [B, C, h, w], noise of that shape and timesteps [B]; all drawn per sample."""
        positions, device = batch["position"], self.runtime.device
        moments = batch["moments"].to(device).float()  # [B, 2C, h, w]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        z = sample_moments(moments, normal(seed, positions, shape, "posterior").to(device))
        noise = normal(seed, positions, shape, "noise").to(device)
        if self.process.cfg.offset_noise > 0:
            offset = normal(seed, positions, (shape[0], 1, 1), "offset_noise").to(device)
            noise = self.process.with_offset(noise, offset)
        timesteps = self.process.draw_timesteps(uniform(seed, positions, "timestep").to(device))
        return (z - self.mean) / self.std, noise, timesteps

    def context(self, batch: dict[str, Any]) -> Tensor:
        """Text hidden states [B, L, D], from the cache or from the frozen text tower."""
        if self.text_tower is None:
            return batch["text"].to(self.runtime.device).float()
        with torch.no_grad():
            return self.text_tower.text_states(batch["tokens"].to(self.runtime.device))

    def micro_step(self, batch: dict[str, Any], last: bool, samples_seen: int) -> dict[str, Tensor]:
        """Forward and backward pass of one micro-batch."""
        seed = self.cfg.seed
        x0, noise, timesteps = self.noisy(batch, seed)
        dropped = uniform(seed, batch["position"], "caption_drop") < self.cfg.caption_drop  # [B]
        context = torch.where(dropped.to(x0.device)[:, None, None], self.null_text, self.context(batch))
        prediction = self.unet(self.process.add_noise(x0, noise, timesteps), timesteps, context)
        losses = self.process.loss(prediction, x0, noise, timesteps)  # [B]
        loss = losses.mean()
        self.unet.backward(loss, last)
        return {
            "train/loss": loss.detach(),
            **by_timestep(losses.detach(), timesteps / self.cfg.process.train_timesteps),
        }

    def finish_step(self, samples_seen: int) -> dict[str, float]:
        """One optimiser step and one of the average."""
        return {"train/grad_norm": self.unet.step(samples_seen), "train/lr": self.unet.lr}

    @torch.no_grad()
    def evaluate(self, samples_seen: int, journal: Journal) -> dict[str, float]:
        """Validation loss of the averaged weights at fixed timesteps and noise; a grid of held-out captions."""
        network = UNet(self.cfg.model)
        network.load_state_dict(merged(self.unet.weights(ema=self.averages), self.cfg.lora))
        network = self.frozen(network)
        count = min(VALIDATION, self.heldout.samples)
        mine = list(range(self.runtime.rank, count, self.runtime.world))
        total = 0.0
        for batch in self.heldout.batches_at(mine, CHUNK):
            x0, noise, timesteps = self.noisy(batch, seed=0)
            prediction = network(self.process.add_noise(x0, noise, timesteps), timesteps, self.context(batch))
            total += float(self.process.loss(prediction, x0, noise, timesteps).sum())
        metrics = {"eval/loss": self.runtime.sum({"loss": total})["loss"] / count}
        small = self.cfg.evaluation.samples > 0
        if not small and not (self.runtime.is_main and self.cfg.sample_prompts > 0):
            return metrics
        model = self.text_to_image(network)
        if self.runtime.is_main and self.cfg.sample_prompts > 0:
            self.draw(model, samples_seen, journal)
        return metrics | (evaluate_in_loop(self.cfg, self.runtime, model, samples_seen) if small else {})

    def text_to_image(self, network: UNet) -> TextToImage:
        """A frozen U-Net with the other networks that pictures need."""
        autoencoder = self.frozen(load_autoencoder(self.cfg.autoencoder))
        tower = self.text_tower or self.frozen(load_text_tower(self.cfg.clip))
        return TextToImage(network, autoencoder, tower, self.process, self.mean.flatten(), self.std.flatten())

    def draw(self, model: TextToImage, samples_seen: int, journal: Journal) -> None:
        """Pictures of held-out captions, each with the same noise at every evaluation, and a film of the first two."""
        cfg = self.cfg
        prompts = [self.heldout.at(i)["caption"] for i in range(min(cfg.sample_prompts, self.heldout.samples))]
        film = Film(FILM_FRAMES, cfg.sampling.steps, range(len(prompts))[:FILMED])
        images = model(prompts, [cfg.seed] * len(prompts), cfg.sampling, callback=film)
        journal.image("prompts", np.asarray(captioned(to_uint8(images), prompts)), samples_seen, "held-out captions")
        frames = np.stack([to_uint8(strip) for strip in film.frames(model, images)])
        strips = film_strips(frames, prompts[:FILMED], film.labels)
        journal.image("film", np.asarray(strips), samples_seen, "guesses of the picture during sampling")

    def export(self, folder: Path) -> None:
        """Averaged weights in diffusers' format, and beside them what sampling needs to know."""
        if self.cfg.lora.rank > 0:
            self.export_with_adapters(folder)
            return
        weights = self.unet.stream(ema=self.averages)
        if self.runtime.is_main:
            self.network.save_pretrained(folder, weights)
            self.info.save(folder)
        weights.drain()

    def export_with_adapters(self, folder: Path) -> None:
        """The same with the adapters in the weights, and the adapters alone for diffusers."""
        weights = self.unet.weights(ema=self.averages)
        if self.runtime.is_main:
            save_adapters(folder, weights, self.cfg.lora)
            self.network.save_pretrained(folder, merged(weights, self.cfg.lora))
            self.info.save(folder)
