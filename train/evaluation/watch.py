"""Evaluation beside a training: each checkpoint as it appears, the newest first, and at last the export."""

import time
from dataclasses import fields
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file

from conf.entry import to_object
from conf.errors import UserError, first_line
from conf.files import sha256
from conf.schema import EvaluateRun, UNetRun
from data.shards.manifest import find_shards
from models.autoencoder import Autoencoder
from models.denoiser import Denoiser
from models.unet import UNet
from train.engine.ema import MAIN
from train.engine.marker import MARKER
from train.engine.metric_log import CONFIG, METRICS, X_AXIS, read_config, read_metrics, say
from train.engine.runtime import Runtime
from train.engine.state import DONE
from train.engine.trainable import WEIGHTS
from train.evaluation.run import evaluate, evaluate_run, samples_seen
from train.evaluation.targets import GeneratedImages
from train.latents.provenance import check_latents
from train.sampling.load import put_together


def watch(cfg: EvaluateRun, runtime: Runtime) -> dict[str, float]:
    """Evaluate what appears until the training is finished; returns the metrics of its end.

    What was evaluated by an earlier start is left out. A checkpoint that the training deletes meanwhile is passed over.

    Raises:
        UserError: there is no training, or a reason to stop of `evaluate`.
    """
    trained = Path(cfg.unet).parent
    if not (trained / CONFIG).is_file():
        raise UserError(f"watch=true: no training in '{trained}'; start train/train_unet.py with that output_dir first")
    if runtime.is_main:
        say("evaluation", f"watches {trained / 'checkpoints'}")
    passed: set[int] = set()
    metrics: dict[int, dict[str, float]] = {}  # by samples seen
    while not finished(trained, runtime):
        seen = runtime.gather_objects(newest(trained, Path(cfg.output_dir), passed) if runtime.is_main else None)[0]
        if seen is None:
            time.sleep(cfg.watch_s)
            continue
        passed.add(seen)
        target = of_checkpoint(cfg, runtime, trained, seen)
        if target is not None:
            metrics[seen] = evaluate(cfg, target, runtime, trained, seen)
    last = samples_seen(cfg.unet, "unet")  # the last checkpoint is what was exported
    return metrics[last] if last in metrics else evaluate_run(cfg, runtime)


def finished(trained: Path, runtime: Runtime) -> bool:
    """Whether the training is, for all processes alike."""
    return runtime.any((trained / DONE).is_file())


def newest(trained: Path, output_dir: Path, passed: set[int]) -> int | None:
    """Samples seen of the newest complete checkpoint that was not evaluated yet, None if there is none."""
    evaluated = passed | {row[X_AXIS] for row in read_metrics(output_dir / METRICS)}
    found = {int(path.parent.name) for path in (trained / "checkpoints").glob(f"[0-9]*/{MARKER}")}
    return max(found - evaluated, default=None)


def of_checkpoint(cfg: EvaluateRun, runtime: Runtime, trained: Path, seen: int) -> GeneratedImages | None:
    """The U-Net as the checkpoint has it, by its average where it keeps one; None if it is gone."""
    recorded = read_config(trained)
    if "teacher" in recorded:
        raise UserError(f"watch=true: '{trained}' is a distillation, whose own evaluations draw; wait for its export")
    options = OmegaConf.masked_copy(recorded, [option.name for option in fields(UNetRun)])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(UNetRun), options)
    except OmegaConfBaseException as error:
        raise UserError(f"{trained / CONFIG} is not of this version: {first_line(error)}") from None
    assert isinstance(merged, DictConfig)
    training = to_object(merged)
    if training.lora.rank > 0:
        raise UserError(f"watch=true: checkpoints in '{trained}' hold adapters only (lora.rank); wait for its export")
    info = check_latents(training, find_shards(f"{training.latents}/train", "latents"))
    name = f"unet/{WEIGHTS if info.weights == 'last' else f'{MAIN}.safetensors'}"
    folder = trained / "checkpoints" / f"{seen:012d}"
    autoencoder = Autoencoder.from_pretrained(cfg.autoencoder)
    conditions = info.build_conditions(training.model, autoencoder.cfg.downscale)
    with torch.device("meta"):
        unet = UNet(training.model)
    network = Denoiser(unet, conditions)
    gone = False
    try:
        digest = sha256(folder / name)  # no matter by how many processes it was written
        network.load_state_dict(load_file(folder / name), assign=True)
    except (OSError, SafetensorError):  # its retention has deleted it
        gone = True
    if runtime.any(gone):
        return None
    model = put_together(network, autoencoder, info, cfg, runtime.device)
    return GeneratedImages(cfg, runtime, model, {"weights": info.weights, "weights_sha256": digest})
