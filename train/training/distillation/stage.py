"""The fourth training: a student of a trained U-Net learns to draw in few steps, or with its guidance inside."""

from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import ConditionsConfig, DistillMethod, DistillRun, Prediction, TimestepSampling, UNetRun
from conf.schema.networks import UNetConfig
from conf.schema.training import asks_teacher, passes_beside
from data.image_dataset import Batch
from models.conditions import Conditions, Inputs, Wanted
from models.denoiser import Denoiser
from models.diffusion.process import SCHEDULER, Process, meaning, read_scheduler
from models.diffusion.samplers import Student
from models.formats.unet import FORMATS
from models.formats.weights import read_config
from models.unet import UNet
from train.engine.precision import round_weights
from train.engine.runtime import Runtime
from train.engine.sample_rng import Draws, SampleRng
from train.engine.trainable import Trainable
from train.latents.provenance import (
    INFO,
    UNetInfo,
    shortened,
    told_guidance,
    trained_otherwise,
    vae_beside,
    weights_digest,
)
from train.training.distillation.adversarial import Apart, Heads, TeacherMaps, both_pulls, judged_loss, judges_loss
from train.training.distillation.consistency import Lesson, Level, Levels, consistency_loss
from train.training.distillation.continuous import continuous_loss
from train.training.distillation.guidance import guidance_loss
from train.training.unet import Measure, UNetStage, by_timestep, wanted_of

EMBEDDING = 256  # width of that of the guidance scale: what diffusers' latent consistency models have


def as_training(cfg: DistillRun) -> UNetRun:
    """The training of the student as that of a U-Net: what it is told and predicts is what its teacher is and does.

    Raises:
        UserError: a teacher that says neither, or none to be guided where guidance is to be learnt.
    """
    model, source = read_config(cfg.teacher, UNetConfig, *FORMATS), Path(cfg.teacher)
    if told_guidance(cfg.teacher):
        raise UserError(f"teacher={cfg.teacher}: is a student itself; name the network that it was taught by")
    shared: dict[str, Any] = {option.name: getattr(cfg, option.name) for option in fields(cfg)}
    if (source / INFO).is_file():
        info = UNetInfo.load(cfg.teacher)
        if info.student:
            raise UserError(f"teacher={cfg.teacher}: is a student itself; name the network that it was taught by")
        if info.process_config().mean_flow > 0:
            raise UserError(f"teacher={cfg.teacher}: is a mean flow, which draws in few steps by itself; name a flow")
        shared |= {"process": info.process_config(), "conditions": info.conditions_config()}
    else:
        shared["process"] = read_scheduler(source.parent / "scheduler" / SCHEDULER)
    shared |= {"model": model, "init_from": cfg.teacher}
    conditions, process = shared.get("conditions", ConditionsConfig()), shared["process"]
    if process.prediction is not Prediction.flow and cfg.levels > process.train_timesteps:
        raise UserError(f"levels={cfg.levels}: the teacher has {process.train_timesteps} timesteps, set fewer levels")
    if cfg.method is DistillMethod.scm and process.prediction not in (Prediction.v, Prediction.flow):
        raise UserError(
            f"method=scm: takes a teacher of v or flow, and teacher={cfg.teacher} predicts {process.prediction.value}; "
            "set method=lcm"
        )
    if cfg.guidance != [1.0, 1.0] and not any(section.drop for _, section in conditions.chosen()):
        raise UserError(
            f"guidance={cfg.guidance}: teacher={cfg.teacher} was trained without dropping a condition, so that it "
            "cannot be guided; set guidance=[1,1]"
        )
    training = UNetRun(**{option.name: shared[option.name] for option in fields(UNetRun) if option.name in shared})
    if cfg.guided is not None:
        training.model = replace(model, time_cond_proj_dim=EMBEDDING)
    return training


def wanted(batch: Batch, offset: bool, conditions: Conditions, judged: bool) -> Wanted:
    """The random numbers that distillation asks for of a batch: a pair of levels in place of a timestep.

    `judged`: also those of the level at which an adversary sees it.
    """
    found = {name: shape for name, shape in wanted_of(batch, offset, conditions).items() if not name.endswith("_drop")}
    timestep = found.pop("timestep")
    found |= {"level": None, "guidance": None}
    return found | ({"judged_timestep": timestep, "judged_noise": found["noise"]} if judged else {})


class Drawn(NamedTuple):
    """A batch with all that is random about it."""

    rng: SampleRng
    x0: Tensor  # [B, C, h, w]
    noise: Tensor  # [B, C, h, w]
    inputs: Inputs
    scales: Tensor  # of guidance, [B]


class DistillStage(UNetStage):
    """Distillation of a frozen teacher into a student that begins with its weights.

    The target is what the student itself says, so that no third network is held. The teacher is kept in the training's
    precision, whole in each process.
    """

    name = "distill"
    keeps_source = True

    def __init__(self, cfg: DistillRun, runtime: Runtime, measure: Measure | None = None) -> None:
        self.distillation, training = cfg, as_training(cfg)
        student = Student(cfg.method.value, cfg.guided)
        student.check(cfg.sampling)  # refused now or in hours
        super().__init__(training, runtime, measure)
        self.info = replace(self.info, student=asdict(student))
        sampling = training.sampling
        self.levels = Levels(self.process, cfg.levels, sampling.spacing, sampling.shift).to(runtime.device)
        # All timesteps alike, whichever the teacher learnt most of: the first step of a student is from the noisiest.
        self.everywhere = Process(replace(training.process, timestep_sampling=TimestepSampling.uniform))
        self.extend = Draws(
            cfg.seed,
            partial(
                wanted,
                offset=training.process.offset_noise > 0,
                conditions=self.network.conditions.source,
                judged=cfg.adversarial_weight > 0,
            ),
        )
        self.teacher: Denoiser | None = None
        if asks_teacher(cfg.method, cfg.adversarial_weight > 0):
            unet = UNet.from_pretrained(cfg.teacher)
            round_weights(unet, runtime.precision)
            if cfg.adversarial_weight > 0:  # verdicts go back through it
                unet.checkpoint_gradients(cfg.runtime.gradient_checkpointing)
            teacher = Denoiser(unet, self.conditions_of(unet.cfg))
            teacher.load_conditions(cfg.teacher)
            self.teacher = self.frozen(teacher)
        if cfg.adversarial_weight > 0:
            assert self.teacher is not None
            self.maps = TeacherMaps(self.teacher)
            heads = Heads(training.model)
            self.heads = Trainable(
                runtime, heads, cfg.discriminator_optim, cfg.batch, cfg.loop.samples, name="discriminator"
            )
            self.trainables["discriminator"] = self.heads
        guided = cfg.guidance != [1.0, 1.0]
        self.flops_per_sample += passes_beside(cfg.method, cfg.adversarial_weight > 0, guided) * self.flops_of_a_pass
        teacher_digest = runtime.gather_objects(weights_digest(cfg.teacher) if runtime.is_main else None)[0]
        self.bound_to = {"method": cfg.method.value, "guidance": cfg.guidance, "teacher": shortened(teacher_digest)}
        self.bound_to |= {f"process.{name}": value for name, value in meaning(training.process).items()}

    def tell_differences(self, source: str) -> None:
        """Refuse a teacher of other latents or texts than those of this training: its answers would mean nothing."""
        if found := trained_otherwise(source, self.info):
            raise UserError(f"teacher={source}: {'; '.join(found)}; name those of its training")
        if (vae := vae_beside(source)) and weights_digest(str(vae)) != self.info.autoencoder:
            raise UserError(
                f"teacher={source}: its latents are those of {vae}; set autoencoder={vae}, also for the precompute"
            )

    def micro_step(self, batch: dict[str, Any], last: bool, samples_seen: int) -> dict[str, Tensor]:
        """Forward and backward pass of one micro-batch."""
        drawn, weight = self.drawn(batch, self.cfg.seed), self.distillation.adversarial_weight
        judgement: dict[str, Tensor] = {}
        if weight > 0:
            student = Apart(self.unet)
            lesson = self.lesson(student, drawn, samples_seen)
            judged, judgement = self.judge(drawn, lesson.guess, last)
            self.unet.backward((both_pulls(lesson, judged, weight) * student.output).sum(), last)
        else:
            lesson = self.lesson(self.unet, drawn, samples_seen)
            self.unet.backward(lesson.losses.mean(), last)
        return {
            "train/loss": lesson.losses.detach().mean(),
            **by_timestep(lesson.losses.detach(), lesson.timesteps / self.cfg.process.train_timesteps),
            **judgement,
        }

    def judge(self, drawn: Drawn, guess: Tensor, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's losses [B] by the verdicts on its guess x0 [B, C, h, w]; the adversary learns meanwhile."""
        noise = drawn.rng.normal("judged_noise", tuple(guess.shape[1:]))
        timesteps = self.process.draw_timesteps(drawn.rng.uniform("judged_timestep"))
        with self.precision():
            seen = self.maps(self.process.add_noise(guess, noise, timesteps), timesteps, drawn.inputs)
            with torch.no_grad():
                data = self.maps(self.process.add_noise(drawn.x0, noise, timesteps), timesteps, drawn.inputs)
        both = [torch.cat([real, fake.detach()]) for real, fake in zip(data, seen, strict=True)]
        real, fake = self.heads(both).chunk(2)  # [B, N] each
        loss = judges_loss(real, fake)
        self.heads.module.requires_grad_(False)
        judged = judged_loss(real.detach(), self.heads.module(seen))
        self.heads.module.requires_grad_(True)
        self.heads.backward(loss, last)
        return judged, {
            "train/gan_generator": judged.detach().mean(),
            "train/gan_discriminator": loss.detach(),
            "train/logits_real": real.detach().mean(),
            "train/logits_fake": fake.detach().mean(),
        }

    def finish_step(self, samples_seen: int) -> dict[str, Tensor | float]:
        """One optimiser step of the student, of its average and of the adversary."""
        metrics = super().finish_step(samples_seen)
        if self.distillation.adversarial_weight > 0:
            metrics["train/grad_norm_discriminator"] = self.heads.step(samples_seen)
        return metrics

    def errors(self, network: Denoiser, batch: dict[str, Any]) -> Tensor:
        """Distances [B] of held-out samples at fixed levels and noise."""
        with self.precision():
            return self.lesson(network, self.drawn(batch, seed=0)).losses

    def drawn(self, batch: dict[str, Any], seed: int) -> Drawn:
        """A batch with all that is random about it."""
        rng, (low, high) = SampleRng.of(batch, seed, self.runtime.device), self.distillation.guidance
        inputs = self.network.conditions.vary(self.inputs(batch), rng, drop=False)
        return Drawn(rng, *self.latents(batch, rng), inputs, low + (high - low) * rng.uniform("guidance"))

    def lesson(self, student: Any, drawn: Drawn, samples_seen: int | None = None) -> Lesson:
        """What the method has a student learn; samples_seen None: of one that is measured."""
        cfg, (rng, x0, noise, inputs, scales) = self.distillation, drawn
        told = inputs if cfg.guided is None else inputs | {"guidance": scales}
        u, teacher, process = rng.uniform("level"), partial(self.guided, inputs, scales), self.process

        def predict(network: Any, x_t: Tensor, timesteps: Tensor) -> Tensor:
            prediction: Tensor = network(x_t, timesteps, told)
            return prediction

        says = partial(predict, student)
        if cfg.method in (DistillMethod.lcm, DistillMethod.consistency_training):
            steps = teacher if cfg.method is DistillMethod.lcm else None
            return consistency_loss(says, steps, process, self.levels.neighbours(u, x0), x0, noise, cfg.huber)
        timesteps = self.everywhere.draw_timesteps(u)
        level = Level(timesteps, *process.levels(timesteps, x0))
        if cfg.method is DistillMethod.guidance:
            return guidance_loss(says, teacher, process, level, x0, noise)
        measured, ramp = samples_seen is None, cfg.tangent_warmup
        warmup = 1.0 if samples_seen is None or ramp == 0 else min(1.0, samples_seen / ramp)
        return continuous_loss(says, teacher, process, level, x0, noise, warmup, normalised=not measured)

    def guided(self, inputs: Inputs, scales: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The teacher's prediction [B, C, h, w] with a scale of guidance [B] for each sample, in one call."""
        teacher = self.teacher
        assert teacher is not None
        if self.distillation.guidance == [1.0, 1.0]:  # nothing is added to what the conditions say
            with self.precision():
                return teacher.predict(x_t, timesteps, teacher.conditions(inputs)).float()
        with self.precision():
            with_, without = teacher.conditions(inputs), teacher.conditions(teacher.conditions.null(inputs))
            both = teacher.predict(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), without.followed_by(with_))
        uncond, cond = both.float().chunk(2)
        return uncond + scales.view(-1, 1, 1, 1) * (cond - uncond)
