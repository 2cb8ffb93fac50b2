"""diffusers' public example that trains text to image, run as it is beside our command: whole processes, same sizes.

The example is a script of diffusers' repository, examples/text_to_image/train_text_to_image.py, and no part of its
package: $DIFFUSERS_EXAMPLE names it, and it needs the package `datasets`. It encodes its images in every step.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from _compare import Comparison
from PIL import Image

from conf.entry import compose
from conf.schema import Prediction, ProcessConfig, UNetRun
from data.shards.shard import ShardReader
from models.autoencoder import Autoencoder
from models.clip import Clip
from models.diffusion.process import Process
from models.unet import UNet
from train.exporting.export import write_pipeline

ROOT = Path(__file__).parents[1]
SHORT, LONG, BATCH = 10, 40, 32  # steps of two runs, whose difference has no start in it
BAR = 0.8  # for seconds and for bytes, ours / the example's


class Command:
    """A training that takes a number of steps as its last argument's value."""

    def __init__(self, *command: str, samples_per_step: int = 1) -> None:
        self.command, self.samples_per_step, self.bytes = command, samples_per_step, 0.0

    def run(self, steps: int) -> float:
        """Seconds of the whole process; remembers the most memory that one took."""
        with tempfile.TemporaryDirectory() as output_dir, tempfile.TemporaryFile("w+") as log:
            last = f"{self.command[-1]}{steps * self.samples_per_step}"
            command = [part.replace("OUTPUT", output_dir) for part in (*self.command[:-1], last)]
            inherited = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}  # DeepSpeed's mark
            environment = inherited | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
            started = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                raise SystemExit(f"{command[1]} failed:\n{log.read()[-3000:]}")
            self.bytes = max(self.bytes, 1024.0 * usage.ru_maxrss)
            return time.perf_counter() - started

    def seconds_per_step(self) -> float:
        return (self.run(LONG) - self.run(SHORT)) / (LONG - SHORT)


def prepare(folder: Path) -> None:
    """The networks as a pipeline, and the images as files, both as the example reads them."""
    torch.manual_seed(0)
    unet = UNet(compose("train_unet", UNetRun, ["experiment=demo", "run_dir=unused"]).model)
    parts = Autoencoder.from_pretrained(folder / "autoencoder/export"), Clip.from_pretrained(folder / "clip/export")
    write_pipeline(
        folder / "pipeline", unet, *parts, Process(ProcessConfig(prediction=Prediction.eps)).scheduler_config()
    )
    (folder / "images").mkdir()
    rows = list[str]()
    for shard in sorted((folder / "shards/train").glob("*.tar")):
        reader = ShardReader(shard)
        for index in range(len(reader)):
            record = reader[index]
            name = f"{len(rows):06d}.png"
            Image.open(io.BytesIO(bytes(record["png"]))).save(folder / "images" / name)
            rows.append(json.dumps({"file_name": name, "text": str(record["txt"], "utf-8")}))
    (folder / "images/metadata.jsonl").write_text("\n".join(rows) + "\n")


def comparisons(folder: Path, script: str) -> Iterator[Comparison]:
    """Seconds per step and peak memory of both trainings, on the same images and sizes of networks."""
    prepare(folder)
    never = 10**9
    ours = Command(
        *(sys.executable, "train/train_unet.py", "experiment=demo", f"run_dir={folder}", "output_dir=OUTPUT/unet"),
        *("process.prediction=eps", "process.timestep_sampling=uniform", "sample_prompts=0"),
        *("runtime=cpu", "runtime.backend=deepspeed", "optim.name=adamw"),
        *(f"loop.log_every={never}", f"loop.evaluate_every={never}", f"loop.checkpoint_every={never}", "loop.samples="),
        samples_per_step=BATCH,
    )
    peer = Command(
        *(sys.executable, script, f"--pretrained_model_name_or_path={folder}/pipeline"),
        *(f"--train_data_dir={folder}/images", "--resolution=64", f"--train_batch_size={BATCH}", "--use_ema"),
        *("--mixed_precision=no", "--seed=0", f"--checkpointing_steps={never}", "--output_dir=OUTPUT"),
        *(f"--cache_dir={folder}/cache", "--max_train_steps="),
    )
    name, seconds = "step_against_the_example_of_diffusers", (ours.seconds_per_step, peer.seconds_per_step)
    for unit, (mine, theirs), pairs in (("s", seconds, 2), ("bytes", (lambda: ours.bytes, lambda: peer.bytes), 1)):
        yield Comparison(name=name, ours=mine, peer=theirs, unit=unit, bar=BAR, lower_is_better=True, pairs=pairs)
