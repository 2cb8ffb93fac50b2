"""The training of CLIP: it learns to find pairs, and it never sees less than the whole global batch."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from conf.errors import UserError
from models.clip import Clip
from train.engine.metric_log import MetricLog
from train.engine.runtime import Runtime
from train.training.clip import ClipStage


def test_pairs_find_each_other(towers: Any) -> None:
    losses = towers.losses("clip")
    assert losses[0] == pytest.approx(np.log(32), rel=0.5)  # of 32 pairs, at the start nothing is known
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])
    metrics = json.loads((towers.folder / "clip" / "DONE").read_text())["metrics"]
    assert metrics["eval/retrieval_candidates"] == 7
    assert metrics["eval/retrieval_image_to_text"] > 2 / 7 and metrics["eval/retrieval_text_to_image"] > 2 / 7
    assert {"train/in_batch_accuracy", "train/logit_scale", "train/grad_norm", "train/lr"} <= towers.rows("clip")[
        0
    ].keys()


def test_export_is_read_back_with_its_sizes(towers: Any) -> None:
    exported = Clip.from_pretrained(towers.folder / "clip" / "export")
    assert exported.config == towers.config("clip").model
    assert exported.text_states(exported.tokenize(["a red planet"])).shape == (1, 32, 16)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "compile"])
def test_less_memory_or_a_compiler_change_no_step(
    scenes: Any, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    real, compiled = torch.compile, list[Any]()

    def traced(function: Any) -> Any:  # as torch.compile does, without the minutes of code generation
        compiled.append(function)
        return real(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    plain, other = (ClipStage(scenes.config("clip", *more), runtime) for more in ([], [f"runtime.{option}=true"]))
    towers = (other.clip.network.transformer, other.clip.network.visual.transformer)
    runs = [0, 0]
    for number, tower in enumerate(towers):
        tower.resblocks[0].register_forward_pre_hook(lambda *_, n=number: runs.__setitem__(n, runs[n] + 1))
    for start in (0, 32):
        losses = []
        for stage in (plain, other):
            batch = stage.extend(stage.dataset.batch(range(start, start + 32)))
            losses.append(stage.micro_step(batch, True, start)["train/loss"])
            stage.finish_step(start + 32)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for name, weight in plain.towers.weights().items():
        torch.testing.assert_close(other.towers.weights()[name], weight, rtol=1e-5, atol=1e-6)
    assert len(compiled) == 1 if option == "compile" else runs == [4, 4]


def test_micro_batches_are_refused_since_they_would_hide_negatives(scenes: Any, runtime: Runtime) -> None:
    with pytest.raises(UserError, match=r"batch\.micro_batch_size: contrastive learning needs the whole global batch"):
        ClipStage(scenes.config("clip", "batch.micro_batch_size=8"), runtime)


def test_uneven_shares_are_refused_since_negatives_come_in_equal_ones(scenes: Any) -> None:
    with pytest.raises(
        UserError, match=r"^batch\.uneven=true: CLIP takes its negatives from equal shares; leave it out$"
    ):
        scenes.config("clip", "batch.uneven=true")


def test_rank_without_held_out_pairs_does_not_disturb_the_others(scenes: Any, runtime: Runtime, tmp_path: Any) -> None:
    class Gathering(Runtime):
        """A runtime whose main process has already sent its part."""

        def gather_objects(self, value: Any) -> list[Any]:
            return [everything, value]

    stage = ClipStage(scenes.config("clip"), runtime)
    journal = MetricLog(tmp_path, stage.cfg.wandb, "clip", {}, is_main=False)
    alone = stage.evaluate(0, journal)
    everything = stage.encoded([stage.heldout.at(i) for i in range(stage.heldout.samples)])
    facts = {name: getattr(runtime, name) for name in ("local_rank", "device", "precision", "accelerator")}
    stage.runtime = Gathering(rank=300, world=301, **facts)
    assert stage.evaluate(0, journal) == alone


def test_evaluation_leaves_the_network_in_training(scenes: Any, runtime: Runtime, tmp_path: Any) -> None:
    stage = ClipStage(scenes.config("clip"), runtime)
    stage.evaluate(0, MetricLog(tmp_path, stage.cfg.wandb, "clip", {}, is_main=False))
    assert stage.clip.training


def test_seed_decides_the_weights(scenes: Any, runtime: Runtime) -> None:
    first, same, other = (
        ClipStage(scenes.config("clip", f"seed={seed}"), runtime).towers.weights() for seed in (0, 0, 1)
    )
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_captions_that_are_cut_are_told_once(scenes: Any, runtime: Runtime, capfd: pytest.CaptureFixture[str]) -> None:
    stage = ClipStage(scenes.config("clip"), runtime)
    batch = stage.dataset.batch(range(4))
    stage.micro_step(stage.extend(batch), True, 0)
    assert "left out" not in capfd.readouterr().out
    for _ in range(2):
        stage.finish_step(4)
        longer = batch | {"caption": ["a red planet " * 12, *batch["caption"][1:]]}
        stage.micro_step(stage.extend(longer), True, 4)
    (told,) = [line for line in capfd.readouterr().out.splitlines() if "left out" in line]
    assert told.startswith("clip ") and "1 of 4 captions are longer than the 32 tokens" in told
