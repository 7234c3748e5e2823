"""Attacks that were thought out from SECURITY.md and the documentation alone, before the code that keeps the promises
was read. `world` sees that nothing is executed, written outside or lost; `bounded` that nothing hangs or fills memory.
"""

import base64
import csv
import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import sys
import tarfile
import threading
import unicodedata
import warnings
import zipfile
import zlib
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from concat_ensemble import ConcatEnsembleModel, assemble, load_data
from concat_ensemble.commands.app import main
from concat_ensemble.data.images import read_image
from concat_ensemble.reporting.model_card import write_card
from concat_ensemble.studies.results import Results
from tests.clients import COMMAND, Client
from tests.safety.test_attacks import CODE, INDEX, SCRIPT, SHARD, Evil, edit, png, raw_header

REFUSED = (ValueError, OSError)
PROCESSOR, DIGITS = "preprocessor_config.json", "results/digits.json"


class Hangs(BaseException):
    """No error that a reader would catch."""


@pytest.fixture(autouse=True)
def bounded(world):
    """Whatever hangs, or asks for two gigabytes more, ends with an error that nobody expects."""

    def stop(*_):
        raise Hangs

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (2 << 30), before[1]))
    signal.alarm(int(os.environ.get("SECONDS_TO_HANG", 30)))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command: (exit code, stdout, stderr). It may refuse with one line and 2, and do nothing else."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["concat-ensemble", *map(str, words)])
        capsys.readouterr()
        try:
            code = main() or 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        assert code in (0, 2), (code, err)
        if code == 2 and not out:
            *before, line = err.strip().splitlines()
            assert line.startswith("error: ") and not [each for each in before if each.startswith("error: ")], err
            assert len(line) < 20_000, "an error of a page"
        return code, out, err

    return command


def refuses(call, *arguments, **options):
    """Call what must raise ValueError or OSError with one short line."""
    with pytest.raises(REFUSED) as error:
        call(*arguments, **options)
    assert len(str(error.value)) < 20_000
    return str(error.value)


def holds_or_refuses(call, *arguments, **options):
    """Call what may raise ValueError or OSError, and nothing else."""
    try:
        return call(*arguments, **options)
    except REFUSED:
        return None


@pytest.fixture
def photos(world):
    """A folder of two classes of twelve small images each."""
    random = np.random.default_rng(0)
    for label in "ab":
        (world / "photos" / label).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(world / "photos" / label / f"{number}.png")
    return world / "photos"


# --- code in a repo -------------------------------------------------------------------------------------------------


def custom_pipeline(folder):
    task = {"impl": "evil.Evil", "pt": ["AutoModel"], "type": "image"}
    edit(folder / "config.json", lambda c: c.update(custom_pipelines={"image-feature-extraction": task, "evil": task}))
    pipeline("image-feature-extraction", model=str(folder))


def processor_of_a_feature_extractor(folder):
    content = {"feature_extractor_type": "Evil", "auto_map": {"AutoFeatureExtractor": "evil.Evil"}}
    (folder / PROCESSOR).write_text(json.dumps(content))
    AutoImageProcessor.from_pretrained(folder)


def processor_within_a_processor(folder):
    inner = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    (folder / PROCESSOR).unlink()
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": inner, "auto_map": inner["auto_map"]})
    )
    AutoImageProcessor.from_pretrained(folder)


def modules_of_common_names(folder):
    for name in ("json", "timm", "numpy", "sitecustomize", "__init__", "conftest", "concat_ensemble"):
        (folder / f"{name}.py").write_text(CODE)
    before, modules = list(sys.path), {name: sys.modules.get(name) for name in ("json", "timm", "numpy")}
    AutoModel.from_pretrained(folder)
    assert (sys.path, {name: sys.modules.get(name) for name in modules}) == (before, modules)


def attention_from_the_hub(folder):
    edit(folder / "config.json", lambda c: c.update(_attn_implementation="evil/kernel:evil", use_kernels=True))
    AutoModel.from_pretrained(folder)


def attention_by_another_key(folder):
    edit(folder / "config.json", lambda c: c.update(attn_implementation={"": "evil/kernel@main:evil"}))
    AutoModel.from_pretrained(folder)


def an_adapter_of_a_library(folder):
    model = AutoModel.from_pretrained(folder)
    model.add_adapter(LoraConfig(r=2, target_modules=["conv2"]))
    model.save_pretrained("adapter")
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    edit(Path("adapter/adapter_config.json"), lambda c: c.update(auto_mapping=mapping, runtime_config={"x": 1}))
    AutoModel.from_pretrained("adapter")


def an_adapter_of_an_unknown_type(folder):
    model = AutoModel.from_pretrained(folder)
    model.add_adapter(LoraConfig(r=2, target_modules=["conv2"]))
    model.save_pretrained("adapter")
    edit(Path("adapter/adapter_config.json"), lambda c: c.update(peft_type="evil.Evil", base_model_class="os.system"))
    AutoModel.from_pretrained("adapter")


def an_adapter_without_a_base(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    AutoModel.from_pretrained(folder)


def an_adapter_that_is_a_list(folder):
    (folder / "adapter_config.json").write_text('["LORA"]')
    AutoModel.from_pretrained(folder)


def weights_of_other_frameworks(folder):
    for name in ("tf_model.h5", "flax_model.msgpack", "model.ckpt.index", "pytorch_model.bin", "rust_model.ot"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    (folder / INDEX).unlink()
    AutoModel.from_pretrained(folder)


def an_architecture_by_name(folder):
    edit(folder / "config.json", lambda c: c.update(architectures=["os.system", "evil.Evil"], model_class="evil.Evil"))
    AutoModel.from_pretrained(folder)


def a_layer_by_name(folder):
    edit(folder / "config.json", lambda c: c["members"][0]["model_args"].update(norm_layer="evil.Evil", block="evil"))
    AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "attack",
    [
        custom_pipeline,
        processor_of_a_feature_extractor,
        processor_within_a_processor,
        modules_of_common_names,
        attention_from_the_hub,
        attention_by_another_key,
        an_adapter_of_a_library,
        an_adapter_of_an_unknown_type,
        an_adapter_without_a_base,
        an_adapter_that_is_a_list,
        weights_of_other_frameworks,
        an_architecture_by_name,
        a_layer_by_name,
    ],
    ids=lambda attack: attack.__name__,
)
def test_code_in_a_repo_does_not_run(attack, folder, monkeypatch):
    (folder / "evil.py").write_text(CODE)
    Path("evil.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(Path.cwd()))  # as for `python -m`, where the user stands in a stranger's folder
    holds_or_refuses(attack, folder)


@pytest.mark.parametrize("method", ["bitsandbytes_4bit", "gptq", "awq", "torchao", "quanto", "hqq", "evil", None, 5])
def test_a_config_constructs_no_quantizer(method, folder):
    edit(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": method, "modules": "evil"}))
    refuses(AutoModel.from_pretrained, folder)


# --- sizes and numbers in a config ----------------------------------------------------------------------------------


def member(**changes):
    return lambda config: config["members"][0].update(changes)


def model_args(**changes):
    return lambda config: config["members"][0]["model_args"].update(changes)


def sees(**changes):
    return lambda config: config["members"][0]["preprocessing"].update(changes)


def top(**changes):
    return lambda config: config.update(changes)


REFUSED_CONFIGS = {
    "features without end": member(num_features=10**30),
    "features in a float": member(num_features=16.5),
    "features that are true": member(num_features=True),
    "ten thousand members": lambda c: c.update(members=c["members"] * 5_000),
    "a projection without end": top(projection_dim=10**12),
    "a projection without weights": top(projection_dim=4),
    "a member a million times": top(active_members=[0] * 10**6),
    "a member beyond 64 bits": top(active_members=[2**64]),
    "a member that is true": top(active_members=[True]),
    "an endless range": top(initializer_range=float("inf")),
    "a range beyond floats": top(initializer_range=10**400),
    "layers without end": model_args(layers=[10**7, 1, 1, 1]),
    "layers of a negative number": model_args(layers=[-1, 1, 1, 1]),
    "layers in fractions": model_args(layers=[0.5, 1, 1, 1]),
    "a stem of no width": model_args(stem_width=0),
    "a stem beyond 64 bits": model_args(stem_width=2**63),
    "channels beyond 64 bits": model_args(in_chans=2**63),
    "a number that is none": model_args(drop_rate=float("nan")),
    "a crop of nothing": sees(crop_pct=0),
    "a crop of almost nothing": sees(crop_pct=1e-300),
    "a crop of everything": sees(crop_pct=1e300),
    "a crop that is none": sees(crop_pct=float("nan")),
    "a deviation of nothing": sees(std=[0.0]),
    "a deviation of almost nothing": sees(std=[1e-320]),
    "a mean without end": sees(mean=[float("inf")]),
    "a mean beyond floats": sees(mean=[10**400]),
    "pixels in fractions": sees(input_size=[1, 32.5, 32]),
    "pixels that are true": sees(input_size=[1, True, True]),
    "pixels of a negative number": sees(input_size=[1, -32, -32]),
    "pixels that overflow": sees(input_size=[1, 2**32, 2**32]),
    "more channels than a number": sees(input_size=[2**40, 32, 32]),
    "a member that is a number": lambda c: c.update(members=[5]),
    "members by name": lambda c: c.update(members={"a": c["members"][0]}),
}


@pytest.mark.parametrize("attack", REFUSED_CONFIGS)
def test_numbers_that_no_ensemble_has(attack, folder):
    edit(folder / "config.json", REFUSED_CONFIGS[attack])
    refuses(AutoModel.from_pretrained, folder)


CONFIGS = {
    "three hundred thousand classes": top(id2label={str(n): f"class {n}" for n in range(300_000)}),
    "classes that are no text": top(id2label={"0": None, "1": [SCRIPT], "x": {}}),
    "classes that are a list": top(id2label=["a", "b"]),
    "classes of two minds": top(id2label={"0": "a", "1": "b"}, label2id={"a": 7, "c": -1}),
    "a problem of its own": top(problem_type="os.system"),
    "types of numbers": top(dtype="os.system"),
    "types of numbers in a dict": top(dtype={"": "float8_e4m3fn", "members": "evil"}),
    "a version that is a dict": top(transformers_version={"a": 1}),
    "a commit that is a path": top(_commit_hash="../../../outside"),
    "a name that is a path": top(_name_or_path="/etc/passwd"),
    "a tuple in place of an output": top(return_dict=False, output_hidden_states=True),
    "layers that do not exist": top(output_hidden_states=[10**9, -(10**9)]),
    "a decoder": top(is_encoder_decoder=True, is_decoder=True, tie_word_embeddings=True, torchscript=True),
    "a task of its own": top(task_specific_params={"x": SCRIPT}, finetuning_task="../x"),
    "a plan for processes": top(base_model_tp_plan={"members": "evil"}, base_model_pp_plan=5),
    "no classes": top(num_labels=0),
    "classes of a negative number": top(num_labels=-5),
    "classes in text": top(num_labels="many"),
    "an architecture of a million letters": member(architecture="resnet" * 200_000),
    "an architecture of another sort": member(architecture=["resnet10t"]),
    "an argument of a million letters": model_args(**{"x" * 10**6: 1}),
    "provenance of two megabytes": member(provenance={"source": "x" * 2_000_000}),
    "provenance of ten thousand keys": member(provenance={f"key {n}": n for n in range(10_000)}),
    "features of another number": member(num_features=32),
}
# transformers reads a config before this package does, and raises its own errors for these; the commands do not.
NO_CONFIGS = {
    "another kind of model": top(model_type="bert"),
    "a kind of model that is a list": top(model_type=["concat_ensemble"]),
    "no kind of model": lambda c: c.pop("model_type"),
    "arguments nested without end": model_args(x=json.loads("[" * 500 + "]" * 500)),
    "fields that are no text": top(architectures=5, auto_map="x", torch_dtype=[1]),
}


@pytest.mark.parametrize("attack", CONFIGS)
def test_fields_that_no_ensemble_has(attack, folder):
    edit(folder / "config.json", CONFIGS[attack])
    model = holds_or_refuses(AutoModel.from_pretrained, folder)
    if type(model) is ConcatEnsembleModel:  # it holds: features are those of the honest folder
        pixels = torch.rand(1, *model.config.pixel_shape)
        output = holds_or_refuses(model, pixels, return_dict=True)
        assert output is None or output.pooler_output.shape == (1, model.config.num_features)


@pytest.mark.parametrize("attack", [*CONFIGS, *NO_CONFIGS])
@pytest.mark.slow
def test_commands_print_one_line_for_any_config(attack, folder, command):
    edit(folder / "config.json", (CONFIGS | NO_CONFIGS)[attack])
    command("card", "pair")
    command("build", "pair", "--output", "again")


# --- weights and their index ----------------------------------------------------------------------------------------

SHARDS = {
    "a zero byte": SHARD + "\x00",
    "the folder": ".",
    "the folder above": "..",
    "a way around": f"{SHARD}/../../../outside/precious.txt",
    "wide letters": "\uff0e\uff0e\uff0foutside\uff0fprecious.txt",
    "a device of Windows": "CON",
    "a drive": "C:precious.txt",
    "a stream of Windows": f"{SHARD}:evil",
    "an address": "file:///etc/passwd",
    "a repo": "hf://evil/x/y.safetensors",
    "five thousand letters": "x" * 5_000,
    "an option": "-rf",
    "a line": "x\ny.safetensors",
    "hidden": ".bashrc",
    "a pickle": "pytorch_model.bin",
    "the config": "config.json",
    "blank": " ",
    "true": True,
    "a mapping": {"a": 1},
}


@pytest.mark.parametrize("attack", SHARDS)
def test_names_of_shards(attack, folder):
    edit(folder / INDEX, lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], SHARDS[attack])))
    message = refuses(AutoModel.from_pretrained, folder)
    assert "root:" not in message and "mine" not in message


INDEXES = {
    "a list": [],
    "a number": 5,
    "no map": {"metadata": {}},
    "a map that is a list": {"weight_map": [SHARD]},
    "an empty map": {"weight_map": {}},
    "a hundred thousand weights": {"weight_map": {f"members.0.{n}": SHARD for n in range(100_000)}},
    "a weight of a million letters": {"weight_map": {"members.0." + "x" * 10**6: SHARD}},
    "metadata that is text": {"metadata": SCRIPT, "weight_map": {"members.0.x": SHARD}},
}


@pytest.mark.parametrize("attack", INDEXES)
def test_an_index_that_is_none(attack, folder):
    (folder / INDEX).write_text(json.dumps(INDEXES[attack]))
    refuses(AutoModel.from_pretrained, folder)


def test_an_index_that_is_nested(folder):
    (folder / INDEX).write_text('{"weight_map": ' + "[" * 100_000)
    refuses(AutoModel.from_pretrained, folder)


def zero_of_many_sizes(path):
    w = {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}
    raw_header(path, {"members.0.conv1.0.weight": w})


def names_twice(path):
    raw_header(
        path,
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},' * 1
        + b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(8),
    )


def a_header_of_blanks(path):
    raw_header(path, b" " * 50_000_000)


def eight_bits(path):
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)


def whole_numbers(path):
    save_file({name: tensor.to(torch.int64) for name, tensor in load_file(path).items()}, path)


def imaginary_numbers(path):
    save_file({name: tensor.to(torch.complex64) for name, tensor in load_file(path).items()}, path)


def truth_values(path):
    save_file({name: tensor > 0 for name, tensor in load_file(path).items()}, path)


def numbers_that_are_none(path):
    save_file(
        {n: torch.full_like(t, torch.nan) if t.is_floating_point() else t for n, t in load_file(path).items()}, path
    )


@pytest.mark.parametrize(
    "attack",
    [zero_of_many_sizes, names_twice, a_header_of_blanks],
    ids=lambda attack: attack.__name__,
)
def test_weights_that_are_none(attack, folder):
    attack(folder / SHARD)
    refuses(AutoModel.from_pretrained, folder)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize(
    "attack",
    [imaginary_numbers, truth_values, eight_bits, whole_numbers, numbers_that_are_none],
    ids=lambda attack: attack.__name__,
)
def test_weights_of_another_sort(attack, folder, command):
    attack(folder / SHARD)
    model = holds_or_refuses(AutoModel.from_pretrained, folder)
    if model:
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        model(torch.rand(1, *model.config.pixel_shape))
    command("build", "pair", "--output", "again")
    command("build", f"resnet10t={folder / SHARD}", "--output", "from-a-file")


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD, PROCESSOR])
def test_files_cut_off_anywhere(name, folder):
    whole = (folder / name).read_bytes()
    for length in [0, 1, 7, 8, 9, *(len(whole) * n // 8 for n in range(1, 8)), len(whole.rstrip()) - 1]:
        (folder / name).write_bytes(whole[:length])
        refuses((AutoImageProcessor if name == PROCESSOR else AutoModel).from_pretrained, folder)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_loading_changes_nothing_of_the_process(dtype, folder):
    def state():
        numbers = torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        pictures = PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES
        return (
            numbers,
            pictures,
            sys.path[:],
            dict(os.environ),
            Path.cwd(),
            list(warnings.filters),
            torch.get_rng_state().sum(),
        )

    edit(folder / "config.json", top(dtype=dtype, torch_dtype=dtype))
    before = state()
    AutoModel.from_pretrained(folder)
    AutoImageProcessor.from_pretrained(folder)
    assert state() == before


def test_a_false_digest_of_weights_is_not_passed_on(folder, command):
    edit(folder / "config.json", lambda c: c["members"][0]["provenance"].update(weights_sha256="0" * 64))
    code, _, _ = command("build", "pair", "--output", "again")
    if code == 0:
        assert "0" * 64 not in Path("again/config.json").read_text() + Path("again/README.md").read_text()


# --- pictures -------------------------------------------------------------------------------------------------------


def chunks(*bodies):
    """A PNG of 8 x 8 pixels with chunks before its pixels."""
    whole = png(8, 8, bytes(8 * 25))
    made = (struct.pack(">I", len(b) - 4) + b + struct.pack(">I", zlib.crc32(b)) for b in bodies)
    return whole[:33] + b"".join(made) + whole[33:]


def tiff(*entries, pages=1):
    """A little-endian TIFF with these (tag, type, count, value), whose last page is followed by the first."""
    body, size = b"", 2 + 12 * len(entries) + 4
    for page in range(pages):
        body += struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        body += struct.pack("<I", 8 + size * ((page + 1) % pages))
    return b"II*\0" + struct.pack("<I", 8) + body


def plain_tiff(width=8, height=8, samples=1, **options):
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 8), (277, 3, 1, samples), (278, 4, 1, height), (279, 4, 1, min(width * height, 2**32 - 1))]
    return tiff(*tags, **options)


def solid(form, size, mode="L", **options):
    buffer = io.BytesIO()
    PIL.Image.new(mode, size).save(buffer, form, **options)
    return buffer.getvalue()


def gif(width, height):
    whole = struct.pack("<HHBBB", width, height, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0)
    return b"GIF89a" + whole + b"\x08\x01\x00\x00;"


def webp(width, height):
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + sides + bytes(8)


def bitmap(width, height):
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def icon(content):
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(content), 22) + content


def targa(width, height):
    return bytes([0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0]) + struct.pack("<HHBB", width, height, 24, 0)


def photograph(height=64, width=64):
    """A JPEG whose header says that it has another size."""
    return solid("JPEG", (64, 64)).replace(struct.pack(">HH", 64, 64), struct.pack(">HH", height, width), 1)


def tagged(*entry):
    """A JPEG with one EXIF tag: (tag, type, count, value)."""
    return solid("JPEG", (8, 8), exif=b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, *entry, 0))


DRAWING = (
    f'<!DOCTYPE x [<!ENTITY y SYSTEM "file:///etc/passwd">]><svg xmlns="http://www.w3.org/2000/svg">&y;{SCRIPT}</svg>'
)
PICTURES = {
    "a GIF as wide as its numbers": lambda: gif(65_535, 65_535),
    "a WebP as wide as it may be": lambda: webp(16_384, 16_384),
    "a bitmap without end": lambda: bitmap(2**31 - 1, 2**31 - 1),
    "a bitmap of negative width": lambda: bitmap(-8, -(2**31)),
    "a TIFF without end": lambda: plain_tiff(2**31 - 1, 2**31 - 1),
    "a TIFF of wide pixels": lambda: plain_tiff(samples=65_535),
    "a TIFF whose pages lead in a circle": lambda: plain_tiff(pages=3),
    "a TIFF of endless tags": lambda: b"II*\0" + struct.pack("<IH", 8, 65_535),
    "a TIFF of a comment of four gigabytes": lambda: tiff((256, 4, 1, 8), (257, 4, 1, 8), (270, 2, 2**32 - 1, 8)),
    "a portable pixmap without end": lambda: b"P6 99999 99999 255\n",
    "a portable pixmap of endless digits": lambda: b"P6 " + b"9" * 5_000_000,
    "a Targa without end": lambda: targa(65_535, 65_535),
    "an icon of a bomb": lambda: icon(png(60_000, 60_000)),
    "an icon in itself": lambda: icon(icon(b"")),
    "a profile that is a bomb": lambda: chunks(b"iCCPx\0\0" + zlib.compress(bytes(100 << 20))),
    "a translated comment that is a bomb": lambda: chunks(b"iTXtx\0\1\0\0\0" + zlib.compress(bytes(100 << 20))),
    "an animation without end": lambda: chunks(b"acTL" + struct.pack(">II", 2**31 - 1, 0)),
    "a chunk longer than the file": lambda: png(8, 8)[:33] + struct.pack(">I", 2**31 - 1) + b"IDATx",
    "a text of a thousand chunks": lambda: chunks(*[b"tEXtx\0" + b"y" * 1000] * 1000),
    "a photograph that goes on": lambda: solid("JPEG", (65_500, 1))[:-2] * 3,
    "a photograph of no rows": lambda: photograph(height=0),
    "a photograph as large as it may be": lambda: photograph(65_535, 65_535),
    "a photograph of looping tags": lambda: tagged(0x8769, 4, 1, 8),
    "a photograph that is turned by text": lambda: tagged(274, 2, 4, 0x41414141),
    "a photograph turned the ninth way": lambda: tagged(274, 3, 1, 9),
    "a line of a hundred million pixels": lambda: b"P5 100000000 1 255\n" + bytes(100),
    "a Windows metafile": lambda: b"\xd7\xcd\xc6\x9a" + bytes(100),
    "a page of PDF": lambda: b"%PDF-1.7\n1 0 obj<</OpenAction<</S/Launch/F(touch ../canary)>>>>endobj\n",
    "a drawing with a script": DRAWING.encode,
    "an archive": lambda: b"PK\x05\x06" + bytes(18),
}


@pytest.fixture(scope="module")
def processor(made):
    return AutoImageProcessor.from_pretrained(made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", PICTURES)
def test_pictures_that_are_none(attack, processor, world):
    (world / "0.png").write_bytes(PICTURES[attack]())
    pixels = holds_or_refuses(processor, "0.png")
    assert pixels is None or pixels["pixel_values"].isfinite().all()


PROCESSORS = {
    "a size without end": {"size": {"height": 10**9, "width": 1}},
    "a size of nothing": {"size": 0},
    "a size of a negative number": {"size": {"height": -32, "width": 32}},
    "a size that is true": {"size": True},
    "a size in text": {"size": "large"},
    "a shortest edge": {"size": {"shortest_edge": 10**9}},
    "another mean": {"image_mean": [10**400], "image_std": [0]},
    "no resizing in text": {"do_resize": "no"},
    "settings of a program": {"do_convert_rgb": "os.system", "resample": "evil"},
    "a device": {"device": "evil:0"},
    "a factor that is none": {"rescale_factor": "x"},
    "geometries by name": {"geometries": {"0": {}}},
    "another class": {"image_processor_type": "CLIPImageProcessor"},
    "a class that is a list": {"image_processor_type": ["ConcatEnsembleImageProcessor"]},
    "a map that is text": {"auto_map": "evil.Evil"},
}


@pytest.mark.parametrize("attack", PROCESSORS)
def test_settings_of_a_processor(attack, folder):
    edit(folder / PROCESSOR, lambda content: content.update(PROCESSORS[attack]))
    made = holds_or_refuses(AutoImageProcessor.from_pretrained, folder)
    pixels = made and holds_or_refuses(made, PIL.Image.new("L", (40, 40)))
    assert not pixels or pixels["pixel_values"].shape[-3:] == (1, 32, 32)


# --- devices, pipes and circles where files are expected ------------------------------------------------------------


def pipe(path):
    os.mkfifo(path)


def endless(path):
    path.symlink_to("/dev/zero")


def circle(path):
    path.symlink_to(path.name)


def directory(path):
    path.mkdir()


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(path.parent, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/{path.name}")  # a path of its own may be too long
        os.close(here)


def private(path):
    path.write_bytes(b"{}")
    path.chmod(0)


STRANGE_FILES = [pipe, endless, circle, directory, listening]


@pytest.mark.parametrize("make", STRANGE_FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", [DIGITS, "README.md", INDEX, SHARD, PROCESSOR, "config.json"])
@pytest.mark.slow
def test_no_file_where_a_file_is_expected(name, make, folder, command):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    command("card", "pair")
    command("report", "pair", "--output", "report.html")
    if name not in (DIGITS, "README.md"):
        command("build", "pair", "--output", "again")


@pytest.mark.parametrize("make", STRANGE_FILES, ids=lambda make: make.__name__)
def test_no_file_where_a_picture_or_checkpoint_is_expected(make, folder, photos, command):
    (photos / "a/0.png").unlink()
    make(photos / "a/0.png")
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=2)
    model.save_pretrained("classifier")
    assert command("predict", "classifier", "photos/a/0.png")[0] == 2
    command("predict", "classifier", "photos")
    make(Path("member.pth"))
    make(Path("images.parquet"))
    assert command("build", "resnet10t=member.pth", "--output", "out")[0] == 2
    assert command("predict", "classifier", "parquet:images.parquet")[0] == 2


# --- datasets -------------------------------------------------------------------------------------------------------


def table(path, column, labels=None):
    pq.write_table(pa.table({"image": column, "label": labels or [n % 2 for n in range(len(column))]}), path)


def encoded(count=24):
    return [{"bytes": png(8, 8, bytes([0, *[n] * 24] * 8)), "path": None} for n in range(count)]


def pickled_extension(folder):
    fields = [pa.field("image", pa.binary(), metadata={
        "ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Evil())
    }), pa.field("label", pa.int64())]  # fmt: skip
    rows = [[row["bytes"] for row in encoded()], [n % 2 for n in range(24)]]
    pq.write_table(
        pa.table([pa.array(rows[0], pa.binary()), pa.array(rows[1])], schema=pa.schema(fields)), folder / "t.parquet"
    )


def features_by_name(folder):
    content = {
        "info": {"features": {"image": {"_type": "os.system"}, "label": {"dtype": "evil.Evil", "_type": "Value"}}}
    }
    made = pa.table({"image": encoded(), "label": [n % 2 for n in range(24)]})
    pq.write_table(made.replace_schema_metadata({"huggingface": json.dumps(content)}), folder / "t.parquet")


def pandas_index_of_a_program(folder):
    made = pa.table({"image": encoded(), "label": [n % 2 for n in range(24)]})
    index = base64.b64encode(pickle.dumps(Evil())).decode()
    pq.write_table(
        made.replace_schema_metadata({"pandas": json.dumps({"index_columns": [index]})}), folder / "t.parquet"
    )


def class_names_of_another_sort(folder):
    label = {"_type": "ClassLabel", "names": [None, {"a": SCRIPT}]}
    content = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    made = pa.table({"image": encoded(), "label": [n % 2 for n in range(24)]})
    pq.write_table(made.replace_schema_metadata({"huggingface": json.dumps(content)}), folder / "t.parquet")


def pictures_elsewhere(*paths):
    def make(folder):
        column = pa.array([{"bytes": None, "path": paths[n % len(paths)]} for n in range(24)])
        table(folder / "t.parquet", column)

    return make


def pictures_in_a_csv(path):
    return lambda folder: (folder / "t.csv").write_text("image,label\n" + f'"{path}",0\n"{path}",1\n' * 12)


def card_of_the_dataset(text):
    def make(folder):
        table(folder / "t.parquet", pa.array(encoded()))
        (folder / "README.md").write_text(f"---\n{text}\n---\n")

    return make


def metadata(name):
    return lambda folder: (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "label": f"class {n % 2}"}) + "\n" for n in range(24))
    )


def archive_of(*entries):
    """A tar of samples, each of which also has these entries: changes of a `TarInfo`, and content."""

    def make(folder):
        with tarfile.open(folder / "t.tar", "w") as archive:
            for n in range(24):
                for name, content in ((f"{n:04}.png", encoded()[n]["bytes"]), (f"{n:04}.cls", b"%d" % (n % 2))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                for changes, content in entries:
                    info = tarfile.TarInfo(f"{n:04}.x")
                    for key, value in changes.items():
                        setattr(info, key, value.format(n=n) if isinstance(value, str) else value)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))

    return make


def objects_in_npy():
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def sparse_tar(folder):
    """A member of the old GNU kind whose file has a terabyte of holes."""
    with (folder / "t.tar").open("wb") as file:
        for name, content in (("0000.cls", b"0"), ("0001.cls", b"1"), ("0001.png", encoded()[0]["bytes"])):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.write(info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
        head = bytearray(tarfile.TarInfo("0000.png").tobuf(tarfile.GNU_FORMAT))
        head[156:157] = b"S"
        head[386:410] = b"%011o\0%011o\0" % (2**33 - 1, 0)
        head[483:495] = b"%011o\0" % (2**33 - 1)
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        file.write(head + bytes(1024))


def zip_with_ways_out(folder):
    for label in "ab":
        (folder / label).mkdir()
        for n in range(6):
            (folder / label / f"{n}.png").write_bytes(encoded()[n]["bytes"])
    with zipfile.ZipFile(folder / "a/more.zip", "w") as archive:
        for name in ("../../../outside/new.png", "/canary", "..\\..\\canary", "a/../../../../canary"):
            archive.writestr(name, encoded()[0]["bytes"])


def labels_of(values, kind=None):
    return lambda folder: pq.write_table(
        pa.table({"image": encoded(), "label": pa.array([values[n % len(values)] for n in range(24)], kind)}),
        folder / "t.parquet",
    )


PRIVATE = "../../outside/precious.txt"
DATASETS = {
    "a pickled extension": pickled_extension,
    "features by name": features_by_name,
    "an index that is a program": pandas_index_of_a_program,
    "class names that are none": class_names_of_another_sort,
    "pictures outside": pictures_elsewhere(PRIVATE),
    "pictures by address": pictures_elsewhere("file:///etc/passwd", "~/.ssh/id_rsa", "\\\\host\\x.png"),
    "pictures in archives": pictures_elsewhere("zip://x.png::/etc/passwd", "gzip://x::../../outside/precious.txt"),
    "pictures in stores": pictures_elsewhere("hf://datasets/evil/x/y.png", "s3://evil/x", "memory://x"),
    "pictures of a device": pictures_elsewhere("/dev/zero", "/dev/stdin", "/proc/self/environ"),
    "pictures of no name": pictures_elsewhere("", ".", "..", "\x00", "x" * 5000),
    "paths in a table of text": pictures_in_a_csv("/etc/passwd"),
    "addresses in a table of text": pictures_in_a_csv("file:///etc/passwd"),
    "formulas in a table of text": pictures_in_a_csv('=HYPERLINK(""x"")'),
    "a card that names files": card_of_the_dataset("configs:\n- config_name: default\n  data_files: ../../outside/*"),
    "a card that names a folder": card_of_the_dataset("configs:\n- config_name: default\n  data_dir: /etc"),
    "a card that names an address": card_of_the_dataset(
        "configs:\n- config_name: default\n  data_files: http://127.0.0.1:9/x.parquet"
    ),
    "a card that is a program": card_of_the_dataset("a: !!python/object/apply:os.system ['touch ../canary']"),
    "a card of laughs": card_of_the_dataset("a: &a [x, x]\nb: &b [*a, *a]\nconfigs: *b"),
    "a card of other features": card_of_the_dataset("dataset_info: {features: [{name: image, dtype: os.system}]}"),
    "metadata of the root": metadata("/etc/passwd"),
    "metadata above": metadata(PRIVATE),
    "metadata of a device": metadata("/dev/zero"),
    "metadata of no text": metadata(5),
    "a tar of pickles": archive_of(*(({"name": "{n:04}." + end}, pickle.dumps(Evil())) for end in ("pickle", "pyd"))),
    "a tar of checkpoints": archive_of(({"name": "{n:04}.pth"}, pickle.dumps(Evil()))),
    "a tar of objects": archive_of(({"name": "{n:04}.npy"}, objects_in_npy())),
    "a tar of ways out": archive_of(({"name": "../../outside/{n:04}.png"}, encoded()[0]["bytes"])),
    "a tar of the root": archive_of(({"name": "/{n:04}.png"}, encoded()[0]["bytes"])),
    "a tar of links": archive_of(({"name": "{n:04}.jpg", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, b"")),
    "a tar of links among itself": archive_of(
        ({"name": "{n:04}.jpg", "type": tarfile.LNKTYPE, "linkname": "{n:04}.jpg"}, b""),
    ),
    "a tar of devices": archive_of(
        ({"name": "{n:04}.jpg", "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, b"")
    ),
    "a tar of pipes": archive_of(({"name": "{n:04}.jpg", "type": tarfile.FIFOTYPE}, b"")),
    "a tar of columns of text": archive_of(({"name": "{n:04}.json"}, b'{"label": {"a": [1]}, "__key__": 5}')),
    "a tar of holes": sparse_tar,
    "a zip of ways out": zip_with_ways_out,
    "labels that are mappings": labels_of([{"a": 1}, {"a": 2}]),
    "labels that are lists": labels_of([[1], [2, 3]]),
    "labels that are bytes": labels_of([b"\xff", b"\xfe"]),
    "labels that are infinite": labels_of([float("inf"), float("nan")]),
    "labels that overflow": labels_of([2**64 - 1, 2**63], pa.uint64()),
    "labels without end": labels_of([10**12, 0], pa.int64()),
    "labels that are terminals": labels_of(["\x1b]0;x\x07", "[/red]"]),
    "labels that are formulas": labels_of(["=1+1", "@SUM(1)"]),
    "labels of a million letters": labels_of(["a" * 10**6, "b" * 10**6]),
    "a picture of a hundred megabytes": lambda folder: table(
        folder / "t.parquet", pa.array([{"bytes": bytes(100 << 20)}, *encoded()])
    ),
    "pictures that are numbers": lambda folder: table(folder / "t.parquet", pa.array(list(range(24)))),
    "pictures within pictures": lambda folder: table(folder / "t.parquet", pa.array([[[[[0] * 99]]]] * 24)),
    "no rows": lambda folder: table(folder / "t.parquet", pa.array([], pa.binary())),
}


@pytest.fixture(scope="module")
def classifier(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    AutoModelForImageClassification.from_pretrained(made, num_labels=2).save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", DATASETS)
@pytest.mark.slow
def test_datasets_that_are_more(attack, classifier, world, command):
    (world / "data").mkdir()
    DATASETS[attack](world / "data")
    data = holds_or_refuses(load_data, "data", limit=4)
    for split in (data or {}).values():
        for row in range(len(split)):
            holds_or_refuses(read_image, split, row)
    out, err = command("predict", classifier, "data", "--split", "train", "--skip-bad")[1:]
    assert "root:" not in out + err and "mine" not in out + err
    assert not [line for line in csv.reader(io.StringIO(out)) if line and line[0][:1] in "=+-@\t\r" and line[0]]


@pytest.mark.parametrize("make", [pictures_elsewhere, pictures_in_a_csv], ids=lambda make: make.__name__)
def test_pictures_by_address_are_not_asked_for(make, world):
    asked = []

    class Canary(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Canary) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (world / "data").mkdir()
        make(f"http://127.0.0.1:{server.server_port}/x.png")(world / "data")
        data = holds_or_refuses(load_data, "data", limit=4)
        for split in (data or {}).values():
            holds_or_refuses(read_image, split, 0)
        server.shutdown()
    assert not asked


# --- names of files -------------------------------------------------------------------------------------------------

NAMES = {
    "a formula": "=1+1.png",
    "a formula after a tab": "\t=1+1.png",
    "a formula after a return": "\r=1+1.png",
    "a cell of two": 'x",y.png',
    "a line": "x\nerror: y.png",
    "a terminal's title": "\x1b]0;evil\x07.png",
    "a terminal's link": "\x1b]8;;http://evil\x1b\\x.png",
    "a terminal's eighth bit": "\x9b31mx.png",
    "markup of the console": "[link=file:x]y[/link].png",
    "an end of markup": "[/].png",
    "a script": "<script>alert(1)<|script>.png".replace("|", ""),
    "letters turned around": "x\u202egnp.exe.png",
    "no letters": os.fsdecode(b"\xff\xfe.png"),
    "a dash": "-rf.png",
    "a composed letter": unicodedata.normalize("NFD", "é.png"),
    "two hundred and fifty letters": "x" * 246 + ".png",
    "a template": "{{7*7}}{0}%s.png",
}


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("attack", NAMES)
@pytest.mark.slow
def test_names_of_pictures_are_text(attack, broken, classifier, photos, command):
    name = NAMES[attack]
    try:
        (photos / "a" / name).write_bytes(b"" if broken else png(8, 8, bytes(8 * 25)))
    except OSError:
        pytest.skip("the file system does not take the name")
    for options in ([], ["--json"], ["--skip-bad"], ["--output", "predictions.csv"]):
        code, _, err = command("predict", classifier, "photos", *options)
        assert code == (2 if broken and "--skip-bad" not in options else 0), err
        if not broken or code == 2:
            assert not {"\x1b", "\x07", "\x9b"} & set(err)
    if not broken:
        rows = list(csv.reader(io.StringIO(Path("predictions.csv").read_bytes().decode("utf-8"), newline="")))
        assert len(rows) == 26 and len({len(row) for row in rows}) == 1
        assert not [row for row in rows if row[0].lstrip()[:1] in set("=+-@")]


@pytest.mark.parametrize(
    "attack", ["=1+1", "@SUM(1)", "\t=1", "\r=1", " =1", "x\ny", 'x";=1', "\x1b[31m", "[/]", "", "\uff1d1", "\uff0b1"]
)
@pytest.mark.slow
def test_names_of_classes_are_text_in_tables(attack, made, photos, command):
    names = {0: attack, 1: "b"}
    model = holds_or_refuses(
        AutoModelForImageClassification.from_pretrained, made, id2label=names, label2id={attack: 0, "b": 1}
    )
    model.save_pretrained("named")
    code, out, _ = command("predict", "named", "photos")
    cells = [cell for row in csv.reader(io.StringIO(out, newline="")) for cell in row] if code == 0 else []
    assert not [cell for cell in cells if cell and cell[0] in "=+@\t\r\uff1d\uff0b\uff20"]
    assert command("predict", "named", "photos", "--json")[0] == code


# --- cards and pages ------------------------------------------------------------------------------------------------

TEXTS = {
    "letters turned around": "safe\u202etxt.exe\u2066",
    "lines of other kinds": "x\u2028# A\u2029# B\x85# C\x0b# D\x0c# E\r# F",
    "a fence of tildes": "x\n~~~\n" + SCRIPT,
    "a fence of four": "````\n" + SCRIPT,
    "a comment": "<!-- x --> --> <!--",
    "a heading under a line": "x\n===\ny\n---",
    "a definition": "x\n\n[card]: javascript:alert(1)\n\n[card]",
    "a note": "x[^1]\n\n[^1]: " + SCRIPT,
    "a list": "x\n\n- [ ] y\n1. z\n> w",
    "an address that links itself": "https://evil.example www.evil.example <https://evil.example>",
    "a mention": "@huggingface #1 :skull:",
    "a page's end": "</script></style></title></textarea></body>" + SCRIPT,
    "an attribute": "\" onmouseover=alert(1) x='` style=position:fixed",
    "a section of characters": "]]><svg onload=alert(1)>",
    "another base": "<base href=//evil.example><meta http-equiv=refresh content=0;url=//evil.example>",
    "a zero byte": "x\x00y",
    "half a letter": "x\ud800y",
    "mathematics": r"$\undefined{$ $$ \( $\input{/etc/passwd}$",
    "a mapping": "x: y\nz: !!python/name:os.system",
    "an anchor": "&a *a %TAG ! @x `y",
    "nothing": "null",
    "a number": "0x10",
    "a terminal": "\x1b[2J\x9b31m\x08\x07[bold][/]",
    "a million letters": "x" * 10**6,
    "backticks": "`" * 99 + "x``y`",
}


class Page(HTMLParser):
    """What of a page would run, load or redirect."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.found = 0, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        if tag in ("base", "iframe", "object", "embed", "form", "link") or (
            tag == "meta" and ("http-equiv", "refresh") in attributes
        ):
            self.found.append(tag)
        for name, value in attributes:
            outer = (
                name in ("src", "href", "xlink:href", "data")
                and value
                and not value.startswith(("#", "data:image/", "https://huggingface.co/"))
            )
            if name.startswith("on") or outer:
                self.found.append((tag, name, value))


def poison(folder, text):
    def results(content):
        content["dataset"]["name"] = content["ensemble"] = content["rows"][0]["name"] = text
        content["dataset"] |= {"config": text, "revision": text, "recipe": text, "label_column": text}
        content["rows"][1]["name"] = text + " 2"

    edit(folder / DIGITS, results)
    stated = dict.fromkeys(
        ("source", "license", "pretraining_data", "objective", "hub_id", "revision", "weights"), text
    )
    edit(folder / "config.json", lambda c: [m["provenance"].update(stated) for m in c["members"]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", TEXTS)
@pytest.mark.slow
def test_text_stays_text_on_cards_and_pages(attack, made, folder, command):
    command("card", "pair")
    honest = ModelCard.load(folder / "README.md")
    (folder / "README.md").unlink()
    poison(folder, TEXTS[attack])
    for words in (
        ("card", "pair"),
        ("card", "pair", "--check"),
        ("report", "pair", "--output", "report.html"),
        ("build", "pair", "--output", "again"),
    ):
        code, out, err = command(*words)
        assert not {"\x1b", "\x07", "\x08", "\x9b", "\x00"} & set(out + err)
        if code == 2:
            assert words[0] != "report" or not Path("report.html").exists(), err
    if (folder / "README.md").exists():
        text = (folder / "README.md").read_text()
        assert not {"\x1b", "\x07", "\x9b", "\x00", "\u202e"} & set(text)
        data = ModelCard(text).data.to_dict()
        assert set(data) - {"license_name", "license_link", "datasets", "base_model", "base_model_relation"} <= set(
            honest.data.to_dict()
        )
        headings = [line for line in text.splitlines() if line.startswith(("#", "~~~", "[card]:", "[^1]:"))]
        assert len(headings) <= sum(line.startswith("#") for line in honest.content.splitlines()) + 1
    if Path("report.html").exists():
        page = Page(Path("report.html").read_text())
        assert not page.found and page.scripts <= 2


OWN = {
    "a template": "{{ config.__class__.__init__.__globals__ }}{% include '/etc/passwd' %}{% for x in range(10**9) %}",
    "a program in the front matter": "---\nx: !!python/object/apply:os.system ['touch ../canary']\n---\n# Mine\n",
    "laughs in the front matter": "---\na: &a [x, x]\n"
    + "".join(f"a{n}: &a{n} [*a, *a]\n" for n in range(99))
    + "---\n# Mine\n",
    "a nested front matter": "---\nx: " + "[" * 5000 + "\n---\n# Mine\n",
    "a front matter without end": "---\nx: y\n" * 10_000,
    "a megabyte of front matter": "---\nx: " + "y" * 10**6 + "\n---\n# Mine\n",
    "a hundred thousand headings": "# x\n" * 100_000,
    "a million backticks": "# Mine\n" + "`" * 10**6,
    "a hundred thousand fences": "# Mine\n```\n" * 100_000,
    "comments that do not end": "<!-- " * 100_000,
    "brackets": "# Mine\n" + "[" * 200_000,
    "blanks": "# Mine\n" + " " * 10**6 + "x",
    "no text": "\ufeff\x00\ud7ff",
    "other bytes": b"\xff\xfe\x00",
    "numbers as keys": "---\n1: 2\nnull: 3\ntrue: 4\n---\n# Mine\n",
    "dates": "---\nlicense: 2001-01-01\ntags: 2001-01-01T00:00:00Z\n---\n# Mine\n",
}


@pytest.mark.parametrize("attack", OWN)
def test_sections_of_an_earlier_card(attack, folder, command):
    content = OWN[attack]
    (folder / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, _ = command("card", "pair")
    text = (folder / "README.md").read_bytes().decode(errors="replace")
    assert "root:" not in text and (code == 2 or attack != "a template" or "__globals__" in text)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("50.0", "99.0"),
        lambda text: text.replace("value: 0.5", "value: 1.0"),
        lambda text: text.replace("license: other", "license: mit"),
        lambda text: text.replace("raw pixels", "another ensemble"),
        lambda text: text.replace("library_name: transformers", "library_name: timm"),
    ],
    ids=["a number", "the metadata's number", "the license", "a name", "the library"],
)
def test_a_card_that_was_changed_is_found(change, folder, command):
    command("card", "pair")
    assert command("card", "pair", "--check") == (0, "pair/README.md\n", "")
    text = (folder / "README.md").read_text()
    assert change(text) != text
    (folder / "README.md").write_text(change(text))
    assert command("card", "pair", "--check")[0] == 2


@pytest.mark.parametrize("digests", [[], ["0" * 64], None, "x", [None, 5], {"a": "b"}, ["reversed"]], ids=str)
def test_results_of_other_weights(digests, backbone, folder, command):
    other = assemble([backbone])
    with torch.no_grad():
        next(other.parameters()).add_(1)
    if digests == ["reversed"]:
        assemble([other, backbone]).save_pretrained("two")
        shutil.copytree(folder / "results", "two/results")
        assert command("card", "two")[0] == 2
        return
    edit(folder / DIGITS, lambda results: results.update(members_sha256=digests))
    code, _, _ = command("card", "pair")
    assert code == 2 or digests in ([], None)


LICENSES = [
    ["mit"],
    {"a": "mit"},
    5,
    "MIT\nlicense_name: evil",
    "mit OR gpl-3.0",
    "x" * 10**5,
    "",
    " ",
    "../../LICENSE",
    "[mit](javascript:x)",
    True,
    "CC-BY-NC-4.0 ",
]


@pytest.mark.parametrize("license", LICENSES, ids=lambda value: str(value)[:20])
def test_licenses_are_not_made_more_generous(license, folder, command):
    edit(folder / "config.json", lambda c: c["members"][0]["provenance"].update(license=license))
    edit(folder / "config.json", lambda c: c["members"][1]["provenance"].update(license="mit"))
    code, _, _ = command("card", "pair")
    if code == 0 and license != ["mit"]:
        data = ModelCard.load(folder / "README.md").data
        assert data.license != "mit" and "license_name" not in str(data.license)


# --- names that become paths or addresses ---------------------------------------------------------------------------

REPOS = {
    "a way out": "me/../../outside",
    "three parts": "me/x/y",
    "an address": "https://evil.example/me/x",
    "a revision that is a path": "me/x@../../outside",
    "a zero byte": "me/x\x00y",
    "a line": "me/x\nerror: y",
    "of Windows": "..\\..\\outside",
    "an option": "me/--token",
    "five thousand letters": "me/" + "x" * 5_000,
    "a terminal": "me/\x1b[31mx",
    "another kind": "datasets/me/x",
    "wide letters": unicodedata.normalize("NFKC", "me/x") + "\uff0fy",
    "dots": "me/..",
}


@pytest.mark.parametrize("attack", REPOS)
@pytest.mark.slow
def test_names_of_repos(attack, folder, command):
    repo = REPOS[attack]
    for words in (
        ("verify", repo),
        ("push", "pair", repo),
        ("build", f"hf-hub:{repo}", "--output", "out"),
        ("predict", repo, "photos"),
        ("probe", "pair", "--dataset", repo),
    ):
        code, _, err = command(*words)
        assert code == 2, words
        assert not Path("out").exists() and "\x1b" not in err and "\x00" not in err


@pytest.mark.parametrize("name", ["precious.txt", "new.html"])
def test_links_where_something_would_be_written(name, classifier, folder, photos, command):
    target = photos.parent.parent / "outside" / name
    Path("out").mkdir()
    for link in ("report.html", "predictions.csv", "out/config.json", f"out/{SHARD}", "out/report.html"):
        Path(link).symlink_to(target)
    command("report", "pair", "--output", "report.html", "--overwrite")
    command("predict", classifier, "photos", "--output", "predictions.csv", "--overwrite")
    command("build", "pair", "--output", "out", "--overwrite")
    command("report", "pair", "--output", "out/report.html", "--overwrite")


def test_a_circle_of_folders(folder, command):
    (folder / "results/again").symlink_to("..")
    (folder / "figures").symlink_to("results/again/results")
    command("card", "pair")
    command("report", "pair", "--output", "report.html")
    command("build", "pair", "--output", "again")


@pytest.mark.parametrize(
    "stem", ["", " ", "...", "-rf", "x" * 240, "a\nb", "<script>", "{{7*7}}", "%2e%2e%2f", "\x1b[31m", "[red]"]
)
def test_names_of_results(stem, folder, command):
    (folder / DIGITS).rename(folder / "results" / f"{stem}.json")
    for words in (("card", "pair"), ("report", "pair", "--output", "report.html")):
        out, err = command(*words)[1:]
        assert "\x1b" not in out + err
    if (folder / "README.md").exists():
        text = ModelCard.load(folder / "README.md").text
        assert "<script>" not in text and "\x1b" not in text and "49" not in text


# --- checkpoints ----------------------------------------------------------------------------------------------------


def deep(depth):
    value: dict = {"conv1.weight": torch.ones(1)}
    for _ in range(depth):
        value = {"model": value}
    return value


CHECKPOINTS = {
    "five thousand weights": lambda: {f"w{n}": torch.ones(1) for n in range(5_000)},
    "names of ten thousand dots": lambda: {"a." * 10_000 + str(n): torch.ones(1) for n in range(9)},
    "a name of a million letters": lambda: {"x" * 10**6: torch.ones(1)},
    "names that are numbers": lambda: {n: torch.ones(1) for n in range(9)},
    "names that are pairs": lambda: {("a", 1): torch.ones(1), None: torch.ones(1)},
    "two hundred levels": lambda: deep(200),
    "two thousand networks": lambda: {f"p{n}.bn1.weight": torch.ones(64) for n in range(2_000)},
    "a list": lambda: [torch.ones(1)] * 1000,
    "a number": lambda: 5,
    "text": lambda: "state_dict",
    "a sparse weight": lambda: {
        "conv1.weight": torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (2**30, 2**30))
    },
    "a quantized weight": lambda: {"conv1.weight": torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8)},
    "a weight without memory": lambda: {"conv1.weight": torch.ones(2**20, 2**20, device="meta")},
    "weights of arguments": lambda: {
        "state_dict": {"x": torch.ones(1)},
        "args": {"model": "../../outside/precious.txt"},
    },
    "a hidden architecture": lambda: {"arch": "hf-hub:evil/x", "state_dict": {"x": torch.ones(1)}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", CHECKPOINTS)
@pytest.mark.slow
def test_checkpoints_of_another_sort(attack, world, command):
    torch.save(CHECKPOINTS[attack](), "resnet10t.pth")
    for words in (("resnet10t.pth",), ("resnet10t=resnet10t.pth",)):
        assert command("build", *words, "--output", "out")[0] == 2
    assert not Path("out").exists()


def test_a_zip_that_says_it_is_small(world, command):
    torch.save({"conv1.weight": torch.zeros(1 << 20)}, "whole.pth")
    with zipfile.ZipFile("whole.pth") as whole, zipfile.ZipFile("resnet10t.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    content = Path("resnet10t.pth").read_bytes().replace(struct.pack("<I", 4 << 20), struct.pack("<I", 64))
    Path("resnet10t.pth").write_bytes(content)
    assert command("build", "resnet10t.pth", "--output", "out")[0] == 2


# --- what is written says nothing of whoever wrote it ---------------------------------------------------------------


@pytest.mark.slow
def test_secrets_of_the_user_are_nowhere(folder, photos, command, monkeypatch):
    secrets = {
        "HF_TOKEN": "hf_" + "Zq" * 17,
        "AWS_SECRET_ACCESS_KEY": "sEcReT-kEy",
        "USER": "jane.doe",
        "LOGNAME": "jane.doe",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    exif = PIL.Image.Exif()
    exif[0x9C9D], exif[315], exif[0x8825] = b"jane.doe", "jane.doe, 1 Secret Street", {1: "N", 2: (52.0, 30.0, 0.0)}
    for path in sorted(photos.rglob("*.png")):
        picture = PIL.Image.open(path)
        picture.convert("RGB").save(path.with_suffix(".jpg"), exif=exif, comment=b"jane.doe")
        path.unlink()
    options = ("--controls", "none", "--errors", "9", "--save-head", "--test-size", "0.5")
    assert command("probe", "pair", "--dataset", "imagefolder:photos", *options)[0] == 0
    assert command("card", "pair")[0] == 0
    assert command("report", "pair", "--output", "report.html")[0] == 0
    assert command("predict", "pair", "photos", "--output", "predictions.csv")[0] == 0
    for path in Path.cwd().rglob("*"):
        if path.is_file() and photos not in path.parents:
            content = path.read_bytes()
            pictures = [base64.b64decode(part.split(b'"')[0]) for part in content.split(b";base64,")[1:]]
            for secret in [*(value.encode() for value in secrets.values()), b"Secret Street"]:
                assert secret not in content, (path, secret)
                assert not [picture for picture in pictures if secret in picture or b"Exif" in picture], path


def test_errors_tell_nothing_of_what_they_could_not_read(folder, world, command):
    secret = world.parent / "outside/precious.txt"
    for name in (DIGITS, INDEX, SHARD, PROCESSOR, "config.json", "README.md"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        for words in (
            ("card", "pair"),
            ("build", "pair", "--output", "again"),
            ("report", "pair", "--output", "report.html"),
        ):
            out, err = command(*words)[1:]
            assert "mine" not in out + err
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(kept)


# --- several at once ------------------------------------------------------------------------------------------------


def at_once(*calls):
    """Run calls in threads; the errors that are neither ValueError nor OSError."""
    failures = []

    def run(call):
        try:
            call()
        except REFUSED:
            pass
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_results_are_whole_while_others_write_them(folder):
    results, seen = Results.load(folder / DIGITS), []

    def write():
        for _ in range(10):
            results.save(folder / DIGITS)

    def read():
        for _ in range(30):
            try:
                seen.append(Results.load(folder / DIGITS).ensemble)
            except ValueError as error:
                seen.append(error)

    assert not at_once(write, write, write, read, read)
    assert set(seen) == {"pair"} and len(seen) == 60 and Results.load(folder / DIGITS).ensemble == "pair"
    assert not [path for path in (folder / "results").iterdir() if path.name != "digits.json"]


def test_cards_at_once_are_one_card(folder):
    write_card(folder)
    once = (folder / "README.md").read_text()
    assert not at_once(*[lambda: write_card(folder)] * 3)
    assert (folder / "README.md").read_text() == once
    assert not list(folder.rglob("*.tmp"))


def test_a_model_is_saved_while_it_is_loaded(folder):
    model, loaded = AutoModel.from_pretrained(folder), []
    honest = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def save():
        for _ in range(5):
            model.save_pretrained(folder)

    def load():
        for _ in range(5):
            loaded.append(AutoModel.from_pretrained(folder).state_dict())

    assert not at_once(save, load)
    for weights in loaded:
        assert all(torch.equal(tensor, honest[name]) for name, tensor in weights.items())


# --- a Hub that attacks ---------------------------------------------------------------------------------------------

COMMIT = "c0ffee" + 34 * "0"
OUT = "../" * 12 + "outside/evil"


class EvilHub(BaseHTTPRequestHandler):
    """Answers by the name of the repo that is asked for, and notes what other hosts are told."""

    told, elsewhere, config = [], "", b""

    def do_GET(self):
        if self.path.startswith("/elsewhere"):
            self.told.append(self.headers.get("Authorization"))
            return self.answer(self.config)
        attack, is_file = self.path.removeprefix("/api/models/").strip("/").split("/")[1], "/resolve/" in self.path
        tag, commit = {"etag": (OUT, COMMIT), "commit": ("x", OUT)}.get(attack, ("x", COMMIT))
        if is_file and not self.path.endswith("/config.json"):
            return self.answer(b"", status=404, **{"X-Error-Code": "EntryNotFound"})
        if is_file and attack == "redirect":
            return self.answer(b"", status=302, Location=self.elsewhere)
        if is_file:
            content = {"page": b"<html>" + SCRIPT.encode(), "array": b"[]", "deep": b"[" * 100_000}.get(
                attack, self.config
            )
            size = len(content) // 2 if attack == "short" else len(content)
            return self.answer(content, size=size, ETag=f'"{tag}"', **{"X-Repo-Commit": commit})
        listing = [{"rfilename": name} for name in (OUT, "config.json", f"results/{OUT}.json")]
        tree = [{"type": "file", "path": file["rfilename"], "oid": "x", "size": 5} for file in listing]
        info = {"id": f"me/{attack}", "sha": commit, "siblings": listing, "private": False}
        return self.answer(json.dumps(tree if "/tree/" in self.path else info).encode())

    do_HEAD = do_GET

    def answer(self, content, status=200, size=None, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content) if size is None else size)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.slow  # the client waits and tries again
def test_a_hub_that_attacks(folder, world):
    attacks = ["etag", "commit", "redirect", "page", "array", "deep", "short"]
    with ThreadingHTTPServer(("127.0.0.1", 0), EvilHub) as server:
        EvilHub.elsewhere = f"http://localhost:{server.server_port}/elsewhere"
        EvilHub.config = (folder / "config.json").read_bytes()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = SimpleNamespace(
            environment={"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
        )
        client = Client(hub, world / "home", token="hf_secretOfTheUser", package=True)
        try:
            client("import transformers, huggingface_hub", "from concat_ensemble.commands.app import main")
            for attack in attacks:
                for words in (["verify", f"me/{attack}"], ["build", f"hf-hub:me/{attack}", "--output", "out"]):
                    _, err, failed = client.run(COMMAND.format(words=words))
                    assert failed == 2 and err.strip().splitlines()[-1].startswith("error: "), (words, err, failed)
                    assert "hf_secret" not in err and SCRIPT not in err
        finally:
            client.process.kill()
            client.process.wait()
        server.shutdown()
    assert not (world / "out").exists()
    assert not [token for token in EvilHub.told if token], "another host was told the token"
    inside = [path.relative_to(world / "home") for path in (world / "home").rglob("*") if "evil" in path.name]
    assert not inside, "a name of the Hub's became a path"
