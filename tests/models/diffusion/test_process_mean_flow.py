"""Mean flows against their equations, and on data whose paths are known in closed form."""

import math
from itertools import pairwise

import pytest
import torch
from mixture import MEANS, STDS, WEIGHTS, denoised
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import Prediction, ProcessConfig, TimestepSampling
from models.conditions import Conditioning
from models.diffusion.guidance import stepping
from models.diffusion.process import Process
from models.diffusion.samplers import sample_ddim, sample_mean_flow


def process_of(share: float = 0.5, **options: object) -> Process:
    return Process(ProcessConfig(prediction=Prediction.flow, mean_flow=share, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_samples_has_a_step(share: float) -> None:
    """Its ends are two draws, the larger one first; the others are timesteps of a plain flow."""
    process = process_of(share, timestep_sampling=TimestepSampling.logit_normal)
    u, v = torch.rand(2, 40_000, generator=torch.Generator().manual_seed(0))
    drawn = process.draw_timesteps(u)
    t, r = process.draw_ends(drawn, v)
    step = t > r
    assert float(step.float().mean()) == pytest.approx(share, abs=0.01)
    assert torch.equal(t[~step], drawn[~step]) and ((t == drawn) | (r == drawn)).all()
    both = torch.cat([t[step], r[step]]) / 1000
    fresh = process.draw_timesteps(torch.rand(40_000, generator=torch.Generator().manual_seed(1))) / 1000
    for q in (0.1, 0.5, 0.9):
        assert float(both.quantile(q)) == pytest.approx(float(fresh.quantile(q)), abs=0.01)
    again = process.draw_ends(drawn[7:9], v[7:9])  # whatever else is in the batch
    assert torch.equal(again[0], t[7:9]) and torch.equal(again[1], r[7:9])


def test_target_and_loss_are_those_of_the_equations() -> None:
    """u_tgt = v - (t - r) (v du/dz + du/dt) and eq. 22, with t and r in [0, 1] and derivatives by hand."""
    process, generator = process_of(), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 1, 2, 3, dtype=torch.float64, generator=generator)
    t, r = torch.tensor([[900.0, 700, 500, 300, 250], [100.0, 699, 500, 0, 50]], dtype=torch.float64)

    def network(x: Tensor, timesteps: Tensor, told: Tensor) -> Tensor:  # u = sin(z) cos(3 t) + z (t - r)²
        length = 100 * (told - 1)
        return x.sin() * (3 * timesteps / 1000).cos().view(-1, 1, 1, 1) + x * (length**2).view(-1, 1, 1, 1)

    s, e = (times.view(-1, 1, 1, 1) / 1000 for times in (t, r))
    z, v, long = (1 - s) * x0 + s * noise, noise - x0, s - e
    by_z = z.cos() * (3 * s).cos() + long**2
    by_t = -3 * z.sin() * (3 * s).sin() + 2 * z * long
    expected = v - long * (v * by_z + by_t)
    x_t, velocity = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    target = process.mean_velocity(network, x_t, velocity, t, r)
    torch.testing.assert_close(target, expected, rtol=0, atol=0.02)
    assert torch.equal(target[2], velocity[2])  # r = t: a plain flow

    factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    losses = process.loss(factor * network(x_t, t, process.told(t, r)), x0, noise, t, expected)
    error = (0.7 * (z.sin() * (3 * s).cos() + z * long**2) - expected).flatten(1)
    torch.testing.assert_close(losses, error.square().mean(1), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(process.balanced(losses).sum(), [factor])
    u = (z.sin() * (3 * s).cos() + z * long**2).flatten(1)
    weights = 1 / (error.square().mean(1) + 1e-3)
    torch.testing.assert_close(grad, (weights * (2 * error * u).mean(1)).sum(), rtol=1e-5, atol=1e-6)


def test_losses_of_a_plain_flow_are_left_as_they_are() -> None:
    losses = torch.tensor([0.1, 2.0])
    assert process_of(0.0).balanced(losses) is losses


def test_steps_are_those_of_the_mean_velocity() -> None:
    """z_r = z_t - (t - r) u(z_t, r, t) down to 0 (eq. 12)."""
    process, noise = process_of(), torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas = process.sigmas(3)

    def u(z: Tensor, t: Tensor, length: Tensor) -> Tensor:
        return (z * (1 + t / 1000) + length).sin()

    def network(x: Tensor, timesteps: Tensor, told: Conditioning) -> Tensor:
        assert told.guidance is not None
        return u(x, timesteps.double().view(-1, 1), 100 * (told.guidance.double().view(-1, 1) - 1))

    network_of_steps = stepping(network, process, sigmas)
    denoise = process.denoiser(lambda x, timesteps: network_of_steps(x, timesteps, Conditioning()))
    drawn = sample_mean_flow(denoise, process.initial(noise, float(sigmas[0])), sigmas)
    times = [*(sigmas[:-1] / (1 + sigmas[:-1])).tolist(), 0.0]
    z = noise
    for t, r in pairwise(times):
        z = z - (t - r) * u(z, torch.tensor(1000 * t), torch.tensor(t - r))
    torch.testing.assert_close(drawn, z, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean_flow": 1.5}, r"mean_flow=1\.5: must be in \[0, 1\]"),
        ({"mean_flow": 0.5, "prediction": Prediction.v}, r"set process\.prediction=flow and process\.loss=l2"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProcessConfig(**options)  # type: ignore[arg-type]


def test_one_step_is_nearer_to_the_ends_of_the_paths_than_ddim_with_two() -> None:
    """Learnt from samples alone, where DDIM has the exact velocity.

    A latent is 32 independent numbers: of one alone the weights of eq. 22 would find the mode, not the mean.
    """
    process = process_of(0.5)
    noise = torch.randn(128, 32, generator=torch.Generator().manual_seed(9))
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def network(x: Tensor, t: Tensor, told: Tensor) -> Tensor:
        times = torch.stack([t / 500 - 1, 200 * told - 201], dim=1)[:, None].expand(-1, x.shape[1], -1)
        answer: Tensor = layers(torch.cat([x[..., None], times], dim=2))[..., 0]
        return answer

    optimizer = torch.optim.Adam(layers.parameters(), 4e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1200)
    for _ in range(1200):
        kinds = torch.multinomial(WEIGHTS, 64 * 32, replacement=True).view(64, 32)
        x0, fresh = (MEANS[kinds] + STDS[kinds] * torch.randn(64, 32)).float(), torch.randn(64, 32)
        t, r = process.draw_ends(process.draw_timesteps(torch.rand(64)), torch.rand(64))
        x_t = process.add_noise(x0, fresh, t)
        target = process.mean_velocity(network, x_t, process.target(x0, fresh, t), t, r)
        losses = process.loss(network(x_t, t, process.told(t, r)), x0, fresh, t, target)
        optimizer.zero_grad()
        process.balanced(losses).mean().backward()
        optimizer.step()
        scheduler.step()

    def solved(steps: int) -> Tensor:
        sigmas = process.sigmas(steps)
        return sample_ddim(denoised, process.initial(noise, float(sigmas[0])).view(-1, 1), sigmas).view(noise.shape)

    start = torch.full((len(noise),), 1000.0)
    with torch.no_grad():
        drawn = noise - network(noise, start, process.told(start, 0 * start))
    ends = solved(1000)
    error, of_two = (float((found - ends).abs().mean()) for found in (drawn, solved(2)))
    assert error < 0.5 * of_two, (error, of_two)
    assert math.isclose(float(drawn.std()), float(ends.std()), rel_tol=0.1)
