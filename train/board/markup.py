"""Pages that hold all their images: templates whose values are escaped, and images as addresses."""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

QUALITY = 82  # of WebP; PNG has none


def templates(folder: Path) -> Environment:
    """The templates of a folder. Captions and names are of strangers: all is escaped. A missing value is an error."""
    loader = FileSystemLoader(folder)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def data_uri(image: Image.Image, form: str = "PNG") -> str:
    """An image as an address that is its content, as PNG or WEBP."""
    stream = io.BytesIO()
    image.save(stream, form, quality=QUALITY)
    return f"data:image/{form.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
