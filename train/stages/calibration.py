"""What the steps of a run take on this machine, tried for some seconds beside its first stage.

A process of its own, since the pipeline never imports torch, times a step of each network in the CPU time of one
thread: that is the same whatever runs beside it. It leaves

    run_dir/.stages/costs.json    {"key": what it was made of, "costs": {stage: `StageCost`}}

which a later start reads instead. On a GPU, or of a network that takes long, there is none: times come as stages run.
"""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from conf.entry import compose, to_plain
from conf.errors import UserError
from conf.files import atomic_write
from conf.plain_json import dumps, loads, read_object
from conf.schema import AutoencoderRun, ClipRun, Sampler, SamplingConfig, UNetRun
from train.stages.child import Child
from train.stages.tasks import STAGES, Task
from train.stages.time_left import StageCost

COSTS = "costs.json"
NETWORKS = ("autoencoder", "clip", "unet")  # stages that say which network there is
MOST_FLOPS = 1e10  # of a forward pass that is timed: more would hold up what runs beside it
GAIN = 0.6  # n threads are n**GAIN times as fast as one: of small networks, on two cores (`experiment=demo`)
MOST_SAMPLES = 8  # in it
TRIES = 3
HELDOUT = 256  # samples behind the metrics of an evaluation in a training, at most
CONTEXT_LENGTH = 77  # tokens of a caption, of most text towers
TWICE = (Sampler.heun, Sampler.dpm2, Sampler.dpmpp_2s)  # call the network twice in each step
JUDGED = 400 * 64  # images that a judge learns from
JUDGE_S = 1e-7  # CPU seconds that each of its pixels takes


def key_of(tasks: Sequence[Task]) -> str:
    """What costs depend on: the options of all stages, and the machine."""
    plain = [platform.node(), os.cpu_count(), [[task.stage.name, to_plain(task.cfg)] for task in tasks]]
    return hashlib.sha256(dumps(plain).encode()).hexdigest()


def known_costs(path: Path, key: str) -> dict[str, StageCost] | None:
    """What a calibration has left; None where there was none of these options on this machine."""
    found = read_object(path)
    return (
        {name: StageCost(**cost) for name, cost in found.get("costs", {}).items()} if found.get("key") == key else None
    )


class Calibration:
    """What stages are expected to cost: as an earlier start found it, else as a process finds it meanwhile.

    Args:
        run_dir: of the run.
        tasks: all of it.
        wanted: False: nothing is tried.
    """

    def __init__(self, run_dir: Path, tasks: Sequence[Task], wanted: bool) -> None:
        self.run_dir, self.tasks, self.key = run_dir, tasks, key_of(tasks)
        self.path = run_dir / ".stages" / COSTS
        self.costs = known_costs(self.path, self.key)
        self.wanted = wanted and self.costs is None and any(task.stage.name in NETWORKS for task in tasks)
        self.child: Child | None = None

    def start(self, keep: int) -> None:
        """Start the process, if there is anything to try; `keep` as of `Child`."""
        if self.wanted:
            self.wanted = False
            arguments = dumps({task.stage.name: task.arguments for task in self.tasks})
            command = [sys.executable, "-m", "train.stages.calibration", str(self.path), self.key, arguments]
            names = self.run_dir / "logs" / "calibration.log", self.run_dir / ".stages" / "calibration.progress"
            self.child = Child(command, names[0], keep, names[1])

    def known(self) -> Mapping[str, StageCost]:
        """Costs by stage, as far as they are known by now."""
        if self.child is not None and self.child.wait(0) is not None:
            self.child, self.costs = None, known_costs(self.path, self.key)
        return self.costs or {}

    def close(self) -> None:
        """End the process where it is."""
        if self.child is not None:
            self.child.stop()
            self.child.process.wait()


def calibrate(configs: Mapping[str, Any]) -> dict[str, StageCost]:
    """Costs of the stages of these configurations; of none where they would not be true."""
    import torch

    from train.engine.runtime import pick_device
    from train.training import autoencoder, clip, unet  # noqa: F401  their imports are a part of each stage

    networks = [configs[name] for name in NETWORKS if name in configs]
    if any(pick_device(cfg.runtime).type != "cpu" for cfg in networks):
        return {}
    start_s = time.process_time()
    threads = max([cfg.runtime.threads for cfg in networks], default=0) or torch.get_num_threads()
    torch.set_num_threads(1)
    gain = threads**GAIN
    costs, encode_s, decode_s, forward_s = dict[str, StageCost](), 0.0, 0.0, 0.0
    if cfg := configs.get("autoencoder"):
        step_s, encode_s, decode_s = (seconds / gain for seconds in autoencoder_seconds(cfg))
        costs["autoencoder"] = StageCost(start_s, step_s, HELDOUT * (encode_s + decode_s))
        costs["latents"] = StageCost(start_s, encode_s)
    if cfg := configs.get("clip"):
        step_s = clip_seconds(cfg) / gain
        costs["clip"] = StageCost(start_s, step_s, HELDOUT * step_s / 3)
    if cfg := configs.get("unet"):
        step_s, forward_s = (seconds / gain for seconds in unet_seconds(cfg, tokens_of(configs)))
        drawn = (cfg.sample_prompts + cfg.evaluation.samples) * (passes(cfg.sampling) * forward_s + decode_s)
        costs["unet"] = StageCost(start_s, step_s, HELDOUT * forward_s + drawn)
        for name in {"sample", "evaluate"} & set(configs):
            costs[name] = StageCost(start_s, passes(configs[name]) * forward_s + decode_s)
    if (cfg := configs.get("evaluate")) and "evaluate" in costs:
        judges = cfg.prompt_following + len(cfg.judges)
        judge_s = judges * JUDGED * cfg.images.resolution**2 * JUDGE_S / gain
        costs["evaluate"] = replace(costs["evaluate"], fixed_s=start_s + judge_s)
    return {name: cost for name, cost in costs.items() if name in configs}


def autoencoder_seconds(cfg: AutoencoderRun) -> tuple[float, float, float]:
    """CPU seconds of one image in a training step, of encoding it and of decoding it."""
    import torch

    from models.autoencoder import Autoencoder, split_moments
    from models.flops import counted_flops
    from models.losses import perceptual_distance

    network, side, small = Autoencoder(cfg.model), cfg.images.resolution, cfg.images.resolution // cfg.model.downscale
    shapes = (cfg.model.in_channels, side, side), (cfg.model.cached_channels, small, small)
    count = timed(counted_flops(network, *(torch.empty(1, *shape, device="meta") for shape in shapes)), cfg)
    images, noise = (torch.rand(count, *shape) for shape in shapes)
    distance = perceptual_distance(cfg.loss.perceptual) if cfg.loss.perceptual_weight > 0 else None

    def step() -> None:
        output = network(images, noise)[0]
        loss = (output - images).abs().mean()
        (loss if distance is None else loss + distance(output, images).mean()).backward()

    step_s = seconds_of(step)
    with torch.no_grad():
        encode_s = seconds_of(lambda: network.encode(images))
        latents = split_moments(network.encode(images))[0]
        decode_s = seconds_of(lambda: network.decode(latents))
    return step_s / count, encode_s / count, decode_s / count


def clip_seconds(cfg: ClipRun) -> float:
    """CPU seconds of one pair in a training step."""
    import torch

    from models.clip import Clip, contrastive_loss
    from models.flops import counted_flops

    network = Clip.from_config(cfg.model)
    side, tokens = network.config.image_size, network.tokenize([""])
    count = timed(counted_flops(network, torch.empty(1, 3, side, side, device="meta"), tokens.to("meta")), cfg)
    images, tokens = torch.rand(count, 3, side, side), tokens.expand(count, -1)
    return seconds_of(lambda: contrastive_loss(*network(images, tokens)).backward()) / count


def unet_seconds(cfg: UNetRun, tokens: int) -> tuple[float, float]:
    """CPU seconds of one latent in a training step, and in a forward pass."""
    import torch

    from models.flops import unet_flops
    from models.unet import UNet

    side, width = cfg.model.sample_size, cfg.model.cross_attention_dim
    count = timed(unet_flops(cfg.model, side, side, tokens), cfg)
    network, latents, times = UNet(cfg.model), torch.randn(count, cfg.model.in_channels, side, side), torch.rand(count)
    context = None if width is None else torch.randn(count, tokens, width)
    step_s = seconds_of(lambda: network(latents, times, context).square().mean().backward())
    with torch.no_grad():
        forward_s = seconds_of(lambda: network(latents, times, context))
    return step_s / count, forward_s / count


def tokens_of(configs: Mapping[str, Any]) -> int:
    """Length of what the U-Net's cross-attention sees, about."""
    if configs["unet"].conditions.caption is None:
        return 1
    return configs["clip"].model.context_length if "clip" in configs else CONTEXT_LENGTH


def passes(cfg: SamplingConfig) -> int:
    """Forward passes of the U-Net that an image takes."""
    return cfg.steps * (2 if cfg.sampler in TWICE else 1) * (1 if cfg.guidance_scale == 1 else 2)


def timed(flops: float, cfg: AutoencoderRun | ClipRun | UNetRun) -> int:
    """Samples of a step that is timed; raises UserError for a network of which one alone takes too long."""
    if flops > MOST_FLOPS:
        raise UserError("networks of this size are not tried")
    return min(MOST_SAMPLES, cfg.batch.global_batch_size, int(MOST_FLOPS // flops))


def seconds_of(action: Callable[[], object]) -> float:
    """CPU seconds of an action that has been done once before; the least of some, since others disturb the caches."""
    taken = []
    for _ in range(1 + TRIES):
        began = time.process_time()
        action()
        taken.append(time.process_time() - began)
    return min(taken[1:])


def main() -> None:
    """The process: times what is asked for, and leaves it in the file."""
    path, key, given = sys.argv[1:]
    lines: dict[str, list[str]] = loads(given)
    stages = [stage for stage in STAGES if stage.name in lines]
    configs: dict[str, Any] = {s.name: compose(s.script.stem, s.schema, lines[s.name]) for s in stages}
    try:
        costs = {name: asdict(cost) for name, cost in calibrate(configs).items()}
    except UserError:  # nothing is known then: the stage itself says what is wrong, if anything is
        costs = {}
    atomic_write(Path(path), dumps({"key": key, "costs": costs}).encode())


if __name__ == "__main__":
    main()
