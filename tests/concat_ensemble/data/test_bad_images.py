"""Damaged files are read or named, whatever is damaged, and leaving them out keeps the rest in order."""

import io

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_sample_images

from concat_ensemble.data.bad_images import without_rows
from concat_ensemble.data.images import decode_image, read_image
from concat_ensemble.modeling.image_processing_concat_ensemble import convert_image

PHOTO = PIL.Image.fromarray(load_sample_images().images[0]).resize((48, 32))
# With an orientation and a text, which `exif_transpose` reads and writes.
EXIF = PIL.Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 6, "a photograph"
OPTIONS = {"PNG": {"exif": EXIF}, "JPEG": {"exif": EXIF}, "WEBP": {"exif": EXIF}, "TIFF": {"compression": "tiff_lzw"}}
FORMATS = [*OPTIONS, "GIF", "BMP", "DDS", "ICO", "JPEG2000", "PPM", "AVIF"]


def encode(image, file_format, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


FILES = {name: encode(PHOTO, name, **OPTIONS.get(name, {})) for name in FORMATS}


def assert_read_or_named(content: bytes) -> None:
    try:
        image = decode_image({"bytes": content, "path": None}, "image 7 of mine")
    except ValueError as error:
        message = str(error)
        assert message.startswith("image 7 of mine cannot be read: ") and message.endswith("; remove or repair it.")
        assert "\n" not in message and "0x" not in message, "no address of a buffer"
    else:
        assert image.width and image.height


@pytest.mark.parametrize("name", ["PNG", "JPEG"])
def test_a_file_cut_anywhere_is_read_or_named(name):
    content = FILES[name]
    for end in range(len(content)):
        assert_read_or_named(content[:end])


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_a_file_with_changed_bytes_is_read_or_named(name, data):
    content = bytearray(FILES[name])
    first = st.integers(0, min(len(content), 200) - 1)  # where headers are
    for place in data.draw(st.lists(first | st.integers(0, len(content) - 1), max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    assert_read_or_named(bytes(content[: data.draw(st.integers(0, len(content)))]))


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_named(content):
    assert_read_or_named(content)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text.png", "it is not an image in one of the formats BMP"),
        ("empty.png", "the file is empty"),
        ("null", "the row has no image"),
        ("missing", "no such file"),
        ("bomb.png", "decompression bomb"),
        ("cut.jpg", "truncated"),
    ],
)
def test_the_reason_is_said_in_one_line(name, reason, damaged):
    with pytest.raises(ValueError, match=rf"^image 3.* cannot be read: .*{reason}.*; remove or repair it\.$"):
        read_image(damaged(train=[name])["train"], 3)


def test_rows_are_left_out_and_the_others_keep_their_order(damaged):
    data = damaged()
    less = without_rows(data, {"train": [0, 5], "test": []})
    assert less["train"]["group"][:] == [f"train {row}" for row in range(32) if row not in (0, 5)]
    assert less["test"]["group"][:] == data["test"]["group"][:] and len(less["validation"]) == 8
    assert without_rows(data, None) is data and without_rows(data, {"train": []}) is data


# --- alpha -----------------------------------------------------------------------------------------------------------


def with_alpha(mode: str, colors, alpha) -> PIL.Image.Image:
    image = PIL.Image.fromarray(np.asarray(colors, np.uint8)).convert(mode[:-1])
    image.putalpha(PIL.Image.fromarray(np.asarray(alpha, np.uint8)))
    return image


SHAPE = np.kron([[0, 255], [255, 0]], np.ones((8, 8)))  # two squares


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colors_beneath_alpha_are_seen(mode):
    colors = np.arange(256).reshape(16, 16)
    image = decode_image({"bytes": encode(with_alpha(mode, colors, SHAPE), "PNG"), "path": None}, "it")
    assert image.mode == mode and np.array_equal(np.asarray(convert_image(image, "L")), colors)
    assert np.array_equal(np.asarray(convert_image(image, "RGB"))[..., 1], colors)


def test_the_color_of_a_transparent_palette_entry_is_seen():
    image = PIL.Image.fromarray((SHAPE > 0).astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    read = decode_image({"bytes": encode(image, "PNG", transparency=0), "path": None}, "it")
    pixels = np.asarray(convert_image(read, "RGB"))
    assert pixels[0, 0].tolist() == [10, 20, 30] and pixels[0, 15].tolist() == [200, 100, 50]


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_an_image_that_is_in_its_alpha_channel_alone_is_refused(kind):
    """An icon in black on nothing: without its alpha channel, all such icons are the same black square."""
    if kind == "P":
        image = PIL.Image.fromarray((SHAPE > 0).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        content = encode(image, "PNG", transparency=b"\x00\xff")
    else:
        content = encode(with_alpha(kind, np.zeros((16, 16)), SHAPE), "PNG")
    with pytest.raises(ValueError, match=r"icon\.png cannot be read: its colors are all the same.*alpha channel"):
        decode_image({"bytes": content, "path": None}, "icon.png")


@pytest.mark.parametrize("alpha", [0, 255, 77])
def test_an_image_of_one_color_and_one_alpha_is_read(alpha):
    image = with_alpha("RGBA", np.zeros((16, 16)), np.full((16, 16), alpha))
    assert decode_image({"bytes": encode(image, "PNG"), "path": None}, "it").getpixel((3, 3)) == (0, 0, 0, alpha)
