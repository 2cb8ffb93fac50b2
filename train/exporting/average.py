"""Another average of a U-Net's weights as an export: one that was tracked, or one put together after the training."""

from functools import partial
from pathlib import Path

from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from conf.errors import UserError
from conf.files import atomic_folder
from conf.schema import AverageRun
from models.denoiser import Denoiser
from train.engine.ema import MAIN, further
from train.engine.marker import damage_of
from train.engine.metric_log import read_config, say
from train.engine.posthoc import reconstructed
from train.latents.provenance import INFO, UNetInfo

NETWORK = "unet"  # name of the trainable


def export_average(cfg: AverageRun) -> None:
    """Write `output_dir`, whole; another average that stood there is replaced.

    Raises UserError for a folder with something else in it, averages that are not there, and those of adapters.
    """
    trained, output_dir = Path(cfg.trained), Path(cfg.output_dir)
    if output_dir.exists() and not ((output_dir / INFO).is_file() and output_dir.name != "export"):
        raise UserError(f"output_dir={output_dir}: holds something else; name a folder that is not there yet")
    info = UNetInfo.load(str(trained / "export"))
    network = Denoiser.from_pretrained(trained / "export", partial(info.build_conditions, downscale=1))  # weights alone
    if OmegaConf.select(read_config(trained), "lora.rank"):
        raise UserError(f"trained={trained}: averages there are of adapters only (lora.rank); use its export")
    if cfg.sigma_rel is not None:
        name, average = f"sigma_rel={cfg.sigma_rel:g}", reconstructed(trained, NETWORK, cfg.sigma_rel, cfg.samples_seen)
    else:
        name, average = f"half_life_samples={cfg.half_life_samples:g}", tracked(cfg)
    info.weights = name
    with atomic_folder(output_dir) as folder:
        network.save_pretrained(folder, network.state_dict() | average, info.metadata())
        info.save(folder)
    say("average", f"{output_dir}: the U-Net's average of {name}")


def tracked(cfg: AverageRun) -> dict[str, Tensor]:
    """The average of a half-life as a checkpoint has it; raises UserError where it is not."""
    main = OmegaConf.select(read_config(Path(cfg.trained)), "ema.half_life_samples")
    name = MAIN if cfg.half_life_samples == main else further(cfg.half_life_samples or 0)
    checkpoints = sorted(path for path in Path(cfg.trained, "checkpoints").glob("[0-9]*"))
    wanted = [path for path in checkpoints if cfg.samples_seen in (None, int(path.name))]
    if not wanted:
        if not checkpoints:
            raise UserError(f"no checkpoints in '{cfg.trained}': averages of a half-life are in them")
        there = ", ".join(str(int(path.name)) for path in checkpoints)
        raise UserError(f"samples_seen={cfg.samples_seen}: no checkpoint of it; choose one of {there}")
    damage = damage_of(wanted[-1])
    if damage is not None:
        raise UserError(f"checkpoint '{wanted[-1]}' is broken ({damage}): choose another with samples_seen")
    path = wanted[-1] / NETWORK / f"{name}.safetensors"
    if not path.is_file():
        names = ", ".join(sorted(other.stem for other in path.parent.glob(f"{MAIN}*")))
        raise UserError(f"half_life_samples={cfg.half_life_samples:g}: not in '{path.parent}', which has {names}")
    return load_file(path)
