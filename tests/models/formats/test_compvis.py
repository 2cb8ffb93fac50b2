"""The names of CompVis: those of its own code, and a checkpoint that comes back bit by bit."""

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema.networks import AutoencoderConfig, UNetConfig
from models.autoencoder import Autoencoder
from models.formats.compvis import autoencoder_pairs, from_compvis, to_compvis, unet_pairs
from models.formats.single_file import load_autoencoder_file, read_single_file, read_unet_file, write_single_file
from models.unet import UNet

OWN, UP_OWN = "AttnDownBlock2D", "AttnUpBlock2D"
SMALL = UNetConfig(block_out_channels=[8, 16, 16, 16], attention_head_dim=[2], cross_attention_dim=6, norm_num_groups=4)
UNETS = {
    "sd1": SMALL,
    "sd2": replace(SMALL, use_linear_projection=True),
    "sdxl": replace(
        SMALL,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        transformer_layers_per_block=[1, 2, 2, 3],
    ),
    "unconditional": replace(
        SMALL,
        cross_attention_dim=None,
        down_block_types=["DownBlock2D", OWN, OWN, OWN],
        up_block_types=[UP_OWN, UP_OWN, UP_OWN, "UpBlock2D"],
        attention_head_dim=[4],
    ),
    "resizes in residual blocks": replace(
        SMALL,
        cross_attention_dim=None,
        down_block_types=[OWN] * 4,
        up_block_types=[UP_OWN] * 4,
        downsample_type="resnet",
        upsample_type="resnet",
        num_class_embeds=3,
    ),
}
TINY = AutoencoderConfig(block_out_channels=[8, 16, 16], norm_num_groups=4)
AUTOENCODERS = {
    "kl": TINY,
    "attending": replace(TINY, attention_levels=[2]),
    "vq": replace(TINY, num_vq_embeddings=16, latent_channels=3, mid_block_add_attention=False),
}


def digest(weights: Mapping[str, Tensor]) -> tuple[int, str]:
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in weights.items())
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_names_of_stable_diffusion_1_are_those_of_its_code() -> None:
    """Number and digest of the names and shapes that the modules of CompVis/stable-diffusion have."""
    with torch.device("meta"):
        unet, autoencoder = UNet(UNetConfig()), Autoencoder(AutoencoderConfig())
    theirs = to_compvis(unet_pairs(unet.cfg), unet.state_dict())
    assert digest(theirs) == (686, "b0828585f6719ebf3393cd4f537c8b83e90dbddbb12e34b197798bc05c43a9ca")
    theirs = to_compvis(autoencoder_pairs(autoencoder.cfg), autoencoder.state_dict())
    assert digest(theirs) == (248, "5c5821b036193b0effb3adf049e2c1c81c13c11351273652c09fab3be5aa1501")


def test_queries_keys_and_values_lie_head_by_head() -> None:
    """As the paper's attention without text splits them: all of one head, then all of the next."""
    network = UNet(UNETS["unconditional"])  # 4 heads, at the bottom of 16 / 4 = 4 channels
    theirs = to_compvis(unet_pairs(network.cfg), network.state_dict())
    attention = network.mid_block.attentions[0]
    whole = theirs["middle_block.1.qkv.weight"]
    assert whole.shape == (48, 16, 1)
    assert torch.equal(whole[:4, :, 0], attention.to_q.weight[:4])  # head 0: queries, keys, values
    assert torch.equal(whole[4:8, :, 0], attention.to_k.weight[:4])
    assert torch.equal(whole[12:16, :, 0], attention.to_q.weight[4:8])  # head 1


def networks() -> list[tuple[str, nn.Module, list]]:
    made: list[tuple[str, nn.Module, list]] = []
    for name, cfg in UNETS.items():
        made.append((name, UNet(cfg), unet_pairs(cfg)))
    for name, config in AUTOENCODERS.items():
        made.append((name, Autoencoder(config), autoencoder_pairs(config)))
    return made


def test_weights_come_back_bit_by_bit() -> None:
    for name, network, pairs in networks():
        ours = {key: torch.randn_like(value) for key, value in network.state_dict().items()}
        theirs = to_compvis(pairs, ours)
        assert sum(tensor.numel() for tensor in theirs.values()) == sum(tensor.numel() for tensor in ours.values())
        back = from_compvis(name, pairs, theirs, network.state_dict())
        assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours), name
        again = to_compvis(pairs, back)
        assert all(torch.equal(again[key], theirs[key]) for key in theirs), name


def whole_checkpoint(folder: Path) -> tuple[Path, UNet, Autoencoder]:
    """With the parts of the original's beside the networks."""
    unet, autoencoder = UNet(SMALL), Autoencoder(TINY)
    with torch.no_grad():
        for parameter in (*unet.parameters(), *autoencoder.parameters()):
            parameter.add_(torch.randn_like(parameter))
    path = folder / "whole.safetensors"
    write_single_file(path, unet, autoencoder, {"text_model.final_layer_norm.bias": torch.ones(2)})
    extra = {"betas": torch.ones(3), "model_ema.decay": torch.ones(1), "scale_factor": torch.tensor(0.18)}
    save_file({**load_file(path), **extra}, path)
    return path, unet, autoencoder


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_networks_of_a_whole_checkpoint(tmp_path: Path, suffix: str) -> None:
    path, unet, autoencoder = whole_checkpoint(tmp_path)
    if suffix == ".ckpt":
        torch.save({"state_dict": load_file(path), "global_step": 7}, tmp_path / "whole.ckpt")
        path = tmp_path / "whole.ckpt"
    found = read_unet_file(path, SMALL)
    assert found.keys() == unet.state_dict().keys()
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in found.items())
    images = load_autoencoder_file(path, TINY)
    assert all(torch.equal(value, autoencoder.state_dict()[name]) for name, value in images.state_dict().items())


def test_autoencoder_has_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    network = Autoencoder(TINY)
    theirs = to_compvis(autoencoder_pairs(TINY), network.state_dict())
    save_file({**theirs, "loss.logvar": torch.zeros(1)}, tmp_path / "own.safetensors")
    loaded = load_autoencoder_file(tmp_path / "own.safetensors", TINY)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_every_weight_is_used_or_named(tmp_path: Path) -> None:
    path, _, _ = whole_checkpoint(tmp_path)
    weights = load_file(path)
    prefix = "model.diffusion_model."
    shortened = {name: value for name, value in weights.items() if name != f"{prefix}out.2.bias"}
    save_file(shortened | {f"{prefix}new.weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"missing: out\.2\.bias; surplus: new\.weight"):
        read_unet_file(path, SMALL)
    save_file(weights | {"control_model.x": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"of no known part of a checkpoint: control_model\.x"):
        read_unet_file(path, SMALL)
    save_file(weights, path)
    with pytest.raises(UserError, match=r"misshapen: .*attn2\.to_k\.weight \[8, 6\] instead of \[8, 5\]"):
        read_unet_file(path, replace(SMALL, cross_attention_dim=5))


class Code:
    """What a checkpoint must not hold."""

    def __reduce__(self) -> tuple:
        return (print, ("code ran",))


def test_files_that_are_no_weights_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "code.ckpt").write_bytes(pickle.dumps({"state_dict": Code()}, protocol=2))
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Code()}, tmp_path / "callbacks.ckpt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 40)
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 torn")
    torch.save([torch.ones(1)], tmp_path / "list.ckpt")
    for name, message in {
        "code.ckpt": "more than weights",
        "callbacks.ckpt": "more than weights",
        "torn.safetensors": "not a readable safetensors file",
        "torn.ckpt": "more than weights, or is broken",
        "list.ckpt": "no state dict",
        "nowhere.ckpt": "is missing",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            read_single_file(tmp_path / name)
        assert "\n" not in str(error.value)
    assert "code ran" not in capsys.readouterr().out
