"""How diffusers describes our U-Nets: as UNet2DConditionModel with text, as UNet2DModel without."""

from dataclasses import asdict
from typing import Any

from conf.errors import UserError
from conf.schema.networks import UNetConfig
from models.formats.weights import Format

COMMON = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "dropout": 0.0,
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
}
ONLY_WITH_TEXT = {
    "addition_embed_type",
    "addition_time_embed_dim",
    "cross_attention_dim",
    "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
    "transformer_layers_per_block",
    "use_linear_projection",
}
ONLY_WITHOUT_TEXT = {"downsample_type", "upsample_type"}


def _with_widths(found: dict[str, Any]) -> dict[str, Any]:
    """UNet2DModel's `attention_head_dim` is the width of a head, in ours the number of heads; null is one head."""
    found = {**found, "cross_attention_dim": None}
    width = found.pop("attention_head_dim", 8)
    channels = found.get("block_out_channels", [])
    if isinstance(width, int):
        found["head_channels"] = width
    elif isinstance(width, list) and len(width) == len(channels) and all(width):
        found["attention_head_dim"] = [total // one for total, one in zip(channels, width, strict=True)]
    elif width is None:
        found["attention_head_dim"] = [1]
    else:
        raise UserError(f"config.json: attention_head_dim={width!r} is not supported")
    # The norm of the attention in the middle, which is absent where blocks scale and shift unless it is asked for.
    groups, default = found.pop("attn_norm_num_groups", None), found.get("resnet_time_scale_shift") != "scale_shift"
    if groups != found.get("norm_num_groups", 32) and not (groups is None and default):
        raise UserError(f"config.json: attn_norm_num_groups={groups!r} is not supported, only norm_num_groups")
    return found


WITH_TEXT = Format(
    class_name="UNet2DConditionModel",
    fixed={
        **COMMON,
        "attention_type": "default",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
    },
    absent={"cross_attention_dim": 1280},
    # Attention sums in fp32 anyway; the other one counts heads of a layer that we do not have.
    ignored=("upcast_attention", "addition_embed_type_num_heads"),
)
WITHOUT_TEXT = Format(
    class_name="UNet2DModel",
    fixed={**COMMON, "mid_block_type": "UNetMidBlock2D", "add_attention": True},
    absent={
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [224, 448, 672, 896],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    ignored=("num_train_timesteps",),
    translate=_with_widths,
)
FORMATS = (WITH_TEXT, WITHOUT_TEXT)


def to_json(cfg: UNetConfig) -> dict[str, Any]:
    """`config.json` of a network."""
    values = asdict(cfg)
    del values["head_channels"]
    if cfg.cross_attention_dim is not None:
        form, others = WITH_TEXT, ONLY_WITHOUT_TEXT
        values["attention_head_dim"] = _short(cfg.heads)
        values["transformer_layers_per_block"] = _short(cfg.depths)
    else:
        form, others = WITHOUT_TEXT, ONLY_WITH_TEXT
        # One number where all heads are equally wide. diffusers knows no other case, and fails on the list.
        pairs = zip(cfg.block_out_channels, cfg.heads, strict=True)
        values["attention_head_dim"] = _short([channels // heads for channels, heads in pairs])
        values["attn_norm_num_groups"] = cfg.norm_num_groups
    kept = {name: value for name, value in values.items() if name not in others}
    return {"_class_name": form.class_name, **form.fixed, **kept}


def architecture(cfg: UNetConfig) -> dict[str, Any]:
    """Options that two networks must share to share weights, in one form whichever way they were written."""
    return {name: value for name, value in to_json(cfg).items() if name != "sample_size"}


def _short(values: list[int]) -> int | list[int]:
    """One number where all are the same."""
    return values[0] if len(set(values)) == 1 else values
