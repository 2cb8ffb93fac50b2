"""The preview: a page, a sheet and statistics that say what the data set is."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conf.entry import compose
from conf.errors import UserError
from conf.schema import BuildRun, CacheDtype, ImageConfig, PreviewRun, Source
from data.building.build import build_shards
from data.image_dataset import ImageDataset
from data.latent_dataset import LatentDataset
from data.latent_record import LatentWriter
from data.shards.manifest import Manifest
from data.shards.shard import ShardReader, ShardWriter
from train.board import preview
from train.engine.image_grid import to_uint8
from train.engine.runtime import Runtime


def preview_of(project: Any, runtime: Runtime, data: Path, output: Path, *overrides: str) -> str:
    """The page that the command writes."""
    options = [f"run_dir={project.folder}", f"data={data}", f"output_dir={output}", "runtime=cpu", *overrides]
    preview.write_preview(compose("preview", PreviewRun, options), runtime)
    return (output / "preview.html").read_text()


def test_images_are_shown_and_measured(scenes: Any, runtime: Runtime, tmp_path: Path) -> None:
    data = scenes.folder / "shards" / "train"
    page = preview_of(scenes, runtime, data, tmp_path, "sheet_images=10")
    manifest = Manifest.load(data)
    assert f"<td>samples<td>{manifest.samples}" in page and page.count("data:image/png;base64,") == 2
    assert "<td>width<td>32<td>32<td>32<td>32<td>32" in page and "<td>aspect<td>1<td>1" in page
    assert "&quot;made_by&quot;: &quot;data/build_shards.py&quot;" in page
    with Image.open(tmp_path / "contact_sheet.png") as sheet, Image.open(tmp_path / "statistics.png") as figure:
        assert sheet.width > 8 * 128 and figure.width > 900
        assert np.asarray(sheet).std() > 20


def test_class_names_are_drawn_as_they_are() -> None:
    names = ["under $5", "over $5", "x^2 $\\frac{$", "<b>&amp;", f"{'a' * 30}b", f"{'a' * 30}c"]
    survey = preview.Survey(classes={"samples": Counter({name: 3 for name in names}), "boxes": Counter()})
    assert preview.histograms(survey).width > 900


def test_classes_are_counted_and_boxes_drawn(scenes: Any, runtime: Runtime, tmp_path: Path) -> None:
    page = preview_of(scenes, runtime, scenes.folder / "shards" / "train", tmp_path / "scenes", "sheet_images=10")
    readers = map(ShardReader, sorted((scenes.folder / "shards" / "train").glob("*.tar")))
    classes = Counter(json.loads(bytes(reader[i]["json"]))["class"] for reader in readers for i in range(len(reader)))
    assert all(f"<tr><td>{name}<td>{count}<td>" in page for name, count in classes.items()) and len(classes) == 4

    options = {"output_dir": str(tmp_path / "shards"), "samples": 12, "resolution": 64, "workers": 1}
    build_shards(BuildRun(run_dir=".", source=Source.layout, **options))
    data = tmp_path / "shards" / "train"
    page = preview_of(scenes, runtime, data, tmp_path / "layout", "sheet_images=12")
    dataset = ImageDataset(data, ImageConfig(resolution=128), 0, labels=True)
    assert "<h2>Classes of boxes</h2>" in page and "<td>box area<td>" in page
    for image, index in zip(preview.readable_images(dataset, 100)[0], range(dataset.samples), strict=True):
        item = dataset.at(index)
        changed = (image != to_uint8(item["image"][None])[0]).any(axis=-1)
        for left, top, right, bottom in (np.multiply(box.corners, 128).astype(int) for box in item["labels"].boxes):
            assert changed[bottom - 1, left:right].mean() > 0.9 and changed[top:bottom, right - 1].mean() > 0.9


def test_the_page_has_captions_as_text(scenes: Any, runtime: Runtime, tmp_path: Path) -> None:
    """In the fonts of whoever looks at it: an image could show those of this machine alone."""
    data, captions = tmp_path / "shards" / "train", ["고양이", "ድመት", "красный кот", "a <b>cat</b>"]
    reader = ShardReader(scenes.folder / "shards" / "train" / "00000.tar")
    with ShardWriter(data, 100) as writer:
        for i, caption in enumerate(captions):
            files = {"png": bytes(reader[i]["png"]), "txt": caption.encode()}
            writer.add(f"{i}", files | {"json": json.dumps({"class_id": i, "class": caption}).encode()})
    page = preview_of(scenes, runtime, data, tmp_path / "out")
    assert all(f'<figcaption dir="auto">{caption}</figcaption>' in page for caption in captions[:3])
    assert "a &lt;b&gt;cat&lt;/b&gt;</figcaption>" in page
    assert page.count('<div class="one"') == 4 and page.count("data:image/png;base64,") == 2


def test_caption_lengths_are_those_of_all_samples(scenes: Any) -> None:
    dataset = ImageDataset(scenes.folder / "shards" / "train", scenes.config("clip").images, 0)
    survey = preview.survey_images(dataset, range(dataset.samples))
    lengths = [len(dataset.at(i)["caption"]) for i in range(dataset.samples)]
    assert survey.numbers["caption length"] == lengths and not survey.broken


def test_latents_are_decoded_and_measured_per_channel(latents: Any, runtime: Runtime, tmp_path: Path) -> None:
    data = latents.folder / "latents" / "train"
    page = preview_of(latents, runtime, data, tmp_path, "sheet_images=8")
    assert all(f"<td>channel {channel}<td>" in page for channel in range(4)) and "<td>tokens<td>" in page
    dataset = LatentDataset(data, 0)
    numbers = preview.survey_latents(dataset, range(dataset.samples)).numbers
    for channel in range(4):
        assert np.mean(numbers[f"channel {channel}"]) == pytest.approx(
            dataset.manifest.stats["mean"][channel], abs=2e-3
        )
    shown = preview.decoded_images(compose("preview", PreviewRun, [f"run_dir={latents.folder}"]), dataset, runtime)[0]
    images = ImageDataset(latents.folder / "shards" / "train", latents.config("latents").images, 0)
    original = (images.at(0)["image"].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(shown[0] - original).mean() < 60  # 14 dB: an image of the same scene


def test_latents_without_captions_are_measured(tmp_path: Path) -> None:
    with LatentWriter(tmp_path, 9, CacheDtype.fp16) as writer:
        writer.add("0", np.ones((1, 4, 2, 2), np.float32), None, "a class", {})
    provenance = {"conditions": {"class_label": {}}}
    Manifest(kind="latents", shards=writer.close(), provenance=provenance).save(tmp_path)
    survey = preview.survey_latents(LatentDataset(tmp_path, 0), [0])
    assert survey.numbers["caption length"] == [7] and "tokens" not in survey.numbers


def test_charts_of_nothing_are_drawn() -> None:
    assert preview.histograms(preview.Survey()).width > 0


def test_rejects_and_broken_images_are_counted_by_reason(scenes: Any, runtime: Runtime, tmp_path: Path) -> None:
    data = tmp_path / "shards" / "train"
    reader = ShardReader(scenes.folder / "shards" / "train" / "00000.tar")
    with ShardWriter(data, 100) as writer:
        for i in range(5):
            files = {n: bytes(v) for n, v in reader[i].items() if n != "__key__"}
            writer.add(reader.key(i), files | ({"png": b"<b>no</b>"} if i == 2 else {}))
        writer.add("odd", files | {"json": b'{"class_id": 1, "class": 5}'})
    reject = {"key": "9", "path": "a.png", "reason": "<i>odd</i>"}
    (tmp_path / "shards" / "rejects.jsonl").write_text(json.dumps(reject) + "\n")
    page = preview_of(scenes, runtime, data, tmp_path / "out")
    assert "<td>label class<td>1" in page
    assert "&lt;i&gt;odd&lt;/i&gt;<td>1" in page and "<i>" not in page  # text of others is never markup
    assert "<td>caption length<td>" in page


def test_latents_without_their_autoencoder_name_the_option(latents: Any, runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        preview_of(latents, runtime, latents.folder / "latents" / "train", tmp_path, "autoencoder=nowhere")


def test_a_folder_without_shards_is_refused(scenes: Any, runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shards at"):
        preview_of(scenes, runtime, tmp_path, tmp_path / "out")
