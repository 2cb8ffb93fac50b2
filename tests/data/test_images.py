"""What open_image makes of odd images, and the way from pixels to a tensor."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from conf.schema import Crop, ImageFormat, ResizeFilter
from data.images import (
    SUFFIXES,
    Cut,
    ImageError,
    Unfit,
    cut_of,
    encode_image,
    in_range,
    open_image,
    open_indices,
    open_mask,
    parse_color,
    shrink,
    size_of,
    to_pixels,
    to_tensor,
)

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
        (b"hello", "not a readable image"),
        (encoded(Image.effect_noise((64, 64), 50))[:1500], "broken image"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:1500], "broken image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable image"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "float"),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "postscript", "float"],
)
def test_what_is_no_whole_image_is_an_image_error(data: bytes, reason: str) -> None:
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
    assert tensor.shape == (3, 2, 3) and str(tensor.dtype) == "torch.uint8" and tensor.is_contiguous()
    assert tensor[:, 0, 0].tolist() == [0, 128, 255]
    assert in_range(tensor)[:, 0, 0].tolist() == pytest.approx([-1.0, 128 / 127.5 - 1, 1.0], abs=1e-6)
    every = np.arange(256, dtype=np.uint8)  # as numpy's arithmetic has it, of which caches and golden numbers are
    assert np.array_equal(in_range(torch.from_numpy(every)).numpy(), every.astype(np.float32) / 127.5 - 1.0)


@pytest.mark.parametrize("side", [16, 40, 64, 150])
def test_bicubic_filter_is_pillows(side: int) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(6, 9, 3), dtype=np.uint8)).resize(
        (90, 60), Image.Resampling.LANCZOS
    )
    cut = Cut(15, 3, 50, 50, flipped=True)
    ours = to_pixels(image, side, side, cut, ResizeFilter.bicubic)
    theirs = image.crop((15, 3, 65, 53)).resize((side, side), Image.Resampling.BICUBIC)
    difference = np.abs(ours.astype(int) - np.asarray(theirs)[:, ::-1])
    assert difference.max() <= 2 and difference.mean() < 0.1
    lanczos = to_pixels(image, side, side, cut)
    assert side == 50 or not np.array_equal(lanczos, ours)
    assert np.array_equal(to_pixels(image, 50, 50, cut, ResizeFilter.bicubic), to_pixels(image, 50, 50, cut))


@pytest.mark.parametrize("format", list(ImageFormat))
def test_encoded_images_read_back(format: ImageFormat) -> None:
    image = Image.new("RGB", (40, 30), (200, 100, 50))
    back = open_image(encode_image(image, format, 95), LIMIT)
    assert back.size == (40, 30)
    assert np.abs(np.asarray(back).astype(int) - np.asarray(image).astype(int)).max() <= (format != ImageFormat.png) * 4


def test_a_image_too_long_for_webp_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="cannot be stored as webp"):
        encode_image(Image.new("RGB", (17_000, 1)), ImageFormat.webp, 95)


# --- what the user sees: orientation, profiles, transparency and modes of every format


def quarters() -> Image.Image:
    """Red, green, blue and yellow, 24 x 16."""
    image = Image.new("RGB", (24, 16), "red")
    for color, corner in (("lime", (12, 0)), ("blue", (0, 8)), ("yellow", (12, 8))):
        image.paste(color, (*corner, corner[0] + 12, corner[1] + 8))
    return image


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_undone_once_in_every_format(format: str, orientation: int) -> None:
    stored = quarters()
    for undo in [operation for tag, operation in UNDO.items() if tag == orientation]:
        stored = stored.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, format, exif=exif)
    image = open_image(data, LIMIT)
    assert image.size == (24, 16) == size_of(data)
    corners = [image.getpixel(at) for at in ((4, 4), (20, 4), (4, 12), (20, 12))]
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    assert np.abs(np.array(corners) - np.array(expected)).max() < 40


UNDO = {  # what makes of an upright image the one that is stored with an orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def test_wide_and_odd_colours_become_srgb() -> None:
    """The colours of the profile's own primaries, as its matrix says; with alpha, in a palette and of grey, too."""
    red_is_green = profile([(0.385, 0.717, 0.097), (0.436, 0.222, 0.014), (0.143, 0.061, 0.714)])  # sRGB, exchanged
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    for image in (red, red.convert("P", palette=Image.Palette.ADAPTIVE)):
        for format in ("PNG", "TIFF"):
            assert np.abs(np.subtract(pixel(encoded(image, format, icc_profile=red_is_green)), (0, 255, 0))).max() <= 2
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 102))
    assert np.abs(np.subtract(pixel(encoded(clear, icc_profile=red_is_green)), (153, 255, 153))).max() <= 2
    linear = profile([(0.9642, 1.0, 0.8249)], gamma=1.0)
    assert pixel(encoded(Image.new("L", (4, 4), 55), icc_profile=linear))[0] in range(126, 131)
    assert pixel(encoded(Image.new("I;16", (4, 4), 55 * 257), icc_profile=linear))[0] in range(126, 131)


@pytest.mark.parametrize("name", ["srgb", "garbage", "cut", "empty", "of grey", "lab"])
def test_a_profile_that_says_nothing_of_these_pixels_leaves_them(name: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    grey = profile([(0.9642, 1.0, 0.8249)], gamma=1.0)
    given = {"srgb": srgb, "garbage": b"\0" * 200, "cut": srgb[:150], "empty": b"", "of grey": grey, "lab": lab}[name]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(open_image(encoded(image, icc_profile=given), LIMIT)), np.asarray(image))


def test_a_profile_of_other_pixels_is_ignored() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("CMYK", "L"):
        image = Image.new("RGB", (8, 8), (10, 200, 90)).convert(mode)
        assert pixel(encoded(image, "TIFF", icc_profile=srgb)) == pixel(encoded(image, "TIFF"))


def test_a_profile_is_applied_once() -> None:
    """What is stored bears no profile: the next reader would apply it again."""
    swapped = profile([(0.385, 0.717, 0.097), (0.436, 0.222, 0.014), (0.143, 0.061, 0.714)])
    first = open_image(encoded(Image.new("RGB", (4, 4), (255, 0, 0)), icc_profile=swapped), LIMIT)
    for format in ImageFormat:
        stored = encode_image(first, format, 95)
        assert "icc_profile" not in Image.open(io.BytesIO(stored)).info
        assert np.abs(np.subtract(pixel(stored), first.getpixel((0, 0)))).max() <= 2
    keyed = open_image(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(9, 9, 9)), LIMIT)
    assert keyed.info == {}


def test_colours_of_lab_and_of_premultiplied_alpha() -> None:
    lab = Image.new("LAB", (4, 4), (136, 208, 195))  # L* 53, a* 80, b* 67: red
    assert np.abs(np.subtract(pixel(encoded(lab, "TIFF")), (255, 0, 0))).max() <= 16
    assert pixel(encoded(Image.new("LA", (4, 4), (10, 0)), "TIFF"), background="lime") == (0, 255, 0)


def png(width: int, bits: int, kind: int, row: bytes, key: bytes | None = None) -> bytes:
    """One row, whose bytes are given as they lie in the file."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([bits, kind, 0, 0, 0])
    keyed = chunk(b"tRNS", key) if key is not None else b""
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + keyed + pixels + chunk(b"IEND", b"")


GREY, RGB = 0, 2  # kinds of PNG


@pytest.mark.parametrize(
    ("bits", "kind", "row", "key", "seen"),
    [
        (1, GREY, b"\x40", b"\0\1", [0, None]),
        (2, GREY, b"\xb0", b"\0\2", [None, 255]),
        (4, GREY, b"\x3f", b"\0\3", [None, 255]),
        (8, GREY, b"\3\4", b"\0\3", [None, 4]),
        (16, GREY, b"\x30\x01\x30\x02", b"\x30\x01", [None, 48]),
        (8, RGB, b"\1\2\3\1\2\4", b"\0\1\0\2\0\3", [None, (1, 2, 4)]),
        (8, RGB, b"\1\2\3\1\2\4", b"\7\1\7\2\7\3", [None, (1, 2, 4)]),
        (16, RGB, b"\1\1\2\2\3\3\1\1\2\2\3\4", b"\1\1\2\2\3\3", [None, (1, 2, 3)]),
        (16, RGB, b"\1\1\2\2\3\3\0\1\0\2\0\3", b"\0\1\0\2\0\3", [(1, 2, 3), None]),
    ],
)
def test_a_transparent_colour_counts_in_the_depth_of_the_file(
    bits: int, kind: int, row: bytes, key: bytes, seen: list[int | tuple[int, int, int] | None]
) -> None:
    image = open_image(png(2, bits, kind, row, key), LIMIT, "lime")
    colors = [(0, 255, 0) if at is None else (at,) * 3 if isinstance(at, int) else at for at in seen]
    assert [image.getpixel((x, 0)) for x in range(2)] == colors


@pytest.mark.parametrize(("tags", "levels"), [({}, (0, 100)), ({262: 0}, (255, 155))])
def test_grey_of_a_tiff_in_which_white_is_zero(tags: dict[int, int], levels: tuple[int, int]) -> None:
    data = encoded(Image.fromarray(np.array([[0, 25700]], dtype=np.uint16)), "TIFF", tiffinfo=tags)
    assert tuple(pixel(data, (x, 0))[0] for x in range(2)) == levels


def test_numbers_without_a_range_are_refused() -> None:
    for values in ([[0, 70_000]], [[-1, 5]]):
        with pytest.raises(ImageError, match="have no defined range"):
            open_image(encoded(Image.fromarray(np.array(values, dtype=np.int32)), "TIFF"), LIMIT)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_of_a_format_that_is_read(suffix: str) -> None:
    """As Pillow writes it; APNG, MPO and sequences of AVIF by the format that they belong to."""
    Image.init()
    format = Image.EXTENSION[suffix]
    image = open_image(encoded(quarters().resize((32, 32)), format), LIMIT)
    assert image.mode == "RGB" and image.size == (32, 32)


@pytest.mark.parametrize("suffix", [".eps", ".ps", ".pdf", ".wmf", ".mpg", ".psd"])
def test_what_runs_programs_or_is_no_plain_image_has_no_suffix(suffix: str) -> None:
    assert suffix not in SUFFIXES


def test_a_bomb_inside_an_icon_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = bytearray(png(1, 1, GREY, b"\0"))
    inside[16:24] = (60_000).to_bytes(4, "big") * 2
    inside[29:33] = zlib.crc32(bytes(inside[12:29])).to_bytes(4, "big")
    head = b"\0\0\1\0\1\0" + bytes([16, 16, 0, 0, 1, 0, 32, 0]) + len(inside).to_bytes(4, "little") + b"\x16\0\0\0"
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="60000 x 60000 pixels are more than max_pixels"):
        open_image(head + bytes(inside), LIMIT)


# --- masks


SHAPE = np.zeros((6, 9), dtype=bool)
SHAPE[1:4, 2:7] = True


def as_mask(values: np.ndarray, mode: str | None = None, format: str = "PNG") -> np.ndarray:
    image = Image.fromarray(values)
    return open_mask(encoded(image.convert(mode) if mode else image, format), (9, 6))


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "I;16"])
@pytest.mark.parametrize("highest", [1, 128, 255])
def test_a_mask_means_the_same_in_every_mode_and_range(mode: str, highest: int) -> None:
    grey = np.where(SHAPE, highest, 0)
    values = grey.astype(np.uint16 if mode == "I;16" else np.uint8)
    assert np.array_equal(as_mask(values, None if mode == "I;16" else mode), SHAPE)


def test_a_mask_of_bits_of_a_palette_of_floats_or_with_soft_edges() -> None:
    assert np.array_equal(as_mask(SHAPE), SHAPE)
    dark_red = Image.fromarray(SHAPE.astype(np.uint8))
    dark_red.putpalette([0, 0, 0, 128, 0, 0])  # as PASCAL VOC has it
    assert np.array_equal(open_mask(encoded(dark_red), (9, 6)), SHAPE)
    assert np.array_equal(as_mask(SHAPE.astype(np.float32), format="TIFF"), SHAPE)
    soft = np.where(SHAPE, 255, 0).astype(np.uint8)
    soft[0], soft[5] = 90, 127
    soft[1, 2] = 128
    assert np.array_equal(as_mask(soft), SHAPE)
    full = np.where(SHAPE, 65535, 0).astype(np.uint16)
    assert np.array_equal(as_mask(full), SHAPE)


def test_a_mask_of_one_brightness_is_white_or_black_as_a_whole() -> None:
    noise = np.random.default_rng(0).integers(0, 9, SHAPE.shape, dtype=np.uint8)
    assert not as_mask(noise).any() and as_mask(255 - noise).all()
    assert not as_mask(np.zeros_like(noise)).any() and as_mask(np.full_like(noise, 255)).all()


def layered(color: np.ndarray | int, alpha: np.ndarray) -> np.ndarray:
    """RGBA, uint8."""
    pixels = np.zeros((*SHAPE.shape, 4), np.uint8)
    pixels[..., :3] = np.asarray(color)[..., None] if np.ndim(color) == 2 else color
    pixels[..., 3] = np.where(alpha, 255, 0)
    return pixels


def test_transparent_pixels_of_a_mask_are_the_opposite_of_what_is_drawn() -> None:
    assert np.array_equal(as_mask(layered(255, SHAPE)), SHAPE)  # white on nothing
    assert np.array_equal(as_mask(layered(0, ~SHAPE)), SHAPE)  # black around a hole
    both = np.where(np.arange(9) < 5, 255, 0)[None].repeat(6, 0)
    assert np.array_equal(as_mask(layered(both, SHAPE)), SHAPE & (np.arange(9) < 5))
    assert not as_mask(layered(255, np.zeros_like(SHAPE))).any()
    with pytest.raises(Unfit, match="is partly transparent, and neither black nor white where it is not"):
        as_mask(layered(128, SHAPE))


def test_a_mask_is_upright_and_of_the_images_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.fromarray(np.where(SHAPE, 255, 0).astype(np.uint8)).transpose(UNDO[6]), exif=exif)
    assert np.array_equal(open_mask(turned, (9, 6)), SHAPE)
    for size in ((6, 9), (9, 7), (18, 3)):
        with pytest.raises(
            Unfit, match=rf"^has 9 x 6 pixels, the image {size[0]} x {size[1]}; make them equal$|^has 6"
        ):
            open_mask(turned, size)


# --- numbers of pixels


@pytest.mark.parametrize(
    ("bits", "row", "numbers"),
    [
        (1, b"\x40", [0, 1]),
        (2, b"\xb0", [2, 3]),
        (4, b"\x3f", [3, 15]),
        (8, b"\7\xff", [7, 255]),
        (16, b"\0\1\0\2", [1, 2]),
    ],
)
def test_numbers_of_pixels_are_those_of_the_file(bits: int, row: bytes, numbers: list[int]) -> None:
    assert open_indices(png(2, bits, GREY, row), (2, 1)).tolist() == [numbers]


def test_numbers_beyond_a_byte_and_colours_are_refused() -> None:
    for data in (png(2, 16, GREY, b"\1\0\0\2"), encoded(Image.new("RGB", (2, 1))), encoded(Image.new("LA", (2, 1)))):
        with pytest.raises(Unfit, match="not 8 bits of grey or palette"):
            open_indices(data, (2, 1))
    palette = Image.new("P", (2, 1), 3)
    palette.putpalette([200] * 30)
    assert open_indices(encoded(palette, bits=4), (2, 1)).tolist() == [[3, 3]]


def profile(columns: list[tuple[float, float, float]], gamma: float = 2.2) -> bytes:
    """An ICC profile of version 2: three primaries or, of grey, the white alone, and the exponent of the pixels."""

    def fixed(*values: float) -> bytes:
        return b"".join(round(value * 65536).to_bytes(4, "big") for value in values)

    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
    white = b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249)
    tags = {b"desc": b"desc\0\0\0\0\0\0\0\1" + bytes(84), b"wtpt": white, b"cprt": b"text\0\0\0\0\0\0\0\0"}
    if len(columns) == 3:
        tags |= {
            name + b"XYZ": b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in zip((b"r", b"g", b"b"), columns, strict=True)
        }
        tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    else:
        tags[b"kTRC"] = curve
    offset, table, content = 132 + 12 * len(tags), b"", b""
    for name, tag in tags.items():
        table += name + (offset + len(content)).to_bytes(4, "big") + len(tag).to_bytes(4, "big")
        content += tag
    space = b"RGB " if len(columns) == 3 else b"GRAY"
    head = bytes(4) + b"lcms" + b"\x02\x10\0\0" + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += fixed(0.9642, 1.0, 0.8249) + bytes(48)
    whole = head + len(tags).to_bytes(4, "big") + table + content
    return len(whole).to_bytes(4, "big") + whole[4:]
