"""A pipeline of tiny networks with random weights, for tests of what is drawn."""

from typing import Any

import torch

from conf.networks import AutoencoderConfig, UNetConfig
from conf.schema import ConditionsConfig, Prediction, ProcessConfig
from models.autoencoder import Autoencoder
from models.conditions import Conditions, Surroundings
from models.denoiser import Denoiser
from models.pipeline import DiffusionPipeline
from models.process import Process
from models.unet import UNet

WIDTH = 16  # of the text states


def tiny_pipeline(
    tower: Any,
    prediction: Prediction = Prediction.flow,
    *,
    perturbed: float = 0.1,
    mean: tuple[float, ...] = (0, 0, 0, 0),
    std: tuple[float, ...] = (1, 1, 1, 1),
    **unet: Any,
) -> DiffusionPipeline:
    """Pictures of 16 x 16 pixels from latents of 8 x 8, always of the same weights.

    Args:
        tower: for text states of WIDTH channels.
        perturbed: deviation of what is added to the weights of the U-Net: no layer that starts at zero may hide a
            dependence.
        unet: its blocks and their widths.
    """
    torch.manual_seed(0)
    network = UNet(
        UNetConfig(
            sample_size=8,
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=[2],
            norm_num_groups=8,
            **unet,
        )
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(perturbed * torch.randn_like(parameter))
    autoencoder = Autoencoder(
        AutoencoderConfig(
            block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
        )
    )
    means, deviations = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    around = Surroundings.of(network.cfg, downscale=2, latent_mean=means, latent_std=deviations)
    denoiser = Denoiser(network.eval(), Conditions(ConditionsConfig(), around))
    process = Process(ProcessConfig(prediction=prediction))
    return DiffusionPipeline(denoiser, autoencoder.eval(), tower, process, means, deviations)
