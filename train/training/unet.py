"""The third training: the cross-attention U-Net learns to denoise cached latents (LDM paper, eq. 3)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conf.errors import UserError
from conf.process import tell
from conf.schema import Crop, ImageConfig, Precision, ResizeFilter, UNetRun
from conf.schema.networks import UNetConfig
from conf.schema.training import SLOPE
from data.image_dataset import Batch, ImageDataset
from data.images import in_range
from data.latent_dataset import LatentDataset
from data.samples import Captions
from data.shards.manifest import Manifest, find_shards
from data.streams import Mixed, WebStream, image_stream, latent_stream
from models.autoencoder import Autoencoder, sample_moments, split_moments
from models.conditions import Conditions, Embedders, Inputs, Wanted
from models.denoiser import UNET, Denoiser, widened
from models.diffusion.process import Process
from models.diffusion.samplers import Student
from models.film import Film
from models.flops import unet_flops
from models.formats.lora import add_adapters, merged, save_adapters
from models.formats.single_file import is_single_file, read_unet_file
from models.formats.unet import architecture
from models.formats.weights import copied
from models.pipeline import DiffusionPipeline
from models.text import load_text_tower
from models.unet import UNet
from train.engine.backend.layout import replace_parameter
from train.engine.image_grid import captioned, film_strips, side_by_side, to_uint8
from train.engine.metric_log import MetricLog, say
from train.engine.precision import autocast, rounded
from train.engine.runtime import Runtime
from train.engine.sample_rng import Draws, SampleRng
from train.engine.trainable import Trainable
from train.latents.provenance import asks_clip, check_latents, require_same, told_guidance, trained_otherwise

GUIDANCE = "time_embedding.cond_proj.weight"  # of a student of distillation, or a mean flow
VALIDATION = 256  # held-out latents behind the validation loss, at most
CHUNK = 32  # of them at once
FILMED = 2  # of the images drawn at an evaluation
FILM_FRAMES = 8

Pixels = NDArray[np.uint8]
Measure = Callable[[DiffusionPipeline, int], dict[str, float]]  # of the model at so many samples seen


def load_pretrained(source: str, network: Denoiser) -> dict[str, Tensor]:
    """Weights for a U-Net of another training's: a folder in diffusers' format or a whole checkpoint in one file.

    They are as the file has them, and what is not used of them takes no memory. Where it takes fewer channels than this
    one, or is not told of guidance or lengths, what is new begins at zero; parameters of conditions are taken where
    they are there and fit, into the network.
    """
    cfg = network.unet.cfg
    if is_single_file(source):
        weights = read_unet_file(source, replace(cfg, in_channels=cfg.out_channels))
    else:
        found, weights = UNet.read(source)
        wanted, given = architecture(cfg), architecture(found)
        if given["in_channels"] < wanted["in_channels"]:
            given["in_channels"] = wanted["in_channels"]
        if given.get("time_cond_proj_dim") is None and "time_cond_proj_dim" in wanted:
            given["time_cond_proj_dim"] = wanted["time_cond_proj_dim"]
        require_same("init_from", wanted, given)
        network.load_conditions(source)
    if cfg.time_cond_proj_dim is not None and GUIDANCE not in weights:
        weights[GUIDANCE] = torch.zeros_like(network.unet.get_parameter(GUIDANCE), device="cpu")
    return widened(weights, cfg.in_channels)


def by_timestep(losses: Tensor, times: Tensor) -> dict[str, Tensor]:
    """Sum and number [2] of the losses [B] in each quarter of the times [B] in [0, 1); 4 is nearly all noise."""
    numbers = torch.arange(4, device=times.device)
    quarters = ((4 * times).floor().clamp(0, 3)[:, None] == numbers).to(losses.dtype)  # [B, 4]
    pairs = torch.stack([losses @ quarters, quarters.sum(dim=0)], dim=1)  # [4, 2]
    return {f"train/loss_by_timestep/{quarter}": pair for quarter, pair in enumerate(pairs, start=1)}


def wanted_of(
    batch: Batch,
    offset: bool,
    conditions: Conditions,
    ends: bool = False,
    latent: tuple[int, int, int] | None = None,
) -> Wanted:
    """The random numbers that training asks for of a batch.

    Args:
        offset: also those of offset noise.
        ends: also those of steps.
        latent: shape [C, h, w] of one, where the batch has images.
    """
    _, twice, *sides = (0, 0) if latent is not None else batch["moments"].shape  # [B, 2C, h, w]
    shape = latent or (twice // 2, *sides)
    drawn: Wanted = dict.fromkeys(("posterior", "noise"), shape)
    mean: Wanted = {"offset_noise": (shape[0], 1, 1)} if offset else {}
    times: Wanted = {"timestep": None, "end": None} if ends else {"timestep": None}
    return drawn | mean | times | conditions.wanted(batch)


@dataclass(frozen=True, slots=True)
class Tokenised:
    """Adds the tokens [B, L] of its captions to a batch of images, where it is loaded, and then what else is drawn."""

    tokenize: Callable[[list[str]], Tensor]
    extend: Callable[[Batch], Batch]

    def __call__(self, batch: Batch) -> Batch:
        """The batch with them."""
        return self.extend({**batch, "tokens": self.tokenize(batch["caption"])})


def training_stream(cfg: UNetRun) -> tuple[LatentDataset | ImageDataset | Mixed | WebStream, list[Manifest]]:
    """What the U-Net is trained on: cached latents, or images that are cut as those of the cache.

    Raises:
        UserError: images whose latents cannot be made in a step.
    """
    if not cfg.encode:
        return latent_stream(cfg.latents, cfg.seed, cfg.stream, cfg.batch.global_batch_size)
    manifest = find_shards(f"{cfg.latents}/train", "latents", cfg.stream)
    facts = manifest.provenance
    others = sorted(set(Conditions(cfg.conditions).facts()) - {"caption"})
    if others or len(facts.get("shapes", [1])) > 1:
        lacking = f"conditions.{others[0]} is made" if others else "aspect buckets are sorted"
        raise UserError(f"encode=true: {lacking} by data/precompute_latents.py alone; set encode=false")
    made = facts["images"]
    images = ImageConfig(
        resolution=made["resolution"],
        crop=Crop(made["crop"]),
        flip=made["flip"],
        filter=ResizeFilter(made.get("filter", ResizeFilter.lanczos.value)),
    )
    captions = Captions.of(cfg.stream.captions, facts.get("captions", ["caption"]))
    shards = cfg.shards or f"{cfg.run_dir}/shards"
    return image_stream(shards, images, cfg.seed, cfg.stream, cfg.batch.global_batch_size, captions), [manifest]


class UNetStage:
    """Denoising, sharded as `runtime.backend` says, with an average of the weights.

    Args:
        measure: further metrics of each evaluation, by all processes together; None: only the loss is measured.
    """

    name = "unet"
    keeps_source = False  # whether what `init_from` knows stays as it is, adapters apart

    def __init__(self, cfg: UNetRun, runtime: Runtime, measure: Measure | None = None) -> None:
        self.cfg, self.runtime, self.measure = cfg, runtime, measure
        self.dataset, manifests = training_stream(cfg)
        self.heldout = LatentDataset(f"{cfg.latents}/heldout", cfg.seed, cfg.stream)
        kept = self.keeps_source or cfg.lora.rank > 0
        self.info, *_ = (check_latents(cfg, manifest, kept) for manifest in manifests)
        self.mean, self.std = (self.channels(values) for values in (self.info.latent_mean, self.info.latent_std))
        self.process = Process(cfg.process)
        self.process.sigmas(cfg.sampling.steps, cfg.sampling.spacing, cfg.sampling.shift)  # refused now or in hours
        torch.manual_seed(cfg.seed)  # initial weights of the conditions
        self.network = self.build()
        loaded: dict[str, Tensor] | None = None
        if cfg.init_from is not None:
            self.tell_differences(cfg.init_from)
            loaded = load_pretrained(cfg.init_from, self.network)
        if cfg.lora.rank > 0:
            assert loaded is not None
            self.network.unet.load_state_dict(copied(loaded), assign=True)
            add_adapters(self.network.unet, cfg.lora)
        self.text_tower = self.autoencoder = None
        if cfg.conditions.caption is not None and (cfg.encode or "text" not in self.heldout.layout):
            self.text_tower = self.frozen(load_text_tower(cfg.clip))
        latent = None
        if cfg.encode:
            self.autoencoder = self.frozen(Autoencoder.from_pretrained(cfg.autoencoder))
            latent = (cfg.model.out_channels, cfg.model.sample_size, cfg.model.sample_size)
        draws = Draws(
            cfg.seed,
            partial(
                wanted_of,
                offset=cfg.process.offset_noise > 0,
                conditions=self.network.conditions.source,
                ends=cfg.process.mean_flow > 0,
                latent=latent,
            ),
        )
        self.extend: Callable[[Batch], Batch] = draws
        if cfg.encode and self.text_tower is not None:
            self.extend = Tokenised(self.text_tower.tokenize, draws)
        self.network.unet.checkpoint_gradients(cfg.runtime.gradient_checkpointing)
        self.unet = Trainable(
            runtime,
            self.network,
            cfg.optim,
            cfg.batch,
            cfg.loop.samples,
            cfg.runtime,
            cfg.ema,
            name="unet",
            initial=partial(self.initial, loaded),
        )
        self.trainables = {"unet": self.unet}
        self.bound_to = dict[str, Any]()
        passes = 3.0 if cfg.lora.rank == 0 else 2.0  # backward: twice forward, once for weights that are frozen
        passes += SLOPE if cfg.process.mean_flow > 0 else 0
        side = cfg.model.sample_size
        self.flops_of_a_pass = unet_flops(cfg.model, side, side, self.network.conditions.tokens)
        self.flops_per_sample = passes * self.flops_of_a_pass

    def build(self) -> Denoiser:
        """A U-Net, without memory for its parameters (on the meta device), and its conditions, untrained."""
        with torch.device("meta"):
            unet = UNet(self.cfg.model)
        return Denoiser(unet, self.conditions_of(self.cfg.model))

    def initial(self, loaded: Mapping[str, Tensor] | None, name: str) -> Tensor:
        """A parameter of the U-Net before the training, by its name in the denoiser."""
        name = name.removeprefix(UNET)
        if loaded is None:
            return self.network.unet.initial(name, self.cfg.seed)
        return loaded[name].to(torch.float32, copy=True)  # the file stays free to be replaced

    def conditions_of(self, model: UNetConfig) -> Embedders:
        """The conditions of a U-Net on these latents, untrained."""
        cfg, facts = self.cfg, self.heldout.manifest.provenance
        null_text = self.info.null_text(cfg.latents) if cfg.conditions.caption is not None else None  # [L, D]
        downscale = facts["images"]["resolution"] // facts["latent_size"]
        return self.info.build_conditions(model, downscale, null_text)

    def tell_differences(self, source: str) -> None:
        """Say what `init_from` was trained for and is asked otherwise.

        A training of all weights may mean it: from noise to velocity, from text to a mask beside it. Raises UserError
        for what adapters cannot learn, and for an input that would mean something else.
        """
        found = trained_otherwise(source, self.info)
        if self.cfg.process.mean_flow > 0 and told_guidance(source):
            raise UserError(
                f"init_from={source}: is a student, told a scale of guidance where a mean flow is told a length; "
                "name the network that it was taught by"
            )
        if self.cfg.lora.rank > 0 and found and found[0].startswith("process.prediction"):
            raise UserError(f"init_from={source}: {found[0]}: adapters go on with what it predicts; make them equal")
        if found and self.runtime.is_main:
            say(self.name, f"init_from={source}: {'; '.join(found)}")

    @property
    def averages(self) -> bool:
        """Whether the weights that are evaluated and exported are an average."""
        return self.cfg.ema.half_life_samples > 0

    def precision(self) -> torch.autocast:
        """The context in which networks that are not trained compute as the one that is."""
        return autocast(self.runtime.device, self.runtime.precision)

    def channels(self, values: list[float]) -> Tensor:
        return torch.tensor(values, device=self.runtime.device).view(1, -1, 1, 1)

    def frozen(self, network: Any) -> Any:
        return network.eval().requires_grad_(False).to(self.runtime.device)

    def noisy(self, batch: dict[str, Any], seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised latents [B, C, h, w], noise of that shape and timesteps [B]; all drawn per sample."""
        draws = SampleRng.of(batch, seed, self.runtime.device)
        return *self.latents(batch, draws), self.process.draw_timesteps(draws.uniform("timestep"))

    def latents(self, batch: dict[str, Any], draws: SampleRng) -> tuple[Tensor, Tensor]:
        """Normalised latents [B, C, h, w] and noise of that shape."""
        moments = self.moments(batch)  # [B, 2C, h, w]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        z = sample_moments(moments, draws.normal("posterior", shape))
        noise = draws.normal("noise", shape)
        if self.process.cfg.offset_noise > 0:
            noise = self.process.with_offset(noise, draws.normal("offset_noise", (shape[0], 1, 1)))
        return (z - self.mean) / self.std, noise

    def moments(self, batch: dict[str, Any]) -> Tensor:
        """Moments of the posterior [B, 2C, h, w], from the cache, or from the frozen autoencoder."""
        if "moments" in batch:
            return batch["moments"].float()
        assert self.autoencoder is not None
        half = self.runtime.precision is Precision.fp16  # in which autoencoders overflow
        with torch.no_grad(), autocast(self.runtime.device, Precision.fp32 if half else self.runtime.precision):
            return self.autoencoder.encode(in_range(batch["pixels"])).float()

    def inputs(self, batch: dict[str, Any]) -> Inputs:
        """Arrays of the conditions, from the cache; text states from the frozen tower where they are not in it."""
        arrays = {name: batch[name] for name in self.heldout.layout if name != "moments" and name in batch}
        tokens = arrays.pop("tokens", None)
        if "text" in arrays:
            arrays["text"] = arrays["text"].float()
        elif self.text_tower is not None and tokens is not None:
            with torch.no_grad(), self.precision():
                arrays["text"] = self.text_tower.text_states(tokens).float()
        return arrays

    def micro_step(self, batch: dict[str, Any], last: bool, samples_seen: int) -> dict[str, Tensor]:
        """Forward and backward pass of one micro-batch."""
        seed, process = self.cfg.seed, self.process
        x0, noise, timesteps = self.noisy(batch, seed)
        draws = SampleRng.of(batch, seed, self.runtime.device)
        inputs, target = self.network.conditions.vary(self.inputs(batch), draws), None
        if process.cfg.mean_flow > 0:
            timesteps, ends = process.draw_ends(timesteps, draws.uniform("end"))
            target = self.mean_velocity(x0, noise, timesteps, ends, inputs)
            inputs = inputs | {"guidance": process.told(timesteps, ends)}
        prediction = self.unet(process.add_noise(x0, noise, timesteps), timesteps, inputs)
        losses = process.loss(prediction, x0, noise, timesteps, target)  # [B]
        self.unet.backward(process.balanced(losses).mean(), last)
        losses = losses.detach()
        return {"train/loss": losses.mean(), **by_timestep(losses, timesteps / process.cfg.train_timesteps)}

    def mean_velocity(self, x0: Tensor, noise: Tensor, timesteps: Tensor, ends: Tensor, inputs: Inputs) -> Tensor:
        """Target of a mean flow [B, C, h, w]."""

        def network(x_t: Tensor, timesteps: Tensor, told: Tensor) -> Tensor:
            prediction: Tensor = self.unet(x_t, timesteps, inputs | {"guidance": told})
            return prediction

        x_t, velocity = self.process.add_noise(x0, noise, timesteps), self.process.target(x0, noise, timesteps)
        return self.process.mean_velocity(network, x_t, velocity, timesteps, ends)

    def finish_step(self, samples_seen: int) -> dict[str, Tensor | float]:
        """One optimiser step and one of the average."""
        return {"train/grad_norm": self.unet.step(samples_seen), "train/lr": self.unet.lr}

    @torch.no_grad()
    def evaluate(self, samples_seen: int, journal: MetricLog) -> dict[str, float]:
        """Validation loss of the averaged weights at fixed timesteps and noise; a grid of held-out captions."""
        network = self.frozen(self.trained())
        count = min(VALIDATION, self.heldout.samples)
        mine = list(range(self.runtime.rank, count, self.runtime.world))
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for batch in map(self.runtime.batch, self.heldout.batches_at(mine, CHUNK)):
            total = total + self.errors(network, batch).sum()
        metrics = {"eval/loss": self.runtime.sum({"loss": total})["loss"] / count}
        if self.measure is None and self.cfg.sample_prompts == 0:
            return metrics
        model = self.pipeline(network)
        if self.runtime.is_main:  # precomputing told it of captions
            cuts = model.cuts([self.cfg.sampling.negative_prompt], self.cfg.sampling.prompt_syntax)
            if cuts.count:
                say(self.name, cuts.line("negative prompts"))
        if self.cfg.sample_prompts > 0:
            with self.precision():
                self.draw(model, samples_seen, journal)
        return metrics | ({} if self.measure is None else self.measure(model, samples_seen))

    def trained(self) -> Denoiser:
        """The network with the weights that are evaluated, of which no process has more than one in fp32; collective.

        Those of a training that shards nothing are the training's own where they are not rounded.
        """
        network, adapted = self.build(), self.cfg.lora.rank > 0
        tensors = self.unet.tensors(ema=self.averages)
        for name, tensor in merged(dict(tensors), self.cfg.lora).items() if adapted else tensors:
            layer = network.get_submodule(name.rpartition(".")[0])
            low = name.startswith(UNET)  # the rest computes in fp32
            replace_parameter(network, name, rounded(tensor, layer, self.runtime.precision) if low else tensor)
        return network

    def errors(self, network: Denoiser, batch: dict[str, Any]) -> Tensor:
        """Losses [B] of held-out samples at fixed timesteps and noise; of a mean flow those of its velocity, r = t."""
        x0, noise, timesteps = self.noisy(batch, seed=0)
        with self.precision():
            prediction = network(self.process.add_noise(x0, noise, timesteps), timesteps, self.inputs(batch))
        return self.process.loss(prediction, x0, noise, timesteps)

    def pipeline(self, network: Denoiser) -> DiffusionPipeline:
        """A frozen U-Net with the other networks that images need."""
        autoencoder, tower = self.frozen(Autoencoder.from_pretrained(self.cfg.autoencoder)), self.text_tower
        if tower is None and asks_clip(self.cfg.conditions):
            tower = self.frozen(load_text_tower(self.cfg.clip))
        mean, std, student = self.mean.flatten(), self.std.flatten(), Student.read(self.info.student)
        return DiffusionPipeline(network, autoencoder, tower, self.process, mean, std, student=student)

    def draw(self, model: DiffusionPipeline, samples_seen: int, journal: MetricLog) -> None:
        """Images of held-out samples' conditions, each with the same noise at every evaluation, and a film of two.

        Beside an image stand its condition, where that is one, and the original. Each process draws its share.
        """
        tell("drawing images")
        cfg, conditions, runtime = self.cfg, model.conditions, self.runtime
        alike = [i for i in range(self.heldout.samples) if self.heldout.bucket(i) == self.heldout.bucket(0)]
        numbers = range(min(cfg.sample_prompts, len(alike)))
        mine = numbers[runtime.rank :: runtime.world]
        rows, filmed, titles, labels = dict[int, Pixels](), dict[int, Pixels](), dict[int, str](), list[str]()
        if mine:
            batch = runtime.batch(self.heldout.batch_at([alike[number] for number in mine]))
            captions, inputs = batch["caption"], self.inputs(batch)
            film = Film(FILM_FRAMES, cfg.sampling.steps, [i for i, number in enumerate(mine) if number < FILMED])
            labels = film.labels
            seeds, watched = [cfg.seed] * len(captions), film if film.rows else None
            images = model(captions, seeds, cfg.sampling, callback=watched, inputs=inputs)
            originals = model.decode((split_moments(batch["moments"].float())[0] - self.mean) / self.std)
            images = conditions.finish(images, originals, inputs)
            shown = conditions.show(originals, inputs)
            sheet = side_by_side([*shown, images, originals]) if shown else images
            rows = dict(zip(mine, to_uint8(sheet), strict=True))
            titles = dict(zip(mine, conditions.titles(captions, inputs), strict=True))
            if film.rows:
                numbered = (mine[row] for row in film.rows)
                filmed = dict(zip(numbered, map(to_uint8, film.frames(model, images)), strict=True))
        titles = {number: title for part in runtime.gather_objects(titles) for number, title in part.items()}
        rows, filmed = runtime.on_main(rows), runtime.on_main(filmed)
        if not runtime.is_main:
            return
        in_order = [titles[number] for number in numbers]
        grid = captioned(np.stack([rows[number] for number in numbers]), in_order)
        journal.image("prompts", grid, samples_seen, "held-out samples")
        strips = film_strips(np.stack([filmed[number] for number in sorted(filmed)]), in_order[:FILMED], labels)
        journal.image("film", strips, samples_seen, "guesses of the image during sampling")

    def export(self, folder: Path) -> None:
        """Averaged weights in diffusers' format, and beside them what sampling needs to know."""
        if self.cfg.lora.rank > 0:
            self.export_with_adapters(folder)
            return
        weights = self.unet.stream(ema=self.averages)
        if self.runtime.is_main:
            self.network.save_pretrained(folder, weights, self.info.metadata())
            self.info.save(folder)
        weights.drain()

    def export_with_adapters(self, folder: Path) -> None:
        """The same with the adapters in the weights, and the adapters alone for diffusers."""
        weights = self.unet.weights(ema=self.averages)
        if self.runtime.is_main:
            save_adapters(folder, weights, self.cfg.lora, self.info.metadata())
            self.network.save_pretrained(folder, merged(weights, self.cfg.lora), self.info.metadata())
            self.info.save(folder)
