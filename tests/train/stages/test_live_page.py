"""The page beside a pipeline: of which run, and of whose images."""

from types import SimpleNamespace
from typing import Any

from conf.schema import PipelineRun
from train.stages.live_page import page_of


def test_the_page_shows_the_images_that_the_stages_read() -> None:
    cfg, other = PipelineRun(run_dir="runs/a b", name="n"), "runs/demo/shards"
    own: Any = SimpleNamespace(cfg=SimpleNamespace(shards="runs/a b/shards"))
    shared: Any = SimpleNamespace(cfg=SimpleNamespace(shards=other))
    none: Any = SimpleNamespace(cfg=SimpleNamespace())
    run_dir = page_of(cfg, [own])[0]
    assert page_of(cfg, [none, own]) == [run_dir] == page_of(cfg, [])
    assert page_of(cfg, [none, shared, shared]) == [run_dir, f"shards={other}"]
