"""The check of a latent cache: decoded back, its records must show the pictures that they were made of."""

from pathlib import Path

import numpy as np
import torch

from conf.schema import PrecomputeRun
from data.datasets import ImageDataset
from data.latents import as_float32, read_latent
from data.manifest import ShardInfo
from data.shards import ShardReader, atomic_path
from models.autoencoder import split_moments
from models.losses import psnr
from train.engine.pictures import grid, to_uint8
from train.stages.encoding import Encoder

SHARDS = 8  # that the sample is spread over, at most
COLUMNS = 8  # of the picture


@torch.no_grad()
def decode_back(
    cfg: PrecomputeRun, images: ImageDataset, folder: Path, shards: list[ShardInfo], encoder: Encoder
) -> float:
    """Mean PSNR in dB of cached latents against their images; draws the first ones as `decoded.png`."""
    chosen = [shards[i * len(shards) // SHARDS] for i in range(SHARDS)] if len(shards) > SHARDS else shards
    readers = [ShardReader(folder / shard.name) for shard in chosen]
    wanted = -(-cfg.check_samples // len(readers))
    picked = [
        (reader, len(reader) * i // count)
        for reader in readers
        for count in [min(wanted, len(reader))]
        for i in range(count)
    ]
    stored = np.stack([as_float32(read_latent(reader[row]).moments[0]) for reader, row in picked])
    mean, _ = split_moments(torch.from_numpy(stored).to(encoder.device))
    sources = [images.records.find(int(reader.path.stem), reader.key(row)) for reader, row in picked]
    pictures = images.batch_at(sources)["image"]  # [N, 3, H, W]
    decoded = torch.cat([encoder.autoencoder.decode(z).clamp(-1, 1).cpu() for z in mean.split(cfg.batch_size)])
    pair = torch.cat([pictures[:COLUMNS], decoded[:COLUMNS]])
    with atomic_path(folder / "decoded.png") as path:
        grid(to_uint8(pair), columns=len(pair) // 2).save(path, "PNG")
    return float(psnr(decoded, pictures).mean())
