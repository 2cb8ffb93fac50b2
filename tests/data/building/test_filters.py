"""Filters: each drops what it says, the report counts it, and copies are found however they were scaled."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from conf.errors import UserError
from conf.schema import BuildRun, FilterConfig, Source
from data.building.build import REJECTS, build_shards
from data.building.filters import Dropped, NearDuplicates, check_size, check_texts, perceptual_hash
from data.shards.shard import ShardReader


def dropped_by(check: Any, *given: Any) -> str:
    """Name of the filter, or nothing."""
    try:
        check(*given)
    except Dropped as drop:
        return drop.filter_name
    return ""


@pytest.mark.parametrize(
    ("filters", "size", "name"),
    [
        ({}, (1, 5000), ""),
        ({"min_side": 64}, (64, 64), ""),
        ({"min_side": 64}, (63, 500), "min_side"),
        ({"max_aspect": 2.0}, (200, 100), ""),
        ({"max_aspect": 2.0}, (100, 201), "max_aspect"),
    ],
)
def test_size(filters: dict[str, Any], size: tuple[int, int], name: str) -> None:
    assert dropped_by(check_size, FilterConfig(**filters), *size) == name


@pytest.mark.parametrize(
    ("filters", "caption", "meta", "name"),
    [
        ({"min_caption": 3}, "ab", {}, "min_caption"),
        ({"min_caption": 3, "max_caption": 3}, "abc", {}, ""),
        ({"max_caption": 3}, "abcd", {}, "max_caption"),
        ({"min_score": {"aesthetic": 5}}, "x", {"aesthetic": 5}, ""),
        ({"min_score": {"aesthetic": 5}}, "x", {"aesthetic": "5.5"}, ""),
        ({"min_score": {"aesthetic": 5}}, "x", {"aesthetic": 4.9}, "min_score.aesthetic"),
        ({"min_score": {"aesthetic": 5}}, "x", {}, "min_score.aesthetic"),
        ({"min_score": {"aesthetic": 5}}, "x", {"aesthetic": None}, "min_score.aesthetic"),
        ({"min_score": {"aesthetic": 5}}, "x", {"aesthetic": float("nan")}, "min_score.aesthetic"),
        ({"min_score": {"aesthetic": 5}}, "x", {"aesthetic": "high"}, "min_score.aesthetic"),
        ({"min_score": {"aesthetic": 5}}, "x", {"aesthetic": float("inf")}, "min_score.aesthetic"),
        ({"min_score": {"aesthetic": 5}}, "x", {"aesthetic": "Infinity"}, "min_score.aesthetic"),
        ({"min_score": {"aesthetic": 5}}, "x", {"aesthetic": 10**400}, "min_score.aesthetic"),
        ({"max_score": {"punsafe": 0.1}}, "x", {"punsafe": 0.2}, "max_score.punsafe"),
        ({"max_score": {"punsafe": 0.1}}, "x", {"punsafe": True}, "max_score.punsafe"),
        ({"max_score": {"punsafe": 0.1, "pwatermark": 0.5}}, "x", {"punsafe": 0, "pwatermark": 0.5}, ""),
    ],
)
def test_texts_and_scores(filters: dict[str, Any], caption: str, meta: dict[str, Any], name: str) -> None:
    assert dropped_by(check_texts, FilterConfig(**filters), caption, meta) == name


def test_impossible_filters_are_refused() -> None:
    with pytest.raises(UserError, match="near_duplicates=17"):
        FilterConfig(near_duplicates=17)
    with pytest.raises(UserError, match=r"max_aspect=0\.5"):
        FilterConfig(max_aspect=0.5)


@pytest.mark.parametrize("distance", [0, 1, 4, 10, 16])
def test_near_duplicates_are_those_of_a_full_search(distance: int) -> None:
    random = np.random.default_rng(distance)
    copies, kept = NearDuplicates(distance), list[int]()
    base = [int(value) for value in random.integers(2**63, size=40)]
    found = 0
    for _ in range(800):
        value = base[int(random.integers(40))]
        for bit in random.integers(64, size=int(random.integers(20))):
            value ^= 1 << int(bit)
        near = any((value ^ other).bit_count() <= distance for other in kept)
        assert (copies.find(value) is not None) == near
        found += near
        if not near:
            copies.keep(value)
            kept.append(value)
    assert found > 5


def scene(seed: int, size: int = 96) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(256, size=(6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def test_the_hash_stays_when_a_image_is_scaled_or_blurred() -> None:
    hashes = [perceptual_hash(scene(seed)) for seed in range(30)]
    for seed, value in enumerate(hashes):
        for copy in (scene(seed).resize((60, 60)), scene(seed).filter(ImageFilter.GaussianBlur(1))):
            assert (perceptual_hash(copy) ^ value).bit_count() <= 4
        assert all((value ^ other).bit_count() > 8 for i, other in enumerate(hashes) if i != seed)


def test_scores_that_are_not_finite_drop_their_sample_and_leave_valid_json(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, score in enumerate(("NaN", "Infinity", "-Infinity", "1e999", "0.5", "0.7")):
        scene(number).save(photos / f"{number}.png")
        fields = f'{{"caption": "scene {number}", "score": {score}, "similarity": NaN}}'
        (photos / f"{number}.json").write_text(fields)
    output = tmp_path / "shards"
    build_shards(
        BuildRun(
            run_dir=".",
            output_dir=str(output),
            source=Source.folder,
            path=str(photos),
            filters=FilterConfig(min_score={"score": 0.1}),
            workers=1,
        )
    )
    report = json.loads((output / "report.json").read_text())
    assert report["dropped"] == {"min_score.score": 4} and sum(report["kept"].values()) == 2
    for side in ("train", "heldout"):
        for record in ShardReader(next((output / side).glob("*.tar"))):
            meta = json.loads(bytes(record["json"]), parse_constant=pytest.fail)
            assert meta["similarity"] is None and meta["score"] in (0.5, 0.7)


def test_a_build_reports_what_each_filter_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(30):
        image = scene(10 if i == 25 else i)  # a copy
        if i in (3, 4):
            image = image.resize((20, 90))
        image.save(photos / f"{i:02d}.png")
        (photos / f"{i:02d}.json").write_text(json.dumps({"caption": "word " * (i + 1), "score": i / 30}))
    filters = FilterConfig(
        min_side=32, max_caption=130, min_score={"score": 0.1}, max_score={"score": 2.0}, near_duplicates=4
    )
    output = tmp_path / "shards"
    build_shards(BuildRun(run_dir=".", output_dir=str(output), source=Source.folder, path=str(photos), filters=filters))
    report = json.loads((output / "report.json").read_text())
    assert report["dropped"] == {"max_caption": 4, "min_score.score": 3, "min_side": 2, "near_duplicates": 1}
    assert report["seen"] == 30 and sum(report["kept"].values()) == 20 and report["broken"] == {}
    lines = [json.loads(line) for line in (output / REJECTS).read_text().splitlines()]
    assert {line["path"] for line in lines if line["filter"] == "near_duplicates"} == {"25.png"}
    shown = capsys.readouterr().out
    assert "13.3 %  dropped by filters.max_caption" in shown and "10 dropped by filters" in shown
