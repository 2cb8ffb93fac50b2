"""The adversary of a student: what it sees of the teacher, where gradients go, and which losses both have."""

from functools import partial
from typing import Any

import pytest
import torch
from first_step import first_step, require_step_of_plain_torch
from torch.nn import functional as F

from train.engine.runtime import Runtime
from train.training.distillation.adversarial import Heads, both_pulls
from train.training.distillation.consistency import Lesson
from train.training.distillation.stage import DistillStage


def make(project: Any, runtime: Runtime, *overrides: str) -> DistillStage:
    return DistillStage(project.config("distill", "adversarial_weight=0.5", *overrides), runtime)


def latents(stage: DistillStage) -> tuple[torch.Tensor, torch.Tensor, Any]:
    batch = stage.dataset.batch(range(4))
    return torch.randn(4, 4, 8, 8), torch.tensor([10.0, 300.0, 600.0, 990.0]), stage.inputs(batch)


def test_maps_are_those_that_the_teacher_predicts_from(project: Any, runtime: Runtime) -> None:
    stage = make(project, runtime)
    x, t, inputs = latents(stage)
    assert stage.teacher is not None
    with torch.no_grad():
        maps = stage.maps(x, t, inputs)
        torch.testing.assert_close(stage.teacher.unet.prediction(maps[-1].clone()), stage.teacher(x, t, inputs))
    for found, kept in zip(stage.maps(x.requires_grad_(), t, inputs), maps, strict=True):
        torch.testing.assert_close(found, kept)  # nobody wrote into them where no gradients were asked for
    stage.teacher(x, t, inputs)
    assert stage.maps.found is None  # of calls whose maps nobody asked for nothing is kept
    sizes = [tuple(one.shape[1:]) for one in maps]
    assert sizes == [(32, 4, 4), (32, 8, 8), (16, 8, 8)]
    assert Heads(stage.cfg.model)(maps).shape == (4, 4 * 4 + 8 * 8 + 8 * 8)


def test_verdicts_reach_the_student_through_a_teacher_that_stays(project: Any, runtime: Runtime) -> None:
    stage = make(project, runtime)
    x, t, inputs = latents(stage)
    assert stage.teacher is not None
    before = {name: tensor.clone() for name, tensor in stage.teacher.state_dict().items()}
    stage.heads.module(stage.maps(x.requires_grad_(), t, inputs)).sum().backward()
    assert x.grad is not None and all(row.abs().max() > 0 for row in x.grad)
    first_step(stage, micro=16)
    assert all(parameter.grad is None for parameter in stage.teacher.parameters())
    for name, tensor in stage.teacher.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_losses_are_those_of_pairs(project: Any, runtime: Runtime) -> None:
    """Both see one noise at one level, and the same captions."""
    stage = make(project, runtime)
    batch = stage.extend(stage.dataset.batch(range(4)))
    drawn = stage.drawn(batch, seed=0)
    guess = drawn.x0 + torch.randn_like(drawn.x0)
    judged, told = stage.judge(drawn, guess, last=True)
    noise, t = drawn.rng.normal("judged_noise", (4, 8, 8)), drawn.rng.uniform("judged_timestep")
    t = stage.process.draw_timesteps(t)
    share = (t / 1000).view(-1, 1, 1, 1)  # of noise in a flow
    real, fake = (
        stage.heads.module(stage.maps((1 - share) * x + share * noise, t, drawn.inputs)) for x in (drawn.x0, guess)
    )
    torch.testing.assert_close(judged, -F.logsigmoid(fake - real).mean(1), rtol=1e-4, atol=1e-5)
    judges = -F.logsigmoid(real - fake).mean()
    torch.testing.assert_close(told["train/gan_discriminator"], judges, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(judges, list(stage.heads.module.parameters()))
    for parameter, gradient in zip(stage.heads.module.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_pulls_of_a_sample_have_the_lengths_that_were_asked_for() -> None:
    """By the prediction; each sample has its own, whatever else is in the batch."""
    prediction = torch.randn(3, 1, 2, 2).requires_grad_()
    ours, theirs = 3 * torch.randn(3, 1, 2, 2), 50 * torch.randn(3, 1, 2, 2)

    def lesson(p: torch.Tensor, rows: slice) -> tuple[Lesson, torch.Tensor]:
        guess = 2 * p
        losses = (ours[rows] * p).flatten(1).sum(1)
        return Lesson(losses, p, guess, torch.zeros(3)), (theirs[rows] / 2 * guess).flatten(1).sum(1)

    found, judged = lesson(prediction, slice(None))
    gradient = both_pulls(found, judged, 0.5)
    lengths = [0.5 * float(a.norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
    expected = torch.stack([a + length * b for a, b, length in zip(ours, theirs, lengths, strict=True)]) / 3
    torch.testing.assert_close(gradient, expected)
    alone = prediction[1:2].detach().requires_grad_()
    torch.testing.assert_close(both_pulls(*lesson(alone, slice(1, 2)), 0.5), 3 * expected[1:2])


@pytest.mark.parametrize("backend", ["runtime.zero_stage=2", "runtime.zero_stage=3", "runtime.backend=fsdp"])
def test_every_backend_takes_the_step_of_plain_torch(project: Any, runtime: Runtime, backend: str) -> None:
    require_step_of_plain_torch(partial(make, project, runtime), backend)
