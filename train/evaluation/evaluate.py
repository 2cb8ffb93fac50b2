"""Metrics of a trained U-Net: pictures of held-out captions against the held-out images, each with its protocol."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.entry import to_plain
from conf.errors import UserError
from conf.schema import EvaluateRun
from data.datasets import ImageDataset
from data.loader import sequential
from data.shards import atomic_path, atomic_write
from train.engine.journal import Journal, say
from train.engine.pictures import captioned, to_uint8
from train.engine.provenance import UNetInfo
from train.engine.runtime import Runtime
from train.evaluation.frechet import Extractor, collect, compare, efficientnet, inception, merged
from train.evaluation.probe import Probe, accuracy, train_probe
from train.evaluation.sampling import load_model, pictures, sampling_facts

GRID_PICTURES = 64
PROBE_FLOOR = 0.97  # a probe that reads real images worse than this proves nothing


def run(cfg: EvaluateRun, runtime: Runtime) -> dict[str, float]:
    """Draw, measure, and log to the U-Net's own W&B run; writes `metrics.json` and `grid.png`, returns the metrics.

    Raises:
        UserError: networks that do not belong together, too few pictures, or a probe on images without attributes.

    """
    folder, seen = Path(cfg.output_dir), samples_seen(cfg)
    heldout = ImageDataset(f"{cfg.shards}/heldout", cfg.images, cfg.seed)
    extractors = [efficientnet(runtime.device)]
    if cfg.inception is not None:
        extractors.append(inception(cfg.inception, runtime.device))
    count = min(cfg.samples, heldout.samples)
    mine = list(range(runtime.rank, count, runtime.world))  # of every rank its own: none is counted twice
    items = [heldout.at(index) for index in mine]
    model = load_model(cfg, runtime.device)
    probe = None
    if cfg.prompt_following:
        probe = train_probe(ImageDataset(f"{cfg.shards}/train", cfg.images, cfg.seed), cfg.seed, runtime.device)
    jobs = [(item["caption"], index) for item, index in zip(items, mine, strict=True)]  # captions may repeat
    nothing = torch.empty(0, 3, cfg.images.resolution, cfg.images.resolution)  # of a rank beyond the last prompt
    images = torch.cat([part.cpu() for part in pictures(model, cfg, jobs)]) if jobs else nothing
    metrics = distances(heldout, images, extractors, runtime)
    if probe is not None:
        metrics |= prompt_following(probe, runtime, heldout, images, [item["meta"] for item in items])
    parts = runtime.gather_objects((mine[:GRID_PICTURES], to_uint8(images[:GRID_PICTURES])))
    if runtime.is_main:
        drawn = {index: picture for numbers, shown in parts for index, picture in zip(numbers, shown, strict=True)}
        chosen = sorted(drawn)[:GRID_PICTURES]
        grid = captioned(np.stack([drawn[i] for i in chosen]), [heldout.at(i)["caption"] for i in chosen])
        report(cfg, folder, seen, metrics, grid, protocol(cfg, heldout, extractors, count))
    return metrics


def distances(heldout: ImageDataset, images: Tensor, extractors: list[Extractor], runtime: Runtime) -> dict[str, float]:
    """Fréchet distances of the pictures to all held-out images, and how much of each the sample sizes explain."""
    metrics: dict[str, float] = {}
    real = list(range(runtime.rank, heldout.samples, runtime.world))
    for extractor in extractors:
        reference = collect(extractor, (batch["image"] for batch in sequential(heldout, real, 64)))
        generated = collect(extractor, images.split(64) if len(images) else ())
        whole = [merged(runtime.gather_objects(part)) for part in (generated, reference)]
        with warnings.catch_warnings(record=True) as biased:
            warnings.simplefilter("always")
            metrics |= {f"eval/{name}": value for name, value in compare(extractor, *whole).items()}
        if biased and runtime.is_main:
            say("evaluation", str(biased[0].message))
    return metrics


def prompt_following(
    probe: Probe, runtime: Runtime, heldout: ImageDataset, images: Tensor, metas: list[dict[str, Any]]
) -> dict[str, float]:
    """Shares of pictures that show the kind, background and colour asked for, beside the probe's own accuracy."""
    right = probe.correct(images.to(runtime.device), metas)
    totals = runtime.sum({name: float(hits.sum()) for name, hits in right.items()} | {"count": float(len(images))})
    count = totals.pop("count")
    return {f"eval/prompt_following/{name}": hits / count for name, hits in totals.items()} | accuracy(
        probe, heldout, runtime.device
    )


def protocol(cfg: EvaluateRun, heldout: ImageDataset, extractors: list[Extractor], count: int) -> dict[str, Any]:
    """Everything that two labs must share to get the same numbers."""
    return {
        "samples": count,
        "reference": heldout.manifest.digest(),
        "reference_samples": heldout.samples,
        "extractors": {e.metric: {"sha256": e.weights_sha256, "resize": e.resize} for e in extractors},
        "resolution": cfg.images.resolution,
        **sampling_facts(cfg),
        "weights": UNetInfo.load(cfg.unet).weights,
        "seed": cfg.seed,
    }


def report(
    cfg: EvaluateRun, folder: Path, seen: int, metrics: dict[str, float], grid: Any, facts: dict[str, Any]
) -> None:
    """Files, console, and W&B: the run of the U-Net, at the samples that it had seen."""
    with atomic_path(folder / "grid.png") as path:
        grid.save(path, "PNG")
    atomic_write(folder / "protocol.json", json.dumps(facts, indent=1).encode())
    atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1).encode())
    run_id = Path(cfg.unet).parent / "wandb_run_id"
    if run_id.is_file():  # evaluation is part of that training's W&B run
        atomic_write(folder / "wandb_run_id", run_id.read_bytes())
    plain = {"run_dir": cfg.run_dir, "evaluation": to_plain(cfg), "protocol": facts}
    journal = Journal(folder, cfg.wandb, "evaluation", plain, is_main=True)
    exit_code = 1
    try:
        journal.log(seen, metrics)
        journal.image("evaluation", np.asarray(grid), seen, "held-out captions")
        exit_code = 0
    finally:
        journal.finish(exit_code)
    for name, value in metrics.items():
        if name.startswith("probe/") and value < PROBE_FLOOR:
            say("evaluation", f"{name}={value:.3f}: below {PROBE_FLOOR}, so prompt following proves nothing")
    say("evaluation", f"{folder / 'metrics.json'} and {folder / 'grid.png'}")


def samples_seen(cfg: EvaluateRun) -> int:
    """Of the training that made the U-Net; the x axis of its metrics."""
    done = Path(cfg.unet).parent / "DONE"
    if not done.is_file():
        raise UserError(f"unet={cfg.unet}: no DONE beside it; point it at the export folder of a finished training")
    return int(json.loads(done.read_text())["samples_seen"])
