"""CLIP behind a small interface: open_clip's model, tokenizer and loss. Nothing else imports open_clip.

Radford et al. 2021 (arXiv:2103.00020). The text tower's token states condition the U-Net.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from conf.errors import UserError
from conf.schema.networks import ClipConfig
from models.formats.weights import CONFIG_NAME, check_names, read_json, read_tensors, require_finite, save_folder

WEIGHTS_NAME = "open_clip_model.safetensors"
DESCRIPTION_NAME = "open_clip_config.json"  # open_clip's own, in folders from its hub: architecture and colours
MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5


class Clip(nn.Module):
    """Image and text tower with one embedding space; random weights unless built by a `from_` method.

    Args:
        config: sizes; with `pretrained="NAME/TAG"` the architecture of that open_clip model instead.
        description: the content of an `open_clip_config.json`, whose architecture counts above all.

    Raises:
        UserError: sizes that do not fit each other, or a model that is not CLIP with the BPE tokenizer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ClipConfig, description: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.description = description
        if description is not None:
            architecture, tag = description["model_cfg"], description.get("preprocess_cfg", {})
            _require_plain(architecture, DESCRIPTION_NAME)
        elif config.pretrained is None:
            architecture, tag = _from_sizes(config), dict[str, Any]()
        else:
            architecture, tag = _from_registry(config.pretrained)
        self.config = _sizes(config, architecture)
        self.quick_gelu = bool(architecture.get("quick_gelu", False))
        self.network = open_clip.CLIP(**architecture)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.config.context_length)
        for name, default in (("mean", OPENAI_DATASET_MEAN), ("std", OPENAI_DATASET_STD)):
            value = torch.tensor(tag.get(name, default)).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def from_config(cls, config: ClipConfig) -> "Clip":
        """Pretrained weights when `config.pretrained` asks for them, else random ones of the given sizes."""
        return cls(config) if config.pretrained is None else cls.from_pretrained(config.pretrained)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Clip":
        """Load a folder that `save_pretrained` or open_clip wrote, or a model "NAME/TAG" from open_clip's hub or cache.

        Raises:
            UserError: none of them, weights that cannot be had, or weights that do not fit.
        """
        path = Path(source)
        if path.is_dir():
            description = _read_description(path / DESCRIPTION_NAME)
            clip = cls(_read_config(path / CONFIG_NAME, description is None), description)
            weights = read_tensors(path / WEIGHTS_NAME, f"give a folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
            check_names(str(path / WEIGHTS_NAME), clip.network.state_dict(), weights)
            clip.network.load_state_dict(weights, strict=True)
            return clip
        clip = cls(ClipConfig(pretrained=str(source)))
        open_clip.load_checkpoint(clip.network, str(pretrained_file(str(source))), strict=True, weights_only=True)
        require_finite(source, clip.network.state_dict())
        return clip

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` (a ClipConfig) and `open_clip_model.safetensors` (open_clip's parameter names)."""
        config = {"_class_name": "Clip", **asdict(self.config)}
        save_folder(folder, config, self.network.state_dict(), weights_name=WEIGHTS_NAME)
        if self.description is not None:
            (Path(folder) / DESCRIPTION_NAME).write_text(json.dumps(self.description, indent=2), encoding="utf-8")

    def checkpoint_gradients(self) -> None:
        """Train in less memory and more time: each block of both towers is computed again in the backward pass."""
        self.network.set_grad_checkpointing(True)

    def tokenize(self, texts: list[str]) -> Tensor:
        """[B, L] int64: start token, byte pairs, end token, zeros; a longer text is cut and keeps its end token."""
        return self.tokenizer(texts)

    @property
    def text_width(self) -> int:
        """D, channels of the text states."""
        return self.config.text_width

    @property
    def context_length(self) -> int:
        """L, tokens of a text."""
        return self.config.context_length

    def text_states(self, tokens: Tensor) -> Tensor:
        """States [B, L, D] of tokens [B, L] after the final layer norm, without the `skip_last` last layers."""
        text = self.network
        x = text.token_embedding(tokens) + text.positional_embedding  # [B, L, D]
        for block in text.transformer.resblocks[: self.config.text_layers - self.config.skip_last]:
            x = block(x, attn_mask=text.attn_mask)  # [B, L, D]
        return text.ln_final(x)

    def pooled(self, tokens: Tensor) -> Tensor:
        """Projected states [B, E] of the end token, not scaled to length 1: what SDXL adds to the time's embedding."""
        return self.network.encode_text(tokens, normalize=False)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, E] of length 1 for tokens [B, L]."""
        return self.network.encode_text(tokens, normalize=True)

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings [B, E] of length 1 for square images [B, 3, H, H] in [-1, 1] of any size."""
        side = self.config.image_size
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        return self.network.encode_image(((images + 1) / 2 - self.mean) / self.std, normalize=True)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image embeddings [B, E], text embeddings [B, E] and the factor of their cosine (a scalar, at most 100)."""
        scale = self.network.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        return self.encode_image(images), self.encode_text(tokens), scale


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, rank: int = 0, world: int = 1
) -> Tensor:
    """Symmetric cross entropy of this rank's pairs against the negatives of all ranks; a scalar.

    Its mean over ranks, and so the gradient that DDP averages, equals that of one process with the whole batch.
    Ranks must hold equally many pairs.

    Args:
        image_features: [B, E] of length 1.
        text_features: [B, E] of length 1, row i belongs to image i.
        logit_scale: scalar factor of the cosines.
        rank: of this process.
        world: number of processes.
    """
    loss = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    return loss(image_features, text_features, logit_scale)


@torch.no_grad()
def top1_accuracy(image_features: Tensor, text_features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Share of images whose nearest text is theirs, and of texts whose nearest image is; two scalars.

    Among pairs [N, E], [N, E] with tokens [N, L]; a caption that occurs twice may find either of its images.
    """
    cosines = image_features @ text_features.T  # [N images, N texts]
    same = (tokens[:, None] == tokens[None]).all(dim=-1)  # [N, N]
    rows = torch.arange(len(tokens), device=tokens.device)
    image_to_text = same[rows, cosines.argmax(dim=1)].float().mean()
    text_to_image = same[rows, cosines.argmax(dim=0)].float().mean()
    return image_to_text, text_to_image


def _from_sizes(config: ClipConfig) -> dict[str, Any]:
    """open_clip's description of a CLIP with a ViT of our sizes; heads of the ViT are 64 wide, in small ones 32."""
    head_width = 64 if config.vision_width % 64 == 0 else 32
    if config.vision_width % head_width:
        raise UserError(f"model.vision_width={config.vision_width}: must be a multiple of 32, the width of a head")
    if config.text_width % config.text_heads:
        raise UserError(f"model.text_width={config.text_width}: must be a multiple of text_heads={config.text_heads}")
    if not 0 <= config.skip_last < config.text_layers:
        raise UserError(f"model.skip_last={config.skip_last}: must be from 0 to below text_layers={config.text_layers}")
    if config.image_size % config.patch_size:
        raise UserError(f"model.image_size={config.image_size}: must be a multiple of patch_size={config.patch_size}")
    return {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": config.image_size,
            "layers": config.vision_layers,
            "width": config.vision_width,
            "head_width": head_width,
            "patch_size": config.patch_size,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
        },
    }


def _from_registry(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's description of the model NAME, and what it knows of the weights TAG, for source "NAME/TAG"."""
    name, _, tag = source.partition("/")
    architecture, weights = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
    if not architecture or not weights:
        raise UserError(
            f"clip '{source}' is neither a folder written by train_clip nor an open_clip model NAME/TAG "
            "such as ViT-B-32/laion2b_s34b_b79k"
        )
    _require_plain(architecture, source)
    quick_gelu = bool(weights.get("quick_gelu", architecture.get("quick_gelu", False)))
    return {**architecture, "quick_gelu": quick_gelu}, weights


def _require_plain(architecture: dict[str, Any], source: str) -> None:
    text = architecture["text_cfg"]
    if architecture.get("custom_text") or text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise UserError(f"clip '{source}': only CLIP models with the BPE tokenizer are supported, such as ViT-B-32")


def _sizes(config: ClipConfig, architecture: dict[str, Any]) -> ClipConfig:
    """`config` with the sizes that an architecture amounts to; a ViT's keep their defaults where there is none."""
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    found = {
        "embed_dim": architecture["embed_dim"],
        "image_size": vision["image_size"],
        "vision_layers": vision.get("layers"),
        "vision_width": vision.get("width"),
        "patch_size": vision.get("patch_size"),
        "text_layers": text["layers"],
        "text_width": text["width"],
        "text_heads": text["heads"],
        "context_length": text["context_length"],
    }
    sizes = {name: size for name, size in found.items() if isinstance(size, int)}
    return ClipConfig(pretrained=config.pretrained, skip_last=config.skip_last, **sizes)


def pretrained_file(source: str) -> Path | None:
    """The weights "NAME/TAG" in the hub's cache, downloaded if need be; None for what open_clip does not know.

    Raises:
        UserError: they cannot be had.
    """
    name, _, tag = source.partition("/")
    known = open_clip.get_pretrained_cfg(name, tag)
    if not known:
        return None
    try:
        return Path(open_clip.download_pretrained(known))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"clip '{source}': its weights are neither in the Hugging Face cache nor to be downloaded "
            f"({type(error).__name__}): fetch them once where there is a network and copy the cache (HF_HOME), "
            "or give the folder of a CLIP trained with train/train_clip.py"
        ) from error


def _read_description(path: Path) -> dict[str, Any] | None:
    """open_clip's description of a folder, if it has one."""
    if not path.is_file():
        return None
    found = read_json(path, WEIGHTS_NAME)
    if not isinstance(found.get("model_cfg"), dict) or not {"text_cfg", "vision_cfg"} <= found["model_cfg"].keys():
        raise UserError(f"{path}: has no model_cfg with vision_cfg and text_cfg, as open_clip writes it")
    return found


def _read_config(path: Path, required: bool) -> ClipConfig:
    """`config.json` as save_pretrained wrote it; where it is not `required`, other libraries may have put theirs."""
    if not required and not path.is_file():
        return ClipConfig()
    found = read_json(path, WEIGHTS_NAME)
    if found.pop("_class_name", None) != "Clip":
        if not required:
            return ClipConfig()
        raise UserError(f"{path}: not the configuration of a CLIP that train/train_clip.py made")
    found.setdefault("skip_last", 0)  # older folders do not name it
    sizes = {item.name for item in fields(ClipConfig)} - {"pretrained"}
    wrong = sorted(name for name in found.keys() ^ (sizes | {"pretrained"}))
    least = dict.fromkeys(sizes, 1) | {"skip_last": 0}
    wrong += [name for name in sizes & found.keys() if type(found[name]) is not int or found[name] < least[name]]
    if wrong or not isinstance(found["pretrained"], str | None):
        raise UserError(f"{path}: unknown, missing or unusable: {', '.join(wrong or ['pretrained'])}")
    return ClipConfig(**found)
