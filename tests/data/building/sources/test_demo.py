"""Sources that draw their images: what they say, what they show, and that both agree."""

import hashlib
import itertools

import numpy as np
from PIL import Image
from sources import config, outcome

from conf.schema import Source
from data.building.sources import open_source
from data.building.sources.demo import (
    BACKGROUNDS,
    BODIES,
    COLORS,
    KINDS,
    MONSTER_EYES,
    TOPS,
    describe,
    render_scene,
    scene,
)
from data.building.sources.layout import OBJECTS, OVERLAP, layout
from data.building.sources.rendering import SEGMENTS
from data.building.sources.subject import LOOK, WORD
from data.images import parse_color
from data.labels import read_labels

# --- demo


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert scene(3, 5) == scene(3, 5)
    assert len({scene(seed, index).caption for seed in range(2) for index in range(20)}) > 35


def test_captions_name_kind_color_and_background() -> None:
    drawn = [scene(0, index) for index in range(2000)]
    assert len({s.caption for s in drawn}) > 1400
    assert {s.attributes["kind"] for s in drawn} == set(KINDS)
    for s in drawn:
        kind, color, background = (s.attributes[name] for name in ("kind", "color", "background"))
        place = "sky" if kind == "landscape" else "background"
        noun = {"plant": "pot", "landscape": s.attributes.get("hills")}.get(kind, kind)
        assert f"{color} {noun} " in s.caption, s.caption
        assert f"{background} {place}" in s.caption, s.caption
        assert not (set(s.caption.split()) & set(BACKGROUNDS)) - {background}
        assert not (set(s.caption.split()) & set(COLORS)) - {color}


def test_captions_stay_as_they_were_published() -> None:
    captions = "\n".join(scene(0, index).caption for index in range(200))
    assert hashlib.sha256(captions.encode()).hexdigest().startswith("505e39324967a224")


def test_captions_follow_from_what_is_drawn() -> None:
    planet = {"kind": "planet", "color": "blue", "background": "gray", "surface": "smooth", "ring": "", "moon": ""}
    assert describe(planet) == "a smooth blue planet on a gray background"
    assert describe(planet | {"ring": "a ring"}) == "a smooth blue planet with a ring on a gray background"
    both = describe(planet | {"ring": "a ring", "moon": "a moon"})
    assert both == "a smooth blue planet with a ring and a moon on a gray background"
    land = {"kind": "landscape", "color": "white", "background": "cyan", "hills": "plains", "sun": ""}
    assert describe(land) == "white plains under a cyan sky"
    assert describe(land | {"sun": "with a sun"}) == "white plains under a cyan sky with a sun"


def test_palettes_are_far_apart() -> None:
    for palette in (COLORS, BACKGROUNDS):
        for a, b in itertools.combinations(palette.values(), 2):
            assert np.linalg.norm(np.subtract(parse_color(a), parse_color(b))) > 80, (a, b)


def nearest(pixels: np.ndarray, palette: dict[str, str]) -> str:
    """The palette's colour that most pixels `[N, 3]` are nearest to."""
    table = np.array([parse_color(color) for color in palette.values()])  # [colors, 3]
    distances = np.linalg.norm(pixels[:, None, :].astype(float) - table, axis=-1)  # [N, colors]
    return list(palette)[int(np.bincount(distances.argmin(1)).argmax())]


def test_color_and_background_can_be_read_off_the_pixels() -> None:
    parts = {"monster": (58, 64, 28, 36), "plant": (42, 63, 26, 38), "planet": (20, 44, 20, 44)}
    for index in range(60):
        drawn = scene(1, index)
        pixels = np.asarray(render_scene(drawn, 64))
        assert pixels.shape == (64, 64, 3)
        assert nearest(pixels[:3, :3].reshape(-1, 3), BACKGROUNDS) == drawn.attributes["background"]
        top, bottom, left, right = parts.get(drawn.attributes["kind"], (24, 34, 0, 64))
        palette = {**COLORS, "ink": "#1e293b"} if drawn.attributes["kind"] == "plant" else COLORS
        seen = nearest(pixels[top:bottom, left:right].reshape(-1, 3), palette)
        assert seen == drawn.attributes["color"], drawn.caption


def test_the_map_of_a_scene_says_what_is_where() -> None:
    source = open_source(config(Source.demo, samples=40, resolution=64))
    seen = set[str]()
    for index in range(40):
        sample, drawn = source.sample(index), scene(0, index)
        assert (sample.meta["class"], KINDS[sample.meta["class_id"]]) == (drawn.kind, drawn.kind)
        pixels, parts = np.asarray(sample.image), sample.segments
        assert isinstance(parts, np.ndarray) and parts.shape == (64, 64)
        there = {SEGMENTS[number] for number in np.unique(parts)}
        seen |= there
        expected = {
            "monster": {"background", "monster"},
            "plant": {"background", "plant", "pot"},
            "planet": {"background", "planet"} | {name for name in ("ring", "moon") if drawn.attributes.get(name)},
            "landscape": {"sky", "ground"} | ({"sun"} if drawn.attributes.get("sun") else set()),
        }[drawn.kind]
        assert there == expected, drawn.caption
        behind = np.isin(parts, [SEGMENTS.index("background"), SEGMENTS.index("sky")])
        assert nearest(pixels[behind], BACKGROUNDS) == drawn.attributes["background"]
        own = {"monster": "monster", "plant": "pot", "planet": "planet"}.get(drawn.kind)
        if own:
            palette = {**COLORS, "ink": "#1e293b"}
            assert nearest(pixels[parts == SEGMENTS.index(own)], palette) == drawn.attributes["color"], drawn.caption
    assert seen == set(SEGMENTS)


# --- layout


def test_boxes_of_a_canvas_hold_what_is_drawn_and_nothing_else() -> None:
    counts = set[int]()
    for index, resolution in enumerate([64] * 20 + [128] * 4):
        source = open_source(config(Source.layout, samples=30, resolution=resolution))
        sample = source.sample(index)
        labels, parts = read_labels(sample.meta, sample.segments, (resolution, resolution)), sample.segments
        assert isinstance(parts, np.ndarray) and isinstance(sample.image, Image.Image)
        covered, pixels = parts != 0, np.asarray(sample.image).astype(int)
        plain = np.abs(pixels - np.array(parse_color(BACKGROUNDS[sample.meta["background"]]))).max(axis=-1) == 0
        inside = np.zeros_like(covered)
        for box, entry in zip(labels.boxes, sample.meta["boxes"], strict=True):
            ends = np.multiply(box.corners, resolution)
            assert np.array_equal(ends, ends.round())
            left, top, right, bottom = ends.astype(int)
            inside[top:bottom, left:right] = True
            assert f"{entry['color']} " in sample.caption and box.class_name == OBJECTS[box.class_id]
            if len(labels.boxes) == 1:  # nothing hides it
                rows, columns = np.nonzero(covered)
                assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (top, bottom, left, right)
        assert plain[~inside].all() and not covered[~inside].any() and (plain & covered).mean() < 0.01
        counts.add(len(labels.boxes))
    assert counts == {1, 2, 3, 4}


def test_objects_of_a_canvas_overlap_little() -> None:
    assert layout(3, 5) == layout(3, 5) != layout(3, 6)
    for drawn in (layout(0, index) for index in range(300)):
        for a, b in itertools.combinations(drawn.objects, 2):
            common = [max(0.0, min(p + a.side, q + b.side) - max(p, q)) for p, q in ((a.left, b.left), (a.top, b.top))]
            assert common[0] * common[1] <= OVERLAP * min(a.side, b.side) ** 2
        assert all(0 <= end <= 1 for o in drawn.objects for end in (o.left, o.top, o.left + o.side, o.top + o.side))


# --- subject


def test_views_of_the_subject_differ_in_mood_or_background_and_show_what_no_scene_of_the_demo_has() -> None:
    source = open_source(config(Source.subject, samples=21, resolution=64))
    views = [source.sample(index) for index in range(21)]
    assert len({view.caption for view in views}) == 21
    for view in views:
        assert view.caption == f"a {view.meta['mood']} {WORD} monster on a {view.meta['background']} background"
        assert isinstance(view.image, Image.Image)
        assert view.image.getpixel((1, 1)) == parse_color(BACKGROUNDS[view.meta["background"]])[:3]
    known = {"body": BODIES, "top": TOPS, "eyes": MONSTER_EYES}
    assert not any(LOOK[part] in variants.values() for part, variants in known.items())
    assert not any(WORD in scene(0, index).caption for index in range(200))


# --- twemoji


def test_twemoji_has_names_attribution_and_few_rejects() -> None:
    source = open_source(config(Source.twemoji))
    assert len(source) == 4009
    captions = [outcome(source, index) for index in range(len(source))]
    named = [caption for caption in captions if not caption.startswith("rejected")]
    assert "fire engine emoji" in named and "flag of Japan emoji" in named
    assert len(named) == len(set(named)) > 3950
    assert "CC BY 4.0" in source.describe()["attribution"]
