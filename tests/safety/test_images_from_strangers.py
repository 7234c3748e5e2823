"""Pictures, arrays and an image processor's file that would take gigabytes, minutes, or another program.

Sizes are counted before memory is allocated, so that each attack is also tried where memory is short.
"""

import base64
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image
from transformers import AutoImageProcessor

from concat_ensemble.data.arrays import decode_array
from concat_ensemble.data.images import decode_image, image_hashes, open_image
from concat_ensemble.inference.image_sources import open_images
from concat_ensemble.modeling.image_processing_concat_ensemble import (
    IMAGE_FORMATS,
    MAX_IMAGE_PIXELS,
    ConcatEnsembleImageProcessor,
    check_resizing,
    read_channels,
)

SEES = {"input_size": [3, 224, 224], "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
SEES |= {"mean": [0.5] * 3, "std": [0.5] * 3, "image_mode": "RGB"}
CHANNELS = {"image_mode": "channels", "channels": [0]}
CHANNELS |= {"mean": [0.5], "std": [0.5], "input_size": [1, 32, 32]}


def png(width, height, kind=2, bits=8):
    """A whole file; each row is of zeros."""
    samples = {0: 1, 2: 3, 6: 4}[kind]
    row = bytes(1 + width * samples * bits // 8)
    packer, rest, data = zlib.compressobj(9), height, b""
    while rest:
        data += packer.compress(row * min(rest, 4096))
        rest -= min(rest, 4096)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)),
        (b"IDAT", data + packer.flush()),
        (b"IEND", b""),
    ]
    sums = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(sums)


def turned(width, height):
    """A JPEG with an EXIF tag that exchanges its sides."""
    exif, buffer = PIL.Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (width, height)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


# --- sizes after resizing -------------------------------------------------------------------------------------------

PICTURES = {
    "one pixel wide": (png(1, 60_000), {}),
    "one pixel high": (png(60_000, 1), {}),
    "gray and narrow": (png(1, 60_000, kind=0), {}),
    "narrow with alpha": (png(2, 60_000, kind=6), {}),
    "narrow in 16 bits": (png(1, 60_000, kind=0, bits=16), {}),
    "narrow and turned": (turned(1, 60_000), {}),
    "narrow for a gray member": (png(1, 60_000), {"input_size": [1, 224, 224], "image_mode": "L"}),
    "narrow for an oblong member": (png(1, 60_000), {"input_size": [3, 224, 96]}),
    "squashed, by the step between": (png(1, 300_000), {"crop_mode": "squash", "input_size": [3, 1024, 1024]}),
    "long, by the weights of its rows": (png(1, 18_000_000, kind=0), {"crop_mode": "border"}),
    "narrow as a channel": (png(1, 60_000, kind=0), CHANNELS | {"input_size": [1, 224, 224]}),
}


@pytest.mark.parametrize("attack", PICTURES)
def test_a_picture_that_resizing_would_blow_up(attack, world):
    content, change = PICTURES[attack]
    seen = SEES | change
    channels = seen["input_size"][0]
    seen |= {"mean": [0.5] * channels, "std": [0.5] * channels}
    processor = ConcatEnsembleImageProcessor([seen])
    assert len(content) < 200_000
    Path("x.png").write_bytes(content)
    for image in ("x.png", io.BytesIO(content), PIL.Image.open("x.png")):
        with pytest.raises(ValueError, match=r"image 0 of the batch.*takes memory for \d") as error:
            processor(image)
        assert "\n" not in str(error.value)


def test_narrow_arrays_are_no_exception():
    for array in (np.zeros((60_000, 2, 3), np.uint8), torch.zeros(3, 2, 60_000), np.zeros((2, 60_000), np.float32)):
        with pytest.raises(ValueError, match="takes memory"):
            ConcatEnsembleImageProcessor([SEES])(array)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(12_000, 9_000), (900, 30), (2, 1), (1, 600), (17_000, 2_500)])
def test_pictures_as_people_take_them_pass(mode, size):
    for side in (32, 224, 512):
        check_resizing(*size, [SEES | {"crop_mode": mode, "input_size": [3, side, side]}])


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(40, 30), (31, 200), (3, 700), (500, 2)])
def test_the_count_is_at_least_what_the_transform_makes(mode, size, monkeypatch):
    """The largest picture that timm's transform really makes, of any of its steps."""
    seen = SEES | {"crop_mode": mode, "input_size": [3, 48, 32]}
    made = []
    resize = PIL.Image.Image.resize

    def seen_resize(image, *args, **kwargs):
        made.append(resize(image, *args, **kwargs))
        return made[-1]

    processor = ConcatEnsembleImageProcessor([seen])
    monkeypatch.setattr(PIL.Image.Image, "resize", seen_resize)
    try:
        processor(PIL.Image.effect_noise(size, 50).convert("RGB"))
    except ValueError as error:
        assert "must be > 0" in str(error)  # of a narrow picture that is made smaller
        return
    pixels = max(image.width * image.height for image in made)
    monkeypatch.setitem(check_resizing.__globals__, "MAX_IMAGE_PIXELS", pixels - 1)
    with pytest.raises(ValueError, match="takes memory"):
        check_resizing(*size, [seen])
    monkeypatch.setitem(check_resizing.__globals__, "MAX_IMAGE_PIXELS", 20 * pixels + 20_000)
    check_resizing(*size, [seen])


# --- a processor's file ---------------------------------------------------------------------------------------------


def seen(**changes):
    return SEES | changes


PROCESSORS = {
    "a tenth of 4,096 pixels": [seen(input_size=[3, 4096, 4096], crop_pct=0.1)],
    "a tenth, squashed": [seen(input_size=[3, 4096, 4096], crop_pct=0.1, crop_mode="squash")],
    "a tenth, with a border": [seen(input_size=[3, 4096, 4096], crop_pct=0.1, crop_mode="border")],
    "a tenth, oblong": [seen(input_size=[3, 4096, 2048], crop_pct=0.1)],
    "500 geometries": [seen(crop_pct=0.5 + n / 1000) for n in range(500)],
    "200 large geometries": [seen(input_size=[3, 1024, 1024], crop_pct=0.5 + n / 1000) for n in range(200)],
    "small geometries beside a large one": [seen(input_size=[3, 4096, 4096])]
    + [seen(input_size=[3, 8, 8], crop_pct=0.5 + n / 1000) for n in range(100)],
    "geometries that are slow together": [seen(input_size=[3, 224, 224], crop_pct=0.1 + n / 9999) for n in range(99)],
    "256 channels of 4,096 pixels": [
        seen(
            input_size=[256, 4096, 4096],
            image_mode="channels",
            channels=list(range(256)),
            mean=[0.5] * 256,
            std=[0.5] * 256,
        )
    ],
    "no pixel at all": [seen(input_size=[3, 4, 4], crop_pct=10)],
    "no pixel at all, squashed": [seen(input_size=[3, 4, 4], crop_pct=10, crop_mode="squash")],
    "no pixel at all, oblong": [seen(input_size=[3, 4, 64], crop_pct=10)],
    "a million geometries": [{}] * 1_000_000,
}


@pytest.mark.parametrize("attack", PROCESSORS)
def test_a_processors_file_that_asks_for_gigabytes(attack, folder):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"geometries": PROCESSORS[attack]}))
    with pytest.raises(ValueError, match="geometries") as error:
        AutoImageProcessor.from_pretrained(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_size_that_is_asked_for_later_is_bounded_too():
    processor = ConcatEnsembleImageProcessor([seen(crop_pct=0.1)])
    with pytest.raises(ValueError, match="takes memory"):
        processor(PIL.Image.new("RGB", (9, 9)), size=4096)


def test_sizes_of_today_pass():
    for sides, count in ((224, 256), (518, 64), (1024, 16), (4096, 1)):
        geometries = [seen(input_size=[3, sides, sides], crop_pct=0.9 + n / 10_000) for n in range(count)]
        assert len(ConcatEnsembleImageProcessor(geometries).geometries) == count
    assert MAX_IMAGE_PIXELS // 4 > 3 * 4096 * 4096


# --- many pages and frames ------------------------------------------------------------------------------------------


def tiff(pages):
    """A TIFF of gray pages of (width, height), all of which share one byte."""
    data = b"II*\0" + struct.pack("<I", 16) + bytes(8)
    for number, (width, height) in enumerate(pages):
        tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
        tags += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, width * height)]
        entry = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        end = len(data) + len(entry) + 4
        data += entry + struct.pack("<I", end if number + 1 < len(pages) else 0)
    return data


@pytest.mark.parametrize("pages", [[(4, 2)] * 300, [(4, 2), (4, 2), (17_000, 17_000)]], ids=["many", "growing"])
def test_a_tiff_of_many_or_growing_pages(pages, world):
    Path("x.tif").write_bytes(tiff(pages))
    with pytest.raises(ValueError, match=r"more than \d+ pages, which are too large"):
        read_channels("x.tif")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_many_frames_one_is_read(kind, world, monkeypatch):
    frames = [PIL.Image.effect_noise((60, 60), 9 + n) for n in range(40)]
    frames[0].save("x", kind, save_all=True, append_images=frames[1:], lossless=True)
    monkeypatch.setitem(ConcatEnsembleImageProcessor.preprocess.__globals__, "MAX_IMAGE_PIXELS", 30 * 60 * 60)
    assert open_image({"bytes": Path("x").read_bytes(), "path": None}).size == (60, 60)
    small = SEES | {"input_size": [3, 32, 32]}
    assert ConcatEnsembleImageProcessor([small])("x")["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("size", [(60_000, 60_000), (2, 2**30), (2**31 - 1, 2**31 - 1)])
def test_a_picture_that_is_a_bomb_where_pillows_own_limit_was_lifted(size, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    content = png(1, 1, kind=0)
    start = content.index(b"IHDR")
    checked = b"IHDR" + header
    content = content[:start] + checked + struct.pack(">I", zlib.crc32(checked)) + content[start + 21 :]
    with pytest.raises(ValueError, match="pixels are too many"):
        decode_image({"bytes": content, "path": None}, "x.png")


# --- formats --------------------------------------------------------------------------------------------------------

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 9 9
%%EndComments
(../canary) (w) file closefile
"""
DOS_EPS = struct.pack("<IIIIIIIH", 0xC6D3D0C5, 32, len(EPS), 0, 0, 0, 0, 0)[:30] + bytes(2) + EPS


@pytest.fixture
def ghostscript(world, monkeypatch):
    """A program `gs` which makes the canary, where Pillow finds it."""
    import PIL.EpsImagePlugin

    program = world / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {world}/../canary\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(PIL.EpsImagePlugin, "gs_binary", None)  # not looked for yet
    return world / "../canary"


def test_pillow_alone_would_run_it(ghostscript):
    with pytest.raises(Exception):  # noqa: B017 (it makes no picture)
        PIL.Image.open(io.BytesIO(EPS)).load()
    assert ghostscript.exists()
    ghostscript.unlink()


@pytest.mark.parametrize("content", [EPS, DOS_EPS], ids=["plain", "of DOS"])
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.eps", "x.ps"])
def test_a_program_for_ghostscript_is_not_run(content, name, ghostscript, made):
    Path("photos").mkdir()
    path = Path("photos", name)
    path.write_bytes(content)
    processor = AutoImageProcessor.from_pretrained(made)
    data_url = "data:image/png;base64," + base64.b64encode(content).decode()
    for image in (str(path), path, io.BytesIO(content), data_url, PIL.Image.open(path)):
        with pytest.raises(ValueError, match=r"cannot identify|EPS"):
            processor(image)
    for encoded in ({"bytes": content, "path": name}, {"bytes": None, "path": str(path)}):
        with pytest.raises(ValueError, match="not an image in one of the formats BMP"):
            open_image(encoded)
    with pytest.raises(ValueError, match=r"has no image|cannot be read"):
        open_images("photos").read(0)


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "DDS", "IM", "PDF", "MSP", "SPIDER", "ICNS"])
def test_formats_that_no_dataset_holds_are_not_read(kind):
    buffer = io.BytesIO()
    mode = {"MSP": "1", "SPIDER": "F"}.get(kind, "RGB")
    PIL.Image.new(mode, (32, 32)).save(buffer, kind)
    with pytest.raises(ValueError, match="not an image in one of the formats"):
        open_image({"bytes": buffer.getvalue(), "path": None})


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_formats_that_datasets_hold_are_read(kind):
    buffer = io.BytesIO()
    PIL.Image.effect_noise((32, 32), 50).save(buffer, kind)
    assert open_image({"bytes": buffer.getvalue(), "path": None}).size == (32, 32)
    assert ConcatEnsembleImageProcessor([SEES])(buffer)["pixel_values"].isfinite().all()


# --- arrays in NumPy's format ---------------------------------------------------------------------------------------


def npy(header, data=bytes(64), version=b"\x01\x00"):
    text = header if isinstance(header, bytes) else repr(header).encode()
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + data


GOOD = {"descr": "|u1", "fortran_order": False, "shape": (8, 8)}
HEADERS = {
    "terabytes": npy(GOOD | {"shape": (2**40, 8)}),
    "more than all memory": npy(GOOD | {"shape": (2**62, 8)}),
    "beyond integers": npy(GOOD | {"shape": (10**30, 8)}),
    "a few gigabytes": npy(GOOD | {"shape": (2**16, 2**16)}),
    "below zero": npy(GOOD | {"shape": (-1, 64)}),
    "below zero twice": npy(GOOD | {"shape": (-8, -8)}),
    "one byte less": npy(GOOD, bytes(63)),
    "one byte more": npy(GOOD, bytes(65)),
    "objects": npy(GOOD | {"descr": "|O"}),
    "objects in a field": npy(GOOD | {"descr": [("a", "|O")]}),
    "items of gigabytes": npy(GOOD | {"descr": "|V2000000000", "shape": (8,)}),
    "items of nothing": npy(GOOD | {"descr": "|V0", "shape": (2**50,)}, b""),
    "letters of nothing": npy(GOOD | {"descr": "<U0", "shape": (2**50,)}, b""),
    "arrays in arrays": npy(GOOD | {"descr": [("a", "<f8", (2**15, 2**15))], "shape": (1,)}),
    "a header nested deeply": npy(b"(" * 9_000),
    "a header of signs": npy(b"-" * 9_000 + b"1"),
    "a header of sums": npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"1+" * 4_000 + b"1,)}"),
    "a header without an end": npy(b"{'descr': '''"),
    "a header that is a call": npy(b"__import__('pathlib').Path('../canary').touch()"),
    "a header of gigabytes": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + bytes(64),
    "another version": npy(GOOD, version=b"\x09\x00"),
    "the third version": npy(GOOD, version=b"\x03\x00"),
    "a start alone": b"\x93NUMPY",
    "no dict": npy(b"[1]"),
    "another key": npy(GOOD | {"x": 1}),
    "no dtype": npy(GOOD | {"descr": "<x9"}),
    "dimensions without number": npy(GOOD | {"shape": (1,) * 500}, bytes(1)),
}


@pytest.mark.parametrize("attack", HEADERS)
def test_an_array_whose_header_lies(attack, world):
    content = HEADERS[attack]
    with pytest.raises(ValueError, match="the array is damaged"):
        decode_array(content)
    with pytest.raises(ValueError, match="cannot be read"):
        decode_image({"bytes": content, "path": None}, "image 0")


@pytest.mark.parametrize("attack", ["more than all memory", "objects", "items of nothing", "a header nested deeply"])
def test_weights_of_jax_whose_header_lies(attack, world, refused):
    with zipfile.ZipFile("vit_tiny_patch16_224.npz", "w") as archive:
        archive.writestr("embedding/kernel.npy", HEADERS[attack])
    refused("build", "vit_tiny_patch16_224.npz", "--output", "out", said="does not hold the weights")


def test_arrays_that_are_pictures_are_read_and_others_are_refused_in_one_line():
    good = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for array in (good, np.asfortranarray(good), np.stack([good] * 3, 2), good[:, ::2]):
        buffer = io.BytesIO()
        np.save(buffer, array)
        assert np.array_equal(decode_array(buffer.getvalue()), array)
        assert np.array_equal(open_image({"bytes": buffer.getvalue(), "path": None}), array)
    for array in (good.ravel(), good[None, None], good[:0], good.astype("S1"), good.astype(complex), np.uint8(3)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        with pytest.raises(ValueError) as error:
            open_image({"bytes": buffer.getvalue(), "path": None})
        assert "\n" not in str(error.value)


# --- where memory is short ------------------------------------------------------------------------------------------

SHORT = """
import io, resource, sys, time
import numpy as np, PIL.Image, torch, pickle
from concat_ensemble.data.arrays import decode_array
from concat_ensemble.modeling.image_processing_concat_ensemble import ConcatEnsembleImageProcessor

attacks = pickle.load(open(sys.argv[1], "rb"))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, used + 400_000_000))
for name, (geometries, content) in attacks.items():
    started = time.process_time()
    try:
        if geometries is None:
            decode_array(content)
        else:
            ConcatEnsembleImageProcessor(geometries)(io.BytesIO(content))
    except ValueError as error:
        assert time.process_time() - started < 10, name
        print("refused", name, error)
    else:
        raise SystemExit(f"{name} passed")
"""


@pytest.mark.slow
def test_nothing_is_allocated_before_it_is_refused(world):
    """With 400 MB more than Python takes: where memory was allocated first, it would be a MemoryError."""
    attacks = {}
    for name, (content, change) in PICTURES.items():
        geometry = SEES | change
        count = geometry["input_size"][0]
        attacks[name] = [geometry | {"mean": [0.5] * count, "std": [0.5] * count}], content
    attacks |= {name: (geometries, png(9, 9)) for name, geometries in PROCESSORS.items()}
    attacks |= {name: (None, content) for name, content in HEADERS.items()}
    Path("attacks").write_bytes(pickle.dumps(attacks))
    command = [sys.executable, "-W", "ignore", "-c", SHORT, "attacks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(attacks)


def test_hashes_do_not_read_what_is_no_image(world):
    os.mkfifo("pipe")
    with open("sparse", "wb") as file:  # noqa: PTH123 (truncate)
        file.truncate(2**40)
    Path("empty").touch()
    paths = ["/dev/zero", "pipe", "sparse", "empty", "/proc/self/environ", ".", "/dev/stdin", "no", "a\0b"]
    rows = Dataset.from_dict(
        {"image": [{"bytes": None, "path": path} for path in paths]}, features=Features(image=Image(decode=False))
    )
    assert len(set(image_hashes(rows))) == len(paths)
    for row in rows:
        with pytest.raises(ValueError, match="cannot be read") as error:
            decode_image(row["image"], "it")
        assert "\n" not in str(error.value)
