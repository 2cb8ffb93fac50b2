"""Frozen text towers: CLIP, or an encoder in a folder of Hugging Face. Nothing else here imports transformers."""

from pathlib import Path
from typing import Any, Protocol, Self

from safetensors import SafetensorError
from torch import Tensor, nn

from conf.errors import UserError
from models.clip import DESCRIPTION_NAME, Clip
from models.weights import CONFIG_NAME, read_json, require_finite

WEIGHTS_NAME = "model.safetensors"
MOST_TOKENS = 512  # of a tokenizer that knows no limit


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
    """CLIP's embeddings [B, E] of pictures [B, 3, H, W] in [-1, 1]; refuses a text encoder that sees no pictures."""
    if not isinstance(tower, Clip):
        raise UserError("conditions.image_embedding: clip must be a CLIP with its image tower")
    return tower.encode_image(images).float()
