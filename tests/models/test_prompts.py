"""Weights of words: what is read, which tokens get them, and what they do to the text states."""

import json
import re

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from conf.errors import UserError
from conf.schema.networks import ClipConfig
from models.clip import Clip
from models.prompts import ParsedPrompt, WeightedText, parse, plain, reweighted, text_states, token_weights
from models.text import HuggingFaceText, TextTower

CPU = torch.device("cpu")


def pieces(text: str) -> list[tuple[str, float]]:
    (prompt,) = parse(text)
    return [(piece.text, round(piece.weight, 4)) for piece in prompt.pieces]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red planet", [("a red planet", 1.0)]),
        ("", [("", 1.0)]),
        ("a (red:1.3) planet", [("a ", 1.0), ("red", 1.3), (" planet", 1.0)]),
        ("a (red) planet", [("a ", 1.0), ("red", 1.1), (" planet", 1.0)]),
        ("a ((red))", [("a ", 1.0), ("red", 1.21)]),
        ("a [red]", [("a ", 1.0), ("red", 0.9091)]),
        ("(a (red:1.5) planet:2)", [("a ", 2.0), ("red", 3.0), (" planet", 2.0)]),
        ("([red])", [("red", 1.0)]),
        (r"a \(red\) planet", [("a (red) planet", 1.0)]),
        (r"(a \(red\):0.5)", [("a (red)", 0.5)]),
        (r"(at 3\:4)", [("at 3:4", 1.1)]),
        ("at 3:4, (a: b:1.2)", [("at 3:4, ", 1.0), ("a: b", 1.2)]),
        (r"a \ b", [(r"a \ b", 1.0)]),
        ("(red: .5 )", [("red", 0.5)]),
        ("((a:2) b)", [("a", 2.2), (" b", 1.1)]),
        ("(a:1)(b:1)", [("ab", 1.0)]),
    ],
)
def test_weights_are_read_as_users_write_them(text: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(text) == expected


NO_WEIGHT = r"has no weight; write (words:1.3), (words:1.3@0.2-0.5) for some of the steps, or \: for a plain colon"
NUMBERS = ("1.3.1", "", "nan", "@0.5", "1@", "1@0", "1@0.5-0.2", "1@-0.5", "1@0.2-1.5", "1@0.2-0.3-0.4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((f"a (red:{number})", f"prompt 'a (red:{number})': ':{number})' {NO_WEIGHT}") for number in NUMBERS),
        ("a (red", r"prompt 'a (red': '(' is never closed; write \( for a plain bracket"),
        ("a red)", r"prompt 'a red)': ')' closes nothing; write \) for a plain bracket"),
        ("a (red]", r"prompt 'a (red]': ']' closes nothing; write \] for a plain bracket"),
    ],
)
def test_malformed_weight_is_one_line_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        parse(text)


def test_prompts_are_joined_by_and_with_weights() -> None:
    prompts = parse("a (red:2) cat AND a dog :0.7 AND SAND: -1")
    assert [(prompt.text, prompt.weight) for prompt in prompts] == [("a red cat", 1.0), ("a dog", 0.7), ("SAND", -1.0)]
    assert prompts[0].pieces[1] == WeightedText("red", 2.0)
    assert plain("a (cat) AND (a dog") == [ParsedPrompt((WeightedText("a (cat) AND (a dog"),))]


def test_weights_name_the_steps_in_which_they_hold() -> None:
    (prompt,) = parse("a (red:1.3@0.5) (big (cat:2@0.2-0.5):3@ .1 - 1) (dog:2)")
    weighted = [piece for piece in prompt.pieces if piece.weight != 1]
    assert weighted == [
        WeightedText("red", 1.3, (0, 0.5)),
        WeightedText("big ", 3.0, (0.1, 1)),
        WeightedText("cat", 6.0, (0.2, 0.5)),
        WeightedText("dog", 2.0),
    ]
    assert [WeightedText("a", 0.0, window).masked for window in (None, (0.0, 1.0), (0.0, 0.5))] == [True, True, False]


def test_a_span_of_a_prompt_is_weighted_on_top_of_its_weights() -> None:
    (prompt,) = parse("a (red planet:2@0.5) here")
    assert reweighted(prompt, (2, 5), 3.0).pieces[1:3] == (
        WeightedText("red", 6.0, (0, 0.5)),
        WeightedText(" planet", 2.0, (0, 0.5)),
    )
    assert reweighted(prompt, (0, 1), 3.0, (0.1, 0.2)).pieces[0] == WeightedText("a", 3.0, (0.1, 0.2))
    assert reweighted(prompt, (2, 5), 1.0).text == prompt.text


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "vision_width": 32, "vision_layers": 1, "image_size": 16, "patch_size": 8}
    made = Clip(ClipConfig(**sizes, text_width=16, text_heads=2, text_layers=1, context_length=12)).eval()
    with torch.no_grad():
        made.network.ln_final.bias.add_(0.1)  # else the mean of the states is a rounding error
    return made


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceText:
    """A text encoder of Hugging Face whose tokens are letters."""
    folder = tmp_path_factory.mktemp("letters")
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "x</w>"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=6)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return HuggingFaceText(CLIPTextModel(CLIPTextConfig(vocab_size=5, max_position_embeddings=6, **sizes)), tokenizer)


def weights_of(tower: TextTower, text: str) -> list[float]:
    (prompt,) = parse(text)
    return [round(weight, 4) for weight in token_weights(tower, prompt).tolist()]


def test_weights_go_to_the_tokens_of_their_words(clip: Clip) -> None:
    assert weights_of(clip, "a (red planet:1.5), sad") == [1, 1, 1.5, 1.5, 1, 1] + [1] * 6
    assert weights_of(clip, "(A  (RED:3) planet:2)") == [1, 2, 6, 2] + [1] * 8  # end and padding keep theirs
    assert weights_of(clip, "[a]") == [1, 0.9091] + [1] * 10
    word = "anthropomorphization"  # several tokens
    length = int((clip.tokenize([word])[0] > 0).sum()) - 2
    assert length > 1
    assert weights_of(clip, f"({word}:2) a") == ([1] + [2] * length + [1] * 12)[:12]


def test_text_that_is_cut_off_has_weights_up_to_its_end_token(clip: Clip) -> None:
    assert weights_of(clip, "a (red red red red red red red red red red red red red:2)") == [1, 1] + [2] * 9 + [1]


def test_weights_reach_the_tokens_of_hugging_face(letters: HuggingFaceText) -> None:
    assert weights_of(letters, "a (b:2) a") == [1, 1, 2, 1, 1, 1]


def test_states_are_scaled_by_word_and_keep_their_mean(clip: Clip) -> None:
    (prompt,), (other,) = parse("a (red:1.5) planet"), parse("a red planet")
    with torch.no_grad():
        weighted, unweighted = text_states(clip, [prompt, other], CPU)
        assert torch.equal(unweighted, clip.text_states(clip.tokenize(["a red planet"]))[0])
    factor = torch.ones(12)
    factor[2] = 1.5
    scaled = unweighted * factor.unsqueeze(-1)
    torch.testing.assert_close(weighted, scaled * unweighted.mean() / scaled.mean())
    assert weighted.mean() == pytest.approx(float(unweighted.mean()), rel=1e-4)
