"""Editing an image by its words (prompt-to-prompt, Hertz et al. 2022).

`editing` draws a source and its edits in one batch; `alignment` finds which tokens stand for which, `attention_control`
changes the attention, `heat_maps` shows it, `inversion` walks a given image back to the noise that it comes from.
"""
