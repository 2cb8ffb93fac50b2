"""The manifest: a round trip, an identity, foreign shards without one, and messages for what is not there."""

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from data.shards.manifest import Manifest, ShardInfo, find_shards
from data.shards.shard import ShardWriter

REPOSITORY = Path(__file__).resolve().parents[3]


def build(folder: Path, samples: int = 5, kind: str = "images") -> Manifest:
    with ShardWriter(folder, 2) as writer:
        for i in range(samples):
            writer.add(f"{i:09d}", {"txt": b"x", "png": b"y"})
    manifest = Manifest(kind=kind, shards=writer.finished, provenance={"source": "test"}, stats={"mean": [0.5]})
    manifest.save(folder)
    return manifest


def test_round_trip_and_contents(tmp_path: Path) -> None:
    manifest = build(tmp_path)
    assert find_shards(tmp_path) == manifest == Manifest.load(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content["schema"] == 1 and content["samples"] == 5
    assert content["bytes"] == sum((tmp_path / s["name"]).stat().st_size for s in content["shards"])
    for shard in content["shards"]:
        assert shard["sha256"] == hashlib.sha256((tmp_path / shard["name"]).read_bytes()).hexdigest()


def test_digest_is_the_identity_of_the_content(tmp_path: Path) -> None:
    first, same, other = build(tmp_path / "a"), build(tmp_path / "b"), build(tmp_path / "c", samples=4)
    assert first.digest() == same.digest() == Manifest.load(tmp_path / "a").digest() != other.digest()
    first.provenance["source"] = "another"
    assert first.digest() != same.digest()


@pytest.mark.parametrize("provenance", [{"source": "test", "a": 1.5}, {"shards": []}, {"x": {"shards": []}}])
@pytest.mark.parametrize("stats", [{}, {"shards": []}, {"mean": float("nan")}])
def test_digest_is_that_of_canonical_json_whatever_is_noted(
    tmp_path: Path, provenance: dict[str, Any], stats: dict[str, Any]
) -> None:
    manifest = build(tmp_path)
    manifest.provenance, manifest.stats = provenance, stats
    content = manifest.as_dict()
    for shard in content["shards"]:
        del shard["index"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).replace("NaN", "null")
    assert manifest.digest() == hashlib.sha256(canonical.encode()).hexdigest()


def test_foreign_shards_are_scanned(tmp_path: Path) -> None:
    shards = build(tmp_path).shards
    (tmp_path / "manifest.json").unlink()
    (tmp_path / ".00009.tar").write_bytes(b"")
    (tmp_path / "00000_stats.json").write_text("{}")  # img2dataset leaves these
    found = find_shards(tmp_path)
    assert [(s.name, s.samples, s.bytes) for s in found.shards] == [(s.name, s.samples, s.bytes) for s in shards]


@pytest.mark.parametrize("kind, remedy", [("images", "shards=FOLDER"), ("latents", "latents=FOLDER")])
def test_no_shards_names_the_remedy(tmp_path: Path, kind: str, remedy: str) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=f"at '{folder}'.*{remedy}"):
            find_shards(folder, kind)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(UserError, match="holds images, not latents"):
        find_shards(tmp_path, "latents")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        find_shards(tmp_path, "latents")


def test_files_that_differ_from_the_manifest_are_named(tmp_path: Path) -> None:
    build(tmp_path)
    shard = tmp_path / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"00001\.tar has \d+ bytes, not"):
        find_shards(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"00001\.tar is missing"):
        find_shards(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"schema": 1}', '{"schema": 2}', '{"schema": 1, "kind": "images", "shards": [{}]}']
)
def test_a_broken_manifest_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json") as error:
        find_shards(tmp_path)
    assert "\n" not in str(error.value)


def test_a_shard_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    manifest = build(tmp_path / "a")
    manifest.shards[0].name = "../a/00000.tar"
    manifest.save(tmp_path / "a")
    with pytest.raises(UserError, match="leaves the folder"):
        find_shards(tmp_path / "a")


HUGE = """
import os, sys, time

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

from conf.schema import StreamConfig
from data.image_dataset import order_of
from data.shards.manifest import Manifest
before, began = resident(), time.perf_counter()
manifest = Manifest.load(sys.argv[1])
digest = manifest.digest()
index = order_of(0, [shard.samples for shard in manifest.shards], StreamConfig(window=int(sys.argv[2])))(10**8)
print(time.perf_counter() - began, resident() - before, manifest.samples, index)
"""


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 10^9 samples that are not there."""
    folder = tmp_path_factory.mktemp("huge")
    shards = [
        ShardInfo(name=f"{i:05d}.tar", samples=10_000, bytes=10**9, sha256=hashlib.sha256(b"%d" % i).hexdigest())
        for i in range(100_000)
    ]
    Manifest(kind="latents", shards=shards).save(folder)
    return folder


@pytest.mark.parametrize("window", [0, 64])
def test_a_position_among_a_billion_samples_is_found_in_little_memory(huge: Path, window: int) -> None:
    command = [sys.executable, "-c", HUGE, str(huge), str(window)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=True)
    seconds, memory, samples, index = map(float, done.stdout.split())
    print(f"window {window}: {seconds:.2f} s, {memory / 1e6:.0f} MB")
    assert samples == 10**9 and 0 <= index < samples
    assert memory <= 100e6


@pytest.mark.parametrize(
    "name, value",
    [
        ("schema", float("nan")),
        ("kind", None),
        ("shards", None),
        ("shards", {}),
        ("shards", [[]]),
        ("shards", [{"name": "00000.tar", "samples": -1, "bytes": 1, "sha256": ""}]),
        ("shards", [{"name": "00000.tar", "samples": float("nan"), "bytes": 1, "sha256": ""}]),
        ("shards", [{"name": "00000.tar", "samples": True, "bytes": 1, "sha256": ""}]),
        ("shards", [{"name": 3, "samples": 1, "bytes": 1, "sha256": ""}]),
        ("shards", [{"name": "00000.tar", "samples": 1, "bytes": 1, "sha256": None}]),
        ("provenance", []),
        ("stats", None),
    ],
)
def test_a_manifest_with_another_value_is_one_line(tmp_path: Path, name: str, value: object) -> None:
    build(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(content | {name: value}))
    with pytest.raises(UserError, match=r"manifest\.json (is not a manifest|has schema nan)") as raised:
        find_shards(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "[]", "null", "NaN", "[" * 100_000, '{"schema": 1}'])
def test_a_file_that_is_no_manifest_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest"):
        find_shards(tmp_path)


def test_foreign_shards_say_what_they_leave_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "00003.tar.gz").write_bytes(b"\x1f\x8b")
    with tarfile.open(tmp_path / "00004.TAR", "w") as tar:
        for name in ("README", "a.txt", "folder/.hidden"):
            tar.addfile(tarfile.TarInfo(name))
    assert [shard.samples for shard in find_shards(tmp_path).shards] == [2, 2, 1, 1]
    compressed, others = capsys.readouterr().err.splitlines()
    assert "00003.tar.gz is compressed" in compressed and "1 files without an extension" in others


def test_shards_without_samples_are_not_said_to_be_missing(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "99999.tar").write_bytes(bytes(10_240))
    assert find_shards(tmp_path / "train").samples == 5
    with pytest.raises(UserError, match=r"/heldout' holds no samples, its shards are empty \(99999\.tar\): run data"):
        find_shards(tmp_path / "heldout")
