"""The manifest: a round trip, an identity, foreign shards without one, and messages for what is not there."""

import hashlib
import json
from pathlib import Path

import pytest

from conf.errors import UserError
from data.manifest import Manifest, find_shards
from data.shards import ShardWriter


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
