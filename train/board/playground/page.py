"""The page: controls on the left, what was drawn on the right. What a visitor set and got stays in his own page."""

import random
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.components import Component

from conf.errors import UserError
from conf.schema import Edit, EditMode, InversionMethod, PlaygroundRun, Sampler
from train.board.playground.fragments import data_url, message, preview, render_sheet
from train.board.playground.request import request_of
from train.board.playground.studio import Studio, examples_of
from train.board.playground.upload import INPUT, pixels_of

STYLE = Path(__file__).parent / "html" / "page.css"
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # of the visitor's system: none is fetched
THEME = gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "Consolas", "monospace"])
ONE_AT_A_TIME = "images"  # name of the queue that everybody who wants an image stands in
QUIETLY: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # of small events
PROGRESS = gr.Progress()  # gradio finds each visitor's own by it
MOST_WORDS = 24  # that have a slider
MOST_STEPS = 100
SEEDS = 1_000_000  # that "New seed" chooses among

ABOUT = """# Playground
Write what the image shall show. Then change it by its words: swap one, turn one up or down, and see what each looks
at."""
EMPTY = "<p class='hint'>Write a prompt and press <b>Generate</b>: the image will be here.</p>"
EDIT_HELP = "The prompt again, with words swapped, added or left out. Empty: only the weights of the words change it."
BLEND_HELP = "Words with commas between them, such as: planet. Empty: everywhere."
MODE_HELP = "replace swaps word for word; refine adds or leaves out words; auto: replace if there are as many words."
REPLACE_HELP = "Share of the steps in which words look where they did before the edit."
SELF_HELP = "Share of the steps in which shapes are those of before."
NOISE_HELP = "Shapes are in the noise: more of it lets new ones come."
OWN_HELP = "It is cut to the middle, and the prompt must say what it shows. It stays in this page alone."
INVERSION_HELP = "Of your own image: what guidance leads away from. null_text fits it at each step, which takes long."
THRESHOLD_HELP = "Of the most attention or disagreement: where the image may change. Less: a larger region."

# Where the images are below the controls, as on a phone, one who asks for some is taken there.
GO_THERE = """() => {
  const shown = document.getElementById("shown");
  if (shown.getBoundingClientRect().top >= document.getElementById("change").getBoundingClientRect().bottom)
    shown.scrollIntoView({behavior: "smooth"});
}"""

Controls = dict[str, Component]  # by the names of `request_of`


class Events:
    """What happens when something is set or clicked."""

    def __init__(self, cfg: PlaygroundRun, studio: Studio, controls: Controls, sliders: list[gr.Slider]) -> None:
        self.cfg, self.studio, self.controls, self.sliders = cfg, studio, controls, sliders
        self.words = gr.State([])  # of a visitor's sliders

    def weigh(self, prompt: str, edit: str, before: list[str], *weights: float) -> list[Any]:
        """What is wrong with the prompt, the words that can be weighed, and a slider for each.

        Words that were there before keep their weights.
        """
        words, trouble = list[str](), ""
        try:
            words = self.studio.words(edit.strip() or prompt, self.cfg)[: len(self.sliders)]
        except UserError as error:
            trouble = message(str(error))
        known = dict(zip(before, weights[: len(before)], strict=True))
        shown = [gr.update(visible=True, label=label(word), value=known.get(word, 1)) for word in words]
        hidden = [gr.update(visible=False, value=1)] * (len(self.sliders) - len(words))
        return [trouble, words, gr.update(visible=bool(words)), *shown, *hidden]

    def take(self, address: str) -> list[Any]:
        """A given image, cut; how it looks, a button that takes it away, and what is wrong with it."""
        if not address:
            return ["", "", gr.update(visible=False), ""]
        try:
            pixels = pixels_of(address, *self.studio.size(self.cfg))
        except UserError as error:
            return [gr.skip(), "", gr.update(visible=True), message(str(error))]
        return [data_url(pixels), preview(pixels), gr.update(visible=True), ""]

    def draw(self, state: dict[Component, Any], progress: gr.Progress = PROGRESS) -> tuple[Any, str]:
        """The images, and what is wrong; what was drawn before stays where a request is wrong."""
        words = state[self.words]
        weights = {word: state[slider] for word, slider in zip(words, self.sliders[: len(words)], strict=True)}
        values = {name: state[control] for name, control in self.controls.items()}
        try:
            request = request_of(self.cfg, values, weights)
            answer = self.studio.draw(request, lambda step, steps: progress((step, steps), unit="steps"))
        except UserError as error:
            return gr.skip(), message(str(error))
        return render_sheet(answer), ""


def build_page(cfg: PlaygroundRun, studio: Studio) -> gr.Blocks:
    """The page of a model; images are drawn one after the other, whoever asks."""
    with gr.Blocks(title="Latentline playground", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                controls, generate, another = image_controls(cfg)
                own, looks, away, broken = own_controls()
                changes, change = edit_controls()
                # Each kind of event tells its trouble in a place of its own: answers overtake each other, and one that
                # has nothing to tell would else wipe out another's message.
                unread = gr.HTML(elem_classes="trouble")
                with gr.Accordion("How much each word counts", visible=False, elem_id="weights") as weights:
                    gr.Markdown("1: as written; 0: gone; 2: clearly more; below 0: the opposite", elem_classes="hint")
                    sliders = [gr.Slider(-1, 3, 1, step=0.1, visible=False) for _ in range(MOST_WORDS)]
                controls |= own | changes | how_controls(cfg) | strength_controls()
            with gr.Column(scale=3, min_width=340, elem_id="shown"):
                refused, result = gr.HTML(elem_classes="trouble"), gr.HTML(EMPTY, elem_id="result", min_height=240)
        events = Events(cfg, studio, controls, sliders)
        gr.on(
            [page.load, controls["prompt"].change, controls["edit"].change],
            events.weigh,
            [controls["prompt"], controls["edit"], events.words, *sliders],
            [unread, events.words, weights, *sliders],
            trigger_mode="always_last",
            **QUIETLY,
        )
        taken = [controls["image"], looks, away, broken]
        controls["image"].change(events.take, controls["image"], taken, **QUIETLY)
        away.click(lambda: events.take(""), None, taken, **QUIETLY)
        drawing: dict[str, Any] = {
            "fn": events.draw,
            "inputs": {events.words, *controls.values(), *sliders},
            "outputs": [result, refused],
            "show_progress_on": result,
            "concurrency_id": ONE_AT_A_TIME,
            "concurrency_limit": 1,
            "api_visibility": "private",
        }
        triggers = [generate.click, change.click, controls["prompt"].submit, controls["edit"].submit]
        triggers += [slider.release for slider in sliders]
        gr.on(triggers, **drawing)
        gr.on([*triggers, another.click], js=GO_THERE, api_visibility="private")
        seeded = another.click(lambda: random.randrange(SEEDS), None, controls["seed"], api_visibility="private")
        seeded.then(**drawing)
    page.queue(max_size=cfg.queue)
    return page


def application(cfg: PlaygroundRun, studio: Studio) -> FastAPI:
    """The page as it is served: it asks no other host for anything, and nobody is told or keeps who did what."""
    return gr.mount_gradio_app(
        FastAPI(),
        build_page(cfg, studio),
        path="",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=THEME,
        css_paths=STYLE,
    )


def label(word: str) -> str:
    """The label of a slider: "eyes (2)" is where the word stands for the second time."""
    text, mark, number = word.partition("#")
    return f"{text} ({number})" if mark else text


def image_controls(cfg: PlaygroundRun) -> tuple[Controls, gr.Button, gr.Button]:
    """What the image shows; the buttons that draw it, and that draw another one."""
    examples = examples_of(cfg)
    with gr.Group():
        prompt = gr.Textbox(
            examples[0] if examples else "", label="Prompt", lines=2, elem_id="prompt", submit_btn=False
        )
        seed = gr.Number(cfg.seed, label="Seed", elem_id="seed")
    with gr.Row():
        another = gr.Button("New seed", elem_id="another", min_width=100)
        generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=160, scale=2)
    if examples:
        gr.Examples([[text] for text in examples], prompt, label="Captions of the data set", elem_id="examples")
    return {"prompt": prompt, "seed": seed}, generate, another


def own_controls() -> tuple[Controls, gr.HTML, gr.Button, gr.HTML]:
    """A given image in place of a drawn one; how it looks, the button that takes it away, and what is wrong with it."""
    with gr.Accordion("Edit your own image", open=False, elem_id="own"):
        gr.Markdown(OWN_HELP, elem_classes="hint")
        gr.HTML(INPUT)
        broken = gr.HTML(elem_classes="trouble")
        looks, away = gr.HTML(), gr.Button("Take it away", visible=False, size="sm", elem_id="away")
        image = gr.Textbox("", elem_id="image")
    return {"image": image}, looks, away, broken


def edit_controls() -> tuple[Controls, gr.Button]:
    """What is to be changed, and the button that does."""
    with gr.Group():
        edit = gr.Textbox("", label="Edited prompt", info=EDIT_HELP, lines=2, elem_id="edit")
        blend_change = gr.Checkbox(False, label="Change only where the prompts disagree", elem_id="blend_change")
        blend = gr.Textbox("", label="Change only where these words are", info=BLEND_HELP, elem_id="blend")
    change = gr.Button("Edit", variant="primary", elem_id="change")
    return {"edit": edit, "blend_change": blend_change, "blend": blend}, change


def how_controls(cfg: PlaygroundRun) -> Controls:
    """How an image is drawn."""
    with gr.Accordion("How it is drawn", open=False):
        return {
            "sampler": gr.Dropdown([each.value for each in Sampler], value=cfg.sampler.value, label="Sampler"),
            "steps": gr.Slider(1, max(MOST_STEPS, cfg.steps), cfg.steps, step=1, label="Steps"),
            "guidance_scale": gr.Slider(
                0, max(12, cfg.guidance_scale), cfg.guidance_scale, step=0.5, label="Guidance", info="1: none"
            ),
        }


def strength_controls() -> Controls:
    """How much of the image an edit keeps."""
    usual = Edit(prompt="")
    with gr.Accordion("How much stays as it was", open=False):
        modes, inversions = [each.value for each in EditMode], [each.value for each in InversionMethod]
        return {
            "mode": gr.Radio(modes, value=usual.mode.value, label="Mode", info=MODE_HELP),
            "replace_until": gr.Slider(0, 1, usual.replace_until, step=0.05, label="Keep places", info=REPLACE_HELP),
            "self_until": gr.Slider(0, 1, usual.self_until, step=0.05, label="Keep shapes", info=SELF_HELP),
            "new_noise": gr.Slider(0, 1, usual.new_noise, step=0.05, label="New noise", info=NOISE_HELP),
            "blend_threshold": gr.Slider(
                0, 1, usual.blend_threshold, step=0.05, label="Threshold of the region", info=THRESHOLD_HELP
            ),
            "inversion": gr.Radio(
                inversions, value=InversionMethod.negative_prompt.value, label="Inversion", info=INVERSION_HELP
            ),
        }
