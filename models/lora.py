"""Low-rank adapters (Hu et al. 2021, section 4.1): y = W x + alpha / rank · B A x, of which only A and B are trained.

The base weights keep their names; beside `LAYER.weight` stand `LAYER.lora_A.weight` [rank, in] and
`LAYER.lora_B.weight` [out, rank], as in the files of diffusers and peft.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from conf.errors import UserError
from conf.schema import LoraConfig
from models.weights import save_file_atomic

FILE_NAME = "pytorch_lora_weights.safetensors"  # where diffusers looks for one
PREFIX = "unet."  # what tells the U-Net's adapters from a text encoder's in that file, and in a denoiser
METADATA = "lora_adapter_metadata"  # its entry for the options of peft's LoraConfig, as JSON
A, B = "lora_A.weight", "lora_B.weight"


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


def save_adapters(folder: Path, weights: Mapping[str, Tensor], cfg: LoraConfig) -> None:
    """Write the adapters of a denoiser's state dict as `load_lora_weights` of diffusers' pipelines reads them."""
    options = {"r": cfg.rank, "lora_alpha": cfg.numerator, "target_modules": cfg.modules}
    metadata = {METADATA: json.dumps({PREFIX + name: value for name, value in options.items()})}
    tensors = adapters_of(weights)
    folder.mkdir(parents=True, exist_ok=True)
    save_file_atomic(folder / FILE_NAME, tensors, metadata)
