"""What `train/plan.py` says: tables for people, `plan.json` for programs."""

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.files import atomic_write
from conf.plain_json import dumps
from conf.schema import PlanRun
from train.engine.accelerators import SPECIFICATIONS
from train.planning.estimate import RESERVE, Cost, Option

PLAN = "plan.json"


def print_cost(cfg: PlanRun, cost: Cost, console: Console | None = None) -> None:
    """Print the plan and write it to `output_dir`."""
    console = console or Console(highlight=False)
    path = Path(cfg.output_dir) / PLAN
    atomic_write(path, dumps(asdict(cost) | {"refusal": cfg.refusal()}, indent=1).encode())
    for table in (facts(cfg, cost), memory(cfg, cost)):
        console.print(table)
    console.print(verdict(cfg, cost), soft_wrap=True)
    if advice := advised(cost):
        console.print(advice, soft_wrap=True)
    if refusal := cfg.refusal():
        console.print(f"{cfg.program} refuses this training: {refusal}", soft_wrap=True)
    console.print(Text(str(path)), soft_wrap=True)


def facts(cfg: PlanRun, cost: Cost) -> Table:
    """Arithmetic, time, reading and disk."""
    gpu, step_s, travel = SPECIFICATIONS[cfg.accelerator], cost.compute_s + cost.exchange.waited_s, cost.exchange
    hours = timedelta(seconds=round(cfg.loop.samples / cost.images_per_s))
    reached = cost.mfu * cost.compute_s / step_s
    peak = gpu.flops_per_s(cfg.runtime.precision) / 1e12
    parts = cfg.gpus * cost.accumulation
    sizes = f"{cost.micro_batch}" if cfg.batch.global_batch_size % parts == 0 else f"up to {cost.micro_batch}"
    slow = cost.host_s > cost.compute_s and not cfg.runtime.compile
    rows = {
        "U-Net": f"{cost.parameters:,} parameters, latents of {cfg.model.sample_size} x {cfg.model.sample_size}",
        "machines": f"{cfg.gpus} x {cfg.accelerator.value}, {peak:,.0f} TFLOP/s at {cost.mfu:.2f} MFU, "
        f"{cfg.runtime.precision.value}",
        "batch": f"{cfg.batch.global_batch_size:,} = {cfg.gpus} GPUs x micro-batches of {sizes}"
        f" x accumulation of {cost.accumulation}",
        "arithmetic": f"{cost.flops_per_sample / 1e12:,.3f} TFLOP per sample, forwards and backwards"
        + (f", with {cfg.extra_passes} passes beside the network's own" if cfg.extra_passes else ""),
        "step": f"{1000 * step_s:,.0f} ms: {1000 * cost.compute_s:,.0f} of arithmetic, "
        f"{1000 * travel.waited_s:,.0f} of waiting for other GPUs ({reached:.2f} MFU in all)",
        "exchange": f"{gb(travel.beside_bytes)} beside the arithmetic, {gb(travel.after_bytes)} after it, in "
        f"{travel.operations:,} operations: {1000 * (travel.beside_s + travel.after_s):,.0f} ms, of which "
        f"{1000 * min(travel.beside_s, travel.hidden_s):,.0f} are hidden",
        "host": f"{1000 * cost.host_s:,.0f} ms to launch the operators one by one"
        + (", more than the arithmetic takes: set runtime.compile=true" if slow else ""),
        "assumed": "MFU, links and network as makers and published runs have them; 10 us per operator and per hop; "
        "nothing of it was measured here",
        "throughput": f"{cost.images_per_s:,.0f} images/s",
        "run": f"{cfg.loop.samples:,} samples in {hours}: {cost.gpu_hours:,.0f} GPU-hours",
        "reading": f"{cost.read_bytes_per_s / 1e6:,.1f} MB/s of latents, {cost.tokens_per_s:,.0f} tokens/s",
        "latent cache": f"{gb(cost.cache_bytes)}, {cost.record_bytes:,.0f} bytes per sample",
        "without it": f"{cost.encoder_flops / 1e12:,.3f} TFLOP more per sample, "
        f"{100 * cost.encoder_flops / cost.flops_per_sample:.0f} % of its arithmetic, by Stable Diffusion's encoder "
        "in each step (encode=true)",
        "checkpoint": f"{gb(cost.checkpoint_bytes)}, of which {cfg.loop.keep_checkpoints} are kept",
    }
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def memory(cfg: PlanRun, cost: Cost) -> Table:
    """Memory of each GPU, by ZeRO stage, and under FSDP."""
    columns = ("ZeRO", "weights", "AdamW", "average", "step", "buffers", "total", "RAM", "samples")
    caption = "step: gradients and activations at their most; samples: the largest micro-batch that fits"
    if teacher := cost.options[0].footprint.teacher:
        caption += f"; weights: with the teacher's, {teacher / 2**30:.1f}"
    title = f"GiB per GPU with micro-batches of {cost.micro_batch}"
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE, pad_edge=False
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for option in cost.options:
        part = option.footprint
        weights = part.weights + part.teacher
        sizes = (weights, part.optimizer, part.average, part.step, part.buffers, part.total, part.host)
        chosen = option is cost.option(cfg)
        table.add_row(
            f"> {option.name}" if chosen else option.name,
            *(f"{size / 2**30:.1f}" for size in sizes),
            str(option.largest_micro_batch or "none"),
            style="bold" if chosen else "",
        )
    return table


def verdict(cfg: PlanRun, cost: Cost) -> str:
    """Whether it fits, and what helps if it does not."""
    chosen, size = cost.option(cfg), SPECIFICATIONS[cfg.accelerator].memory_gib
    budget = f"{cost.budget / 2**30:.1f} of {size:.0f} GiB ({RESERVE:.0%} are left to CUDA and its libraries)"
    needed = chosen.footprint.total / 2**30
    if chosen.footprint.total <= cost.budget:
        return f"Fits: {needed:.1f} of {budget}. Largest micro-batch: {chosen.largest_micro_batch}."
    return f"Does not fit: {needed:.1f}, there are {budget}. {' or '.join(remedies(cfg, cost, chosen))}."


def advised(cost: Cost) -> str:
    """The backend to take, of those that fit; empty where none does."""
    fitting = [way for way in cost.ways if way.fits]
    if not fitting:
        return ""
    best, *others = fitting
    waits = [f"{way.name} {1000 * way.waited_s:,.0f} ms" for way in others]
    compared = f" ({', '.join(waits)})" if waits else ", and is the only one that fits without offload"
    return f"Waits least for other GPUs: {best.name}, {1000 * best.waited_s:,.0f} ms per step{compared}."


def remedies(cfg: PlanRun, cost: Cost, chosen: Option) -> list[str]:
    """Options that may make it fit, the cheapest first."""
    share, found = cost.micro_batch * cost.accumulation, list[str]()
    sizes = range(1, chosen.largest_micro_batch + 1)
    smaller = [size for size in sizes if share % size == 0 or (size > 1 and cfg.batch.uneven)]
    if smaller:
        found.append(f"batch.micro_batch_size={smaller[-1]}")
    found += [
        f"runtime.zero_stage={option.stage}"
        for option in cost.options
        if option.stage > chosen.stage
        and not (option.offload or option.sharded)
        and option.footprint.total <= cost.budget
    ][:1]
    if not cfg.runtime.gradient_checkpointing:
        found.append("runtime.gradient_checkpointing=true")
    return [f"Set {found[0]}", *found[1:]] if found else ["Take more GPUs, or larger ones"]


def gb(size: float) -> str:
    return f"{size / 1e12:,.2f} TB" if size >= 1e12 else f"{size / 1e9:,.2f} GB"
