"""What a student of distillation may be asked for."""

import re
from typing import Any

import pytest

from conf.errors import UserError
from conf.schema import Sampler, SamplingConfig
from models.diffusion.samplers import Student

TOLD, FIXED = Student("lcm", [1.0, 4.0]), Student("lcm", None)


def asked(**options: Any) -> SamplingConfig:
    return SamplingConfig(**{"sampler": Sampler.lcm, "steps": 4, "guidance_scale": 2.0} | options)


@pytest.mark.parametrize("scale", [1.0, 2.5, 4.0])
def test_few_steps_with_guidance_that_it_learnt_are_taken(scale: float) -> None:
    TOLD.check(asked(guidance_scale=scale))
    FIXED.check(asked(guidance_scale=1.0, steps=1))


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (
            TOLD,
            {"steps": 50},
            "sampler=lcm, steps=50: .* a student of distillation (lcm); set sampler=lcm",
        ),
        (TOLD, {"sampler": Sampler.ddim}, "sampler=ddim, steps=4: this network is a student"),
        (TOLD, {"guidance_scale": 7.5}, "guidance_scale=7.5: .* which learnt scales from 1 to 4"),
        (FIXED, {}, "guidance_scale=2.0: .* guided as its teacher was; set guidance_scale=1"),
        (TOLD, {"negative_prompt": "a cat"}, "negative_prompt=a cat: without effect"),
        (TOLD, {"guidance_interval": [0.1, 2.0]}, "guidance_interval=[0.1, 2.0]: without effect"),
    ],
    ids=str,
)
def test_what_it_cannot_follow_is_refused(student: Student, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message).replace(re.escape(".*"), ".*")):
        student.check(asked(**options))


def test_facts_are_read_back_and_others_refused() -> None:
    assert Student.read({}) is None
    assert Student.read({"method": "lcm", "guidance": [1.0, 4.0]}) == TOLD
    assert Student.read({"method": "lcm", "guidance": None}) == FIXED
    with pytest.raises(TypeError, match="no pair of numbers"):
        Student.read({"method": "lcm", "guidance": [1.0]})
