"""CLIP: the interface against open_clip itself, folders, offline errors, and the loss over ranks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from conf.errors import UserError
from conf.schema.networks import ClipConfig
from models.clip import DESCRIPTION_NAME, WEIGHTS_NAME, Clip, contrastive_loss, top1_accuracy
from models.text import load_text_tower

TEXTS = ["a red planet", "a surprised striped orange monster with two eyes", "a red planet with rings"]


def tiny_config() -> ClipConfig:
    return ClipConfig(
        embed_dim=24,
        image_size=32,
        vision_layers=1,
        vision_width=64,
        patch_size=16,
        text_layers=2,
        text_width=32,
        text_heads=2,
        context_length=12,
    )


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    return Clip(tiny_config()).eval()


def test_tokens_are_those_of_open_clip_and_need_no_network(clip: Clip) -> None:
    tokens = clip.tokenize(TEXTS)
    assert torch.equal(tokens, open_clip.get_tokenizer("ViT-B-32", context_length=12)(TEXTS))
    assert tokens.shape == (3, 12)
    assert tokens.dtype == torch.int64
    cut = clip.tokenize(["many words " * 20])[0]
    assert cut[0] == 49406
    assert cut[-1] == 49407


def test_text_states_are_what_open_clip_pools(clip: Clip) -> None:
    tokens = clip.tokenize(TEXTS)
    with torch.no_grad():
        states = clip.text_states(tokens)
        assert states.shape == (3, 12, 32)
        pooled = states[torch.arange(3), tokens.argmax(dim=-1)] @ clip.network.text_projection
        expected = clip.network.encode_text(tokens, normalize=True)
        torch.testing.assert_close(F.normalize(pooled, dim=-1), expected)
        torch.testing.assert_close(clip.encode_text(tokens), expected)


def test_images_are_prepared_as_open_clip_does(clip: Clip) -> None:
    """Same embedding as through open_clip's own transform of the image, resize included."""
    from PIL import Image

    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize((32, 32))
    prepared = open_clip.image_transform(32, is_train=False)(image)
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
    images = raw[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = clip.network.encode_image(prepared[None], normalize=True)
        torch.testing.assert_close(clip.encode_image(images), expected, rtol=1e-4, atol=1e-5)
        larger = F.interpolate(images, (64, 64), mode="nearest")
        assert (clip.encode_image(larger) * expected).sum() > 0.98


def test_logit_scale_is_bounded() -> None:
    clip = Clip(tiny_config())
    with torch.no_grad():
        clip.network.logit_scale.fill_(9.0)
    assert clip(torch.zeros(1, 3, 32, 32), clip.tokenize(TEXTS[:1]))[2].item() == 100.0


def test_folder_round_trip_is_exact(clip: Clip, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path / "clip")
    again = Clip.from_config(ClipConfig(pretrained=str(tmp_path / "clip"))).eval()
    assert again.config == clip.config
    for name, tensor in clip.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name])
    assert sorted(path.name for path in (tmp_path / "clip").iterdir()) == ["config.json", WEIGHTS_NAME]


def test_damaged_folders_are_refused_in_one_line(clip: Clip, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(**changes: object) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError) as error:
            Clip.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "colour" in refused(colour=1)
    assert "text_layers" in refused(text_layers="2")
    assert "misshapen" in refused(embed_dim=25)
    assert "missing" in refused(text_layers=3)
    assert "not the configuration" in refused(_class_name="UNet2DConditionModel")
    (tmp_path / WEIGHTS_NAME).write_bytes(b"cut")
    assert "not a readable safetensors" in refused()
    (tmp_path / WEIGHTS_NAME).unlink()
    assert "is missing" in refused()


def test_pretrained_name_and_tag_equals_open_clips_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of open_clip's registry with QuickGELU weights, loaded, saved as a folder and loaded from there."""
    from safetensors.torch import save_file

    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(architecture))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    reference = open_clip.create_model("tiny-clip", force_quick_gelu=True).eval()
    save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    tag = {
        "quick_gelu": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "file": str(tmp_path / "weights.safetensors"),
    }
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, value: tag if value == "mine" else {})
    clip = Clip.from_pretrained("tiny-clip/mine").eval()
    clip.save_pretrained(tmp_path / "saved")
    again = Clip.from_pretrained(tmp_path / "saved").eval()
    assert clip.config == again.config
    assert clip.config.context_length == 8
    tokens, images = clip.tokenize(TEXTS), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = reference.encode_text(tokens, normalize=True), reference.encode_image(images, normalize=True)
        for found in (clip, again):
            torch.testing.assert_close(found.encode_text(tokens), expected[0])
            torch.testing.assert_close(found.encode_image(images), expected[1])


def write_open_clip_folder(folder: Path, quick_gelu: bool = False) -> open_clip.CLIP:
    """What a folder from open_clip's hub holds."""
    architecture = {
        "embed_dim": 8,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 10, "width": 16, "heads": 2, "layers": 2, "vocab_size": 49408},
    }
    network = open_clip.CLIP(**architecture).eval()
    folder.mkdir(exist_ok=True)
    save_file(network.state_dict(), folder / WEIGHTS_NAME)
    colours = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    description = {"model_cfg": architecture, "preprocess_cfg": colours}
    (folder / DESCRIPTION_NAME).write_text(json.dumps(description))
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))  # of another library
    return network


def test_folder_of_open_clip_loads_and_is_kept_when_saved_again(tmp_path: Path) -> None:
    network = write_open_clip_folder(tmp_path / "hub", quick_gelu=True)
    loaded = load_text_tower(tmp_path / "hub")
    assert isinstance(loaded, Clip)
    loaded.save_pretrained(tmp_path / "ours")
    for clip in (loaded, Clip.from_pretrained(tmp_path / "ours")):
        tokens = clip.eval().tokenize(TEXTS)
        assert (tokens.shape, clip.text_width, clip.config.text_layers) == ((3, 10), 16, 2)
        assert float(clip.mean[0, 0, 0, 0]) == 0.5 and float(clip.std[0, 0, 0, 0]) == 0.25
        with torch.no_grad():
            assert torch.equal(clip.encode_text(tokens), network.encode_text(tokens, normalize=True))


def test_folders_of_open_clip_that_are_no_plain_clip_are_refused(tmp_path: Path) -> None:
    write_open_clip_folder(tmp_path)
    found = json.loads((tmp_path / DESCRIPTION_NAME).read_text())
    found["model_cfg"]["text_cfg"]["hf_model_name"] = "some/encoder"
    (tmp_path / DESCRIPTION_NAME).write_text(json.dumps(found))
    with pytest.raises(UserError, match="BPE tokenizer"):
        Clip.from_pretrained(tmp_path)
    (tmp_path / DESCRIPTION_NAME).write_text("{}")
    with pytest.raises(UserError, match=r"open_clip_config\.json: has no model_cfg"):
        Clip.from_pretrained(tmp_path)


def test_weights_that_cannot_be_had_are_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(open_clip, "CLIP", lambda **sizes: torch.nn.Module())
    with pytest.raises(UserError, match=r"HF_HOME.*train/train_clip\.py") as error:
        Clip.from_pretrained("ViT-B-32/laion2b_s34b_b79k")
    assert "\n" not in str(error.value)
    for source in ("runs/nowhere/clip", "ViT-B-32/no_such_tag", "nothing"):
        with pytest.raises(UserError, match="neither a folder"):
            Clip.from_pretrained(source)
    with pytest.raises(UserError, match="BPE tokenizer"):
        Clip.from_pretrained("ViT-B-16-SigLIP/webli")


@pytest.mark.parametrize(("option", "value"), [("vision_width", 40), ("text_heads", 5), ("patch_size", 7)])
def test_impossible_sizes_name_their_option(option: str, value: int) -> None:
    config = tiny_config()
    setattr(config, option, value)
    with pytest.raises(UserError, match=option):
        Clip(config)


def test_accuracy_counts_equal_captions_as_found() -> None:
    tokens = torch.tensor([[1, 2], [1, 2], [3, 4]])
    images = torch.eye(3)
    texts = images[[1, 0, 2]]  # the first two pairs are swapped, but their caption is the same
    assert [float(share) for share in top1_accuracy(images, texts, tokens)] == [1.0, 1.0]
    texts = images[[2, 1, 0]]
    assert [float(share) for share in top1_accuracy(images, texts, tokens)] == pytest.approx([1 / 3, 1 / 3])


TWO_RANKS = """
import sys
from dataclasses import replace
import torch
import torch.distributed as dist
from conf.schema.networks import ClipConfig
from models.clip import Clip, contrastive_loss

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
clip = Clip(ClipConfig(embed_dim=24, image_size=32, vision_layers=1, vision_width=64, patch_size=16, text_layers=1,
                       text_width=32, text_heads=2, context_length=12)).double()
images = torch.rand(6, 3, 32, 32, dtype=torch.float64) * 2 - 1
tokens = clip.tokenize([f"image {i} of a planet" for i in range(6)])

whole = contrastive_loss(*clip(images, tokens))
expected = torch.autograd.grad(whole, list(clip.parameters()))

mine = slice(3 * rank, 3 * rank + 3)
part = contrastive_loss(*clip(images[mine], tokens[mine]), rank=rank, world=2)
part.backward()
mean = part.detach() / 2
dist.all_reduce(mean)
torch.testing.assert_close(mean, whole.detach(), rtol=1e-10, atol=1e-12)
for parameter, gradient in zip(clip.parameters(), expected, strict=True):
    dist.all_reduce(parameter.grad)  # then half of it is what DDP gives to the optimiser
    torch.testing.assert_close(parameter.grad / 2, gradient, rtol=1e-8, atol=1e-12)
dist.destroy_process_group()
"""


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Loss and every gradient of two gloo processes with half of the batch each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWO_RANKS]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors


def test_contrastive_loss_of_one_rank_is_symmetric_cross_entropy() -> None:
    images, texts = F.normalize(torch.randn(5, 8), dim=1), F.normalize(torch.randn(5, 8), dim=1)
    logits, labels = 7.0 * images @ texts.T, torch.arange(5)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, torch.tensor(7.0)), expected)


def test_states_can_leave_out_the_last_layers(clip: Clip) -> None:
    """As Stable Diffusion 2 does: the last layer is not run, the final norm is."""
    shorter = Clip(replace(tiny_config(), skip_last=1)).eval()
    shorter.network.load_state_dict(clip.network.state_dict())
    tokens = clip.tokenize(TEXTS)
    with torch.no_grad():
        kept = shorter.text_states(tokens)
        shorter.network.transformer.resblocks[1] = torch.nn.Identity()
        assert torch.equal(shorter.text_states(tokens), kept)
        assert not torch.allclose(kept, clip.text_states(tokens))


def test_pooled_text_is_the_embedding_before_its_scaling(clip: Clip) -> None:
    tokens = clip.tokenize(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(clip.pooled(tokens), dim=-1), clip.encode_text(tokens))
        assert not torch.allclose(clip.pooled(tokens).norm(dim=-1), torch.ones(3))
