"""Members that see named channels of an image: more than three, some of many, and RGB ones beside them."""

import io
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tifffile
import timm
import torch
from transformers import AutoImageProcessor, pipeline

from concat_ensemble import (
    ConcatEnsembleConfig,
    ConcatEnsembleForImageClassification,
    ConcatEnsembleImageProcessor,
    ConcatEnsembleModel,
    assemble,
)
from concat_ensemble.inference.export import export_onnx, export_program
from concat_ensemble.modeling.configuration_concat_ensemble import validate_preprocessing
from concat_ensemble.modeling.image_processing_concat_ensemble import read_channels

SMALL = {"channels": (4, 4, 8, 8), "stem_width": 4, "num_classes": 0}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROPS = [("center", 0.875), ("center", 1.2), ("squash", 1.0), ("border", 0.9)]
FORMATS = ("channels_first", "channels_last")


def network(in_chans=3, seed=0, **pixels):
    """timm's own small ResNet for 32x32 pixels."""
    overlay = {"input_size": (3, 32, 32), "crop_pct": 0.9, **pixels}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model("resnet10t", in_chans=in_chans, pretrained_cfg_overlay=overlay, **SMALL).eval()


def pixels_of(in_chans=4, channels=None, **settings) -> dict:
    channels = list(range(in_chans)) if channels is None else channels
    usual = {"input_size": (in_chans, 32, 32), "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    moments = {"mean": [0.1 * (n + 1) for n in range(in_chans)], "std": [0.3] * in_chans}
    return usual | moments | {"image_mode": "channels", "channels": channels} | settings


def processor(*preprocessings) -> ConcatEnsembleImageProcessor:
    members = [
        {
            "architecture": "resnet10t",
            "model_args": {"in_chans": each["input_size"][0]},
            "num_features": 8,
            "preprocessing": each,
        }
        for each in preprocessings
    ]
    return ConcatEnsembleImageProcessor.from_config(ConcatEnsembleConfig(members=members))


def processor_of(model):
    return ConcatEnsembleImageProcessor.from_config(model.config)


def timm_transform(preprocessing):
    settings = {key: value for key, value in preprocessing.items() if key not in ("image_mode", "channels")}
    return timm.data.create_transform(**settings, is_training=False)


@pytest.fixture(scope="module")
def bands(photos) -> np.ndarray:
    """(H, W, 4) uint8: a photograph, and a fourth channel."""
    image = np.asarray(photos[0])[:120, :150]
    return np.concatenate([image, 255 - image[::-1, :, :1]], axis=2)


@pytest.fixture(scope="module")
def sentinel() -> np.ndarray:
    """(40, 48, 13) uint16 that use 12 bits, as satellites' reflectances do."""
    smooth = np.random.default_rng(0).integers(0, 4096, (10, 12, 13)).repeat(4, axis=0).repeat(4, axis=1)
    return smooth.astype(np.uint16)


# --- timm's pixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize(("crop_mode", "crop_pct"), CROPS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_an_rgb_member_given_an_array_of_four_channels_sees_timms_pixels_of_the_rgb_image(
    bands, crop_mode, crop_pct, interpolation, size
):
    geometry = {"crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation, "mean": MEAN, "std": STD}
    seen = pixels_of(3, **geometry, input_size=(3, *size))
    for channels in ([0, 1, 2], [3, 2, 0]):
        expected = timm_transform(seen)(PIL.Image.fromarray(np.ascontiguousarray(bands[..., channels])))
        actual = processor(seen | {"channels": channels})(bands)["pixel_values"]
        assert torch.equal(actual[0], expected)


def test_every_member_of_a_mixed_ensemble_gives_timms_features(bands):
    """A gray, an RGB and a BGR one, near infrared alone, three times near infrared, and all four channels."""
    networks = [network(1, 1), network(3, 2), network(3, 3), network(1, 4), network(3, 5), network(4, 6)]
    chosen = [None, None, [2, 1, 0], [3], [3, 3, 3], None]
    mean = (0.2, 0.3, 0.4, 0.5)
    members = [
        assemble(each, channels=numbers, mean=mean[: each.conv1[0].in_channels])
        for each, numbers in zip(networks, chosen, strict=True)
    ]
    ensemble = assemble(members)
    assert ensemble.config.pixel_shape == (3, 4, 32, 32)  # gray, RGB, and one slice for all that name their channels
    parts = ensemble(**processor_of(ensemble)(bands), output_member_features=True).member_features
    rgb = PIL.Image.fromarray(bands[..., :3].copy())
    for part, each, member in zip(parts, networks, members, strict=True):
        (seen,) = (spec["preprocessing"] for spec in member.config.members)
        transform = timm_transform(seen)
        if "channels" in seen:
            images = [PIL.Image.fromarray(np.ascontiguousarray(bands[..., n])) for n in seen["channels"]]
            one = [
                timm_transform(seen | {"input_size": (1, 32, 32), "mean": [m], "std": [s]})(image)
                for image, m, s in zip(images, seen["mean"], seen["std"], strict=True)
            ]
            expected = torch.cat(one)
        else:
            expected = transform(rgb.convert(seen["image_mode"]))
        torch.testing.assert_close(part, each(expected[None]), atol=1e-5, rtol=0)


def test_a_member_sees_the_same_alone_and_in_any_ensemble(sentinel):
    """Its stored features serve every ensemble that has it."""
    members = [
        assemble(network(3, 0), channels=[3, 2, 1]),
        assemble(network(13, 1)),
        assemble(network(2, 2), channels=[7, 12]),
    ]
    together = assemble(members)
    assert together.config.pixel_shape == (13, 32, 32)
    assert together.config.geometries[0]["channels"] == [3, 2, 1, 0, *range(4, 13)]
    parts = together(**processor_of(together)(sentinel), output_member_features=True).member_features
    for part, member in zip(parts, members, strict=True):
        alone = member(**processor_of(member)(sentinel)).pooler_output
        torch.testing.assert_close(part, alone, atol=1e-6, rtol=0)


def test_members_without_names_keep_their_pixels_beside_those_with_names(bands):
    plain, four = network(3, 0), network(4, 1)
    together = assemble([plain, four])
    rgb = PIL.Image.fromarray(bands[..., :3].copy())
    expected = processor_of(assemble(plain))(rgb)["pixel_values"]
    for image in (bands, bands.transpose(2, 0, 1), torch.from_numpy(bands)):
        actual = processor_of(together)(image)["pixel_values"]
        assert actual.shape == (1, 2, 4, 32, 32)
        assert torch.equal(actual[:, 0, :3], expected) and not actual[:, 0, 3].any()


@pytest.mark.parametrize("in_chans", [2, 4, 13, 32])
def test_networks_of_other_numbers_of_channels_are_members(in_chans, tmp_path):
    model = assemble([network(in_chans), network(3)])
    image = np.random.default_rng(0).random((40, 50, in_chans), dtype=np.float32)
    seen = model.config.members[0]["preprocessing"]
    assert seen["channels"] == list(range(in_chans)) and seen["input_size"] == [in_chans, 32, 32]
    named = assemble([network(in_chans), assemble(network(3), channels=[1, 0, 1])])
    features = named(**processor_of(named)(image)).pooler_output
    named.save_pretrained(tmp_path)
    again = ConcatEnsembleModel.from_pretrained(tmp_path)
    assert torch.equal(again(**AutoImageProcessor.from_pretrained(tmp_path)(image)).pooler_output, features)


def test_a_pretrained_stem_that_timm_adapts_is_taken_as_it_is():
    """timm repeats the weights of a stem for three channels over others."""
    adapted = network(4)
    model = assemble(adapted)
    assert torch.equal(model.members["0"].conv1[0].weight, adapted.conv1[0].weight)
    # timm takes the average of the mean and std for all channels, where these are other than three.
    seen, timms = model.config.members[0]["preprocessing"], timm.data.model_config.resolve_input_data_config(adapted)
    assert seen["mean"] == [*timms["mean"]] * (4 // len(timms["mean"])) == pytest.approx([np.mean(MEAN)] * 4)


# --- units ----------------------------------------------------------------------------------------------------------


def resize_exactly(values: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(values).resize((size, size), PIL.Image.Resampling.BILINEAR))


def test_sixteen_bits_and_floats_keep_their_precision():
    values = np.random.default_rng(0).integers(500, 520, (64, 64, 2)).astype(np.uint16)  # one step of 8 bits
    seen = pixels_of(2, mean=[0.0, 0.0], std=[1.0, 1.0], crop_pct=1.0, interpolation="bilinear")
    expected = [resize_exactly(values[..., n].astype(np.float32), 32) for n in range(2)]
    deep = processor(seen)(values)["pixel_values"][0].numpy()
    assert np.allclose(deep * 65_535, expected, atol=1e-3) and len(np.unique(deep)) > 500
    floats = processor(seen)(values.astype(np.float32) * 3)["pixel_values"][0].numpy()
    assert np.allclose(floats, np.multiply(expected, 3), atol=1e-3)


def test_eight_bits_and_the_same_in_sixteen_differ_by_rounding_alone(bands):
    seen = pixels_of(4, std=[1.0] * 4)
    eight, sixteen = (processor(seen)(image)["pixel_values"] for image in (bands, bands.astype(np.uint16) * 257))
    assert (eight - sixteen).abs().mean() < 0.5 / 255
    low, high = (sixteen + torch.tensor(seen["mean"])[:, None, None]).aminmax()
    assert low > -1e-6 and high < 1 + 1e-6  # cut off where resizing overshoots, as 8 bits are


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_in_border_mode_the_border_has_each_channels_mean(dtype):
    seen = pixels_of(2, crop_mode="border", crop_pct=1.0, mean=[0.25, 0.0101], std=[0.01, 0.01])
    actual = processor(seen)(np.ones((16, 32, 2), dtype))["pixel_values"][0]
    # Pillow's border has 8 bits for images of 8 bits.
    assert actual[:, [*range(7), *range(25, 32)]].abs().max() < (0.2 if dtype == np.uint8 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint16])
def test_tensors_of_other_types_are_taken(dtype):
    values = torch.arange(8 * 9 * 2).reshape(8, 9, 2).remainder(50).to(dtype)
    scale = 65_535 if dtype == torch.uint16 else 1
    seen = processor(pixels_of(2, interpolation="bilinear"))  # which does not overshoot
    expected = seen(values.to(torch.float32).numpy() / np.float32(scale))["pixel_values"]
    torch.testing.assert_close(seen(values)["pixel_values"], expected)


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint32", "bool"])
def test_types_without_a_unit_are_refused_with_the_way_out(dtype):
    with pytest.raises(ValueError, match=rf"its pixels are {dtype}; give uint8, uint16, or floats in the units"):
        processor(pixels_of(2))(np.ones((8, 9, 2), dtype))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named_with_its_channel_if_a_member_sees_it(bad):
    image = np.ones((8, 9, 4), np.float32)
    image[2, 3, 2] = bad
    with pytest.raises(ValueError, match="image 0 of the batch: channel 2 has pixels that are NaN or infinite"):
        processor(pixels_of(4))(image)
    assert processor(pixels_of(2, [0, 3]))(image)["pixel_values"].isfinite().all()


# --- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [np.asarray, lambda array: torch.from_numpy(array.copy())])
@pytest.mark.parametrize(
    ("shape", "channels"),
    [((64, 64), 13), ((8, 8), 4), ((8, 8), 13), ((40, 20), 4), ((20, 13), 4), ((9, 9), 31), ((8, 9), 6)],
)
def test_the_axis_of_the_channels_is_found(make, shape, channels):
    last = np.random.default_rng(0).integers(0, 255, (*shape, channels)).astype(np.uint8)
    seen = processor(pixels_of(channels))
    expected = seen(last, input_data_format="channels_last")["pixel_values"]
    first = last.transpose(2, 0, 1)
    for image in (last, first):
        assert torch.equal(seen(make(image))["pixel_values"], expected)
        assert torch.equal(seen(make(np.stack([image] * 2)))["pixel_values"], torch.cat([expected] * 2))
    assert torch.equal(seen(make(first), input_data_format="channels_first")["pixel_values"], expected)


def test_a_member_that_sees_few_of_many_channels_finds_them_too():
    """Patches of hyperspectral images have more bands than pixels a side."""
    few = np.random.default_rng(0).integers(0, 255, (8, 9, 4)).astype(np.uint16)
    seen = processor(pixels_of(2, [2, 0]))
    assert torch.equal(seen(few)["pixel_values"], seen(few.transpose(2, 0, 1))["pixel_values"])
    image = np.random.default_rng(0).integers(0, 255, (9, 9, 200)).astype(np.uint16)
    seen = processor(pixels_of(3, [199, 50, 20]))
    assert torch.equal(seen(image)["pixel_values"], seen(image.transpose(2, 0, 1))["pixel_values"])
    expected = processor(pixels_of(3))(image[..., [199, 50, 20]])["pixel_values"]
    assert torch.equal(seen(image)["pixel_values"], expected)


@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 9, 4), (9, 11, 8), (9, 11, 200)])
def test_a_shape_that_leaves_the_axis_open_needs_the_data_format(shape):
    seen = processor(pixels_of(4))
    with pytest.raises(ValueError, match=r"leaves open which axis has the .*pass input_data_format='channels_first'"):
        seen(np.ones(shape, np.uint8))
    image = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    first, last = (seen(image, input_data_format=name)["pixel_values"] for name in FORMATS)
    assert not torch.equal(first, last)
    assert torch.equal(last, seen(image.transpose(2, 0, 1), input_data_format=FORMATS[0])["pixel_values"])


def test_an_unknown_data_format_is_refused():
    with pytest.raises(ValueError, match=r"input_data_format='HWC' must be channels_first or channels_last"):
        processor(pixels_of(4))(np.ones((9, 9, 4), np.uint8), input_data_format="HWC")


# --- files ----------------------------------------------------------------------------------------------------------


def tiff(array, **options) -> io.BytesIO:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file


GRAY = {"photometric": "minisblack"}
TIFFS = {
    "pages": (True, GRAY),
    "planes": (True, GRAY | {"planarconfig": "separate"}),
    "samples": (False, GRAY | {"planarconfig": "contig"}),
    "deflated samples": (False, GRAY | {"planarconfig": "contig", "compression": "zlib"}),
    "tiles": (False, GRAY | {"planarconfig": "contig", "tile": (16, 16)}),
    "big-endian pages": (True, GRAY | {"byteorder": ">"}),
    "BigTIFF": (False, GRAY | {"planarconfig": "contig", "bigtiff": True}),
    "ImageJ": (True, {"imagej": True}),
    "OME": (True, {"ome": True}),
}


@pytest.mark.parametrize("layout", TIFFS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("count", [2, 4, 5, 13])
def test_tiffs_of_every_layout_give_all_channels_at_full_depth(layout, dtype, count, sentinel):
    first, options = TIFFS[layout]
    image = (sentinel[..., :count] % (256 if dtype == np.uint8 else 4096)).astype(dtype)
    file = tiff(np.ascontiguousarray(image.transpose(2, 0, 1) if first else image), **options)
    channels = read_channels(file, count)
    assert channels.dtype == dtype and np.array_equal(channels, image.transpose(2, 0, 1))


@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_fourth_sample_of_a_color_tiff_is_a_channel_whatever_its_name(bands, dtype, extra):
    image = bands.astype(dtype) * (257 if dtype == np.uint16 else 1)
    file = tiff(image, photometric="rgb", extrasamples=[extra])
    assert np.array_equal(read_channels(file, 4), image.transpose(2, 0, 1))


def test_paths_open_files_and_pil_images_are_read_alike(bands, tmp_path):
    path, seen = tmp_path / "bands.tif", processor(pixels_of(4))
    pages = [PIL.Image.fromarray(bands[..., n].astype(np.uint16) * 257) for n in range(4)]
    pages[0].save(path, save_all=True, append_images=pages[1:], compression="tiff_lzw")
    expected = seen(bands.astype(np.uint16) * 257)["pixel_values"]
    for image in (path, str(path), path.open("rb"), PIL.Image.open(path), io.BytesIO(path.read_bytes())):
        assert torch.equal(seen([image])["pixel_values"], expected)
        assert torch.equal(seen([image])["pixel_values"], expected)  # twice
    tifffile.imwrite(path, bands.astype(np.uint16) * 257, photometric="rgb")
    assert torch.equal(seen([path, PIL.Image.open(path)])["pixel_values"], torch.cat([expected] * 2))


def test_the_bands_of_a_png_are_channels_and_other_color_modes_are_rgb(bands):
    rgba = PIL.Image.fromarray(bands)
    assert np.array_equal(read_channels(rgba, 4), bands.transpose(2, 0, 1))
    for mode in ("CMYK", "P", "YCbCr"):
        image = rgba.convert("RGB").convert(mode)
        assert np.array_equal(read_channels(image), np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        with pytest.raises(ValueError, match="it has 3 channels, and members see channels up to number 3"):
            processor(pixels_of(4))(image)


def test_a_tiff_that_lies_on_its_side_is_set_upright_or_refused(bands):
    gray, file = PIL.Image.fromarray(bands[..., 0]), io.BytesIO()
    gray.save(file, "TIFF", save_all=True, append_images=[gray], tiffinfo={274: 6})
    assert np.array_equal(read_channels(file, 2)[1], np.rot90(bands[..., 0], -1))
    file = tiff(bands.astype(np.uint16), photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    with pytest.raises(ValueError, match=r"tifffile cannot read it.*its orientation is not upright"):
        read_channels(file, 4)


def test_pages_that_are_no_channels_are_refused(bands):
    large, small, file = PIL.Image.fromarray(bands[..., 0]), PIL.Image.new("L", (9, 9)), io.BytesIO()
    large.save(file, "TIFF", save_all=True, append_images=[small])
    with pytest.raises(
        ValueError, match=r"its pages have the shapes .*save one gray page of one size for each channel"
    ):
        read_channels(file)
    color, file = PIL.Image.fromarray(bands[..., :3].copy()), io.BytesIO()
    color.save(file, "TIFF", save_all=True, append_images=[color])
    with pytest.raises(ValueError, match="save one gray page of one size"):
        read_channels(file)


@pytest.mark.parametrize("layout", ["pages", "samples"])
def test_a_tiff_that_would_fill_the_memory_is_refused(layout, sentinel, monkeypatch):
    first, options = TIFFS[layout]
    file = tiff(np.ascontiguousarray(sentinel.transpose(2, 0, 1) if first else sentinel), **options)
    assert read_channels(file).shape == (13, 40, 48)
    monkeypatch.setitem(read_channels.__globals__, "MAX_IMAGE_PIXELS", sentinel.size - 1)
    with pytest.raises(ValueError, match="too large"):
        read_channels(file)


@pytest.mark.parametrize("length", [8, 200, 3000])
def test_a_cut_tiff_is_an_error_of_one_line(sentinel, length):
    whole = tiff(sentinel, **GRAY, planarconfig="contig").getvalue()
    with pytest.raises(ValueError) as error:
        processor(pixels_of(13))([io.BytesIO(whole[:length])])
    assert "\n" not in str(error.value) and "image 0 of the batch" in str(error.value)


def test_without_tifffile_the_error_says_what_to_install(sentinel, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"needs tifffile: pip install"):
        read_channels(tiff_samples(sentinel))
    pages, file = [PIL.Image.fromarray(sentinel[..., n]) for n in range(13)], io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(read_channels(file, 13), sentinel.transpose(2, 0, 1))


def tiff_samples(image):
    """A TIFF as geographers write it: all bands of a pixel side by side."""
    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tifffile", tifffile)
        tifffile.imwrite(file, image, photometric="minisblack", planarconfig="contig")
    return file


# --- settings of a call --------------------------------------------------------------------------------------------


def test_channels_of_the_right_size_need_no_resizing():
    image = np.random.default_rng(0).random((32, 32, 4), dtype=np.float32)
    actual = processor(pixels_of(4))(image, do_resize=False, do_rescale=False)["pixel_values"][0]
    mean = torch.tensor(pixels_of(4)["mean"])
    torch.testing.assert_close(actual, ((torch.from_numpy(image) - mean) / 0.3).permute(2, 0, 1))
    with pytest.raises(ValueError, match="do_resize=False needs images of 32x32 pixels, not 30x31"):
        processor(pixels_of(4))(image[:31, :30], do_resize=False)
    with pytest.raises(ValueError, match="do_rescale=False needs an array of floats"):
        processor(pixels_of(4))(image.astype(np.uint8), do_rescale=False)


def test_another_size_holds_for_channels_too(bands):
    expected = processor(pixels_of(4, input_size=(4, 48, 24)))(bands)["pixel_values"]
    actual = processor(pixels_of(4))(bands, size={"height": 48, "width": 24})["pixel_values"]
    assert torch.equal(actual, expected)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        np.ones((64, 64, 3), np.uint8),
        np.ones((3, 50, 64), np.uint8),
        np.ones((64, 64), np.uint8),
        PIL.Image.new("RGB", (64, 64)),
        PIL.Image.new("L", (64, 64)),
    ],
    ids=["array", "channels first", "gray", "RGB", "L"],
)
def test_too_few_channels_are_an_error_that_says_how_many(image):
    given = 1 if getattr(image, "mode", "") == "L" or getattr(image, "ndim", 0) == 2 else 3
    with pytest.raises(ValueError, match=rf"it has {given} channels, and members see channels up to number 3; give"):
        processor(pixels_of(4))(image)


def test_a_pipeline_hands_over_rgb_which_is_too_little(tmp_path):
    model = ConcatEnsembleForImageClassification(
        ConcatEnsembleConfig(members=assemble(network(4)).config.members, num_labels=2)
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it has 3 channels, and members see channels up to number 3"):
        pipeline("image-classification", model=str(tmp_path))(PIL.Image.new("RGB", (40, 40)))


@pytest.mark.parametrize("shape", [(64, 64, 5), (13, 64, 64)])
@pytest.mark.parametrize("beside", [[], [5]], ids=["alone", "beside one that names them"])
def test_members_without_names_ask_for_them(shape, beside):
    model = assemble([network(3), *map(network, beside)])
    with pytest.raises(ValueError, match=r"name those that a member sees, as in assemble\(member, channels="):
        processor_of(model)(np.ones(shape, np.uint8))


def test_one_pixel_shows_nothing():
    with pytest.raises(ValueError, match="1x1"):
        processor(pixels_of(4))(np.ones((1, 1, 4), np.uint8), input_data_format="channels_last")


BAD_SETTINGS = {
    "too few numbers": (pixels_of(4, [0, 1]), r"channels=\[0, 1\] must be 4 numbers from 0 to 255"),
    "below zero": (pixels_of(2, [0, -1]), r"channels=\[0, -1\] must be 2 numbers"),
    "too large": (pixels_of(2, [0, 256]), "must be 2 numbers from 0 to 255"),
    "no numbers": (pixels_of(2, ["red", "blue"]), "must be 2 numbers"),
    "true": (pixels_of(1, [True]), "must be 1 numbers"),
    "null": (pixels_of(3) | {"channels": None}, "must be 3 numbers"),
    "PIL's mode": (pixels_of(3, image_mode="RGB"), "image_mode='RGB' must be 'channels' beside a list"),
    "no list": (
        {k: v for k, v in pixels_of(4).items() if k != "channels"},
        r"input_size=\[4, 32, 32\] must be of 1 or 3",
    ),
    "no list for 3": (
        {k: v for k, v in pixels_of(3).items() if k != "channels"},
        "image_mode='channels' must be 'RGB'",
    ),
    "33 channels": (pixels_of(33), r"input_size=.* must be \[C, H, W\] with 1 to 32 channels"),
    "no channel": (pixels_of(0), "with 1 to 32 channels"),
    "one mean": (pixels_of(4, mean=[0.5]), r"mean=\[0.5\] must be 4 numbers, one per channel"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_do_not_fit_are_named(case):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=message) as error:
        validate_preprocessing(settings)
    assert "\n" not in str(error.value)


# --- beyond this process --------------------------------------------------------------------------------------------


def test_pixel_values_of_another_shape_are_refused():
    model = assemble([network(32), assemble(network(3), channels=[0, 1, 2])])
    assert model(torch.zeros(2, 32, 32, 32)).pooler_output.shape == (2, 16)
    with pytest.raises(ValueError, match=r"must be of shape \(B, 32, 32, 32\)"):
        model(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("export", [export_program, pytest.param(export_onnx, marks=pytest.mark.slow)])
def test_a_mixed_ensemble_is_exported(export, tmp_path):
    model = assemble([assemble(network(3), channels=[3, 0, 0]), network(4, 1), network(3, 2)])
    assert export(model, tmp_path / "bands").is_file()  # it compares the file's features with PyTorch's


VISITOR = """
import sys
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("concat_ensemble", "modeling", "tifffile"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import numpy as np, torch
from transformers import AutoImageProcessor, AutoModel
torch.set_num_threads(1)
folder, remote = sys.argv[1], {"trust_remote_code": True}
pixels = AutoImageProcessor.from_pretrained(folder, **remote)(np.load(folder + "/bands.npy"))["pixel_values"]
with torch.no_grad():
    features = AutoModel.from_pretrained(folder, **remote)(pixels).pooler_output.numpy()
assert np.array_equal(features, np.load(folder + "/features.npy"))
"""


@torch.no_grad()
def test_a_visitor_without_the_package_or_tifffile_gets_the_same_features(sentinel, tmp_path):
    model = assemble([assemble(network(3), channels=[3, 2, 1]), network(13, 1)])
    model.save_pretrained(tmp_path)
    features = model(**processor_of(model)(sentinel)).pooler_output
    np.save(tmp_path / "bands.npy", sentinel)
    np.save(tmp_path / "features.npy", features.numpy())
    home = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", VISITOR, tmp_path], env=os.environ | home, cwd=tmp_path, check=True)
