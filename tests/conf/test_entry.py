"""A wrong command line ends in one line that a person can act on, before anything heavy is imported."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conf import ending, entry
from conf.entry import compose
from conf.errors import UserError
from conf.schema import AutoencoderRun, BuildRun, EvaluateRun, SampleRun, UNetRun

ROOT = Path(__file__).parents[2]

# Runs a script as its own command would and tells what heavy it had imported when it ended.
PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *sorted({"torch", "numpy", "accelerate", "deepspeed", "wandb"} & set(sys.modules)))
"""


def command(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE, str(ROOT / script), *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "LATENTLINE_TRACEBACK"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [
        ("train/train_unet.py", "optim.lrr=1e-4", "no option 'optim.lrr': did you mean optim.lr"),
        ("train/train_autoencoder.py", "optim.lr=fast", r".*optim\.lr=fast.*could not be converted to Float"),
        ("train/train_autoencoder.py", "images.resolution=31", r"images\.resolution=31: must be a multiple of 8"),
        (
            "data/precompute_latents.py",
            "experiment=smokee",
            "no experiment 'smokee': did you mean smoke\\? choose one of none, ",
        ),
        ("train/train_clip.py", "+foo=1", "no option 'foo'"),
    ],
    ids=["misspelt", "wrong type", "impossible combination", "unknown experiment", "added option"],
)
def test_a_wrong_option_is_one_line_and_exit_code_2_before_torch(
    tmp_path: Path, script: str, argument: str, message: str
) -> None:
    ended = command(script, f"run_dir={tmp_path}/run", argument)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert re.match(f"error: {message}", ended.stderr), ended.stderr
    assert ended.stdout.strip() == "imported:"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lr=1e-4", r"no option 'lr': did you mean optim\.lr\?"),
        ("optim.lr=nan", r"^optim\.lr=nan: must be"),
        ("optim.weight_decay=inf", r"^optim\.weight_decay=inf: must be a finite number"),
        ("ema.half_life_samples=-inf", r"^ema\.half_life_samples=-inf: must be"),
        ("ema.posthoc=[0.1,nan]", r"^ema\.posthoc"),
        ("process.min_snr_gamma=NaN", r"^process\.min_snr_gamma=nan: must be"),
        ("stream.mix={other: inf}", r"^stream\.mix\.other=inf: must be a finite number"),
        ("loop.sampels=10", r"no option 'loop.sampels': did you mean loop\.samples"),
        ("zzzzzz=1", "no option 'zzzzzz': --help lists the options"),
        ("+optim.foo=1", "no option 'optim.foo'"),
        ("++optim.lrr=1", r"no option 'optim.lrr': did you mean optim\.lr"),
        ("~optim.lr", "optim.lr"),
        ("optim.lr", r"cannot read 'optim\.lr': write optim\.lr=VALUE"),
        ("output_dir=a=b", r"cannot read 'output_dir=a=b': .*'output_dir=\"VALUE\"' where it has special characters"),
        ("conditions.caption.drop=[1", r"cannot read 'conditions=\{caption: \{drop: \[1\}\}'"),
        ("loop.samples=many", r"loop\.samples=many"),
        ("batch.global_batch_size=0.5", r"batch\.global_batch_size=0\.5"),
        ("process.prediction=score", r"process\.prediction=score"),
        ("sampling.sampler=plms", r"sampling\.sampler=plms.*ddpm, ddim, pndm"),
        ("model.block_out_channels=wide", r"model\.block_out_channels=wide"),
        ("runtime=tpu", "choose one of auto, cpu, fsdp, gpu, gpu8, multi_node"),
        ("runtime.zero_stage=4", r"runtime\.zero_stage=4: must be"),
        ("runtime.backend=horovod", r"runtime\.backend=horovod"),
        (
            "runtime={zero_stage: 3, compile: true}",
            r"runtime\.compile=true: ZeRO stage 3 breaks .*; set runtime\.backend=fsdp",
        ),
        ("runtime={zero_stage: 2, shard_processes: 4}", r"runtime\.shard_processes=4: nothing cuts .*; leave it out"),
        ("runtime={zero_stage: 0, offload: optimizer}", r"runtime\.offload=optimizer: .*; set runtime\.zero_stage=1"),
        ("runtime={zero_stage: 2, offload: parameters}", r"runtime\.offload=parameters: .*; set runtime\.zero_stage=3"),
        (
            "runtime={backend: ddp, offload: optimizer}",
            r"runtime\.offload=optimizer: plain DDP .*; set runtime\.backend=",
        ),
        ("runtime={backend: fsdp, offload: optimizer}", r"runtime\.offload=optimizer: FSDP2 .*; set runtime\.offload="),
        ("conditions.caption.drop=1.0", r"conditions\.caption\.drop=1\.0: must be in \[0, 1\)"),
        ("process={prediction: flow, min_snr_gamma: 5}", "process.min_snr_gamma: not defined for"),
        ("process={prediction: flow, p2_gamma: 1}", "process.p2_gamma: not defined for process.prediction=flow"),
        ("process={min_snr_gamma: 5, p2_gamma: 1}", "process.min_snr_gamma and process.p2_gamma: two weights"),
        ("process={min_snr_gamma: 5, loss: l1}", "process.min_snr_gamma: weighs squared errors; set process.loss=l2"),
        ("process.zero_terminal_snr=true", "process.zero_terminal_snr: not with process.prediction=eps"),
        ("process.offset_noise=-0.1", r"process\.offset_noise=-0\.1: must be 0 \(off\) or positive"),
        ("process.shift=0", r"process\.shift=0\.0: must be positive"),
        ("sampling={eta: 0.5, sampler: heun}", r"eta=0\.5: sampler=heun has none; choose ddim, dpmpp_2m_sde"),
        ("sampling={eta: 1.5, sampler: ddim}", r"eta=1\.5: must be in \[0, 1\]"),
        ("sampling.guidance_interval=[5,1]", r"guidance_interval=\[5\.0, 1\.0\]: must be two noise levels"),
        ("sampling.guidance_rescale=2", r"guidance_rescale=2\.0: must be in \[0, 1\]"),
        ("sampling={negative_prompt: blur, guidance_scale: 1}", "negative_prompt: without effect at guidance_scale=1"),
        ("sampling.steps=0", "steps=0: must be positive"),
        ("model.head_channels=0", r"model\.head_channels=0: must be at least 1"),
        ("model.num_class_embeds=10", r"model\.num_class_embeds=10: .*this training tells it"),
        ("model.attention_head_dim=[1,2,3]", r"model\.attention_head_dim: needs 1 or 4"),
        ("model.norm_num_groups=7", r"model\.block_out_channels: 320 is not divisible by norm_num_groups=7"),
        ("model.down_block_types=[DownBlock2D]", r"model\.down_block_types: needs one entry for each of the 4"),
    ],
)
def test_the_line_names_the_option(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        compose("train_unet", UNetRun, [argument])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "schema", "argument", "message"),
    [
        ("build_shards", BuildRun, "source=folder", "source=folder needs path="),
        ("build_shards", BuildRun, "source=demo", "source=demo needs samples="),
        ("sample", SampleRun, "steps=5", "no prompts: set prompts="),
        ("sample", SampleRun, "steps=0", "steps=0: must be positive"),
        ("evaluate", EvaluateRun, "eta=1", "eta=1.0: sampler=dpmpp_2m has none"),
    ],
)
def test_an_option_that_another_one_needs_is_asked_for(config: str, schema: type, argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose(config, schema, [argument])


def test_what_the_command_line_says_beats_the_experiment() -> None:
    cfg = compose("train_autoencoder", AutoencoderRun, ["experiment=smoke", "loop.samples=7", "run_dir=elsewhere"])
    assert (cfg.loop.samples, cfg.images.resolution) == (7, 32)
    assert (cfg.output_dir, cfg.shards) == ("elsewhere/autoencoder", "elsewhere/shards")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "largest file"),
        (errno.EACCES, "no permission"),
        (errno.EPERM, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "a file stands where a folder is needed"),
        (errno.EIO, "check the disk"),
    ],
)
def test_an_error_of_the_system_names_the_file_and_a_remedy(
    number: int, remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LATENTLINE_TRACEBACK", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        ending.fail(OSError(number, os.strerror(number), "/data/run"))
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(told.splitlines()) == 1
    assert told.startswith(f"error: {os.strerror(number)} '/data/run': ") and remedy in told


def test_an_error_of_several_lines_is_told_in_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LATENTLINE_TRACEBACK", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        ending.fail(UserError("the first line\nand a second"))
    assert capsys.readouterr().err == "error: the first line\n"


def test_a_developer_gets_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTLINE_TRACEBACK", "1")
    with pytest.raises(UserError, match="why"):
        ending.fail(UserError("why"))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("optim.lr=1e-4,seed=1", "optim.lr=1e-4,seed=1"),
        ("latents=runs/a/latents", "latents=runs_a_latents"),
    ],
)
def test_a_member_of_a_sweep_is_one_folder(overrides: str, name: str) -> None:
    assert entry.folder_name(overrides) == name


def test_a_long_name_stays_unique_and_within_the_limit() -> None:
    names = {entry.folder_name(f"latents=/{'ä' * 200}/{member}") for member in range(3)}
    assert len(names) == 3 and all(len(name.encode()) <= entry.LONGEST_NAME for name in names)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "wandb.mode=ofline",
            r"wandb\.mode=ofline: choose one of offline, online, auto, disabled; did you mean offline",
        ),
        ("sampling.sampler=EULER", r"sampling\.sampler=EULER: choose one of euler, .*; did you mean euler\?"),
        ("sampling={sampler: dpm++_2m}", r"sampling=\{sampler: dpm\+\+_2m\}: choose one of dpmpp_2m, "),
        ("model=sdx", r"Could not find 'model/sdx': choose one of kl_f16, .*; did you mean sdxl\?"),
        ("experiment=smokee", r"did you mean smoke\? choose one of none, class, class_demo, "),
        ("optim.lr=[1]", r"optim\.lr=\[1\]: .*; optim\.lr is a number"),
        ("seed=1.5", r"seed=1\.5: .*; seed is a whole number"),
        ("runtime.compile=yes please", r"runtime\.compile=yes please: .*; runtime\.compile is true or false"),
        ("sampling.size={a: 1}", r"sampling\.size=\{a: 1\}: .*; sampling\.size is a list: \[VALUE,VALUE\]"),
        ("run_dir=a,b", r"run_dir=a,b: several values: write 'run_dir=\"a,b\"' for one, or start a sweep"),
        ("sampling.size=64,64", r"sampling\.size=64,64: several values: write 'sampling\.size=\[64,64\]' for a list"),
        ("optim.lr=1,2", r"optim\.lr=1,2: several values: give one, or start a sweep over them with -m"),
        ("run_dir=${nothing}", r"run_dir: Interpolation key 'nothing' not found"),
        ("output_dir=a=b", r"where it has special characters: 'output_dir=\"a=b\"'"),
        ("init_from=über", r"where it has special characters: 'init_from=\"über\"'"),
        ("sampling.sampler={a: 1}", r"sampling\.sampler=\{a: 1\}: .*ddpm, ddim"),
        ("runtime.device=[cpu]", r"runtime\.device=\[cpu\]: .*auto, cpu, cuda"),
        ("runtime.device=null", r"runtime\.device=null: .*; runtime\.device is one of auto, cpu, cuda"),
        ("experiment=5", "."),
    ],
)
def test_the_line_names_the_nearest_choice_or_the_form(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^.*{message}"):
        compose("train_unet", UNetRun, ["run_dir=x", argument])


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(UserError, match=r"^'prompt=caf\\udce9': is no UTF-8 text"):
        entry.require_text(["run=x", "prompt=caf\udce9"])
    entry.require_text(["prompt=café 😀"])


def test_a_dictionary_is_taken_as_it_is_written() -> None:
    cfg = compose("train_unet", UNetRun, ["run_dir=x", r"stream.mix={/data/b: 0.5, s3\://c/d: 2}"])
    assert cfg.stream.mix == {"/data/b": 0.5, "s3://c/d": 2.0}
    with pytest.raises(UserError, match=r"no option 'stream\.mixed': did you mean stream\.mix"):
        compose("train_unet", UNetRun, ["run_dir=x", "stream.mixed={a: 1}"])
