"""Data on a line whose denoiser is known in closed form: a mixture of two normal distributions."""

import torch
from torch import Tensor, nn

from models.diffusion.process import Process
from models.diffusion.samplers import sample_ddim

WEIGHTS, MEANS, STDS = torch.tensor([[0.6, 0.4], [-1.0, 1.2], [0.3, 0.2]], dtype=torch.float64)


def denoised(x: Tensor, sigma: Tensor | float) -> Tensor:
    """Mean of x0 of the mixture given x = x0 + sigma noise."""
    variances = STDS**2 + torch.as_tensor(sigma, dtype=torch.float64).view(-1, 1) ** 2
    distance = x.double().view(-1, 1) - MEANS
    share = torch.softmax(WEIGHTS.log() - distance**2 / (2 * variances) - variances.log() / 2, dim=-1)
    return (share * (MEANS + STDS**2 / variances * distance)).sum(-1).view(x.shape).to(x.dtype)


def exact_velocity(x: Tensor, t: Tensor) -> Tensor:
    """Of a flow of 1000 timesteps t [B] at x [B, 1]."""
    std = (t / 1000).view(-1, 1)
    return (x - denoised(x / (1 - std), (std / (1 - std)).flatten())) / std.clamp(min=1e-3)


def drawn_data(count: int) -> Tensor:
    """Samples [count, 1]."""
    kinds = torch.multinomial(WEIGHTS, count, replacement=True)
    return (MEANS[kinds] + STDS[kinds] * torch.randn(count)).float().view(-1, 1)


class Learner(nn.Module):
    """A small network (x [B, 1], t [B]) -> [B, 1], always of the same weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """What it predicts."""
        answer: Tensor = self.layers(torch.cat([x, t.view(-1, 1) / 500 - 1], dim=1))
        return answer


def errors(process: Process, learner: Learner) -> tuple[float, float]:
    """Distance to the ends of the paths of one step of a flow's student, and of four of DDIM by the exact denoiser."""
    noise = torch.randn(4096, 1, generator=torch.Generator().manual_seed(9))

    def solved(steps: int) -> Tensor:
        at = process.sigmas(steps)
        return sample_ddim(denoised, process.initial(noise, float(at[0])), at)

    sigma, ends = float(process.sigmas(1)[0]), solved(1000)
    with torch.no_grad():
        drawn = process.denoiser(learner)(process.initial(noise, sigma), sigma)
    return float((drawn - ends).abs().mean()), float((solved(4) - ends).abs().mean())
