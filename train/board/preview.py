"""What a data set looks like: images with their captions, distributions, and what was left out."""

import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from conf.errors import UserError
from conf.files import atomic_path, atomic_write
from conf.plain_json import loads
from conf.schema import ImageConfig, PreviewRun
from data.image_dataset import ImageDataset
from data.images import size_of
from data.labels import LabelError, Labels, read_labels
from data.latent_dataset import LatentDataset
from data.samples import caption_of, fields_of, image_of
from data.shards.manifest import MANIFEST, Manifest
from models.autoencoder import Autoencoder, finite_or_fp32
from train.board.markup import data_uri
from train.engine.figures import to_png
from train.engine.fonts import charted
from train.engine.image_grid import READABLE, boxed, captioned, on_squares, to_uint8
from train.engine.metric_log import say
from train.engine.precision import autocast
from train.engine.runtime import Runtime

REJECTS = "rejects.jsonl"
SIDE = 128  # pixels of an image on the sheet
COLUMNS = 8  # of the image that holds the images of a page
BARS = 10  # classes in the chart, the commonest
ROWS = 100  # of the table of classes
VALUES = 64  # of a latent that go into the histogram of its channel
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 1200px; color: #2d2d32 }}
table {{ border-collapse: collapse; margin: 1em 0 }} td, th {{ padding: .2em .9em; text-align: right;
border-bottom: 1px solid #ddd }} td:first-child, th:first-child {{ text-align: left }} img {{ max-width: 100% }}
.gallery {{ display: flex; flex-wrap: wrap; gap: 1em }} figure {{ margin: 0 }} figcaption {{ overflow-wrap: anywhere }}
pre {{ background: #f6f6f6; padding: 1em; overflow: auto }}</style>
<h1>{title}</h1>{body}</html>
"""


@dataclass(slots=True)
class Survey:
    """Measurements of a data set: each name has one number per sample (or several)."""

    numbers: dict[str, list[float]] = field(default_factory=dict)
    classes: dict[str, Counter[str]] = field(default_factory=dict)  # what is counted → how many there are of each class
    broken: Counter[str] = field(default_factory=Counter)  # reasons why samples could not be measured

    def add(self, **values: float | Sequence[float]) -> None:
        """One more sample; underscores in the names become spaces."""
        for name, value in values.items():
            many = [value] if isinstance(value, int | float) else value
            self.numbers.setdefault(name.replace("_", " "), []).extend(map(float, many))

    def count(self, labels: Labels) -> None:
        """The classes of one more sample, and of its boxes."""
        if labels.class_id is not None:
            self.classes.setdefault("samples", Counter())[labels.class_name or str(labels.class_id)] += 1
        if labels.boxes:
            names = [box.class_name or str(box.class_id) for box in labels.boxes]
            self.classes.setdefault("boxes", Counter()).update(names)
            self.add(boxes=len(names), box_area=[box.area for box in labels.boxes])


def write_preview(cfg: PreviewRun, runtime: Runtime) -> None:
    """Write `preview.html`, `contact_sheet.png` and `statistics.png`.

    Raises:
        UserError: no shards, or no autoencoder to decode latents with.

    """
    folder, output = Path(cfg.data), Path(cfg.output_dir)
    kind = Manifest.load(folder).kind if (folder / MANIFEST).is_file() else "images"
    dataset: ImageDataset | LatentDataset
    if kind == "latents":
        dataset = LatentDataset(folder, cfg.seed)
        images, captions = decoded_images(cfg, dataset, runtime)
        survey = survey_latents(dataset, spread_indices(dataset.samples, cfg.samples))
    else:
        dataset = ImageDataset(folder, ImageConfig(resolution=SIDE), cfg.seed, labels=True)
        images, captions = readable_images(dataset, cfg.sheet_images)
        survey = survey_images(dataset, spread_indices(dataset.samples, cfg.samples))
    sheet = captioned(images, captions)
    with charted(name for counts in survey.classes.values() for name in counts):
        figure = histograms(survey)
    output.mkdir(parents=True, exist_ok=True)
    for name, image in (("contact_sheet.png", sheet), ("statistics.png", figure)):
        with atomic_path(output / name) as path:
            image.save(path, "PNG")
    page = to_page(
        str(folder), dataset.manifest, survey, rejects_of(folder), [gallery(images, captions), plain(figure)]
    )
    atomic_write(output / "preview.html", page.encode())
    say("preview", f"{dataset.samples:,} samples: {output / 'preview.html'}")


def spread_indices(samples: int, count: int) -> list[int]:
    """At most `count` indices, evenly over all samples."""
    count = min(count, samples)
    return [samples * i // count for i in range(count)]


def readable_images(dataset: ImageDataset, count: int) -> tuple[np.ndarray, list[str]]:
    """Images [N, H, W, 3] of the sheet, boxes drawn on them, and captions; what cannot be read is left out."""
    items, problem = list[dict[str, Any]](), ""
    for index in spread_indices(dataset.samples, count):
        try:
            items.append(dataset.at(index))
        except UserError as error:
            problem = problem or str(error)  # the survey counts it
    if not items:
        raise UserError(f"data: none of {count} samples can be read; the first: {problem}")
    images = to_uint8(torch.stack([item["image"] for item in items]))
    shown = [boxed(image, item["labels"].boxes) for image, item in zip(images, items, strict=True)]
    return np.stack(shown), [item["caption"] for item in items]


@torch.no_grad()
def decoded_images(cfg: PreviewRun, dataset: LatentDataset, runtime: Runtime) -> tuple[np.ndarray, list[str]]:
    """The means of latents as the autoencoder decodes them, with their captions."""
    autoencoder = Autoencoder.from_pretrained(cfg.autoencoder).eval().to(runtime.device)
    images, captions = list[Tensor](), list[str]()
    for batch in dataset.batches_at(spread_indices(dataset.samples, cfg.sheet_images), 16):
        means = batch["moments"].chunk(2, dim=1)[0].to(runtime.device).float()  # [B, C, h, w]
        with autocast(runtime.device, runtime.precision):
            images += finite_or_fp32(autoencoder.decode, means).cpu()
        captions += batch["caption"]
    return to_uint8(on_squares(images)), captions


def survey_images(dataset: ImageDataset, indices: Sequence[int]) -> Survey:
    """Sizes, aspects, captions, classes and boxes; only the headers of the images are read."""
    survey, known = Survey(), dataset.vocabulary.as_dict()
    for counted, group in (("samples", "classes"), ("boxes", "box_classes")):
        if group in known:  # a class without a sample is shown, too
            survey.classes[counted] = Counter({name or str(number): 0 for number, name in enumerate(known[group])})
    for index in indices:
        try:
            record = dataset.records[index]
            content, caption = image_of(record), caption_of(record)
            width, height = size_of(content)
            labels = read_labels(fields_of(record), None, (width, height))
        except LabelError as error:
            survey.broken[f"label {str(error).partition(':')[0]}"] += 1
            continue
        except UserError as error:
            survey.broken[str(error).split(":")[-1].strip()] += 1
            continue
        survey.add(width=width, height=height, aspect=width / height, caption_length=len(caption))
        survey.add(kilobytes=len(content) / 1000)
        survey.count(labels)
    return survey


def survey_latents(dataset: LatentDataset, indices: Sequence[int]) -> Survey:
    """Means per channel, the posterior's spread, and the tokens that captions take."""
    survey = Survey()
    for index in indices:
        item = dataset.at(index)
        mean, logvar = item["moments"].float().chunk(2)  # [C, h, w] each
        for channel, values in enumerate(mean.flatten(1)):
            step = max(1, len(values) // VALUES)
            survey.add(**{f"channel_{channel}": values[::step].tolist()})
        survey.add(posterior_deviation=float((0.5 * logvar).exp().mean()))
        survey.add(caption_length=len(item["caption"]))
        if "tokens" in item:  # captions are a condition
            survey.add(tokens=int((item["tokens"] > 0).sum()))
    return survey


def histograms(survey: Survey) -> Image.Image:
    """One histogram per measurement, and the commonest classes."""
    columns = 3
    rows = max(1, -(-(len(survey.numbers) + len(survey.classes)) // columns))  # none: all that was looked at is broken
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    for number, (counted, counts) in enumerate(survey.classes.items(), start=len(survey.numbers) + 1):
        axes = figure.add_subplot(rows, columns, number)
        bars = counts.most_common(BARS)[::-1]
        axes.barh(range(len(bars)), [count for _, count in bars], color="#4878a8")
        axes.set_yticks(range(len(bars)), [name[:20] for name, _ in bars])
        axes.set_title(f"{counted} of a class ({len(counts)} classes)", fontsize=10)
    for number, (name, values) in enumerate(survey.numbers.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.hist(values, bins=40, color="#4878a8")
        axes.set_title(f"{name} (median {np.median(values):.4g})", fontsize=10)
        axes.set_yticks([])
    return Image.open(io.BytesIO(to_png(figure)))


def rejects_of(folder: Path) -> list[dict[str, Any]]:
    """What the makers of the data set left out: of this side, or of the build as a whole."""
    for path in (folder / REJECTS, folder.parent / REJECTS):
        if path.is_file():
            try:
                found = [loads(line) for line in path.read_bytes().split(b"\n") if line]
            except ValueError:
                raise UserError(f"{path} is damaged: build that data set again, or delete it") from None
            return [line for line in found if isinstance(line, dict)]
    return []


def reason_of(reject: dict[str, Any]) -> str:
    """Why a sample was left out, the same words for the same reason."""
    return f"dropped by filters.{reject['filter']}" if "filter" in reject else str(reject.get("reason", ""))


def to_page(title: str, manifest: Manifest, survey: Survey, rejects: list[dict[str, Any]], shown: Sequence[str]) -> str:
    """One page with everything in it; `shown`: the images and the charts, as HTML."""
    totals = [["samples", f"{manifest.samples:,}"], ["shards", f"{len(manifest.shards):,}"]]
    totals += [["size", f"{manifest.bytes / 1e6:,.1f} MB"], ["rejected", f"{len(rejects):,}"]]
    columns = [(name, np.quantile(values, [0, 0.05, 0.5, 0.95, 1])) for name, values in survey.numbers.items()]
    spreads = [[name, *(f"{q:.4g}" for q in quantiles)] for name, quantiles in columns]
    reasons = Counter(reason_of(reject) for reject in rejects) + survey.broken
    sheet, figure = shown
    provenance = json.dumps(manifest.provenance | {"measured": manifest.stats}, indent=1)
    body = [
        _table(["", ""], totals),
        sheet,
        f"<h2>Distributions</h2>{_table(['', 'least', '5 %', 'median', '95 %', 'most'], spreads)}{figure}",
        *(_class_table(counted, counts) for counted, counts in survey.classes.items()),
        f"<h2>Left out</h2>{_table(['reason', 'samples'], [[r, str(n)] for r, n in reasons.most_common()])}",
        f"<h2>Where it comes from</h2><pre>{html.escape(provenance)}</pre>",
    ]
    return PAGE.format(title=html.escape(title), body="".join(body))


def _class_table(counted: str, counts: Counter[str]) -> str:
    rows = [[name, f"{count:,}", f"{count / max(counts.total(), 1):.1%}"] for name, count in counts.most_common(ROWS)]
    return f"<h2>Classes of {counted}</h2>{_table(['class', counted, 'share'], rows)}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [[f"<th>{html.escape(name)}" for name in head]] if any(head) else []
    cells += [[f"<td>{html.escape(value)}" for value in row] for row in rows]
    return f"<table>{''.join('<tr>' + ''.join(row) for row in cells)}</table>"


def gallery(images: np.ndarray, captions: Sequence[str]) -> str:
    """Images, uint8 [N, H, W, 3], with their captions as text, in the fonts of whoever looks at the page.

    They are the parts of one that the page holds once.
    """
    count, height, width = images.shape[:3]
    rows, scale = -(-count // COLUMNS), max(1, READABLE // width)
    cells = np.zeros((rows * COLUMNS, height, width, 3), np.uint8)
    cells[:count] = images
    sheet = cells.reshape(rows, COLUMNS, height, width, 3).swapaxes(1, 2).reshape(rows * height, COLUMNS * width, 3)
    one = f"width:{width * scale}px;height:{height * scale}px"
    shown = f"background:url({data_uri(Image.fromarray(sheet))}) 0 0/{COLUMNS * 100}% auto"
    style = f"<style>.one{{{one};{shown}}}.gallery figure{{width:{width * scale}px}}</style>"
    figures = [
        f'<figure><div class="one" style="background-position:{-column * width * scale}px {-row * height * scale}px">'
        f'</div><figcaption dir="auto">{html.escape(caption)}</figcaption></figure>'
        for (row, column), caption in zip((divmod(i, COLUMNS) for i in range(count)), captions, strict=True)
    ]
    return f'{style}<div class="gallery">{"".join(figures)}</div>'


def plain(image: Image.Image) -> str:
    """An image as it is."""
    return f'<img src="{data_uri(image)}">'
