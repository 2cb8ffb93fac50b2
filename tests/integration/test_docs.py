"""Each command line in the README and in docs/ composes, and each file that they name is there."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from conf import experiments
from conf import schema as schemas
from conf.entry import compose
from conf.errors import UserError
from conf.overrides import readable
from conf.schema import PipelineRun, SampleRun, UNetRun
from train.stages.tasks import plan_tasks, separate

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^\s*(?:\$ |NPROC=\d+ )?(?:python|torchrun \S+|sbatch|srun) *((?:train|data)/\w+\.py.*)$")
VARIABLES = {  # as docs/training.md sets them in its text
    "$BASE": "experiment=demo autoencoder=$RUN/autoencoder/export clip=$RUN/clip/export",
    "$RUN": "runs/demo",
}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command line, in blocks and within the text; those with an ellipsis are none."""
    text = page.read_text()
    blocks = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    for line in [*blocks, *(" ".join(part.split()) for part in inline)]:
        if (match := COMMAND.match(line)) and "…" not in line and "..." not in line:
            command = match.group(1)
            for name, value in VARIABLES.items():
                command = command.replace(name, value)
            yield shlex.split(command, comments=True)


def first_members(arguments: list[str], schema: type) -> list[str]:
    """The options of a sweep's first member, without what only a search decides and without the search's own."""
    typed = [argument for argument in arguments if not argument.startswith("hydra")]  # its plugins may be missing
    parsed = OverridesParser.create().parse_overrides([readable(argument, schema) for argument in typed])
    swept = [o for o in parsed if o.is_choice_sweep()]
    fixed = [argument for argument, o in zip(typed, parsed, strict=True) if not o.is_sweep_override()]
    return [*fixed, *(f"{o.get_key_element()}={next(o.sweep_string_iterator())}" for o in swept)]


def composed(script: str, arguments: list[str]) -> object:
    """The configuration of a command line, of all stages where it is the pipeline's."""
    flags = {argument for argument in arguments if argument.startswith("-")}
    typed = [argument for argument in arguments if argument not in flags]
    if script == "train/pipeline.py":
        own, overrides = separate(typed)
        return plan_tasks(compose("pipeline", PipelineRun, own), overrides)
    found = re.search(r'@entry\("(\w+)", (\w+)', (ROOT / script).read_text())
    assert found is not None
    schema = vars(schemas)[found[2]]
    return compose(found[1], schema, first_members(typed, schema) if "-m" in flags else typed)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_compose(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    broken = []
    for script, *arguments in commands(page):
        if not {"--help", "--cfg"} & set(arguments):  # those print, and compose nothing that runs
            try:
                assert composed(script, arguments)
            except UserError as error:
                broken.append(f"{script} {shlex.join(arguments)}: {error}")
    assert broken == []


def test_experiment_of_the_docs_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "experiments.md").read_text(), re.DOTALL)
    shutil.copytree(experiments.FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(experiments, "FOLDER", tmp_path)
    chosen = ["experiment=mine"]
    unet = compose("train_unet", UNetRun, chosen)
    assert (unet.sampling.steps, unet.model.sample_size, unet.model.norm_num_groups) == (30, 32, 8)
    assert compose("sample", SampleRun, chosen).steps == 30
    tasks = plan_tasks(compose("pipeline", PipelineRun, chosen), separate(chosen)[1])
    assert [task.stage.name for task in tasks] == PipelineRun(run_dir="unused", name="unused").stages


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_files_and_pages_are_there(page: Path) -> None:
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)]
    homes = "conf|data|models|train|tests|bench|slurm|docs"
    named = [ROOT / name for name in re.findall(rf"`((?:{homes})/[\w/-]+(?:\.(?:py|md|yaml|sh)|/))`", text)]
    lost = [str(path) for path in (*links, *named) if not path.exists()]
    assert [path for path in lost if "NAME" not in path] == []  # a name that the reader chooses
