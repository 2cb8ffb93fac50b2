"""The fourth training: a student of a trained U-Net learns to draw in one to four steps."""

from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import ConditionsConfig, DistillMethod, DistillRun, UNetRun
from conf.schema.networks import UNetConfig
from data.image_dataset import Batch
from models.conditions import Conditions, Inputs, Wanted
from models.denoiser import Denoiser
from models.diffusion.process import SCHEDULER, read_scheduler
from models.diffusion.samplers import Student
from models.formats.unet import FORMATS
from models.formats.weights import read_config
from models.unet import UNet
from train.engine.precision import round_weights
from train.engine.runtime import Runtime
from train.engine.sample_rng import Draws, SampleRng
from train.latents.provenance import INFO, UNetInfo, trained_otherwise
from train.training.distillation.consistency import Levels, consistency_loss
from train.training.unet import Measure, UNetStage, by_timestep, wanted_of

EMBEDDING = 256  # width of that of the guidance scale: what diffusers' latent consistency models have


def as_training(cfg: DistillRun) -> UNetRun:
    """The training of the student as that of a U-Net: what it is told and predicts is what its teacher is and does.

    Raises:
        UserError: a teacher that says neither, or none to be guided where guidance is to be learnt.
    """
    model, source = read_config(cfg.teacher, UNetConfig, *FORMATS), Path(cfg.teacher)
    shared: dict[str, Any] = {option.name: getattr(cfg, option.name) for option in fields(cfg)}
    if (source / INFO).is_file():
        info = UNetInfo.load(cfg.teacher)
        if info.student:
            raise UserError(f"teacher={cfg.teacher}: is a student itself; name the network that it was taught by")
        shared |= {"process": info.process_config(), "conditions": info.conditions_config()}
    else:
        shared["process"] = read_scheduler(source.parent / "scheduler" / SCHEDULER)
    shared |= {"model": model, "init_from": cfg.teacher}
    conditions = shared.get("conditions", ConditionsConfig())
    if cfg.guidance != [1.0, 1.0] and not any(section.drop for _, section in conditions.chosen()):
        raise UserError(
            f"guidance={cfg.guidance}: teacher={cfg.teacher} was trained without dropping a condition, so that it "
            "cannot be guided; set guidance=[1,1]"
        )
    training = UNetRun(**{option.name: shared[option.name] for option in fields(UNetRun) if option.name in shared})
    if cfg.guided is not None:
        training.model = replace(model, time_cond_proj_dim=EMBEDDING)
    return training


def wanted(batch: Batch, offset: bool, conditions: Conditions) -> Wanted:
    """The random numbers that distillation asks for of a batch: a pair of levels in place of a timestep."""
    found = wanted_of(batch, offset, conditions)
    del found["timestep"]
    return found | {"level": None, "guidance": None}


class DistillStage(UNetStage):
    """Distillation of a frozen teacher into a student that begins with its weights.

    The target is what the student itself says, so that no third network is held. The teacher is kept in the training's
    precision, whole in each process.
    """

    name = "distill"

    def __init__(self, cfg: DistillRun, runtime: Runtime, measure: Measure | None = None) -> None:
        self.distillation, training = cfg, as_training(cfg)
        student = Student(cfg.method.value, cfg.guided)
        student.check(cfg.sampling)  # refused now or in hours
        super().__init__(training, runtime, measure)
        self.info = replace(self.info, student=asdict(student))
        sampling = training.sampling
        self.levels = Levels(self.process, cfg.levels, sampling.spacing, sampling.shift).to(runtime.device)
        self.extend = Draws(
            cfg.seed,
            partial(wanted, offset=training.process.offset_noise > 0, conditions=self.network.conditions.source),
        )
        self.teacher: Denoiser | None = None
        if cfg.method is DistillMethod.lcm:
            unet = UNet.from_pretrained(cfg.teacher)
            teacher = Denoiser(unet, self.conditions_of(unet.cfg))
            teacher.load_conditions(cfg.teacher)
            self.teacher = self.frozen(teacher)
            round_weights(unet, runtime.precision)
        self.flops_per_sample *= 2 if self.teacher is not None else 4 / 3  # target, and the teacher with and without

    def tell_differences(self, source: str) -> None:
        """Refuse a teacher of other latents or texts than those of this training: its answers would mean nothing."""
        if found := trained_otherwise(source, self.info):
            raise UserError(f"teacher={source}: {'; '.join(found)}; name those of its training")

    def micro_step(self, batch: dict[str, Any], last: bool, samples_seen: int) -> dict[str, Tensor]:
        """Forward and backward pass of one micro-batch."""
        losses, times = self.distances(self.unet, batch, self.cfg.seed)
        loss = losses.mean()
        self.unet.backward(loss, last)
        return {
            "train/loss": loss.detach(),
            **by_timestep(losses.detach(), times / self.cfg.process.train_timesteps),
        }

    def errors(self, network: Denoiser, batch: dict[str, Any]) -> Tensor:
        """Distances [B] of held-out samples at fixed levels and noise."""
        with self.precision():
            return self.distances(network, batch, seed=0)[0]

    def distances(self, student: Any, batch: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
        """Loss [B] and time [B] of the noisier neighbour."""
        draws, cfg = SampleRng.of(batch, seed, self.runtime.device), self.distillation
        x0, noise = self.latents(batch, draws)
        levels = self.levels.neighbours(draws.uniform("level"), x0)
        low, high = cfg.guidance
        scales = low + (high - low) * draws.uniform("guidance")  # [B]
        inputs = self.network.conditions.vary(self.inputs(batch), draws, drop=False)
        told = inputs if cfg.guided is None else inputs | {"guidance": scales}
        losses = consistency_loss(
            lambda x_t, timesteps: student(x_t, timesteps, told),
            None if self.teacher is None else partial(self.guided, self.teacher, inputs, scales),
            self.process,
            levels,
            x0,
            noise,
            cfg.huber,
        )
        return losses, levels[0].timesteps

    def guided(self, teacher: Denoiser, inputs: Inputs, scales: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The teacher's prediction [B, C, h, w] with a scale of guidance [B] for each sample, in one call."""
        with self.precision():
            with_, without = teacher.conditions(inputs), teacher.conditions(teacher.conditions.null(inputs))
            both = teacher.predict(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), without.followed_by(with_))
        uncond, cond = both.float().chunk(2)
        return uncond + scales.view(-1, 1, 1, 1) * (cond - uncond)
