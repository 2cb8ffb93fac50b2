"""The training of a student: what it is made of, whatever the batch, the rank or the backend, and what it may draw."""

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from first_step import require_step_of_plain_torch
from safetensors.torch import load_file, save_file

from conf.errors import UserError
from conf.schema import SampleRun
from data.loader import batches
from models.diffusion.process import SCHEDULER
from models.formats.weights import WEIGHTS_NAME
from models.unet import UNet
from train.engine import runtime as runtime_module
from train.engine import trainer
from train.engine.runtime import Runtime
from train.latents.provenance import INFO, UNetInfo
from train.sampling.load import load_model
from train.sampling.run import generate_images
from train.training.distillation.stage import DistillStage, as_training
from train.training.unet import UNetStage
from waits import Waits

SHORT = ["loop.samples=96", "loop.log_every=16", "loop.evaluate_every=96", "loop.checkpoint_every=48"]


def make(project: Any, runtime: Runtime, *overrides: str) -> DistillStage:
    return DistillStage(project.config("distill", *overrides), runtime)


def losses_of(stage: DistillStage, batch: dict[str, Any]) -> torch.Tensor:
    return stage.lesson(stage.unet, stage.drawn(batch, seed=0)).losses


@pytest.fixture(scope="module")
def student(project: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A student of the project's U-Net: its folder and the configuration that draws with it."""
    folder = tmp_path_factory.mktemp("student")
    cfg = project.config("distill", f"output_dir={folder}", *SHORT)
    runtime = runtime_module.start(cfg.runtime)
    trainer.fit(DistillStage(cfg, runtime), cfg, runtime)
    drawing = [f"unet={folder}/export", "prompts=[a moon]", "sampler=lcm", "steps=4", "guidance_scale=2"]
    return folder, project.config("sample", *drawing)


def drawn(cfg: SampleRun, runtime: Runtime) -> torch.Tensor:
    return generate_images(load_model(cfg, runtime.device), cfg, [{"caption": "a moon"}], [0]).images


def test_student_says_what_it_is_and_draws_in_few_steps(student: Any, runtime: Runtime) -> None:
    folder, cfg = student
    assert UNetInfo.load(f"{folder}/export").student == {"method": "lcm", "guidance": [1.0, 4.0]}
    assert UNet.from_pretrained(f"{folder}/export").cfg.time_cond_proj_dim == 256
    assert (folder / "samples" / "prompts-000000000096.png").is_file()
    metrics = json.loads((folder / "DONE").read_text())["metrics"]
    assert metrics["eval/loss"] > 0
    images = {steps: drawn(replace(cfg, steps=steps), runtime) for steps in (1, 2, 4)}
    assert all(image.shape == (1, 3, 32, 32) and image.isfinite().all() for image in images.values())
    assert not torch.equal(images[1], images[4])


def test_scale_of_guidance_is_told_and_not_computed(student: Any, runtime: Runtime) -> None:
    _, cfg = student
    model, calls = load_model(cfg, runtime.device), list[int]()
    model.denoiser.unet.conv_in.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    assert not torch.equal(drawn(cfg, runtime), drawn(replace(cfg, guidance_scale=4.0), runtime))
    model(["a moon"], [0], cfg)
    assert calls == [1, 1, 1, 1]  # one row each: none without the caption


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 50}, "set sampler=lcm and steps=1 to 8"),
        ({"guidance_scale": 7.5}, "which learnt scales from 1 to 4"),
        ({"negative_prompt": "a cat"}, "whose guidance is inside"),
    ],
)
def test_what_a_student_cannot_follow_is_one_line(
    student: Any, runtime: Runtime, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        drawn(replace(student[1], **options), runtime)


def test_prompts_are_not_joined_where_guidance_is_inside(student: Any, runtime: Runtime) -> None:
    cfg = replace(student[1], prompt_syntax=True)
    with pytest.raises(UserError, match=r"^AND: joins what each prompt adds to none"):
        load_model(cfg, runtime.device)(["a moon AND a sun"], [0], cfg)
    weighted = load_model(cfg, runtime.device)(["a (moon:0.5)"], [0], cfg)
    assert weighted.isfinite().all()


def test_plain_training_does_not_tell_a_scale(project: Any) -> None:
    with pytest.raises(UserError, match=r"model\.time_cond_proj_dim=256: the network can, but this training"):
        project.config("unet", "model.time_cond_proj_dim=256")


def test_it_begins_as_its_teacher_whatever_scale_it_is_told(project: Any, runtime: Runtime) -> None:
    stage = make(project, runtime)
    assert stage.teacher is not None
    batch = stage.dataset.batch(range(4))
    inputs, x, t = stage.inputs(batch), torch.randn(4, 4, 8, 8), torch.tensor([10.0, 300.0, 600.0, 990.0])
    with torch.no_grad():
        told = stage.network(x, t, inputs | {"guidance": torch.tensor([1.0, 2.0, 3.0, 4.0])})
        assert torch.equal(told, stage.teacher(x, t, inputs))


def test_adapters_alone_make_the_teacher_a_student(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    options = ["lora.rank=4", "guidance=[3,3]", "sampling.guidance_scale=1", f"output_dir={tmp_path}", *SHORT]
    cfg = project.config("distill", *options)
    trainer.fit(DistillStage(cfg, runtime), cfg, runtime)
    drawing = ["prompts=[a moon]", "sampler=lcm", "steps=4", "guidance_scale=1"]
    whole = project.config("sample", f"unet={tmp_path}/export", *drawing)
    alone = project.config("sample", f"lora={tmp_path}/export", *drawing)
    assert UNetInfo.load(f"{tmp_path}/export").student == {"method": "lcm", "guidance": None}
    torch.testing.assert_close(drawn(whole, runtime), drawn(alone, runtime), rtol=0, atol=1e-4)
    for cfg in (whole, alone):
        with pytest.raises(UserError, match="guided as its teacher was; set guidance_scale=1"):
            drawn(replace(cfg, guidance_scale=3.0), runtime)
        with pytest.raises(UserError, match=r"^AND: joins what each prompt adds to none"):
            load_model(cfg, runtime.device)(["a moon AND a sun"], [0], replace(cfg, prompt_syntax=True))
    with pytest.raises(UserError, match="adapters cannot be told a scale"):
        project.config("distill", "lora.rank=4")


@pytest.mark.parametrize("method", ["method=lcm", "method=scm", "method=consistency_training"])
def test_draws_are_the_same_on_any_number_of_ranks(project: Any, runtime: Runtime, method: str) -> None:
    untaught = method == "method=consistency_training"
    options = ["guidance=[1,1]", "sampling.guidance_scale=1"] if untaught else []
    stage = make(project, runtime, method, *options)
    assert (stage.teacher is None) is untaught
    with torch.no_grad():
        whole = losses_of(stage, next(batches(stage.dataset, 16, 16, 0, 1, start=48, workers=0)))
        parts = [
            losses_of(stage, batch)
            for rank in range(2)
            for batch in islice(batches(stage.dataset, 16, 4, rank, 2, start=48, workers=0), 2)
        ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "method"),
    [
        *((f"runtime.zero_stage={stage}", "lcm") for stage in (0, 2, 3)),
        ("runtime.backend=fsdp", "lcm"),
        ("runtime.zero_stage=2", "scm"),
        ("runtime.zero_stage=3", "scm"),
        ("runtime.backend=fsdp", "scm"),
    ],
)
def test_every_backend_takes_the_step_of_plain_torch(project: Any, runtime: Runtime, backend: str, method: str) -> None:
    require_step_of_plain_torch(partial(make, project, runtime, f"method={method}"), backend)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["backend=ddp", "backend=fsdp", "zero_stage=1"])
def test_a_step_waits_for_nothing(project: Any, backend: str, precision: str) -> None:
    cfg = project.config("distill", f"runtime.{backend}", f"runtime.precision={precision}")
    stage, waits = DistillStage(cfg, runtime_module.start(cfg.runtime)), Waits()
    waits.around(stage)
    for position in range(0, 48, 16):
        stage.micro_step(stage.extend(stage.dataset.batch(range(position, position + 16))), True, position)
        assert float(stage.finish_step(position + 16)["train/grad_norm"]) > 0
    assert waits.found == []


def test_interrupted_training_ends_as_one_that_was_not(project: Any, student: Any, tmp_path: Path) -> None:
    """From the checkpoint in its middle; that a layout resumes to the last bit is tested where it is."""
    whole, part = student[0], tmp_path / "again"
    shutil.copytree(whole / "checkpoints" / "000000000048", part / "checkpoints" / "000000000048")
    cfg = project.config("distill", f"output_dir={part}", *SHORT)
    runtime = runtime_module.start(cfg.runtime)
    trainer.fit(DistillStage(cfg, runtime), cfg, runtime)
    names = [folder / "checkpoints/000000000096/unet/weights.safetensors" for folder in (whole, part)]
    expected, found = map(load_file, names)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)  # a thousandth of a step


def test_a_run_goes_on_with_its_own_teacher_method_and_guidance_alone(
    project: Any, student: Any, tmp_path: Path
) -> None:
    other = tmp_path / "export"
    shutil.copytree(project.folder / "unet" / "export", other)
    weights = load_file(other / WEIGHTS_NAME)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, other / WEIGHTS_NAME)
    for option, message in [
        ("method=scm", "method was lcm, is scm"),
        ("guidance=[1,3]", r"guidance was \[1\.0, 4\.0\], is \[1\.0, 3\.0\]"),
        (f"teacher={other}", "teacher was "),
    ]:
        for samples in (96, 128):  # finished, and about to grow
            cfg = project.config("distill", f"output_dir={student[0]}", *SHORT, option, f"loop.samples={samples}")
            runtime = runtime_module.start(cfg.runtime)
            with pytest.raises(UserError, match=message):
                trainer.fit(DistillStage(cfg, runtime), cfg, runtime)


def test_teacher_of_a_pipeline_sees_latents_as_that_has_them(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"  # of diffusers
    shutil.copytree(project.folder / "unet" / "export", pipeline / "unet", ignore=shutil.ignore_patterns(INFO))
    (pipeline / "scheduler").mkdir()
    process = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    (pipeline / "scheduler" / SCHEDULER).write_text(json.dumps(process))
    shutil.copytree(project.folder / "autoencoder" / "export", pipeline / "vae")
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    (pipeline / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.2}))
    stage = make(project, runtime, f"teacher={pipeline}/unet", "guidance=[1,1]", "sampling.guidance_scale=1")
    assert stage.mean.flatten().tolist() == [0.0] * 4 and stage.std.flatten().tolist() == [5.0] * 4
    options = [f"init_from={pipeline}/unet"]  # of a training of all weights they are its own
    assert UNetStage(project.config("unet", *options), runtime).std.flatten().tolist() != [5.0] * 4
    adapted = UNetStage(project.config("unet", *options, "lora.rank=2"), runtime)
    assert adapted.std.flatten().tolist() == [5.0] * 4
    weights = load_file(pipeline / "vae" / WEIGHTS_NAME)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, pipeline / "vae" / WEIGHTS_NAME)
    with pytest.raises(UserError, match=r"^teacher=\S+: its latents are those of \S+/vae; set autoencoder="):
        make(project, runtime, f"teacher={pipeline}/unet", "guidance=[1,1]", "sampling.guidance_scale=1")


def test_a_teacher_that_is_not_to_be_guided_is_asked_once(project: Any, runtime: Runtime) -> None:
    stage = make(project, runtime, "guidance=[1,1]", "sampling.guidance_scale=1")
    batch, rows = stage.dataset.batch(range(4)), list[int]()
    assert stage.teacher is not None
    stage.teacher.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    assert losses_of(stage, batch).isfinite().all() and rows == [4]


def test_teacher_of_other_latents_is_refused(project: Any, runtime: Runtime, tmp_path: Path) -> None:
    export = tmp_path / "export"
    shutil.copytree(project.folder / "unet" / "export", export)
    info = json.loads((export / INFO).read_text())
    (export / INFO).write_text(json.dumps(info | {"autoencoder": "0" * 64}))
    with pytest.raises(UserError, match=rf"^teacher={export}: its latents were those of another autoencoder"):
        make(project, runtime, f"teacher={export}")


def test_teachers_that_cannot_teach_are_refused(project: Any, student: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a student itself; name the network that it was taught by"):
        as_training(project.config("distill", f"teacher={student[0]}/export"))
    theirs = tmp_path / "theirs"  # of diffusers
    shutil.copytree(student[0] / "export", theirs, ignore=shutil.ignore_patterns(INFO))
    with pytest.raises(UserError, match="is a student itself; name the network that it was taught by"):
        as_training(project.config("distill", f"teacher={theirs}"))
    with pytest.raises(UserError, match=r"^guidance=\[1,1\]: method=guidance would have nothing to teach"):
        project.config("distill", "method=guidance", "guidance=[1,1]")
    export = tmp_path / "export"
    shutil.copytree(project.folder / "unet" / "export", export)
    info = json.loads((export / INFO).read_text())
    info["conditions"]["caption"]["drop"] = 0.0
    (export / INFO).write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"guidance=\[1\.0, 4\.0\].*cannot be guided; set guidance=\[1,1\]"):
        as_training(project.config("distill", f"teacher={export}"))
    with pytest.raises(UserError, match="has no teacher that is guided"):
        project.config("distill", "method=consistency_training")
    info["process"]["mean_flow"] = 0.5
    (export / INFO).write_text(json.dumps(info))
    with pytest.raises(UserError, match="is a mean flow, which draws in few steps by itself; name a flow"):
        as_training(project.config("distill", f"teacher={export}"))
    foreign = tmp_path / "pipeline"  # of diffusers
    shutil.copytree(project.folder / "unet" / "export", foreign / "unet", ignore=shutil.ignore_patterns(INFO))
    (foreign / "scheduler").mkdir()
    (foreign / "scheduler" / SCHEDULER).write_text(json.dumps({"prediction_type": "epsilon"}))
    for option, message in [
        ("levels=1001", "levels=1001: the teacher has 1000 timesteps, set fewer levels"),
        ("method=scm", "method=scm: takes a teacher of v or flow, and .* predicts eps; set method=lcm"),
    ]:
        with pytest.raises(UserError, match=message):
            as_training(project.config("distill", f"teacher={foreign}/unet", option))
    with pytest.raises(UserError, match=r"nowhere/config\.json"):
        as_training(project.config("distill", "teacher=nowhere"))
