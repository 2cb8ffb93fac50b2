"""Shards of others, and mixes of several sources."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sources import config, image

from conf.entry import compose
from conf.errors import UserError
from conf.schema import BuildRun, FilterConfig, ImageConfig, MixedSource, Source
from data.building.build import build_shards
from data.building.sources import open_source
from data.image_dataset import ImageDataset
from data.labels import UNLABELLED, encode_map
from data.shards import remote
from data.shards.manifest import Manifest
from data.shards.shard import ShardReader, ShardWriter

# --- shards of others


def laion(folder: Path, shards: int = 3, samples: int = 6) -> None:
    """Shards as img2dataset writes them."""
    folder.mkdir(parents=True)
    for number in range(shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i in range(samples):
                key, buffer = f"{number:05d}{i:04d}", io.BytesIO()
                pixels = np.random.default_rng(number * samples + i).integers(256, size=(20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "JPEG")
                meta = {"key": key, "caption": f"caption {key}", "width": 24, "aesthetic": i, "original_width": 2400}
                files = {"jpg": buffer.getvalue(), "txt": f"caption {key}".encode(), "json": json.dumps(meta).encode()}
                for extension, content in files.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"successes": samples}))


def test_images_of_every_suffix_are_read_whether_built_from_or_trained_on(tmp_path: Path) -> None:
    """The same photo, as often as not turned by its EXIF; in a tar that is a link."""
    there = tmp_path / "there"
    suffixes = {"avif": "AVIF", "jfif": "JPEG", "jp2": "JPEG2000", "tif": "TIFF", "gif": "GIF", "webp": "WEBP"}
    photo = Image.new("RGB", (24, 20), "red")
    photo.paste("blue", (0, 0, 24, 10))
    with ShardWriter(there, 100) as writer:
        for suffix, format in suffixes.items():
            turned, buffer, exif = format in ("AVIF", "JPEG", "TIFF", "WEBP"), io.BytesIO(), Image.Exif()
            exif[0x0112] = 3
            stored = photo.transpose(Image.Transpose.ROTATE_180) if turned else photo
            stored.save(buffer, format, **({"exif": exif} if turned else {}))
            writer.add(suffix, {suffix.upper(): buffer.getvalue(), "txt": suffix.encode()})
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "00000.tar").symlink_to(there / "00000.tar")
    dataset = ImageDataset(tmp_path / "linked", ImageConfig(resolution=20), 0)
    for index in range(len(suffixes)):
        top, bottom = dataset.at(index)["image"][:, 2, 10], dataset.at(index)["image"][:, 17, 10]
        assert top[2] > 0.8 > -0.8 > top[0] and bottom[0] > 0.8 > -0.8 > bottom[2]
    assert [meta["source_key"] for meta in built(tmp_path, str(tmp_path / "linked"))] == list(suffixes)


def made(output: Path) -> list[dict[str, Any]]:
    """The JSON of all samples of a build, by key."""
    readers = [ShardReader(path) for path in sorted(output.glob("*/*.tar"))]
    found = [json.loads(bytes(reader[i]["json"])) for reader in readers for i in range(len(reader))]
    return sorted(found, key=lambda meta: meta["key"])


def built(tmp_path: Path, path: str, **options: Any) -> list[dict[str, Any]]:
    cfg = BuildRun(
        run_dir=".", output_dir=str(tmp_path / "out"), source=Source.shards, path=path, **{"workers": 1, **options}
    )
    build_shards(cfg)
    return made(tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_of_img2dataset_are_taken_as_they_are(tmp_path: Path, workers: int) -> None:
    laion(tmp_path / "laion")
    found = built(tmp_path, str(tmp_path / "laion"), workers=workers, filters=FilterConfig(min_score={"aesthetic": 2}))
    assert [meta["source_key"] for meta in found] == [f"{n:05d}{i:04d}" for n in range(3) for i in range(2, 6)]
    assert found[0]["key"] == "00000000002" and found[0]["caption"] == "caption 000000002"
    assert (found[0]["original_width"], found[0]["width"]) == (2400, 24)


def test_braces_a_single_tar_and_the_counts_beside_shards(tmp_path: Path) -> None:
    laion(tmp_path / "laion")
    some = config(Source.shards, path=str(tmp_path / "laion" / "{00001..00002}.tar"))
    assert [Path(shard).name for shard in open_source(some).shards] == ["00001.tar", "00002.tar"]
    assert open_source(some).expected() == 12
    assert len(open_source(config(Source.shards, path=str(tmp_path / "laion" / "00001.tar"))).shards) == 1
    for path, message in ((tmp_path / "nothing", "no such folder or .tar"), (tmp_path, r"no \.tar in it")):
        with pytest.raises(UserError, match=message):
            open_source(config(Source.shards, path=str(path)))


def test_broken_and_missing_shards_are_rejects_and_the_rest_is_used(tmp_path: Path) -> None:
    laion(tmp_path / "laion")
    whole = (tmp_path / "laion" / "00001.tar").read_bytes()
    (tmp_path / "laion" / "00001.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512])
    found = built(tmp_path, str(tmp_path / "laion" / "{00000..00003}.tar"))
    keys = [meta["source_key"] for meta in found]
    assert 12 < len(keys) < 18 and keys[:6] == [f"00000{i:04d}" for i in range(6)] and "000020005" in keys
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert ["truncated" in reject["reason"] for reject in rejects] == [True, False]
    assert "samples are used" in rejects[0]["reason"] and "00003.tar is missing" in rejects[1]["reason"]


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_over_http(http: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)
    laion(tmp_path / "served" / "laion", shards=4)
    http.faults |= {"00001.tar": "500", "00002.tar": "stall"}
    found = built(tmp_path, f"{http.url}/laion/{{00000..00003}}.tar", timeout_s=0.5, workers=workers)
    assert {meta["source_key"][:5] for meta in found} == {"00000", "00003"} and len(found) == 12
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert "500 Internal Server Error" in reasons[0] and "silent or stuck for 0.5 s" in reasons[1]
    http.faults |= {f"0000{n}.tar": "500" for n in range(4)}
    with pytest.raises(UserError, match=r"none of 4 samples can be used, most often because: .*500"):
        built(tmp_path / "again", f"{http.url}/laion/{{00000..00003}}.tar")


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def reasons(output: Path) -> list[tuple[str, str]]:
    rejects = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
    return [(reject["path"].rpartition("/")[2], reject["reason"]) for reject in rejects]


def test_captions_in_json_capitals_and_other_formats_are_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "BMP")
    files = {"a.PNG": png(), "a.JSON": b'{"caption": "a"}', "b.bmp": buffer.getvalue(), "b.Txt": b"b"}
    pack(tmp_path / "in" / "00000.TAR", files)
    assert [meta["caption"] for meta in built(tmp_path, str(tmp_path / "in"), heldout_fraction=0)] == ["a", "b"]
    direct = ImageDataset(tmp_path / "in", ImageConfig(resolution=8), 0)
    assert [direct.at(index)["caption"] for index in (0, 1)] == ["a", "b"]


def test_a_reject_says_what_its_sample_has(tmp_path: Path) -> None:
    files = {
        "a.jpg": png(),
        "b.1.jpg": png(),
        "b.txt": b"b",
        "c.xyz": b"",
        "c.txt": b"c",
        "d.png": png(),
        "d.txt": b"d",
    }
    pack(tmp_path / "in" / "0.tar", {**files, "LICENSE": b"free"})
    pack(tmp_path / "in" / "1.tar.gz", {})
    (tmp_path / "in" / "1.tar.gz").write_bytes(b"\x1f\x8b rest")
    assert len(built(tmp_path, str(tmp_path / "in"))) == 1
    assert reasons(tmp_path / "out") == [
        ("0.tar: a", 'no caption: it has no .txt, and no "caption" in a .json; it has .jpg'),
        ("0.tar: b", "no image: it has .1.jpg, .txt; what follows the first dot of a file's name is its extension"),
        ("0.tar: c", "no image: it has .txt, .xyz"),
        ("0.tar: LICENSE", "no extension, and so of no sample"),
        (
            "1.tar.gz",
            f"shard {tmp_path}/in/1.tar.gz is compressed (gzip): unpack it and make a plain .tar of it",
        ),
    ]


def test_nothing_but_empty_shards_is_one_line(tmp_path: Path) -> None:
    pack(tmp_path / "in" / "0.tar", {})
    with pytest.raises(UserError, match=r"^source=shards: there is no sample in path=.*/in$"):
        built(tmp_path, str(tmp_path / "in"))
    sources = [MixedSource(source=Source.shards, path=str(tmp_path / "in")), MixedSource(source=Source.demo)]
    out = str(tmp_path / "mix")
    cfg = BuildRun(run_dir=".", output_dir=out, source=Source.mix, sources=sources, resolution=16, samples=9)
    with pytest.raises(UserError, match=r"^source=mix: there is no sample in one of the sources"):
        build_shards(cfg)
    pack(tmp_path / "in" / "1.tar", {"a.png": png(), "a.txt": b"a", "._a.png": b"of macOS"})
    assert len(built(tmp_path, str(tmp_path / "in"))) == 1 and reasons(tmp_path / "out") == []


def test_shards_below_the_folder_are_mentioned(tmp_path: Path) -> None:
    pack(tmp_path / "in" / "part" / "0.tar", {})
    with pytest.raises(UserError, match=r"no \.tar in it; its subfolders part have some$"):
        open_source(config(Source.shards, path=str(tmp_path / "in")))


@pytest.mark.parametrize("content", ["{}", "[]", '{"successes": NaN}', '{"successes": Infinity}', "[" * 9999])
def test_counts_beside_shards_that_are_none_do_not_matter(tmp_path: Path, content: str) -> None:
    pack(tmp_path / "in" / "0.tar", {"a.png": png(), "a.txt": b"a"})
    (tmp_path / "in" / "0_stats.json").write_text(content)
    assert open_source(config(Source.shards, path=str(tmp_path / "in"))).expected() is None


def test_scores_of_any_size_are_compared(tmp_path: Path) -> None:
    for number, score in enumerate(("1" * 400, "NaN", '"1"', "2", "null")):
        meta = f'{{"caption": "{number}", "score": {score}}}'.encode()
        pack(tmp_path / "in" / f"{number}.tar", {"a.png": png(), "a.json": meta})
    found = built(tmp_path, str(tmp_path / "in"), filters=FilterConfig(min_score={"score": 2}))
    assert [meta["caption"] for meta in found] == ["3"] and len(reasons(tmp_path / "out")) == 4
    assert "NaN" not in (tmp_path / "out" / "rejects.jsonl").read_text()


def labelled(folder: Path, changes: dict[int, dict[str, Any]]) -> None:
    """A shard whose samples have a class, a box and a map; `changes` of their JSON, or of the map's size, by number."""
    folder.mkdir(parents=True)
    with ShardWriter(folder, 100) as writer:
        for i in range(6):
            boxes = [{"box": [0.25, 0, 1, 0.5], "class": "wheel", "class_id": 1, "score": 0.5}]
            meta = {"class": f"class {i % 3}", "class_id": i % 3, "boxes": boxes, **changes.get(i, {})}
            segments = np.full(meta.pop("map", (20, 24)), UNLABELLED, np.uint8)
            segments[5:10] = i
            pixels = np.random.default_rng(i).integers(256, size=(20, 24, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            files = {"png": buffer.getvalue(), "txt": f"caption {i}".encode(), "json": json.dumps(meta).encode()}
            writer.add(f"{i}", {**files, "seg.png": encode_map(segments)})


def test_labels_of_other_shards_pass_through_and_are_checked(tmp_path: Path) -> None:
    other = {"boxes": [{"box": [0, 0, 300, 200], "class_id": 1}]}
    labelled(tmp_path / "in", {2: other, 3: {"map": (20, 20)}, 4: {"class": "else"}})
    found = built(tmp_path, str(tmp_path / "in"), resolution=10, heldout_fraction=0)
    assert [(meta["source_key"], meta["class_id"]) for meta in found] == [("0", 0), ("1", 1), ("5", 2)]
    assert found[0]["boxes"] == [{"box": [0.25, 0, 1, 0.5], "class": "wheel", "class_id": 1, "score": 0.5}]
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["reason"].partition(":")[0] for reject in rejects] == ["boxes[0].box", "seg.png", "class_id"]
    assert rejects[2]["reason"] == "class_id: 1 is 'class 1' in this data set, not 'else'"
    assert Manifest.load(tmp_path / "out" / "train").provenance["labels"] == {
        "classes": ["class 0", "class 1", "class 2"],
        "box_classes": ["", "wheel"],
        "segments": [""] * 6,
    }
    dataset = ImageDataset(tmp_path / "out" / "train", ImageConfig(resolution=10), 0, labels=True)
    labels = dataset.at(2)["labels"]
    assert labels.segments.shape == (10, 10) and set(np.unique(labels.segments)) == {5, UNLABELLED}
    assert labels.boxes[0].corners == pytest.approx(
        (0.2, 0, 1, 0.5)
    )  # 24 x 20 became 12 x 10, of which 10 x 10 are cut
    assert labels.class_name == "class 2"


# --- several sources


def test_a_mix_keeps_its_shares_everywhere_and_says_what_is_left(tmp_path: Path) -> None:
    laion(tmp_path / "laion", shards=2, samples=10)
    for i in range(40):
        image(tmp_path / "mine" / f"{i:02d}.png")
        (tmp_path / "mine" / f"{i:02d}.txt").write_text(f"mine {i}")
    sources = [
        MixedSource(source=Source.shards, name="laion", path=str(tmp_path / "laion"), weight=2.0),
        MixedSource(name="mine", path=str(tmp_path / "mine")),
    ]
    out = tmp_path / "out"
    cfg = BuildRun(run_dir=".", output_dir=str(out), source=Source.mix, sources=sources, heldout_fraction=0, workers=2)
    build_shards(cfg)
    found = [meta["mixed_from"] for meta in made(out)]
    assert found.count("laion") == 20 and abs(found.count("mine") - 10) <= 1
    for start in range(0, 27, 3):
        assert sorted(found[start : start + 3]) == ["laion", "laion", "mine"]
    described = Manifest.load(out / "train").provenance["source"]["sources"]
    assert described["laion"]["taken"] == 20 and described["mine"]["of"] == 40


def test_a_mix_needs_its_sources() -> None:
    with pytest.raises(UserError, match="source=mix and 'sources="):
        BuildRun(run_dir=".", output_dir=".", source=Source.mix)
    with pytest.raises(UserError, match="the names folder, folder are not all different"):
        BuildRun(run_dir=".", output_dir=".", source=Source.mix, sources=[MixedSource(path="a"), MixedSource(path="b")])


def test_the_sources_of_a_mix_come_from_the_command_line(tmp_path: Path) -> None:
    given = "sources=[{source: twemoji, weight: 2}, {source: demo}]"
    options = ["source=mix", given, f"run_dir={tmp_path}", "samples=9", "resolution=32"]
    source = open_source(compose("build_shards", BuildRun, options))
    assert [ref.name.partition(":")[0] for ref in source.refs(tmp_path)] == ["twemoji", "twemoji", "demo"] * 3
