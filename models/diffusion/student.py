"""What a student of distillation may be asked for when it draws: few steps, and the guidance that it has learnt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from conf.errors import UserError
from conf.schema import Sampler, SamplingConfig

MOST_STEPS = 8  # more of them only add the error of each


@dataclass(frozen=True, slots=True)
class Student:
    """Facts of its training, kept in `latentline.json` beside its weights.

    Args:
        method: of the distillation.
        guidance: lowest and highest scale that it was told; None: it is told none, whatever its teacher's was.
    """

    method: str
    guidance: list[float] | None

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Self | None:
        """Of plain values; None for a network that is no student. Raises TypeError for what no training writes."""
        if not found:
            return None
        scales = found.get("guidance")
        if scales is not None and not (
            isinstance(scales, list) and len(scales) == 2 and all(type(scale) in (int, float) for scale in scales)
        ):
            raise TypeError("student.guidance is no pair of numbers")
        return cls(str(found.get("method")), scales)

    def check(self, sampling: SamplingConfig) -> None:
        """Refuse options that it cannot follow, or that would be without effect.

        Raises:
            UserError: another sampler, too many steps, or guidance that it was not taught.
        """
        about = f"this network is a student of distillation ({self.method})"
        if sampling.sampler is not Sampler.lcm or sampling.steps > MOST_STEPS:
            raise UserError(
                f"sampler={sampling.sampler.value}, steps={sampling.steps}: {about}; set sampler=lcm and steps=1 to "
                f"{MOST_STEPS}"
            )
        scale = sampling.guidance_scale
        if self.guidance is None and scale != 1:
            raise UserError(f"guidance_scale={scale}: {about}, guided as its teacher was; set guidance_scale=1")
        if self.guidance is not None and not self.guidance[0] <= scale <= self.guidance[1]:
            low, high = self.guidance
            raise UserError(f"guidance_scale={scale}: {about}, which learnt scales from {low:g} to {high:g}")
        for option in ("negative_prompt", "guidance_rescale", "guidance_interval"):
            if value := getattr(sampling, option):
                raise UserError(f"{option}={value}: without effect, {about}, whose guidance is inside; leave it out")
