"""Attention under control equals the equations of the paper (Hertz et al. 2022), written out here on materialised maps.

The network has the shape of Stable Diffusion, small, with random weights: cross-attention on three levels and between.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conf.schema.networks import UNetConfig
from models.editing.attention_control import ControlledAttention, TokenControl
from models.unet import UNet

LENGTH, WIDTH, NULLS = 7, 12, 2
# source: start, red, monster, end, pad, pad, pad; edit: start, bell, shaped, monster, end, pad, pad
SWAPPED = [[(0, 1.0)], [(1, 0.5)], [(1, 0.5)], [(2, 1.0)], [(3, 1.0)], [(4, 1.0), (5, 1.0)], [(6, 1.0)]]
# edit: start, sad, red, monster, end, pad, pad; nothing of the source is "sad"
ADDED = [[(0, 1.0)], [], [(1, 1.0)], [(2, 1.0)], [(3, 1.0)], [(5, 1.0)], [(6, 1.0)]]


def network() -> UNet:
    torch.manual_seed(0)
    made = UNet(
        UNetConfig(
            block_out_channels=[8, 8, 8, 8],
            layers_per_block=1,
            down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            cross_attention_dim=WIDTH,
            attention_head_dim=[2],
            norm_num_groups=4,
        )
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


NETWORK = network()
INPUTS = torch.randn(NULLS + 2, 4, 16, 16), torch.full((NULLS + 2,), 300.0), torch.randn(NULLS + 2, LENGTH, WIDTH)


def control(counterparts: list[list[tuple[int, float]]], until: list[float], **options: object) -> ControlledAttention:
    """Row 0 is the source and row 1 the edit; each of its tokens has counterparts, with their shares."""
    alignment = torch.zeros(LENGTH, LENGTH)
    for token, sources in enumerate(counterparts):
        for source, share in sources:
            alignment[source, token] = share
    options = {"weights": torch.ones(LENGTH)} | options
    edit = TokenControl(0, alignment, torch.tensor(until), **options)  # type: ignore[arg-type]
    return ControlledAttention([TokenControl.none(0, LENGTH), edit], torch.device("cpu"))


def softmax_map(q: Tensor, k: Tensor) -> Tensor:
    """M = Softmax(Q K^T / sqrt(d)), section 3.1."""
    logits = torch.einsum("hnd,hmd->hnm", q, k) / math.sqrt(q.shape[-1])
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


Paper = Callable[[Tensor, Tensor], Tensor]  # maps of the source and of the edit [heads, N, M] -> maps to use


def word_swap(source: Tensor, own: Tensor) -> Tensor:
    """M_t, the source's; a word of one token that becomes two gives each a half."""
    edited = torch.zeros_like(own)
    for token, sources in enumerate(SWAPPED):
        for number, share in sources:
            edited[..., token] += share * source[..., number]
    return edited


def refinement(source: Tensor, own: Tensor) -> Tensor:
    """(M_t*)_ij where A(j) is none, else (M_t)_iA(j)."""
    edited = own.clone()
    for token, sources in enumerate(ADDED):
        if sources:
            edited[..., token] = source[..., sources[0][0]]
    return edited


def reweighted(source: Tensor, own: Tensor) -> Tensor:
    """c (M_t)_ij where j is the word, else (M_t)_ij; the prompts are the same."""
    edited = source.clone()
    edited[..., 2] *= -1.5
    return edited


def partly_swapped(source: Tensor, own: Tensor) -> Tensor:
    """The first of the two new tokens no longer follows, and the last word is ignored."""
    edited = word_swap(source, own)
    edited[..., 1] = own[..., 1]
    edited[..., 3] = 0.0
    return edited


SAME = [[(token, 1.0)] for token in range(LENGTH)]
ALWAYS, NEVER = [1.0] * LENGTH, [0.0] * LENGTH
NEW = [0.0 if not sources else 1.0 for sources in ADDED]
PARTLY = [1.0, 0.2, *[1.0] * 5]
CASES: dict[str, tuple[ControlledAttention, Paper]] = {
    "replace": (control(SWAPPED, ALWAYS), word_swap),
    "refine": (control(ADDED, NEW), refinement),
    "reweight": (control(SAME, ALWAYS, weights=torch.tensor([1, 1, -1.5, 1, 1, 1, 1])), reweighted),
    "schedule and mask": (control(SWAPPED, PARTLY, weights=torch.tensor([1.0, 1, 1, 0, 1, 1, 1])), partly_swapped),
    "self": (control(SAME, NEVER, self_until=1.0), lambda source, own: own),
}


@pytest.mark.parametrize("case", CASES)
def test_maps_and_network_equal_the_equations_of_the_paper(case: str) -> None:
    controlled, paper = CASES[case]
    controlled.move_to(0.5)
    layers = []

    def by_the_paper(q: Tensor, k: Tensor, v: Tensor, name: str, is_cross: bool) -> Tensor:
        maps = torch.stack([softmax_map(*row) for row in zip(q, k, strict=True)])  # [B, heads, N, M]
        if is_cross:
            maps[-1] = paper(maps[-2], maps[-1])
        elif case == "self":
            maps[-1] = maps[-2]
        unit = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)  # values that show the maps themselves
        torch.testing.assert_close((controlled.to_text if is_cross else controlled.to_image)(q, k, unit), maps)
        layers.append(name)
        return maps @ v

    def ours(q: Tensor, k: Tensor, v: Tensor, name: str, is_cross: bool) -> Tensor:
        return (controlled.to_text if is_cross else controlled.to_image)(q, k, v)

    with torch.no_grad():
        expected, result = NETWORK(*INPUTS, by_the_paper), NETWORK(*INPUTS, ours)
        plain = NETWORK(*INPUTS)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert len(layers) == 20
    torch.testing.assert_close(result[:-1], plain[:-1])  # the source, and the rows of guidance
    assert (result[-1] - plain[-1]).abs().max() > 0.01


@pytest.mark.parametrize("case", ["replace", "refine", "schedule and mask"])
def test_after_its_last_moment_a_row_attends_by_itself(case: str) -> None:
    controlled, _ = CASES[case]
    controlled.move_to(1.0)
    q, k, v = (torch.randn(4, 2, tokens, 4) for tokens in (9, LENGTH, LENGTH))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v * controlled.weights[-1].view(-1, 1))
    torch.testing.assert_close(controlled.to_text(q, k, v)[-1], expected[-1])


def test_tokens_of_other_conditions_are_left_alone() -> None:
    """Columns after those of the text keep the edit's own values, and follow the source's map like the rest."""
    controlled, _ = CASES["replace"]
    controlled.move_to(0.5)
    q, k, v = torch.randn(2, 2, 9, 4), torch.randn(2, 2, LENGTH + 2, 4), torch.randn(2, 2, LENGTH + 2, 4)
    maps = torch.stack([softmax_map(*row) for row in zip(q, k, strict=True)])
    maps[1] = torch.cat([word_swap(maps[0][..., :LENGTH], maps[1][..., :LENGTH]), maps[0][..., LENGTH:]], dim=-1)
    torch.testing.assert_close(controlled.to_text(q, k, v), maps @ v)


def test_maps_of_words_are_those_that_are_used_but_for_weights() -> None:
    controlled, _ = CASES["reweight"]
    controlled.move_to(0.5)
    q, k = torch.randn(NULLS + 2, 2, 9, 4), torch.randn(NULLS + 2, 2, LENGTH, 4)
    words = torch.zeros(2, LENGTH, 2)
    words[:, [1, 2], 0] = words[:, 4, 1] = 1.0
    source = softmax_map(q[-2], k[-2])
    expected = torch.stack([source[..., 1] + source[..., 2], source[..., 4]], dim=-1)
    torch.testing.assert_close(controlled.maps(q, k, words), expected.expand(2, -1, -1, -1))
