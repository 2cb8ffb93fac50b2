"""Text towers of Hugging Face against transformers itself, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from conf.errors import UserError
from conf.schema.networks import ClipConfig
from models.clip import Clip
from models.text import Cuts, HuggingFaceText, cut_off, load_text_tower

TEXTS = ["a b", "b a a"]


def write_clip(folder: Path) -> CLIPTextModel:
    """A tiny CLIPTextModel with a tokenizer of letters."""
    torch.manual_seed(0)
    letters = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=4,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=6,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    model.save_pretrained(folder)
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=6).save_pretrained(folder)
    return model


def test_clip_of_hugging_face_is_a_text_tower(tmp_path: Path) -> None:
    model = write_clip(tmp_path)
    tower = load_text_tower(tmp_path)
    assert isinstance(tower, HuggingFaceText)
    assert (tower.text_width, tower.context_length) == (16, 6)
    tokens = tower.tokenize(TEXTS)
    assert tokens.shape == (2, 6) and tokens.dtype == torch.int64
    with torch.no_grad():
        expected = model(input_ids=tokens).last_hidden_state
        assert torch.equal(tower.eval().text_states(tokens), expected)


def test_padding_is_hidden_from_t5(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=4, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).eval()
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=5)
    fast.save_pretrained(tmp_path)
    tower = load_text_tower(tmp_path).eval()
    tokens = tower.tokenize(TEXTS)
    assert tokens.tolist() == [[1, 2, 0, 0, 0], [2, 1, 1, 0, 0]]
    with torch.no_grad():
        alone = model(input_ids=tokens[:1, :2]).last_hidden_state
        torch.testing.assert_close(tower.text_states(tokens)[:1, :2], alone)


def test_folder_of_our_own_clip_is_told_apart(tmp_path: Path) -> None:
    sizes = ClipConfig(
        embed_dim=8, image_size=32, vision_layers=1, vision_width=32, text_layers=1, text_width=16, text_heads=2
    )
    Clip(sizes).save_pretrained(tmp_path)
    assert isinstance(load_text_tower(tmp_path), Clip)


def test_padding_that_the_encoder_does_not_know_is_one_line(tmp_path: Path) -> None:
    write_clip(tmp_path)
    CLIPTokenizer.from_pretrained(tmp_path, pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pads with token 4, of which .* knows 4; export it again"):
        load_text_tower(tmp_path)


def test_incomplete_folders_are_one_line(tmp_path: Path) -> None:
    write_clip(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config) | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"does not fit the network \(missing: .*layers\.2"):
        load_text_tower(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing") as error:
        load_text_tower(tmp_path)
    assert "\n" not in str(error.value)


SMALL = Clip(
    ClipConfig(
        embed_dim=8,
        image_size=16,
        patch_size=8,
        vision_layers=1,
        vision_width=32,
        text_layers=1,
        text_width=8,
        text_heads=1,
        context_length=8,
    )
)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("", ""),
        (" ", ""),
        ("one two", ""),
        ("one two three four five six", ""),  # fills it
        ("one two three four five six seven", "seven"),
        ("one two three four five bell-shaped six", "bell-shaped six"),  # of which "bell" would fit
        ("one, two! three, four", "four"),
        ("one two three four five six .", "."),
        ("one two three four five six seven " * 2000, None),
    ],
)
def test_words_behind_the_context_are_told(text: str, lost: str | None) -> None:
    found = cut_off(SMALL, text)
    assert found == (lost if lost is not None else text[text.index("seven") :].rstrip())
    tokens = SMALL.tokenize([text, text.removesuffix(found)])
    if found and "-" not in found:
        assert torch.equal(*tokens)


def test_a_text_without_spaces_is_cut_between_characters() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(40))
    lost = cut_off(SMALL, text)
    assert 30 < len(lost) < 40 and text.endswith(lost)
    assert not cut_off(SMALL, text[0])


def test_cuts_of_many_texts_are_counted_with_one_example() -> None:
    texts = ["a", "one two three four five six", "one two three four five six seven", "", "a b c d e f g h"]
    cuts = Cuts.of(SMALL, texts)
    assert cuts == Cuts(8, 5, 2, "seven") == Cuts.of(SMALL, texts, SMALL.tokenize(texts))
    assert cuts.line("prompts") == (
        "2 of 5 prompts are longer than the 8 tokens of the text encoder; of the first is left out: 'seven'"
    )
    assert Cuts(0) + Cuts.of(SMALL, texts[:2]) + Cuts.of(SMALL, texts[2:]) == cuts
    assert Cuts.of(SMALL, []) == Cuts(0)
    assert len(Cuts(8, 1, 1, "x" * 5000).line("prompts")) < 400


def test_a_tokenizer_of_hugging_face_tells_what_it_cuts() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "x": 5}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=5)
    tower = HuggingFaceText(torch.nn.Module(), fast)
    texts = ["a", "a b a b", "a b a b b", "a ? ? ? b a"]
    assert [cut_off(tower, text) for text in texts] == ["", "", "b", "b a"]
    assert Cuts.of(tower, texts) == Cuts(5, 4, 2, "b")
