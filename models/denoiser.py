"""The network that is trained: a U-Net together with what embeds its conditions."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.errors import UserError
from conf.schema.networks import UNetConfig
from models.attention import AttentionControl
from models.conditions import Conditioning, Embedders, Inputs
from models.formats.tensor_stream import TensorStream, stream_of
from models.formats.weights import Weights, check_names, read_tensors, save_file_atomic
from models.unet import UNet

CONDITIONS_NAME = "conditions.safetensors"  # beside the U-Net's own files, where conditions have parameters
EXPORT_AGAIN = "export that training again"
UNET, CONDITIONS = "unet.", "conditions."  # what names of parameters begin with


class Denoiser(nn.Module):
    """One module for the optimiser, the average and the checkpoints; its parts are `unet` and `conditions`."""

    def __init__(self, unet: UNet, conditions: Embedders) -> None:
        super().__init__()
        self.unet, self.conditions = unet, conditions
        latent, beside, inputs = unet.cfg.out_channels, conditions.channels, unet.cfg.in_channels
        if unet.cfg.cross_attention_dim is not None and not conditions.give_tokens:
            raise UserError(
                f"model.cross_attention_dim={unet.cfg.cross_attention_dim}: no condition gives tokens; set it to null"
            )
        if inputs != latent + beside:
            raise UserError(
                f"model.in_channels={inputs}: must be {latent + beside}, {latent} of the latent (model.out_channels) "
                f"and {beside} of the conditions"
            )

    def forward(self, x_t: Tensor, timesteps: Tensor, inputs: Inputs) -> Tensor:
        """The prediction [B, C, h, w] for noisy latents of that shape, timesteps [B] and the conditions' arrays.

        A student of distillation finds the scales of guidance [B] among them, as "guidance", and a mean flow the
        lengths of the steps.
        """
        return self.predict(x_t, timesteps, self.conditions(inputs)._replace(guidance=inputs.get("guidance")))

    def predict(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, attn_control: AttentionControl | None = None
    ) -> Tensor:
        """The prediction from conditions that are embedded already, so that many calls share them."""
        sample = x_t if conditioning.channels is None else torch.cat([x_t, conditioning.channels.to(x_t.dtype)], dim=1)
        vector, guidance = conditioning.vector, conditioning.guidance
        return self.unet(sample, timesteps, conditioning.context, attn_control, vector=vector, guidance=guidance)

    def prepared(self, conditioning: Conditioning) -> Conditioning:
        """Put keys and values in the place of the tokens: they are computed once for all calls."""
        if not isinstance(conditioning.context, Tensor):
            return conditioning
        return conditioning._replace(context=self.unet.keys_values(conditioning.context))

    def save_pretrained(self, folder: str | Path, weights: Weights, metadata: Mapping[str, str] | None = None) -> None:
        """Write weights of this module: the U-Net's in diffusers' format, those of the conditions beside them.

        `metadata`: what the U-Net's file says of itself.
        """
        stream = weights if isinstance(weights, TensorStream) else stream_of(weights)
        # The weights may come one at a time, gathered from many ranks: the conditions' few are set aside on the way.
        own: dict[str, Tensor] = {}

        def of_unet() -> Iterator[Tensor]:
            for name, tensor in zip(stream.specs, stream.tensors, strict=True):
                if name.startswith(UNET):
                    yield tensor
                else:
                    own[name.removeprefix(CONDITIONS)] = tensor.detach().cpu()

        specs = {name.removeprefix(UNET): spec for name, spec in stream.specs.items() if name.startswith(UNET)}
        part = TensorStream(specs, of_unet())
        self.unet.save_pretrained(folder, part, metadata)
        part.drain()  # conditions whose dtype comes after the U-Net's
        if own:
            save_file_atomic(Path(folder) / CONDITIONS_NAME, own)

    def load_conditions(self, folder: str | Path) -> None:
        """Take the parameters of those conditions that another training had, too, if it had any.

        Raises:
            UserError: they are there, but of another shape.
        """
        path = Path(folder) / CONDITIONS_NAME
        found = read_tensors(path, EXPORT_AGAIN) if path.is_file() else {}
        for name, part in self.conditions.kinds.items():
            prefix = f"parts.{name}."
            if own := {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}:
                check_names(f"{path}: conditions.{name}", part.state_dict(), own)
                part.load_state_dict(own)

    @classmethod
    def from_pretrained(cls, folder: str | Path, conditions_of: Callable[[UNetConfig], Embedders]) -> Self:
        """Read what `save_pretrained` wrote, or a U-Net of others where the conditions have no parameters.

        Args:
            conditions_of: builds those of a U-Net.

        Raises:
            UserError: a missing or broken file, or another architecture.
        """
        unet, path = UNet.from_pretrained(folder), Path(folder) / CONDITIONS_NAME
        conditions = conditions_of(unet.cfg)
        if expected := conditions.state_dict():
            found = read_tensors(path, EXPORT_AGAIN)
            check_names(str(path), expected, found)
            conditions.load_state_dict(found)
        return cls(unet, conditions)


def widened(weights: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """A U-Net's weights for an input with further channels, which begin at zero: it computes what it did."""
    kernel = weights["conv_in.weight"]  # [widths[0], in_channels, 3, 3]
    return {**weights, "conv_in.weight": F.pad(kernel, (0, 0, 0, 0, 0, channels - kernel.shape[1]))}
