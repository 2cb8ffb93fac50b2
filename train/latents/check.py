"""The check of a latent cache: decoded back, its records must show the originals that they were made of."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conf.files import atomic_path
from conf.schema import PrecomputeRun
from data.buckets import bucket_shapes
from data.image_dataset import ImageDataset
from data.images import in_range
from data.latent_record import as_float32, read_latent
from data.shards.manifest import ShardInfo
from data.shards.shard import ShardReader
from models.autoencoder import split_moments
from models.losses import psnr
from models.tiles import decode_in_tiles
from train.engine.image_grid import grid, on_squares, to_uint8
from train.latents.encoder import LatentEncoder

SHARDS = 8  # that the sample is spread over, at most
COLUMNS = 8  # of the image


@torch.no_grad()
def decode_back(
    cfg: PrecomputeRun, images: ImageDataset, folder: Path, shards: list[ShardInfo], encoder: LatentEncoder
) -> float:
    """Mean PSNR in dB of cached latents against their images; draws some of both as `decoded.png`."""
    chosen = [shards[i * len(shards) // SHARDS] for i in range(SHARDS)] if len(shards) > SHARDS else shards
    wanted = -(-cfg.check_samples // len(chosen))
    pairs = [originals_and_decoded(cfg, images, folder / shard.name, wanted, encoder) for shard in chosen]
    quality = torch.cat([psnr(decoded, originals) for originals, decoded in pairs])
    each = -(-COLUMNS // len(pairs))  # of every shard, and so of many shapes
    rows = [[image for pair in pairs for image in pair[row][:each]][:COLUMNS] for row in (0, 1)]
    with atomic_path(folder / "decoded.png") as path:
        grid(to_uint8(on_squares(rows[0] + rows[1])), columns=len(rows[0])).save(path, "PNG")
    return float(quality.mean())


def originals_and_decoded(
    cfg: PrecomputeRun, images: ImageDataset, path: Path, count: int, encoder: LatentEncoder
) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] of at most `count` samples of a latent shard, and what their latents decode to."""
    reader, shapes = ShardReader(path), bucket_shapes(cfg.images.resolution, cfg.buckets.max_aspect, cfg.buckets.step)
    count = min(count, len(reader))
    rows = [len(reader) * i // count for i in range(count)]
    stored = np.stack([as_float32(read_latent(reader[row]).moments[0]) for row in rows])
    mean, _ = split_moments(torch.from_numpy(stored).to(encoder.device))
    sources = [images.records.find(int(path.stem.partition("-")[0]), reader.key(row)) for row in rows]
    originals = in_range(torch.stack([images.variants(source, 1, shapes)["pixels"][0] for source in sources]))
    network = encoder.autoencoder
    decoded = [
        decode_in_tiles(network.decode, z, cfg.tile, network.cfg.downscale).clamp(-1, 1).cpu()
        for z in mean.split(cfg.batch_size)
    ]
    return originals, torch.cat(decoded)
