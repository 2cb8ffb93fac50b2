"""Tables of images: CSV as programs and people write it, and parquet files that name images or hold them."""

import io
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from sources import config, image, outcome

from conf.errors import UserError
from conf.schema import BuildRun, ImageConfig, Source, StreamConfig
from data.building.build import build_shards
from data.building.sources import Rejected, SampleSource, open_source
from data.building.sources.tables import BATCH, CELL
from data.image_dataset import ImageDataset
from data.shards.manifest import Manifest


def table(folder: Path, content: str | bytes, name: str = "t.csv", images: int = 2) -> SampleSource:
    """A table beside the images 0.png, 1.png …"""
    for number in range(images):
        image(folder / f"{number}.png")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_source(config(Source.folder, path=str(folder / name)))


def outcomes(source: Any) -> list[str]:
    return [outcome(source, index) for index in range(len(source))]


def png(seed: int, side: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def hub(count: int, **columns: list[Any]) -> pyarrow.Table:
    """As the Hub writes images: a struct of the file's bytes and its name."""
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)]
    return pyarrow.table({"image": images, "text": [f"caption {i}" for i in range(count)], **columns})


def built(folder: Path, path: Path, **options: Any) -> tuple[int, list[dict[str, Any]]]:
    """How many samples a build kept, and what it rejected."""
    settings = {"image_column": "image", "caption_column": "text", "workers": 1, **options}
    output = folder / f"out{len(list(folder.glob('out*')))}"
    build_shards(BuildRun(run_dir=".", source=Source.folder, path=str(path), output_dir=str(output), **settings))
    rejects = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    return sum(Manifest.load(output / side).samples for side in ("train", "heldout")), rejects


# --- CSV


@pytest.mark.parametrize(
    "content",
    [
        b"path\tcaption\n0.png\ta, b\n1.png\tc\n",
        b"path;caption\n0.png;a, b\n1.png;c\n",
        b'path, caption\n0.png, "a, b"\n 1.png, c\n',
        b'\xef\xbb\xbfpath,caption\r\n0.png,"a, b"\r\n1.png,c\r\n',
        "path\tcaption\n0.png\ta, b\n1.png\tc\n".encode("utf-16"),
        b'\n\npath,caption\n\n.\\0.png,"a, b"\n\n.\\1.png,c\n',
        b'"path","caption"\n"0.png","a, b"\n"1.png","c"\n',
        b'path,caption,\n0.png,"a, b",\n1.png,c,\n',
    ],
)
def test_a_csv_is_read_as_it_was_written(tmp_path: Path, content: bytes) -> None:
    assert outcomes(table(tmp_path, content)) == ["a, b", "c"]


def test_a_tsv_is_a_table(tmp_path: Path) -> None:
    assert outcomes(table(tmp_path, "path\tcaption\n0.png\tx\n", "list.tsv")) == ["x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,caption\n0.png,caf\xe9\n", r"not a CSV file in UTF-8 \(byte 0xe9 near row 1\); save it as UTF-8"),
        ("path,caption\n0.png,x\n".encode("utf-16-le"), "NUL in its first line"),
        (b'path,caption\n0.png,"x"\n1.png,"never closed\n', "row 2: a quote that is never closed"),
        (b'path,caption\n0.png,"x\n1.png,"y"\n', "row 1: "),
        (b"path,caption,caption\n0.png,one,two\n", "2 columns are called caption; rename all but one"),
        (b"", "has the columns \\(none\\): its first line must name them$"),
        (b"path,caption\n", "no rows in it"),
        (b"path,caption\n0.png," + b"x" * (CELL + 1), "row 1: field larger"),
        (b"a,b\n" + b"1,2\n", "image_column=path: .* has the columns a, b: set image_column to one of them$"),
        (
            ",".join(f"column {i}" for i in range(999)).encode(),
            "column 19 and 979 more: set image_column to one of them$",
        ),
    ],
)
def test_a_csv_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        table(tmp_path, content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900


def test_rows_are_rejected_by_their_numbers(tmp_path: Path) -> None:
    rows = ["0.png,first", "", "1.png", "0.png,a dog, brown", ",no path", f"1.png,{'x' * 200_000}", "0.png,NaN"]
    source: Any = table(tmp_path, "path,caption\n" + "\n".join(rows) + "\n")
    assert [source.name(i)[:12] for i in range(len(source))] == [
        "row 1: 0.png",
        "row 3: 1.png",
        "row 4: 0.png",
        "row 5: ''",
        "row 6: 1.png",
        "row 7: 0.png",
    ]
    found = outcomes(source)
    assert [found[0], found[-1]] == ["first", "NaN"]
    assert found[1] == "rejected: the caption column holds no text"
    assert found[2].startswith("rejected: 1 cells more than the header has")
    assert found[3].startswith("rejected: the image column holds no path")
    assert found[4] == "rejected: the caption column holds more than 65536 characters"


def test_names_too_long_for_a_file_are_rejects_of_a_short_line(tmp_path: Path) -> None:
    image(tmp_path / "0.png")
    (tmp_path / "t.csv").write_text(f"path,caption\n{'x' * 300}.png,a\n{'y' * 300_000},b\n0.png,c\n")
    kept, rejects = built(tmp_path, tmp_path / "t.csv", image_column="path", caption_column="caption")
    assert kept == 1 and [reject["reason"][:9] for reject in rejects] == ["cannot be", "the image"]
    assert all(len(json.dumps(reject)) < 1000 for reject in rejects)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_class_may_be_written_as_a_float(tmp_path: Path, kind: str) -> None:
    for number in range(5):
        image(tmp_path / f"{number}.png", (8 + number, 8))
    numbers = [0.0, 1.0, 1.5, float("nan"), 1.0]
    paths, captions = [f"{i}.png" for i in range(5)], [f"c {i}" for i in range(5)]
    if kind == "csv":
        rows = [f"{path},{caption},{number}" for path, caption, number in zip(paths, captions, numbers, strict=True)]
        (tmp_path / "t.csv").write_text("\n".join(["path,caption,class_id", *rows]))
    else:
        columns = {"path": paths, "caption": captions, "class_id": numbers}
        parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    kept, rejects = built(tmp_path, tmp_path / f"t.{kind}", image_column="path", caption_column="caption")
    assert kept == 3
    assert [reject["path"] for reject in rejects] == ["row 3: 2.png", "row 4: 3.png"]
    assert all(reject["reason"].endswith("is not a whole number") for reject in rejects)


# --- parquet that names files


def test_captions_of_other_types_are_text_or_rejects(tmp_path: Path) -> None:
    image(tmp_path / "0.png")
    captions = [["one"], ["one", "two"], [], None]
    parquet.write_table(pyarrow.table({"path": [b"0.png"] * 4, "caption": captions}), tmp_path / "lists.parquet")
    source = open_source(config(Source.folder, path=str(tmp_path / "lists.parquet")))
    assert outcomes(source) == [
        "one",
        "rejected: the caption column holds a list of 2: write a row, or one text, for each image",
        "rejected: the caption column holds a list of 0: write a row, or one text, for each image",
        "rejected: the caption column holds no text",
    ]
    binary = pyarrow.table({"path": ["0.png"] * 2, "caption": [b"plain", b"\xff"]})
    parquet.write_table(binary, tmp_path / "binary.parquet")
    source = open_source(config(Source.folder, path=str(tmp_path / "binary.parquet")))
    assert outcomes(source) == ["plain", "rejected: the caption column holds bytes that are not UTF-8"]


def test_columns_that_are_neither_number_nor_text_are_left_alone(tmp_path: Path) -> None:
    image(tmp_path / "0.png")
    when = pyarrow.array([2**62], pyarrow.timestamp("ns"))  # no datetime of Python holds it
    columns = {"path": ["0.png"], "caption": ["x"], "when": when, "blob": [b"y"], "tags": [["z"]], "score": [0.5]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    source = open_source(config(Source.folder, path=str(tmp_path / "t.parquet")))
    assert source.sample(0).meta == {"score": 0.5, "path": "0.png"}


def test_a_folder_of_parquet_files_is_a_table(tmp_path: Path) -> None:
    for number in range(4):
        image(tmp_path / "set" / "day=1" / f"{number}.jpg")
    for number in range(4):  # images alone would make it a folder of images
        (tmp_path / "set" / "day=1" / f"{number}.jpg").rename(tmp_path / "set" / "day=1" / f"{number}.dat")
    for part in range(2):
        rows = {"path": [f"{2 * part}.dat", f"{2 * part + 1}.dat"], "caption": ["a", "b"]}
        parquet.write_table(pyarrow.table(rows), tmp_path / "set" / "day=1" / f"part-0000{part}.parquet")
    (tmp_path / "set" / "_metadata.parquet").write_bytes(b"no table")
    source: Any = open_source(config(Source.folder, path=str(tmp_path / "set")))
    assert outcomes(source) == ["a", "b"] * 2
    assert source.name(2) == "part-00001.parquet row 1: day=1/2.dat"


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").mkdir()
    parquet.write_table(hub(2), tmp_path / "t.parquet")
    walk = os.walk

    def denied(top: Any, **options: Any) -> Any:
        error = PermissionError(13, "Permission denied")
        error.filename = str(tmp_path / "secret")
        options["onerror"](error)
        return walk(top, **options)

    monkeypatch.setattr(os, "walk", denied)
    with pytest.raises(UserError, match="secret: unreadable folder: Permission denied"):
        open_source(config(Source.folder, path=str(tmp_path), **HUB))


# --- parquet that holds images


def test_images_inside_parquet_files_are_a_source(tmp_path: Path) -> None:
    classes = [1.5 if i == 40 else float(i % 3) for i in range(3 * BATCH)]
    whole = hub(3 * BATCH, class_id=classes)
    (tmp_path / "data").mkdir()
    parquet.write_table(whole.slice(0, 30), tmp_path / "data" / "train-0.parquet", row_group_size=7)
    parquet.write_table(whole.slice(30), tmp_path / "data" / "train-1.parquet")
    kept, rejects = built(tmp_path, tmp_path)
    assert kept == 3 * BATCH - 1
    assert rejects == [
        {
            "key": "000000040",
            "path": "train-1.parquet row 11",
            "reason": "class_id: 1.5 is not a whole number",
            "number": 40,
        }
    ]
    source = pickle.loads(pickle.dumps(open_source(config(Source.folder, path=str(tmp_path), **HUB))))
    refs = list(source.refs(tmp_path))
    for index in (47, 0, 8, 7, 31, 29):  # in any order
        sample = source.sample(refs[index].place)
        assert sample.caption == f"caption {index}" and sample.image == png(index)
        assert sample.meta["path"] == f"{index}.png"
    assert len(pickle.dumps(refs[31].place)) < 50


HUB: dict[str, Any] = {"image_column": "image", "caption_column": "text"}


def test_a_plain_column_of_bytes_holds_images_too(tmp_path: Path) -> None:
    rows = {"image": [png(0), None, png(2), b"not an image\x00"], "text": ["a", "b", None, "d"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    kept, rejects = built(tmp_path, tmp_path / "t.parquet")
    assert kept == 1
    assert [(reject["path"], reject["reason"]) for reject in rejects] == [
        ("row 2", "the image column holds no path and no image"),
        ("row 3", "the caption column holds no text"),
        ("row 4", "not a readable image"),
    ]


@pytest.mark.parametrize("name", ["text", "caption"])
def test_of_several_captions_the_first_counts_and_all_are_kept(tmp_path: Path, name: str) -> None:
    texts = [["a dog", "a brown dog"], ["one"], [], ["a cat", None]]
    columns = {"tags": [["x", "y"]] * 4, "sizes": [[1, 2]] * 4, "sound": [True] * 4, "score": [0.5] * 4}
    rows = hub(4, **columns).drop(["text"]).append_column(name, [texts])
    parquet.write_table(rows, tmp_path / "t.parquet")
    options = {"image_column": "image", "caption_column": name}
    source = open_source(config(Source.folder, path=str(tmp_path / "t.parquet"), **options))
    sample, kept = source.sample((0, 0)), "captions" if name == "caption" else name
    plain = {"tags": ["x", "y"], "sound": True, "score": 0.5}
    assert sample.caption == "a dog" and sample.meta == {**plain, "path": "0.png", kept: texts[0]}
    assert source.sample((0, 1)).meta == {**plain, "path": "1.png", kept: ["one"]}
    with pytest.raises(Rejected, match="a list of 0"):
        source.sample((0, 2))
    made, rejects = built(tmp_path, tmp_path / "t.parquet", caption_column=name, heldout_fraction=0.0)
    assert made == 3 and [reject["path"] for reject in rejects] == ["row 3"]
    cfg = StreamConfig(captions={f"{kept}.1": 1.0})
    dataset = ImageDataset(tmp_path / "out0" / "train", ImageConfig(resolution=8), 0, stream=cfg)
    assert [dataset.at(i)["caption"] for i in range(3)] == ["a brown dog", "one", "a cat"]


def test_a_row_group_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path, content = tmp_path / "t.parquet", np.random.default_rng(0).bytes(100_000)
    rows = pyarrow.table({"image": [content] * 400, "text": ["x"] * 400})
    parquet.write_table(rows, path, use_dictionary=False, write_batch_size=10, compression="none")
    del rows
    assert parquet.ParquetFile(path).num_row_groups == 1 and path.stat().st_size > 40e6
    before = pyarrow.total_allocated_bytes()
    source = open_source(config(Source.folder, path=str(path), **HUB))
    for row in (0, 200, 399):
        assert source.sample((0, row)).image == content
        assert pyarrow.total_allocated_bytes() - before < 12e6


def test_rejects_of_large_images_are_short(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"image": [png(0), png(1, 400)], "text": ["a", None]}), tmp_path / "t.parquet")
    built(tmp_path, tmp_path / "t.parquet")
    assert (tmp_path / "out0" / "rejects.jsonl").stat().st_size < 500


def test_a_row_with_a_name_and_no_image_is_a_reject(tmp_path: Path) -> None:
    image(tmp_path / "0.png")
    rows = [{"bytes": png(0), "path": "a.png"}, {"bytes": None, "path": "0.png"}, {"bytes": b"", "path": None}]
    parquet.write_table(pyarrow.table({"image": rows, "text": ["a", "b", "c"]}), tmp_path / "t.parquet")
    kept, rejects = built(tmp_path, tmp_path / "t.parquet")
    assert kept == 1 and [reject["path"] for reject in rejects] == ["row 2", "row 3"]
    assert rejects[0]["reason"] == "the row holds the name of an image and not the image"


def test_pages_that_cannot_be_read_are_rejects(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(hub(40), path, row_group_size=20, compression="gzip", use_dictionary=False)
    place = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = place.data_page_offset + 100
    content[start : start + 2000] = bytes(2000)
    path.write_bytes(content)
    source = open_source(config(Source.folder, path=str(path), **HUB))
    assert source.sample((0, 19)).caption == "caption 19"
    with pytest.raises(Rejected, match="cannot be read: "):
        source.sample((0, 25))
    assert source.sample((0, 3)).caption == "caption 3"


def test_a_cut_parquet_file_and_a_missing_package_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(hub(3), tmp_path / "t.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:2000])
    with pytest.raises(UserError, match="not a readable parquet file") as error:
        open_source(config(Source.folder, path=str(tmp_path / "cut.parquet"), **HUB))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"image_column=path: .* has the columns image, text"):
        open_source(config(Source.folder, path=str(tmp_path / "t.parquet")))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'latentline\[parquet\]'"):
        open_source(config(Source.folder, path=str(tmp_path / "t.parquet"), **HUB))
