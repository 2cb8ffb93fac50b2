"""Prompt-to-prompt: images that are drawn with the attention of another one (Hertz et al. 2022).

All edits of the paper are linear in the attention maps P = softmax(q k^T / sqrt(d)) of a source and P* of the edit, so
they move into what attention is given, which stays one fused call:

    swapped words (replace)   P A V*                       = attention(q, k, A V*)
    added words (refine)      P A diag(a) V* + P* diag(1 - a) V*, a = 1 where a token has a counterpart
    re-weighting              P diag(c) V                  = attention(q, k, diag(c) V)
    self-attention            P V*                         = attention(q, k, V*)

Shapes: R rows, sources and edits; L tokens of a text; N tokens of the image, M attended to, d channels of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class TokenControl:
    """Changes to the attention of one row."""

    source: int  # the row whose attention it takes; of a source its own
    alignment: Tensor  # A [L of the source, L], whose attention each token takes
    until: Tensor  # [L] share of the sampling up to which it does; 0: never
    weights: Tensor  # c [L]
    self_until: float = 0.0  # share of the sampling up to which it takes the source's self-attention

    @classmethod
    def none(cls, row: int, length: int) -> "TokenControl":
        """The control of a row that is left alone."""
        return cls(row, torch.eye(length), torch.zeros(length), torch.ones(length))


@dataclass(frozen=True, slots=True)
class _Plan:
    """Indices of rows and tokens that all layers use at one moment, on the device."""

    image: Tensor | None  # [R] whose queries and keys self-attention takes; None: the own
    text: Tensor | None  # [R] whose queries and keys attention to the text takes; None: the own
    values: Tensor | None  # [R, L, L], what the values of the text are multiplied by; None: the identity
    mixed: Tensor  # [X] rows that also attend by themselves
    rest: Tensor  # [X, L, L], to other values


class ControlledAttention:
    """Computes attention for rows of which some take that of others.

    A batch may begin with further rows, those of an empty caption for guidance, which are left alone, as in the paper's
    code.
    """

    def __init__(self, rows: list[TokenControl], device: torch.device) -> None:
        self.device = device
        self.sources = torch.tensor([row.source for row in rows])  # [R]
        self.alignment = torch.stack([row.alignment for row in rows])  # [R, L, L]
        self.until = torch.stack([row.until for row in rows])  # [R, L]
        self.weights = torch.stack([row.weights for row in rows])  # [R, L]
        self.self_until = torch.tensor([row.self_until for row in rows])  # [R]
        self.plans: dict[bytes, tuple[_Plan, _Plan]] = {}
        self.move_to(0.0)

    def move_to(self, progress: float) -> None:
        """Go to a moment of sampling, from 0, its first step, to below 1."""
        taken, own = progress < self.until, progress >= self.self_until  # [R, L], [R]
        # A plan changes at a few of the steps and moves to the device; made anew in each, it would hold up the GPU.
        key = torch.cat([taken.flatten(), own]).numpy().tobytes()
        if key not in self.plans:
            ones = torch.ones_like(self.weights)
            self.plans[key] = self._plan(taken.float(), own, self.weights), self._plan(taken.float(), own, ones)
        self.plan, self.unweighted = self.plans[key]

    def _plan(self, taken: Tensor, own: Tensor, weights: Tensor) -> _Plan:
        rows = torch.arange(len(own))
        follows = taken.any(1)  # [R]
        injected = self.alignment * (taken * weights)[:, None]
        values = torch.where(follows[:, None, None], injected, torch.diag_embed(weights))
        mixed = rows[follows & ~taken.all(1)]
        rest = torch.diag_embed((1 - taken) * weights)[mixed]
        image, text = torch.where(own, rows, self.sources), torch.where(follows, self.sources, rows)
        plain = torch.equal(values, torch.eye(values.shape[1]).expand_as(values))
        return _Plan(
            None if torch.equal(image, rows) else image.to(self.device),
            text.to(self.device) if follows.any() else None,
            None if plain else values.to(self.device),
            mixed.to(self.device),
            rest.to(self.device),
        )

    def to_image(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention [B, heads, N, d] of q, k, v of that shape; the last R of B rows are controlled."""
        rows = self.plan.image
        if rows is not None:
            rows = self._of_batch(rows, len(q))
            q, k = q[rows], k[rows]
        return F.scaled_dot_product_attention(q, k, v)

    def to_text(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [B, heads, N, d] to the text: q [B, heads, N, d], k and v [B, heads, M, d], of the text first L."""
        return self._to_text(q, k, v, self.plan)

    def maps(self, q: Tensor, k: Tensor, tokens: Tensor) -> Tensor:
        """Attention [R, heads, N, W] that groups of tokens [R, L, W] get, as in `to_text` but before weights."""
        q, k = q[-len(self.sources) :], k[-len(self.sources) :]
        columns = F.pad(tokens, (0, 0, 0, k.shape[2] - tokens.shape[1])).to(q.dtype)  # [R, M, W]
        return self._to_text(q, k, columns.unsqueeze(1).expand(-1, q.shape[1], -1, -1), self.unweighted)

    def _to_text(self, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> Tensor:
        free = len(q) - len(self.sources)
        batch, own_v = len(q), v
        # P A diag(a) V* + P* diag(1 - a) V*: such rows stand in the batch twice, and the two results are added.
        again = plan.mixed + free
        if plan.values is not None:
            v = _times(plan.values, v, free)
        if plan.text is not None:
            rows = torch.cat([self._of_batch(plan.text, batch), again])
            q, k, v = q[rows], k[rows], torch.cat([v, _times(plan.rest, own_v[again], 0)])
        h = F.scaled_dot_product_attention(q, k, v)
        return h[:batch].index_add(0, again, h[batch:]) if len(again) else h

    def _of_batch(self, rows: Tensor, batch: int) -> Tensor:
        """Indices of rows as those of a batch with further rows before them."""
        free = batch - len(rows)
        return torch.cat([torch.arange(free, device=rows.device), rows + free])


def _times(matrices: Tensor, v: Tensor, free: int) -> Tensor:
    """Values [B, heads, M, d], those of the text multiplied by [B - free, L, L], but for the first `free` rows."""
    length = matrices.shape[-1]
    text = matrices.to(v.dtype).unsqueeze(1) @ v[free:, :, :length]
    return torch.cat([v[:free], torch.cat([text, v[free:, :, length:]], dim=2)])
