"""One creature that the demo never shows, in its moods and in front of its backgrounds: a handful to learn it from.

DreamBooth (Ruiz et al. 2022) teaches a trained model a subject by a word that it has no meaning for yet. The creature's
body, fin, four eyes and bars are in no scene of the demo, its colours are, so that an autoencoder of the demo can draw
them; its captions, but for that word, are of the demo's kind.
"""

import itertools

from conf.schema import BuildRun
from data.building.sources import Sample
from data.building.sources.demo import BACKGROUNDS, COLORS, LAYOUTS, MOODS, part
from data.building.sources.rendering import SEGMENTS, RenderedSource, drawing, image, parts_map
from data.labels import Vocabulary
from data.order import rng

WORD = "sks"
COLOR, ACCENT = COLORS["orange"], COLORS["white"]
LOOK = {"body": "peak", "top": "fin", "eyes": "four", "pattern": "bars", "cheeks": None}
VIEWS = list(itertools.product(MOODS, BACKGROUNDS))  # 21


def subject_source(cfg: BuildRun) -> RenderedSource:
    """Images of the creature; `cfg.samples` above 21 show the same moods and backgrounds again."""
    return RenderedSource(
        cfg, "view", view_sample, Vocabulary.of({"segments": SEGMENTS}), "DiceBear subject", ("monster",)
    )


def view_sample(seed: int, index: int, resolution: int) -> Sample:
    """View `index` of the set `seed`: the first 21 all differ in mood or background."""
    order = rng(seed, 0, "subject").permutation(len(VIEWS))
    mood, background = VIEWS[order[index % len(VIEWS)]]
    options = {
        "seed": f"layout {index % LAYOUTS}",
        "animationVariant": ["none"],
        "backgroundColor": [BACKGROUNDS[background]],
        "bodyColor": [COLOR],
        "accentColor": [ACCENT],
        **part("mouth", MOODS[mood]),
    }
    for name, variant in LOOK.items():
        options |= part(name, variant)
    svg = drawing("monster", options)
    caption = f"a {mood} {WORD} monster on a {background} background"
    meta = {"kind": "monster", "mood": mood, "background": background}
    return Sample(image(svg, resolution), caption, meta, parts_map("monster", svg, resolution))
