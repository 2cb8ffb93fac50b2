"""How diffusers describes our autoencoders: as AutoencoderKL, with a codebook as VQModel."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema.networks import AutoencoderConfig
from models.formats.weights import CONFIG_NAME, Format, read_json

# Old checkpoints name the attention's parts differently.
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
BLOCKS = {  # whether the blocks of a level have attention
    "down_block_types": {False: "DownEncoderBlock2D", True: "AttnDownEncoderBlock2D"},
    "up_block_types": {False: "UpDecoderBlock2D", True: "AttnUpDecoderBlock2D"},
}
SCALE = 0.18215  # of the latents of Stable Diffusion
ONLY_VQ = {"num_vq_embeddings", "vq_embed_dim"}


def _with_levels(found: dict[str, Any]) -> dict[str, Any]:
    """The names of the blocks as the numbers of the levels that attend, the same ones on both ways."""
    found, levels = dict(found), {}
    for option, names in BLOCKS.items():
        kinds = found.pop(option, [names[False]])
        known = {name: attends for attends, name in names.items()}
        if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in known for kind in kinds):
            raise UserError(f"config.json: {option}={kinds!r} is not supported, only lists of {' and '.join(known)}")
        ordered = kinds if option.startswith("down") else kinds[::-1]
        levels[option] = [number for number, kind in enumerate(ordered) if known[kind]]
    if levels["down_block_types"] != levels["up_block_types"]:
        raise UserError("config.json: down_block_types and up_block_types attend at different levels: not supported")
    return {**found, "attention_levels": levels["down_block_types"]}


KL_FORMAT = Format(
    class_name="AutoencoderKL",
    fixed={"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True},
    absent={"block_out_channels": [64], "layers_per_block": 1},
    # What a pipeline does with the latents, not what the network does.
    ignored=("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"),
    translate=_with_levels,
)
VQ_FORMAT = Format(
    class_name="VQModel",
    fixed={"act_fn": "silu", "norm_type": "group", "lookup_from_codebook": False},
    absent={"block_out_channels": [64], "layers_per_block": 1, "latent_channels": 3, "num_vq_embeddings": 256},
    ignored=("sample_size", "scaling_factor", "force_upcast"),
    translate=_with_levels,
)


def scaling_factor(folder: Path) -> float:
    """What diffusers' pipelines multiply the latents of an autoencoder by; that of Stable Diffusion where it says none.

    Raises:
        UserError: another normalisation than by one factor.
    """
    path = folder / CONFIG_NAME
    found = read_json(path, CONFIG_NAME)
    scale = found.get("scaling_factor", SCALE)
    if type(scale) not in (int, float) or not 0 < scale < 1e6:
        raise UserError(f"{path}: scaling_factor={scale!r} is not supported, it must be positive")
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if found.get(name) is not None:
            raise UserError(f"{path}: {name}={found[name]!r} is not supported, only a scaling_factor")
    return float(scale)


def to_json(cfg: AutoencoderConfig) -> dict[str, Any]:
    """`config.json` of an autoencoder."""
    form = KL_FORMAT if cfg.num_vq_embeddings is None else VQ_FORMAT
    values = {name: value for name, value in asdict(cfg).items() if form is VQ_FORMAT or name not in ONLY_VQ}
    attends = values.pop("attention_levels")
    down = [number in attends for number in range(len(cfg.block_out_channels))]
    for option, kinds in (("down_block_types", down), ("up_block_types", down[::-1])):
        values[option] = [BLOCKS[option][kind] for kind in kinds]
    # Our latents are normalised per channel by the data set's statistics, not by one factor.
    return {"_class_name": form.class_name, **form.fixed, **values, "scaling_factor": 1.0}
