"""Random shards of others: each sample is kept and reads back, is a reject with a reason, or ends in one line."""

import gzip
import io
import json
import random
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conf.errors import UserError
from conf.schema import BuildRun, ImageConfig, Source, StreamConfig
from data.building.build import build_shards
from data.image_dataset import ImageDataset, captions_of

BATCHES, SHARDS_OF_A_BATCH = 30, 12
RESOLUTION = ImageConfig(resolution=4)
STEMS = ("0001", "22.05", "22.06", "v1.0/plain", "k" * 187, "ключ", "a/b/c", ".hidden", "0001.1", "x y", "caf\udce9")
IMAGES = ("jpg", "png", "PNG", "jpg", "png", "jpeg", "webp", "gif", "seg.png", "left.jpg", "xyz")
KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
FORMATS = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
CAPTIONS = (
    "a dog",
    "\ufeffmarked",
    "two\r\nlines",
    "nul\0inside",
    "  ",
    "",
    "café noir",
    "犬",
    "\u2028x",
    "{",
    "x" * 70_000,
)


def image(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (rng.randint(1, 6), rng.randint(1, 6)), (rng.randrange(256), rng.randrange(256), 0))
    image.save(buffer, rng.choice(("PNG", "JPEG", "WEBP")))
    content = buffer.getvalue()
    return rng.choice([content] * 12 + [content[: len(content) // 2], b"", rng.randbytes(40)])


def text(rng: random.Random) -> bytes:
    caption = rng.choice((*["a dog"] * 20, *CAPTIONS))
    encoding = rng.choice((*["utf-8"] * 9, "utf-16", "utf-16-le", "utf-8-sig", "latin-1"))
    return rng.choice([caption.encode(encoding, "replace")] * 9 + [rng.randbytes(9)])


def fields(rng: random.Random) -> bytes:
    caption: Any = rng.choice((*["a cat"] * 20, *CAPTIONS, None, float("nan"), ["a"], 3, True, {}, "half \ud83d"))
    content = json.dumps({"caption": caption, "score": rng.choice((1, float("inf"), 10**400, None))}).encode()
    return rng.choice([content] * 12 + [b"[1]", b"{", b"", b"[" * 9_999, b"\xff\xfe" + content, content[:-3]])


def tar(rng: random.Random) -> bytes:
    """A shard with all that shards of others were seen to have, at random."""
    members: list[tuple[str, bytes | None]] = []
    for number in range(rng.randint(0, 9)):
        key = rng.choice(STEMS) + rng.choice(("", str(number), str(number)))
        images = rng.sample(IMAGES, rng.choice((0, *[1] * 6, 2)))
        for extension in (*images, *rng.choice((["txt"], ["json"], ["txt", "json"], ["txt"], ["json"], []))):
            content = {"txt": text, "json": fields}.get(extension, image)(rng)
            members.append((f"{key}.{extension}", None if rng.random() < 0.02 else content))
    members += [("README", b"no extension"), ("folder", None)][: rng.choice((*[0] * 12, 1, 2))]
    order = rng.choice(("as it is", "as it is", "by extension", "shuffled", "doubled"))
    if order == "by extension":
        members.sort(key=lambda member: member[0].rpartition(".")[2])
    elif order == "shuffled":
        rng.shuffle(members)
    elif order == "doubled" and members:
        members.insert(rng.randrange(len(members)), rng.choice(members))
    made = packed(members, rng)
    broken = [b"", made[: rng.randrange(len(made))], gzip.compress(made), made + made, made + b"rest"]
    return rng.choice([made] * 20 + [*broken, rng.randbytes(2000)])


def packed(members: list[tuple[str, bytes | None]], rng: random.Random) -> bytes:
    """A tar of these files; those without content are links and other special ones."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice(FORMATS)) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = rng.choice(KINDS), rng.choice(("0001.jpg", "l" * 150))
            info.size = len(content or b"")
            file.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


def shards(folder: Path, seed: int) -> BuildRun:
    """Random shards and one that is sound, and the build of them all."""
    folder.mkdir()
    rng = random.Random(seed)
    for number in range(SHARDS_OF_A_BATCH):
        (folder / f"{number:05d}.tar").write_bytes(tar(rng))
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "PNG")
    sound = packed([("sound.png", buffer.getvalue()), ("sound.txt", b"sound")], rng)
    (folder / f"{SHARDS_OF_A_BATCH:05d}.tar").write_bytes(sound)
    out = str(folder.parent / "out")
    return BuildRun(run_dir=".", output_dir=out, source=Source.shards, path=str(folder), workers=1, heldout_fraction=0)


def one_line(message: str) -> bool:
    return bool(message.strip()) and "\n" not in message


def files_of(path: Path) -> list[str]:
    """Names of all files that a shard has as a whole, but for hidden ones."""
    try:
        with tarfile.open(path, "r:", errors="backslashreplace", ignore_zeros=True) as file:
            names = [member.name for member in file if not member.isdir()]
    except tarfile.TarError:
        return []
    return [name for name in names if not name.rpartition("/")[2].startswith(".")]


def plain(key: str) -> str:
    """A key without the mark of the second sample that has it."""
    return re.sub("~[0-9]+", "", key)


@pytest.mark.parametrize("seed", range(BATCHES))
def test_a_build_accounts_for_every_file_of_any_shard(tmp_path: Path, seed: int) -> None:
    cfg, output = shards(tmp_path / "in", seed), tmp_path / "out"
    built = build_shards(cfg)
    rejects = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    assert all(one_line(reject["reason"]) for reject in rejects)
    report = json.loads((output / "report.json").read_text())
    assert report["seen"] == built.train.samples + len(rejects) == built.train.samples + built.rejected
    kept = ImageDataset(output / "train", RESOLUTION, 0)
    items = [kept.at(index) for index in range(kept.samples)]
    assert all(item["caption"] and item["caption"] == item["meta"]["caption"] for item in items)
    named = {(int(item["meta"]["key"][:5]), plain(item["meta"]["source_key"])) for item in items}
    for reject in rejects:
        shard, _, key = reject["path"].partition(": ")
        named.add((int(Path(shard).stem), plain(key)))
    for number, path in enumerate(sorted((tmp_path / "in").glob("*.tar"))):
        for name in files_of(path):
            starts = {name[:end] for end in range(len(name) + 1)}  # "": the shard as a whole has a line
            assert any((number, start) in named for start in starts), (path, name)


@pytest.mark.parametrize("seed", range(BATCHES))
def test_a_training_reads_what_a_build_would_make_of_any_shard(tmp_path: Path, seed: int) -> None:
    build_shards(shards(tmp_path / "in", seed))
    built = ImageDataset(tmp_path / "out" / "train", RESOLUTION, 0)
    items = list(map(built.at, range(built.samples)))
    made = [(item["meta"]["key"][:5], item["meta"]["source_key"], item["caption"]) for item in items]
    problems = list[str]()
    for path in sorted((tmp_path / "in").glob("*.tar")):
        alone = tmp_path / path.stem
        alone.mkdir()
        path.rename(alone / path.name)
        found = Counter[tuple[str, str]]()
        try:
            dataset = ImageDataset(alone, RESOLUTION, 0, StreamConfig(skip_broken=True), labels=True)
        except UserError as error:  # it breaks off, or has no sample
            problems.append(str(error))
            continue
        for index in range(dataset.samples):
            try:
                item = dataset.at(index)
            except UserError as error:
                problems.append(str(error))
            else:
                found[item["key"], item["caption"]] += 1
        wanted = Counter((key, caption) for shard, key, caption in made if shard == path.stem)
        more = {caption for _, caption in found - wanted}
        assert not wanted - found and more <= {""}  # which a build takes for none
        try:
            captions_of(alone)
        except UserError as error:
            problems.append(str(error))
    assert all(map(one_line, problems))
