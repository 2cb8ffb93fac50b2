"""The second training: image and text towers whose matrix of similarities is trained towards the identity."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import ClipRun
from data.image_dataset import Batch, ImageDataset
from data.images import in_range
from data.streams import image_stream
from models.clip import Clip, contrastive_loss, top1_accuracy
from models.flops import counted_flops
from models.text import Cuts
from train.engine.backend.distribute import require_compiler
from train.engine.metric_log import MetricLog, say
from train.engine.runtime import Runtime
from train.engine.trainable import Trainable

HELDOUT = 256  # held-out pairs among which each finds its partner, at most


@dataclass(frozen=True, slots=True)
class Tokens:
    """Adds to a batch, where it is loaded, the "tokens" [B, L] of its captions and whether any "fill" the context."""

    tokenizer: Callable[[list[str]], Tensor]

    def __call__(self, batch: Batch) -> Batch:
        """The batch with them."""
        tokens, empty = self.tokenizer(batch["caption"]), self.tokenizer([""])
        return {**batch, "tokens": tokens, "fill": bool((tokens[:, -2] != empty[0, -2]).any())}


class ClipStage:
    """Contrastive learning with the negatives of all ranks."""

    name = "clip"

    def __init__(self, cfg: ClipRun, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        _, accumulation = cfg.batch.split(runtime.world)
        if accumulation > 1:
            raise UserError(
                "batch.micro_batch_size: contrastive learning needs the whole global batch at once; set it to 0 or "
                "lower batch.global_batch_size"
            )
        self.dataset = image_stream(cfg.shards, cfg.images, cfg.seed, cfg.stream, cfg.batch.global_batch_size)
        self.heldout = ImageDataset(f"{cfg.shards}/heldout", cfg.images, cfg.seed, cfg.stream)
        torch.manual_seed(cfg.seed)  # initial weights
        self.clip = Clip.from_config(cfg.model)
        self.extend = Tokens(self.clip.tokenizer)
        side, tokens = self.clip.config.image_size, self.clip.tokenize([""]).to("meta")
        self.bound_to = dict[str, Any]()
        self.flops_per_sample = 3.0 * counted_flops(self.clip, torch.empty(1, 3, side, side, device="meta"), tokens)
        if cfg.runtime.gradient_checkpointing:
            self.clip.checkpoint_gradients()
        if cfg.runtime.compile:
            require_compiler()
            self.clip.compile()  # in place: the parameters keep their names
        self.towers = Trainable(runtime, self.clip, cfg.optim, cfg.batch, cfg.loop.samples, name="clip")
        self.trainables = {"clip": self.towers}
        self.looks_for_cuts = runtime.is_main  # until some captions turn out to be longer than the context

    def micro_step(self, batch: dict[str, Any], last: bool, samples_seen: int) -> dict[str, Tensor]:
        """Forward and backward pass of this rank's part of the batch."""
        tokens = batch["tokens"]  # [B, L]
        if self.looks_for_cuts and batch["fill"] and (cuts := Cuts.of(self.clip, batch["caption"])).count:
            self.looks_for_cuts = False
            say("clip", f"of the first batch with any, {cuts.line('captions')}")
        image, text, scale = self.towers(in_range(batch["pixels"]), tokens)  # [B, D], [B, D], []
        loss = contrastive_loss(image, text, scale, self.runtime.rank, self.runtime.world)
        self.towers.backward(loss, last)
        found_text, _ = top1_accuracy(image.detach(), text.detach(), tokens)
        return {
            "train/loss": loss.detach(),
            "train/in_batch_accuracy": found_text,
            "train/logit_scale": scale.detach(),
        }

    def finish_step(self, samples_seen: int) -> dict[str, Tensor | float]:
        """One optimiser step."""
        return {"train/grad_norm": self.towers.step(samples_seen), "train/lr": self.towers.lr}

    @torch.no_grad()
    def evaluate(self, samples_seen: int, journal: MetricLog) -> dict[str, float]:
        """Retrieval among held-out pairs: a hit is a partner with the same caption (captions may repeat)."""
        count = min(HELDOUT, self.heldout.samples)
        items = [self.heldout.at(i) for i in range(self.runtime.rank, count, self.runtime.world)]
        parts = filter(None, self.runtime.gather_objects(self.encoded(items) if items else None))
        image, text, tokens = (torch.cat(columns) for columns in zip(*parts, strict=True))  # [N, D], [N, D], [N, L]
        found_text, found_image = top1_accuracy(image, text, tokens)
        return {
            "eval/retrieval_image_to_text": float(found_text),
            "eval/retrieval_text_to_image": float(found_image),
            "eval/retrieval_candidates": float(count),
        }

    def encoded(self, items: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        """Image embeddings [n, D], text embeddings [n, D] and tokens [n, L] of pairs, on the CPU."""
        network, device = self.clip.eval(), self.runtime.device
        tokens = network.tokenize([item["caption"] for item in items])
        images = torch.stack([item["image"] for item in items])
        image, text = network.encode_image(images.to(device)), network.encode_text(tokens.to(device))
        network.train()
        return image.cpu(), text.cpu(), tokens

    def export(self, folder: Path) -> None:
        """Both towers and their configuration."""
        if self.runtime.is_main:
            self.clip.save_pretrained(folder)
