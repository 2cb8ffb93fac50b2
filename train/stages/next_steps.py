"""What to try with a finished run: commands with its own paths and prompts, as one would type them."""

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from conf.overrides import argument
from conf.schema import ConditionsConfig
from train.stages.tasks import ROOT, Task

NETWORKS = ("unet", "autoencoder", "clip")  # options that name what draws
COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "pink", "white")  # one becomes another in an edit
PROMPTED = {"caption", "framing"}  # conditions of a network that draws from a prompt alone


def print_next_steps(console: Console, tasks: Sequence[Task]) -> None:
    """Print the commands, each on a line of its own; nothing where no U-Net and images of it were asked for."""
    commands = next_steps(tasks)
    if commands:
        console.print("try next", style="bold")
    for command in commands:
        console.print(Text(f"  {command}"), soft_wrap=True)


def next_steps(tasks: Sequence[Task]) -> list[str]:
    """Commands for a shell in this folder: draw, edit, and the playground; those that the network can follow."""
    cfgs = {task.stage.name: task.cfg for task in tasks}
    if "sample" not in cfgs or not {"unet", "distill"} & cfgs.keys():
        return []
    sample = cfgs["sample"]
    # A student's conditions are its teacher's, which a file says that may not be there yet.
    text = takes_text(cfgs["unet"].conditions) if "unet" in cfgs else bool(sample.prompts)
    inside = [] if "unet" in cfgs else [f"sampler={sample.sampler.value}", f"steps={sample.steps}"]
    inside += [f"guidance_scale={sample.guidance_scale:g}"] if inside else []  # scales and steps that it has learnt
    networks = [
        argument(name, getattr(sample, name))
        for name in NETWORKS
        if getattr(sample, name) != f"{sample.run_dir}/{name}/export" and (name != "clip" or text)
    ]
    run = [argument("run_dir", sample.run_dir), *networks, *inside]
    drawn = argument("output_dir", f"{sample.run_dir}/drawn")  # the pipeline's own images stay as they are
    prompts = sorted(sample.prompts, key=len) if text else []
    if not prompts:
        where = sample.prompts_from or f"{sample.run_dir}/shards/heldout"
        source = [argument("prompts_from", where), "prompts_from_samples=16", "images_per_prompt=2"]
        return [line("train/sample.py", *run, drawn, *source)]
    found = [line("train/sample.py", *run, drawn, argument("prompts", prompts[0]), "images_per_prompt=4")]
    if change := edited(prompts):
        before, after = change
        found.append(line("train/edit.py", *run, argument("prompt", before), argument("edit", after)))
    return [*found, line("train/playground.py", *run, extra="" if has_gradio() else "playground")]


def takes_text(conditions: ConditionsConfig) -> bool:
    """Whether a prompt alone says what to draw."""
    names = {name for name, _ in conditions.chosen()}
    return "caption" in names and names <= PROMPTED


def edited(prompts: Sequence[str]) -> tuple[str, str] | None:
    """A prompt, and the same with another colour; without colours two that differ; None of a single one."""
    for prompt in prompts:
        words = prompt.split(" ")
        for place, word in enumerate(words):
            if word in COLORS:
                other = next(color for color in COLORS if color not in words)
                return prompt, " ".join([*words[:place], other, *words[place + 1 :]])
    return (prompts[0], prompts[1]) if len(prompts) > 1 else None


def line(script: str, *arguments: str, extra: str = "") -> str:
    """A command line for the shell, after the installation of what it lacks."""
    python = "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)
    path = os.path.relpath(ROOT / script)
    path = str(ROOT / script) if path.startswith("..") else path
    install = f"{python} -m pip install {shlex.quote(f'{os.path.relpath(ROOT)}[{extra}]')} && " if extra else ""
    return install + " ".join([python, shlex.quote(path), *arguments])


def has_gradio() -> bool:
    """Whether the playground can start."""
    return importlib.util.find_spec("gradio") is not None
