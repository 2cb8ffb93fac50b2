"""What a visitor set, as the options of one image and its edit."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from conf.errors import UserError
from conf.schema import Edit, EditMode, InversionMethod, PlaygroundRun, Sampler, SamplingConfig
from models.editing.inversion import unfit

SEEDS = 2**53  # beyond it, not every whole number has one of its own in a browser
# Their controls bear these names.
EDIT_OPTIONS = ("replace_until", "self_until", "new_noise", "blend_change", "blend_threshold")


@dataclass(frozen=True, slots=True)
class Request:
    """One image, and what is to be changed about it."""

    edit: Edit
    seed: int
    sampling: SamplingConfig
    image: str = ""  # the visitor's own, as the page sends it (`upload`); "": it is drawn
    inversion: InversionMethod = InversionMethod.negative_prompt
    instead_of: Sampler | None = None  # the one that was chosen and does not find a given image

    @property
    def changes(self) -> bool:
        """Whether there is more than the prompt."""
        return self.edit.edited != self.edit.prompt or bool(self.edit.weights) or bool(self.image)


def request_of(cfg: PlaygroundRun, values: Mapping[str, Any], weights: Mapping[str, float]) -> Request:
    """The request that the controls say, by name, with weights of words; what has no control is as configured.

    Raises:
        UserError: a value that no image can have.
    """
    prompt, edited = values["prompt"].strip(), values["edit"].strip()
    if not prompt:
        raise UserError("the prompt is empty: write what the image shall show")
    options = {option.name: getattr(cfg, option.name) for option in fields(SamplingConfig)}
    options |= {"sampler": Sampler(values["sampler"]), "steps": int(values["steps"])}
    options |= {"guidance_scale": float(values["guidance_scale"])}
    if options["sampler"] is not cfg.sampler:
        options["eta"] = None  # it was meant for the other one
    edit = Edit(
        prompt=prompt,
        edit=edited or None,
        mode=EditMode(values["mode"]),
        weights={word: weight for word, weight in weights.items() if weight != 1},
        blend=[word.strip() for word in values["blend"].split(",") if word.strip()],
        **{name: values[name] for name in EDIT_OPTIONS},
    )
    request = Request(edit, seed_of(values["seed"]), SamplingConfig(**options))
    return of_image(request, values["image"], InversionMethod(values["inversion"])) if values["image"] else request


def of_image(request: Request, image: str, inversion: InversionMethod) -> Request:
    """The request with the visitor's own image, and with DDIM where the sampler would not find it."""
    chosen, sampling = request.sampling.sampler, request.sampling
    if not unfit(sampling, inversion):
        return replace(request, image=image, inversion=inversion)
    sampling = replace(sampling, sampler=Sampler.ddim, eta=None)
    return replace(request, image=image, inversion=inversion, sampling=sampling, instead_of=chosen)


def seed_of(number: float | None) -> int:
    """The seed in a field of the page.

    Raises:
        UserError: none, not a whole one, or one that a browser rounds.
    """
    if number is None:
        raise UserError("the seed is empty: write a whole number")
    if not 0 <= number < SEEDS or number != int(number):
        raise UserError(f"seed {number:g}: write a whole number from 0 to {SEEDS - 1}")
    return int(number)
