"""Does a picture show what its prompt says? A probe trained on real demo images reads kind, colour and background.

It is honest only as far as it is right on real images that it never saw: that accuracy is reported beside every score.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from conf.errors import UserError
from conf.schema import ImageConfig
from data.datasets import ImageDataset
from data.shards import atomic_path
from train.engine.runtime import Runtime

ATTRIBUTES = ("kind", "background", "color")
STEPS, BATCH = 400, 64
PEAK_LR = 3e-3


class ProbeNet(nn.Module):
    """Four strided convolutions and one linear head per attribute."""

    def __init__(self, classes: dict[str, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 96), (96, 128)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(256, count) for name, count in classes.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] in [-1, 1] -> logits [B, classes] per attribute."""
        h = self.body(images)  # [B, 128, H/16, W/16]
        pooled = torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1)  # [B, 256]
        return {name: head(pooled) for name, head in self.heads.items()}


@dataclass(slots=True)
class Probe:
    """The trained network and the words that its classes stand for."""

    network: ProbeNet
    words: dict[str, list[str]]

    def save(self, path: Path) -> None:
        """One file, whole or not there."""
        with atomic_path(path) as temporary:
            save_file(self.network.state_dict(), temporary, {"words": json.dumps(self.words)})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Probe":
        """What `save` wrote."""
        with safe_open(path, framework="pt") as file:
            words: dict[str, list[str]] = json.loads(file.metadata()["words"])
            network = ProbeNet({name: len(listed) for name, listed in words.items()})
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return cls(network.eval().to(device), words)

    @torch.no_grad()
    def correct(self, images: Tensor, metas: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Per attribute, whether [B] the picture shows what its metadata says."""
        logits = self.network(images)
        right = {}
        for name, words in self.words.items():
            read = [words[i] for i in logits[name].argmax(1).tolist()]
            right[name] = torch.tensor([word == meta[name] for word, meta in zip(read, metas, strict=True)])
        return right


def cached_probe(folder: str, images: ImageConfig, seed: int, cache: Path, runtime: Runtime) -> Probe:
    """The probe of the pictures in a folder of shards, trained once by the main process and kept; collective."""
    dataset = ImageDataset(folder, images, seed)
    known = json.dumps([dataset.digest, images.resolution, seed, STEPS])
    path = cache / f"probe-{hashlib.sha256(known.encode()).hexdigest()[:16]}.safetensors"
    if runtime.is_main and not path.is_file():
        train_probe(dataset, seed, runtime.device).save(path)
    runtime.barrier()
    return Probe.load(path, runtime.device)


def require_attributes(item: dict[str, Any]) -> None:
    """Refuse a sample that does not say what it shows."""
    missing = [name for name in ATTRIBUTES if name not in item["meta"]]
    if missing:
        raise UserError(
            f"prompt_following=true: sample '{item['key']}' names no {missing[0]} in its JSON; only the demo set "
            "does: set prompt_following=false"
        )


def labels(dataset: ImageDataset) -> tuple[Tensor, Tensor, dict[str, list[str]]]:
    """All images [N, 3, H, W], their classes [N, attributes] and the words that the classes stand for."""
    items = [dataset.at(index) for index in range(dataset.samples)]
    for item in items:
        require_attributes(item)
    words = {name: sorted({item["meta"][name] for item in items}) for name in ATTRIBUTES}
    index = {name: {word: i for i, word in enumerate(listed)} for name, listed in words.items()}
    classes = [[index[name][item["meta"][name]] for name in ATTRIBUTES] for item in items]
    return torch.stack([item["image"] for item in items]), torch.tensor(classes), words


def train_probe(dataset: ImageDataset, seed: int, device: torch.device) -> Probe:
    """Fit the probe to a demo set; half of each batch is blurred, as decoded pictures are softer than drawn ones."""
    images, classes, words = labels(dataset)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # initial weights
    network = ProbeNet({name: len(listed) for name, listed in words.items()}).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), PEAK_LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        batch = soften(images[chosen], generator).to(device)
        logits = network(batch)
        targets = classes[chosen].to(device)
        loss = sum((F.cross_entropy(logits[n], targets[:, i]) for i, n in enumerate(ATTRIBUTES)), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Probe(network.eval(), words)


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur the second half of a batch [B, 3, H, W] and add a little noise to all of it."""
    sharp, soft = images.chunk(2)
    soft = F.avg_pool2d(F.pad(soft, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    both = torch.cat([sharp, soft])
    return both + 0.05 * torch.randn(both.shape, generator=generator)


def accuracy(probe: Probe, dataset: ImageDataset, device: torch.device) -> dict[str, float]:
    """Share of real images read rightly, per attribute: `probe/accuracy/<attribute>`."""
    items = [dataset.at(index) for index in range(dataset.samples)]
    images = torch.stack([item["image"] for item in items]).to(device)
    right = probe.correct(images, [item["meta"] for item in items])
    return {f"probe/accuracy/{name}": hits.float().mean().item() for name, hits in right.items()}
