"""What people type is what the commands get, and what we print to be typed reads back."""

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from conf import schema
from conf.entry import compose, to_object, to_plain
from conf.errors import UserError
from conf.overrides import PATH, argument, expanded, literally, option_of, readable, split
from conf.schema import BuildRun, EditRun, PipelineRun, SampleRun, UNetRun

AS_TYPED = (
    "a red planet",
    "a red planet, a palm",
    "100% wool, 50/50 = fine; a|b @ c * d ? # & ~ ^ < >",
    """it's a "dog" """,
    "'tis a red planet",
    '"red" planet',
    "ends with a backslash \\",
    "costs ${5}",
    "a ${run_dir} b",
    "$100 and ${{x}} and $HOME",
    "${as_typed:x}!",
    "???",
    "[red] planet and [blue]",
    "a {b: c}, (d:1.3)",
    "[not closed",
    "1e3",
    "null and void",
    "two\nlines",
    "a red\u2028planet",
    "日本語 😀 é",
    "   ",
)


@pytest.mark.parametrize("text", AS_TYPED)
def test_a_text_is_taken_as_typed(text: str) -> None:
    edit = compose("edit", EditRun, ["run=x", f"prompt={text}", f"edit={text}"])
    assert (edit.prompt, edit.edit) == (text, text)
    sample = compose("sample", SampleRun, ["run_dir=x", f"prompts={text}", f"negative_prompt={text}"])
    assert (sample.prompts, sample.negative_prompt) == ([text], text)
    assert to_plain(sample)["prompts"] == [text]


@pytest.mark.parametrize(
    ("typed", "prompts"),
    [
        ("hello", ["hello"]),
        ('"a red planet, a palm"', ["a red planet, a palm"]),
        ('["a red planet", "a palm"]', ["a red planet", "a palm"]),
        ("[a red planet, a palm]", ["a red planet", "a palm"]),
        ("['it\\'s a \"dog\"']", ['it\'s a "dog"']),
        ("[it's, that's]", ["it's", "that's"]),
        ('["costs ${5}", "???", "a ${run_dir} b"]', ["costs ${5}", "???", "a ${run_dir} b"]),
        ("[1,2.50,true,null]", ["1", "2.50", "true", "null"]),
        ("[a [red] planet, (b, c)]", ["a [red] planet", "(b, c)"]),
        ("[a\\, b]", ["a, b"]),
        ('["ends \\\\"]', ["ends \\"]),
        ('[""]', [""]),
    ],
)
def test_a_list_of_texts_is_one_text_or_those_in_brackets(typed: str, prompts: list[str]) -> None:
    assert compose("sample", SampleRun, ["run_dir=x", f"prompts={typed}"]).prompts == prompts


def test_an_override_that_was_read_once_reads_the_same_again() -> None:
    for text in AS_TYPED:
        once = readable(f"prompts={text}", SampleRun)
        assert readable(once, SampleRun) == once
    mixed = readable('stream.mix={"/a,b": 1}', UNetRun)
    assert readable(mixed, UNetRun) == mixed


def test_a_single_value_is_a_list_of_one() -> None:
    assert compose("pipeline", PipelineRun, ["stages=build"]).stages == ["build"]
    with pytest.raises(UserError, match=r"stages=build,clip: several values: write 'stages=\[build,clip\]' for a list"):
        compose("pipeline", PipelineRun, ["stages=build,clip"])
    with pytest.raises(UserError, match=r"size=\[64\]: must be two numbers"):
        compose("sample", SampleRun, ["run_dir=x", "prompts=a", "size=64"])


@pytest.mark.parametrize(
    ("typed", "mix"),
    [
        ("{/data/a b: 1}", {"/data/a b": 1}),
        ("{\"/data/a b\": 1, 'c, d': 2}", {"/data/a b": 1, "c, d": 2}),
        ("{/data/a\\:b: 1}", {"/data/a:b": 1}),
        ("{/data/a:b: 1}", {"/data/a:b": 1}),
        ("{s3://bucket/c: 2}", {"s3://bucket/c": 2}),
        ("{/data/a=b: 1}", {"/data/a=b": 1}),
        ("{/data/it's: 1}", {"/data/it's": 1}),
        ('{"a ${run_dir}": 1, "{x}": 2}', {"a ${run_dir}": 1, "{x}": 2}),
        ("{über: 1, z: 2, 'ä': 3}", {"über": 1, "z": 2, "ä": 3}),
        ('{~/a: 1, "~/b c": 2}', {"/home/me/a": 1, "/home/me/b c": 2}),
    ],
)
def test_folders_of_a_mix_have_any_name(typed: str, mix: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    cfg = compose("train_unet", UNetRun, ["run_dir=x", f"stream.mix={typed}"])
    assert list(cfg.stream.mix.items()) == list(mix.items())
    inside = compose("train_unet", UNetRun, ["run_dir=x", f"stream={{mix: {typed}}}"])
    assert inside.stream.mix == mix


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("{/a: 0}", r"^stream\.mix: the weight of '/a' is 0\.0: must be positive; leave out"),
        ("{/a: nan}", r"^stream\.mix: the weight of '/a' is nan: must be positive"),
        ("{/a: much}", r"^stream\.mix=\{/a: much\}: Value 'much' .* converted to Float; stream\.mix is \{KEY: VALUE\}"),
        ("{/a}", r"^cannot read 'stream\.mix=\{/a\}': stream\.mix is \{KEY: VALUE\}, and \{'KEY': VALUE\} where"),
        ("{/a,b: 1}", r"^cannot read 'stream\.mix=\{/a,b: 1\}': stream\.mix is \{KEY: VALUE\}, and \{'KEY': VALUE\}"),
        ("/a", r"^stream\.mix=/a: .*; stream\.mix is \{KEY: VALUE\}"),
    ],
)
def test_a_mix_that_is_none_says_how_one_is_written(typed: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose("train_unet", UNetRun, ["run_dir=x", f"stream.mix={typed}"])


@pytest.mark.parametrize("typed", ["~/a b", '"~/a b"', "'~/a b'"])
def test_the_home_folder_begins_any_path(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    cfg = compose("train_unet", UNetRun, [f"run_dir={typed}"])
    assert (cfg.run_dir, cfg.latents) == ("/home/me/a b", "/home/me/a b/latents")
    sources = f"sources=[{{source: folder, path: {typed}}},{{source: demo}}]"
    build = compose("build_shards", BuildRun, ["source=mix", "samples=1", sources])
    assert build.sources[0].path == "/home/me/a b"
    assert compose("sample", SampleRun, ["run_dir=x", "inputs=~/é (1).png"]).inputs == ["/home/me/é (1).png"]


def test_home_folders_can_be_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert readable('run_dir=~/a,"b, c","~/d"', UNetRun) == """run_dir='/home/me/a',"b, c",'/home/me/d'"""


def options(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for option in dataclasses.fields(kind):
        yield prefix + option.name, option
        for inner in (option.type, *getattr(option.type, "__args__", ())):
            if dataclasses.is_dataclass(inner):
                yield from options(inner, f"{prefix}{option.name}.")  # type: ignore[arg-type]


def test_every_option_that_names_a_file_says_so() -> None:
    """A new option of text is a path, or stands here."""
    other = {"name", "project", "entity", "group", "host", "image_column", "caption_column", "background", "keep_best"}
    texts = {"prompt", "edit", "weights", "during", "until", "blend", "negative_prompt", "prompts"}
    for run in (getattr(schema, name) for name in dir(schema) if name.endswith("Run")):
        for name, option in options(run):
            if option.type in (str, str | None, list[str]) and not name.startswith(("model.", "discriminator.")):
                last = name.rpartition(".")[2]
                names = option.type == list[str] and name == "captions"  # of captions, not a folder that has them
                known = names or last in other | texts | {"stages", "modules"}
                assert known != bool(option.metadata.get("path")), name
                assert (last in texts | {"inputs"}) == bool(option.metadata.get("text")), name
    mix = option_of(UNetRun, "stream.mix")
    assert mix is not None and mix.metadata == PATH


@pytest.mark.parametrize(
    "value", ["/a.b", "a b", "a,b", "a=b", "it's", 'a "b"', "ü", "a\\", "$x", "1e3", "null", "a ${b} c"]
)
def test_an_argument_that_is_printed_reads_back(value: str) -> None:
    for name, config, kind in (("run_dir", "sample", SampleRun), ("negative_prompt", "sample", SampleRun)):
        (word,) = shlex.split(argument(name, value))
        cfg = compose(config, kind, ["run_dir=x", "prompts=a", word])
        assert getattr(cfg, name) == value


def test_simple_arguments_are_printed_plainly() -> None:
    assert argument("run_dir", Path("runs/a")) == "run_dir=runs/a"
    assert argument("run_dir", "a,b") == "'run_dir=\"a,b\"'"


def test_a_user_without_a_home_is_left_as_typed() -> None:
    assert expanded("~nobody-of-this-name/x") == "~nobody-of-this-name/x"
    assert expanded("a~b") == "a~b"


def test_separators_in_quotes_and_brackets_separate_nothing() -> None:
    assert split("a,[b,c],'d,e',{f: g,h: i}", ",") == ["a", "[b,c]", "'d,e'", "{f: g,h: i}"]
    assert split("it's, that's", ",") == ["it's", " that's"]
    assert split("a\\,b", ",") == ["a\\,b"]


def test_texts_read_back_from_a_record(tmp_path: Path) -> None:
    cfg = compose("train_unet", UNetRun, ["run_dir=x"])
    for text in AS_TYPED:
        cfg.sampling.negative_prompt = text
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(literally(to_plain(cfg)))))
        recorded = OmegaConf.merge(OmegaConf.structured(UNetRun), OmegaConf.load(tmp_path / "config.yaml"))
        assert isinstance(recorded, DictConfig) and to_object(recorded) == cfg


def test_yaml_may_name_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    composed = OmegaConf.merge(OmegaConf.structured(PipelineRun), {"run_dir": "~/runs", "name": "a"})
    assert to_object(composed).run_dir == "/home/me/runs"


@pytest.mark.parametrize("option", ["run_dir", "output_dir", "prompts_file"])
def test_the_path_of_an_unset_variable_is_refused(option: str) -> None:
    """It would be the working folder, and of what lies in it the root of the disk."""
    with pytest.raises(UserError, match=rf"^{option}=: is empty; name a file or folder"):
        compose("sample", SampleRun, ["run_dir=x", "prompts=a", f"{option}="])


def test_a_path_with_a_line_break_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^run_dir: 'runs/a\\nb' holds a line break; name a file or folder") as error:
        compose("sample", SampleRun, ["run_dir=runs/a\nb"])
    assert "\n" not in str(error.value)
