"""A plan is made in a process of its own, tests of it in one with all others."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from train.planning import activations


@pytest.fixture(scope="module", autouse=True)
def plain_linear() -> Iterator[None]:
    """DeepSpeed's stage 3 replaces `F.linear` for the rest of its process, and nothing then tells what it is."""
    linear = torch._C._nn.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", linear)
        patch.setattr(activations, "NARROW", {F.conv2d, linear, F.scaled_dot_product_attention})
        yield
