"""An exported run is what diffusers, transformers and our own loaders take, and draws the same pictures there."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from conf.entry import compose
from conf.errors import UserError
from conf.schema import ExportRun, Sampler, SamplingConfig
from models.clip import Clip
from models.clip_format import text_from_hugging_face, text_to_hugging_face
from models.pipeline import picture_noise
from models.single_file import TEXT, load_unet_file, read_single_file
from models.text import load_text_tower
from models.unet import UNet
from train.engine.runtime import Runtime
from train.evaluation import sampling
from train.stages import export

PROMPTS = ["a red planet", "Mountains with a sun, on a pink background!"]


def config(project: Any, folder: Path, *overrides: str) -> ExportRun:
    options = ["experiment=smoke", f"run_dir={project.folder}", f"output_dir={folder}"]
    return compose("export", ExportRun, [*options, *overrides])


def trained_as(project: Any, folder: Path, prediction: str) -> Path:
    """The exported U-Net, told that it predicts something else: any network is a test of what is around it."""
    shutil.copytree(project.folder / "unet" / "export", folder)
    info = json.loads((folder / "latentline.json").read_text())
    info["process"] |= {"prediction": prediction, "timestep_sampling": "uniform", "schedule": "scaled_linear"}
    (folder / "latentline.json").write_text(json.dumps(info))
    return folder


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler, numpy 2
@pytest.mark.parametrize(
    ("prediction", "sampler", "steps"),
    [("eps", "ddim", 8), ("v", "ddim", 8), ("x0", "ddim", 8), ("flow", "dpmpp_2m", 27)],
)
def test_pipeline_of_diffusers_draws_our_pictures(
    project: Any, runtime: Runtime, tmp_path: Path, prediction: str, sampler: str, steps: int
) -> None:
    unet = trained_as(project, tmp_path / "unet", prediction)
    export.run(config(project, tmp_path / "export", f"unet={unet}"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "export", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    model = sampling.load_model(project.config("sample", "prompts=[x]", f"unet={unet}"), runtime.device)
    ours = model(PROMPTS, [0, 0], SamplingConfig(sampler=Sampler(sampler), steps=steps, guidance_scale=3.0))
    shape = (model.unet.cfg.in_channels, model.unet.cfg.sample_size, model.unet.cfg.sample_size)
    noise = torch.from_numpy(np.stack([picture_noise(prompt, 0, 0, shape) for prompt in PROMPTS]))
    side = ours.shape[-1]
    theirs = pipeline(
        PROMPTS, height=side, width=side, num_inference_steps=steps, guidance_scale=3.0, latents=noise, output_type="np"
    ).images
    mine = ((ours.permute(0, 2, 3, 1).numpy() + 1) / 2).clip(0, 1)
    assert np.abs(mine - theirs).max() <= 2 / 255
    assert mine.std() > 0.05


def test_tokens_and_text_states_are_those_of_the_trained_tower(project: Any, tmp_path: Path) -> None:
    export.run(config(project, tmp_path / "export"))
    clip = Clip.from_pretrained(project.folder / "clip" / "export").eval()
    tower = load_text_tower(tmp_path / "export" / "text_encoder").eval()
    texts = ["", *PROMPTS, "it's  100% naïve — very long " * 30]
    assert torch.equal(tower.tokenize(texts), clip.tokenize(texts))
    with torch.no_grad():
        torch.testing.assert_close(tower.text_states(clip.tokenize(texts)), clip.text_states(clip.tokenize(texts)))


def test_text_tower_comes_back_bit_by_bit(project: Any) -> None:
    clip = Clip.from_pretrained(project.folder / "clip" / "export")
    weights = clip.network.state_dict()
    assert clip.config.text_layers == 1
    back = text_from_hugging_face(text_to_hugging_face(weights, 1), 1)
    assert len(back) == 4 + 12 and all(torch.equal(tensor, weights[name]) for name, tensor in back.items())


def test_one_file_with_the_names_of_compvis(project: Any, tmp_path: Path) -> None:
    export.run(config(project, tmp_path / "whole", "format=compvis", "dtype=fp16"))
    path = tmp_path / "whole.safetensors"
    exported = UNet.from_pretrained(project.folder / "unet" / "export")
    loaded = load_unet_file(path, exported.cfg)
    for name, tensor in exported.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    assert f"{TEXT}text_model.final_layer_norm.weight" in read_single_file(path)


def test_last_export_stays_when_the_next_one_fails(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    export.run(config(project, folder))
    before = (folder / "model_index.json").read_text()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "tokenizer_files", full)
    with pytest.raises(OSError, match="No space left"):
        export.run(config(project, folder))
    assert (folder / "model_index.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert json.loads(before)["vae"] == ["diffusers", "AutoencoderKL"]


def test_a_folder_with_anything_else_in_it_is_left_alone(project: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"output_dir=.*run: holds something else than an export"):
        export.run(config(project, tmp_path / "run"))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_networks_that_were_not_trained_together_are_refused(project: Any, tmp_path: Path) -> None:
    other = tmp_path / "clip"
    clip = Clip.from_pretrained(project.folder / "clip" / "export")
    with torch.no_grad():
        clip.network.ln_final.bias.add_(1)
    clip.save_pretrained(other)
    with pytest.raises(UserError, match=r"clip=.*: not the one that unet=.* was trained with"):
        export.run(config(project, tmp_path / "export", f"clip={other}"))
