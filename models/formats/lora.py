"""Low-rank adapters (Hu et al. 2021, section 4.1): y = W x + alpha / rank · B A x, of which only A and B are trained.

The base weights keep their names; beside `LAYER.weight` stand `LAYER.lora_A.weight` [rank, in] and
`LAYER.lora_B.weight` [out, rank], as in the files of diffusers and peft.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from conf.errors import UserError
from conf.plain_json import dumps, loads_finite
from conf.schema import LoraConfig
from models.formats.weights import require_finite, save_file_atomic

FILE_NAME = "pytorch_lora_weights.safetensors"  # where diffusers looks for one
PREFIX = "unet."  # what tells the U-Net's adapters from a text encoder's in that file, and in a denoiser
METADATA = "lora_adapter_metadata"  # its entry for the options of peft's LoraConfig, as JSON
A, B = "lora_A.weight", "lora_B.weight"
KOHYA = "lora_unet_"  # instead of PREFIX in files of kohya's scripts, where layers have underscores for dots
PARTS = {A: "A", B: "B", "lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}  # by the ends of names


class LoraLinear(nn.Linear):
    """A linear layer with an adapter that begins as nothing: B is zero."""

    def __init__(self, base: nn.Linear, cfg: LoraConfig) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = cfg.scale
        self.lora_A = nn.Linear(base.in_features, cfg.rank, bias=False)
        self.lora_B = nn.Linear(cfg.rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))


def add_adapters(network: nn.Module, cfg: LoraConfig) -> None:
    """Give the layers that `cfg.modules` names an adapter each, in place, and freeze all else.

    Raises:
        UserError: a name that no plain linear layer of the network ends in.
    """
    layers = {path: module for path, module in network.named_modules() if type(module) is nn.Linear}
    network.requires_grad_(False)
    for ending in cfg.modules:
        chosen = [path for path in layers if f".{path}".endswith(f".{ending}")]
        if not chosen:
            raise UserError(f"lora.modules: no linear layer of the network is called '{ending}'; leave it out")
        for path in chosen:
            parent, _, child = path.rpartition(".")
            setattr(network.get_submodule(parent), child, LoraLinear(layers[path], cfg))


def adapters_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict that was trained."""
    return {name: tensor for name, tensor in weights.items() if name.endswith((A, B))}


def merged(weights: Mapping[str, Tensor], cfg: LoraConfig) -> dict[str, Tensor]:
    """The state dict of an ordinary network that computes the same: W + alpha / rank · B A."""
    adapters = adapters_of(weights)
    whole = {name: tensor for name, tensor in weights.items() if name not in adapters}
    for name in adapters:
        if name.endswith(A):
            layer = name.removesuffix(A)
            base = f"{layer}weight"
            whole[base] = whole[base] + cfg.scale * adapters[layer + B] @ adapters[name]
    return whole


def save_adapters(
    folder: Path, weights: Mapping[str, Tensor], cfg: LoraConfig, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the adapters of a denoiser's state dict as `load_lora_weights` of diffusers' pipelines reads them.

    `metadata`: what else the file says of itself.
    """
    options = {"r": cfg.rank, "lora_alpha": cfg.numerator, "target_modules": cfg.modules}
    written = {METADATA: dumps({PREFIX + name: value for name, value in options.items()}), **(metadata or {})}
    tensors = adapters_of(weights)
    folder.mkdir(parents=True, exist_ok=True)
    save_file_atomic(folder / FILE_NAME, tensors, written)


@dataclass(frozen=True, slots=True)
class Adapters:
    """Adapters of a U-Net, as a file holds them."""

    source: str  # for messages
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # names with underscores for dots -> PARTS
    options: dict[str, Any] = field(default_factory=dict)  # of peft's LoraConfig, where the file tells them
    metadata: dict[str, str] = field(default_factory=dict)  # all that it tells

    @torch.no_grad()
    def merge(self, network: nn.Module, scale: float) -> None:
        """Add them `scale` times to the weights, in place.

        Raises:
            UserError: a layer that the network does not have, or of another shape.
        """
        weights = {name.replace(".", "_"): (name, tensor) for name, tensor in network.state_dict().items()}
        for layer, parts in self.layers.items():
            name, weight = weights.get(f"{layer}_weight", ("", None))
            if weight is None:
                raise UserError(f"lora={self.source}: of another network: unet= has no layer '{layer}'")
            name = name.removesuffix(".weight")
            change = self._change(name, parts)  # [out, in]
            if change.shape != weight.flatten(1).shape:
                theirs, ours = (" x ".join(map(str, matrix.shape)) for matrix in (change, weight.flatten(1)))
                raise UserError(f"lora={self.source}: of another network: {name} is {theirs} there, {ours} in unet=")
            weight += scale * change.view_as(weight)

    def _change(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """alpha / rank · B A, as peft has it; convolutions as matrices."""
        if not {"A", "B"} <= parts.keys():
            raise UserError(f"lora={self.source}: damaged: {layer} lacks one of its two matrices; copy it again")
        if min(parts["A"].ndim, parts["B"].ndim) < 2 or not 0 < len(parts["A"]) == parts["B"].shape[1]:
            raise UserError(f"lora={self.source}: damaged: the two matrices of {layer} do not fit; copy it again")
        a, b = (parts[part].flatten(1).float() for part in "AB")
        try:
            alpha = float(parts["alpha"]) if "alpha" in parts else self._alpha(layer, len(a))
        except (TypeError, ValueError, RuntimeError, re.error):  # several values, words, no pattern
            alpha = math.nan
        if not math.isfinite(alpha):
            raise UserError(f"lora={self.source}: damaged: {layer} has no alpha that is a number")
        return alpha / (math.sqrt(len(a)) if self.options.get("use_rslora") else len(a)) * b @ a

    def _alpha(self, layer: str, rank: int) -> float:
        """Alpha of the layer's own pattern, else that of all layers, else the rank."""
        patterns = self.options.get("alpha_pattern") or {}
        for pattern, alpha in patterns.items() if isinstance(patterns, dict) else ():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                return float(alpha)
        alpha = self.options.get("lora_alpha")
        return rank if alpha is None else float(alpha)


def adapter_file(source: str) -> Path:
    """The file that `lora=` names, itself or by its folder."""
    path = Path(source)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"lora={source}: no such file; name one of adapters (.safetensors) or a folder with {FILE_NAME}"
        )
    return file


def load_adapters(source: str) -> Adapters:
    """Adapters of a U-Net in the format of diffusers and peft, or of kohya's scripts.

    Raises:
        UserError: no such file, or one that holds something else.
    """
    file = adapter_file(source)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
        stored = loads_finite(metadata.get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"lora={source}: not a readable safetensors file ({error}); copy it again") from None
    if not isinstance(stored, dict):
        raise UserError(f"lora={source}: its {METADATA} is no JSON object; copy it again")
    options = {name.removeprefix(PREFIX): value for name, value in stored.items() if name.startswith(PREFIX)}
    found = Adapters(source, options=options, metadata=metadata)
    for name, tensor in require_finite(file, tensors).items():
        ending = next((ending for ending in PARTS if name.endswith(f".{ending}")), None)
        start = next((start for start in (PREFIX, KOHYA) if name.startswith(start)), None)
        if ending is None or start is None:
            raise UserError(f"lora={source}: '{name}' is no adapter of a U-Net; only files of those alone are read")
        layer = name.removeprefix(start).removesuffix(f".{ending}").replace(".", "_")
        found.layers.setdefault(layer, {})[PARTS[ending]] = tensor
    return found
