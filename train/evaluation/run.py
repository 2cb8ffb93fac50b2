"""The evaluation command: measure images chunk by chunk, make metrics of it, and write them with their protocol."""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from conf.entry import to_plain
from conf.errors import UserError
from conf.files import atomic_path, atomic_write
from conf.plain_json import dumps
from conf.process import tell
from conf.schema import EvaluateRun, EvaluationSubject, WandbConfig, WandbMode
from train.engine.image_grid import captioned
from train.engine.inbox import Message, put
from train.engine.metric_log import METRICS, X_AXIS, MetricLog, finite_metrics, read_config, read_metrics, say
from train.engine.runtime import Runtime
from train.engine.state import DONE, read_done
from train.evaluation.feature_cache import FeatureCache
from train.evaluation.metrics import KERNEL_FEATURES, MANIFOLD_FEATURES, NEIGHBOURS, distances
from train.evaluation.paired_metrics import baseline_distances
from train.evaluation.reference import FILES, Reference, reference_of
from train.evaluation.targets import SHOWN, GeneratedImages, Reconstructions, Target
from train.latents.provenance import UNetInfo, weights_digest
from train.sampling.load import load_model, lora_facts

PROBE_FLOOR = 0.97  # a probe that reads real images worse than this proves nothing


def evaluate_run(cfg: EvaluateRun, runtime: Runtime) -> dict[str, float]:
    """Evaluate a finished training; metrics, protocol and grid go to `output_dir` and to the training's W&B run.

    Raises:
        UserError: networks that do not belong together, too few images, broken ones, or missing weights.

    """
    if cfg.subject is EvaluationSubject.autoencoder:
        seen = samples_seen(cfg.autoencoder, "autoencoder")
        return evaluate(cfg, Reconstructions(cfg, runtime), runtime, Path(cfg.autoencoder).parent, seen)
    seen = samples_seen(cfg.unet, "unet")
    facts = {"weights": UNetInfo.load(cfg.unet).weights, "weights_sha256": weights_digest(cfg.unet)}
    target = GeneratedImages(cfg, runtime, load_model(cfg, runtime.device), facts | lora_facts(cfg))
    if runtime.is_main:
        target.say_cut()
    return evaluate(cfg, target, runtime, Path(cfg.unet).parent, seen)


def evaluate(cfg: EvaluateRun, target: Target, runtime: Runtime, trained: Path, seen: int) -> dict[str, float]:
    """Metrics of a target whose training had seen so many samples, written to files and to the W&B run of `trained`."""
    started = time.monotonic()
    references = references_of(cfg, target, runtime)
    cache = feature_cache_of(cfg, target)
    began = time.monotonic()
    measured = cache.fill(target.measure, runtime, "evaluation")
    measured_s, hardware = time.monotonic() - began, runtime.hardware()
    metrics: dict[str, float] = {}
    if runtime.is_main:
        tell("computing metrics")
        metrics = metrics_of(target, cache, references, cfg.bootstrap)
        metrics |= {"perf/evaluation_s": time.monotonic() - started}
        if measured:  # else an earlier start has measured all of them
            metrics["perf/pictures_per_s"] = measured / measured_s
        record = {"protocol": protocol(cfg, target, references), "hardware": hardware}
        write_evaluation(cfg, trained, seen, metrics, grid_of(target, cache), record)
        cache.remove()  # last: a kill before this line costs no measurement
    return runtime.gather_objects(metrics)[0]  # to all: each process of a sweep's member has the same objective


def references_of(cfg: EvaluateRun, target: Target, runtime: Runtime) -> dict[str, Reference]:
    """What each extractor compares with, of a file only the first one; collective."""
    compared = target.extractors[:1] if cfg.reference.endswith(FILES) else target.extractors
    measured = partial(reference_of, images=cfg.images, statistics_dir=Path(cfg.statistics_dir), runtime=runtime)
    others = {e.name: measured(cfg.others, e) for e in compared if cfg.others is not None}
    return {e.name: replace(measured(cfg.reference, e), others=others.get(e.name)) for e in compared}


def feature_cache_of(cfg: EvaluateRun, target: Target) -> FeatureCache:
    """Where the measurements are kept; those of other extractors have other columns."""
    looked_for = {e.name: e.facts() for e in target.extractors}
    judged = {"prompt_following": cfg.prompt_following, "judges": [name.value for name in cfg.judges]}
    facts = target.facts | {"tile": cfg.tile, "columns": looked_for | judged}
    return FeatureCache(Path(cfg.output_dir) / "measured", facts, target.total, cfg.batch_size)


def metrics_of(
    target: Target, cache: FeatureCache, references: dict[str, Reference], replicates: int
) -> dict[str, float]:
    """All that the measurements say, by full names."""
    found = target.metrics(cache)
    for extractor in target.extractors:
        if extractor.name in references:
            values = distances(extractor, cache, references[extractor.name], replicates)
            found |= {f"eval/{target.prefix}{name}": value for name, value in values.items()}
            found |= baseline_distances(target.baselines, extractor, cache, references[extractor.name])
    return found


def grid_of(target: Target, cache: FeatureCache) -> Image.Image:
    """The first images with their captions."""
    images = np.concatenate([column.numpy() for (column,) in cache.columns("image")])[:SHOWN]
    return captioned(images, target.captions(range(len(images))))


def protocol(cfg: EvaluateRun, target: Target, references: dict[str, Reference]) -> dict[str, Any]:
    """Everything that two labs must share to get the same numbers."""
    any_reference = next(iter(references.values()))
    return {
        "samples": target.total,
        "reference": any_reference.digest,
        "reference_samples": any_reference.count,
        **({"others": any_reference.others.digest} if any_reference.others else {}),
        "extractors": {e.metric: e.facts() for e in target.extractors},
        **target.facts,
        "bootstrap_replicates": cfg.bootstrap,
        "kernel_features": KERNEL_FEATURES,
        "manifold_features": MANIFOLD_FEATURES,
        "manifold_neighbours": NEIGHBOURS,
    }


def write_files(folder: Path, metrics: dict[str, float], grid: Image.Image, facts: dict[str, Any]) -> None:
    """Metrics, grid and protocol of one evaluation, in the place of those of an earlier one."""
    with atomic_path(folder / "grid.png") as path:
        grid.save(path, "PNG")
    atomic_write(folder / "protocol.json", dumps(facts, indent=1).encode())
    atomic_write(folder / "metrics.json", dumps(metrics, indent=1).encode())


def write_evaluation(
    cfg: EvaluateRun, trained: Path, seen: int, metrics: dict[str, float], grid: Image.Image, record: dict[str, Any]
) -> None:
    """Files, console and W&B: the run of the training, at the samples that it had seen."""
    folder, joins = Path(cfg.output_dir), cfg.wandb.name is None
    if not (cfg.watch and any(row[X_AXIS] > seen for row in read_metrics(folder / METRICS))):
        write_files(folder, metrics, grid, record["protocol"])  # of the newest checkpoint, which watching takes first
    run_id = trained / "wandb_run_id"
    if joins and run_id.is_file():
        atomic_write(folder / "wandb_run_id", run_id.read_bytes())
    live = joins and not (trained / DONE).is_file()
    wandb = run_of(trained, cfg.wandb) if joins else cfg.wandb
    if live:  # two processes that write to one W&B run overwrite each other
        wandb = replace(wandb, mode=WandbMode.disabled)
    record = {"run_dir": cfg.run_dir, "evaluation": to_plain(cfg), **record}
    job_type = trained.name if joins else "evaluation"
    log = MetricLog(folder, wandb, job_type, record, is_main=True, samples_seen=sys.maxsize, prefix="evaluation")
    exit_code = 1
    try:
        log.log(seen, metrics)
        image = log.image("evaluation", grid, seen, "held-out captions")
        if live:  # it passes them on
            put(trained, Message(seen, finite_metrics(metrics), "evaluation", str(image.absolute())))
        exit_code = 0
    finally:
        log.finish(exit_code)
    for name, value in metrics.items():
        if name.startswith("probe/") and not value >= PROBE_FLOOR:
            say("evaluation", f"{name}={value:.3f}: below {PROBE_FLOOR}, so what it finds in drawn ones proves nothing")
    say("evaluation", f"{folder / 'metrics.json'} and {folder / 'grid.png'}")


def run_of(trained: Path, wandb: WandbConfig) -> WandbConfig:
    """Where W&B has the run of a training, under the names that it has there."""
    path = trained / "config.yaml"
    if not path.is_file():
        return wandb
    recorded = read_config(trained)
    place = {option: OmegaConf.select(recorded, f"wandb.{option}") for option in ("project", "entity", "group", "name")}
    run_dir = Path(OmegaConf.select(recorded, "run_dir") or trained.parent).name
    place |= {"project": place["project"] or wandb.project, "group": place["group"] or run_dir}
    place["name"] = place["name"] or f"{run_dir}/{trained.name}"
    return replace(wandb, **place)


def samples_seen(folder: str, option: str) -> int:
    """Samples seen by the training that exported a network; the x axis of its metrics."""
    done = read_done(Path(folder).parent, 0)
    if done is None:
        raise UserError(
            f"{option}={folder}: no DONE beside it; point it at the export folder of a finished training, or set "
            "watch=true for one that goes on"
        )
    return int(done["samples_seen"])
