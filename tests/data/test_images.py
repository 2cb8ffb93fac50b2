"""What open_image makes of odd pictures, and the way from pixels to a tensor."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from conf.schema import Crop, ImageFormat
from data.images import ImageError, cut_of, encode_image, open_image, parse_color, shrink, to_pixels, to_tensor

LIMIT = 1_000_000


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixel(data: bytes, at: tuple[int, int] = (0, 0), background: str = "white") -> tuple[int, ...]:
    image = open_image(data, LIMIT, background)
    assert image.mode == "RGB"
    value = image.getpixel(at)
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_transparent_pixels_show_the_background(format: str) -> None:
    half = encoded(
        Image.new("RGBA", (4, 4), (255, 0, 0, 0)), format, **({"lossless": True} if format == "WEBP" else {})
    )
    assert pixel(half, background="#0000ff") == (0, 0, 255)
    assert pixel(half) == (255, 255, 255)


def test_half_transparent_pixels_are_blended() -> None:
    assert pixel(encoded(Image.new("LA", (4, 4), (0, 51))), background="white") == (204, 204, 204)


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=0)
    assert pixel(data, (0, 0), "lime") == (0, 255, 0)
    assert pixel(data, (1, 0), "lime") == (200, 100, 50)


def test_a_transparent_colour_of_an_rgb_png() -> None:
    data = encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert pixel(data, background="red") == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_tones(format: str) -> None:
    levels = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(levels), format)
    assert [pixel(data, (x, 0))[0] for x in range(3)] == [0, 100, 255]


def test_cmyk_and_grey_become_rgb() -> None:
    cyan = pixel(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100))
    assert cyan[0] < 10 and min(cyan[1:]) > 245
    assert pixel(encoded(Image.new("L", (3, 5), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (3, 5), 1))) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    from PIL import ImageOps

    source = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(source, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(open_image(data, LIMIT)), np.asarray(expected))


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("decoded")

    header = Image.new("1", (64, 64))
    data = bytearray(encoded(header))
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # 3.6 gigapixels in a file of 100 bytes
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", forbidden)
    with pytest.raises(ImageError, match="60000 x 60000 pixels are more than max_pixels=1000000"):
        open_image(bytes(data), LIMIT)


def test_the_limit_counts_pixels_and_is_inclusive() -> None:
    data = encoded(Image.new("L", (100, 10)))
    assert open_image(data, 1000).size == (100, 10)
    with pytest.raises(ImageError, match="max_pixels=999"):
        open_image(data, 999)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello", "not a readable picture"),
        (encoded(Image.effect_noise((64, 64), 50))[:1500], "broken picture"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:1500], "broken picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable picture"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "float"),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "postscript", "float"],
)
def test_what_is_no_whole_picture_is_an_image_error(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        open_image(data, LIMIT)


def test_random_damage_never_escapes_as_another_error() -> None:
    random = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = np.frombuffer(encoded(Image.effect_noise((24, 24), 60).convert("RGB"), format), dtype=np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            where = random.integers(len(damaged), size=6)
            damaged[where] = random.integers(256, size=6)
            try:
                assert open_image(damaged.tobytes(), LIMIT).mode == "RGB"
            except ImageError as error:
                assert "\n" not in str(error)


def test_only_plain_colours_are_backgrounds() -> None:
    assert parse_color("navy") == (0, 0, 128)
    for name in ("no colour", "#ff00ff80"):
        with pytest.raises(ValueError):
            parse_color(name)


def test_center_crop_takes_the_middle() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    square = to_pixels(Image.fromarray(wide), 10, 10, cut_of(30, 10))
    assert square.shape == (10, 10, 3) and square.dtype == np.uint8
    assert (square == 200).all()


def test_random_crop_and_flip_depend_on_the_generator_alone() -> None:
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (20, 1, 3)))
    first = [to_pixels(ramp, 20, 20, cut_of(200, 20, Crop.random, True, np.random.default_rng(k))) for k in range(20)]
    again = [to_pixels(ramp, 20, 20, cut_of(200, 20, Crop.random, True, np.random.default_rng(k))) for k in range(20)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({int(square.min()) for square in first}) > 10
    assert {bool(square[0, 0, 0] < square[0, -1, 0]) for square in first} == {True, False}


def test_extreme_aspect_ratio_costs_no_memory() -> None:
    assert to_pixels(Image.new("RGB", (900_000, 1)), 64, 64, cut_of(900_000, 1)).shape == (64, 64, 3)
    assert shrink(Image.new("RGB", (3000, 7)), 7).size == (3000, 7)


def test_shrink_keeps_the_aspect_and_never_enlarges() -> None:
    assert shrink(Image.new("RGB", (300, 200)), 100).size == (150, 100)
    assert shrink(Image.new("RGB", (30, 20)), 100).size == (30, 20)


def test_tensor_spans_minus_one_to_one() -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = (0, 128, 255)
    tensor = to_tensor(pixels)
    assert tensor.shape == (3, 2, 3) and str(tensor.dtype) == "torch.float32" and tensor.is_contiguous()
    assert tensor[:, 0, 0].tolist() == pytest.approx([-1.0, 128 / 127.5 - 1, 1.0], abs=1e-6)


@pytest.mark.parametrize("format", list(ImageFormat))
def test_encoded_pictures_read_back(format: ImageFormat) -> None:
    image = Image.new("RGB", (40, 30), (200, 100, 50))
    back = open_image(encode_image(image, format, 95), LIMIT)
    assert back.size == (40, 30)
    assert np.abs(np.asarray(back).astype(int) - np.asarray(image).astype(int)).max() <= (format != ImageFormat.png) * 4


def test_a_picture_too_long_for_webp_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="cannot be stored as webp"):
        encode_image(Image.new("RGB", (17_000, 1)), ImageFormat.webp, 95)
