"""What a visitor set, as the options of one picture and its edit."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from conf.errors import UserError
from conf.schema import Edit, EditMode, PlaygroundRun, Sampler, SamplingConfig

AS_GIVEN = ("replace_until", "self_until", "blend_change", "blend_threshold")  # options of an edit, by their own names


@dataclass(frozen=True, slots=True)
class Request:
    """One picture, and what is to be changed about it."""

    edit: Edit
    seed: int
    sampling: SamplingConfig

    @property
    def changes(self) -> bool:
        """Whether there is more than the prompt."""
        return self.edit.edited != self.edit.prompt or bool(self.edit.weights)


def request_of(cfg: PlaygroundRun, given: Mapping[str, Any], weights: Mapping[str, float]) -> Request:
    """Of the controls' values by name, and weights of words; all that has no control is as in the configuration.

    Raises:
        UserError: a value that no picture can have.
    """
    prompt, edited = given["prompt"].strip(), given["edit"].strip()
    if not prompt:
        raise UserError("the prompt is empty: write what the picture shall show")
    if given["seed"] is None:
        raise UserError("the seed is empty: write a whole number")
    options = {option.name: getattr(cfg, option.name) for option in fields(SamplingConfig)}
    options |= {"sampler": Sampler(given["sampler"]), "steps": int(given["steps"])}
    options |= {"guidance_scale": float(given["guidance_scale"])}
    if options["sampler"] is not cfg.sampler:
        options["eta"] = None  # it was meant for the other one
    edit = Edit(
        prompt=prompt,
        edit=edited or None,
        mode=EditMode(given["mode"]),
        weights={word: weight for word, weight in weights.items() if weight != 1},
        blend=[word.strip() for word in given["blend"].split(",") if word.strip()],
        **{name: given[name] for name in AS_GIVEN},
    )
    return Request(edit, int(given["seed"]), SamplingConfig(**options))
