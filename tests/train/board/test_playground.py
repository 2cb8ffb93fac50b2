"""The playground: what it draws, what it refuses, and the page in a browser, for two visitors at once."""

import base64
import re
import threading
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conf.entry import compose
from conf.errors import UserError
from conf.schema import (
    ConditionsConfig,
    Edit,
    PlaygroundRun,
    Precision,
    Sampler,
    SamplingConfig,
)
from conf.schema.conditions import MaskedConfig
from models.conditions import ConditionContext, Conditions, Embedders
from models.pipeline import DiffusionPipeline
from tiny_pipeline import WIDTH, tiny_pipeline
from train.board.playground import server, studio
from train.board.playground.fragments import data_url, message, render_sheet
from train.board.playground.request import EDIT_OPTIONS, request_of
from train.board.playground.studio import Drawing, Studio
from train.board.playground.upload import pixels_of
from train.engine.image_grid import to_uint8
from train.engine.runtime import Runtime

LENGTH = 12
RED, BLUE, PLAIN = "a red dog, a red hat", "a blue dog, a red hat", "a cat"
SET = {  # what a visitor who touched nothing but the prompt has set
    **{name: getattr(Edit(prompt=""), name) for name in EDIT_OPTIONS},
    **{"prompt": RED, "seed": 0, "sampler": "dpmpp_2m", "steps": 4, "guidance_scale": 3.0},
    **{"edit": "", "mode": "auto", "blend": "", "image": "", "inversion": "negative_prompt"},
}
GIVEN = np.random.default_rng(0).integers(256, size=(24, 40, 3), dtype=np.uint8)  # wider than what is drawn
EVIL = "<b>dog</b>"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


class WordText:
    """A text tower with start and end for which each word is a token; longer texts are cut."""

    text_width, context_length = WIDTH, LENGTH

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        rows = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            words = re.findall(r"\w+|[^\w\s]", text)[: LENGTH - 2]
            tokens = [1, *(3 + zlib.crc32(word.encode()) % 1000 for word in words), 2]
            row[: len(tokens)] = torch.tensor(tokens)
        return rows

    def text_states(self, tokens: torch.Tensor) -> torch.Tensor:
        waves = torch.sin((tokens.unsqueeze(-1) + 1) * torch.arange(1, WIDTH + 1))  # [B, L, D]
        return waves + waves.cumsum(1) / torch.arange(1, LENGTH + 1).view(-1, 1)


def untrained(told: ConditionsConfig | None = None) -> DiffusionPipeline:
    """A tiny network of random weights, none of them zero; `told`: what it claims to be told instead of a caption."""
    model = tiny_pipeline(
        WordText(),
        block_out_channels=[16, 16],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    )
    if told is not None:
        context = ConditionContext.of(
            model.denoiser.unet.cfg, downscale=2, latent_mean=torch.zeros(4), latent_std=torch.ones(4)
        )
        model.denoiser.conditions = Embedders(Conditions(told), context)
    return model


MODEL = untrained()
STUDIO = Studio(lambda: MODEL, Precision.fp32, film_frames=3)
CFG = compose("playground", PlaygroundRun, ["run_dir=nowhere", "steps=4", "port=0", "eta=0.5", "sampler=ddim"])


def drawn(weights: dict[str, float] | None = None, **given: Any) -> Drawing:
    return STUDIO.draw(request_of(CFG, SET | given, weights or {}))


def test_image_is_that_of_the_pipeline_with_a_map_of_each_word_and_a_film() -> None:
    made = drawn(seed=3, sampler="ddim")
    sampling = SamplingConfig(sampler=Sampler.ddim, steps=4, eta=0.5)
    expected = MODEL([RED], [3], sampling)
    assert np.abs(made.before.image.astype(int) - to_uint8(expected)[0]).max() <= 1
    assert made.after is None
    assert [word for word, _ in made.before.words] == ["a", "red", "dog", "a", "red", "hat"]
    assert all(heat.shape == (16, 16) and heat.min() == 0 and heat.max() == 1 for _, heat in made.before.words)
    assert made.film_labels == ["step 1", "step 3", "step 4"] and len(made.before.film) == 3
    assert np.array_equal(made.before.film[-1], made.before.image)


def test_one_thread_draws_whoever_asks_and_tells_the_visitor_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    visitor, seen = ContextVar("visitor", default=0), list[tuple[str, int, int]]()

    def tell(step: int, steps: int) -> None:
        seen.append((threading.current_thread().name.partition("_")[0], visitor.get(), step))

    def ask(number: int) -> None:
        visitor.set(number)
        STUDIO.draw(request_of(CFG, SET, {}), tell)

    asked = [threading.Thread(target=ask, args=[number]) for number in (1, 2)]
    monkeypatch.setattr(studio, "TELL_S", -1)
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    assert sorted(seen) == [("studio", number, step) for number in (1, 2) for step in (1, 2, 3, 4)]
    monkeypatch.setattr(studio, "TELL_S", 60)
    ask(3)
    assert len(seen) == 8  # it was over before there was anything to tell


def test_edit_is_drawn_beside_its_source_and_kept_to_its_region() -> None:
    made = drawn(edit=BLUE, blend_change=True, blend_threshold=0.7)
    assert made.after is not None and made.after.prompt == BLUE
    assert np.abs(made.before.image.astype(int) - drawn().before.image).max() <= 1
    assert made.after.region is not None and 0 < made.after.region.mean() < 1
    change = np.abs(made.after.image.astype(int) - made.before.image).max(-1)  # [H, W]
    assert change.max() > 3 * change[~made.after.region].max()
    named = drawn(edit=BLUE, blend="dog , blue").after
    assert named is not None and named.region is not None and named.region.any()


def test_weights_alone_are_an_edit_and_those_of_1_are_none() -> None:
    assert drawn({"red#1": 1.0, "dog": 1.0}).after is None
    made = [drawn({word: 0.0}).after for word in ("red#1", "red#2")]
    assert all(made) and not np.array_equal(made[0].image, made[1].image)  # type: ignore[union-attr]


def test_given_image_is_cut_and_edited_with_ddim_where_the_sampler_adds_noise() -> None:
    cut = np.asarray(Image.fromarray(GIVEN).resize((16, 16), Image.Resampling.LANCZOS, box=(8, 0, 32, 24)))
    made = drawn(image=data_url(GIVEN), edit=BLUE, sampler="euler_ancestral", inversion="ddim")
    assert np.array_equal(made.before.image, cut) and np.array_equal(pixels_of(data_url(cut), 16, 16), cut)
    assert made.after is not None and not np.array_equal(made.after.image, cut)
    assert made.request.sampling.sampler is Sampler.ddim and made.request.instead_of is Sampler.euler_ancestral
    again = made.before.film[-1].astype(float)
    assert made.psnr == pytest.approx(20 * np.log10(255) - 10 * np.log10(np.square(again - cut).mean()), abs=0.5)
    page = render_sheet(made)
    assert f"PSNR of {made.psnr:.1f} dB" in page and "euler_ancestral does not find a given image again" in page
    kept = drawn(image=data_url(GIVEN), edit=BLUE)
    assert kept.request.sampling.sampler is Sampler.dpmpp_2m and kept.request.instead_of is None
    assert drawn(image=data_url(GIVEN), inversion="null_text").request.instead_of is Sampler.dpmpp_2m


def test_words_that_can_be_weighed_are_told_apart() -> None:
    assert STUDIO.words(RED, CFG) == ["a#1", "red#1", "dog", "a#2", "red#2", "hat"]
    assert STUDIO.words("", CFG) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"seed": None}, "the seed is empty"),
        ({"seed": 1.5}, "seed 1.5: write a whole number from 0 to"),
        ({"seed": -3}, "seed -3: write a whole number"),
        ({"seed": 1e23}, r"seed 1e\+23: write a whole number"),
        ({"image": "data:image/png;base64,aGVsbG8="}, "your image: not a readable image"),
        ({"image": "data:image/png;base64,a"}, "your image: broken on its way"),
        ({"image": data_url(GIVEN)[:422]}, "your image: broken image"),
        ({"image": "too large"}, "your image has more than 20 MB"),
        ({"prompt": "long " * 80}, "do not hold 'long long"),
        ({"prompt": "one two three four five six seven eight nine ten eleven"}, "do not hold 'eleven'"),
        ({"edit": BLUE, "blend": "giraffe"}, "'giraffe' is not in the prompt"),
        ({"edit": "a small blue dog, a red hat", "mode": "replace"}, "mode=refine"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        drawn(**given)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (ConditionsConfig(caption=None), "without conditions.caption"),
        (ConditionsConfig(masked=MaskedConfig()), "with conditions.masked"),
    ],
)
def test_network_that_needs_something_else_than_a_prompt_is_refused(told: ConditionsConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Studio(lambda: untrained(told), Precision.fp32, 2)


def test_texts_of_visitors_stay_texts() -> None:
    for page in (render_sheet(drawn(prompt=EVIL, edit=f"{EVIL} x")), message(EVIL)):
        assert EVIL not in page and "&lt;b&gt;dog&lt;/b&gt;" in page


def test_taken_port_and_unknown_host_are_said_in_one_line() -> None:
    with server.listen(CFG) as listening:
        port = listening.getsockname()[1]
        assert listening.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UserError, match=f"^port={port}: another program"):
            server.listen(replace(CFG, port=port))
    with pytest.raises(UserError, match=r"^host=999\.1\.1\.1"):
        server.listen(replace(CFG, host="999.1.1.1"))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'latentline\[playground\]'"):
        server.serve(CFG, runtime)


@pytest.fixture
def url() -> Iterator[str]:
    """Of the page, served by this process."""
    with server.listen(CFG) as listening:
        serving = server.server_of(CFG, STUDIO)
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        serving.should_exit = True
        thread.join(timeout=30)
    assert not thread.is_alive()


class Visitor:
    """A browser of its own, with all that went wrong in it."""

    def __init__(self, browser: Any, url: str, **device: Any) -> None:
        self.url, self.trouble = url, list[str]()
        self.context = browser.new_context(**device)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda message: self.trouble.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: self.requested(request.url))
        self.page.goto(url)

    def requested(self, url: str) -> None:
        if not url.startswith(("data:", self.url)):
            self.trouble.append(f"request: {url}")

    def type(self, box: str, text: str) -> None:
        self.page.locator(f"#{box} textarea, #{box} input").first.fill(text)

    def image(self, number: int, prompt: str) -> str:
        """The address of an image, as soon as it is one of this prompt."""
        image = self.page.locator(".image").nth(number).locator(".drawn")
        image.and_(self.page.get_by_alt_text(prompt, exact=True)).wait_for()
        return str(image.get_attribute("src"))

    def overflow(self) -> int:
        """Pixels that the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def wait_until_shown(self, map_of_word: Any) -> None:
        self.page.wait_for_function("map => getComputedStyle(map).opacity == 1", arg=map_of_word.element_handle())


@pytest.fixture
def visitors(browser: Any, url: str) -> Iterator[list[Visitor]]:
    """Two, each with the page open."""
    came = [Visitor(browser, url) for _ in range(2)]
    yield came
    for visitor in came:
        visitor.context.close()


@pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated")  # of gradio, with pandas 3
def test_visitors_draw_edit_and_weigh_at_once(visitors: list[Visitor]) -> None:
    one, two = visitors
    for visitor, prompt in ((one, RED), (two, PLAIN)):
        visitor.type("prompt", prompt)
        visitor.page.locator("#generate").click()
    for visitor, prompt in ((one, RED), (two, PLAIN)):
        assert visitor.image(0, prompt) == data_url(drawn(prompt=prompt, sampler="ddim").before.image)

    one.type("edit", BLUE)
    one.page.locator("#change").click()
    edited = drawn(edit=BLUE, sampler="ddim").after
    assert edited is not None and one.image(1, BLUE) == data_url(edited.image)
    assert one.page.locator(".film").count() == 2
    word = one.page.locator(".image").nth(1).locator("label", has_text="blue")
    heat = word.locator(".map")
    assert heat.evaluate("map => getComputedStyle(map).opacity") == "0"
    word.hover()
    one.wait_until_shown(heat)
    assert heat.bounding_box() == one.page.locator(".image").nth(1).locator(".drawn").bounding_box()

    word.click()
    before = one.image(1, BLUE)
    slider = one.page.get_by_label("number input for blue")
    slider.fill("-1")
    slider.blur()
    one.page.wait_for_function("before => document.querySelectorAll('.drawn')[1].src != before", arg=before)
    weighed = drawn({"blue": -1.0}, edit=BLUE, sampler="ddim").after
    assert weighed is not None and one.image(1, BLUE) == data_url(weighed.image)
    assert one.page.locator(".looks :checked + span").all_inner_texts() == ["image", "image"]  # no map of before

    two.type("edit", "a dog")
    two.type("blend", "giraffe")
    two.page.locator("#change").click()
    two.page.get_by_role("alert").wait_for()
    assert two.page.get_by_role("alert").inner_text().startswith("'giraffe' is not in the prompt 'a dog'")
    assert two.image(0, PLAIN)  # stays
    assert one.trouble == two.trouble == []


@pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated")  # of gradio, with pandas 3
def test_page_fits_a_phone_and_a_tap_shows_what_a_word_looks_at(browser: Any, url: str) -> None:
    visitor = Visitor(browser, url, **PHONE)
    page = visitor.page
    visitor.type("prompt", RED)
    page.get_by_label("number input for dog").wait_for()
    assert visitor.overflow() == 0
    page.locator("#generate").tap()
    visitor.image(0, RED)
    page.wait_for_function("Math.abs(document.getElementById('shown').getBoundingClientRect().top) < 50")
    word = page.locator(".image label", has_text="dog")
    word.tap()
    visitor.wait_until_shown(word.locator(".map"))
    other = page.locator(".image label", has_text="hat")
    other.tap()
    visitor.wait_until_shown(other.locator(".map"))
    page.wait_for_function("map => getComputedStyle(map).opacity == 0", arg=word.locator(".map").element_handle())
    assert visitor.overflow() == 0
    page.set_viewport_size({"width": 320, "height": 640})
    assert visitor.overflow() == 0 and visitor.trouble == []
    visitor.context.close()


@pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated")  # of gradio, with pandas 3
def test_visitor_edits_a_image_of_his_own(browser: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told, words = threading.Event(), STUDIO.words
    monkeypatch.setattr(STUDIO, "words", lambda *args: told.wait(60) and words(*args))
    visitor = Visitor(browser, url)
    page, choose = visitor.page, visitor.page.get_by_label("Your image", exact=True)
    page.get_by_text("Edit your own image").click()
    choose.set_input_files({"name": "text.png", "mimeType": "image/png", "buffer": b"hello"})
    page.get_by_role("alert").wait_for()
    told.set()  # only now the page is told which words its prompt has
    visitor.type("prompt", RED)
    page.get_by_label("number input for dog").wait_for()
    assert page.get_by_role("alert").inner_text() == "your image: not a readable image"
    content = base64.b64decode(data_url(GIVEN).partition(",")[2])
    choose.set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": content})
    page.locator(".preview").wait_for()
    assert page.get_by_role("alert").count() == 0
    visitor.type("edit", BLUE)
    page.locator("#change").click()
    expected = drawn(image=data_url(GIVEN), edit=BLUE, sampler="ddim")
    assert expected.after is not None
    assert visitor.image(0, RED) == data_url(expected.before.image) == page.locator(".preview").get_attribute("src")
    assert visitor.image(1, BLUE) == data_url(expected.after.image)
    assert f"PSNR of {expected.psnr:.1f} dB" in page.locator(".sheet").inner_text()
    page.locator("#away").click()
    page.locator(".preview").wait_for(state="detached")
    page.locator("#change").click()
    page.wait_for_function("mine => document.querySelector('.drawn').src != mine", arg=data_url(expected.before.image))
    assert visitor.image(0, RED) == data_url(drawn(sampler="ddim").before.image) and visitor.trouble == []
    visitor.context.close()
