"""Words find their tokens by CLIP's tokenizer, and the tokens of two prompts each other."""

import pytest
import torch

from conf.errors import UserError
from conf.schema.networks import ClipConfig
from models.clip import Clip
from models.editing.alignment import Words, common_words, refinement, replacement, words_of

CLIP = Clip(
    ClipConfig(
        embed_dim=8,
        image_size=16,
        patch_size=8,
        vision_layers=1,
        vision_width=32,
        text_layers=1,
        text_width=8,
        text_heads=1,
        context_length=16,
    )
)
START, END, PADDING = 49406, 49407, 0


def read(text: str) -> Words:
    return words_of(CLIP, text)


def text_of(words: Words, tokens: list[int]) -> list[str]:
    """What the tokenizer itself says of tokens at some places."""
    return CLIP.tokenizer.decode([words.tokens[token] for token in tokens]).split()


@pytest.mark.parametrize("text", ["a bell-shaped monster, SAD (red) !", "x", "a a a", "", "3 eyes's"])
def test_every_word_has_its_own_tokens(text: str) -> None:
    words = read(text)
    assert [token for span in words.spans for token in span] == list(range(words.start, words.end))
    assert words.tokens[: words.start] == (START,) and words.tokens[words.end] == END
    assert set(words.tokens[words.end + 1 :]) == {PADDING}
    for word, span in zip(words.words, words.spans, strict=True):
        assert "".join(text_of(words, list(span))) == word.casefold()


def test_words_are_found_in_pieces_in_a_row_and_again() -> None:
    words = read("a bell-shaped monster with a hat on a hill")
    assert text_of(words, words.find("bell-shaped")) == ["bell", "-", "shaped"]
    assert len(words.find("Bell-Shaped")) > 1
    assert text_of(words, words.find("monster with")) == ["monster", "with"]
    assert text_of(words, words.find("a")) == ["a", "a", "a"]
    assert words.find("a#2") == [words.find("a")[1]]
    for missing in ("bell", "a#4", "a#0", "a#x", "", "#1", "monster a"):
        assert words.find_any(missing) == []
        with pytest.raises(UserError, match=r"is not in the prompt 'a bell-shaped .*: choose among a, bell-shaped,"):
            words.find(missing)


def test_words_that_fall_off_are_named() -> None:
    fitting = "one two three four five six seven eight nine ten eleven twelve one two"
    assert read(fitting).end == 15
    with pytest.raises(UserError, match=r"longer than the 16 tokens .*, which do not hold 'three, four'; shorten it$"):
        read(f"{fitting} three, four")
    with pytest.raises(UserError, match=r"do not hold 'bell-shaped four'"):  # its first piece would fit
        read(f"{fitting[: fitting.rindex(' ')]} bell-shaped four")


def pairs(matrix: torch.Tensor, source: Words, edited: Words) -> dict[str, dict[str, float]]:
    """For each token before the end of the edit, whose attention it takes."""
    found = {}
    for token in range(1, edited.end):
        sources = matrix[:, token].nonzero().flatten().tolist()
        names = [text_of(source, [place])[0] for place in sources]
        found[text_of(edited, [token])[0]] = dict(zip(names, matrix[sources, token].tolist(), strict=True))
    return found


def test_swapped_word_takes_the_attention_of_the_old_one() -> None:
    source, edited = read("sad red monster"), read("sad bell-shaped monster")
    matrix = replacement(source, edited)
    third = {"red": pytest.approx(1 / 3)}
    expected = {"sad": {"sad": 1.0}, "bell": third, "-": third, "shaped": third, "monster": {"monster": 1.0}}
    assert pairs(matrix, source, edited) == expected
    back = replacement(edited, source)
    assert pairs(back, edited, source)["red"] == {"bell": 1.0, "-": 1.0, "shaped": 1.0}
    for made in (matrix, back):
        torch.testing.assert_close(made.sum(1), torch.ones(16))  # attention is moved, none is lost
    assert matrix[source.end, edited.end] == 1 and matrix[15, 15] == 1
    assert torch.equal(replacement(source, source), torch.eye(16))
    with pytest.raises(UserError, match=r"^mode=replace: 'sad red monster' has 3 words and 'monster' 1; write as many"):
        replacement(source, read("monster"))


def test_added_words_have_no_counterpart() -> None:
    source, edited = read("a red monster on a hill"), read("a sad red monster with a hat on a hill")
    new = [words for words, found in pairs(refinement(source, edited), source, edited).items() if not found]
    assert new == ["sad", "with", "hat"]
    assert torch.equal(refinement(source, source), torch.eye(16))
    shorter = refinement(edited, source)
    assert all(len(found) == 1 for found in pairs(shorter, edited, source).values())
    assert (shorter.sum(0) <= 1).all() and shorter[edited.end, source.end] == 1


def test_longest_common_words_are_chosen() -> None:
    assert common_words(read("b a b c"), read("A c b C")) == [(1, 0), (2, 2), (3, 3)]
    assert common_words(read("a"), read("b")) == []
