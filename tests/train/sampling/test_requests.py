"""What is drawn: prompts of every source in their order, and sources without one refused in a line."""

from pathlib import Path

import pytest

from conf.entry import compose
from conf.errors import UserError
from conf.schema import SampleRun
from data.shards.manifest import Manifest
from data.shards.shard import ShardWriter
from train.sampling.requests import Job, Prompt, jobs_of, read_prompts, with_text


def config(*overrides: str) -> SampleRun:
    return compose("sample", SampleRun, ["run_dir=run", *overrides])


def shards(folder: Path, *captions: str) -> Path:
    """Image shards of which no image can be decoded."""
    with ShardWriter(folder, 2) as writer:
        for number, caption in enumerate(captions):
            writer.add(f"{number:03d}", {"png": b"no image", "txt": caption.encode()})
    Manifest(kind="images", shards=writer.finished).save(folder)
    return folder


def test_prompts_stand_in_the_order_of_command_line_file_and_data_set(tmp_path: Path) -> None:
    """Of the data set the first samples, over the ends of shards and without those that have no caption."""
    (tmp_path / "prompts.txt").write_text("\ufeffa cactus\n\n  a palm  \n", encoding="utf-8")
    folder = shards(tmp_path / "shards", "a hill", " ", "a sun\n", "a moon", "a ring")
    given = ['prompts=["a (red:1.2) planet"]', f"prompts_file={tmp_path}/prompts.txt", f"prompts_from={folder}"]
    written = [Prompt(text) for text in ("a (red:1.2) planet", "a cactus", "a palm")]
    expected = [*written, Prompt("a hill", 0), Prompt("a sun", 2), Prompt("a moon", 3)]

    def read(*options: str) -> list[Prompt]:
        return with_text(read_prompts(config(*given, *options)), str(folder))

    assert read("prompts_from_samples=4") == expected
    assert read("prompts_from_samples=0") == [*expected, Prompt("a ring", 4)]
    assert read() == [*expected, Prompt("a ring", 4)]  # 64 were asked for, 5 are there


def test_source_without_a_prompt_is_refused_even_beside_another(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("ein grüner Hügel".encode("latin-1"))
    shards(tmp_path / "silent", "", " ")
    for option, message in (
        ("prompts_file={}/empty.txt", r"^prompts_file=.*/empty\.txt: holds no prompt; write one a line$"),
        ("prompts_file={}/nowhere.txt", r"^prompts_file=.*/nowhere\.txt: no such file$"),
        ("prompts_file={}/latin.txt", r"^prompts_file=.*/latin\.txt: is no UTF-8 text"),
        ("prompts_from={}/nowhere", r"^prompts_from: no shards at '.*/nowhere': name a folder of image shards"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(config('prompts=["a moon"]', option.format(tmp_path)))
    with pytest.raises(UserError, match=r"^prompts_from=.*/silent: its first 2 captions are empty"):
        with_text(read_prompts(config(f"prompts_from={tmp_path}/silent")), f"{tmp_path}/silent")


@pytest.mark.parametrize("empty", ["", "   ", "\u200b"])
def test_an_empty_prompt_that_was_written_is_not_left_out(empty: str) -> None:
    with pytest.raises(UserError, match=r"^prompts: one of them is empty; write what is to be seen"):
        with_text([Prompt("a moon"), Prompt(empty)], None)


def test_captions_that_are_empty_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert with_text([Prompt("a moon", 0), Prompt(" ", 1)], "shards") == [Prompt("a moon", 0)]
    assert "1 of 2 prompts are empty captions, of which nothing is drawn" in capsys.readouterr().out


def test_no_prompt_behind_the_equals_sign_is_none() -> None:
    with pytest.raises(UserError, match=r"^no prompts: set prompts="):
        config("prompts=")


@pytest.mark.parametrize("caption", ["a [red] planet", "a planet (red", "a cat AND a dog"])
def test_captions_are_not_read_as_weights_unseen(tmp_path: Path, caption: str) -> None:
    given = f"prompts_from={shards(tmp_path, 'a hill: at night', caption)}"
    with pytest.raises(UserError, match=r"^prompts_from: the caption 'a .*' would be read .* set prompt_syntax=false"):
        read_prompts(config(given))
    assert [text for text, *_ in read_prompts(config(given, "prompt_syntax=false"))] == ["a hill: at night", caption]


def test_prompt_that_comes_again_gets_other_images() -> None:
    expected = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3)]
    prompts = [Prompt("a"), Prompt("b", 7), Prompt("a")]
    assert jobs_of(prompts, 2) == [Job(text, number, 7 if text == "b" else None) for text, number in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r'^no prompts: set prompts=\["\.\.\."\], prompts_file=FILE, prompts_from=FOLDER or inputs=\[FILE\]$'),
        (["sampler=dpm++"], r"sampler=dpm\+\+.*: .*ddpm, ddim, pndm"),
        (["film_frames=1"], "^film_frames=1: must be 0"),
        (["prompts_from_samples=-1"], "^prompts_from_samples=-1: must be 0"),
        (["images_per_prompt=0"], "^images_per_prompt=0: must be positive"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        config(*(["prompts=[a]"] if options else []), *options)
    assert "\n" not in str(error.value)
