"""Whatever is typed: a configuration in which texts stand as typed, or one line; never another error."""

import random
import shlex

from hydra.core.override_parser.types import Quote, QuotedString

from conf.entry import compose
from conf.errors import UserError
from conf.overrides import argument, readable
from conf.schema import EditRun, SampleRun, UNetRun

PIECES = [
    *"a 0'\"\\$}{[](),:=/~#%&|@*?;<>!^`+-.\t\n\u2028é😀",
    *("planet", "日本", "-1", "1e3", "null", "true", "???", "\\\\", "\\'", "%s"),
    *("${", "${x}", "${run_dir}", "${oc.env:HOME}", "${{"),
]
OPTIONS = [
    *("prompts", "negative_prompt", "steps", "size", "inputs", "sampler", "run_dir"),
    *("unet", "runtime", "runtime.device", "experiment", "lora"),
]
NAMES = [
    *(*OPTIONS, "nothing", "runtime.nothing", "hydra.sweep.dir", "+x", "++steps"),
    *("~steps", "é", "steps.x", "prompts.0", "=", "@", "", "a b"),
]


def written(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.randint(0, 7)))


def in_a_line(text: str) -> str:
    """Paths with line breaks are refused."""
    return text.replace("\n", " ")


def literal(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()


def test_any_command_line_is_a_configuration_or_one_line() -> None:
    draw = random.Random(0)
    for _ in range(70):
        typed = [f"{draw.choice(NAMES)}={written(draw)}" for _ in range(draw.randint(1, 3))]
        typed += draw.sample([written(draw), "prompts=a", "run_dir=x"], k=draw.randint(1, 3))
        try:
            compose("sample", SampleRun, typed)
        except UserError as error:
            assert str(error).strip(), typed


def test_any_override_is_read_the_same_again() -> None:
    draw = random.Random(1)
    for _ in range(300):
        once = readable(f"{draw.choice(OPTIONS)}={in_a_line(written(draw))}", SampleRun)
        assert readable(once, SampleRun) == once


def test_any_text_is_taken_as_typed() -> None:
    draw = random.Random(2)
    for _ in range(15):
        # a list or a quoted text is meant by what begins with a bracket or a quote
        prompt, edit = (f"x{written(draw)}" for _ in range(2))
        cfg = compose("edit", EditRun, ["run=x", f"prompt={prompt}", f"edit={edit}", f"negative_prompt={edit}"])
        assert (cfg.prompt, cfg.edit, cfg.negative_prompt) == (prompt, edit, edit)
        assert compose("sample", SampleRun, ["run_dir=x", f"prompts={prompt}"]).prompts == [prompt]


def test_any_quoted_texts_are_taken_as_typed() -> None:
    draw = random.Random(3)
    for _ in range(5):
        texts = [written(draw) for _ in range(40)]
        cfg = compose("sample", SampleRun, ["run_dir=x", f"prompts=[{', '.join(map(literal, texts))}]"])
        assert cfg.prompts == texts


def test_folders_of_any_name_can_be_mixed() -> None:
    draw = random.Random(4)
    for _ in range(3):
        folders = dict.fromkeys((in_a_line(f"x{written(draw)}") for _ in range(30)), 2.0)
        mix = ", ".join(f"{literal(folder)}: 2" for folder in folders)
        assert compose("train_unet", UNetRun, ["run_dir=x", f"stream.mix={{{mix}}}"]).stream.mix == folders


def test_any_folder_reads_back_from_the_line_that_we_print() -> None:
    draw = random.Random(5)
    for _ in range(15):
        names = [in_a_line(f"x{written(draw)}") for _ in range(3)]
        typed = [
            argument(option, name) for option, name in zip(("unet", "clip", "negative_prompt"), names, strict=True)
        ]
        cfg = compose("sample", SampleRun, ["run_dir=x", "prompts=a", *shlex.split(" ".join(typed))])
        assert [cfg.unet, cfg.clip, cfg.negative_prompt] == names
