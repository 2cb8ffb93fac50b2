"""The learning rate, a pure function of the samples seen; AdamW and Muon; gradients that add up to a step."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.schema import LrDecay, OptimConfig, OptimizerName
from train.engine.backend.layout import Layout, buckets_of
from train.engine.precision import LossScale
from train.engine.runtime import Runtime

MOMENTUM = 0.95  # decay per step of the gradients' running mean; Nesterov's is taken
LENGTH = 0.2  # root mean square of a step / learning rate, about that of AdamW
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x³ and x⁵: brings singular values in (0, 1] close to 1 in five steps
NEWTON_SCHULZ_STEPS = 5
ENDS = ("conv_in.weight", "conv_out.weight")  # of a network; what they map to or from has its own scale: AdamW


def lr_at(samples_seen: int, cfg: OptimConfig, total_samples: int) -> float:
    """Learning rate of the step that brings the run to `samples_seen` samples.

    Linear warm-up from 0 over `cfg.warmup_samples`, the peak held until `cfg.hold_fraction` of the run, then the decay
    of `cfg.decay` down to `cfg.final_lr_ratio` of the peak at `total_samples`. Past the end it stays there.
    """
    warmup = min(1.0, samples_seen / cfg.warmup_samples) if cfg.warmup_samples > 0 else 1.0
    if cfg.decay is LrDecay.constant:
        return cfg.lr * warmup
    start = min(max(float(cfg.warmup_samples), cfg.hold_fraction * total_samples), float(total_samples))
    progress = min(1.0, max(0.0, (samples_seen - start) / max(1.0, total_samples - start)))
    remaining = 1 - progress if cfg.decay is LrDecay.linear else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.lr * warmup * (cfg.final_lr_ratio + (1 - cfg.final_lr_ratio) * remaining)


# -------------------- optimizers --------------------------------------------------------------------------------------


def make_optimizer(module: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """The optimizer that `cfg.name` says, over all trainable parameters; Muon still has to be told their layout."""
    return Muon(module, cfg) if cfg.name is OptimizerName.muon else adamw(module, cfg)


def adamw(module: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters.

    The fused implementation exists on CPU and GPU and needs no compiler, unlike DeepSpeed's.
    """
    groups = parameter_groups(module.parameters(), cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """The trainable ones in two groups: only matrices and kernels decay, not biases, gains and scalars."""
    trainable = [p for p in parameters if p.requires_grad]

    def matrix(p: nn.Parameter) -> bool:
        return len(getattr(p, "ds_shape", p.shape)) >= 2  # DeepSpeed's stage 3 leaves an empty row, and notes the shape

    kinds = [([p for p in trainable if matrix(p)], weight_decay), ([p for p in trainable if not matrix(p)], 0.0)]
    return [{"params": members, "weight_decay": decay} for members, decay in kinds if members]


def hidden_matrices(module: nn.Module) -> list[str]:
    """Names of the trainable weights of linear layers and convolutions, but for a network's first and last one."""
    layers = ((name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d))
    names = [f"{name}.weight" for name, part in layers if part.weight.requires_grad]
    return [name for name in names if not name.endswith(ENDS)]


class Muon(torch.optim.AdamW):
    """Hidden matrices step along their momentum with all its singular values made alike, the rest by AdamW.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon). A step has the length of Liu et al. 2025
    (https://arxiv.org/abs/2502.16982, eq. 4), with which AdamW's learning rate and weight decay hold for it. Kernels
    [outputs, inputs, k, k] are matrices of outputs x inputs·k².

    Whole matrices are needed, wherever they lie: each is brought together on one of the processes, which take turns,
    made orthogonal there, and sent to all. So a step is the same under every backend, and its work is shared. The
    momentum is kept as AdamW's `exp_avg`, so that checkpoints have one form; of these matrices `exp_avg_sq` is 0.

    As the fused AdamW, it divides gradients by `grad_scale` and changes nothing where `found_inf` is 1, without
    waiting for the device to say which.
    """

    grad_scale: Tensor | None = None  # []
    found_inf: Tensor | None = None  # [], 0 or 1

    def __init__(self, module: nn.Module, cfg: OptimConfig) -> None:
        self.matrices = hidden_matrices(module)
        chosen = {id(module.get_parameter(name)) for name in self.matrices}
        hidden = [p for p in module.parameters() if id(p) in chosen]
        others = parameter_groups((p for p in module.parameters() if id(p) not in chosen), cfg.weight_decay)
        groups = [{"params": hidden, "weight_decay": cfg.weight_decay, "hidden": True}] * bool(hidden) + others
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
        for bucket in buckets_of(names, self.layout.shapes):
            self._orthogonalise(bucket, updates)
        for master, update in zip(self.masters, updates, strict=True):
            if id(master) in settings:
                group = settings[id(master)]
                taken = self._taken(master)
                master.mul_(1 - group["lr"] * group["weight_decay"] * taken).addcmul_(update, taken, value=-group["lr"])

    def _momentum(self, master: Tensor) -> Tensor:
        """Nesterov's momentum with the gradient of this step, like the master."""
        state = self.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format)
        gradient, taken = master.grad, self._taken(master)
        assert gradient is not None
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        gradient = torch.where(taken > 0, gradient, 0)
        state["step"] += taken
        average = state["exp_avg"].lerp_(gradient, taken * (1 - MOMENTUM))
        return torch.lerp(gradient, average, MOMENTUM)

    def _taken(self, master: Tensor) -> Tensor:
        """1 where the step is taken, 0 where it changes nothing, []."""
        return 1 - (torch.zeros((), device=master.device) if self.found_inf is None else self.found_inf)

    def _orthogonalise(self, names: Sequence[str], updates: list[Tensor]) -> None:
        """Replace the momentum of these matrices by their steps, in `updates`; collective."""
        layout = self.layout
        assert layout is not None
        # Those that hold all matrices together share the work, in plain DDP all that hold the same.
        members = layout.shards if layout.sharded else layout.copies
        world, rank = members.size, members.rank
        # All collective operations before the work and after it: nobody waits in one for a matrix of another process.
        wholes = [layout.collect(name, updates, i % world).to(layout.device) for i, name in enumerate(names)]
        mine = [i % world == rank for i in range(len(names))]
        steps = [step_of(w) if own else torch.empty_like(w) for w, own in zip(wholes, mine, strict=True)]
        for i, (name, step) in enumerate(zip(names, steps, strict=True)):
            if world > 1:
                dist.broadcast(step, group=members.group, group_src=i % world)
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


# -------------------- gradients ---------------------------------------------------------------------------------------


@torch.no_grad()
def judge_gradients(
    optimizer: torch.optim.AdamW,
    gradients: Iterable[Tensor],
    limit: float,
    scale: LossScale,
    over_processes: Callable[[Tensor], Tensor] = lambda norm: norm,
) -> Tensor:
    """Tell an optimizer what to divide the gradients by, and whether to take its next step at all; returns their norm.

    All of it stays on the device, where the fused AdamW reads it (as `torch.amp.GradScaler` has it do): `grad_scale`
    holds the loss scale and bounds the norm, `found_inf` is 1 where the norm is not finite, and the step then changes
    nothing. Parameters that are kept on the CPU have it there, when it has arrived: AdamW itself would read too soon.

    Args:
        limit: largest norm; 0 for no clipping.
        scale: what the loss was multiplied by; it learns from this step.
        over_processes: from the norm of this process's gradients to that of all, where each has a part of them.

    Returns:
        The norm before clipping, [].

    """
    norm = over_processes(nn.utils.get_total_norm(gradients)) / scale.factor
    finite = norm.isfinite()
    divisor = scale.factor * ((norm + 1e-6) / limit).clamp(min=1) if limit > 0 else scale.factor
    reader: Any = optimizer  # the attributes are those that torch looks for
    home = optimizer.param_groups[0]["params"][0].device
    reader.grad_scale = torch.where(finite, divisor, 1).float().to(home) if limit > 0 or scale.enabled else None
    reader.found_inf = (~finite).float().to(home)
    scale.update(finite)
    return norm


def sound_step(
    optimizer: torch.optim.AdamW,
    parameters: Iterable[Tensor],
    limit: float,
    scale: LossScale,
    over_processes: Callable[[Tensor], Tensor] = lambda norm: norm,
) -> Tensor:
    """Clip, update, clear; returns the norm as `judge_gradients`. Not finite: the update is left out."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = judge_gradients(optimizer, gradients, limit, scale, over_processes)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Accumulating:
    """Gradients that plain torch accumulates, under DDP and FSDP: `accumulation` backward passes, then one step."""

    def __init__(self, optim: OptimConfig, accumulation: int, runtime: Runtime) -> None:
        self.grad_clip, self.accumulation = optim.grad_clip, accumulation
        self.passes = 0  # backward passes since the latest step
        self.scale = LossScale(runtime.precision, runtime.device)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients of the mean over the micro-batches."""
        self.passes += 1
        # A count that is off by one exchanges gradients in the wrong pass, or in none, and nothing else would tell.
        if last != (self.passes == self.accumulation):
            raise ValueError(f"pass {self.passes} of {self.accumulation} with last={last}: one of them is wrong")
        self.scale.scaled(loss / self.accumulation).backward()

    def publish(self) -> None:
        """Nothing to do: the masters are the weights."""
