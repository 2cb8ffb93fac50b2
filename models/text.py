"""Frozen text towers: CLIP, or an encoder in a folder of Hugging Face. Nothing else here imports transformers."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from conf.errors import UserError
from models.clip import DESCRIPTION_NAME, Clip
from models.formats.weights import CONFIG_NAME, read_json, require_finite

WEIGHTS_NAME = "model.safetensors"
MOST_TOKENS = 512  # of a tokenizer that knows no limit
WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*|[^\w\s]+")
END = " x"  # any text that goes on
QUOTED = 200  # characters of a text in a line


class TextTower(Protocol):
    """Turns captions into the context of the U-Net."""

    @property
    def text_width(self) -> int:
        """D, channels of the text states."""
        ...

    @property
    def context_length(self) -> int:
        """L, tokens of a text."""
        ...

    def tokenize(self, texts: list[str]) -> Tensor:
        """Tokens [B, L] int64."""
        ...

    def text_states(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, L, D] of tokens [B, L]."""
        ...


class HuggingFaceText(nn.Module):
    """A text encoder of transformers with its tokenizer: CLIPTextModel, T5 and its like, BERT."""

    encoder: Any

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer

    @property
    def text_width(self) -> int:
        """D, channels of the text states."""
        return int(self.encoder.config.hidden_size)

    @property
    def context_length(self) -> int:
        """L, tokens of a text: what the tokenizer names, at most 512."""
        return min(int(self.tokenizer.model_max_length), MOST_TOKENS)

    def tokenize(self, texts: list[str]) -> Tensor:
        """[B, L] int64, padded and cut to L."""
        made = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        return made.input_ids

    def text_states(self, tokens: Tensor) -> Tensor:
        """Last hidden states [B, L, D]; padding is hidden from all encoders but CLIP's, which was trained to see it."""
        if self.encoder.config.model_type.startswith("clip"):
            return self.encoder(input_ids=tokens).last_hidden_state
        padding = self.tokenizer.pad_token_id
        return self.encoder(input_ids=tokens, attention_mask=(tokens != padding).long()).last_hidden_state

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a folder with config.json, model.safetensors and the tokenizer's files, or `tokenizer/` beside it.

        Raises:
            UserError: a file is missing or broken; weights are missing.
        """
        import transformers

        transformers.utils.logging.disable_progress_bar()
        path = Path(folder)
        kind = read_json(path / CONFIG_NAME, WEIGHTS_NAME).get("model_type")
        if not (path / WEIGHTS_NAME).is_file():
            raise UserError(
                f"{path / WEIGHTS_NAME} is missing: give a folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}"
            )
        classes = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}
        loader = getattr(transformers, classes.get(str(kind), "AutoModel"))
        beside = path.parent / "tokenizer"
        words = path if any(path.glob("*token*")) or not beside.is_dir() else beside
        try:
            encoder, report = loader.from_pretrained(
                path, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(words, local_files_only=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{path}: not a text encoder that transformers loads: {str(error).splitlines()[0]}"
            ) from None
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise UserError(f"{path / WEIGHTS_NAME} does not fit the network (missing: {', '.join(missing[:3])})")
        require_finite(path / WEIGHTS_NAME, encoder.state_dict())
        padding, known = tokenizer.pad_token_id, encoder.get_input_embeddings().num_embeddings
        if padding is not None and padding >= known:
            raise UserError(f"{words}: pads with token {padding}, of which {path} knows {known}; export it again")
        return cls(encoder.float(), tokenizer)


def load_text_tower(source: str | Path) -> Clip | HuggingFaceText:
    """A folder that train_clip or open_clip wrote, a folder of Hugging Face, or an open_clip model NAME/TAG.

    Raises:
        UserError: none of them, or one that is incomplete.
    """
    config = Path(source) / CONFIG_NAME
    if (Path(source) / DESCRIPTION_NAME).is_file():
        return Clip.from_pretrained(source)
    if config.is_file() and "model_type" in read_json(config, WEIGHTS_NAME):
        return HuggingFaceText.from_pretrained(source)
    return Clip.from_pretrained(source)


def image_embeddings(tower: TextTower | None, images: Tensor) -> Tensor:
    """CLIP's embeddings [B, E] of images [B, 3, H, W] in [-1, 1]; refuses a text encoder that sees no images."""
    if not isinstance(tower, Clip):
        raise UserError("conditions.image_embedding: clip must be a CLIP with its image tower")
    return tower.encode_image(images).float()


def common(first: Tensor, second: Tensor) -> int:
    """Number of tokens at the beginning of both."""
    return int((first == second).long().cumprod(0).sum())


def cut_off(tower: TextTower, text: str) -> str:
    """The end of a text, from the first word on that the context has no room for; empty where all of it fits.

    A word whose tokens fit in part is cut off, too. Of a text that is a single word, as of a script without spaces,
    the characters are cut off that have no room.
    """
    room = _Room(tower, text)
    if not room.exceeded:
        return ""
    first = bisect_left(range(len(room.words)), True, key=room.lacks)
    start = room.words[first].start() if first else bisect_left(range(len(text)), True, key=room.full)
    return text[start:].rstrip()


class _Room:
    """The room that a context has for the words of a text, found by the tokens of its beginnings."""

    def __init__(self, tower: TextTower, text: str) -> None:
        self.tower, self.text, self.words = tower, text, list(WORD.finditer(text))
        self.whole, self.longer, empty = tower.tokenize([text, text + END, ""])
        self.start = common(empty, self.longer)  # tokens before those of the words
        self.filled = bool(self.whole[-2] != empty[-2])  # else there is padding

    @property
    def exceeded(self) -> bool:
        """Whether the last word is not held whole."""
        return self.filled and torch.equal(self.whole, self.longer) and self.lacks(len(self.words) - 1)

    def lacks(self, number: int) -> bool:
        """Whether a word is not held whole; one token is the end's."""
        word, before = self.words[number][0], self.text[: self.words[number - 1].end()] if number else ""
        begun, alone, more = self.tower.tokenize([before, word, word + END])
        held = len(self.whole) - 1
        return min(common(begun, self.whole), held) + common(alone, more) - self.start > held

    def full(self, characters: int) -> bool:
        """Whether so many characters leave no room."""
        return torch.equal(*self.tower.tokenize([self.text[:characters], self.text[:characters] + END]))


@dataclass(frozen=True, slots=True)
class Cuts:
    """How many of some texts are longer than the context, and what falls off the first of them."""

    context_length: int
    texts: int = 0
    count: int = 0
    lost: str = ""

    @classmethod
    def of(cls, tower: TextTower, texts: Sequence[str], tokens: Tensor | None = None) -> Self:
        """Count texts that are too long; their tokens [B, L] may be known."""
        if not texts:
            return cls(0)
        tokens = tower.tokenize(list(texts)) if tokens is None else tokens
        filled = tokens[:, -2] != tower.tokenize([""])[0, -2]  # all others have padding there
        longer = [texts[row] for row in filled.nonzero()[:, 0].tolist() if _Room(tower, texts[row]).exceeded]
        return cls(tokens.shape[1], len(texts), len(longer), cut_off(tower, longer[0]) if longer else "")

    def __add__(self, other: "Cuts") -> "Cuts":
        length = max(self.context_length, other.context_length)
        return Cuts(length, self.texts + other.texts, self.count + other.count, self.lost or other.lost)

    def line(self, what: str) -> str:
        """The counts in words, for the console; `what` the texts are, in the plural."""
        lost = self.lost if len(self.lost) <= QUOTED else f"{self.lost[:QUOTED].rstrip()}…"
        return (
            f"{self.count:,} of {self.texts:,} {what} are longer than the {self.context_length} tokens of the text "
            f"encoder; of the first is left out: '{lost}'"
        )
