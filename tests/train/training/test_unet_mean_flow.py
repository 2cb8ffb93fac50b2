"""The training of a mean flow: what it learns, whatever the batch, the rank or the backend, and what it draws."""

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
from safetensors.torch import load_file
from torch import Tensor

from conf.entry import compose
from conf.errors import UserError
from conf.schema import ExportRun, Sampler, SampleRun
from data.loader import batches
from models.unet import UNet
from train.engine import runtime as runtime_module
from train.engine import trainer
from train.engine.runtime import Runtime
from train.exporting import export
from train.latents.provenance import UNetInfo
from train.sampling.load import load_model
from train.sampling.run import generate_images
from train.training.unet import UNetStage
from waits import Waits

SHARE = "process.mean_flow=0.5"
SHORT = ["loop.samples=96", "loop.log_every=16", "loop.evaluate_every=96", "loop.checkpoint_every=48"]


def make(project: Any, runtime: Runtime, *overrides: str) -> UNetStage:
    return UNetStage(project.config("unet", SHARE, *overrides), runtime)


@pytest.fixture(scope="module")
def trained(project: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The project's U-Net gone on with as a mean flow: its folder, and the configuration that draws with it."""
    folder = tmp_path_factory.mktemp("mean_flow")
    options = [f"init_from={project.folder}/unet/export", "sampling.sampler=mean_flow", "sampling.steps=2"]
    cfg = project.config("unet", SHARE, f"output_dir={folder}", *options, *SHORT)
    runtime = runtime_module.start(cfg.runtime)
    trainer.fit(UNetStage(cfg, runtime), cfg, runtime)
    return folder, project.config("sample", f"unet={folder}/export", "prompts=[a moon]", "sampler=mean_flow", "steps=2")


def drawn(cfg: SampleRun, runtime: Runtime) -> Tensor:
    return generate_images(load_model(cfg, runtime.device), cfg, [{"caption": "a moon"}], [0]).images


def test_it_says_what_it_is_and_draws_with_any_sampler(trained: Any, runtime: Runtime) -> None:
    folder, cfg = trained
    assert UNetInfo.load(f"{folder}/export").process_config().mean_flow == 0.5
    assert UNet.from_pretrained(f"{folder}/export").cfg.time_cond_proj_dim == 256
    assert (folder / "samples" / "prompts-000000000096.png").is_file()
    assert json.loads((folder / "DONE").read_text())["metrics"]["eval/loss"] > 0
    options = [(Sampler.mean_flow, 1), (Sampler.mean_flow, 2), (Sampler.ddim, 2), (Sampler.unipc, 8)]
    images = [drawn(replace(cfg, sampler=sampler, steps=steps), runtime) for sampler, steps in options]
    assert all(image.shape == (1, 3, 32, 32) and image.isfinite().all() for image in images)
    assert not torch.equal(images[1], images[2])
    weighted = replace(cfg, prompt_syntax=True, guidance_interval=[0.5, 1e6])
    assert load_model(cfg, runtime.device)(["a (moon:0.5) AND a sun"], [0], weighted).isfinite().all()


def test_network_is_told_the_length_of_each_step(trained: Any, runtime: Runtime) -> None:
    _, cfg = trained
    model, told = load_model(cfg, runtime.device), list[Tensor | None]()
    model.denoiser.unet.register_forward_pre_hook(lambda _, __, named: told.append(named["guidance"]), with_kwargs=True)
    model(["a moon"], [0], replace(cfg, guidance_scale=2.0))  # with the prompt and without
    for lengths in told:
        torch.testing.assert_close(lengths, torch.full((2,), 1.004995))
    assert len(told) == 2
    model(["a moon"], [0], replace(cfg, sampler=Sampler.ddim))
    assert told[2:] == [None, None]


def test_network_that_did_not_learn_it_refuses_the_sampler(project: Any, runtime: Runtime) -> None:
    cfg = project.config("sample", "prompts=[a moon]", "sampler=mean_flow", "steps=2")
    with pytest.raises(UserError, match=r"^sampler=mean_flow: this network was trained without process\.mean_flow"):
        drawn(cfg, runtime)
    with pytest.raises(UserError, match=r"^sampling\.sampler=mean_flow: asks for mean velocities; set process\.mean_f"):
        project.config("unet", "sampling.sampler=mean_flow")


def test_what_cannot_be_is_refused_in_one_line(project: Any, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^process\.mean_flow=0\.5: adapters cannot be told a length; set lora\.rank=0"
    ):
        project.config("unet", SHARE, "lora.rank=2", f"init_from={project.folder}/unet/export")
    options = [f"run_dir={project.folder}", f"output_dir={tmp_path}/out", f"unet={trained[0]}/export"]
    cfg = compose("export", ExportRun, options)
    with pytest.raises(UserError, match=r"draws with no mean flow, it tells no network how long a step is; load the"):
        export.export_model(cfg)


def test_it_does_not_go_on_from_a_student_whose_input_is_guidance(
    trained: Any, project: Any, runtime: Runtime, tmp_path: Path
) -> None:
    shutil.copytree(trained[0] / "export", tmp_path / "export")
    given = f"init_from={tmp_path}/export"
    make(project, runtime, given)
    student = {"method": "lcm", "guidance": [1.0, 4.0]}
    replace(UNetInfo.load(str(tmp_path / "export")), student=student).save(tmp_path / "export")
    with pytest.raises(UserError, match=r"^init_from=\S+: is a student, told a scale of guidance where a mean flow is"):
        make(project, runtime, given)


def test_it_begins_as_the_flow_that_it_goes_on_from(project: Any, runtime: Runtime) -> None:
    stage = make(project, runtime, f"init_from={project.folder}/unet/export")
    plain = UNetStage(project.config("unet", f"init_from={project.folder}/unet/export"), runtime)
    batch = stage.dataset.batch(range(4))
    inputs, x, t = stage.inputs(batch), torch.randn(4, 4, 8, 8), torch.tensor([10.0, 300.0, 600.0, 990.0])
    with torch.no_grad():
        told = stage.network(x, t, inputs | {"guidance": 1 + torch.tensor([0.0, 0.001, 0.002, 0.009])})
        assert torch.equal(told, plain.network(x, t, inputs))
    for errors in (stage.errors(stage.network, batch), plain.errors(plain.network, batch)):
        torch.testing.assert_close(errors, plain.errors(plain.network, batch))


def test_it_learns(project: Any, runtime: Runtime) -> None:
    stage = make(project, runtime, "optim.lr=3e-3")
    batch, losses = stage.dataset.batch(range(16)), list[float]()
    for step in range(25):  # the same samples with the same noise
        losses.append(float(stage.micro_step(batch, True, 16 * step)["train/loss"]))
        stage.finish_step(16 * (step + 1))
    assert losses[-1] < 0.8 * losses[0]


def test_losses_are_the_same_on_any_number_of_ranks(project: Any, runtime: Runtime) -> None:
    """The loss of 16 samples together is the mean of those of 4 at a time, as two processes deal them out."""
    start, losses = [f"init_from={project.folder}/unet/export", "runtime.backend=ddp"], list[Tensor]()
    for micro, ranks, each in ((16, 1, 1), (4, 2, 2)):
        stage = make(project, runtime, *start, f"batch.micro_batch_size={micro}")
        dealt = [
            batch
            for rank in range(ranks)
            for batch in islice(batches(stage.dataset, 16, micro, rank, ranks, start=48, workers=0), each)
        ]
        found = [stage.micro_step(batch, batch is dealt[-1], 0)["train/loss"] for batch in dealt]
        losses.append(torch.stack(found).mean())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "backend",
    [
        *(f"runtime.zero_stage={stage}" for stage in (0, 2, 3)),
        "runtime.backend=fsdp",
        "runtime.gradient_checkpointing=true",
    ],
)
def test_every_backend_takes_the_step_of_plain_torch(project: Any, runtime: Runtime, backend: str) -> None:
    init_from = f"init_from={project.folder}/unet/export"
    require_step_of_plain_torch(partial(make, project, runtime, init_from), backend)


@pytest.mark.parametrize("options", [["backend=ddp"], ["backend=ddp", "precision=bf16"], ["backend=fsdp"]], ids=str)
def test_a_step_waits_for_nothing(project: Any, options: list[str]) -> None:
    cfg = project.config("unet", SHARE, *(f"runtime.{option}" for option in options))
    stage, waits = UNetStage(cfg, runtime_module.start(cfg.runtime)), Waits()
    waits.around(stage)
    for position in range(0, 48, 16):
        stage.micro_step(stage.extend(stage.dataset.batch(range(position, position + 16))), True, position)
        assert float(stage.finish_step(position + 16)["train/grad_norm"]) > 0
    assert waits.found == []


def test_interrupted_training_ends_as_one_that_was_not(project: Any, trained: Any, tmp_path: Path) -> None:
    """From the checkpoint in its middle; that a layout resumes to the last bit is tested where it is."""
    whole, part = trained[0], tmp_path / "again"
    shutil.copytree(whole / "checkpoints" / "000000000048", part / "checkpoints" / "000000000048")
    options = [f"init_from={project.folder}/unet/export", "sampling.sampler=mean_flow", "sampling.steps=2"]
    cfg = project.config("unet", SHARE, f"output_dir={part}", *options, *SHORT)
    runtime = runtime_module.start(cfg.runtime)
    trainer.fit(UNetStage(cfg, runtime), cfg, runtime)
    names = [folder / "checkpoints/000000000096/unet/weights.safetensors" for folder in (whole, part)]
    expected, found = map(load_file, names)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)  # a thousandth of a step
