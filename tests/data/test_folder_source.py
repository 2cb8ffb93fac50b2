"""Folders and tables of pictures: what is found, what is refused, and the spelling of captions."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import config, outcome, picture

from conf.errors import UserError
from conf.schema import BuildRun, MixedSource, Source
from data.building import build
from data.captions import caption_rank, clean_caption
from data.labels import read_labels
from data.manifest import Manifest
from data.sources import Sample, open_source

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


def reasons(path: Path) -> dict[str, str]:
    """Outcome of each entry of a folder."""
    source = open_source(config(Source.folder, path=str(path)))
    return {source.name(index): outcome(source, index) for index in range(len(source))}


def test_linked_folders_and_files_are_read_wherever_a_link_lies(tmp_path: Path) -> None:
    for folder in ("far/a", "far/b"):
        picture(tmp_path / folder / "x.png")
        (tmp_path / folder / "x.txt").write_text(folder)
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (here / "set").symlink_to("../far")
    (here / "sub" / "again").symlink_to(tmp_path / "far" / "a")
    (here / "one.png").symlink_to(tmp_path / "far" / "a" / "x.png")
    (here / "one.txt").symlink_to(tmp_path / "far" / "b" / "x.txt")
    found = {"one.png": "far/b", "set/a/x.png": "far/a", "set/b/x.png": "far/b", "sub/again/x.png": "far/a"}
    assert reasons(here) == found
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "link").symlink_to(here)
    assert reasons(tmp_path / "only") == {f"link/{name}": caption for name, caption in found.items()}
    assert reasons(tmp_path / "only" / "link") == found  # a path that is a link itself


@pytest.mark.timeout(30)
def test_links_that_lead_nowhere_or_in_a_circle_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / name / "x.png")
        (tmp_path / name / "x.txt").write_text(name)
    (tmp_path / "a" / "to_b").symlink_to("../b")
    (tmp_path / "b" / "to_a").symlink_to("../a")
    (tmp_path / "b" / "up").symlink_to("..")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "folder").symlink_to("gone")
    (tmp_path / "lost.png").symlink_to("gone.png")
    found = reasons(tmp_path)
    circles = {name for name, reason in found.items() if reason == "rejected: a link to a folder that it lies in"}
    assert circles == {"a/to_b/to_a", "a/to_b/up", "b/to_a/to_b", "b/up"}
    assert {name for name, reason in found.items() if reason == "rejected: a link to what is not there"} == {
        *("self", "folder", "lost.png"),
    }
    assert {name for name, reason in found.items() if reason in ("a", "b")} == {
        *("a/x.png", "b/x.png", "a/to_b/x.png", "b/to_a/x.png"),
    }


def test_every_kind_of_image_is_found_and_the_rest_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for suffix in (".JPG", ".jfif", ".jpe", ".avif", ".jp2", ".apng", ".pbm", ".tga", ".ico"):
        format = Image.registered_extensions()[suffix.lower()]
        Image.effect_noise((16, 16), 50).convert("RGB").save(photos / f"a{suffix}", format)
    for name in ("a.txt", "b.heic", "c.heic", "b.txt", "d.psd", "README"):
        (photos / name).write_text("a caption")
    cfg = config(Source.folder, path=str(photos), workers=1, heldout_fraction=0)
    cfg.output_dir = str(tmp_path / "shards")
    assert build(cfg).train.samples == 9
    assert build(cfg).skipped
    told = capsys.readouterr().out.splitlines()
    rest = "other files left out: 2 .heic, 1 .psd, 1 .txt, 1 without suffix, in "
    assert len(told) == 2 and all(f"0 rejected, 0 dropped by filters, {rest}" in line for line in told)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.heic").write_text("x")
    with pytest.raises(UserError, match=r"no images \(\.png, .*\) and no parquet tables in it; it has 1 \.heic$"):
        open_source(config(Source.folder, path=str(tmp_path / "none")))


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
