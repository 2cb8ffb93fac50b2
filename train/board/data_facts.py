"""The data set of a run on its page: sizes, distributions, a few images, and what was left out."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from conf.errors import UserError
from conf.schema import ImageConfig, ReportRun
from data.image_dataset import ImageDataset
from data.shards.manifest import MANIFEST, Manifest, folder_of
from train.board.facts import flat
from train.board.markup import data_uri
from train.board.preview import SIDE, readable_images, reason_of, rejects_of, spread_indices, survey_images
from train.board.run_folder import RunFolder

SHOWN = 12  # images with their captions
BINS = 40


@dataclass(frozen=True, slots=True)
class Distribution:
    """One measurement over the samples."""

    name: str
    quantiles: list[str]  # least, 5 %, median, 95 %, most
    bars: list[float]  # height of each bin, the highest is 1


@dataclass(slots=True)
class DataFacts:
    """What the page says of the data."""

    sets: list[tuple[str, Manifest]]  # train, heldout, and likewise of the latents
    distributions: list[Distribution]
    measured: int  # samples behind them
    images: list[tuple[str, str]]  # (data URI, caption)
    left_out: list[tuple[str, str]]  # (reason, samples)
    provenance: list[tuple[str, str]]
    problem: str = ""  # why there are no images although there are shards


def look(cfg: ReportRun, run: RunFolder) -> DataFacts | None:
    """Nothing where the shards are not here."""
    shards, latents = Path(cfg.shards), run.path / "latents"
    folders = {"train": shards / "train", "held out": shards / "heldout"}
    folders |= {"latents, train": latents / "train", "latents, held out": latents / "heldout"}
    sets = [(name, Manifest.load(folder)) for name, folder in folders.items() if (folder / MANIFEST).is_file()]
    try:
        dataset = ImageDataset(shards / "train", ImageConfig(resolution=SIDE), cfg.seed, labels=True)
        pixels, captions = readable_images(dataset, SHOWN)
    except UserError as error:
        problem = str(error) if Path(folder_of(shards / "train")).is_dir() else ""
        return DataFacts(sets, [], 0, [], [], [], problem) if sets or problem else None
    survey = survey_images(dataset, spread_indices(dataset.samples, cfg.samples))
    left_out = Counter(reason_of(reject) for reject in rejects_of(shards / "train")) + survey.broken
    return DataFacts(
        sets=sets,
        distributions=[distribution(name, values) for name, values in survey.numbers.items()],
        measured=min(cfg.samples, dataset.samples),
        images=[(data_uri(Image.fromarray(one), "WEBP"), text) for one, text in zip(pixels, captions, strict=True)],
        left_out=[(reason, f"{samples:,}") for reason, samples in left_out.most_common()],
        provenance=flat(dataset.manifest.provenance),
    )


def distribution(name: str, values: list[float]) -> Distribution:
    """Quantiles and histogram."""
    counts, _ = np.histogram(values, bins=BINS)
    quantiles = [f"{quantile:.4g}" for quantile in np.quantile(values, [0, 0.05, 0.5, 0.95, 1])]
    return Distribution(name, quantiles, [round(float(count / counts.max()), 3) for count in counts])
