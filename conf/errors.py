"""The one error that people are meant to read."""


class UserError(Exception):
    """Something that a person can act on: one line that names the option and the remedy."""
