"""Who made what: the facts that join an autoencoder, a CLIP, their latents and the U-Net trained on them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load
from torch import Tensor

from conf.errors import UserError, first_line
from conf.files import atomic_write, sha256
from conf.plain_json import dumps, loads, loads_finite
from conf.schema import ConditionsConfig, ImageConfig, ProcessConfig, UNetRun
from conf.schema.networks import UNetConfig
from data.shards.manifest import Manifest
from data.shards.remote import joined, read_remote
from models.conditions import ConditionContext, Conditions, Embedders
from models.diffusion.process import SCHEDULER, differences, meaning, read_scheduler
from models.diffusion.samplers import Student
from models.formats.autoencoder import scaling_factor
from models.formats.lora import Adapters
from models.formats.weights import CONFIG_NAME, WEIGHTS_NAME, metadata_of, read_json

INFO = "latentline.json"
NULL_TEXT = "null_text.safetensors"
PROCESS, STUDENT = "latentline_process", "latentline_student"  # entries of the weights' metadata
# Of caches from before they said so.
OLDER: dict[str, Any] = {"conditions": {"caption": {}}, "labels": {}, "captions": ["caption"]}

C = TypeVar("C")


def weights_digest(source: str) -> str:
    """sha256 over the safetensors files of a network's folder, or over the file of an open_clip model NAME/TAG."""
    files = sorted(Path(source).glob("*.safetensors")) or _pretrained(source)
    if not files:
        raise UserError(f"no weights in '{source}': train that stage first, or point the option at a folder with them")
    return sha256(*files)


def _pretrained(source: str) -> list[Path]:
    from models.clip import pretrained_file  # only those who name such a model wait for open_clip's import

    file = pretrained_file(source)
    return [] if file is None else [file]


def image_facts(images: ImageConfig) -> dict[str, Any]:
    """The preprocessing that a cache was made with, in plain values."""
    facts = {"resolution": images.resolution, "crop": images.crop.value, "flip": images.flip, "range": [-1.0, 1.0]}
    return facts | images.other_filter()


@dataclass(kw_only=True)
class UNetInfo:
    """Facts that sampling needs beside the U-Net's weights; kept in `latentline.json` of its export."""

    process: dict[str, Any]
    latent_mean: list[float]  # [C], over the whole training set
    latent_std: list[float]
    autoencoder: str  # sha256 of the weights
    clip: str | None  # None: no condition asks it
    weights: str  # "ema", "last" where the run kept no average, or which one train/average.py took
    conditions: dict[str, Any] = field(default_factory=lambda: OLDER["conditions"])  # what the network is told
    names: dict[str, list[str]] = field(default_factory=dict)  # of the classes that they mention
    student: dict[str, Any] = field(default_factory=dict)  # of `samplers.Student`; {}: it is none

    def save(self, folder: Path) -> None:
        atomic_write(folder / INFO, dumps(asdict(self), indent=2).encode())

    @classmethod
    def load(cls, folder: str) -> "UNetInfo":
        path = Path(folder) / INFO
        if not path.exists():
            raise UserError(f"no {INFO} in '{folder}': train the U-Net first, or set unet=FOLDER to an export of it")
        try:
            found = loads_finite(path.read_bytes())
            if not isinstance(found, dict):
                raise TypeError("no JSON object")
            info = cls(**found)
            info._check()
            says = meaning(info.process_config())
        except (ValueError, TypeError, OmegaConfBaseException) as error:
            reason = first_line(error)
            raise UserError(f"'{path}' is not of this version ({reason}): train or export the U-Net again") from None
        if changed := differences(said_in(metadata_of(Path(folder) / WEIGHTS_NAME), PROCESS), says):
            raise UserError(
                f"'{path}' is not that of the weights beside it ({'; '.join(changed)}): copy the whole export again"
            )
        return info

    def check_adapters(self, lora: Adapters) -> None:
        """Refuse those of a U-Net that predicts something else, where their file says so."""
        found = differences(said_in(lora.metadata, PROCESS), meaning(self.process_config()))
        if found and found[0].startswith("process.prediction"):
            raise UserError(f"lora={lora.source}: {found[0]} of unet=; name the U-Net that they were trained on")

    def taught_by(self, lora: Adapters) -> "UNetInfo":
        """Facts of this U-Net with adapters that make it a student, where their file says so."""
        return replace(self, student=said_in(lora.metadata, STUDENT) or self.student)

    def _check(self) -> None:
        """Raise TypeError, or an error of OmegaConf, for values that no training writes."""
        for name, values in (("latent_mean", self.latent_mean), ("latent_std", self.latent_std)):
            if not isinstance(values, list) or not values or not all(type(value) in (int, float) for value in values):
                raise TypeError(f"{name} is no list of numbers")
        if len(self.latent_mean) != len(self.latent_std) or min(self.latent_std) <= 0:
            raise TypeError("latent_std is not positive, or not as long as latent_mean")
        for name in ("process", "conditions", "names", "student"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name} is no JSON object")
        self.conditions_config()
        Student.read(self.student)

    def metadata(self) -> dict[str, str]:
        """Metadata for the weights' own file, so that no other `latentline.json` is taken for theirs."""
        student = {STUDENT: dumps(self.student)} if self.student else {}
        return {PROCESS: dumps(meaning(self.process_config()))} | student

    def process_config(self) -> ProcessConfig:
        """The typed process configuration again."""
        return _typed(ProcessConfig, self.process)

    def conditions_config(self) -> ConditionsConfig:
        """The typed conditions again; those that are not named are absent."""
        absent: dict[str, Any] = {option.name: None for option in fields(ConditionsConfig)}
        return _typed(ConditionsConfig, absent | self.conditions)

    def build_conditions(self, model: UNetConfig, downscale: int, null_text: Tensor | None = None) -> Embedders:
        """The conditions of a U-Net, untrained; `null_text` [L, D] is for its training."""
        context = ConditionContext.of(
            model,
            downscale=downscale,
            latent_mean=torch.tensor(self.latent_mean),
            latent_std=torch.tensor(self.latent_std),
            null_text=null_text,
        )
        return Embedders(Conditions(self.conditions_config(), self.names), context)

    def null_text(self, latents: str) -> Tensor:
        """Text states [L, D] of the empty caption, from the cache."""
        try:
            return load(read_remote(joined(latents, NULL_TEXT)))["text"].float()
        except FileNotFoundError:
            raise UserError(f"no {NULL_TEXT} in '{latents}': run data/precompute_latents.py again") from None


def said_in(metadata: Mapping[str, str], entry: str) -> dict[str, Any]:
    """What a file's metadata says of its process (its `meaning`) or as a student; empty where it says nothing."""
    try:
        found = loads(metadata.get(entry, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def trained_otherwise(source: str, now: UNetInfo) -> list[str]:
    """Differences between what a U-Net (`init_from`) was trained for and what a run asks of it, in words.

    By its `latentline.json`, or by the scheduler beside it in a folder of one of diffusers' pipelines.
    """
    wanted = meaning(now.process_config())
    if not (Path(source) / INFO).is_file():
        try:
            return differences(meaning(read_scheduler(Path(source).parent / "scheduler" / SCHEDULER)), wanted)
        except UserError:  # none, or one whose noise levels we have no name for
            return [f"it does not say what it predicts, which must be process.prediction={wanted['prediction']}"]
    before = UNetInfo.load(source)
    found = differences(meaning(before.process_config()), wanted)
    if before.autoencoder != now.autoencoder:
        found.append("its latents were those of another autoencoder, normalised otherwise")
    if None not in (before.clip, now.clip) and before.clip != now.clip:
        found.append("its text states were those of another clip")
    if before.conditions.keys() != now.conditions.keys():
        was, are = (", ".join(sorted(info.conditions)) or "none" for info in (before, now))
        found.append(f"conditions were {was}, are {are}")
    named = sorted(before.names.keys() & now.names.keys())
    return found + [f"its {group} had other names" for group in named if before.names[group] != now.names[group]]


def told_guidance(source: str) -> bool:
    """Whether a U-Net is a student that takes a scale of guidance; of diffusers' folders all that are told one are."""
    if (Path(source) / INFO).is_file():
        return UNetInfo.load(source).student.get("guidance") is not None
    path = Path(source) / CONFIG_NAME
    return path.is_file() and read_json(path, WEIGHTS_NAME).get("time_cond_proj_dim") is not None


def vae_beside(source: str) -> Path | None:
    """The autoencoder of a U-Net in a folder of one of diffusers' pipelines; None where it is an export of ours."""
    vae = Path(source).parent / "vae"
    return vae if (vae / CONFIG_NAME).is_file() and not (Path(source) / INFO).is_file() else None


def info_of_trained(unet: str, autoencoder: str, clip: str) -> UNetInfo:
    """Facts of an exported U-Net; refuses an autoencoder or CLIP that it was not trained with."""
    info = UNetInfo.load(unet)
    for option, folder, digest in (("autoencoder", autoencoder, info.autoencoder), ("clip", clip, info.clip)):
        if digest is not None and weights_digest(folder) != digest:
            raise UserError(f"{option}={folder}: not the one that unet={unet} was trained with")
    return info


def check_latents(cfg: UNetRun, manifest: Manifest, kept: bool = False) -> UNetInfo:
    """Refuse a cache that does not fit the run, naming the field; else what the run needs of it.

    `kept`: whether the network of `init_from` stays as it is, adapters apart, or teaches.
    """
    if manifest.kind != "latents":
        raise UserError(f"latents={cfg.latents}: holds {manifest.kind}, not latents; run data/precompute_latents.py")
    facts = manifest.provenance
    absent = {"autoencoder", "clip", "images", "latent_channels", "latent_size", "text_dim"} - facts.keys()
    if absent:
        raise UserError(
            f"latents={cfg.latents}: its manifest does not say {', '.join(sorted(absent))}: run "
            "data/precompute_latents.py again"
        )
    found = {
        "autoencoder (weights)": (weights_digest(cfg.autoencoder), facts["autoencoder"]),
        "model.out_channels": (cfg.model.out_channels, facts["latent_channels"]),
        "model.sample_size": (cfg.model.sample_size, facts["latent_size"]),
    }
    if asks_clip(cfg.conditions):
        found["clip (weights)"] = (weights_digest(cfg.clip), facts["clip"])
    if cfg.conditions.caption is not None:
        found["model.cross_attention_dim"] = (cfg.model.cross_attention_dim, facts["text_dim"])
    for name, (wanted, cached) in found.items():
        if wanted != cached:
            raise UserError(
                f"latents={cfg.latents} does not fit this run: {name} is {shortened(wanted)}, the cache was made with "
                f"{shortened(cached)}; run data/precompute_latents.py into another folder or change the option"
            )
    check_conditions(cfg, facts.get("conditions", OLDER["conditions"]))
    check_shapes(cfg, facts)
    mean, std = normalisation(cfg, manifest, kept)
    return UNetInfo(
        process=_plain(cfg.process),
        latent_mean=mean,
        latent_std=std,
        autoencoder=facts["autoencoder"],
        clip=facts["clip"] if asks_clip(cfg.conditions) else None,
        weights="ema" if cfg.ema.half_life_samples > 0 else "last",
        conditions={name: _plain(section) for name, section in cfg.conditions.chosen()},
        names=facts.get("labels", {}),
    )


def asks_clip(conditions: ConditionsConfig) -> bool:
    """Whether a condition needs CLIP's towers."""
    return conditions.caption is not None or conditions.image_embedding is not None


def check_conditions(cfg: UNetRun, cached: dict[str, Any]) -> None:
    """Refuse a cache that lacks the arrays of a condition, or has others."""
    wanted = Conditions(cfg.conditions).facts()
    for name, facts in wanted.items():
        if cached.get(name) != facts:
            found = "has none" if name not in cached else f"has one of {cached[name]}, not {facts}"
            raise UserError(
                f"latents={cfg.latents} does not fit this run: conditions.{name}, of which the cache {found}; run "
                "data/precompute_latents.py with the same conditions into another folder"
            )


def _typed(kind: type[C], values: Mapping[str, Any]) -> C:
    """Plain values as a dataclass of the schema."""
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    assert isinstance(found, kind)
    return found


def _plain(section: object) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(section), enum_to_str=True)


def normalisation(cfg: UNetRun, manifest: Manifest, kept: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation [C] of the latents; of those that `init_from` has learnt, if they are of one kind.

    A network from elsewhere has the one factor of its pipeline, to which it holds as far as it is `kept`.
    """
    if kept and cfg.init_from is not None and (vae := vae_beside(cfg.init_from)) is not None:
        channels = cfg.model.out_channels
        if weights_digest(str(vae)) == manifest.provenance["autoencoder"]:
            return [0.0] * channels, [1 / scaling_factor(vae)] * channels
    if cfg.init_from is not None and (Path(cfg.init_from) / INFO).is_file():
        before = UNetInfo.load(cfg.init_from)
        if before.autoencoder == manifest.provenance["autoencoder"]:
            return before.latent_mean, before.latent_std
    stats: dict[str, Any] = {"mean": None, "std": None} | manifest.stats
    mean, std = stats["mean"], stats["std"]
    values = [*mean, *std] if isinstance(mean, list) and isinstance(std, list) else [None]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise UserError(
            f"latents={cfg.latents}: its manifest has no finite mean and std of each channel: run "
            "data/precompute_latents.py again"
        )
    return mean, std


def check_shapes(cfg: UNetRun, facts: dict[str, Any]) -> None:
    """Refuse latents whose sides the U-Net cannot halve as often as it does."""
    pixels = facts["images"]["resolution"] // facts["latent_size"] * 2 ** (len(cfg.model.block_out_channels) - 1)
    square = [[facts["images"]["resolution"]] * 2]  # of caches from before there were others
    for width, height in facts.get("shapes", square):
        if width % pixels or height % pixels:
            raise UserError(
                f"latents={cfg.latents}: images of {width} x {height} pixels do not fit model.block_out_channels, "
                f"which halves sides that are multiples of {pixels}: precompute them with buckets.step={pixels}"
            )


def require_same(option: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse weights of another architecture than `model` says, naming the first field that differs."""
    for name in sorted(wanted.keys() | found.keys()):
        before, after = found.get(name), wanted.get(name)
        if before != after:
            raise UserError(f"{option}: its {name} is {before}, model.{name} is {after}; make them equal")


def shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 12 else text[:12] + "..."
