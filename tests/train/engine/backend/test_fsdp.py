"""How FSDP2 takes a U-Net apart; that it trains like plain torch: test_zero_equality.py."""

from collections import Counter

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from conf.schema import Device, UNetRuntimeConfig
from conf.schema.networks import UNetConfig
from models.unet import UNet
from train.engine.backend.fsdp import mesh_of, place, shard
from train.engine.runtime import start


def test_each_large_block_of_a_unet_is_gathered_on_its_own() -> None:
    cfg = UNetConfig(
        sample_size=8,
        block_out_channels=[8, 16],
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        norm_num_groups=4,
        attention_head_dim=[2],
        cross_attention_dim=8,
    )
    network = UNet(cfg)
    runtime = start(UNetRuntimeConfig(device=Device.cpu))
    shard(network, mesh_of(runtime, 1), runtime, UNetRuntimeConfig())
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    gathered = Counter(type(part).__name__ for part in network.modules() if isinstance(part, FSDPModule))
    assert gathered == {
        "FSDPUNet": 1,  # what is left: first and last layers, time embedding, projections around the blocks
        "FSDPResBlock": 8,
        "FSDPTransformerBlock": 4,
        "FSDPUpsample": 1,
    }


def test_only_parameters_are_kept_from_the_device_by_offload() -> None:
    """A buffer on the CPU would meet activations on the GPU; here the meta device stands for that."""
    network = nn.BatchNorm1d(4)
    place(network, torch.device("meta"), torch.device("cpu"))
    assert {name: tensor.device.type for name, tensor in network.state_dict().items()} == {
        "weight": "cpu",
        "bias": "cpu",
        "running_mean": "meta",
        "running_var": "meta",
        "num_batches_tracked": "meta",
    }
    with torch.device("meta"):
        unmade = nn.Linear(2, 2)
    place(unmade, torch.device("cpu"), torch.device("cpu"))
    assert not any(parameter.is_meta for parameter in unmade.parameters())
