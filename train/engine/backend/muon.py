"""Muon: hidden matrices step along their momentum with all its singular values made alike, the rest by AdamW.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon). A step has the length of Liu et al. 2025
(https://arxiv.org/abs/2502.16982, eq. 4), with which AdamW's learning rate and weight decay hold for it.

Whole matrices are needed, wherever they lie: each is brought together on one of the processes, which take turns, made
orthogonal there, and sent to all. So a step is the same under every backend, and its work is shared.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.schema import OptimConfig, OptimizerName
from train.engine.backend.layout import BUCKET, Layout
from train.engine.optim import adamw, parameter_groups

MOMENTUM = 0.95  # decay per step of the gradients' running mean; Nesterov's is taken
LENGTH = 0.2  # root mean square of a step / learning rate, about that of AdamW
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x³ and x⁵: brings singular values in (0, 1] close to 1 in five steps
NEWTON_SCHULZ_STEPS = 5
ENDS = ("conv_in.weight", "conv_out.weight")  # of a network; what they map to or from has its own scale: AdamW


def make_optimizer(module: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """The optimizer that `cfg.name` says, over all trainable parameters; Muon still has to be told their layout."""
    return Muon(module, cfg) if cfg.name is OptimizerName.muon else adamw(module, cfg)


def hidden_matrices(module: nn.Module) -> list[str]:
    """Names of the trainable weights of linear layers and convolutions, but for a network's first and last one."""
    layers = ((name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d))
    names = [f"{name}.weight" for name, part in layers if part.weight.requires_grad]
    return [name for name in names if not name.endswith(ENDS)]


class Muon(torch.optim.AdamW):
    """Kernels [outputs, inputs, k, k] are matrices of outputs x inputs·k².

    The momentum is kept as AdamW's `exp_avg`, so that checkpoints have one form; of these matrices `exp_avg_sq` is 0.
    """

    def __init__(self, module: nn.Module, cfg: OptimConfig) -> None:
        self.matrices = hidden_matrices(module)
        chosen = {id(module.get_parameter(name)) for name in self.matrices}
        hidden = [p for p in module.parameters() if id(p) in chosen]
        others = parameter_groups((p for p in module.parameters() if id(p) not in chosen), cfg.weight_decay)
        groups = [{"params": hidden, "weight_decay": cfg.weight_decay, "hidden": True}, *others]
        super().__init__(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
        self.layout: Layout | None = None
        self.masters: Sequence[Tensor] = ()

    def place(self, layout: Layout, masters: Sequence[Tensor]) -> None:
        """Say where the parameters lie; before the first step."""
        self.layout, self.masters = layout, masters

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; collective. DeepSpeed's stage 3 calls it for a part of the masters at a time."""
        hidden = [group for group in self.param_groups if group.get("hidden")]
        gradients = [(master, master.grad) for group in hidden for master in group["params"]]
        self._step_hidden(hidden)
        for master, _ in gradients:
            master.grad = None  # AdamW leaves alone what has none
        super().step(closure)
        for master, gradient in gradients:
            master.grad = gradient

    def _step_hidden(self, groups: list[dict[str, Any]]) -> None:
        assert self.layout is not None
        settings = {id(master): group for group in groups for master in group["params"] if master.grad is not None}
        updates = [self._momentum(m) if id(m) in settings else torch.empty(0) for m in self.masters]
        pieces = self.layout.pieces
        names = [name for name in self.matrices if id(self.masters[pieces[name].shard]) in settings]
        for bucket in self._buckets(names):
            self._orthogonalise(bucket, updates)
        for master, update in zip(self.masters, updates, strict=True):
            if id(master) in settings:
                group = settings[id(master)]
                master.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _momentum(self, master: Tensor) -> Tensor:
        """Nesterov's momentum with the gradient of this step, like the master."""
        state = self.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format)
        state["step"] += 1
        average = state["exp_avg"].lerp_(master.grad, 1 - MOMENTUM)
        return torch.lerp(master.grad, average, MOMENTUM)  # type: ignore[arg-type]

    def _buckets(self, names: Sequence[str]) -> Iterator[list[str]]:
        """As many matrices at a time as one collective operation may move."""
        assert self.layout is not None
        bucket, elements = list[str](), 0
        for name in names:
            numel = self.layout.shapes[name].numel()
            if bucket and elements + numel > BUCKET:
                yield bucket
                bucket, elements = [], 0
            bucket.append(name)
            elements += numel
        if bucket:
            yield bucket

    def _orthogonalise(self, names: Sequence[str], updates: list[Tensor]) -> None:
        """Replace the momentum of these matrices by their steps, in `updates`; collective."""
        layout = self.layout
        assert layout is not None
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        world, rank = (1, 0) if alone else (dist.get_world_size(), dist.get_rank())
        # All collective operations before the work and after it: nobody waits in one for a matrix of another process.
        wholes = [layout.collect(name, updates, i % world).to(layout.device) for i, name in enumerate(names)]
        mine = [i % world == rank for i in range(len(names))]
        steps = [step_of(w) if own else torch.empty_like(w) for w, own in zip(wholes, mine, strict=True)]
        for i, (name, step) in enumerate(zip(names, steps, strict=True)):
            if not alone:
                dist.broadcast(step, src=i % world)
            layout.disperse(name, step, updates)


def step_of(momentum: Tensor) -> Tensor:
    """The step of a matrix or kernel along its momentum, for a learning rate of 1; contiguous."""
    matrix = momentum.reshape(len(momentum), -1)
    return (orthogonal(matrix) * LENGTH * math.sqrt(max(matrix.shape))).view(momentum.shape)


def orthogonal(matrix: Tensor) -> Tensor:
    """[m, n] with its singular values brought close to 1 by five Newton-Schulz steps.

    A step multiplies X by the polynomial a + b·G + c·G² of G = X·Xᵀ, and G by its square; all of these commute. So the
    steps are taken on G alone, which of a kernel is a ninth of X, and X is multiplied once by their product.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.mT if len(matrix) > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    gram, product = x @ x.mT, None
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = factor @ gram @ factor
    x = product @ x
    return (x.mT if len(matrix) > matrix.shape[1] else x).contiguous()
