"""Whole checkpoints in one file, as the code of the latent diffusion paper and of Stable Diffusion writes them."""

from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema.networks import AutoencoderConfig, UNetConfig
from models.autoencoder import Autoencoder
from models.formats.compvis import AUTOENCODER, UNET, Pair, autoencoder_pairs, from_compvis, to_compvis, unet_pairs
from models.formats.weights import copied, require_finite, save_file_atomic
from models.unet import UNet

SUFFIXES = (".safetensors", ".ckpt", ".pt")
# What a checkpoint holds beside the networks: text towers, averages, the first training's losses, and what follows from
# the noise schedule.
OTHER_PARTS = ("cond_stage_model.", "conditioner.", "model_ema.", "loss.", "denoiser.")
SCHEDULE = {
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "scale_factor",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
}
TEXT = "cond_stage_model.transformer."  # before the names of Stable Diffusion 1's CLIPTextModel
ALONE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")  # an autoencoder's own checkpoint


def is_single_file(source: str | Path) -> bool:
    """Whether a source of weights is a file of this kind and not a folder."""
    return str(source).endswith(SUFFIXES)


def read_unet_file(path: str | Path, cfg: UNetConfig) -> dict[str, Tensor]:
    """Weights of a U-Net, from a whole checkpoint and as that has them.

    Raises:
        UserError: unreadable file; missing, surplus or misshapen weights, by name.
    """
    with torch.device("meta"):
        network = UNet(cfg)
    return _read(path, network, UNET, unet_pairs(cfg))


def load_autoencoder_file(path: str | Path, cfg: AutoencoderConfig) -> Autoencoder:
    """The autoencoder of a whole checkpoint or of its own, in fp32; raises as `read_unet_file`."""
    with torch.device("meta"):
        network = Autoencoder(cfg)
    network.load_state_dict(copied(_read(path, network, AUTOENCODER, autoencoder_pairs(cfg))), assign=True)
    return network


def _read(path: str | Path, network: nn.Module, prefix: str, pairs: list[Pair]) -> dict[str, Tensor]:
    part = require_finite(path, _part(path, read_single_file(path), prefix))
    return from_compvis(str(path), pairs, part, network.state_dict())


def read_single_file(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU; a pickle is read by torch's loader for weights only, which runs no code.

    Raises:
        UserError: no such file, a broken one, or one with more than tensors in it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: give a folder in diffusers' format or a file {', '.join(SUFFIXES)}"
        ) from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): copy it again") from None
    except OSError:
        raise
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} holds more than weights, or is broken, and is not opened ({reason})") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    sound = isinstance(found, dict) and all(isinstance(n, str) and isinstance(v, Tensor) for n, v in found.items())
    if not sound:
        raise UserError(f"{path} holds no state dict: nothing to load")
    return dict(found)


def write_single_file(path: Path, unet: UNet, autoencoder: Autoencoder, text: Mapping[str, Tensor]) -> None:
    """A whole checkpoint; `text` is the state dict of a CLIPTextModel."""
    parts = {
        UNET: to_compvis(unet_pairs(unet.cfg), unet.state_dict()),
        AUTOENCODER: to_compvis(autoencoder_pairs(autoencoder.cfg), autoencoder.state_dict()),
        TEXT: text,
    }
    save_file_atomic(path, {prefix + name: value for prefix, part in parts.items() for name, value in part.items()})


def _part(path: str | Path, weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix, without it; a name that belongs to no part that we know is an error."""
    networks = (UNET, AUTOENCODER, *OTHER_PARTS)
    alone = prefix == AUTOENCODER and not any(name.startswith(prefix) for name in weights)
    known = (*ALONE, *OTHER_PARTS) if alone else networks
    strange = [name for name in weights if not name.startswith(known) and name not in SCHEDULE]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise UserError(f"{path}: of no known part of a checkpoint: {', '.join(strange[:3])}{more}")
    if alone:
        return {name: tensor for name, tensor in weights.items() if name.startswith(ALONE)}
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
