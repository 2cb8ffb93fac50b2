"""MDS: what mosaicml-streaming wrote, and folders by the same layout with every encoding and every way to be broken."""

import base64
import io
import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sources import config

from conf.errors import UserError
from conf.schema import BuildRun, MixedSource, Source
from data.building.build import build_shards, is_outdated
from data.building.sources import Sample, open_source
from data.shards.shard import ShardReader

FORMATS = {"int": "q", "int16": "h", "uint8": "B", "float16": "e", "float32": "f", "float64": "d"}
WRITTEN = {  # by MDSWriter of mosaicml-streaming 0.13; zlib in base85
    "index.json": (
        "c-mD@TaLmo47^I^?+SGRv4yLwP-WUcgYr^ro>lL@anhC8e8e-(j6IovMvMc&q57Gi_vU6@r(Ev`?Jl_s#1ZNWf;LjLV<~6jkvD6BSMm;y"
        "2`p}hRuyNDfpvNmo5hO~kQwzpX2$Bt^l2vjE@pQ#rmo7}*44J)qO>6@BAI+x6ma&@A}0<ueI_+Vq_IpAPsB$zAY<YaoRE}+6m|ans*$r="
        "oTnFO<F?s<&Y9*}lA{eK^R=*)wlmsl*}VJyYT9;}lEPiZC7!6>I{Yn{wDa-5V*UkjJ9t3"
    ),
    "shard.00000.mds": (
        "c-mc%&q@O^5XR&7pm_1pn^0oTd)RHIF1-j|ynFFbmJ-rz8_Ay~lZq%lh>ze~2tJt3G>ck8zRWjdzF!~(W9;mRv3t}T>P4tvch0Z0S7B}Z"
        "2E>9d1*9lSE_!3B7@w$gHpn!al6`>SMT=%gd+BseD%mH4mlShyqsi<$P$BNSq@NP}4TE{kVZXDs<oRq$ewlrqbbZtSL|zONq6^W<guQTU"
        "Ao5niHj^kr*p)TT(8&C%u9{|!Nb#uSz?r@t<9A%3PEbmApYOaHp)F8U?{06{c=CV$uIr_c_;A${=lp<E7l)kF@#JTJ4U4glfl#;K-xg<1"
    ),
}


def fixed_size(encoding: str) -> int | None:
    return struct.calcsize(FORMATS[encoding]) if encoding in FORMATS else None


def write(folder: Path, encodings: dict[str, str], rows: list[list[Any]], per_shard: int = 4) -> None:
    """A data set by the layout; values are bytes, or numbers where the encoding is one's."""
    folder.mkdir(parents=True)
    facts = {
        "column_names": list(encodings),
        "column_encodings": list(encodings.values()),
        "column_sizes": [fixed_size(encoding) for encoding in encodings.values()],
        "compression": None,
        "format": "mds",
    }
    shards = []
    for number, first in enumerate(range(0, len(rows), per_shard)):
        samples = []
        for row in rows[first : first + per_shard]:
            cells = [
                struct.pack("<" + FORMATS[encoding], value) if encoding in FORMATS else value
                for encoding, value in zip(encodings.values(), row, strict=True)
            ]
            sizes = [len(cell) for cell, size in zip(cells, facts["column_sizes"], strict=True) if size is None]
            samples.append(struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(cells))
        about = json.dumps(facts).encode()
        start = 4 * (len(samples) + 2) + len(about)
        offsets = [start + sum(map(len, samples[:i])) for i in range(len(samples) + 1)]
        name = f"shard.{number:05d}.mds"
        words = struct.pack(f"<{len(offsets) + 1}I", len(samples), *offsets)
        (folder / name).write_bytes(words + about + b"".join(samples))
        shards.append({**facts, "samples": len(samples), "raw_data": {"basename": name}, "zip_data": None})
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))


def drawn(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(256, size=(10, 12, 4), dtype=np.uint8)
    return (
        Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    )


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    drawn(seed).save(buffer, "PNG")
    return buffer.getvalue()


def pil(image: Image.Image) -> bytes:
    return struct.pack("<3I", *image.size, len(image.mode)) + image.mode.encode() + image.tobytes()


def plain(folder: Path, count: int = 10) -> Path:
    """Images and captions alone."""
    write(folder, {"caption": "str", "image": "png"}, [[f"caption {i}".encode(), png(i)] for i in range(count)])
    return folder


def samples_of(path: Path, **options: Any) -> list[Sample]:
    source = open_source(config(Source.mds, path=str(path), **{"image_column": "image", **options}))
    return [source.sample(ref.place) for ref in source.refs(path)]


def built(path: Path, output: Path, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The JSON of the samples that a build kept, and its rejects."""
    settings = {"image_column": "image", "workers": 1, "heldout_fraction": 0.0, **options}
    build_shards(BuildRun(run_dir=".", source=Source.mds, path=str(path), output_dir=str(output), **settings))
    readers = [ShardReader(tar) for tar in sorted((output / "train").glob("*.tar"))]
    made = [json.loads(bytes(reader[i]["json"])) for reader in readers for i in range(len(reader))]
    return made, [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    for name, content in WRITTEN.items():
        (tmp_path / name).write_bytes(zlib.decompress(base64.b85decode(content)))
    found = samples_of(tmp_path)
    assert [sample.caption for sample in found] == ["café 0", "café 1"]
    assert [sample.meta for sample in found] == [
        {"n": 0, "score": 0.5, "texts": ["a", 0]},
        {"n": -1, "score": 1.5, "texts": ["a", 1]},
    ]
    for number, sample in enumerate(found):
        assert isinstance(sample.image, bytes)
        expected = Image.new("RGB", (3 - number, 2), (10 * number, 20, 30))
        assert Image.open(io.BytesIO(sample.image)).tobytes() == expected.tobytes()


def test_every_encoding_has_its_value_and_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "loaded"),)

    values = {
        "int": -(2**40),
        "int16": -3,
        "uint8": 200,
        "float16": 0.5,
        "float32": 0.25,
        "float64": 0.1,
        "str_int": 10**20,
        "str_float": 0.3,
        "str_decimal": 1.5,
        "json": {"long": "a brown dog", "all": [1, None]},
    }
    others = {"pkl": pickle.dumps(Evil()), "ndarray": b"\1\2", "bytes": b"\0", "jpeg": png(1)}
    encodings = {"caption": "str", "image": "jpeg"} | {f"of {name}": name for name in [*values, *others]}
    texts = [str(value).encode() if name.startswith("str") else value for name, value in values.items()]
    texts[-1] = json.dumps(values["json"]).encode()
    write(tmp_path / "set", encodings, [["a dög".encode(), png(0), *texts, *others.values()]])
    (found,) = samples_of(tmp_path / "set")
    assert (found.caption, found.image) == ("a dög", png(0))
    assert found.meta == {f"of {name}": value for name, value in values.items()}
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_pixels_are_images_of_their_mode(tmp_path: Path, mode: str) -> None:
    image = drawn(3, mode)
    write(tmp_path / "set", {"image": "pil", "caption": "bytes"}, [[pil(image), b"x"]])
    (found,) = samples_of(tmp_path / "set")
    assert isinstance(found.image, bytes)
    read = Image.open(io.BytesIO(found.image))
    assert (read.mode, read.size, read.tobytes()) == (mode, image.size, image.tobytes())
    assert len(built(tmp_path / "set", tmp_path / "out")[0]) == 1


def test_of_several_captions_the_first_counts_and_all_are_kept(tmp_path: Path) -> None:
    rows = [[json.dumps(text).encode(), png(i)] for i, text in enumerate([["a", "b"], "c", 5])]
    write(tmp_path / "set", {"caption": "json", "image": "bytes"}, rows)
    made, rejects = built(tmp_path / "set", tmp_path / "out")
    assert [(meta["caption"], meta.get("captions")) for meta in made] == [("a", ["a", "b"]), ("c", None)]
    assert [reject["reason"] for reject in rejects] == ["the caption column holds no text"]


def test_what_is_wrong_with_a_sample_is_its_reason(tmp_path: Path) -> None:
    whole = pil(drawn(0))
    palette = pil(drawn(0).convert("P"))
    huge = struct.pack("<3I", 2**31, 2**31, 3) + b"RGB"
    cells = [whole, whole[:-1], palette, huge, b"", whole + bytes(2**20 + 9000), whole, whole]
    texts = [b"{}"] * 6 + [b"[", b'{"deep": NaN}']
    rows = [[cell, f"caption {i}".encode(), texts[i]] for i, cell in enumerate(cells)]
    write(tmp_path / "set", {"image": "pil", "caption": "str", "more": "json"}, rows)
    made, rejects = built(tmp_path / "set", tmp_path / "out", max_pixels=1000)
    assert [meta["key"] for meta in made] == ["000000000", "000000007"] and made[1]["more"] == {"deep": None}
    assert [(reject["key"], reject["path"], reject["reason"][:60]) for reject in rejects] == [
        ("000000001", "shard.00000.mds sample 2", "the column image is no sound pil (other than 12 x 10 pixels)"),
        ("000000002", "shard.00000.mds sample 3", "the column image is no sound pil (pixels of mode P; write th"),
        ("000000003", "shard.00000.mds sample 4", "the column image is no sound pil (other than 2147483648 x 21"),
        ("000000004", "shard.00001.mds sample 1", "the column image is no sound pil (buffer is smaller than req"),
        ("000000005", "shard.00001.mds sample 2", "more than 1056576 bytes"),
        ("000000006", "shard.00001.mds sample 3", "the column more is no sound json (Expecting value: line 1 co"),
    ]


def test_broken_and_missing_shards_are_rejects_and_the_rest_is_used(tmp_path: Path) -> None:
    folder = plain(tmp_path / "set", 27)
    shards = sorted(folder.glob("*.mds"))
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    shards[2].write_bytes(b"\4\0\0\0\1\1")
    shards[3].unlink()
    shards[4].write_bytes(shards[0].read_bytes()[:900] + bytes(9))
    sizes = bytearray(shards[5].read_bytes())
    (first,) = struct.unpack_from("<I", sizes, 4)
    sizes[first : first + 4] = b"\xff" * 4
    shards[5].write_bytes(sizes)
    shards[6].write_bytes(b"\4" + shards[6].read_bytes()[1:])
    made, rejects = built(folder, tmp_path / "out")
    kept = [0, 1, 2, 3, 4, 5, 6, 16, 21, 22, 23]
    assert [(meta["key"], meta["caption"]) for meta in made] == [
        (f"{i:09d}", f"caption {0 if i == 16 else i}") for i in kept
    ]
    assert [(reject["key"], reject["reason"].partition(" /")[0]) for reject in rejects] == [
        ("000000007", "truncated; its first 3 samples are used"),
        ("000000008", "truncated"),
        ("000000012", "shard"),
        ("000000017", "truncated; its first 1 samples are used"),
        ("000000020", "its columns have other sizes than the sample"),
        ("000000024", "shard shard.00006.mds has not the 3 samples that index.json says: copy both again"),
    ]
    assert "00003.mds is missing" in rejects[2]["reason"]


def test_any_number_of_processes_makes_the_same_shards_and_edits_are_noticed(tmp_path: Path) -> None:
    folder = plain(tmp_path / "set", 70)
    tars = []
    for workers in (1, 2):
        made, _ = built(folder, tmp_path / f"out{workers}", workers=workers, samples=66, shard_samples=50)
        assert [meta["caption"] for meta in made] == [f"caption {i}" for i in range(66)]
        tars.append([tar.read_bytes() for tar in sorted((tmp_path / f"out{workers}").glob("train/*.tar"))])
    assert tars[0] == tars[1] and len(tars[0]) == 2
    cfg = BuildRun(
        run_dir=".",
        output_dir=str(tmp_path / "out1"),
        source=Source.mds,
        path=str(folder),
        image_column="image",
        samples=66,
        shard_samples=50,
        heldout_fraction=0.0,
    )
    assert build_shards(cfg).skipped and not is_outdated(cfg)
    os.utime(folder / "shard.00001.mds", (1, 1))
    assert is_outdated(cfg)
    with pytest.raises(UserError, match="files at path were written again"):
        build_shards(cfg)
    (folder / "shard.00001.mds").write_bytes(b"x")
    with pytest.raises(UserError, match="the files at path have changed"):
        build_shards(cfg)


def test_a_data_set_may_be_one_of_a_mix(tmp_path: Path) -> None:
    members = [
        MixedSource(source=Source.mds, name=name, path=str(plain(tmp_path / name, count)), image_column="image")
        for name, count in (("a", 5), ("b", 9))
    ]
    source = open_source(config(Source.mix, sources=members))
    refs = list(source.refs(tmp_path))
    assert [source.sample(ref.place).caption for ref in refs[:4]] == [
        "caption 0",
        "caption 0",
        "caption 1",
        "caption 1",
    ]
    assert len(refs) in (10, 11)


def test_shards_that_are_compressed_are_refused_until_they_are_unpacked(tmp_path: Path) -> None:
    folder = plain(tmp_path / "set", 2)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= {"compression": "zstd", "zip_data": {"basename": "shard.00000.mds.zstd"}}
    (folder / "index.json").write_text(json.dumps(index))
    assert len(samples_of(folder)) == 2
    (folder / "shard.00000.mds").rename(folder / "shard.00000.mds.zstd")
    with pytest.raises(
        UserError, match=r"compressed \(zstd\).* zstd -d shard.00000.mds.zstd -o shard.00000.mds"
    ) as error:
        samples_of(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "xsv"}, "have the format xsv; write them with MDSWriter"),
        ({"raw_data": {"basename": "../b.mds"}}, "the shard ../b.mds lies in another folder"),
        ({"raw_data": {"basename": "/b.mds"}}, "the shard /b.mds lies in another folder"),
        ({"raw_data": None}, "no index of MDS shards"),
        ({"column_sizes": [None]}, "no index of MDS shards"),
        ({"column_sizes": [None, -1]}, "no index of MDS shards"),
        ({"samples": "4"}, "no index of MDS shards"),
        ({"samples": 0}, "no samples in it"),
        ({"column_names": ["a", "b"]}, "image_column=image: .* has the columns a, b: set image_column to one of them"),
        ({"column_encodings": ["str", "pkl"]}, "image_column=image: .* has it as pkl; must be jpeg, png, pil or bytes"),
        ({"column_encodings": ["int", "png"]}, "caption_column=caption: .* has it as int; must be str, json or bytes"),
    ],
)
def test_an_index_that_cannot_be_used_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = plain(tmp_path / "set", 2)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= change
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message) as error:
        samples_of(folder)
    assert "\n" not in str(error.value)


def test_a_folder_without_an_index_is_one_line(tmp_path: Path) -> None:
    plain(tmp_path / "train", 2)
    with pytest.raises(UserError, match=r"no index.json in it; its subfolders train have one"):
        samples_of(tmp_path)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match=r"no index.json in it$"):
        samples_of(tmp_path)
    (tmp_path / "index.json").write_bytes(b"[1")
    with pytest.raises(UserError, match=r"no index of MDS shards"):
        samples_of(tmp_path)
    with pytest.raises(UserError, match="copy the folder there first"):
        open_source(config(Source.mds, path="s3://lab/set"))
    with pytest.raises(UserError, match="source=mds needs path=FOLDER"):
        config(Source.mds)
