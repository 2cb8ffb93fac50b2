"""A page on which one draws images and edits them by their words.

`request` reads what was set, `studio` draws it, `sheet` shows it as HTML, `page` has the controls, `server` serves all.
"""
