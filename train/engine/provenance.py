"""Who made what: the facts that join an autoencoder, a CLIP, their latents and the U-Net trained on them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import load
from torch import Tensor

from conf.errors import UserError
from conf.schema import ImageConfig, ProcessConfig, UNetRun
from data.manifest import Manifest
from data.remote import joined, read
from data.shards import atomic_write

INFO = "latentline.json"
NULL_TEXT = "null_text.safetensors"


def weights_digest(source: str) -> str:
    """sha256 over the safetensors files of a network's folder, or over the file of an open_clip model NAME/TAG."""
    files = sorted(Path(source).glob("*.safetensors")) or _pretrained(source)
    if not files:
        raise UserError(f"no weights in '{source}': train that stage first, or point the option at a folder with them")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _pretrained(source: str) -> list[Path]:
    from models.clip import pretrained_file  # only those who name such a model wait for open_clip's import

    file = pretrained_file(source)
    return [] if file is None else [file]


def image_facts(images: ImageConfig) -> dict[str, Any]:
    """The preprocessing that a cache was made with, in plain values."""
    return {"resolution": images.resolution, "crop": images.crop.value, "flip": images.flip, "range": [-1.0, 1.0]}


@dataclass(kw_only=True)
class UNetInfo:
    """What sampling has to know beside the U-Net's weights; kept in `latentline.json` of its export."""

    process: dict[str, Any]
    latent_mean: list[float]  # [C], over the whole training set
    latent_std: list[float]
    autoencoder: str  # sha256 of the weights
    clip: str
    weights: str  # "ema", "last" where the run kept no average, or which one train/average.py took

    def save(self, folder: Path) -> None:
        atomic_write(folder / INFO, json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def load(cls, folder: str) -> "UNetInfo":
        path = Path(folder) / INFO
        if not path.exists():
            raise UserError(f"no {INFO} in '{folder}': train the U-Net first, or set unet=FOLDER to an export of it")
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"'{path}' is not of this version ({error}): train or export the U-Net again") from None

    def process_config(self) -> ProcessConfig:
        """The typed process configuration again."""
        merged = OmegaConf.merge(OmegaConf.structured(ProcessConfig), self.process)
        process = OmegaConf.to_object(merged)
        assert isinstance(process, ProcessConfig)
        return process

    def null_text(self, latents: str) -> Tensor:
        """Text states [L, D] of the empty caption, from the cache."""
        try:
            return load(read(joined(latents, NULL_TEXT)))["text"].float()
        except FileNotFoundError:
            raise UserError(f"no {NULL_TEXT} in '{latents}': run data/precompute_latents.py again") from None


def info_of_trained(unet: str, autoencoder: str, clip: str) -> UNetInfo:
    """What is known of an exported U-Net; refuses an autoencoder or CLIP that it was not trained with."""
    info = UNetInfo.load(unet)
    for option, folder, digest in (("autoencoder", autoencoder, info.autoencoder), ("clip", clip, info.clip)):
        if weights_digest(folder) != digest:
            raise UserError(f"{option}={folder}: not the one that unet={unet} was trained with")
    return info


def check_latents(cfg: UNetRun, manifest: Manifest) -> UNetInfo:
    """Refuse a cache that does not fit the run, naming the field; else what the run needs of it."""
    if manifest.kind != "latents":
        raise UserError(f"latents={cfg.latents}: holds {manifest.kind}, not latents; run data/precompute_latents.py")
    facts = manifest.provenance
    found = {
        "autoencoder (weights)": (weights_digest(cfg.autoencoder), facts["autoencoder"]),
        "clip (weights)": (weights_digest(cfg.clip), facts["clip"]),
        "model.in_channels": (cfg.model.in_channels, facts["latent_channels"]),
        "model.sample_size": (cfg.model.sample_size, facts["latent_size"]),
        "model.cross_attention_dim": (cfg.model.cross_attention_dim, facts["text_dim"]),
    }
    for field, (wanted, cached) in found.items():
        if wanted != cached:
            raise UserError(
                f"latents={cfg.latents} does not fit this run: {field} is {short(wanted)}, the cache was made with "
                f"{short(cached)}; run data/precompute_latents.py into another folder or change the option"
            )
    check_shapes(cfg, facts)
    mean, std = normalisation(cfg, manifest)
    return UNetInfo(
        process=OmegaConf.to_container(OmegaConf.structured(cfg.process), enum_to_str=True),  # type: ignore[arg-type]
        latent_mean=mean,
        latent_std=std,
        autoencoder=facts["autoencoder"],
        clip=facts["clip"],
        weights="ema" if cfg.ema.half_life_samples > 0 else "last",
    )


def normalisation(cfg: UNetRun, manifest: Manifest) -> tuple[list[float], list[float]]:
    """Mean and standard deviation [C] of the latents; of those that `init_from` has learnt, if they are of one kind."""
    if cfg.init_from is not None and (Path(cfg.init_from) / INFO).is_file():
        before = UNetInfo.load(cfg.init_from)
        if before.autoencoder == manifest.provenance["autoencoder"]:
            return before.latent_mean, before.latent_std
    return manifest.stats["mean"], manifest.stats["std"]


def check_shapes(cfg: UNetRun, facts: dict[str, Any]) -> None:
    """Refuse latents whose sides the U-Net cannot halve as often as it does."""
    pixels = facts["images"]["resolution"] // facts["latent_size"] * 2 ** (len(cfg.model.block_out_channels) - 1)
    square = [[facts["images"]["resolution"]] * 2]  # of caches from before there were others
    for width, height in facts.get("shapes", square):
        if width % pixels or height % pixels:
            raise UserError(
                f"latents={cfg.latents}: pictures of {width} x {height} pixels do not fit model.block_out_channels, "
                f"which halves sides that are multiples of {pixels}: precompute them with buckets.step={pixels}"
            )


def require_same(option: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse weights of another architecture than `model` says, naming the first field that differs."""
    for field in sorted(wanted.keys() | found.keys()):
        before, after = found.get(field), wanted.get(field)
        if before != after:
            raise UserError(f"{option}: its {field} is {before}, model.{field} is {after}; make them equal")


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 12 else text[:12] + "..."
