"""Any address that webdataset reads, without a manifest: what it promises, and what it says that it does not."""

import gc
import io
import json
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conf.errors import UserError
from conf.schema import ImageConfig, StreamConfig
from data.loader import batches
from data.streams import WebStream, image_stream

SHARDS, SHARD = 8, 6
KEYS = {f"{shard}{row}" for shard in range(SHARDS) for row in range(SHARD)}
SMALL = ImageConfig(resolution=8)


pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files to the collector


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Tars as other programs write them, without a manifest."""
    folder = tmp_path / "served"
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for row in range(SHARD):
                buffer = io.BytesIO()
                Image.new("RGB", (12, 8), (10 * shard, 10 * row, 0)).save(buffer, "PNG")
                meta = json.dumps({"long": f"a long caption of {shard}{row}"}).encode()
                for extension, content in (("png", buffer.getvalue()), ("txt", b"a caption"), ("json", meta)):
                    info = tarfile.TarInfo(f"{shard}{row}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def read(urls: str, count: int, rank: int = 0, world: int = 1, workers: int = 0, start: int = 0, **stream: Any) -> Any:
    dataset = image_stream("/nowhere", SMALL, 0, StreamConfig(webdataset=urls, **stream), 12)
    assert isinstance(dataset, WebStream)
    return list(islice(batches(dataset, 12, 12 // world, rank, world, start, workers), count))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("address", ["{folder}/", "pipe:cat {folder}/", "{http}/"])
def test_every_address_gives_images_captions_and_positions(shards: Path, http: Any, address: str, workers: int) -> None:
    urls = address.format(folder=shards, http=http.url) + "{00..07}.tar"
    found = read(urls, 8, workers=workers, captions={"long": 1.0}, buffer=4)
    assert [batch["position"].tolist() for batch in found] == [list(range(12 * i, 12 * i + 12)) for i in range(8)]
    for batch in found:
        assert batch["pixels"].shape == (12, 3, 8, 8) and batch["pixels"].dtype == torch.uint8
        for key, caption, pixels in zip(batch["key"], batch["caption"], batch["pixels"], strict=True):
            assert caption == f"a long caption of {key}"
            assert pixels[:, 0, 0].tolist() == [10 * int(key[0]), 10 * int(key[1]), 0]
    counts = Counter(key for batch in found for key in batch["key"])
    assert counts.keys() == KEYS and max(counts.values()) <= 4  # two epochs, whose ends a buffer blurs


def test_processes_share_the_shards_and_a_run_that_goes_on_sees_another_order(shards: Path) -> None:
    urls = f"{shards}/{{00..07}}.tar"
    parts = [{key[0] for batch in read(urls, 4, rank, 2, buffer=1) for key in batch["key"]} for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 4 and not parts[0] & parts[1]
    first, again, later = (read(urls, 1, start=start)[0]["key"] for start in (0, 0, 48))
    assert first == again != later
    assert {key for batch in read(urls, 9, rank=15, world=12) for key in batch["key"]}  # fewer shards than processes


def test_more_processes_than_shards_do_not_read_the_same_samples_at_a_time(shards: Path) -> None:
    urls = f"{shards}/{{00..07}}.tar"
    first = [read(urls, 1, rank, 12, buffer=1)[0]["key"][0] for rank in range(12)]
    assert len({key[0] for key in first}) >= 4  # shards; in one order it would be a single one
    assert first == [read(urls, 1, rank, 12, buffer=1)[0]["key"][0] for rank in range(12)]


def test_it_says_what_is_lost_once_for_all_processes(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        read(f"{shards}/{{00..07}}.tar", 1)
    assert capsys.readouterr().err.count("8 shards in no exact order; lost is that each comes once") == 1


def test_what_cannot_be_read_is_one_line_or_left_out(shards: Path) -> None:
    with pytest.raises(UserError, match=r"^stream\.webdataset: .*No such file"):
        read(f"{shards}/none.tar", 1)
    with tarfile.open(shards / "08.tar", "w") as tar:
        for extension, content in (("png", b"no image"), ("txt", b"x")):
            info = tarfile.TarInfo(f"broken.{extension}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=r"08\.tar: sample 'broken': "):
        read(f"{shards}/08.tar", 1)
    with pytest.raises(UserError, match="none of the 1000 samples of a micro-batch can be read; the first: "):
        read(f"{shards}/08.tar", 1, skip_broken=True)
    found = read(f"{shards}/{{00..08}}.tar", 8, skip_broken=True)
    assert all(len(batch["key"]) == 12 for batch in found)
    assert any("sample 'broken'" in line for batch in found for line in batch["skipped"])


@pytest.fixture
def ends() -> Iterator[None]:
    """Ends a test that would hang."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore:FileNotFoundError")  # each of webdataset's own
@pytest.mark.usefixtures("ends")
def test_a_stream_without_a_sample_ends_after_an_epoch(shards: Path) -> None:
    tarfile.open(shards / "empty.tar", "w").close()
    with pytest.raises(UserError, match=r"^stream\.webdataset: none of 1 shards has a sample that can be read"):
        read(f"{shards}/empty.tar", 1)
    with pytest.raises(UserError, match="none of 2 shards has a sample that can be read"):
        read(f"{shards}/{{empty,none}}.tar", 1, skip_broken=True)
    for rank in range(2):  # one of them begins with a share of which nothing comes
        (batch,) = read(f"{shards}/{{none,00}}.tar", 1, rank, 2, skip_broken=True)
        assert len(batch["key"]) == 6


@pytest.mark.parametrize("options", [{"window": 2}, {"lanes": 4}, {"mix": {"/x": 1.0}}])
def test_orders_of_ours_do_not_go_with_it(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"stream\.webdataset=x: has an order of its own"):
        StreamConfig(webdataset="x", **options)
