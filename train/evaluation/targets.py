"""What can be evaluated: a U-Net by the images that it draws, an autoencoder by those that it gives back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import EvaluateRun, Perceptual
from conf.schema.evaluation import require_enough
from data.image_dataset import ImageDataset, captions_of
from models.autoencoder import Autoencoder
from models.clip import DESCRIPTION_NAME, Clip
from models.losses import perceptual_distance, psnr, ssim
from models.pipeline import DiffusionPipeline
from models.text import Cuts
from train.engine.image_grid import side_by_side, to_uint8
from train.engine.metric_log import say
from train.engine.precision import autocast
from train.engine.runtime import Runtime
from train.evaluation.extractors import Extractor, efficientnet, inception
from train.evaluation.feature_cache import FeatureCache
from train.evaluation.judges import wanted_judges
from train.evaluation.judges.judge import Judge, accuracy, cached_judge
from train.evaluation.metrics import clip_score
from train.evaluation.paired_metrics import PairedMetrics
from train.evaluation.reference import FILES
from train.latents.provenance import weights_digest
from train.sampling.requests import samples_of, say_cut
from train.sampling.run import finite_images, generate_images, require_finite, sampling_facts

SHOWN = 64  # images in the grid


class Target(Protocol):
    """Images that can be evaluated: where they come from, and what is measured of them."""

    total: int  # images
    prefix: str  # of its distances' names: "" or "r", of reconstructions
    facts: dict[str, Any]  # what the images depend on, in plain values
    extractors: list[Extractor]
    baselines: tuple[str, ...]  # trivial images that are looked at, too

    def measure(self, numbers: range) -> dict[str, Tensor]:
        """Columns [B, ...] of these images, features and others; `image`, uint8, of the first ones."""

    def metrics(self, measured: FeatureCache) -> dict[str, float]:
        """Made of its other columns, by their full names."""

    def captions(self, numbers: range) -> list[str]:
        """What stands below these images in the grid."""


class GeneratedImages:
    """Images of captions; each has noise of its own, and a caption is used again when all have been.

    Images that are not finite are refused, or, where not, told in the column `sound`.
    """

    prefix = ""

    def __init__(
        self,
        cfg: EvaluateRun,
        runtime: Runtime,
        model: DiffusionPipeline,
        facts: dict[str, Any],
        refuses_broken: bool = True,
    ) -> None:
        self.refuses_broken = refuses_broken
        self.cfg, self.runtime, self.model, self.total = cfg, runtime, model, cfg.samples
        side = model.denoiser.unet.cfg.sample_size * model.autoencoder.cfg.downscale
        if side != cfg.images.resolution:
            raise UserError(
                f"images.resolution={cfg.images.resolution}: this U-Net draws {side} pixels, as the real images must "
                f"have; set images.resolution={side}"
            )
        labelled = model.conditions.need_labels or bool(cfg.judges)
        self.prompts = ImageDataset(cfg.captions, cfg.images, cfg.seed, labels=labelled)
        self.extractors, self.clip = extractors_of(cfg, runtime.device), None
        if cfg.clip_score is not None:
            self.clip = load_clip(cfg.clip_score).to(runtime.device)
            self.extractors.append(clip_extractor(self.clip, cfg.clip_score))
        self.judges: list[Judge] = []
        for kind in wanted_judges(cfg):
            kind.require(self.prompts.at(0))
            cache = Path(cfg.statistics_dir)
            self.judges.append(cached_judge(kind, f"{cfg.shards}/train", cfg.images, cfg.seed, cache, runtime))
        self.comparison = PairedMetrics(model.conditions, cfg.perceptual, runtime.device)
        self.baselines = self.comparison.baselines
        self.facts = {
            "captions": self.prompts.digest,
            "resolution": cfg.images.resolution,
            **cfg.images.other_filter(),
            **sampling_facts(cfg),
            "seed": cfg.seed,
            "precision": cfg.runtime.precision.value,
            **self.comparison.facts(),
            **facts,
        }

    def say_cut(self) -> None:
        """Say which captions are longer than the network, or the CLIP of the score, reads."""
        captions = captions_of(self.cfg.captions, self.cfg.samples)
        say_cut("evaluation", self.model, captions, self.cfg, "captions")
        if self.clip is not None and (cuts := Cuts.of(self.clip, captions)).count:
            say("evaluation", f"{self.extractors[-1].name}: {cuts.line('captions')}")

    def measure(self, numbers: range) -> dict[str, Tensor]:
        """Generate the images and measure them."""
        items = self.items(numbers)
        generated = generate_images(self.model, self.cfg, items, numbers)
        images = generated.images
        if self.refuses_broken:
            broken = [item["caption"] for item, sound in zip(items, finite_images(images), strict=True) if not sound]
            require_finite(self.cfg, broken)
        columns = features_of(images, self.extractors) | {"sound": torch.tensor(finite_images(images))}
        columns |= self.comparison.columns(generated, self.extractors)
        if self.clip is not None:
            tokens = self.clip.tokenize([item["caption"] for item in items]).to(images.device)
            with torch.no_grad():
                columns["clip_text"] = self.clip.encode_text(tokens).cpu()
        for judge in self.judges:
            columns |= {f"right/{name}": column for name, column in judge.correct(images, items).items()}
        shown = self.model.conditions.show(generated.originals, generated.inputs)
        return columns | grid_column(numbers, side_by_side([*shown, images, generated.originals]) if shown else images)

    def metrics(self, measured: FeatureCache) -> dict[str, float]:
        """CLIP score, how close images come to originals, and what the judges find in them and in real ones."""
        result = self.comparison.metrics(measured)
        if self.clip is not None:
            name = self.extractors[-1].name  # clip or clip_own
            pairs = (torch.cat(column) for column in zip(*measured.columns(name, "clip_text"), strict=True))
            result[f"eval/{name.replace('clip', 'clip_score')}"] = clip_score(*pairs)
        for judge in self.judges:
            scores = judge.scores({name: measured.whole(f"right/{name}") for name in judge.columns})
            result |= {f"eval/{judge.group}/{name}": score for name, score in scores.items()}
            result |= accuracy(judge, self.prompts, self.runtime.device)
        return result

    def captions(self, numbers: range) -> list[str]:
        """Titles of the images: captions and what else they were made of."""
        items, conditions = self.items(numbers), self.model.conditions
        inputs = self.model.prepare(samples_of(items, numbers, self.cfg.seed, self.cfg.images.resolution))
        return conditions.titles([item["caption"] for item in items], inputs)

    def items(self, numbers: range) -> list[dict[str, Any]]:
        """The sample of the data set whose caption each image has."""
        return [self.prompts.at(number % self.prompts.samples) for number in numbers]


class Reconstructions:
    """Real images after encoding, to the mean of the posterior, and decoding."""

    prefix = "r"
    baselines: tuple[str, ...] = ()

    def __init__(self, cfg: EvaluateRun, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        self.originals = ImageDataset(cfg.captions, cfg.images, cfg.seed)
        self.total = min(cfg.samples, self.originals.samples)
        require_enough(f"captions={cfg.captions} holds {self.total}", self.total, cfg.inception)
        self.extractors = extractors_of(cfg, runtime.device)
        self.autoencoder = Autoencoder.from_pretrained(cfg.autoencoder).eval().requires_grad_(False).to(runtime.device)
        self.measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
        perceptual = perceptual_distance(cfg.perceptual)
        if perceptual is not None:
            self.measures[cfg.perceptual.value] = perceptual.to(runtime.device)
        self.facts = {
            "originals": self.originals.digest,
            "resolution": cfg.images.resolution,
            **cfg.images.other_filter(),
            "precision": cfg.runtime.precision.value,
            "perceptual": cfg.perceptual.value if cfg.perceptual is not Perceptual.none else None,
            "weights_sha256": weights_digest(cfg.autoencoder),
        }

    @torch.no_grad()
    def measure(self, numbers: range) -> dict[str, Tensor]:
        """Encode, decode and compare."""
        originals = self.originals.batch_at(numbers)["image"].to(self.runtime.device)
        with autocast(self.runtime.device, self.cfg.runtime.precision):
            latents = self.autoencoder.encode(originals).chunk(2, dim=1)[0]
            images = self.autoencoder.decode(latents).float().clamp(-1, 1)
        if broken := finite_images(images).count(False):
            raise UserError(
                f"{broken} of {len(images)} images that the autoencoder gives back contain NaN or infinity: set "
                f"runtime.precision=fp32; if that does not help, autoencoder={self.cfg.autoencoder} is broken"
            )
        columns = features_of(images, self.extractors)
        columns |= {f"compared/{name}": measure(images, originals).cpu() for name, measure in self.measures.items()}
        return columns | grid_column(numbers, images)

    def metrics(self, measured: FeatureCache) -> dict[str, float]:
        """PSNR, SSIM and the perceptual distance, means over the images."""
        return {f"eval/{name}": measured.whole(f"compared/{name}").mean().item() for name in self.measures}

    def captions(self, numbers: range) -> list[str]:
        """Captions of the originals."""
        return [self.originals.at(number)["caption"] for number in numbers]


def extractors_of(cfg: EvaluateRun, device: torch.device) -> list[Extractor]:
    """Extractors that the options name; a file of statistics leaves the first of them to compare with."""
    found = [] if cfg.inception is None else [inception(cfg.inception, device)]
    return found if found and cfg.reference.endswith(FILES) else [*found, efficientnet(device)]


def load_clip(source: str) -> Clip:
    """The CLIP of the score, frozen; UserError names the option, since `clip` is another one."""
    try:
        return Clip.from_pretrained(source).eval().requires_grad_(False)
    except UserError as error:
        raise UserError(f"clip_score: {error}") from error


def clip_extractor(clip: Clip, source: str) -> Extractor:
    """Image embeddings of CLIP; one that this program trained itself is called `clip_own`, since nobody else has it."""
    folder = Path(source)
    published = not folder.is_dir() or (folder / DESCRIPTION_NAME).is_file()
    name, device = "clip" if published else "clip_own", clip.mean.device
    return Extractor(
        name=name,
        size=clip.config.embed_dim,
        weights_sha256=weights_digest(source),
        resize=f"bicubic to {clip.config.image_size} pixels",
        network=lambda pixels: {name: clip.encode_image(pixels.to(device).float() / 127.5 - 1)},
    )


def features_of(images: Tensor, extractors: list[Extractor]) -> dict[str, Tensor]:
    """Columns of features of all extractors."""
    return {name: column for extractor in extractors for name, column in extractor(images).items()}


def grid_column(numbers: range, images: Tensor) -> dict[str, Tensor]:
    """The column of images for the grid, of the first chunks alone."""
    return {"image": torch.from_numpy(to_uint8(images))} if numbers.start < SHOWN else {}
