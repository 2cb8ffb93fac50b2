"""A visitor's own image: it travels as an address that holds it (`data:`), so that no file of it is written here."""

import base64
import binascii

import numpy as np

from conf.errors import UserError
from conf.schema import ImageConfig
from data.images import ImageError, cut_of, open_image, to_pixels

LARGEST = 20_000_000  # bytes of a file
INPUT = """<label class="own"><input type="file" accept="image/*" aria-label="Your image" onchange="
  const [file] = this.files, box = document.querySelector('#image textarea'), reader = new FileReader();
  const send = text => { box.value = text; box.dispatchEvent(new Event('input', {bubbles: true})); };
  reader.onload = () => send(reader.result);
  if (file.size > LARGEST) send('too large'); else reader.readAsDataURL(file);
  this.value = '';"><span>Choose an image</span></label>""".replace("LARGEST", str(LARGEST))


def pixels_of(address: str, height: int, width: int) -> np.ndarray:
    """The middle of an upload, as uint8 [height, width, 3].

    Raises:
        UserError: too large a file, or not an image.
    """
    if not address.startswith("data:"):
        raise UserError(f"your image has more than {LARGEST // 1_000_000} MB: choose a smaller file")
    try:
        image = open_image(base64.b64decode(address.partition(",")[2]), ImageConfig().max_pixels)
    except ImageError as error:
        raise UserError(f"your image: {error}") from None
    except binascii.Error:
        raise UserError("your image: broken on its way here; choose it again") from None
    return to_pixels(image, width, height, cut_of(image.width, image.height, aspect=width / height))
