"""The page in a browser: every section is there, charts and sliders work, and nothing is asked of anybody."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.entry import compose
from conf.schema import ReportRun
from train.board import report

SECTIONS = {
    "summary": "Summary",
    "samples": "Samples over the training",
    "quality": "Quality over samples seen",
    "curves": "Curves",
    "reconstructions": "Reconstructions",
    "data": "Data",
    "protocol": "Evaluation protocol",
    "cost": "Hardware and cost",
    "configuration": "Configuration",
}


class Opened:
    """A page with all that went wrong on it."""

    def __init__(self, browser: Any, path: Path, **settings: Any) -> None:
        self.context = browser.new_context(**settings)
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: self.requested(request.url))
        self.page.goto(path.as_uri())

    def requested(self, url: str) -> None:
        if not url.startswith(("data:", "file:")):
            self.trouble.append(f"request: {url}")

    def shown(self, film: str) -> Any:
        """The one image of a film that can be seen."""
        (image,) = [image for image in self.page.locator(f"[data-film='{film}'] img").all() if image.is_visible()]
        return image


@pytest.fixture(scope="module")
def path(run_dir: Path) -> Path:
    return report.write_report(compose("report", ReportRun, [f"run_dir={run_dir}"]))


@pytest.fixture(scope="module")
def opened(browser: Any, path: Path) -> Iterator[Opened]:
    opened = Opened(browser, path)
    yield opened
    opened.context.close()


def test_every_section_is_there_and_nothing_goes_wrong(opened: Opened) -> None:
    for name, heading in SECTIONS.items():
        assert opened.page.locator(f"#{name} > h2").inner_text() == heading
        assert opened.page.locator(f"nav a[href='#{name}']").is_visible()
    assert opened.page.locator("#strips").is_visible() and opened.page.locator("#pareto").is_visible()
    summary = opened.page.locator("#summary").inner_text()
    assert "18.00" in summary and "16.00 to 20.00" in summary and "100% of 500" in summary
    assert "a CLIP (train/train_clip.py), latents" in summary  # what is missing
    cost = opened.page.locator("#cost").inner_text()
    assert "NVIDIA H100 80GB HBM3" in cost and "2:05" in cost
    assert "f" * 64 in opened.page.locator("#protocol").inner_text()
    assert opened.page.locator(".histograms rect").count() > 0
    assert opened.trouble == []


def test_curves_are_drawn_with_their_bands_and_say_their_values(opened: Opened) -> None:
    page = opened.page
    folded = page.locator("details.group", has_text="Throughput")
    assert not folded.locator(".charts").is_visible()
    folded.locator("summary").click()
    assert folded.locator("path.curve").count() == 2  # images/s of both trainings
    drawn = [path.get_attribute("d") for path in page.locator(".chart path.curve").all()]
    assert len(drawn) > 10 and all(text and "NaN" not in text for text in drawn)
    fid = page.locator("#quality .chart").first
    assert fid.locator("path.band").count() == 1
    places = [float(place.split()[0]) for place in fid.locator("path.curve").get_attribute("d")[1:].split("L")]
    assert places == sorted(places) and len(places) == 5  # in the order of the training
    fid.locator("svg").hover(position={"x": places[2] + 3, "y": 80})
    assert fid.locator(".tip").inner_text().splitlines() == ["300 samples", "fid 30 (26.67 – 33.33)"]
    assert opened.trouble == []


def test_smoothing_moves_the_curves_and_keeps_what_was_measured(opened: Opened) -> None:
    chart = opened.page.locator("#curves .chart").first
    measured = chart.locator("path.curve").get_attribute("d")
    opened.page.locator("#smooth").fill("0.9")
    assert chart.locator("path.raw").get_attribute("d") == measured
    assert chart.locator("path.curve").get_attribute("d") != measured
    opened.page.locator("#smooth").fill("0")
    assert chart.locator("path.curve").get_attribute("d") == measured


def test_the_slider_moves_through_the_training(opened: Opened) -> None:
    film = opened.page.locator("[data-film='unet/samples/prompts']")
    last = opened.shown("unet/samples/prompts")
    assert last.get_attribute("data-seen") == "500"  # the broken image after it is left out
    before = last.screenshot()
    film.locator("input").fill("1")
    first = opened.shown("unet/samples/prompts")
    assert first.get_attribute("data-seen") == "200" and first.screenshot() != before
    assert film.locator("output").inner_text() == "200 samples"
    film.get_by_label("play").click()  # plays on to the end
    assert opened.shown("unet/samples/prompts").get_attribute("data-seen") != "200"
    assert opened.trouble == []


def test_texts_of_others_stay_texts(opened: Opened, path: Path) -> None:
    assert opened.page.evaluate("window.hacked") is None
    assert "<script>window.hacked = 1</script>" in opened.page.locator("#data").inner_text()
    for secret in ("user:pass", "xyz"):
        assert secret not in path.read_text()


def test_the_page_fits_a_phone_and_follows_the_colour_scheme(browser: Any, opened: Opened, path: Path) -> None:
    phone = Opened(browser, path, viewport={"width": 360, "height": 700}, color_scheme="dark")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 360
    background = "getComputedStyle(document.body).backgroundColor"
    assert phone.page.evaluate(background) != opened.page.evaluate(background)
    assert phone.trouble == []
    phone.context.close()
