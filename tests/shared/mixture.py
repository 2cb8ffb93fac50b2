"""Data on a line whose denoiser is known in closed form: a mixture of two normal distributions."""

import torch
from torch import Tensor

WEIGHTS, MEANS, STDS = torch.tensor([[0.6, 0.4], [-1.0, 1.2], [0.3, 0.2]], dtype=torch.float64)


def denoised(x: Tensor, sigma: Tensor | float) -> Tensor:
    """Mean of x0 of the mixture given x = x0 + sigma noise."""
    variances = STDS**2 + torch.as_tensor(sigma, dtype=torch.float64).view(-1, 1) ** 2
    distance = x.double().view(-1, 1) - MEANS
    share = torch.softmax(WEIGHTS.log() - distance**2 / (2 * variances) - variances.log() / 2, dim=-1)
    return (share * (MEANS + STDS**2 / variances * distance)).sum(-1).view(x.shape).to(x.dtype)
