"""Each source: what it says, what it shows, and what it refuses."""

import io
import itertools
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conf.entry import compose
from conf.errors import UserError
from conf.schema import BuildRun, FilterConfig, ImageConfig, MixedSource, Source
from data import remote
from data.building import build
from data.captions import caption_rank, clean_caption
from data.datasets import ImageDataset
from data.images import parse_color
from data.labels import UNLABELLED, encode_map, read_labels
from data.manifest import Manifest
from data.shards import ShardReader, ShardWriter
from data.sources import Rejected, Sample, open_source
from data.sources.demo import BACKGROUNDS, BODIES, COLORS, KINDS, MONSTER_EYES, TOPS, render, scene
from data.sources.layout import OBJECTS, OVERLAP, layout
from data.sources.rendering import SEGMENTS
from data.sources.subject import LOOK, WORD


def config(source: Source, **options: Any) -> BuildRun:
    return BuildRun(run_dir="unused", output_dir="unused", source=source, **options)


def picture(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, path.suffix[1:].replace("JPG", "jpeg").replace("jpg", "jpeg"))


def outcome(source: Any, index: int) -> str:
    try:
        return str(source.sample(index).caption)
    except Rejected as error:
        return f"rejected: {error}"


# --- demo


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert scene(3, 5) == scene(3, 5)
    assert len({scene(seed, index).caption for seed in range(2) for index in range(20)}) > 35


def test_captions_name_kind_color_and_background() -> None:
    drawn = [scene(0, index) for index in range(2000)]
    assert len({s.caption for s in drawn}) > 1400
    assert {s.attributes["kind"] for s in drawn} == set(KINDS)
    for s in drawn:
        kind, color, background = (s.attributes[name] for name in ("kind", "color", "background"))
        place = "sky" if kind == "landscape" else "background"
        noun = {"plant": "pot", "landscape": s.attributes.get("hills")}.get(kind, kind)
        assert f"{color} {noun} " in s.caption, s.caption
        assert f"{background} {place}" in s.caption, s.caption
        assert not (set(s.caption.split()) & set(BACKGROUNDS)) - {background}
        assert not (set(s.caption.split()) & set(COLORS)) - {color}


def test_palettes_are_far_apart() -> None:
    for palette in (COLORS, BACKGROUNDS):
        for a, b in itertools.combinations(palette.values(), 2):
            assert np.linalg.norm(np.subtract(parse_color(a), parse_color(b))) > 80, (a, b)


def nearest(pixels: np.ndarray, palette: dict[str, str]) -> str:
    """The palette's colour that most pixels `[N, 3]` are nearest to."""
    table = np.array([parse_color(color) for color in palette.values()])  # [colors, 3]
    distances = np.linalg.norm(pixels[:, None, :].astype(float) - table, axis=-1)  # [N, colors]
    return list(palette)[int(np.bincount(distances.argmin(1)).argmax())]


def test_color_and_background_can_be_read_off_the_pixels() -> None:
    parts = {"monster": (58, 64, 28, 36), "plant": (42, 63, 26, 38), "planet": (20, 44, 20, 44)}
    for index in range(60):
        drawn = scene(1, index)
        pixels = np.asarray(render(drawn, 64))
        assert pixels.shape == (64, 64, 3)
        assert nearest(pixels[:3, :3].reshape(-1, 3), BACKGROUNDS) == drawn.attributes["background"]
        top, bottom, left, right = parts.get(drawn.attributes["kind"], (24, 34, 0, 64))
        palette = {**COLORS, "ink": "#1e293b"} if drawn.attributes["kind"] == "plant" else COLORS
        seen = nearest(pixels[top:bottom, left:right].reshape(-1, 3), palette)
        assert seen == drawn.attributes["color"], drawn.caption


def test_the_map_of_a_scene_says_what_is_where() -> None:
    source = open_source(config(Source.demo, samples=40, resolution=64))
    seen = set[str]()
    for index in range(40):
        sample, drawn = source.sample(index), scene(0, index)
        assert (sample.meta["class"], KINDS[sample.meta["class_id"]]) == (drawn.kind, drawn.kind)
        pixels, parts = np.asarray(sample.image), sample.segments
        assert isinstance(parts, np.ndarray) and parts.shape == (64, 64)
        there = {SEGMENTS[number] for number in np.unique(parts)}
        seen |= there
        expected = {
            "monster": {"background", "monster"},
            "plant": {"background", "plant", "pot"},
            "planet": {"background", "planet"} | {name for name in ("ring", "moon") if drawn.attributes.get(name)},
            "landscape": {"sky", "ground"} | ({"sun"} if drawn.attributes.get("sun") else set()),
        }[drawn.kind]
        assert there == expected, drawn.caption
        behind = np.isin(parts, [SEGMENTS.index("background"), SEGMENTS.index("sky")])
        assert nearest(pixels[behind], BACKGROUNDS) == drawn.attributes["background"]
        own = {"monster": "monster", "plant": "pot", "planet": "planet"}.get(drawn.kind)
        if own:
            palette = {**COLORS, "ink": "#1e293b"}
            assert nearest(pixels[parts == SEGMENTS.index(own)], palette) == drawn.attributes["color"], drawn.caption
    assert seen == set(SEGMENTS)


# --- layout


def test_boxes_of_a_canvas_hold_what_is_drawn_and_nothing_else() -> None:
    counts = set[int]()
    for index, resolution in enumerate([64] * 20 + [128] * 4):
        source = open_source(config(Source.layout, samples=30, resolution=resolution))
        sample = source.sample(index)
        labels, parts = read_labels(sample.meta, sample.segments, (resolution, resolution)), sample.segments
        assert isinstance(parts, np.ndarray) and isinstance(sample.image, Image.Image)
        covered, pixels = parts != 0, np.asarray(sample.image).astype(int)
        plain = np.abs(pixels - np.array(parse_color(BACKGROUNDS[sample.meta["background"]]))).max(axis=-1) == 0
        inside = np.zeros_like(covered)
        for box, entry in zip(labels.boxes, sample.meta["boxes"], strict=True):
            ends = np.multiply(box.corners, resolution)
            assert np.array_equal(ends, ends.round())
            left, top, right, bottom = ends.astype(int)
            inside[top:bottom, left:right] = True
            assert f"{entry['color']} " in sample.caption and box.class_name == OBJECTS[box.class_id]
            if len(labels.boxes) == 1:  # nothing hides it
                rows, columns = np.nonzero(covered)
                assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (top, bottom, left, right)
        assert plain[~inside].all() and not covered[~inside].any() and (plain & covered).mean() < 0.01
        counts.add(len(labels.boxes))
    assert counts == {1, 2, 3, 4}


def test_objects_of_a_canvas_overlap_little() -> None:
    assert layout(3, 5) == layout(3, 5) != layout(3, 6)
    for drawn in (layout(0, index) for index in range(300)):
        for a, b in itertools.combinations(drawn.objects, 2):
            common = [max(0.0, min(p + a.side, q + b.side) - max(p, q)) for p, q in ((a.left, b.left), (a.top, b.top))]
            assert common[0] * common[1] <= OVERLAP * min(a.side, b.side) ** 2
        assert all(0 <= end <= 1 for o in drawn.objects for end in (o.left, o.top, o.left + o.side, o.top + o.side))


# --- subject


def test_views_of_the_subject_differ_in_mood_or_background_and_show_what_no_scene_of_the_demo_has() -> None:
    source = open_source(config(Source.subject, samples=21, resolution=64))
    views = [source.sample(index) for index in range(21)]
    assert len({view.caption for view in views}) == 21
    for view in views:
        assert view.caption == f"a {view.meta['mood']} {WORD} monster on a {view.meta['background']} background"
        assert isinstance(view.image, Image.Image)
        assert view.image.getpixel((1, 1)) == parse_color(BACKGROUNDS[view.meta["background"]])[:3]
    known = {"body": BODIES, "top": TOPS, "eyes": MONSTER_EYES}
    assert not any(LOOK[part] in variants.values() for part, variants in known.items())
    assert not any(WORD in scene(0, index).caption for index in range(200))


# --- twemoji


def test_twemoji_has_names_attribution_and_few_rejects() -> None:
    source = open_source(config(Source.twemoji))
    assert len(source) == 4009
    captions = [outcome(source, index) for index in range(len(source))]
    named = [caption for caption in captions if not caption.startswith("rejected")]
    assert "fire engine emoji" in named and "flag of Japan emoji" in named
    assert len(named) == len(set(named)) > 3950
    assert "CC BY 4.0" in source.describe()["attribution"]


# --- folder


def test_folder_finds_pictures_and_captions_of_any_case(tmp_path: Path) -> None:
    picture(tmp_path / "b" / "IMG_1.JPG")
    (tmp_path / "b" / "IMG_1.TXT").write_text("a  red\nsquare ")
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"caption": "another", "score": 1}')
    picture(tmp_path / "none.png")
    (tmp_path / "notes.md").write_text("not a picture")
    source = open_source(config(Source.folder, path=str(tmp_path)))
    assert [source.name(i) for i in range(len(source))] == ["a.png", "b/IMG_1.JPG", "none.png"]
    assert [outcome(source, 0), clean_caption(outcome(source, 1))] == ["another", "a red square"]
    assert outcome(source, 2).startswith("rejected: no caption")
    assert source.describe()["other_files"] == {".md": 1}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("x.json", b"[1]", "no JSON object"),
        ("x.json", b"{", "no JSON object"),
        ("x.json", b'{"caption": 3}', "not text"),
        ("x.txt", b"a" * 70_000, "more than"),
    ],
)
def test_a_bad_caption_file_is_a_reject(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    picture(tmp_path / "x.png")
    (tmp_path / name).write_bytes(content)
    source = open_source(config(Source.folder, path=str(tmp_path)))
    assert reason in outcome(source, 0)


def test_pipes_folders_and_dangling_links_are_rejects(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("caption")
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(config(Source.folder, path=str(tmp_path)))
    assert [outcome(source, i) for i in range(len(source))] == [
        "rejected: not a plain file",
        "rejected: cannot be read: No such file or directory",
    ]


ROWS = [
    ("inside/x.png", "a caption", "a caption"),
    ("../secret.png", "a caption", "rejected: the path leaves the table's folder"),
    ("/etc/hostname", "a caption", "rejected: the path leaves the table's folder"),
    ("https://example.org/x.png", "a caption", "rejected: an address"),
    ("gone.png", "a caption", "rejected: cannot be read: No such file"),
    ("a\0b.png", "a caption", "rejected: the image column holds no path"),
    ("$(touch pwned).png", "a caption", "rejected: cannot be read: No such file"),
]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_names_pictures_below_its_folder_only(tmp_path: Path, kind: str) -> None:
    picture(tmp_path / "data" / "inside" / "x.png")
    picture(tmp_path / "secret.png")
    table = tmp_path / "data" / f"table.{kind}"
    paths, captions = [row[0] for row in ROWS], [row[1] for row in ROWS]
    if kind == "csv":
        import csv

        with open(table, "w", newline="") as file:
            csv.writer(file).writerows([("file", "words"), *zip(paths, captions, strict=True)])
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"file": paths, "words": captions}), table)
    source = open_source(config(Source.folder, path=str(table), image_column="file", caption_column="words"))
    for index, row in enumerate(ROWS):
        assert outcome(source, index).startswith(row[2]), row
    assert isinstance(source.sample(0), Sample)


def test_a_row_without_caption_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,caption\nx.png\n")
    source = open_source(config(Source.folder, path=str(tmp_path / "t.csv")))
    assert outcome(source, 0) == "rejected: the caption column holds no text"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "path=.*: no such file or folder"),
        ("empty/notes.md", b"x", "no images"),
        ("t.csv", b"a,b\n1,2\n", "image_column=path: .* has the columns a, b"),
        ("t.csv", b"path,text\n1,2\n", "caption_column=caption: "),
        ("t.csv", b"path,caption\n\xff,2\n", "not a CSV file in UTF-8"),
        ("t.csv", b"path,caption\n", "no rows"),
        ("t.parquet", b"PAR1 broken", "not a readable parquet file"),
        ("t.xls", b"x", "not a folder, .csv or .parquet"),
    ],
)
def test_nothing_to_take_is_one_line(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "missing")
    if name:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_source(config(Source.folder, path=str(path.parent if name and "/" in name else path)))
    assert "\n" not in str(error.value)


def test_folders_are_classes(tmp_path: Path) -> None:
    for number, name in enumerate(["train/red_fox/a.png", "train/red_fox/b.png", "train/cow/c.png", "val/cow/d.png"]):
        picture(tmp_path / name, (8 + number, 8))
    (tmp_path / "train" / "cow" / "c.txt").write_text("a cow in the grass")
    picture(tmp_path / "stray.png")
    cfg = config(Source.folder, path=str(tmp_path), class_from_folder=True)
    source = open_source(cfg)
    assert source.vocabulary().as_dict() == {"classes": ["cow", "red_fox"]}
    samples = [source.sample(index) for index in (1, 2, 3, 4)]
    assert [(s.meta["class"], s.meta["class_id"]) for s in samples] == [
        ("cow", 0),
        ("red_fox", 1),
        ("red_fox", 1),
        ("cow", 0),
    ]
    assert [s.caption for s in samples] == ["a cow in the grass", "red fox", "red fox", "cow"]
    assert "no subfolder" in outcome(source, 0)
    assert source.identity() != open_source(config(Source.folder, path=str(tmp_path))).identity()
    with pytest.raises(UserError, match="class_from_folder=true needs source=folder"):
        config(Source.shards, path=str(tmp_path), class_from_folder=True)


def test_a_map_beside_a_picture_is_its_label_and_no_picture(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a caption")
    Image.new("L", (8, 8), 3).save(tmp_path / "a.seg.png")
    source = open_source(config(Source.folder, path=str(tmp_path)))
    assert len(source) == 1 and source.describe()["other_files"] == {}
    sample, identity = source.sample(0), source.identity()
    labels = read_labels(sample.meta, sample.segments, (8, 8))
    assert labels.segments is not None and (labels.segments == 3).all()
    (tmp_path / "a.seg.png").write_bytes(b"changed")
    assert open_source(config(Source.folder, path=str(tmp_path))).identity() != identity


def test_sources_of_a_mix_must_number_their_classes_alike(tmp_path: Path) -> None:
    members = []
    for name, classes in (("one", ["cat", "dog"]), ("other", ["cow", "dog"])):
        for word in classes:
            picture(tmp_path / name / word / "x.png")
        members.append(MixedSource(name=name, path=str(tmp_path / name), class_from_folder=True))
    mixed = open_source(config(Source.mix, sources=members))
    with pytest.raises(UserError, match="sources: other: classes: 0 is 'cat' in this data set, not 'cow'; number the"):
        mixed.vocabulary()
    same = open_source(
        config(Source.mix, sources=[members[0], MixedSource(source=Source.demo)], samples=4, resolution=64)
    )
    with pytest.raises(UserError, match="sources: demo: classes: 0"):
        same.vocabulary()


def test_pictures_of_one_class_are_held_out_one_by_one(tmp_path: Path) -> None:
    for number in range(40):
        picture(tmp_path / "photos" / "cow" / f"{number}.png")
    options = {"output_dir": str(tmp_path / "out"), "heldout_fraction": 0.3, "class_from_folder": True, "workers": 1}
    build(BuildRun(run_dir=".", source=Source.folder, path=str(tmp_path / "photos"), **options))
    sizes = [Manifest.load(tmp_path / "out" / side).samples for side in ("train", "heldout")]
    assert sum(sizes) == 40 and min(sizes) > 5


# --- captions


def test_captions_have_one_spelling() -> None:
    assert clean_caption(" a\tcafe\u0301\x00 \u2028 on\nthe \u00a0moon ") == "a café on the moon"
    assert clean_caption(json.loads('"lone \\ud800"')) == "lone ?"
    assert clean_caption(" \n ") == ""


def test_caption_ranks_are_uniform_and_fixed() -> None:
    ranks = np.array([caption_rank(f"caption {i}") for i in range(5000)])
    assert abs((ranks < 0.1).mean() - 0.1) < 0.02
    assert caption_rank("A Red Fox") == caption_rank("a red fox")
    assert caption_rank("a red planet") == pytest.approx(0.9704764286620247)


# --- tables and folders with scores


def test_further_columns_and_json_fields_are_kept_for_filters(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    (tmp_path / "t.csv").write_text("path,caption,aesthetic,url\nx.png,a thing,5.5,http://a/b\n")
    source = open_source(config(Source.folder, path=str(tmp_path / "t.csv")))
    assert source.sample(0).meta == {"aesthetic": "5.5", "url": "http://a/b", "path": "x.png"}
    (tmp_path / "t.csv").unlink()
    (tmp_path / "x.txt").write_text("from the text")
    (tmp_path / "x.json").write_text('{"caption": "from the json", "punsafe": 0.25}')
    sample = open_source(config(Source.folder, path=str(tmp_path))).sample(0)
    assert sample.caption == "from the text" and sample.meta["punsafe"] == 0.25


def test_the_table_of_img2dataset_finds_its_downloads(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    picture(tmp_path / "00000" / "000000000.jpg")
    picture(tmp_path / "00000" / "000000002.webp")
    columns = {
        "key": ["000000000", "000000001", "000000002"],
        "url": ["http://a/1", "http://a/2", "http://a/3"],
        "caption": ["one", "two", "three"],
        "status": ["success", "failed_to_download", "success"],
        "error_message": [None, "HTTP Error 404: Not Found", None],
        "similarity": [0.3, 0.2, float("nan")],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "00000.parquet")
    source = open_source(config(Source.folder, path=str(tmp_path / "00000.parquet"), image_column="key"))
    assert source.sample(0).meta["similarity"] == 0.3 and source.sample(0).meta["url"] == "http://a/1"
    assert outcome(source, 1) == "rejected: not downloaded: HTTP Error 404: Not Found"
    assert source.sample(2).caption == "three" and "similarity" not in source.sample(2).meta


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


def made(output: Path) -> list[dict[str, Any]]:
    """The JSON of all samples of a build, by key."""
    readers = [ShardReader(path) for path in sorted(output.glob("*/*.tar"))]
    found = [json.loads(bytes(reader[i]["json"])) for reader in readers for i in range(len(reader))]
    return sorted(found, key=lambda meta: meta["key"])


def built(tmp_path: Path, path: str, **options: Any) -> list[dict[str, Any]]:
    cfg = BuildRun(
        run_dir=".", output_dir=str(tmp_path / "out"), source=Source.shards, path=path, **{"workers": 1, **options}
    )
    build(cfg)
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
        picture(tmp_path / "mine" / f"{i:02d}.png")
        (tmp_path / "mine" / f"{i:02d}.txt").write_text(f"mine {i}")
    sources = [
        MixedSource(source=Source.shards, name="laion", path=str(tmp_path / "laion"), weight=2.0),
        MixedSource(name="mine", path=str(tmp_path / "mine")),
    ]
    out = tmp_path / "out"
    cfg = BuildRun(run_dir=".", output_dir=str(out), source=Source.mix, sources=sources, heldout_fraction=0, workers=2)
    build(cfg)
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
