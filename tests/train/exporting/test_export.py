"""An exported run is what diffusers, transformers and our own loaders take, and draws the same images there."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    LDMPipeline,
    LDMSuperResolutionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_lcm
from safetensors.torch import load_file, save_file

from conf.entry import compose
from conf.errors import UserError
from conf.schema import ExportRun, Sampler, SamplingConfig
from conf.schema.networks import AutoencoderConfig, UNetConfig
from models.autoencoder import Autoencoder
from models.clip import Clip
from models.denoiser import Denoiser
from models.formats.clip import text_from_hugging_face, text_to_hugging_face
from models.formats.single_file import TEXT, read_single_file, read_unet_file
from models.pipeline import DiffusionPipeline, image_noise
from models.text import load_text_tower
from models.unet import UNet
from train.engine import trainer
from train.engine.runtime import Runtime
from train.exporting import export
from train.latents.provenance import UNetInfo, weights_digest
from train.sampling.load import load_exported, load_model
from train.training.distillation.stage import DistillStage

# of diffusers' scheduler, with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red planet", "Mountains with a sun, on a pink background!"]


def config(project: Any, folder: Path, *overrides: str) -> ExportRun:
    options = ["experiment=smoke", f"run_dir={project.folder}", f"output_dir={folder}"]
    return compose("export", ExportRun, [*options, *overrides])


def trained_as(project: Any, folder: Path, prediction: str, source: Path | None = None) -> Path:
    """The exported U-Net, told that it predicts something else: any network is a test of what is around it."""
    shutil.copytree(project.folder / "unet" / "export" if source is None else source, folder)
    info = json.loads((folder / "latentline.json").read_text())
    info["process"] |= {"prediction": prediction, "timestep_sampling": "uniform", "schedule": "scaled_linear"}
    (folder / "latentline.json").write_text(json.dumps(info))
    weights = {name: t.clone() for name, t in load_file(folder / "diffusion_pytorch_model.safetensors").items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")  # without the word of what they were trained for
    return folder


def noise_of(model: DiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    """What our pipeline begins with."""
    cfg = model.denoiser.unet.cfg
    shape = (cfg.out_channels, cfg.sample_size, cfg.sample_size)
    return torch.from_numpy(np.stack([image_noise(prompt, 0, 0, shape) for prompt in prompts]))


def untrained(project: Any, folder: Path, model: UNetConfig, conditions: dict[str, Any], **changed: Any) -> None:
    """An export of a network with random weights, none of them zero, that is told `conditions`."""
    info = UNetInfo.load(str(project.folder / "unet" / "export"))
    info = replace(info, conditions=conditions, **changed)
    torch.manual_seed(0)
    network = Denoiser(UNet(model), info.build_conditions(model, downscale=4)).requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(folder, network.state_dict(), info.metadata())
    info.save(folder)


def shown(images: torch.Tensor) -> np.ndarray:
    """[B, H, W, 3] in [0, 1]."""
    return ((images.permute(0, 2, 3, 1).numpy() + 1) / 2).clip(0, 1)


@pytest.mark.parametrize(
    ("prediction", "sampler", "steps", "scheduler"),
    [
        ("eps", "ddim", 8, EulerDiscreteScheduler),
        ("v", "ddim", 8, DPMSolverMultistepScheduler),
        ("x0", "ddim", 8, UniPCMultistepScheduler),
        ("flow", "dpmpp_2m", 27, FlowMatchEulerDiscreteScheduler),
    ],
)
def test_pipeline_of_diffusers_draws_our_images(
    project: Any, runtime: Runtime, tmp_path: Path, prediction: str, sampler: str, steps: int, scheduler: Any
) -> None:
    """And so do we, with the folder of the export and with what diffusers saves of it with another scheduler."""
    unet = trained_as(project, tmp_path / "unet", prediction)
    export.export_model(config(project, tmp_path / "export", f"unet={unet}"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "export", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    model = load_model(project.config("sample", "prompts=[x]", f"unet={unet}"), runtime.device)
    ours = model(PROMPTS, [0, 0], SamplingConfig(sampler=Sampler(sampler), steps=steps, guidance_scale=3.0))
    noise = noise_of(model, PROMPTS)
    side = ours.shape[-1]
    theirs = pipeline(
        PROMPTS, height=side, width=side, num_inference_steps=steps, guidance_scale=3.0, latents=noise, output_type="np"
    ).images
    mine = ((ours.permute(0, 2, 3, 1).numpy() + 1) / 2).clip(0, 1)
    assert np.abs(mine - theirs).max() <= 2 / 255
    assert mine.std() > 0.05
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "saved")
    for folder in ("export", "saved"):
        again = load_exported(str(tmp_path / folder), runtime.device)
        drawn = again(PROMPTS, [0, 0], SamplingConfig(sampler=Sampler(sampler), steps=steps, guidance_scale=3.0))
        assert (drawn - ours).abs().max() <= 4 / 255, folder  # in [-1, 1]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_pipeline_of_diffusers_draws_the_images_of_a_student(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prediction: str
) -> None:
    """With its guidance inside, and the same noise between the steps."""
    model = replace(project.config("unet").model, time_cond_proj_dim=256)
    student = {"method": "lcm", "guidance": [1.0, 4.0]}
    untrained(project, tmp_path / "plain", model, {"caption": {}}, student=student)
    unet = trained_as(project, tmp_path / "unet", prediction, tmp_path / "plain")
    export.export_model(config(project, tmp_path / "export", f"unet={unet}"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "export", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler) is LCMScheduler
    ours = load_model(project.config("sample", "prompts=[x]", f"unet={unet}"), runtime.device)
    sampling = SamplingConfig(sampler=Sampler.lcm, steps=4, guidance_scale=3.0)
    drawn = shown(ours(PROMPTS, [0, 0], sampling))
    shape = tuple(noise_of(ours, PROMPTS).shape[1:])
    fresh = (ours.noise(PROMPTS, [0, 0], [0, 0], shape, step) for step in (1, 2, 3))
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **named: next(fresh))
    theirs = pipeline(
        PROMPTS,
        height=drawn.shape[1],
        width=drawn.shape[2],
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=noise_of(ours, PROMPTS),
        output_type="np",
    ).images
    assert np.abs(drawn - theirs).max() <= 2 / 255
    assert np.abs(drawn - shown(ours(PROMPTS, [0, 0], replace(sampling, guidance_scale=1.0)))).max() > 4 / 255


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_pipeline_of_diffusers_draws_the_images_of_its_network_with_a_student_s_adapters(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prediction: str
) -> None:
    """LCM-LoRA: the teacher's own export, which learns of nothing but the file of adapters."""
    pytest.importorskip("peft")
    teacher, export_of = trained_as(project, tmp_path / "teacher", prediction), tmp_path / "student" / "export"
    lora = ["lora.rank=4", "guidance=[3,3]", "sampling.guidance_scale=1", f"output_dir={tmp_path}/student"]
    short = ["loop.samples=64", "loop.evaluate_every=64", "optim.lr=3e-2", "sample_prompts=0", "evaluation.samples=0"]
    cfg = project.config("distill", f"teacher={teacher}", *lora, *short)
    trainer.fit(DistillStage(cfg, runtime), cfg, runtime)
    export.export_model(config(project, tmp_path / "export", f"unet={teacher}"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "export", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    # its own choice of 50 levels, among which it takes steps, is of other timesteps than ours
    levels = {"original_inference_steps": pipeline.scheduler.config.num_train_timesteps}
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, **levels)

    ours = load_model(project.config("sample", "prompts=[x]", f"unet={teacher}", f"lora={export_of}"), runtime.device)
    drawn = shown(ours(PROMPTS, [0, 0], SamplingConfig(sampler=Sampler.lcm, steps=4, guidance_scale=1.0)))
    side, noise = drawn.shape[1], noise_of(ours, PROMPTS)

    def theirs() -> np.ndarray:
        fresh = (ours.noise(PROMPTS, [0, 0], [0, 0], tuple(noise.shape[1:]), step) for step in (1, 2, 3))
        monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **named: next(fresh))
        options = {"num_inference_steps": 4, "guidance_scale": 1.0, "latents": noise, "output_type": "np"}
        images: np.ndarray = pipeline(PROMPTS, height=side, width=side, **options).images
        return images

    assert np.abs(drawn - theirs()).max() > 8 / 255  # the teacher alone
    pipeline.load_lora_weights(export_of)
    assert np.abs(drawn - theirs()).max() <= 2 / 255


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_guidance_inside_is_guidance_inside_in_diffusers(
    project: Any, runtime: Runtime, tmp_path: Path, prediction: str
) -> None:
    """With the schedulers of any network, each at half the price."""
    model = replace(project.config("unet").model, time_cond_proj_dim=256)
    untrained(
        project, tmp_path / "plain", model, {"caption": {}}, student={"method": "guidance", "guidance": [1.0, 4.0]}
    )
    unet = trained_as(project, tmp_path / "unet", prediction, tmp_path / "plain")
    export.export_model(config(project, tmp_path / "export", f"unet={unet}"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "export", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    ours = load_model(project.config("sample", "prompts=[x]", f"unet={unet}"), runtime.device)
    drawn = shown(ours(PROMPTS, [0, 0], SamplingConfig(sampler=Sampler.ddim, steps=4, guidance_scale=3.0)))
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise_of(ours, PROMPTS), "output_type": "np"}
    theirs = pipeline(PROMPTS, height=drawn.shape[1], width=drawn.shape[2], **options).images
    assert np.abs(drawn - theirs).max() <= 2 / 255


def test_student_of_a_flow_has_no_pipeline(project: Any, tmp_path: Path) -> None:
    model = replace(project.config("unet").model, time_cond_proj_dim=256)
    student = {"method": "lcm", "guidance": [1.0, 4.0]}
    untrained(project, tmp_path / "unet", model, {"caption": {}}, student=student)
    with pytest.raises(UserError, match="draws with no student of a flow"):
        export.export_model(config(project, tmp_path / "export", f"unet={tmp_path / 'unet'}"))


def test_tokens_and_text_states_are_those_of_the_trained_tower(project: Any, tmp_path: Path) -> None:
    export.export_model(config(project, tmp_path / "export"))
    clip = Clip.from_pretrained(project.folder / "clip" / "export").eval()
    tower = load_text_tower(tmp_path / "export" / "text_encoder").eval()
    texts = ["", *PROMPTS, "it's  100% naïve — very long " * 30]
    tokens, expected = tower.tokenize(texts), clip.tokenize(texts)
    end = (expected == clip.tokenizer.eot_token_id).int()
    padding = end.cumsum(1) > end  # all behind it
    assert torch.equal(tokens, expected.where(~padding, clip.tokenizer.vocab_size)) and not expected[padding].any()
    with torch.no_grad():
        torch.testing.assert_close(tower.text_states(tokens), clip.text_states(expected))


def test_text_tower_comes_back_bit_by_bit(project: Any) -> None:
    clip = Clip.from_pretrained(project.folder / "clip" / "export")
    weights = clip.network.state_dict()
    assert clip.config.text_layers == 1
    back = text_from_hugging_face(text_to_hugging_face(weights, 1), 1)
    assert len(back) == 4 + 12 and all(torch.equal(tensor, weights[name]) for name, tensor in back.items())


def test_one_file_with_the_names_of_compvis(project: Any, tmp_path: Path) -> None:
    export.export_model(config(project, tmp_path / "whole", "format=compvis", "dtype=fp16"))
    path = tmp_path / "whole.safetensors"
    exported = UNet.from_pretrained(project.folder / "unet" / "export")
    found = read_unet_file(path, exported.cfg)
    for name, tensor in exported.state_dict().items():
        assert torch.equal(found[name], tensor.half()), name
    assert f"{TEXT}text_model.final_layer_norm.weight" in read_single_file(path)


def test_last_export_stays_when_the_next_one_fails(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    export.export_model(config(project, folder))
    before = (folder / "model_index.json").read_text()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "tokenizer_files", full)
    with pytest.raises(OSError, match="No space left"):
        export.export_model(config(project, folder))
    assert (folder / "model_index.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert json.loads(before)["vae"] == ["diffusers", "AutoencoderKL"]


def test_a_folder_with_anything_else_in_it_is_left_alone(project: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"output_dir=.*run: holds something else than an export"):
        export.export_model(config(project, tmp_path / "run"))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_networks_that_were_not_trained_together_are_refused(project: Any, tmp_path: Path) -> None:
    other = tmp_path / "clip"
    clip = Clip.from_pretrained(project.folder / "clip" / "export")
    with torch.no_grad():
        clip.network.ln_final.bias.add_(1)
    clip.save_pretrained(other)
    with pytest.raises(UserError, match=r"clip=.*: not the one that unet=.* was trained with"):
        export.export_model(config(project, tmp_path / "export", f"clip={other}"))


UNCONDITIONAL = UNetConfig(
    sample_size=8,
    block_out_channels=[8, 16],
    layers_per_block=1,
    down_block_types=["DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "UpBlock2D"],
    cross_attention_dim=None,
    head_channels=8,
    norm_num_groups=4,
)
STEPS = SamplingConfig(sampler=Sampler.dpmpp_2m, steps=8, guidance_scale=1.0)


def test_unconditional_pipeline_of_diffusers_draws_our_images(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained(project, tmp_path / "unet", UNCONDITIONAL, {}, clip=None)
    export.export_model(config(project, tmp_path / "export", f"unet={tmp_path}/unet"))
    pipeline = LDMPipeline.from_pretrained(tmp_path / "export", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    model = load_model(project.config("sample", "prompts=[x]", f"unet={tmp_path}/unet"), runtime.device)
    ours = model(["a", "b"], [0, 0], STEPS)
    monkeypatch.setattr(
        sys.modules[LDMPipeline.__module__], "randn_tensor", lambda *_, **__: noise_of(model, ["a", "b"])
    )
    theirs = pipeline(batch_size=2, num_inference_steps=8, output_type="np").images
    assert np.abs(shown(ours) - theirs).max() <= 2 / 255 and theirs.std() > 0.05


def test_super_resolution_pipeline_of_diffusers_draws_our_images(
    project: Any, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That pipeline wants latents of three channels, so an autoencoder of its own."""
    torch.manual_seed(0)
    cfg = AutoencoderConfig(latent_channels=3, block_out_channels=[8, 8, 8], layers_per_block=1, norm_num_groups=4)
    Autoencoder(cfg).save_pretrained(tmp_path / "autoencoder")
    given = [f"unet={tmp_path}/unet", f"autoencoder={tmp_path}/autoencoder"]
    known = {"latent_mean": [0.1, 0.2, 0.3], "latent_std": [0.5, 1.0, 2.0], "clip": None}
    known["autoencoder"] = weights_digest(str(tmp_path / "autoencoder"))
    model = replace(UNCONDITIONAL, in_channels=6, out_channels=3)
    untrained(project, tmp_path / "unet", model, {"low_resolution": {"factor": 4}}, **known)
    export.export_model(config(project, tmp_path / "export", *given))
    pipeline = LDMSuperResolutionPipeline.from_pretrained(tmp_path / "export", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    own = load_model(project.config("sample", "prompts=[x]", *given), runtime.device)
    low = torch.rand(2, 3, 8, 8) * 2 - 1
    ours = own(["a", "b"], [0, 0], STEPS, inputs={"low": low})
    place = sys.modules[LDMSuperResolutionPipeline.__module__]
    monkeypatch.setattr(place, "randn_tensor", lambda *_, **__: noise_of(own, ["a", "b"]))
    theirs = pipeline(low, num_inference_steps=8, output_type="np").images
    assert np.abs(shown(ours) - theirs).max() <= 3 / 255 and theirs.std() > 0.01
    noisy = {"low_resolution": {"factor": 4, "noise_levels": 100}}
    untrained(project, tmp_path / "unet", model, noisy, **known)
    with pytest.raises(UserError, match="LDMSuperResolutionPipeline knows no noise levels"):
        export.export_model(config(project, tmp_path / "export", *given))


def test_inpainting_pipeline_of_diffusers_draws_our_images(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    trained = UNet.from_pretrained(project.folder / "unet" / "export").cfg
    untrained(project, tmp_path / "unet", replace(trained, in_channels=9), {"caption": {}, "masked": {}})
    export.export_model(config(project, tmp_path / "export", f"unet={tmp_path}/unet"))
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "export", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    model = load_model(project.config("sample", "prompts=[x]", f"unet={tmp_path}/unet"), runtime.device)
    images, masks = torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, :16], masks[1, :, 8:] = True, True
    means = model.latents(images * ~masks[:, None])
    inputs = {"mask": masks, "masked": means}
    ours = model(PROMPTS, [0, 0], replace(STEPS, guidance_scale=3.0), inputs=inputs)
    theirs = pipeline(
        PROMPTS,
        image=(images + 1) / 2,
        mask_image=masks[:, None].float(),
        masked_image_latents=(means - model.latent_mean) / model.latent_std,
        height=32,
        width=32,
        num_inference_steps=8,
        guidance_scale=3.0,
        latents=noise_of(model, PROMPTS),
        output_type="np",
    ).images
    assert np.abs(shown(ours) - theirs).max() <= 2 / 255 and theirs.std() > 0.05


def test_network_without_a_pipeline_in_diffusers_is_refused(project: Any, tmp_path: Path) -> None:
    told = {"class_vector": {"classes": 3}}
    untrained(project, tmp_path / "unet", UNCONDITIONAL, told, clip=None)
    with pytest.raises(UserError, match=r"diffusers has no pipeline for conditions class_vector; load the U-Net"):
        export.export_model(config(project, tmp_path / "export", f"unet={tmp_path}/unet"))


def test_autoencoder_with_a_codebook_is_refused(project: Any, tmp_path: Path) -> None:
    cfg = AutoencoderConfig(block_out_channels=[8, 8, 8], layers_per_block=1, norm_num_groups=4, num_vq_embeddings=32)
    Autoencoder(cfg).save_pretrained(tmp_path / "autoencoder")
    known = {"clip": None, "autoencoder": weights_digest(str(tmp_path / "autoencoder"))}
    untrained(project, tmp_path / "unet", UNCONDITIONAL, {}, **known)
    given = [f"unet={tmp_path}/unet", f"autoencoder={tmp_path}/autoencoder"]
    with pytest.raises(UserError, match="diffusers' pipeline takes KL autoencoders only"):
        export.export_model(config(project, tmp_path / "export", *given))
