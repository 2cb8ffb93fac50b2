"""DDIM sampling with guidance: our U-Net and loop against diffusers' U-Net and DDIMScheduler on the same weights."""

import tempfile

import torch
from _compare import Comparison, main, rate
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from conf.networks import UNetConfig
from conf.schema import Prediction, ProcessConfig
from models.guidance import classifier_free
from models.process import Process
from models.samplers import sample_ddim
from models.unet import UNet

PICTURES, STEPS, GUIDANCE_SCALE, LENGTH, WIDTH = 4, 20, 3.0, 32, 128
CONFIG = UNetConfig(
    sample_size=8,
    block_out_channels=[64, 128],
    layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    cross_attention_dim=WIDTH,
    attention_head_dim=[4],
    norm_num_groups=16,
)


def ours(unet: UNet, process: Process, noise: Tensor, context: Tensor, null_context: Tensor) -> Tensor:
    """Latents [B, C, h, w] by our process, guidance and sampler."""
    sigmas = process.sigmas(STEPS)
    denoise = process.denoiser(classifier_free(unet, context, null_context, GUIDANCE_SCALE, unet.keys_values))
    return sample_ddim(denoise, process.initial(noise, float(sigmas[0])), sigmas)


def peer(unet: UNet2DConditionModel, scheduler: DDIMScheduler, x: Tensor, context: Tensor, null: Tensor) -> Tensor:
    """The loop of diffusers' text-to-image pipelines."""
    scheduler.set_timesteps(STEPS)
    contexts = torch.cat([null.expand_as(context), context])
    for timestep in scheduler.timesteps:
        doubled = scheduler.scale_model_input(torch.cat([x, x]), timestep)
        uncond, cond = unet(doubled, timestep, encoder_hidden_states=contexts, return_dict=False)[0].chunk(2)
        x = scheduler.step(uncond + GUIDANCE_SCALE * (cond - uncond), timestep, x, return_dict=False)[0]
    return x


@torch.inference_mode()
def run() -> None:
    """Hold the results against each other, then the times."""
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval()
    for parameter in unet.parameters():  # layers that start at zero would make every comparison equal
        parameter.add_(0.02 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(folder)
        peer_unet = UNet2DConditionModel.from_pretrained(folder).eval()
    process = Process(ProcessConfig(prediction=Prediction.eps))
    scheduler = DDIMScheduler.from_config(process.scheduler_config())
    noise = torch.randn(PICTURES, CONFIG.in_channels, CONFIG.sample_size, CONFIG.sample_size)
    context = torch.randn(PICTURES, LENGTH, WIDTH)
    null_context = torch.zeros(1, LENGTH, WIDTH)
    mine = ours(unet, process, noise, context, null_context)
    theirs = peer(peer_unet, scheduler, noise, context, null_context)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    main(
        [
            Comparison(
                name=f"ddim_{STEPS}_steps_guided",
                ours=rate(PICTURES, lambda: ours(unet, process, noise, context, null_context)),
                peer=rate(PICTURES, lambda: peer(peer_unet, scheduler, noise, context, null_context)),
                unit="images/s",
                bar=1.0,
                pairs=9,
            )
        ]
    )


if __name__ == "__main__":
    run()
