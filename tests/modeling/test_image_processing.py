"""Each member sees what timm's evaluation transform makes of an image, for all kinds of images."""

import inspect
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import timm.data
import torch
from torchvision import tv_tensors
from transformers import AutoImageProcessor, AutoProcessor, pipeline

from concat_ensemble import ConcatEnsembleConfig, ConcatEnsembleImageProcessor
from concat_ensemble.modeling.configuration_concat_ensemble import copy_payload
from concat_ensemble.modeling.image_processing_concat_ensemble import convert_image

MIXED = ("resnet18", "grey", "convnext", "deit", "swin", "resnet50", "vit-tiny", "wide")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def processor_of(model) -> ConcatEnsembleImageProcessor:
    return ConcatEnsembleImageProcessor.from_config(model.config)


@pytest.fixture(scope="module")
def rgb(build):
    return processor_of(build("resnet18")[0])


@pytest.fixture(scope="module")
def grey(build):
    return processor_of(build("grey")[0])


def pixels(processor, *images, **kwargs) -> torch.Tensor:
    return processor(list(images), **kwargs)["pixel_values"]


# --- timm's pixels --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_member_gives_timms_features_for_real_photographs(build, photos, timm_features, kind):
    model, (backbone,) = build(kind)
    close(model(**processor_of(model)(photos)).pooler_output, timm_features(backbone, photos))


@torch.no_grad()
@pytest.mark.parametrize("kinds", [MIXED, MIXED[::-1]])
def test_every_member_of_a_mixed_ensemble_gives_timms_features(build, photos, timm_features, kinds):
    model, backbones = build(*kinds)
    parts = model(**processor_of(model)(photos), output_member_features=True).member_features
    for part, backbone in zip(parts, backbones, strict=True):
        close(part, timm_features(backbone, photos))


def test_a_slice_is_timms_transform_padded_with_zeros_on_the_right_and_below(build, photos, transform):
    model, backbones = build("grey", "convnext", "resnet18")
    actual = pixels(processor_of(model), *photos)
    assert actual.shape == (5, 3, 3, 64, 80) and actual.dtype == torch.float32
    for n, backbone in enumerate(backbones):
        expected = torch.stack([transform(backbone)(photo) for photo in photos])
        channels, height, width = expected.shape[1:]
        assert torch.equal(actual[:, n, :channels, :height, :width], expected)
        assert not actual[:, n, :, height:].any() and not actual[:, n, :, :, width:].any()
    assert torch.equal(actual[:, 0, 0], actual[:, 0, 2])  # a gray slice is repeated in all channels


@pytest.mark.parametrize("size", [(1, 7), (400, 2), (33, 31), (2000, 20)])
def test_images_of_any_shape_are_cropped_as_by_timm(build, photos, transform, size):
    model, backbones = build("resnet18", "swin", "convnext")
    image = photos[0].resize(size)
    actual = pixels(processor_of(model), image)[0]
    for n, backbone in enumerate(backbones):
        expected = transform(backbone)(image)
        assert torch.equal(actual[n, :, : expected.shape[1], : expected.shape[2]], expected)


def test_in_border_mode_the_border_has_the_mean_for_gray_images_too(spec, transform, backbone):
    member = spec("grey")
    member["preprocessing"] |= {"crop_mode": "border"}
    border = ConcatEnsembleImageProcessor.from_config(ConcatEnsembleConfig(members=[member]))
    actual = pixels(border, PIL.Image.new("L", (64, 32), 255))[0, 0]
    # The image is twice as wide as high: 32x16 in the middle, with borders of 0.4, which is 0 after normalization.
    assert (
        actual[8:24].allclose(torch.tensor((1 - 0.4) / 0.3)) and actual[[*range(8), *range(24, 32)]].abs().max() < 0.01
    )


# --- kinds of image -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "LA", "RGBA", "YCbCr"])
def test_pil_modes_are_converted_as_by_timm(rgb, grey, build, photos, transform, mode):
    image = photos[0].convert(mode)
    assert torch.equal(pixels(rgb, image)[0], transform(build("resnet18")[1][0])(image))
    assert torch.equal(pixels(grey, image)[0], transform(build("grey")[1][0])(image))


def test_a_palette_with_a_transparent_color_loses_only_its_transparency(rgb, photos):
    image = photos[0].quantize(16)
    image.info["transparency"] = 3
    assert torch.equal(pixels(rgb, image), pixels(rgb, image.convert("RGBA").convert("RGB")))


@pytest.fixture(scope="module")
def sixteen_bit(photos):
    """A photograph with 16 bits per channel and with 8: a step of the second is 257 steps of the first."""
    eight = photos[0].convert("L")
    return PIL.Image.fromarray(np.asarray(eight).astype(np.uint16) * 257), eight


def test_sixteen_bit_images_are_scaled_not_clipped(rgb, grey, sixteen_bit):
    deep, eight = sixteen_bit
    assert deep.mode == "I;16"
    for processor in (rgb, grey):
        assert torch.equal(pixels(processor, deep), pixels(processor, eight))
        assert torch.equal(
            pixels(processor, PIL.Image.fromarray(np.asarray(deep).astype(np.int32))), pixels(processor, eight)
        )


def test_a_sixteen_bit_file_and_array_are_scaled_too(grey, sixteen_bit, tmp_path):
    deep, eight = sixteen_bit
    deep.save(tmp_path / "deep.png")
    assert torch.equal(pixels(grey, str(tmp_path / "deep.png")), pixels(grey, eight))
    assert torch.equal(pixels(grey, np.asarray(deep)[None]), pixels(grey, eight))


def tiff(values) -> PIL.Image.Image:
    """What PIL reads of a TIFF with these values."""
    file = io.BytesIO()
    PIL.Image.fromarray(values).save(file, "TIFF")
    return PIL.Image.open(file)


EIGHT = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "values",
    [
        EIGHT.astype(np.float32) / 255,
        EIGHT.astype(np.float32),
        EIGHT.astype(np.uint16) * 257,
        EIGHT.astype(np.int32) * 257,
        EIGHT.astype(np.int32),
        (EIGHT.astype(np.float32) / 255) * np.float32(1 + 1e-6),  # rounding errors of some program
        (EIGHT.astype(np.float32) / 255) - np.float32(1e-6),
    ],
    ids=["floats to 1", "floats to 255", "16 bits", "32 bits", "8 of 32 bits", "a little above 1", "a little below 0"],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_tiffs_of_every_depth_show_the_same_image(values, mode):
    pixels = np.asarray(convert_image(tiff(values), mode))
    assert np.array_equal(pixels if mode == "L" else pixels[..., 2], EIGHT)


def test_every_sixteen_bit_value_is_rounded_to_the_nearest_of_eight_bits():
    values = np.arange(65_536).reshape(256, 256)
    for dtype in (np.uint16, np.int32):
        assert np.array_equal(np.asarray(convert_image(tiff(values.astype(dtype)), "L")), np.rint(values / 257))


def test_big_endian_tiffs_are_read_too():
    image = PIL.Image.frombytes("I;16B", (16, 16), (EIGHT.astype(">u2") * 257).tobytes())
    assert np.array_equal(np.asarray(convert_image(image, "L")), EIGHT)


@pytest.mark.parametrize(
    "values",
    [
        np.float32([[-1, 1]]),  # normalized to -1..1
        np.float32([[-2.1, 2.6]]),  # standardized
        np.float32([[0, 1.5]]),  # neither 0..1 nor 0..255
        np.float32([[0, 4095]]),
        np.float32([[0, np.nan]]),
        np.float32([[np.nan, np.nan]]),
        np.float32([[0, np.inf]]),
        np.int32([[-1024, 3000]]),  # Hounsfield units
        np.int32([[0, 2**31 - 1]]),
    ],
    ids=str,
)
def test_values_that_no_image_of_eight_or_sixteen_bits_has_are_refused(rgb, values):
    with pytest.raises(ValueError, match=r"its values \S+ to \S+ must be 0\.\.1, 0\.\.255 or 16 bits, not NaN"):
        convert_image(PIL.Image.fromarray(values), "RGB")
    with pytest.raises(ValueError, match="image 0 of the batch: its values"):
        pixels(rgb, PIL.Image.fromarray(values))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_with_an_exif_rotation_is_set_upright(rgb, photos, orientation):
    image, file = photos[1], io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image.save(file, "PNG", exif=exif)
    upright = {
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_270,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_90,
    }
    expected = image.transpose(upright[orientation]) if orientation > 1 else image
    assert torch.equal(pixels(rgb, PIL.Image.open(file)), pixels(rgb, expected))


# --- kinds of input -------------------------------------------------------------------------------------------------


def as_tensor(array):
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("make", [np.asarray, as_tensor])
def test_arrays_and_tensors_are_read_with_channels_first_or_last_in_bytes_or_floats(rgb, photos, make):
    expected = pixels(rgb, photos[0])
    array = np.asarray(photos[0])
    for variant in (array, array.transpose(2, 0, 1), (array / 255).astype(np.float32), array / 255):
        assert torch.equal(pixels(rgb, make(variant)), expected)
        assert torch.equal(rgb(make(variant))["pixel_values"], expected)  # one, without a list
        assert torch.equal(rgb(make(np.stack([variant] * 2)))["pixel_values"], torch.cat([expected] * 2))


@pytest.mark.parametrize("make", [np.asarray, as_tensor])
def test_gray_arrays_need_no_channel_axis(grey, photos, make):
    image = photos[0].convert("L")
    expected, array = pixels(grey, image), np.asarray(image)
    for variant in (array[None], array[:, :, None], array, (array / 255).astype(np.float32)):
        assert torch.equal(pixels(grey, make(variant)), expected)


def test_paths_are_read_alone_and_in_lists(rgb, photos, tmp_path):
    for n, photo in enumerate(photos[:2]):
        photo.save(tmp_path / f"{n}.png")
    expected, files = pixels(rgb, *photos[:2]), [tmp_path / "0.png", tmp_path / "1.png"]
    for kind in (str, Path):
        assert torch.equal(rgb([kind(file) for file in files])["pixel_values"], expected)
        assert torch.equal(rgb(kind(files[0]))["pixel_values"], expected[:1])


def test_one_image_is_a_batch_of_one_and_a_tuple_is_a_list(rgb, photos):
    assert torch.equal(rgb(photos[0])["pixel_values"], pixels(rgb, photos[0]))
    assert torch.equal(rgb(tuple(photos))["pixel_values"], pixels(rgb, *photos))


def test_numpy_comes_on_request(rgb, photos):
    actual = rgb(photos, return_tensors="np")["pixel_values"]
    assert isinstance(actual, np.ndarray) and np.array_equal(actual, pixels(rgb, *photos).numpy())


def like_jax(array):
    """An object that NumPy can read, and no more."""
    return type("Array", (), {"__array__": lambda self, dtype=None, copy=None: array})()


ALPHA = np.arange(64 * 72, dtype=np.uint32).reshape(64, 72, 1).astype(np.uint8)


@pytest.mark.parametrize("make", [np.asarray, as_tensor, like_jax])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "L"])
def test_an_array_shows_what_the_pil_image_of_it_shows(rgb, grey, build, photos, transform, make, mode):
    color = np.asarray(photos[0].resize((72, 64)).convert(mode[:-1] if mode.endswith("A") else mode))
    color = color if color.ndim == 3 else color[..., None]
    array = np.concatenate([color, ALPHA], axis=2) if mode.endswith("A") else color
    image = PIL.Image.fromarray(array[..., 0] if mode == "L" else array)
    assert image.mode == mode
    for processor, kind in ((rgb, "resnet18"), (grey, "grey")):
        expected = transform(build(kind)[1][0])(image)[None]
        for variant in (array, array.transpose(2, 0, 1), (array / 255).astype(np.float32)):
            assert torch.equal(pixels(processor, make(variant)), expected)


TENSOR_KINDS = {
    "bfloat16 to 255": lambda x: x.bfloat16(),
    "float16 to 255": lambda x: x.half(),
    "float32 to 255": lambda x: x.float(),
    "float16 to 1": lambda x: (x / 255).half(),
    "float64 to 1": lambda x: x.double() / 255,
    "with grad": lambda x: (x / 255).requires_grad_(),
    "result of a layer": lambda x: (x / 255).requires_grad_() * 1,
    "parameter in bfloat16": lambda x: torch.nn.Parameter(x.bfloat16()),
    "int16": lambda x: x.short(),
    "int32": lambda x: x.int(),
    "int64": lambda x: x.long(),
    "uint16": lambda x: (x.int() * 257).to(torch.uint16),
    "16 bits in int32": lambda x: x.int() * 257,
    "not contiguous": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[None].expand(2, -1, -1, -1)[1],
    "image of torchvision": lambda x: tv_tensors.Image(x),
    "mean of two": lambda x: (x.float() + x.float()) / 2,
}


@pytest.mark.parametrize("name", TENSOR_KINDS)
def test_tensors_of_every_kind_show_the_same_image(rgb, photos, name):
    tensor = as_tensor(np.asarray(photos[0]).transpose(2, 0, 1))
    expected, variant = pixels(rgb, photos[0]), TENSOR_KINDS[name](tensor)
    actual = pixels(rgb, variant)
    assert torch.equal(actual, expected) and not actual.requires_grad
    assert torch.equal(rgb(torch.stack([variant, variant]))["pixel_values"], torch.cat([expected] * 2))


ARRAY_KINDS = {
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape),
    "every other column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "upside down twice": lambda x: x[::-1].copy()[::-1],
    "Fortran order": np.asfortranarray,
    "masked": np.ma.masked_array,
    "big-endian": lambda x: (x.astype(np.uint16) * 257).astype(">u2"),
    "float16": lambda x: x.astype(np.float16),
    "longdouble": lambda x: x / np.longdouble(255),
    "uint64": lambda x: x.astype(np.uint64),
}


@pytest.mark.parametrize("name", ARRAY_KINDS)
def test_arrays_of_every_kind_show_the_same_image(rgb, photos, name):
    assert torch.equal(pixels(rgb, ARRAY_KINDS[name](np.asarray(photos[0]))), pixels(rgb, photos[0]))


def test_bfloat16_of_other_libraries_is_read(rgb, photos):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert torch.equal(pixels(rgb, np.asarray(photos[0]).astype(ml_dtypes.bfloat16)), pixels(rgb, photos[0]))


@pytest.mark.parametrize("make", [np.asarray, as_tensor])
def test_a_mask_is_black_and_white(grey, make):
    mask = np.arange(64).reshape(8, 8) % 3 == 0
    assert torch.equal(pixels(grey, make(mask)), pixels(grey, PIL.Image.fromarray(np.uint8(mask) * 255)))


def test_where_the_channels_are_can_be_said(rgb, photos):
    array = np.asarray(photos[0].resize((40, 3)))  # 3 pixels high: read as three channels by default
    expected = pixels(rgb, PIL.Image.fromarray(array))
    assert not torch.equal(pixels(rgb, array), expected)
    assert torch.equal(pixels(rgb, array, input_data_format="channels_last"), expected)
    assert torch.equal(pixels(rgb, array.transpose(2, 0, 1), input_data_format="channels_first"), expected)


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (np.zeros((8, 8, 5), np.uint8), r"shape \(8, 8, 5\) is not an image; give 1 to 4 channels"),
        (np.zeros((8, 8), np.complex64), "ndarray is not an image"),
        (np.array([["a", "b"]]), "ndarray is not an image"),
        (np.zeros((0, 5, 3), np.float32), "ndarray is not an image"),
        (np.full((8, 8), 70_000), "its values 70000 to 70000"),
        (np.full((8, 8), -3, np.int16), "its values -3 to -3"),
        (torch.full((3, 8, 8), 300.0), "its values 300 to 300"),
        (torch.full((3, 8, 8), torch.nan, dtype=torch.bfloat16), "NaN"),
        (b"bytes of a file", "bytes is not an image"),
    ],
    ids=str,
)
def test_arrays_that_are_no_images_are_refused(rgb, bad, what):
    with pytest.raises(ValueError, match=f"image 0 of the batch: .*{what}"):
        rgb([bad])


# --- settings of a call ---------------------------------------------------------------------------------------------


def test_settings_that_change_nothing_are_taken(rgb, photos):
    settings = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    settings |= {"do_center_crop": True, "do_convert_rgb": True, "do_pad": False, "disable_grouping": True}
    settings |= {"data_format": "channels_first", "device": "cpu"}
    expected = pixels(rgb, *photos)
    assert torch.equal(rgb(images=photos, **settings)["pixel_values"], expected)
    unset = dict.fromkeys([*settings, "return_tensors", "size", "image_mean", "crop_size", "segmentation_maps"])
    assert torch.equal(rgb(photos, **unset)["pixel_values"], expected)


@pytest.mark.parametrize(
    "setting",
    [
        {"do_normalize": False},
        {"do_center_crop": False},
        {"do_convert_rgb": False},
        {"do_pad": True},
        {"rescale_factor": 1},
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_std": np.ones(3)},
        {"crop_size": 32},
        {"resample": 3},
        {"data_format": "channels_last"},
        {"interpolation": "nearest"},
        {"segmentation_maps": [1]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_would_change_the_pixels_are_refused_with_the_reason(rgb, photos, tmp_path, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}=.* cannot be set, since the config fixes what members see"):
        rgb(photos, **setting)
    if name != "segmentation_maps":  # no setting of a processor
        rgb.save_pretrained(tmp_path)
        for load in (ConcatEnsembleImageProcessor.from_pretrained, AutoImageProcessor.from_pretrained):
            with pytest.raises(ValueError, match=f"{name}=.* cannot be set"):
                load(tmp_path, **setting)


def test_images_of_the_right_size_need_not_be_resized(rgb, photos):
    normalize = timm.data.create_transform((3, 64, 64), mean=rgb.image_mean, std=rgb.image_std).transforms[-1]
    image = photos[0].resize((64, 64))
    expected = normalize(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255)
    for kind in (image, np.asarray(image), (np.asarray(image) / 255).astype(np.float32)):
        assert torch.equal(pixels(rgb, kind, do_resize=False)[0], expected)
    with pytest.raises(ValueError, match="image 1 of the batch: do_resize=False needs images of 64x64 pixels"):
        rgb([image, photos[0]], do_resize=False)


def test_images_that_are_not_to_be_rescaled_must_be_floats_up_to_one(rgb, photos):
    array = np.asarray(photos[0])
    assert torch.equal(pixels(rgb, (array / 255).astype(np.float32), do_rescale=False), pixels(rgb, photos[0]))
    assert torch.equal(pixels(rgb, torch.from_numpy(array / 255), do_rescale=False), pixels(rgb, photos[0]))
    for bad in (array, array.astype(np.float32), photos[0], torch.from_numpy(array.copy())):
        with pytest.raises(ValueError, match=r"do_rescale=False needs an array of floats in 0\.\.1"):
            rgb(bad, do_rescale=False)


def test_pixels_are_put_on_a_device(rgb, photos):
    actual = rgb(photos, device="meta")["pixel_values"]
    assert actual.device.type == "meta" and actual.shape == (5, 3, 64, 64)
    assert rgb(photos, device=torch.device("cpu"))["pixel_values"].device.type == "cpu"


@pytest.mark.parametrize("name", ["resnet18", "deit", "swin", "convnext"])
@pytest.mark.parametrize("size", [96, {"height": 48, "width": 80}, (40, 72)], ids=str)
def test_another_size_is_timms_transform_of_that_size(build, photos, tmp_path, name, size):
    model, _ = build(name)
    processor, settings = processor_of(model), dict(model.config.geometries[0])
    height, width = (size, size) if isinstance(size, int) else size.values() if isinstance(size, dict) else size
    del settings["image_mode"]
    alone = timm.data.create_transform(**settings | {"input_size": (3, height, width)}, is_training=False)
    expected = torch.stack([alone(photo) for photo in photos])
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, size=size)
    assert loaded.size == {"height": height, "width": width} and torch.equal(pixels(loaded, *photos), expected)
    assert torch.equal(pixels(processor, *photos, size=size), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = ConcatEnsembleImageProcessor.from_pretrained(tmp_path / "again")
    assert again.size == loaded.size and torch.equal(pixels(again, *photos), expected)


def test_sizes_that_members_cannot_share_are_refused(build, rgb, photos):
    several = processor_of(build("resnet18", "vit-tiny")[0])
    with pytest.raises(ValueError, match=r"size=64 cannot be set: members resize and crop in 2 ways"):
        several(photos, size=64)
    for bad, what in (({"shortest_edge": 64}, "height and width"), (0, "input_size"), ("x", "size"), (5000, "4,096")):
        with pytest.raises(ValueError, match=what):
            rgb(photos, size=bad)


def test_what_scripts_read_of_a_processor(rgb, build):
    preprocessing = build("resnet18")[0].config.members[0]["preprocessing"]
    assert rgb.size == {"height": 64, "width": 64}
    assert (rgb.image_mean, rgb.image_std) == (preprocessing["mean"], preprocessing["std"])
    with pytest.raises(AttributeError):
        rgb.size = 32  # would change nothing


# --- what is refused ------------------------------------------------------------------------------------------------


def nan_array():
    array = np.full((8, 8, 3), 0.5, np.float32)
    array[3, 4, 1] = np.nan
    return array


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (PIL.Image.new("RGB", (1, 1)), "1x1"),
        (PIL.Image.new("I;16", (1, 1)), "1x1"),
        (PIL.Image.fromarray(np.array([[0.1, np.nan]], np.float32)), "NaN"),
        (PIL.Image.fromarray(np.array([[0.1, np.inf]], np.float32)), "infinite"),
    ],
)
def test_the_error_for_a_bad_image_names_its_number_in_the_batch(rgb, photos, bad, what):
    with pytest.raises(ValueError, match=rf"image 2 of the batch: .*{what}"):
        rgb([photos[0], photos[1], bad])


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (nan_array(), "NaN"),
        (torch.from_numpy(nan_array()), "NaN"),
        (-nan_array(), "NaN"),
        (np.full((8, 8, 3), np.inf), "infinite"),
        (np.full((8, 8, 3), -1.0), r"\[0, 1\]|between|range|-1"),
        (np.zeros((3, 1, 1), np.uint8), "1x1"),
    ],
)
def test_the_error_for_a_bad_array_names_its_number_in_the_batch(rgb, photos, bad, what):
    good = np.asarray(photos[0])
    with pytest.raises(ValueError, match=rf"image 1 of the batch: .*({what})"):
        rgb([torch.from_numpy(good.copy()) if isinstance(bad, torch.Tensor) else good, bad])


def test_the_error_names_a_file_that_cannot_be_read(rgb, photos, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    photos[0].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:5000])
    for name in ("text.png", "cut.png", "missing.png"):
        with pytest.raises((ValueError, OSError), match=name):
            rgb([str(tmp_path / name)])


def test_the_error_for_a_truncated_file_names_its_number_in_the_batch(rgb, photos):
    file = io.BytesIO()
    photos[0].save(file, "PNG")
    with pytest.raises(ValueError, match=r"image 1 of the batch: .*truncated"):
        rgb([photos[0], PIL.Image.open(io.BytesIO(file.getvalue()[:5000]))])


@pytest.mark.parametrize("bad", [None, 3, [], [None], ["", 3]])
def test_inputs_other_than_images_are_refused(rgb, bad):
    with pytest.raises((ValueError, OSError)):
        rgb(bad)


def test_settings_that_would_change_what_members_see_are_refused(rgb, photos):
    with pytest.raises(ValueError, match="do_resize"):
        rgb(photos, do_resize=False)


def test_a_processor_needs_geometries():
    with pytest.raises(ValueError, match="from_config"):
        ConcatEnsembleImageProcessor()


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("resnet18",), ("grey",), MIXED])
def test_a_processor_can_be_saved_and_pickled(build, photos, tmp_path, kinds):
    model, _ = build(*kinds)
    processor = processor_of(model)
    expected = pixels(processor, *photos)
    processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)  # names the class of the processor
    for again in (
        ConcatEnsembleImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(processor)),  # for the workers of a DataLoader
    ):
        assert type(again) is ConcatEnsembleImageProcessor and torch.equal(pixels(again, *photos), expected)


def test_preprocessor_config_holds_only_the_geometries(build, tmp_path):
    model, _ = build("resnet18", "grey")
    processor_of(model).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["geometries"] == model.config.geometries and not any(key.startswith("_") for key in saved)
    assert len(list(tmp_path.glob("*.py"))) == 4


def test_the_payload_is_not_copied_over_itself():
    here = Path(inspect.getfile(ConcatEnsembleConfig)).parent
    copy_payload(here)
    assert all(path.stat().st_size for path in here.glob("*.py"))


# --- a processor of its own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("resnet18",), MIXED])
def test_a_processor_saved_alone_is_loaded_by_the_auto_classes(build, photos, tmp_path, kinds):
    processor = processor_of(build(*kinds)[0])
    expected = pixels(processor, *photos)
    (file,) = processor.save_pretrained(tmp_path)
    for load in (AutoImageProcessor.from_pretrained, AutoProcessor.from_pretrained):
        again = load(tmp_path)
        assert type(again) is ConcatEnsembleImageProcessor and again.to_dict() == processor.to_dict()
        assert torch.equal(pixels(again, *photos), expected) and repr(again) == repr(processor)
    for again in (
        ConcatEnsembleImageProcessor.from_json_file(file),
        ConcatEnsembleImageProcessor.from_dict(processor.to_dict()),
        ConcatEnsembleImageProcessor(**json.loads(processor.to_json_string())),
    ):
        assert torch.equal(pixels(again, *photos), expected)


def test_an_ensemble_saved_over_a_lone_processor_names_the_class_alone(build, tmp_path):
    model, _ = build("resnet18")
    file = tmp_path / "preprocessor_config.json"
    processor_of(model).save_pretrained(tmp_path)
    assert json.loads(file.read_text())["image_processor_type"] == "ConcatEnsembleImageProcessor"
    model.save_pretrained(tmp_path)
    assert set(json.loads(file.read_text())) == {"geometries"}
    processor_of(model).save_pretrained(tmp_path)
    assert set(json.loads(file.read_text())) == {"geometries"}
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')  # another model's, which names another class
    processor_of(model).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is ConcatEnsembleImageProcessor


def test_a_pipeline_with_a_lone_processor_does_not_ask_whether_to_trust_code(build, photos, tmp_path, monkeypatch):
    model, _ = build("resnet18", "resnet50")
    model.save_pretrained(tmp_path / "ensemble")
    processor_of(model).save_pretrained(tmp_path / "alone")
    shutil.copytree(tmp_path / "ensemble", tmp_path / "pushed")  # what `processor.push_to_hub` makes of a repo
    shutil.copy(tmp_path / "alone" / "preprocessor_config.json", tmp_path / "pushed")
    questions = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "n")
    with torch.no_grad():
        expected = model(**processor_of(model)(photos[0])).pooler_output
    for settings in (
        {"model": str(tmp_path / "pushed")},
        {"model": str(tmp_path / "ensemble"), "image_processor": str(tmp_path / "alone")},
    ):
        extract = pipeline("image-feature-extraction", **settings)
        close(torch.tensor(extract(photos[0])), expected)
    # Arguments for the model reach the processor too, and are none of its own.
    part = pipeline("image-feature-extraction", model=str(tmp_path / "pushed"), model_kwargs={"active_members": [1]})
    close(torch.tensor(part(photos[0])), expected[:, model.config.members[0]["num_features"] :])
    assert not questions


def test_arguments_of_others_are_returned_as_unused(rgb, tmp_path):
    rgb.save_pretrained(tmp_path)
    processor, unused = AutoImageProcessor.from_pretrained(tmp_path, foo=1, size=None, return_unused_kwargs=True)
    assert unused == {"foo": 1} and processor.to_dict() == rgb.to_dict()


def test_settings_of_a_call_are_refused_at_loading(rgb, tmp_path):
    rgb.save_pretrained(tmp_path)
    for setting in ({"do_resize": False}, {"do_rescale": False}, {"device": "cpu"}, {"return_tensors": "np"}):
        with pytest.raises(ValueError, match=r"cannot be set, .*; pass it when you call the processor"):
            AutoImageProcessor.from_pretrained(tmp_path, **setting)
    for change in ({"mean": [0, 0, 0]}, {"crop_pct": 1.0}, {"input_size": [3, 8, 8]}, {"geometries": [{}]}):
        with pytest.raises(ValueError, match=next(iter(change))):
            AutoImageProcessor.from_pretrained(tmp_path, **change)
