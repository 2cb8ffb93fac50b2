"""Encode every image and caption once: image shards to latent shards (moments, tokens, text states).

Each image shard becomes one latent shard of the same number, or one for each shape that its images have. Any number
of processes take part, started together or not, on one machine or many: each claims a shard, writes it whole, and puts
its statistics beside it in `.parts/`. What a killed process had claimed is encoded by another one, or by the next
start. The manifest comes last.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from conf.errors import UserError
from conf.files import atomic_path, atomic_write
from conf.plain_json import dumps
from conf.schema import PrecomputeRun, StreamConfig
from data.buckets import bucket_shapes
from data.claims import Claims
from data.image_dataset import ImageDataset
from data.latent_record import ChannelStats
from data.shards.manifest import MANIFEST, Manifest, ShardInfo, find_shards
from data.shards.remote import joined
from models.autoencoder import Autoencoder
from models.conditions import Conditions
from models.text import Cuts, load_text_tower
from models.tiles import check_tile
from train.engine.metric_log import MetricLog, say
from train.engine.runtime import Runtime
from train.latents.check import decode_back
from train.latents.cost import print_plan
from train.latents.encoder import LatentEncoder
from train.latents.provenance import NULL_TEXT, OLDER, asks_clip, image_facts, weights_digest
from train.latents.shard import PARTS, KnownMoments, LatentSplit, broken_moments, encode_shard, part_of

SPLITS = ("train", "heldout")
# Fields that neither moments nor the arrays of other conditions depend on; of these image_embedding does on clip.
OF_TEXTS = {"clip", "captions", "text_states", "text_dim", "context_length"}
REJECTS = "rejects.jsonl"


def open_splits(cfg: PrecomputeRun, encoder: LatentEncoder) -> list[LatentSplit]:
    """Open the images of both sides and what was made of them before; nothing is written yet.

    Raises:
        UserError: no images, or the folder holds latents of another provenance.

    """
    facts, splits = latents_provenance(cfg, encoder), []
    stream = StreamConfig(window=1, captions=dict.fromkeys(cfg.captions, 1.0))  # shard by shard
    for name in SPLITS:
        images = ImageDataset(f"{cfg.shards}/{name}", cfg.images, cfg.seed, stream, encoder.conditions.need_labels)
        labels = images.manifest.provenance.get("labels", {})
        encoder.conditions.check_names(labels)
        folder = Path(cfg.output_dir) / name
        wanted = facts | {"source": images.manifest.digest(), "labels": labels}
        part = name == "train" and 0 < cfg.train_shards < len(images.manifest.shards)
        wanted["train_shards"] = cfg.train_shards if part else None
        known = None if cfg.moments is None else known_moments(cfg.moments, name, wanted)
        splits.append(LatentSplit(name, images, folder, wanted, existing_manifest(folder, wanted), known))
    return splits


def known_moments(cache: str, side: str, wanted: dict[str, Any]) -> KnownMoments:
    """One side of a cache whose moments are those that are wanted; refuses another, naming the field."""
    try:
        manifest = find_shards(joined(cache, side), "latents")
    except UserError as error:
        raise broken_moments(cache, error) from None
    found = {**OLDER, **manifest.provenance}
    seen_by_clip = {"clip"} if "image_embedding" in wanted["conditions"] else set()
    for field in sorted(wanted.keys() - OF_TEXTS | seen_by_clip):
        before, now = found.get(field), wanted[field]
        if field == "conditions":  # but for the caption
            before, now = ({k: v for k, v in dict(facts or {}).items() if k != "caption"} for facts in (before, now))
        if before != now:
            raise UserError(f"moments={cache}: its {field} is {before}, not {now}: leave it out to encode all anew")
    return KnownMoments(cache, side, manifest)


def latents_provenance(cfg: PrecomputeRun, encoder: LatentEncoder) -> dict[str, Any]:
    """Provenance of a cache: all that decides what a latent record holds."""
    downscale = encoder.autoencoder.cfg.downscale
    shapes = bucket_shapes(cfg.images.resolution, cfg.buckets.max_aspect, cfg.buckets.step)
    for option, pixels in (("images.resolution", cfg.images.resolution), ("buckets.step", cfg.buckets.step)):
        if pixels % downscale and (option == "images.resolution" or len(shapes) > 1):
            raise UserError(f"{option}={pixels}: must be a multiple of {downscale}, the autoencoder's downscale factor")
    check_tile(cfg.tile, downscale)
    return {
        "autoencoder": weights_digest(cfg.autoencoder),
        "clip": None if encoder.clip is None else weights_digest(cfg.clip),
        "images": image_facts(cfg.images),
        "variants": cfg.variants,
        "captions": cfg.captions,
        "shapes": [list(shape) for shape in shapes],
        "tile": cfg.tile or None,
        "dtype": cfg.dtype.value,
        "text_states": cfg.text_states,
        "latent_channels": encoder.autoencoder.cfg.cached_channels,
        "latent_size": cfg.images.resolution // downscale,
        "conditions": encoder.conditions.facts(),
        "text_dim": None if encoder.clip is None else encoder.clip.text_width,
        "context_length": None if encoder.clip is None else encoder.clip.context_length,
    }


def existing_manifest(folder: Path, wanted: dict[str, Any]) -> Manifest | None:
    """The manifest of a finished cache with this provenance; refuses one of another, naming the field."""
    if not (folder / MANIFEST).is_file():
        return None
    found = Manifest.load(folder)
    for field, value in wanted.items():
        before = found.provenance.get(field, OLDER.get(field))
        if before != value:
            raise UserError(
                f"output_dir: '{folder}' holds latents with another {field} ({before}, now "
                f"{value}); set another output_dir (or run_dir), or delete that folder"
            )
    return found


def precompute(
    cfg: PrecomputeRun, encoder: LatentEncoder, splits: list[LatentSplit], runtime: Runtime, metric_log: MetricLog
) -> dict[str, float]:
    """Encode all splits together with whoever else does; returns the metrics of the cache.

    Raises:
        UserError: the latents decode badly, or no sample of a split could be encoded.

    """
    metrics: dict[str, float] = {}
    samples = 0
    for split in splits:
        if split.finished is None:
            for encoded in encode_split(cfg, encoder, split, runtime):
                samples += encoded
                done = len(list((split.folder / PARTS).glob("*.json")))
                metric_log.log(samples, {"latents/shards_done": float(done), "latents/shards": float(split.shards)})
            split.finished = finish_manifest(cfg, encoder, split)
        metrics[f"latents/{split.name}_samples"] = float(split.finished.samples)
        metrics[f"latents/{split.name}_rejected"] = float(split.finished.stats["rejected"])
        metrics[f"latents/{split.name}_psnr"] = split.finished.stats["psnr"]
    if encoder.conditions.takes_text:
        write_null_text(Path(cfg.output_dir), encoder)
    metric_log.log(max(samples, 1), metrics)
    return metrics


def encode_split(cfg: PrecomputeRun, encoder: LatentEncoder, split: LatentSplit, runtime: Runtime) -> Iterator[int]:
    """Encode shards until none is missing; yields the samples of each that this process encoded."""
    worker, workers = place(runtime)
    claims = Claims(split.folder / PARTS / "claims", cfg.lease_s)
    start = split.shards * worker // workers  # apart, so that processes meet only when little is left
    for index in claims.work(split.shards, lambda item: part_of(split, item) is not None or is_finished(split), start):
        part = encode_shard(cfg, encoder, split, index, runtime.threads)
        atomic_write(split.folder / PARTS / f"{index:05d}.json", dumps(part).encode())
        yield len(split.samples_of(index))


def place(runtime: Runtime) -> tuple[int, int]:
    """Number of this process and of all, over the tasks of a SLURM array and the processes of each."""
    tasks = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    return min(task, tasks - 1) * runtime.world + runtime.rank, tasks * runtime.world


def is_finished(split: LatentSplit) -> bool:
    """Whether the manifest is there: the parts are removed after it was written."""
    return (split.folder / MANIFEST).is_file()


def finish_manifest(cfg: PrecomputeRun, encoder: LatentEncoder, split: LatentSplit) -> Manifest:
    """The manifest, made by the one of the processes that comes first."""
    for _ in Claims(split.folder / PARTS / "merge", cfg.lease_s).work(1, lambda _: is_finished(split)):
        merge(cfg, encoder, split)
    for name in ("merge", "claims", "."):  # what a process that came late has made again
        with suppress(OSError):
            (split.folder / PARTS / name).rmdir()
    return Manifest.load(split.folder)


def merge(cfg: PrecomputeRun, encoder: LatentEncoder, split: LatentSplit) -> None:
    """Join the shards' records into the manifest, after a sample of them was decoded back."""
    folder = split.folder
    parts = [part for index in range(split.shards) if (part := part_of(split, index)) is not None]
    stats = ChannelStats(split.provenance["latent_channels"])
    for part in parts:
        stats.merge(ChannelStats.from_state(part["stats"]))
    shards = [ShardInfo(**info) for part in parts for info in part["shards"]]
    rejects = [reject for part in parts for reject in part["rejects"]]
    if rejects:
        atomic_write(folder / REJECTS, "".join(dumps(reject) + "\n" for reject in rejects).encode())
    if not shards:
        raise UserError(f"none of {len(rejects)} samples could be encoded; the reasons are in {folder / REJECTS}")
    quality = decode_back(cfg, split.images, folder, shards, encoder)
    if not quality >= cfg.min_psnr:  # NaN is no quality
        raise UserError(
            f"latents in '{folder}' decode back at {quality:.1f} dB, less than min_psnr={cfg.min_psnr}: train the "
            f"autoencoder longer, check images.*, or lower min_psnr; see {folder / 'decoded.png'}"
        )
    measured = stats.result() | {"psnr": quality, "rejected": len(rejects)} | cuts_of(parts)
    Manifest(kind="latents", shards=shards, provenance=split.provenance, stats=measured).save(folder)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def cuts_of(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of captions that are longer than the context, with what falls off one; nothing where all fit."""
    counts, lost = zip(*(part.get("captions_cut", (0, "")) for part in parts), strict=True)
    return {"captions_cut": sum(counts), "captions_cut_example": next(filter(None, lost))} if any(counts) else {}


def say_cut(split: LatentSplit) -> None:
    """Say what of the captions no latent record holds."""
    assert split.finished is not None
    stats, length = split.finished.stats, split.provenance["context_length"]
    if stats.get("captions_cut"):
        cuts = Cuts(length, split.finished.samples, stats["captions_cut"], stats["captions_cut_example"])
        say("latents", f"{split.name}: {cuts.line('captions')}")


def write_null_text(folder: Path, encoder: LatentEncoder) -> None:
    """Text states of the empty caption, which training puts in place of dropped ones."""
    text = encoder.states(encoder.text_tower.tokenize([""]))[0].contiguous()  # [L, D]
    if not text.isfinite().all():
        raise UserError("clip: the text states of an empty caption are NaN or infinite: set runtime.precision=fp32")
    with atomic_path(folder / NULL_TEXT) as path:
        save_file({"text": text}, path)


def run_precompute(cfg: PrecomputeRun, runtime: Runtime, config: dict[str, Any]) -> None:
    """The command: encode, and say where the cache is and how well it decodes."""
    encoder = LatentEncoder(
        Autoencoder.from_pretrained(cfg.autoencoder).eval().to(runtime.device),
        load_text_tower(cfg.clip).eval().to(runtime.device) if asks_clip(cfg.conditions) else None,
        Conditions(cfg.conditions),
        runtime.device,
        runtime.precision,
        cfg.text_states,
        cfg.seed,
        limit=cfg.batch_size,
        tile=cfg.tile,
    )
    splits = open_splits(cfg, encoder)
    if cfg.plan:
        print_plan(cfg, encoder, splits)
        return
    metric_log = MetricLog(cfg.output_dir, cfg.wandb, "latents", config, place(runtime)[0] == 0)
    exit_code = 1
    try:
        metrics = precompute(cfg, encoder, splits, runtime, metric_log)
        exit_code = 0
    finally:
        metric_log.finish(exit_code)
    if runtime.is_main:
        for split in splits:
            say_cut(split)
        say("latents", f"{cfg.output_dir}: decodes at {metrics['latents/train_psnr']:.1f} dB")
