"""What can be changed about an image by its words (`models.editing.editing`), and the command that does."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from conf.errors import UserError, did_you_mean
from conf.overrides import a_path, a_text
from conf.schema.choices import EditMode, InversionMethod
from conf.schema.sampling import ModelRun
from conf.schema.shared import WandbConfig, require, require_positive

WINDOW = re.compile(r"(?:(\d*\.?\d+)\s*-)?\s*(\d*\.?\d+)")


@dataclass(kw_only=True)
class EditStrength:
    """How much of the source an edit keeps; moments are shares of the sampling, from 0, its begin, to 1, its end."""

    mode: EditMode = EditMode.auto  # replace, refine, or what the prompts allow
    replace_until: float = 0.5  # share of the sampling in which words that were there keep their attention
    self_until: float = 0.4  # share of the sampling in which parts of the image attend to each other as in the source
    blend_change: bool = False  # change the image only where the prompts disagree about it
    blend_threshold: float = 0.3  # 0-1, of the largest attention to blend's words, or disagreement: where that is
    blend_from: float = 0.0  # share of the sampling from which on the image changes only there
    new_noise: float = 0.0  # 0-1: how much of the noise is not the source's; as shapes are in it, new ones can come

    def __post_init__(self) -> None:
        for option in ("replace_until", "self_until", "blend_from", "blend_threshold", "new_noise"):
            value = getattr(self, option)
            require(0 <= value <= 1, f"{option}={value}: must be in [0, 1]")


@dataclass(kw_only=True)
class Edit(EditStrength):
    """One image and what is to be changed about it.

    Words are those of the edited prompt, and of blend those of either; several in a row may be named together, and
    "eyes#2" is where they stand for the second time.
    """

    prompt: str  # of the source
    edit: str | None = None  # prompt of the edited image; None: the same
    image: str | None = a_path(None)  # file with the source; None: it is drawn
    weights: Mapping[str, float] = field(default_factory=dict)  # of the effect that words have; 0: as if not there
    during: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # shares of the sampling: when weights hold
    until: Mapping[str, float] = field(default_factory=dict)  # replace_until of words
    blend: Sequence[str] = ()  # words where the image may change; none: everywhere

    def __post_init__(self) -> None:
        EditStrength.__post_init__(self)
        for word, weight in self.weights.items():
            require(math.isfinite(weight), f"weights={word}:{weight}: must be a number, such as 2.0")
        for word, share in self.until.items():
            require(0 <= share <= 1, f"until={word}:{share}: must be in [0, 1]")
        for word, (begin, end) in self.during.items():
            require(word in self.weights, f"during={word}: has no weight; name it in weights, too")
            require(0 <= begin < end <= 1, f"during={word}:{begin}-{end}: must be two shares, such as 0.2-0.5")

    @property
    def edited(self) -> str:
        """The prompt of the edited image."""
        return self.prompt if self.edit is None else self.edit


@dataclass(kw_only=True)
class EditRun(ModelRun, EditStrength):
    """`train/edit.py`: images before and after edits of their prompts, and what their words look at.

    python train/edit.py run=runs/demo prompt="a red planet" edit="a blue planet" blend=planet
    python train/edit.py run=runs/demo image=photo.png prompt="a red planet" edit="a blue planet"
    python train/edit.py run=runs/demo edits_file=edits.jsonl images_per_edit=4
    """

    run: str = a_path()  # the run folder, in short; run_dir=FOLDER says the same
    output_dir: str = a_path()
    prompt: str | None = a_text(None)  # of the image before
    edit: str | None = a_text(None)  # prompt of the image after; None: the same
    image: str | None = a_path(None)  # file with the image before, which prompt describes; None: it is drawn
    inversion: InversionMethod = InversionMethod.negative_prompt  # how guidance is kept from changing a given image
    weights: str = a_text("")  # how much words count: "smiling:2.0,navy:0"; 0: as if they were not there
    during: str = a_text("")  # when the weights of words hold, shares of the sampling: "smiling:0.5,navy:0.2-0.6"
    until: str = a_text("")  # replace_until of single words: "red:0.4,planet:1"
    blend: str = a_text("")  # words where the image may change: "monster,horns"; "": everywhere
    edits_file: str | None = a_path(None)  # a JSON object a line, with the options above that differ from edit to edit
    images_per_edit: int = 1  # images drawn of each edit; of one of a given image always 1
    maps: bool = True  # show what each word looks at
    batch_size: int = 16  # edits made together; changes no image
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        ModelRun.__post_init__(self)
        EditStrength.__post_init__(self)
        require_positive(self, "images_per_edit", "batch_size")
        no_image = self.image is None and self.edits_file is None
        require(
            not no_image or self.inversion is InversionMethod.negative_prompt,
            f"inversion={self.inversion.value}: is for a given image; set image=FILE as well",
        )
        given = (self.prompt is not None) + (self.edits_file is not None)
        require(given == 1, 'set prompt="..." and edit="...", or edits_file=FILE with an edit on each line')
        numbers_of("weights", self.weights)
        numbers_of("until", self.until)
        windows_of("during", self.during)


@dataclass(kw_only=True)
class EvaluateEditsRun(ModelRun):
    """`train/evaluate_edits.py`: do edits change what they say, and nothing else? On the demo set's captions.

    python train/evaluate_edits.py run=runs/demo
    python train/evaluate_edits.py run=runs/demo strength={replace_until:0.8}
    python train/evaluate_edits.py run=runs/demo given=true words_per_sort=0
    """

    run: str = a_path()  # the run folder, in short; run_dir=FOLDER says the same
    shards: str = a_path()  # of the demo set: train/ for the probe, heldout/ for what is edited
    statistics_dir: str = a_path()  # where the probe is kept
    output_dir: str = a_path()
    strength: dict[str, Any] = field(default_factory=dict)  # options of all edits; {}: those that suit each sort
    given: bool = False  # edit the held-out images themselves, not what is drawn of their captions
    edits_per_sort: int = 20  # colors, backgrounds, kinds, added and removed parts
    words_per_sort: int = 40  # kinds, colors, backgrounds, moods and parts, whose weight is changed; 0: none
    batch_size: int = 10  # edits made together, and words weighted; changes no image
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        ModelRun.__post_init__(self)
        require_positive(self, "edits_per_sort", "batch_size")
        require(self.words_per_sort >= 0, f"words_per_sort={self.words_per_sort}: must be 0 (off) or positive")
        known = [option.name for option in fields(EditStrength) if option.name != "mode"]
        for name in self.strength:
            listed = ", ".join(known) + did_you_mean(name, known)
            require(name in known, f"strength.{name}: no option of an edit; choose among {listed}")
        EditStrength(**self.strength)


def numbers_of(option: str, text: str) -> dict[str, float]:
    """Numbers of words, written "smiling:2.0,navy:0".

    Raises:
        UserError: written otherwise.
    """
    found = {}
    for part in phrases_of(text):
        word, _, number = part.rpartition(":")
        try:
            found[word.strip()] = float(number)
        except ValueError:
            word = ""
        if not word.strip():
            raise UserError(f'{option}={text}: write {option}="WORD:NUMBER,WORD:NUMBER", such as "smiling:2.0,navy:0"')
    return found


def window_of(text: str) -> tuple[float, float]:
    """Shares of the steps, written `0.5` (up to there) or `0.2-0.5`; raises ValueError."""
    found = WINDOW.fullmatch(text.strip())
    begin, end = (float(found[1] or 0), float(found[2])) if found else (1.0, 0.0)
    if not 0 <= begin < end <= 1:
        raise ValueError(text)
    return begin, end


def windows_of(option: str, text: str) -> dict[str, tuple[float, float]]:
    """Shares of the sampling between which something holds of words, written "smiling:0.5,navy:0.2-0.6".

    Raises:
        UserError: written otherwise.
    """
    found = {}
    for part in phrases_of(text):
        word, _, window = part.rpartition(":")
        try:
            found[word.strip()] = window_of(window)
        except ValueError:
            word = ""
        if not word.strip():
            raise UserError(f'{option}={text}: write {option}="WORD:SHARE,WORD:SHARE-SHARE", such as "navy:0.2-0.6"')
    return found


def phrases_of(text: str) -> list[str]:
    """Words written "monster,round ears"."""
    return [part.strip() for part in text.split(",") if part.strip()]
