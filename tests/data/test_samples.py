"""Captions: the same text comes out wherever a sample is read, and what is not certain is refused."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from conf.errors import UserError
from conf.schema import BuildRun, ImageConfig, Source, StreamConfig
from data.building.build import build_shards
from data.captions import clean_caption, decode_text
from data.image_dataset import ImageDataset, captions_of
from data.order import choice
from data.samples import Captions, caption_of, captions_named, fields_in, image_of
from data.shards.manifest import Manifest
from data.shards.shard import ShardWriter

TEXTS = {  # contents of a .txt → its caption, or why there is none
    b"\xef\xbb\xbfa dog": "a dog",
    b"a dog\r\non two lines\r\n": "a dog on two lines",
    b"a dog\0and nul": "a dog and nul",
    b"\xef\xbb\xbf\xef\xbb\xbf a dog": "a dog",
    "une école".encode("utf-16"): "une école",
    "une école".encode("utf-32"): "une école",
    b"\xfe\xff" + "犬".encode("utf-16-be"): "犬",
    "e\u0301cole".encode(): "école",
    "a\u200bdog\ufeff".encode(): "a\u200bdog\ufeff",
    "already \ufffd".encode(): "already \ufffd",
    b"\xefa dog": UserError("not UTF-8"),
    "une école".encode("latin-1"): UserError("not UTF-8"),
    "a dog".encode("utf-16-le"): UserError("UTF-16 without a byte-order mark"),
    "собака".encode("utf-16-be"): UserError("UTF-16 without a byte-order mark"),
    b"\xff\xfea": UserError("not UTF-8"),
    b"\xff\xfe\x3d\xd8": UserError("not UTF-8"),
    b"x" * 65_537: UserError("more than 65536 bytes"),
}
FIELDS = {  # contents of a .json → its caption, or why there is none
    b'{"caption": "a dog"}': "a dog",
    b'\xef\xbb\xbf{"caption": "\\ufeffa\\ndog"}': "a dog",
    '{"caption": "école"}'.encode("utf-16"): "école",
    b'{"caption": "\\ud83d\\udc15"}': "\N{DOG}",
    b'{"caption": null}': UserError("not text but null"),
    b'{"caption": NaN}': UserError("not text but null"),
    b'{"caption": -Infinity}': UserError("not text but null"),
    b'{"caption": ["a"]}': UserError("not text but a list"),
    b'{"caption": {}}': UserError("not text but an object"),
    b'{"caption": 3}': UserError("not text but a number"),
    b'{"caption": true}': UserError("not text but true or false"),
    b'{"caption": "half \\ud83d"}': UserError("lone surrogate"),
    b'{"text": "a dog"}': UserError('no "caption" in a .json; it has .json, .png'),
    '{"caption": "école"}'.encode("latin-1"): UserError("its .json is not UTF-8"),
    b'{"caption": "a dog"': UserError("its .json is broken"),
    b'{"n": ' + b"1" * 5000 + b"}": UserError("its .json is broken"),
    b"[" * 100_000: UserError("its .json is broken"),
    b"[1]": UserError("its .json holds no object"),
    b"": UserError("its .json is broken"),
}
CASES = [("txt", *case) for case in TEXTS.items()] + [("json", *case) for case in FIELDS.items()]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, content: bytes, extension: str) -> None:
    """A sample with this caption after one that is sound, in a shard and as files."""
    (folder / "shards").mkdir()
    (folder / "files").mkdir()
    members = {"0.png": png(), "0.txt": b"sound", "1.png": png(), f"1.{extension}": content}
    with tarfile.open(folder / "shards" / "00000.tar", "w") as tar:
        for name, value in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
            (folder / "files" / name).write_bytes(value)


def config(output: Path, source: Source, path: Path) -> BuildRun:
    return BuildRun(run_dir=".", output_dir=str(output), source=source, path=str(path), workers=1, heldout_fraction=0)


@pytest.mark.parametrize("extension, content, expected", CASES)
def test_a_caption_is_the_same_text_wherever_it_is_read(
    tmp_path: Path, extension: str, content: bytes, expected: str | UserError
) -> None:
    write(tmp_path, content, extension)
    made = {}
    for source, path in ((Source.shards, "shards"), (Source.folder, "files")):
        output = tmp_path / source.value
        build_shards(config(output, source, tmp_path / path))
        made[source] = captions_of(output / "train")
        rejects = [json.loads(line)["reason"] for line in (output / "rejects.jsonl").read_text().splitlines()]
        assert len(made[source]) + len(rejects) == 2
        if isinstance(expected, UserError) and (extension, source) != ("json", Source.folder):
            assert str(expected) in rejects[0]
    direct = ImageDataset(tmp_path / "shards", ImageConfig(resolution=4), 0, StreamConfig(skip_broken=True))
    if isinstance(expected, UserError):
        assert made[Source.shards] == made[Source.folder] == ["sound"]
        for read in (lambda: direct.at(1), lambda: captions_of(tmp_path / "shards")):
            with pytest.raises(UserError, match=r"00000\.tar: sample '1': .*build_shards\.py") as raised:
                read()
            assert str(expected) in str(raised.value) and "\n" not in str(raised.value)
    else:
        assert made[Source.shards] == made[Source.folder] == captions_of(tmp_path / "shards") == ["sound", expected]
        assert direct.at(1)["caption"] == expected


def test_an_empty_caption_is_a_reject_of_a_build_and_empty_in_training(tmp_path: Path) -> None:
    write(tmp_path, b"\xef\xbb\xbf \r\n\0", "txt")
    assert captions_of(tmp_path / "shards") == ["sound", ""]
    assert build_shards(config(tmp_path / "out", Source.shards, tmp_path / "shards")).rejected == 1


def test_cleaning_twice_changes_nothing() -> None:
    for caption in (
        "\ufeff\ufeff a\u2028b",
        "e\u0301\u2000x",
        " \x85\x1c",
        "a\u00a0b",
        "lone \ud800",
        "\xa0\ufeff\xa0a",
    ):
        once = clean_caption(caption)
        assert clean_caption(once) == once == decode_text(once.encode())


@pytest.mark.parametrize("caption", ["\u200b", " \u200b \u2060\n", "\ufeff", "\u200e\u200f"])
def test_a_caption_that_nobody_can_see_is_empty(caption: str) -> None:
    assert clean_caption(caption) == ""
    assert clean_caption(f"a{caption.strip()}b").startswith("a")  # inside a text such characters stay


def test_numbers_that_json_does_not_know_are_null() -> None:
    assert fields_in(b'{"a": NaN, "b": [Infinity, 1e999, -1e999], "c": 1.5}') == {"a": None, "b": [None] * 3, "c": 1.5}


def test_the_text_file_comes_before_the_json_and_the_photo_before_its_mask() -> None:
    record = {"__key__": "0", "txt": b"of the text", "json": b'{"caption": "of the json"}', "png": b"2", "jpg": b"1"}
    assert caption_of(record) == "of the text" and image_of(record) == b"1"
    with pytest.raises(
        UserError, match=r"^no image: it has \.1\.jpg, \.txt; what follows the first dot of a file's name"
    ):
        image_of({"__key__": "0", "1.jpg": b"", "txt": b""})


def test_captions_by_name_and_what_stands_in_for_those_that_lack() -> None:
    meta = {"caption": "in the json", "told": {"long": "a long\none"}, "all": ["first", "second"], "number": 3}
    record = {"__key__": "a", "txt": b"the usual", "json": json.dumps(meta).encode()}
    names = ["caption", "told.long", "all.1", "all.2", "told", "told.short", "nothing.at.all"]
    with pytest.raises(UserError, match='"caption" is not text but an object'):
        captions_named(record, names)
    names.remove("told")
    assert captions_named(record, names) == ["the usual", "a long one", "second", *["the usual"] * 3]
    assert captions_named(record, ["all.0", "told.short"]) == ["first", "first"]
    assert captions_named(record, ["told.short"]) == ["the usual"]
    assert captions_named({"__key__": "a", "txt": b"x"}, ["caption", "all.0"]) == ["x", "x"]


def test_one_of_several_captions_is_drawn_by_its_weight(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with ShardWriter(tmp_path, 9) as writer:
        meta = json.dumps({"synthetic": "made up"}).encode()
        writer.add("a", {"png": buffer.getvalue(), "txt": b"the usual", "json": meta})
    Manifest(kind="images", shards=writer.finished).save(tmp_path)
    stream = StreamConfig(captions={"caption": 1.0, "synthetic": 3.0})
    dataset = ImageDataset(tmp_path, ImageConfig(resolution=8), 5, stream)
    drawn = dataset.batch(range(2000))["caption"]
    assert drawn.count("made up") == pytest.approx(1500, abs=4 * (2000 * 0.75 * 0.25) ** 0.5)
    assert dataset.batch([1234, 7])["caption"] == [drawn[1234], drawn[7]]
    assert dataset.at(0)["caption"] == "the usual"
    assert ImageDataset(tmp_path, ImageConfig(resolution=8), 6, stream).batch(range(2000))["caption"] != drawn


def test_the_order_of_a_cache_decides_what_is_drawn_and_what_stands_in() -> None:
    ours, cached = {"long": 3.0, "short": 1.0}, ["short", "other", "long"]
    captions = Captions.of(ours, cached)
    assert captions == Captions.of(dict(reversed(ours.items())), cached) == Captions(tuple(cached), (1.0, 0.0, 3.0))
    drawn = [captions.draw(0, position) for position in range(2000)]
    assert drawn == [choice(0, position, "caption", [1.0, 0.0, 3.0]) for position in range(2000)]  # of runs before
    assert {0, 2} == set(drawn)
    record = {"__key__": "a", "txt": b"the usual", "json": json.dumps({"short": "a short one"}).encode()}
    assert captions.read(record) == ["a short one"] * 3
    assert (Captions.of({}), Captions.of({}, cached).weights) == (Captions(("caption",), (1.0,)), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("captions", "message"),
    [({"a": 1.0, "caption": 1.0}, "comes first"), ({"a": 0.0}, "the weight of a is 0"), ({"": 1.0}, "is empty")],
)
def test_captions_that_cannot_be_named_are_refused(captions: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StreamConfig(captions=captions)
