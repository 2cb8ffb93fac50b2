"""Guidance inside a network of many steps: what it learns, and that solvers draw with it."""

from typing import Any

import pytest
import torch

from conf.entry import compose
from conf.errors import UserError
from conf.schema import ExportRun, Sampler, SamplingConfig
from data.loader import batches
from models.diffusion.samplers import Student
from train.engine import trainer
from train.engine.runtime import Runtime
from train.exporting import export
from train.latents.provenance import UNetInfo
from train.sampling.load import load_model
from train.training.distillation.stage import DistillStage

LEARNT = Student("guidance", [1.0, 4.0])
SOLVED = ["sampling.sampler=unipc"]


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_before_it_has_learnt_anything_it_lacks_what_guidance_adds(
    project: Any, runtime: Runtime, scale: float
) -> None:
    """F = F_teacher, and so the loss is that of (w - 1) (F_teacher(x_t, t) - F_teacher(x_t, t, without))."""
    stage = DistillStage(
        project.config(
            "distill", "method=guidance", f"guidance=[{scale},{scale}]", *SOLVED, "sampling.guidance_scale=1"
        ),
        runtime,
    )
    drawn = stage.drawn(next(batches(stage.dataset, 8, 8, 0, 1, 0, 0)), seed=0)
    timesteps = stage.everywhere.draw_timesteps(drawn.rng.uniform("level"))
    x_t, teacher = stage.process.add_noise(drawn.x0, drawn.noise, timesteps), stage.teacher
    assert teacher is not None
    with torch.no_grad():
        added = [
            teacher.predict(x_t, timesteps, teacher.conditions(inputs))
            for inputs in (drawn.inputs, teacher.conditions.null(drawn.inputs))
        ]
        losses = stage.lesson(stage.unet, drawn).losses
    expected = ((scale - 1) * (added[0] - added[1])).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    assert losses.min() > 0


def test_solvers_draw_with_the_scale_that_it_is_told(project: Any, runtime: Runtime, tmp_path: Any) -> None:
    short = ["loop.samples=64", "loop.evaluate_every=64", "sample_prompts=2", "evaluation.samples=0", "optim.lr=1e-3"]
    cfg = project.config("distill", "method=guidance", f"output_dir={tmp_path}", *SOLVED, *short)
    trainer.fit(DistillStage(cfg, runtime), cfg, runtime)
    assert UNetInfo.load(f"{tmp_path}/export").student == {"method": "guidance", "guidance": [1.0, 4.0]}
    model = load_model(project.config("sample", f"unet={tmp_path}/export", "prompts=[x]", "guidance_scale=2"), "cpu")
    options = [f"run_dir={project.folder}", f"output_dir={tmp_path}/out", f"unet={tmp_path}/export", "format=compvis"]
    with pytest.raises(UserError, match=r"^format=compvis: has no place for the guidance that unet="):
        export.export_model(compose("export", ExportRun, options))
    images = [
        model(["a moon"], [0], SamplingConfig(sampler=sampler, steps=10, guidance_scale=scale))
        for sampler in (Sampler.unipc, Sampler.ddim)
        for scale in (1.0, 3.0)
    ]
    assert all(image.isfinite().all() for image in images) and not torch.equal(images[0], images[1])


@pytest.mark.parametrize("sampler", [Sampler.lcm, Sampler.mean_flow])
def test_it_does_not_know_where_paths_end(sampler: Sampler) -> None:
    LEARNT.check(SamplingConfig(sampler=Sampler.unipc, steps=50, guidance_scale=2.0))
    with pytest.raises(UserError, match=rf"sampler={sampler.value}: .*\(guidance\), for solvers; set another one"):
        LEARNT.check(SamplingConfig(sampler=sampler, steps=4, guidance_scale=2.0))
    with pytest.raises(UserError, match="which learnt scales from 1 to 4"):
        LEARNT.check(SamplingConfig(sampler=Sampler.unipc, guidance_scale=7.5))


def test_nobody_judges_it(project: Any) -> None:
    with pytest.raises(UserError, match=r"adversarial_weight=0\.2: method=guidance is for solvers"):
        project.config("distill", "method=guidance", "adversarial_weight=0.2")
