"""The diffusion process: noise levels, and what the network predicts. Only this file knows eps, v and flow.

Notation: a noised latent is x_t = alpha(t) x0 + std(t) noise. Training works on x_t. Samplers work on x = x_t / alpha,
the variance-exploding form x = x0 + sigma noise with sigma = std / alpha (Karras et al. 2022, "EDM", eq. 1 and
appendix B; the convention of k-diffusion), in which every process looks the same:

    eps, v   alpha^2 + std^2 = 1    alpha^2 = cumulative product of 1 - beta_t for t in 0 .. T-1 (Ho et al. 2020, eq. 4)
    flow     alpha + std = 1        std = t / T (Liu et al. 2023, "Rectified flow", eq. 1)

Timesteps are always in the unit that the network takes, [0, T): whole numbers in training for eps and v, fractions
for flow.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conf.errors import UserError
from conf.schema import BetaSchedule, Prediction, ProcessConfig, TimestepSampling

Network = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], timesteps [B]) -> prediction [B, ...]
Denoise = Callable[[Tensor, float], Tensor]  # (x [B, ...], sigma) -> x0 [B, ...]


class Process:
    """What is common to training (`add_noise`, `target`, `loss`) and sampling (`sigmas`, `initial`, `denoiser`)."""

    def __init__(self, cfg: ProcessConfig) -> None:
        self.cfg = cfg
        self.flow = cfg.prediction is Prediction.flow
        alphas_cumprod = np.cumprod(1.0 - betas(cfg))  # [T] float64
        self._alpha = torch.from_numpy(np.sqrt(alphas_cumprod))
        self._std = torch.from_numpy(np.sqrt(1.0 - alphas_cumprod))
        self._sigma = np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)  # ascending
        self._log_sigma = np.log(self._sigma)

    def draw_timesteps(self, u: Tensor) -> Tensor:
        """Timesteps [B] float32 as a pure function of one uniform draw in [0, 1] per sample, u [B].

        logit_normal: the sigmoid of a standard normal, here the inverse normal cdf of u (Esser et al. 2024, eq. 19).
        """
        if self.cfg.timestep_sampling is TimestepSampling.logit_normal:
            u = torch.sigmoid(torch.special.ndtri(u.double()))
        timesteps = u.double() * self.cfg.train_timesteps
        if not self.flow:
            timesteps = timesteps.floor().clamp(max=self.cfg.train_timesteps - 1)
        return timesteps.float()

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [B, ...] of x0 and noise [B, ...] at timesteps [B]."""
        alpha, std = self._levels(timesteps, x0)
        return alpha * x0 + std * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network shall predict [B, ...]: noise, v (Salimans & Ho 2022, appendix D) or the flow's velocity."""
        if self.cfg.prediction is Prediction.eps:
            return noise
        if self.flow:
            return noise - x0
        alpha, std = self._levels(timesteps, x0)
        return alpha * noise - std * x0

    def weight(self, timesteps: Tensor) -> Tensor:
        """Weights [B] of the squared error: min-SNR-gamma (Hang et al. 2023, eq. 5 and section 3.4), or ones.

        The paper weighs the error of x0 by min(SNR, gamma); the error of eps is SNR times that of x0, of v SNR + 1.
        """
        gamma = self.cfg.min_snr_gamma
        if gamma == 0:
            return torch.ones_like(timesteps, dtype=torch.float32)
        alpha, std = self._levels(timesteps, timesteps)
        snr = (alpha / std) ** 2
        return snr.clamp(max=gamma) / (snr if self.cfg.prediction is Prediction.eps else snr + 1)

    def loss(self, prediction: Tensor, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Weighted mean squared error per sample [B], in float32 or better."""
        error = prediction.to(x0.dtype) - self.target(x0, noise, timesteps)
        return self.weight(timesteps) * error.square().flatten(1).mean(1)

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels [steps + 1] float64, descending from the noisiest to 0.

        Evenly spaced timesteps that begin at the last one ("trailing" in diffusers: Lin et al. 2024, section 3.3, show
        that leading or linspace spacing starts from a level, or leaves out a step, that training did not mean). Flow,
        whose sigma is infinite at t = T, starts one T-th before it, as diffusers' solvers do.

        Raises:
            UserError: more steps than timesteps of a discrete process.
        """
        if self.flow:
            t = np.linspace(1.0 - 1.0 / self.cfg.train_timesteps, 0.0, steps + 1)
            return torch.from_numpy(t / (1.0 - t))
        total = self.cfg.train_timesteps
        if steps > total:
            raise UserError(f"steps={steps}: must not exceed process.train_timesteps={total}")
        trailing = np.round(total - np.arange(steps) * (total / steps)).astype(np.int64) - 1
        return torch.from_numpy(np.append(self._sigma[trailing], 0.0))

    def timestep(self, sigma: float) -> float:
        """The network's time input at a noise level; between two levels of a discrete process linear in log sigma."""
        if self.flow:
            return self.cfg.train_timesteps * sigma / (1.0 + sigma)
        return float(np.interp(np.log(sigma), self._log_sigma, np.arange(len(self._log_sigma))))

    def initial(self, noise: Tensor, sigma: float) -> Tensor:
        """x at the first noise level, so that the network's first input x_t is the standard normal noise itself."""
        return noise * (1.0 + sigma if self.flow else math.sqrt(1.0 + sigma**2))

    def denoiser(self, network: Network) -> Denoise:
        """Turn a network of this process into denoise(x, sigma) -> x0, the only thing that samplers see."""

        def denoise(x: Tensor, sigma: float) -> Tensor:
            alpha = 1.0 / (1.0 + sigma) if self.flow else 1.0 / math.sqrt(1.0 + sigma**2)
            std = sigma * alpha
            timesteps = torch.full((len(x),), self.timestep(sigma), device=x.device)
            x_t = alpha * x
            prediction = network(x_t, timesteps).to(x.dtype)
            if self.cfg.prediction is Prediction.eps:
                return (x_t - std * prediction) / alpha
            if self.flow:
                return x_t - std * prediction
            return alpha * x_t - std * prediction

        return denoise

    def scheduler_config(self) -> dict[str, object]:
        """`scheduler_config.json` of an exported folder: the diffusers scheduler that samples this process as we do."""
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
            }
        squared_cosine = self.cfg.schedule is BetaSchedule.cosine
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": total,
            "beta_schedule": "squaredcos_cap_v2" if squared_cosine else self.cfg.schedule.value,
            "beta_start": self.cfg.beta_start,
            "beta_end": self.cfg.beta_end,
            "prediction_type": "epsilon" if self.cfg.prediction is Prediction.eps else "v_prediction",
            "timestep_spacing": "trailing",
            "steps_offset": 1,  # without effect on this spacing, but pipelines warn of another value
            "set_alpha_to_one": True,
            "clip_sample": False,
        }

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and std at timesteps [B], float32, shaped to multiply `like` [B, ...]."""
        if self.flow:
            std = timesteps.float() / self.cfg.train_timesteps
            alpha = 1.0 - std
        else:
            index = timesteps.long()
            alpha = self._alpha.to(index.device, torch.float32)[index]
            std = self._std.to(index.device, torch.float32)[index]
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alpha.view(shape), std.view(shape)


def betas(cfg: ProcessConfig) -> NDArray[np.float64]:
    """Variances [T] float64 that the forward process adds per timestep."""
    total = cfg.train_timesteps
    if cfg.schedule is BetaSchedule.linear:
        return np.linspace(cfg.beta_start, cfg.beta_end, total)
    if cfg.schedule is BetaSchedule.scaled_linear:
        return np.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, total) ** 2
    t = np.arange(total + 1) / total  # Nichol & Dhariwal 2021, eq. 17
    alphas_cumprod = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    steps: NDArray[np.float64] = np.minimum(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    return steps
