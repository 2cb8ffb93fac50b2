"""Judges: small networks that learn from real images to see whether an image shows what its condition asks for.

A judge is honest only as far as it is right on real images that it never saw: that accuracy stands beside its scores.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from conf.files import atomic_path
from conf.process import tell
from conf.schema import ImageConfig
from data.image_dataset import ImageDataset
from train.engine.runtime import Runtime

Item = dict[str, Any]  # of an ImageDataset with labels
READ = 64  # real images read together
PEAK_LR = 3e-3
MOST = 12_000  # images to learn from, which lie in memory


class Judge(nn.Module, ABC):
    """A network, and what its outputs stand for.

    Args:
        facts: plain values from `facts_of`; they say which classes there are.
    """

    option: ClassVar[str]  # of the evaluation, that asks for it: in errors
    group: ClassVar[str]  # of its scores' names: eval/GROUP/NAME
    steps: ClassVar[int] = 400  # of its training
    batch: ClassVar[int] = 64  # images of each

    def __init__(self, facts: Any) -> None:
        super().__init__()
        self.facts = facts

    @classmethod
    @abstractmethod
    def require(cls, item: Item) -> None:
        """Raises UserError for a sample that lacks what is judged."""

    @classmethod
    @abstractmethod
    def facts_of(cls, items: Sequence[Item]) -> Any:
        """What the network must know of the images that it learns from."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of what `correct` finds."""

    @abstractmethod
    def loss(self, images: Tensor, items: Sequence[Item], generator: torch.Generator) -> Tensor:
        """Loss of the readings of real images [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def correct(self, images: Tensor, items: Sequence[Item]) -> dict[str, Tensor]:
        """Columns [B, ...] on the CPU: how far each image shows what its item asks for."""

    def scores(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """The columns of all images as one number each, or more."""
        return {name: column.float().mean().item() for name, column in columns.items()}

    def save(self, path: Path) -> None:
        """One file, whole or not there."""
        with atomic_path(path) as temporary:
            save_file(self.state_dict(), temporary, {"facts": json.dumps(self.facts)})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """The judge that `save` wrote."""
        with safe_open(path, framework="pt") as file:
            judge = cls(json.loads(file.metadata()["facts"]))
            judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return judge.eval().to(device)


def cached_judge(
    kind: type[Judge], folder: str, images: ImageConfig, seed: int, cache: Path, runtime: Runtime
) -> Judge:
    """The judge of the images in a folder of shards, trained once by the main process and kept; collective."""
    dataset = ImageDataset(folder, images, seed, labels=True)
    facts = [kind.__name__, dataset.digest, images.resolution, seed, kind.steps, kind.batch]
    known = json.dumps(facts + list(images.other_filter().values()))
    path = cache / f"judge-{hashlib.sha256(known.encode()).hexdigest()[:16]}.safetensors"
    if runtime.is_main and not path.is_file():
        train_judge(kind, dataset, seed, runtime.device).save(path)
    runtime.barrier()
    return kind.load(path, runtime.device)


def train_judge(kind: type[Judge], dataset: ImageDataset, seed: int, device: torch.device) -> Judge:
    """Fit a judge; half of each batch is blurred, as decoded images are softer than drawn ones."""
    tell("reading images for a judge")
    items = [dataset.at(index) for index in range(0, dataset.samples, -(-dataset.samples // MOST))]
    for item in items:
        kind.require(item)
    images = torch.stack([item.pop("image") for item in items])  # [N, 3, H, W]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # initial weights
    judge = kind(kind.facts_of(items)).to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), PEAK_LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, kind.steps)
    for step in range(kind.steps):
        tell("training a judge", step, kind.steps)
        chosen = torch.randint(len(images), (kind.batch,), generator=generator)
        batch = soften(images[chosen], generator).to(device)
        loss = judge.loss(batch, [items[index] for index in chosen.tolist()], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur the second half of a batch [B, 3, H, W] and add a little noise to all of it."""
    sharp, soft = images.chunk(2)
    soft = F.avg_pool2d(F.pad(soft, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    both = torch.cat([sharp, soft])
    return both + 0.05 * torch.randn(both.shape, generator=generator)


def accuracy(judge: Judge, dataset: ImageDataset, device: torch.device) -> dict[str, float]:
    """Scores of real images: `probe/accuracy/<name>`."""
    found: dict[str, list[Tensor]] = {name: [] for name in judge.columns}
    for start in range(0, dataset.samples, READ):
        items = [dataset.at(index) for index in range(start, min(start + READ, dataset.samples))]
        right = judge.correct(torch.stack([item["image"] for item in items]).to(device), items)
        for name, parts in found.items():
            parts.append(right[name])
    scores = judge.scores({name: torch.cat(parts) for name, parts in found.items()})
    return {f"probe/accuracy/{name}": value for name, value in scores.items()}
