"""What can be changed about a picture by its words (`models.editing`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from conf.schema.choices import EditMode
from conf.schema.sections import require


@dataclass(kw_only=True, slots=True)
class EditStrength:
    """How much of the source an edit keeps; moments are shares of the sampling, from 0, its begin, to 1, its end."""

    mode: EditMode = EditMode.auto
    replace_until: float = 0.8  # share of the sampling in which words that were there keep their attention
    self_until: float = 0.4  # share of the sampling in which parts of the picture attend to each other as in the source
    blend_from: float = 0.0  # share of the sampling after which the picture changes only where the words of blend are
    blend_threshold: float = 0.3  # 0-1, of the largest attention to those words: where they are

    def __post_init__(self) -> None:
        for option in ("replace_until", "self_until", "blend_from", "blend_threshold"):
            value = getattr(self, option)
            require(0 <= value <= 1, f"{option}={value}: must be in [0, 1]")


@dataclass(kw_only=True, slots=True)
class Edit(EditStrength):
    """One picture and what is to be changed about it.

    Words are those of the edited prompt, and of blend those of either; several in a row may be named together, and
    "eyes#2" is where they stand for the second time.
    """

    prompt: str  # of the source
    edit: str | None = None  # prompt of the edited picture; None: the same
    weights: Mapping[str, float] = field(default_factory=dict)  # factor of the attention that words get; 0: none
    until: Mapping[str, float] = field(default_factory=dict)  # replace_until of words
    blend: Sequence[str] = ()  # words where the picture may change; none: everywhere

    def __post_init__(self) -> None:
        EditStrength.__post_init__(self)
        for word, share in self.until.items():
            require(0 <= share <= 1, f"until={word}:{share}: must be in [0, 1]")

    @property
    def edited(self) -> str:
        """The prompt of the edited picture."""
        return self.prompt if self.edit is None else self.edit
