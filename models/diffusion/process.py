"""The diffusion process: noise levels, and what the network predicts. Only this file knows eps, v, x0 and flow.

Notation: a noised latent is x_t = alpha(t) x0 + std(t) noise. Training works on x_t. Samplers work on x = x_t / alpha,
the variance-exploding form x = x0 + sigma noise with sigma = std / alpha (Karras et al. 2022, "EDM", eq. 1 and
appendix B; the convention of k-diffusion), in which every process looks the same:

    eps, v, x0   alpha^2 + std^2 = 1    alpha^2 = product of 1 - beta_s for s in 0 .. t (Ho et al. 2020, eq. 4)
    flow         alpha + std = 1        std = t / T (Liu et al. 2023, "Rectified flow", eq. 1)

Timesteps are always in the unit that the network takes, [0, T): whole numbers in training for eps, v and x0,
fractions for flow.
"""

import math
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import UserError
from conf.schema import BetaSchedule, Distance, Prediction, ProcessConfig, Spacing, TimestepSampling
from models.diffusion.schedules import Levels, alphas_cumprod, shifted_betas, spaced_sigmas, spaced_timesteps
from models.formats.weights import read_json

Network = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], timesteps [B]) -> prediction [B, ...]
Denoise = Callable[[Tensor, float], Tensor]  # (x [B, ...], sigma) -> x0 [B, ...]
HIGHEST_SIGMA = 65536.0  # where sampling begins if the last timestep is noise alone, whose sigma is infinite
BETA_NAMES = {BetaSchedule.linear: "linear", BetaSchedule.scaled_linear: "scaled_linear"}  # in diffusers
BETA_NAMES[BetaSchedule.cosine] = "squaredcos_cap_v2"
PREDICTION_NAMES = {Prediction.eps: "epsilon", Prediction.v: "v_prediction", Prediction.x0: "sample"}  # in diffusers
SCHEDULER = "scheduler_config.json"
LENGTH_UNIT = 0.01  # in which a network is told lengths: waves of 10 radians, so that it has a small derivative by them
REACH = 0.02  # of all timesteps, to both sides, over which a slope is seen
SMALL_ERROR = 1e-3  # of a mean flow, below which errors count less: c of Geng et al. 2025, eq. 22


class Process:
    """One process for training (`add_noise`, `target`, `loss`) and sampling (`sigmas`, `initial`, `denoiser`)."""

    def __init__(self, cfg: ProcessConfig) -> None:
        self.cfg = cfg
        self.flow = cfg.prediction is Prediction.flow
        # samplers go straight on in (1 - fade tau) x0 + tau noise, which 1 keeps small where sigma is unbounded
        self.fade = 1.0 if self.flow or cfg.zero_terminal_snr else 0.0
        levels = alphas_cumprod(cfg)  # [T] float64
        self._tables = torch.from_numpy(np.stack([np.sqrt(levels), np.sqrt(1.0 - levels)])).float()  # alpha, std [2, T]
        self._placed: dict[torch.device, Tensor] = {}  # of these, a copy on each device that asked
        # only here: training may see noise alone at the last timestep, but sampling has to begin at a finite sigma
        levels = np.maximum(levels, 1.0 / (1.0 + HIGHEST_SIGMA**2))
        self._sigma = np.sqrt((1.0 - levels) / levels)  # ascending
        self._log_sigma = np.log(self._sigma)

    def draw_timesteps(self, u: Tensor) -> Tensor:
        """Timesteps [B] float32 as a pure function of one uniform draw in [0, 1] per sample, u [B].

        logit_normal: the sigmoid of a normal, here the inverse normal cdf of u (Esser et al. 2024, eq. 19). A flow's
        shift moves them (eq. 23); the others' is in their noise levels.
        """
        cfg, t = self.cfg, u.double()
        if cfg.timestep_sampling is TimestepSampling.logit_normal:
            t = torch.sigmoid(cfg.logit_mean + cfg.logit_std * torch.special.ndtri(t))
        if self.flow:
            return (cfg.train_timesteps * cfg.shift * t / (1.0 + (cfg.shift - 1.0) * t)).float()
        return (t * cfg.train_timesteps).floor().clamp(max=cfg.train_timesteps - 1).float()

    def draw_ends(self, timesteps: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Where a mean flow's steps begin and end, t >= r [B], of timesteps [B] and another uniform draw, u [B].

        Of a share `mean_flow` they are two draws, the larger one first; the others are no step, r = t.
        """
        share = self.cfg.mean_flow
        other = torch.where(u < share, self.draw_timesteps(u / share), timesteps)
        return torch.maximum(timesteps, other), torch.minimum(timesteps, other)

    def told(self, timesteps: Tensor, ends: Tensor) -> Tensor:
        """What a mean flow's network is told [B] of its steps in the place of guidance: 1, and more by their length."""
        return 1.0 + LENGTH_UNIT * (timesteps - ends) / self.cfg.train_timesteps

    def with_offset(self, noise: Tensor, offset: Tensor) -> Tensor:
        """Noise [B, C, h, w] whose mean per channel varies, offset [B, C, 1, 1] (Guttenberg 2023, "Offset noise")."""
        return noise + self.cfg.offset_noise * offset

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [B, ...] of x0 and noise [B, ...] at timesteps [B]."""
        alpha, std = self.levels(timesteps, x0)
        return alpha * x0 + std * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Target of the prediction [B, ...]: noise, x0, v (Salimans & Ho 2022, appendix D) or the velocity."""
        if self.cfg.prediction is Prediction.eps:
            return noise
        if self.cfg.prediction is Prediction.x0:
            return x0
        if self.flow:
            return noise - x0
        alpha, std = self.levels(timesteps, x0)
        return alpha * noise - std * x0

    def weight(self, timesteps: Tensor) -> Tensor:
        """Weights [B] of the squared error: min-SNR-gamma (Hang et al. 2023, eq. 5 and section 3.4), P2, or ones.

        Both are weights of the error of x0: min(SNR, gamma), or SNR / (k + SNR)^gamma (Choi et al. 2022, on top
        of the plain loss of eps). The error of eps is SNR times that of x0, of v SNR + 1.
        """
        cfg = self.cfg
        if cfg.min_snr_gamma == 0 and cfg.p2_gamma == 0:
            return torch.ones_like(timesteps, dtype=torch.float32)
        alpha, std = self.levels(timesteps, timesteps)
        snr = (alpha / std) ** 2
        p2 = cfg.p2_gamma > 0
        weight = snr / (cfg.p2_k + snr) ** cfg.p2_gamma if p2 else snr.clamp(max=cfg.min_snr_gamma)
        return weight / {Prediction.eps: snr, Prediction.v: snr + 1}.get(cfg.prediction, 1.0)

    def mean_velocity(
        self, network: Callable[[Tensor, Tensor, Tensor], Tensor], x_t: Tensor, velocity: Tensor, t: Tensor, r: Tensor
    ) -> Tensor:
        """Target [B, ...] of a mean flow, v - (t - r) du/dt (Geng et al. 2025, eq. 10 and 11); it has no gradients.

        u is the mean of the velocity over the path from t back to r: (t - r) u is an integral, and so its derivative by
        t, along the path, is v. Where r = t the target is that of a plain flow.

        Args:
            network: (x_t [B, ...], timesteps [B], what it is `told` [B]) -> prediction [B, ...].
            velocity: target of a plain flow [B, ...].
            t, r: timesteps [B] from and to which a step goes.
        """
        slope = self.slope(
            lambda x, now: network(x, now, self.told(now, r)), x_t, t, velocity / self.cfg.train_timesteps, least=r
        )
        return velocity - (t - r).view((-1,) + (1,) * (x_t.ndim - 1)) * slope

    @torch.no_grad()
    def slope(
        self, network: Network, x_t: Tensor, timesteps: Tensor, dx: Tensor, least: Tensor | None = None
    ) -> Tensor:
        """How fast a prediction changes per timestep [B, ...] where x_t moves with dx per timestep [B, ...].

        A difference over a few hundredths of the path, not the derivative: the waves in which a network is told its
        time turn by a radian per timestep, and their ripples, which no training taught it to avoid, drown the rest (of
        the demo's flow the derivative has a mean square of 15 to 170, the difference of 0.6 to 13). Two plain calls,
        which every backend, precision and attention kernel can make.

        Args:
            least: timesteps [B] that are not gone below; None: 0.
        """
        reach, last = REACH * self.cfg.train_timesteps, self.cfg.train_timesteps - (0 if self.flow else 1)
        ahead = (timesteps + reach).clamp(max=last)
        behind = (timesteps - reach).clamp(min=0.0)
        behind = behind if least is None else torch.maximum(behind, least)
        shape = (-1,) + (1,) * (x_t.ndim - 1)

        def at(when: Tensor) -> Tensor:
            return network(x_t + (when - timesteps).view(shape) * dx, when).to(x_t.dtype)

        return (at(ahead) - at(behind)) / (ahead - behind).view(shape)

    def balanced(self, losses: Tensor) -> Tensor:
        """Squared errors [B] as they are minimised: of a mean flow, whose errors differ by orders, each counts alike.

        They are divided by what they are, of which no gradient is taken (Geng et al. 2025, eq. 22 with p = 1).
        """
        return losses if self.cfg.mean_flow == 0 else losses / (losses.detach() + SMALL_ERROR)

    def loss(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, timesteps: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Weighted mean distance to the target per sample [B], in float32 or better; None: to that of `target`."""
        # autocast may leave the prediction in 16 bits, too few for the square of a small error
        prediction = prediction.to(x0.dtype)
        target = self.target(x0, noise, timesteps) if target is None else target
        if self.cfg.loss is Distance.huber:
            distance = F.huber_loss(prediction, target, reduction="none", delta=self.cfg.huber_delta)
        elif self.cfg.loss is Distance.l1:
            distance = (prediction - target).abs()
        else:
            distance = (prediction - target).square()
        return self.weight(timesteps) * distance.flatten(1).mean(1)

    def sigmas(self, steps: int, spacing: Spacing = Spacing.trailing, shift: float | None = None) -> Tensor:
        """Noise levels [steps + 1] float64, descending from the noisiest to 0 (`models.diffusion.schedules`).

        The default is "trailing": Lin et al. 2024, section 3.3, show that leading or linspace spacing starts from a
        level, or leaves out a step, that training did not mean. Flow, whose sigma is infinite at t = T, starts one T-th
        before it, as diffusers' solvers do.

        Raises:
            UserError: more steps than timesteps of a discrete process, or a spacing or shift that it cannot have.
        """
        total, by_level = self.cfg.train_timesteps, spacing in (Spacing.karras, Spacing.exponential)
        if self.flow:
            sigma = self._flow_sigmas(steps, spacing, self.cfg.shift if shift is None else shift)
        elif shift is not None:
            raise UserError(f"shift={shift}: only for process.prediction=flow; leave it at null")
        elif by_level:
            sigma = spaced_sigmas(spacing, steps, self._sigma[-1], self._sigma[0])
        elif steps > total:
            raise UserError(f"steps={steps}: must not exceed process.train_timesteps={total}")
        else:
            sigma = self._sigma[spaced_timesteps(spacing, steps, total)]
        return torch.from_numpy(np.append(sigma, 0.0))

    def _flow_sigmas(self, steps: int, spacing: Spacing, shift: float) -> Levels:
        last = 1.0 / self.cfg.train_timesteps
        if spacing is Spacing.leading:
            raise UserError("spacing=leading: would end at a flow's last level, 0; choose trailing or linspace")
        if spacing in (Spacing.karras, Spacing.exponential):
            return spaced_sigmas(spacing, steps, shift * (1.0 / last - 1.0), shift / (1.0 / last - 1.0))
        t = np.linspace(1.0 - last, last, steps)
        if spacing is Spacing.trailing:
            t = np.linspace(1.0 - last, 0.0, steps + 1)[:-1]
        return shift * t / (1.0 - t)

    def timestep(self, sigma: float) -> float:
        """The network's time input at a noise level; between two levels of a discrete process linear in log sigma."""
        if self.flow:
            return self.cfg.train_timesteps * sigma / (1.0 + sigma)
        return float(np.interp(np.log(sigma), self._log_sigma, np.arange(len(self._log_sigma))))

    def pace(self, timesteps: Tensor) -> Tensor:
        """How fast timesteps [B] change with log sigma, [B]."""
        if self.flow:
            share = timesteps / self.cfg.train_timesteps
            return self.cfg.train_timesteps * share * (1.0 - share)
        alpha, std = self._on(timesteps.device)
        return torch.gradient((std / alpha).log())[0].reciprocal()[timesteps.long()]

    def alpha(self, sigma: float) -> float:
        """How much of x0 is in x_t at a noise level."""
        return 1.0 / (1.0 + sigma) if self.flow else 1.0 / math.sqrt(1.0 + sigma**2)

    def initial(self, noise: Tensor, sigma: float) -> Tensor:
        """x at the first noise level, so that the network's first input x_t is the standard normal noise itself."""
        return noise * (1.0 + sigma if self.flow else math.sqrt(1.0 + sigma**2))

    def denoiser(self, network: Network) -> Denoise:
        """Turn a network of this process into denoise(x, sigma) -> x0, the only thing that samplers see."""

        def denoise(x: Tensor, sigma: float) -> Tensor:
            alpha = self.alpha(sigma)
            std = sigma * alpha
            timesteps = torch.full((len(x),), self.timestep(sigma), device=x.device)
            x_t = alpha * x
            return self.guess(network(x_t, timesteps).to(x.dtype), x_t, alpha, std)

        return denoise

    def guess(self, prediction: Tensor, x_t: Tensor, alpha: float | Tensor, std: float | Tensor) -> Tensor:
        """x0 [B, ...] that a prediction means, at levels that are numbers or shaped to multiply it."""
        if self.cfg.prediction is Prediction.eps:
            return (x_t - std * prediction) / alpha
        if self.cfg.prediction is Prediction.x0:
            return prediction
        if self.flow:
            return x_t - std * prediction
        return alpha * x_t - std * prediction

    def scheduler_config(self, student: bool = False) -> dict[str, object]:
        """`scheduler_config.json` of an exported folder: the diffusers scheduler that samples this process as we do.

        Args:
            student: of distillation, which `samplers.sample_lcm` draws with; for other processes than flows.
        """
        total = self.cfg.train_timesteps
        if self.flow:
            return {
                "_class_name": "DPMSolverMultistepScheduler",
                "num_train_timesteps": total,
                "prediction_type": "flow_prediction",
                "algorithm_type": "dpmsolver++",
                "solver_order": 2,
                "steps_offset": 1,
                "use_flow_sigmas": True,
                "flow_shift": self.cfg.shift,
            }
        named = self.cfg.schedule in BETA_NAMES and self.cfg.shift == 1
        # Steps are chosen evenly among `original_inference_steps`: of all timesteps they are those of "trailing".
        chosen = {"_class_name": "LCMScheduler", "original_inference_steps": total} if student else {}
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": total,
            "beta_schedule": BETA_NAMES.get(self.cfg.schedule, "linear"),
            "trained_betas": None if named else shifted_betas(self.cfg).tolist(),
            "rescale_betas_zero_snr": self.cfg.zero_terminal_snr,
            "beta_start": self.cfg.beta_start,
            "beta_end": self.cfg.beta_end,
            "prediction_type": PREDICTION_NAMES[self.cfg.prediction],
            "timestep_spacing": "trailing",
            "steps_offset": 1,  # without effect on this spacing, but pipelines warn of another value
            "set_alpha_to_one": True,
            "clip_sample": False,
            **chosen,
        }

    def _on(self, device: torch.device) -> Tensor:
        """alpha and std of all timesteps [2, T]."""
        if device not in self._placed:
            self._placed[device] = self._tables.to(device)
        return self._placed[device]

    def levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and std at timesteps [B], float32, shaped to multiply `like` [B, ...]."""
        if self.flow:
            std = timesteps.float() / self.cfg.train_timesteps
            alpha = 1.0 - std
        else:
            alpha, std = self._on(timesteps.device)[:, timesteps.long()]
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alpha.view(shape), std.view(shape)


def meaning(cfg: ProcessConfig) -> dict[str, Any]:
    """The options without which nobody knows what a network's inputs and outputs are, in plain values."""
    names = ["prediction", "train_timesteps"]
    if cfg.prediction is not Prediction.flow:  # whose shift says which of its levels are drawn, not what they are
        names += ["schedule", "zero_terminal_snr", "shift"]
        names += [] if cfg.schedule is BetaSchedule.cosine else ["beta_start", "beta_end"]
    values = {name: getattr(cfg, name) for name in names}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences between the `meaning` of two processes, in words."""
    names = [name for name in before if name in now and before[name] != now[name]]
    return [f"process.{name} was {before[name]}, is {now[name]}" for name in names]


def read_scheduler(path: Path) -> ProcessConfig:
    """The process of a `scheduler_config.json` of diffusers, as `Process.scheduler_config` and others write it.

    Raises:
        UserError: no such file, or a process that we do not have.
    """
    found = read_json(path, "the rest of a pipeline")

    def number(name: str, default: float) -> float:
        value = found.get(name, default)
        if type(value) not in (int, float) or not abs(value) < 1e6:
            raise UserError(f"{path}: {name}={value!r} is not supported, it must be a number")
        return float(value)

    total = int(number("num_train_timesteps", 1000))
    if found.get("use_flow_sigmas") or found.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        shift = number("flow_shift" if "flow_shift" in found else "shift", 1.0)
        return ProcessConfig(prediction=Prediction.flow, train_timesteps=total, shift=shift)
    if found.get("trained_betas") is not None:
        raise UserError(f"{path}: has noise levels of its own (trained_betas): point run_dir at the run instead")
    if "sigma_data" in found:
        raise UserError(f"{path}: scales what the network sees (sigma_data): not supported")
    schedule, prediction = found.get("beta_schedule", "linear"), found.get("prediction_type", "epsilon")
    schedules = {name: kind for kind, name in BETA_NAMES.items()}
    predictions = {name: kind for kind, name in PREDICTION_NAMES.items()}
    if str(schedule) not in schedules or str(prediction) not in predictions:
        raise UserError(f"{path}: beta_schedule={schedule!r} with prediction_type={prediction!r} is not supported")
    return ProcessConfig(
        prediction=predictions[prediction],
        train_timesteps=total,
        schedule=schedules[schedule],
        beta_start=number("beta_start", 0.0001),
        beta_end=number("beta_end", 0.02),
        zero_terminal_snr=bool(found.get("rescale_betas_zero_snr")),
    )
