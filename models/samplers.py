"""Samplers: functions (denoise, x, sigmas, callback) -> x0 that never ask what the network predicts.

All solve dx/dsigma = (x - denoise(x, sigma)) / sigma (Karras et al. 2022, eq. 1 with s = 1) from sigmas[0] down to
sigmas[-1]. x [B, ...] is noise of scale sigmas[0] (`Process.initial`); sigmas [steps + 1] descend and may end in 0.
`callback(step, x, x0)` is called at each step with x before the step and the current guess x0.

Those that add noise also take `noise(step)`, standard normal of x's shape, and all but DDPM `eta`, how much of it (0:
none). Those that work with slopes take `fade`, in which variables the path is straight (`Process.fade`).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from conf.schema import STOCHASTIC, Sampler
from models.solvers.ancestral import sample_ddim, sample_ddpm, sample_euler, sample_euler_ancestral
from models.solvers.common import Noise
from models.solvers.dpm_solver import sample_dpmpp_2m, sample_dpmpp_2m_sde, sample_dpmpp_2s, sample_dpmpp_3m_sde
from models.solvers.second_order import sample_dpm2, sample_heun, sample_pndm
from models.solvers.unipc import sample_unipc

SAMPLERS: dict[Sampler, Callable[..., Tensor]] = {
    Sampler.ddpm: sample_ddpm,
    Sampler.ddim: sample_ddim,
    Sampler.pndm: sample_pndm,
    Sampler.euler: sample_euler,
    Sampler.euler_ancestral: sample_euler_ancestral,
    Sampler.heun: sample_heun,
    Sampler.dpm2: sample_dpm2,
    Sampler.dpmpp_2s: sample_dpmpp_2s,
    Sampler.dpmpp_2m: sample_dpmpp_2m,
    Sampler.dpmpp_2m_sde: sample_dpmpp_2m_sde,
    Sampler.dpmpp_3m_sde: sample_dpmpp_3m_sde,
    Sampler.unipc: sample_unipc,
}


WITH_FADE = {Sampler.pndm, Sampler.heun, Sampler.dpm2}


def sampler_of(sampler: Sampler, noise: Noise, eta: float | None = None, fade: float = 0.0) -> Callable[..., Tensor]:
    """The function (denoise, x, sigmas, callback) -> x0 of a sampler; eta None: its own."""
    if sampler in WITH_FADE:
        return partial(SAMPLERS[sampler], fade=fade)
    if sampler in STOCHASTIC:
        return partial(SAMPLERS[sampler], noise=noise, **({} if eta is None else {"eta": eta}))
    return SAMPLERS[sampler]
