"""The build: the same shards from any number of processes, rejects that are never fatal, and nothing written half."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from conf.errors import UserError
from conf.schema import BuildRun, ImageFormat, MixedSource, Source
from data.building import records, split
from data.building.build import REJECTS, STAGING, Built, Split, build_shards
from data.building.journal import BuildJournal
from data.building.records import Record
from data.captions import caption_rank
from data.shards.manifest import find_shards
from data.shards.shard import ShardWriter

ROOT = Path(__file__).parents[3]


def photos(folder: Path, count: int = 12) -> None:
    """Images of odd sizes, every fourth with alpha."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        size = (int(random.integers(3, 90)), int(random.integers(3, 90)))
        mode = "RGBA" if i % 4 == 0 else "RGB"
        pixels = random.integers(256, size=(size[1], size[0], len(mode)), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"noise number {i}")


def config(tmp_path: Path, **options: Any) -> BuildRun:
    settings: dict[str, Any] = {"source": Source.folder, "path": str(tmp_path / "photos"), "workers": 1, **options}
    return BuildRun(run_dir=str(tmp_path), **{"output_dir": str(tmp_path / "shards"), **settings})


def contents(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}


def samples(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Read back with plain webdataset."""
    sides: dict[str, list[dict[str, Any]]] = {}
    for side in ("train", "heldout"):
        sides[side] = []
        for path in sorted((output / side).glob("*.tar")):
            with open(path, "rb") as file:  # WebDataset(path) would leave the file open
                sides[side] += group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))
    return sides


def test_plain_webdataset_reads_what_was_built(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    built = build_shards(config(tmp_path, shard_samples=5, resolution=16, format=ImageFormat.webp))
    sides = samples(tmp_path / "shards")
    assert (len(sides["train"]), len(sides["heldout"])) == (built.train.samples, built.heldout.samples)
    assert built.train.samples + built.heldout.samples == 12 and built.rejected == 0
    for sample in sides["train"] + sides["heldout"]:
        meta = json.loads(sample["json"])
        assert sample["txt"].decode() == meta["caption"] and sample["__key__"] == meta["key"]
        assert min(meta["width"], meta["height"]) == min(16, meta["original_width"], meta["original_height"])
        assert sample["webp"][8:12] == b"WEBP"
    assert find_shards(tmp_path / "shards" / "train").samples == built.train.samples


def test_shards_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CHUNK", 3)
    photos(tmp_path / "photos", 20)
    (tmp_path / "photos" / "004.png").write_bytes(b"broken")
    for workers in (1, 2):
        build_shards(config(tmp_path, workers=workers, shard_samples=4, output_dir=str(tmp_path / f"by{workers}")))
    assert contents(tmp_path / "by1") == contents(tmp_path / "by2")


def test_rejects_are_listed_with_their_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos(tmp_path / "photos")
    (tmp_path / "photos" / "001.png").write_bytes(b"broken")
    (tmp_path / "photos" / "002.txt").unlink()
    (tmp_path / "photos" / "003.txt").write_text(" \n")
    Image.new("1", (5000, 5000)).save(tmp_path / "photos" / "005.png")
    built = build_shards(config(tmp_path, max_pixels=1_000_000))
    rejects = [json.loads(line) for line in (tmp_path / "shards" / REJECTS).read_text().splitlines()]
    assert built.rejected == 4 and built.train.samples + built.heldout.samples == 8
    assert [(r["key"], r["path"]) for r in rejects] == [(f"{i:09d}", f"{i:03d}.png") for i in (1, 2, 3, 5)]
    reasons = ("not a readable image", "no caption", "empty caption", "5000 x 5000 pixels are more than")
    assert all(r["reason"].startswith(reason) for r, reason in zip(rejects, reasons, strict=True))
    assert "4 rejected" in capsys.readouterr().out


def test_a_source_without_a_usable_sample_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="none of 1 samples can be used, most often because: no caption"):
        build_shards(config(tmp_path))
    assert sorted(contents(tmp_path / "shards")) == [REJECTS]


def test_held_out_captions_are_never_trained_on(tmp_path: Path) -> None:
    build_shards(config(tmp_path, source=Source.demo, samples=60, resolution=16, heldout_fraction=0.3))
    captions = {side: {s["txt"].decode() for s in found} for side, found in samples(tmp_path / "shards").items()}
    assert all(caption_rank(c) < 0.3 for c in captions["heldout"]) and len(captions["heldout"]) > 8
    assert all(caption_rank(c) >= 0.3 for c in captions["train"])


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("captions", [["one"], ["one", "one"], ["one", "two"], ["one", "two", "three", "one"]])
def test_no_side_of_a_small_set_stays_empty(tmp_path: Path, fraction: float, captions: list[str]) -> None:
    train, heldout = ShardWriter(tmp_path / "train", 10), ShardWriter(tmp_path / "heldout", 10)
    split = Split(train, heldout, fraction, lambda *_: None)
    for i, caption in enumerate(captions):
        split.add(i, Record(f"{i:09d}", "path", caption, {"txt": caption.encode()}))
    split.settle()
    sides = [sum(shard.samples for shard in writer.close()) for writer in (train, heldout)]
    assert sum(sides) == len(captions) and sides[0] > 0
    assert (sides[1] > 0) == (fraction > 0 and len(captions) > 1)
    texts = [set(s["txt"].decode() for s in found) for found in samples(tmp_path).values()]
    assert not texts[0] & texts[1] or len(set(captions)) == 1


def test_the_same_build_again_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos(tmp_path / "photos")
    first = build_shards(config(tmp_path))
    before = contents(tmp_path / "shards")
    again = build_shards(config(tmp_path, workers=2))
    assert not first.skipped and again.skipped and again.train.digest() == first.train.digest()
    assert contents(tmp_path / "shards") == before
    assert "already built" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"resolution": 8}, {"format": ImageFormat.jpg}, {"samples": 5}, {"background": "red"}]
)
def test_other_options_are_refused_and_named(tmp_path: Path, change: dict[str, Any]) -> None:
    photos(tmp_path / "photos")
    build_shards(config(tmp_path))
    before = contents(tmp_path / "shards")
    with pytest.raises(UserError, match=f"output_dir=.*{next(iter(change))} differs.*another output_dir or delete"):
        build_shards(config(tmp_path, **change))
    assert contents(tmp_path / "shards") == before


def test_changed_photos_are_noticed(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    build_shards(config(tmp_path))
    (tmp_path / "photos" / "000.txt").write_text("a caption of another length")
    with pytest.raises(UserError, match="the files at path have changed"):
        build_shards(config(tmp_path))


def rewrite(path: Path, content: bytes) -> None:
    """Other contents of the same size; a file system's clock may be too coarse for a test, so the time is set."""
    assert path.stat().st_size == len(content)
    then = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(then, then + 10**9))


@pytest.mark.parametrize("name", ["000.txt", "000.png", "000.json", "000.seg.png"])
def test_an_edit_that_keeps_the_size_is_noticed(tmp_path: Path, name: str) -> None:
    photos(tmp_path / "photos", 2)
    (tmp_path / "photos" / "000.json").write_text('{"class_id": 1}')
    with Image.open(tmp_path / "photos" / "000.png") as image:
        Image.new("L", image.size, 3).save(tmp_path / "photos" / "000.seg.png")
    build_shards(config(tmp_path))
    before = contents(tmp_path / "shards")
    assert build_shards(config(tmp_path)).skipped
    rewrite(tmp_path / "photos" / name, (tmp_path / "photos" / name).read_bytes()[::-1])
    with pytest.raises(UserError, match=r"files at path were written again since then.*or delete this one"):
        build_shards(config(tmp_path))
    assert contents(tmp_path / "shards") == before
    shutil.rmtree(tmp_path / "shards")
    assert not build_shards(config(tmp_path)).skipped


def test_an_edited_class_in_a_table_is_noticed(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 2)
    table = tmp_path / "photos" / "t.csv"
    table.write_text("path,caption,class_id\n000.png,a,1\n001.png,b,0\n")
    cfg = config(tmp_path, path=str(table))
    build_shards(cfg)
    rewrite(table, table.read_bytes().replace(b"a,1", b"a,2"))
    with pytest.raises(UserError, match="written again"):
        build_shards(cfg)


def test_edited_shards_and_members_of_a_mix_are_noticed(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 4)
    build_shards(config(tmp_path))
    tar = tmp_path / "shards" / "train" / "00000.tar"
    one = {"source": Source.shards, "path": str(tar), "output_dir": str(tmp_path / "again")}
    members = [MixedSource(source=Source.shards, path=str(tar))]
    mixed = {"source": Source.mix, "path": None, "sources": members, "output_dir": str(tmp_path / "mix")}
    for options in (one, mixed):
        build_shards(config(tmp_path, **options))
    rewrite(tar, tar.read_bytes().replace(b"noise number", b"sound number"))
    for options in (one, mixed):
        with pytest.raises(UserError, match="files at path were written again"):
            build_shards(config(tmp_path, **options))


def test_a_copy_with_its_times_is_the_same_source(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 3)
    build_shards(config(tmp_path))
    shutil.copytree(tmp_path / "photos", tmp_path / "copy")  # as `cp -a` does
    assert build_shards(config(tmp_path, path=str(tmp_path / "copy"))).skipped
    os.utime(tmp_path / "copy" / "000.txt", (1, 1))
    again = config(tmp_path, path=str(tmp_path / "copy"), output_dir=str(tmp_path / "again"))
    build_shards(again)  # times are no part of a data set
    manifest = "train/manifest.json"
    one, other = ((tmp_path / name / manifest).read_text() for name in ("shards", "again"))
    assert one.replace(str(tmp_path / "photos"), str(tmp_path / "copy")) == other
    (tmp_path / "shards" / "times").unlink()  # as a build of before has none
    assert build_shards(config(tmp_path)).skipped


def test_a_build_that_was_killed_starts_again_when_its_source_was_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "photos", 12)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(BuildJournal, "publish", interrupted)
        build_shards(config(tmp_path, shard_samples=3))
    rewrite(tmp_path / "photos" / "000.txt", b"sound number 0")
    build_shards(config(tmp_path, shard_samples=3))
    assert "had other options or files: it starts again" in capsys.readouterr().out
    captions = {s["txt"].decode() for side in samples(tmp_path / "shards").values() for s in side}
    assert "sound number 0" in captions and "noise number 0" not in captions


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def named(captions: list[str], folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, caption in enumerate(captions):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption)


LOW = next(f"a photo of sks dog {i}" for i in range(1000) if caption_rank(f"a photo of sks dog {i}") < 0.02)
HIGH = next(f"a photo of sks cat {i}" for i in range(1000) if caption_rank(f"a photo of sks cat {i}") > 0.6)


@pytest.mark.parametrize(
    "captions", [[LOW] * 12, [HIGH] * 12, [HIGH, HIGH.title()] * 6, [LOW] * 11 + [f"{LOW} 2"], [HIGH] * 400]
)
def test_images_of_one_caption_are_held_out_one_by_one(
    tmp_path: Path, captions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    named(captions, tmp_path / "photos")
    built = build_shards(config(tmp_path, heldout_fraction=0.05, shard_samples=2))
    if caption_rank(captions[-1]) == caption_rank(captions[0]):
        assert 0 < built.heldout.samples <= max(2, 0.1 * len(captions))
        assert built.train.provenance["split_by"] == "key"
        assert "held out one by one" in capsys.readouterr().out
    else:  # the first sample of another side settled it
        assert "11 of 12 samples are held out" in capsys.readouterr().out
    assert built.train.samples + built.heldout.samples == len(captions)


def test_images_of_one_caption_stay_on_their_sides_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named([HIGH] * 40, tmp_path / "photos")
    options = {"heldout_fraction": 0.2, "shard_samples": 2}
    build_shards(config(tmp_path, output_dir=str(tmp_path / "whole"), **options))
    finish, shards = ShardWriter._finish_shard, list[str]()

    def killed(writer: ShardWriter) -> None:
        shards.append(writer.shard_name)
        if len(shards) == 6:
            raise KeyboardInterrupt
        finish(writer)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ShardWriter, "_finish_shard", killed)
        build_shards(config(tmp_path, **options))
    build_shards(config(tmp_path, **options))
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


def test_many_large_images_of_few_captions_have_a_held_out_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "PENDING_BYTES", 10_000)
    named([HIGH, f"{HIGH}!"] * 100, tmp_path / "photos")
    assert caption_rank(f"{HIGH}!") > 0.05
    built = build_shards(config(tmp_path, heldout_fraction=0.05))
    assert 2 < built.heldout.samples < 20


@pytest.mark.parametrize(("count", "fraction", "said"), [(1, 0.5, "there is only one"), (1, 0.0, ""), (3, 0.0, "")])
def test_an_empty_held_out_side_is_said(
    tmp_path: Path, count: int, fraction: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named([HIGH] * count, tmp_path / "photos")
    assert build_shards(config(tmp_path, heldout_fraction=fraction)).heldout.samples == 0
    found = capsys.readouterr().out
    assert said in found and ("no sample is held out" in found) == bool(said)


def test_no_sample_left_for_training_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "PENDING_BYTES", 0)
    named(["a red fox", "a green fox"], tmp_path / "photos")
    with pytest.raises(UserError, match=r"heldout_fraction=0\.999999: no sample is left for training; lower it"):
        build_shards(config(tmp_path, heldout_fraction=0.999999))


def test_files_of_others_are_never_deleted(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    precious = tmp_path / "shards" / "train" / "00000.tar"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"downloaded for a week")
    with pytest.raises(UserError, match="not a finished build; choose another output_dir"):
        build_shards(config(tmp_path))
    assert precious.read_bytes() == b"downloaded for a week"


def test_an_unknown_background_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="background=octarine"):
        build_shards(config(tmp_path, background="octarine"))


def test_a_failing_write_shows_nobody_a_part_and_the_next_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "photos", 30)
    whole = config(tmp_path, shard_samples=4, output_dir=str(tmp_path / "whole"))
    build_shards(whole)
    publish, shards = ShardWriter._finish_shard, list[str]()

    def full(writer: ShardWriter) -> None:
        shards.append(writer.shard_name)
        if len(shards) == 4:
            raise OSError(28, "No space left on device")
        publish(writer)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "_finish_shard", full)
        with pytest.raises(OSError, match="No space left"):
            build_shards(config(tmp_path, shard_samples=4))
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [STAGING]
    build_shards(config(tmp_path, shard_samples=4))
    assert "going on with the build" in capsys.readouterr().out
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


KILLED = """
import sys
from conf.schema import BuildRun, Source
from data.building import build, records
records.CHUNK = 1
if __name__ == "__main__":
    settings = dict(source=Source.demo, samples=100_000, resolution=16, shard_samples=4, workers=2)
    build.build_shards(BuildRun(run_dir=".", output_dir=sys.argv[1], **settings))
"""


def test_a_killed_build_of_other_options_starts_again_and_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    output = tmp_path / "shards"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), str(output)], env=environment, start_new_session=True)
    wait_for(lambda: any((output / STAGING / "train").glob("*.tar")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not alive(process.pid))
    assert not (output / "train").exists()
    built: Built = build_shards(config(tmp_path, source=Source.demo, samples=10, resolution=16))
    assert not built.skipped and built.train.samples + built.heldout.samples == 10
    assert sorted(path.name for path in output.iterdir()) == ["ATTRIBUTION", "heldout", REJECTS, "report.json", "train"]
    with tarfile.open(output / "train" / "00000.tar") as tar:
        assert len(tar.getnames()) == 4 * built.train.samples


RESUMED = """
import sys, time
from conf.schema import BuildRun, FilterConfig, Source
from data.building import build, records
records.CHUNK = 2
make = records.RecordMaker.make


def slowly(maker, number, ref):
    time.sleep(0.01)  # so that a kill comes before the end, however busy the machine is
    return make(maker, number, ref)


records.RecordMaker.make = slowly
if __name__ == "__main__":
    folder, output, workers = sys.argv[1:]
    settings = dict(source=Source.folder, path=folder, resolution=16, shard_samples=5, workers=int(workers))
    filters = FilterConfig(near_duplicates=4, min_side=6)
    build.build_shards(BuildRun(run_dir=".", output_dir=output, heldout_fraction=0.3, filters=filters, **settings))
"""


def test_builds_killed_at_random_moments_end_as_an_undisturbed_one(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 150)
    for i in range(5, 150, 7):  # copies of others, which only what came before tells
        (tmp_path / "photos" / f"{i:03d}.png").write_bytes((tmp_path / "photos" / f"{i - 3:03d}.png").read_bytes())
    (tmp_path / "photos" / "031.png").write_bytes(b"broken")
    for i, label in enumerate([*range(40), 4]):  # names are learnt as they come, and the last one is a contradiction
        name = f"class {label + (i == 40)}"
        (tmp_path / "photos" / f"{100 + i:03d}.json").write_text(json.dumps({"class": name, "class_id": label}))
    script = tmp_path / "resumed.py"
    script.write_text(RESUMED)
    environment, random = {**os.environ, "PYTHONPATH": str(ROOT)}, np.random.default_rng(3)

    def command(output: str, workers: int) -> list[str]:
        return [sys.executable, str(script), str(tmp_path / "photos"), str(tmp_path / output), str(workers)]

    subprocess.run(command("whole", 1), env=environment, check=True, timeout=60, stdout=subprocess.DEVNULL)
    kills, output = 0, tmp_path / "killed"
    while not (output / "train" / "manifest.json").exists():
        lines, workers = output / STAGING / "journal.jsonl", 1 + kills % 2
        before = lines.read_text().count("\n") if lines.exists() else 0
        process = subprocess.Popen(command("killed", workers), env=environment, stdout=subprocess.DEVNULL)
        goal = before + int(random.integers(1, 5))
        wait_for(lambda: process.poll() is not None or (lines.exists() and lines.read_text().count("\n") >= goal))  # noqa: B023
        process.kill()
        process.wait()
        kills += 1
    assert kills > 3
    assert contents(output) == contents(tmp_path / "whole")
    names = find_shards(output / "train").provenance["labels"]["classes"]
    assert all(name in ("", f"class {i}") for i, name in enumerate(names)) and names[4] and sum(map(bool, names)) > 20
    report = json.loads((output / "report.json").read_text())
    assert report["seen"] == 150 and report["dropped"]["near_duplicates"] > 10 and report["dropped"]["min_side"] > 0
    assert sorted(report["broken"].values()) == [1, 1] and len(report["kept"]) == 2


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
