"""What the network is told: each condition's form, its null, and how several go together."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import ConditionsConfig
from conf.schema.conditions import (
    BoxesConfig,
    BoxMapConfig,
    CaptionConfig,
    ClassConfig,
    FramingConfig,
    ImageEmbeddingConfig,
    SegmentsConfig,
)
from conf.schema.networks import UNetConfig
from data.labels import Box, Labels
from models.conditions import ConditionContext, Conditions, Embedders, Inputs, Samples
from models.conditions.labels import UNLABELLED
from models.denoiser import Denoiser, widened
from models.unet import UNet

SIDE, DOWNSCALE, WIDTH = 16, 2, 8
MODEL = UNetConfig(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    block_out_channels=[8, 16],
    layers_per_block=1,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    cross_attention_dim=WIDTH,
    attention_head_dim=[2],
    norm_num_groups=4,
)
NULL_TEXT = torch.full((4, WIDTH), 7.0)


class StubNetworks:
    """Networks whose answers show what they were given."""

    def latents(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, DOWNSCALE)

    def image_embeddings(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :6]


@dataclass
class RowRng:
    """A known uniform number for each row, and noise."""

    numbers: Tensor

    def uniform(self, purpose: str) -> Tensor:
        return self.numbers

    def normal(self, purpose: str, shape: Any) -> Tensor:
        return torch.randn(len(self.numbers), *shape, generator=torch.Generator().manual_seed(3))


LABELS = [
    Labels(class_id=2, boxes=(Box((0.0, 0.0, 0.5, 0.5), 1), Box((0.25, 0.0, 1.0, 1.0), 0))),
    Labels(),
    Labels(class_id=0, segments=np.tile(np.array([0, 3], np.uint8), (SIDE, SIDE // 2))),
]


def samples(labels: list[Labels] = LABELS) -> Samples:
    images = torch.rand(len(labels), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    framings = torch.tensor([[40.0, 30.0, 2.0, 0.0]]).expand(len(labels), -1)
    generators = [np.random.default_rng(row) for row in range(len(labels))]
    return Samples(images, labels, framings, generators, keys=[f"000{row}" for row in range(len(labels))])


def conditions(**sections: Any) -> Embedders:
    torch.manual_seed(0)
    cfg = ConditionsConfig(**{"caption": None, **sections})
    mean, std = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([2.0, 1.0, 0.5])
    context = ConditionContext.of(
        MODEL,
        downscale=DOWNSCALE,
        latent_mean=mean,
        latent_std=std,
        null_text=NULL_TEXT,
    )
    return Embedders(Conditions(cfg, {"classes": ["cat", "", "dog"], "box_classes": ["sun"]}), context)


CAPTION = {"caption": CaptionConfig(drop=0.5)}
TOKEN = {"class_token": ClassConfig(classes=3, drop=0.5)}
VECTOR = {"class_vector": ClassConfig(classes=3, drop=0.5)}
FRAMING = {"framing": FramingConfig(drop=0.5)}
BOXES = {"boxes": BoxesConfig(classes=2, most=3, drop=0.5)}
EMBEDDING = {"image_embedding": ImageEmbeddingConfig(width=6, drop=0.5)}
BOX_MAP = {"box_map": BoxMapConfig(classes=2, channels=5, drop=0.5)}
SEGMENTS = {"segments": SegmentsConfig(classes=4, channels=5, drop=0.5)}
ALL: list[dict[str, Any]] = [CAPTION, TOKEN, VECTOR, FRAMING, BOXES, BOX_MAP, EMBEDDING, SEGMENTS]


def arrays(told: Embedders, labels: list[Labels] = LABELS) -> Inputs:
    made = told.source.prepare(samples(labels), StubNetworks())
    return {**made, "text": torch.randn(len(labels), 4, WIDTH, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("sections", ALL, ids=lambda sections: next(iter(sections)))
def test_arrays_are_prepared_without_a_network(sections: dict[str, Any]) -> None:
    alone = Conditions(ConditionsConfig(**{"caption": None, **sections}))
    made, inside = (source.prepare(samples(), StubNetworks()) for source in (alone, conditions(**sections).source))
    assert made.keys() == inside.keys() and all(torch.equal(made[name], inside[name]) for name in made)
    assert not any(isinstance(part, torch.nn.Module) for part in alone.kinds.values())


@pytest.mark.parametrize("sections", ALL, ids=lambda sections: next(iter(sections)))
def test_dropped_rows_are_told_nothing_and_the_others_all(sections: dict[str, Any]) -> None:
    told = conditions(**sections)
    inputs = arrays(told)
    varied = told.vary(inputs, RowRng(torch.tensor([0.9, 0.1, 0.9])))
    whole, nothing, mixed = told(inputs), told(told.null(inputs)), told(varied)
    assert sum(part is not None for part in whole) == 1  # tokens, channels or a vector
    for all_of_it, none, some in zip(whole, nothing, mixed, strict=True):
        if all_of_it is not None:
            torch.testing.assert_close(some, torch.stack([all_of_it[0], none[1], all_of_it[2]]))
            torch.testing.assert_close(none[0], none[2])
            assert (all_of_it - none).abs().max() > 0.1


@pytest.mark.parametrize(
    "sections", [TOKEN, VECTOR, BOXES, BOX_MAP, SEGMENTS], ids=lambda sections: next(iter(sections))
)
def test_missing_label_is_the_null(sections: dict[str, Any]) -> None:
    told = conditions(**sections)
    inputs = arrays(told, [Labels()])
    for found, none in zip(told(inputs), told(told.null(inputs)), strict=True):
        assert found is None or torch.equal(found, none)


def test_several_stand_side_by_side_or_are_added() -> None:
    parts = [conditions(**sections) for sections in ALL]
    together = conditions(**{name: section for sections in ALL for name, section in sections.items()})
    for part in parts:
        for name, module in part.kinds.items():
            together.kinds[name].load_state_dict(module.state_dict())
    inputs = arrays(together)
    given, alone = together(inputs), [part(inputs) for part in parts]
    in_order = [alone[i] for i in (0, 1, 4, 6)]  # caption, class, boxes, embedding
    torch.testing.assert_close(given.context, torch.cat([one.context for one in in_order], dim=1))
    assert given.context.shape[1] == together.tokens == 4 + 1 + 3 + 1
    assert torch.equal(given.channels, torch.cat([alone[5].channels, alone[7].channels], dim=1))
    assert together.channels == 10
    torch.testing.assert_close(given.vector, alone[2].vector + alone[3].vector)


def test_only_what_can_be_dropped_is_dropped_by_guidance() -> None:
    told = conditions(**TOKEN, segments=SegmentsConfig(classes=4, drop=0.0))
    inputs = arrays(told)
    given, nothing = told(inputs), told(told.null(inputs))
    assert torch.equal(given.channels, nothing.channels) and not torch.equal(given.context, nothing.context)
    assert not conditions(segments=SegmentsConfig(classes=4, drop=0.0)).source.can_drop


def test_largest_boxes_come_first_and_the_rest_is_empty() -> None:
    found = arrays(conditions(**BOXES))["boxes"]
    assert found[0].tolist() == [[0, 0.25, 0, 1, 1], [1, 0, 0, 0.5, 0.5], [2, 0, 0, 0, 0]]
    fewer = conditions(boxes=BoxesConfig(classes=2, most=1))
    assert arrays(fewer)["boxes"][0].tolist() == [[0, 0.25, 0, 1, 1]]


def test_map_becomes_the_mean_of_its_pixels_channels() -> None:
    """What the paper's rescaler does: one-hot, made smaller, through a 1 x 1 convolution."""
    told = conditions(**SEGMENTS)
    inputs = arrays(told)
    table = told.kinds["segments"].table.weight  # [5, channels]
    one_hot = torch.nn.functional.one_hot(inputs["segments"].long().clamp_max(4), 5).float().permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(one_hot, scale_factor=1 / DOWNSCALE, mode="area")
    torch.testing.assert_close(told(inputs).channels, torch.einsum("bkhw,kc->bchw", small, table))


def test_smaller_boxes_of_a_map_lie_in_front() -> None:
    found = arrays(conditions(**BOX_MAP))["box_map"]
    assert (found[0, :8, :8] == 1).all() and (found[0, 8:, 4:] == 0).all() and (found[0, 8:, :4] == UNLABELLED).all()
    assert (found[1] == UNLABELLED).all()


def test_titles_say_what_is_asked_for() -> None:
    told = conditions(**CAPTION, **TOKEN, **BOXES)
    assert told.source.titles(["a", "b", ""], arrays(told)) == ["a, dog, sun, class 1", "b", "cat"]


def test_conditions_show_what_they_ask_for() -> None:
    told = conditions(**TOKEN, **BOXES, **SEGMENTS)
    shown = told.source.show(samples().images, arrays(told))
    assert [image.shape for image in shown] == [(3, 3, SIDE, SIDE)] * 2
    frames = shown[0][0]  # of boxes, on white
    assert (frames[:, 0, 0] != 1).any() and (frames[:, 3, 2] == 1).all()


@pytest.mark.parametrize(
    ("sections", "labels", "message"),
    [
        (
            TOKEN,
            Labels(class_id=3),
            "^sample '0000': class_id: 3 is out of range, this network knows the classes 0 to 2$",
        ),
        (BOXES, Labels(boxes=(Box((0, 0, 1, 1), 2),)), r"^sample '0000': boxes\[0\]\.class_id: 2 is out of range"),
        (BOX_MAP, Labels(boxes=(Box((0, 0, 1, 1), 2),)), r"^sample '0000': boxes\[0\]\.class_id: 2 is out of range"),
        (
            SEGMENTS,
            Labels(segments=np.full((SIDE, SIDE), 4, np.uint8)),
            r"'0000': a pixel of seg\.png: 4 is out of range",
        ),
        ({"image_embedding": ImageEmbeddingConfig(width=9)}, Labels(), r"^conditions\.image_embedding\.width=9: .* 6$"),
    ],
    ids=["class", "box", "box map", "map", "embedding"],
)
def test_what_the_network_does_not_know_is_refused(sections: Any, labels: Labels, message: str) -> None:
    with pytest.raises(UserError, match=message):
        arrays(conditions(**sections), [labels])


def test_data_set_with_other_classes_is_refused() -> None:
    told = conditions(**TOKEN)
    told.source.check_names({})  # foreign shards do not say
    told.source.check_names({"classes": ["a", "b", "c"]})
    with pytest.raises(UserError, match=r"^conditions\.class_token\.classes=3: this data set has 4 classes; set it to"):
        told.source.check_names({"classes": ["a", "b", "c", "d"]})
    with pytest.raises(UserError, match=r"^conditions\.class_token\.classes=3: this data set has 0 classes, so take"):
        told.source.check_names({"segments": ["a"]})


def test_channels_and_tokens_must_fit_the_network() -> None:
    with pytest.raises(UserError, match=r"^model\.in_channels=3: must be 8, 3 of the latent .* and 5 of the "):
        Denoiser(UNet(MODEL), conditions(**TOKEN, **SEGMENTS))
    with pytest.raises(UserError, match=r"^model\.cross_attention_dim=8: no condition gives tokens; set it to null"):
        Denoiser(UNet(MODEL), conditions(**VECTOR))


def test_denoiser_comes_back_from_its_folder(tmp_path: Any) -> None:
    told = conditions(**TOKEN, **FRAMING)
    network = Denoiser(UNet(MODEL), told).requires_grad_(False)
    for parameter in network.unet.parameters():  # no layer that starts at zero may hide a dependence
        parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path, network.state_dict())
    again = Denoiser.from_pretrained(tmp_path, lambda model: conditions(**TOKEN, **FRAMING))
    x, t, inputs = torch.randn(3, 3, 8, 8), torch.tensor([1.0, 50.0, 900.0]), arrays(told)
    assert torch.equal(again(x, t, inputs), network(x, t, inputs))
    given = network.prepared(told(inputs))
    torch.testing.assert_close(network.predict(x, t, given), network(x, t, inputs))
    other = Denoiser(UNet(MODEL), conditions(**TOKEN, **BOXES))
    learnt, fresh = (other.conditions.kinds[name] for name in ("class_token", "boxes"))
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    other.load_conditions(tmp_path)  # begins with the class it knows, and learns boxes
    assert torch.equal(learnt.table.weight, told.kinds["class_token"].table.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    with pytest.raises(UserError, match=r"conditions\.class_token does not fit the network \(misshapen: table\.weight"):
        Denoiser(UNet(MODEL), conditions(class_token=ClassConfig(classes=9))).load_conditions(tmp_path)
    with pytest.raises(UserError, match=r"conditions\.safetensors does not fit the network"):
        Denoiser.from_pretrained(tmp_path, lambda model: conditions(**TOKEN))


def test_widened_network_computes_what_it_did() -> None:
    narrow, wide = UNet(MODEL), UNet(UNetConfig(**{**asdict(MODEL), "in_channels": 5}))
    wide.load_state_dict(widened(narrow.state_dict(), 5))
    x, t, text = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(wide(torch.cat([x, torch.randn(2, 2, 8, 8)], dim=1), t, text), narrow(x, t, text))
