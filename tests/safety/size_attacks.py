"""Small files that claim to be large, and large ones of nothing: each attack writes its files into the current folder,
and `python tests/safety/sizes.py` opens them in a process of its own.

Beside them stands `pair`, a copy of a tiny ensemble with results, for the attacks that change it.
"""

import io
import json
import random
import struct
import tarfile
import textwrap
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LARGE = "vit_7b_patch16_dinov3"  # 6.7 billion weights
PIXELS = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic", "image_mode": "RGB"}
PIXELS |= {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
RUN = {"seed": 0, "metrics": {"top1": 0.5}, "l2_strength": 0.1, "n_train": 9, "n_test": 9, "correct": "AAA="}
GB = 1 << 30
LOAD = "from transformers import AutoModel; AutoModel.from_pretrained('pair')"
READ = "from transformers import AutoImageProcessor; AutoImageProcessor.from_pretrained('pair')('{file}')"
DATA = """
from concat_ensemble import load_data
from concat_ensemble.data.images import read_image
data = load_data('{name}')
split = next(iter(data.values()))
for index in range(min(len(split), 20)):
    read_image(split, index)
"""


@dataclass
class Attack:
    make: Callable[[], None]
    words: tuple[str, ...] = ()  # of a command
    code: str = ""  # run as a command is, where there are no words
    is_allowed: bool = False  # whether it may succeed, since only the time and the memory would be wrong

    @property
    def name(self) -> str:
        return self.make.__name__.replace("_", " ")

    @property
    def needs_ensemble(self) -> bool:
        return "pair" in (*self.words, *self.code.split("'"))


ATTACKS: dict[str, Attack] = {}


def command(*words: str, is_allowed: bool = False):
    """Mark a function as an attack on this command."""
    return lambda make: _add(Attack(make, words=words, is_allowed=is_allowed))


def code(text: str, is_allowed: bool = False):
    """Mark a function as an attack on a user's own lines."""
    return lambda make: _add(Attack(make, code=textwrap.dedent(text), is_allowed=is_allowed))


def _add(attack: Attack) -> Callable[[], None]:
    ATTACKS[attack.name] = attack
    return attack.make


# --- what attacks are made of ---------------------------------------------------------------------------------------


def edit(path: str, change: Callable) -> None:
    content = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(change(content) or content))


def write_safetensors(path: str, header: dict | bytes, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def write_names(path: str, names, **metadata: str) -> None:
    """A safetensors file with an empty tensor of each name."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_safetensors(path, {"__metadata__": metadata, **dict.fromkeys(names, empty)})


def write_timm_config(folder: str, architecture: str, size: int = 224, **model_args) -> None:
    pixels = {"input_size": [3, size, size], "num_classes": 0, "architecture": architecture}
    config = {"architecture": architecture, "num_classes": 0, "model_args": model_args, "pretrained_cfg": pixels}
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(config))


def member(architecture: str, size: int = 224, num_features: int = 8, **model_args) -> dict:
    pixels = PIXELS | {"input_size": [3, size, size]}
    spec = {"architecture": architecture, "model_args": model_args, "num_features": num_features}
    return spec | {"preprocessing": pixels, "provenance": {}}


def put_members(*members: dict) -> None:
    edit("pair/config.json", lambda config: config.update(members=list(members)))


def write_zeros(architecture: str, size: int, prefix: str, path: str, **model_args) -> int:
    """A file with zeros for each weight of a network, which fits it. Returns its number of features."""
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.device("meta"):
        network = timm.create_model(architecture, num_classes=0, **model_args)
    tensors = {
        f"{prefix}{key}": torch.zeros(value.shape, dtype=value.dtype) for key, value in network.state_dict().items()
    }
    save_file(tensors, path, {"format": "pt"})
    return network.num_features


def put_network(architecture: str, size: int, **model_args) -> None:
    """Make `pair` an ensemble of this one network, with weights that fit."""
    path = "pair/member-00.safetensors"
    features = write_zeros(architecture, size, "members.0.", path, **model_args)
    put_members(member(architecture, size, features, **model_args))
    names = json.loads(Path(path).read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names.keys() - {"__metadata__"}, Path(path).name)}
    Path("pair/model.safetensors.index.json").write_text(json.dumps(index))
    Path("pair/member-01.safetensors").unlink()


def put_geometries(*geometries: dict) -> None:
    edit("pair/preprocessor_config.json", lambda content: content.update(geometries=[PIXELS | g for g in geometries]))


def png(
    width: int, height: int, *, color: int = 2, depth: int = 8, before: bytes = b"", rows: int | None = None
) -> bytes:
    """A black picture, in gray (`color` 0) or RGB (2), with chunks `before` its pixels, and all or some rows."""
    row = 1 + width * depth // 8 * (3 if color == 2 else 1)
    pack, pixels = zlib.compressobj(9), b""
    for _ in range(height if rows is None else rows):
        pixels += pack.compress(bytes(row))
    pixels += pack.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tiff(pages: int, *, in_a_circle: bool = False) -> bytes:
    """Gray pages of 8x8 pixels that share these."""
    entries = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    size, start = 2 + 12 * len(entries) + 4, 72
    out = io.BytesIO()
    out.write(b"II*\0" + struct.pack("<I", start) + bytes(range(64)))
    for page in range(pages):
        following = start + (page + 1) * size if page + 1 < pages else start if in_a_circle else 0
        out.write(struct.pack("<H", len(entries)))
        out.write(b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items()))
        out.write(struct.pack("<I", following))
    return out.getvalue()


def see_channels() -> None:
    four = {"input_size": [4, 64, 64], "mean": [0.5] * 4, "std": [0.5] * 4}
    put_geometries(PIXELS | four | {"image_mode": "channels", "channels": [0, 1, 2, 3]})


def npy_header(*shape: int) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def deflate_zeros(archive: zipfile.ZipFile, name: str, size: int) -> None:
    with archive.open(name, "w", force_zip64=True) as file:
        for _ in range(size // (1 << 24)):
            file.write(bytes(1 << 24))


def parquet_rows(pictures: list[bytes], **options) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": picture, "path": None} for picture in pictures], kinds)
    table = pa.table({"image": images, "label": [n % 2 for n in range(len(pictures))]})
    pq.write_table(table, "x.parquet", **options)


# --- networks -------------------------------------------------------------------------------------------------------


@command("build", "x.safetensors", "--output", "out")
def a_checkpoint_of_124_bytes_of_7_billion_weights():
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"__metadata__": {"architecture": LARGE}, "x": entry}, separators=(",", ":")).encode()
    write_safetensors("x.safetensors", text, bytes(4))


@command("build", "x.pth", "--output", "out")
def a_pickle_of_7_billion_weights():
    import torch

    torch.save({"arch": LARGE, "state_dict": {"x": torch.zeros(1)}}, "x.pth")


@command("build", "x", "--output", "out")
def a_timm_folder_of_7_billion_weights_without_any():
    write_timm_config("x", LARGE)


@command("build", "x", "--output", "out")
def a_timm_folder_of_7_billion_weights_with_one():
    write_timm_config("x", LARGE)
    write_safetensors("x/model.safetensors", {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))


HUB = """
import os
from pathlib import Path
from tests.hub_server import HubServer
with HubServer(Path('hub')) as hub:
    os.environ |= hub.environment
    files = {{path.name: hub.store(path.read_bytes(), lfs=True) for path in Path('x').iterdir()}}
    hub.create('models', 'me/x', private=False)
    hub.write('models', 'me/x', hub.repo('models', 'me/x'), 'refs/heads/main', files, 'x')
    from concat_ensemble import assemble
    assemble('hf-hub:me/x')
""".replace("{{", "{").replace("}}", "}")


@code(HUB)
def a_Hub_repo_of_7_billion_weights_without_any():
    write_timm_config("x", LARGE)


@code(HUB)
def a_Hub_repo_of_attention_masks():
    small = {"embed_dim": 8, "depths": [100], "num_heads": [1], "img_size": 4096}
    write_timm_config("x", "swin_tiny_patch4_window7_224", 4096, **small)
    write_zeros("swin_tiny_patch4_window7_224", 4096, "", "x/model.safetensors", **small)


@code(LOAD)
def attention_masks_of_large_images():
    put_network("swin_tiny_patch4_window7_224", 4096, embed_dim=8, depths=[100], num_heads=[1], img_size=4096)


@command("build", "x", "--output", "out")
def a_timm_folder_of_attention_masks():
    a_Hub_repo_of_attention_masks()


@code(LOAD)
def relative_positions_of_large_images():
    small = {"embed_dim": 8, "depth": 1, "num_heads": 1, "img_size": 4096}
    put_network("beit_base_patch16_224", 4096, **small)


@code(LOAD)
def relative_positions_of_many_layers():
    small = {"embed_dim": 8, "depth": 100, "num_heads": 1, "img_size": 1024}
    put_network("beit_base_patch16_224", 1024, **small)


@code(LOAD)
def relative_positions_of_a_large_window():
    small = {"embed_dim": 8, "depths": [2], "num_heads": [1], "img_size": 1024, "window_size": 256}
    put_network("swin_tiny_patch4_window7_224", 1024, **small)


@code(LOAD)
def depths_of_60_000_stages():
    put_members(member("convnext_tiny", depths=[1] * 60_000, dims=[8] * 60_000))


@code(LOAD)
def layers_of_60_000_stages():
    put_members(member("resnet10t", layers=[1] * 60_000, channels=[8] * 60_000))


@code(LOAD)
def one_stage_of_60_000_layers():
    put_members(member("convnext_tiny", depths=[60_000], dims=[8]))


@code(LOAD)
def a_width_of_65_536():
    put_members(member("vit_tiny_patch16_224", num_features=65_536, embed_dim=65_536, depth=1, num_heads=1))


@code(LOAD)
def positions_of_16_million_patches():
    put_members(member("vit_tiny_patch16_224", 4096, img_size=4096, patch_size=1, embed_dim=512, depth=1))


@code(LOAD)
def large_members_256_times():
    put_members(*[member("vit_huge_patch14_224", num_features=1280)] * 256)


@code(LOAD)
def deep_members_256_times():
    put_members(*[member("vit_tiny_patch16_224", depth=1000, embed_dim=8, num_heads=1)] * 256)


@command("build", "x.pth", "--output", "out")
def arguments_of_a_training_with_large_images():
    import torch

    arguments = {"model": "beit_base_patch16_224", "img_size": 4096}
    torch.save({"arch": "beit_base_patch16_224", "args": arguments, "state_dict": {"x": torch.zeros(1)}}, "x.pth")


# --- names of weights -----------------------------------------------------------------------------------------------


@command("build", "resnet10t.safetensors", "--output", "out")
def a_million_names_of_weights():
    write_names("resnet10t.safetensors", (f"n{n}" for n in range(1_000_000)))


@command("build", "resnet10t.safetensors", "--output", "out")
def names_of_weights_of_a_megabyte():
    write_names("resnet10t.safetensors", (f"{n}" + "n" * 1_000_000 for n in range(90)))


@command("build", "resnet10t.safetensors", "--output", "out")
def names_of_weights_of_a_million_dots():
    write_names("resnet10t.safetensors", (f"{n}" + "." * 1_000_000 for n in range(2)))


@command("build", "resnet10t.pth", "--output", "out")
def a_million_names_of_weights_in_a_pickle():
    import torch

    torch.save(dict.fromkeys((f"n{n}" for n in range(1_000_000)), torch.zeros(1)), "resnet10t.pth")


@command("build", "resnet10t.pth", "--output", "out")
def names_of_weights_of_a_megabyte_in_a_pickle():
    import torch

    torch.save(dict.fromkeys((f"{n}" + "n" * 1_000_000 for n in range(90)), torch.zeros(1)), "resnet10t.pth")


@code(LOAD)
def a_million_names_in_an_ensemble():
    write_names("pair/member-00.safetensors", (f"members.0.n{n}" for n in range(1_000_000)))


@code(LOAD, is_allowed=True)
def a_million_names_in_an_index():
    names = {f"members.0.n{n}": "member-00.safetensors" for n in range(1_000_000)}
    edit("pair/model.safetensors.index.json", lambda index: index["weight_map"].update(names))


@command("build", "resnet10t.safetensors", "--output", "out")
def a_header_that_claims_100_MB():
    write_safetensors("resnet10t.safetensors", b"{}", length=100_000_000)


@command("build", "resnet10t.safetensors", "--output", "out")
def a_header_of_99_MB_of_spaces():
    write_safetensors("resnet10t.safetensors", b"{" + b" " * 99_000_000 + b"}")


@code(LOAD)
def a_header_of_an_ensemble_that_claims_exabytes():
    write_safetensors("pair/member-00.safetensors", b"{}", length=1 << 62)


# --- archives -------------------------------------------------------------------------------------------------------


@command("build", "resnet10t.pth", "--output", "out")
def a_zip_bomb_as_a_checkpoint():
    with zipfile.ZipFile("resnet10t.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("archive/data.pkl", "archive/data/0"):
            deflate_zeros(archive, name, 2 * GB)


@command("build", "resnet10t.pth", "--output", "out")
def a_zip_bomb_beside_64_MB_of_noise():
    import torch
    from torch.serialization import skip_data

    size = 3 * GB
    with skip_data():  # a sparse file
        torch.save({"state_dict": {"conv1.weight": torch.empty(size // 4)}}, "whole")
    with (
        zipfile.ZipFile("whole") as whole,
        zipfile.ZipFile("resnet10t.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for name in whole.namelist():
            inner = f"archive/{name.split('/', 1)[1]}"
            if name.endswith("data/0"):
                deflate_zeros(archive, inner, size)
            else:
                archive.writestr(inner, whole.read(name), zipfile.ZIP_STORED)
        archive.writestr("archive/noise", random.Random(0).randbytes(64 << 20), zipfile.ZIP_STORED)
    Path("whole").unlink()


@command("build", "vit_tiny_patch16_224.npz", "--output", "out")
def a_zip_bomb_as_npz():
    with zipfile.ZipFile("vit_tiny_patch16_224.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        deflate_zeros(archive, "embedding/kernel.npy", 2 * GB)


def write_npz(*shape: int) -> None:
    with zipfile.ZipFile("vit_tiny_patch16_224.npz", "w") as archive:
        archive.writestr("embedding/kernel.npy", npy_header(*shape) + bytes(64))


@command("build", "vit_tiny_patch16_224.npz", "--output", "out")
def an_npz_header_of_terabytes():
    write_npz(1 << 40)


@command("build", "vit_tiny_patch16_224.npz", "--output", "out")
def an_npz_header_of_3_gigabytes():
    write_npz(3 << 28)


@code(DATA.format(name="x.parquet"))
def an_npy_header_of_terabytes_in_a_dataset():
    parquet_rows([npy_header(4, 1 << 20, 1 << 20) + bytes([n] * 64) for n in range(8)])


@code(DATA.format(name="x.parquet"))
def an_npy_header_of_3_gigabytes_in_a_dataset():
    parquet_rows([npy_header(3, 1 << 14, 1 << 14) + bytes([n] * 64) for n in range(8)])


# --- pictures -------------------------------------------------------------------------------------------------------


@code(READ.format(file="x.png"))
def a_picture_of_1_x_60_000():
    put_geometries({})
    Path("x.png").write_bytes(png(1, 60_000))


@code(READ.format(file="x.png"))
def a_picture_of_60_000_x_1():
    put_geometries({"interpolation": "nearest"})
    Path("x.png").write_bytes(png(60_000, 1))


@code(READ.format(file="x.png"))
def a_picture_of_60_000_x_60_000():
    put_geometries({})
    Path("x.png").write_bytes(png(60_000, 60_000, rows=1))


@code(READ.format(file="x.png"), is_allowed=True)
def a_picture_just_below_the_limit_of_Pillow():
    put_geometries({})
    Path("x.png").write_bytes(png(13_300, 13_300))


@code(READ.format(file="x.png"), is_allowed=True)
def a_picture_of_16_bits_just_below_the_limit_of_Pillow():
    put_geometries({})
    Path("x.png").write_bytes(png(13_300, 13_300, color=0, depth=16))


@code(READ.format(file="x.gif"), is_allowed=True)
def a_GIF_of_100_000_frames():
    put_geometries({})
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 2, 2, 0) + b"\x02\x03\x04\x08\x05\x00"
    head = b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    Path("x.gif").write_bytes(head + frame * 100_000 + b";")


@code(READ.format(file="x.gif"))
def a_GIF_screen_of_65_535_x_65_535():
    put_geometries({})
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 2, 2, 0) + b"\x02\x03\x04\x08\x05\x00"
    Path("x.gif").write_bytes(b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6) + frame + b";")


@code(READ.format(file="x.tif"), is_allowed=True)
def a_TIFF_of_100_000_pages():
    see_channels()
    Path("x.tif").write_bytes(tiff(100_000))


@code(READ.format(file="x.tif"), is_allowed=True)
def a_TIFF_whose_pages_go_in_a_circle():
    see_channels()
    Path("x.tif").write_bytes(tiff(8, in_a_circle=True))


@code(READ.format(file="x.png"), is_allowed=True)
def a_color_profile_of_a_gigabyte():
    put_geometries({})
    pack = zlib.compressobj(9)
    profile = b"".join(pack.compress(bytes(1 << 24)) for _ in range(64)) + pack.flush()
    Path("x.png").write_bytes(png(8, 8, before=chunk(b"iCCP", b"x\0\0" + profile)))


@code(READ.format(file="x.png"), is_allowed=True)
def a_crop_of_a_tenth_at_4_096_pixels():
    put_geometries({"input_size": [3, 4096, 4096], "crop_pct": 0.1})
    Path("x.png").write_bytes(png(64, 64))


@code(READ.format(file="x.png"), is_allowed=True)
def a_processor_of_500_geometries():
    put_geometries(*({"input_size": [3, 4096, 4096 - n]} for n in range(500)))
    Path("x.png").write_bytes(png(64, 64))


@code(READ.format(file="x.png"), is_allowed=True)
def a_processor_of_100_000_geometries():
    put_geometries(*({"input_size": [3, 8, 8], "crop_pct": 1 + n / 1e6} for n in range(100_000)))
    Path("x.png").write_bytes(png(64, 64))


# --- text -----------------------------------------------------------------------------------------------------------


@command("card", "pair")
def a_config_of_200_MB_of_numbers():
    text = Path("pair/config.json").read_text()
    Path("pair/config.json").write_text(text[:-2] + ', "x": [' + "1.5," * 50_000_000 + "1]}")


@command("build", "x", "--output", "out")
def a_timm_config_of_200_MB_of_numbers():
    write_timm_config("x", "resnet10t")
    text = Path("x/config.json").read_text()
    Path("x/config.json").write_text(text[:-1] + ', "x": [' + "1.5," * 50_000_000 + "1]}")


@code(READ.format(file="x.png"))
def a_processor_file_of_200_MB_of_numbers():
    text = Path("pair/preprocessor_config.json").read_text()
    Path("pair/preprocessor_config.json").write_text(text.rstrip()[:-1] + ', "x": [' + "1.5," * 50_000_000 + "1]}")
    Path("x.png").write_bytes(png(64, 64))


@code(LOAD)
def an_index_of_200_MB_of_numbers():
    Path("pair/model.safetensors.index.json").write_text('{"weight_map": {}, "x": [' + "1.5," * 50_000_000 + "1]}")


NESTED = "[" * 100_000


@command("card", "pair")
def a_config_nested_100_000_times():
    Path("pair/config.json").write_text('{"model_type": "concat_ensemble", "members": ' + NESTED)


@command("card", "pair")
def results_nested_100_000_times():
    Path("pair/results/digits.json").write_text('{"rows": ' + NESTED)


@code(READ.format(file="x.png"))
def a_processor_file_nested_100_000_times():
    text = '{"image_processor_type": "ConcatEnsembleImageProcessor", "geometries": '
    Path("pair/preprocessor_config.json").write_text(text + NESTED)
    Path("x.png").write_bytes(png(64, 64))


@code(LOAD)
def an_index_nested_100_000_times():
    Path("pair/model.safetensors.index.json").write_text('{"weight_map": ' + NESTED)


def put_rows(count: int) -> None:
    path = Path("pair/results/digits.json")
    content = json.loads(path.read_text())
    row = json.dumps(content["rows"][1])
    content["rows"] = [*content["rows"][:1], "the others"]
    path.write_text(json.dumps(content).replace('"the others"', ", ".join([row] * count)))


@command("card", "pair")
def results_of_a_million_rows():
    put_rows(1_000_000)


def write_results(**run) -> None:
    row = {"name": "pair", "kind": "ensemble", "num_features": 32, "runs": [RUN | run]}
    content = {"schema_version": 2, "ensemble": "pair", "dataset": {"name": "digits"}, "probe": {}, "rows": [row]}
    Path("x").mkdir()
    Path("x/digits.json").write_text(json.dumps(content))


@command("report", "x")
def results_that_claim_10_to_the_15_images():
    write_results(n_test=10**15)


@command("report", "x")
def a_report_nested_100_000_times():
    write_results()
    Path("x/digits.json").write_text('{"rows": ' + NESTED)


@command("report", "x")
def results_of_a_number_of_a_million_digits():
    write_results()
    path = Path("x/digits.json")
    path.write_text(path.read_text().replace('"n_train": 9', '"n_train": ' + "9" * 1_000_000))


@command("report", "pair", "--output", "report.html")
def a_report_of_a_million_rows():
    put_rows(1_000_000)


@command("report", "pair", "--output", "report.html", is_allowed=True)
def a_report_of_10_000_rows():
    put_rows(10_000)


def put_front_matter(text: str) -> None:
    Path("pair/README.md").write_text(f"---\n{text}\n---\n\n# Pair\n")


@command("card", "pair")
def front_matter_nested_100_000_times():
    put_front_matter("x: " + NESTED)


@command("card", "pair")
def front_matter_of_a_billion_laughs():
    put_front_matter("a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)))


@command("card", "pair")
def front_matter_of_100_MB():
    put_front_matter("x: [" + "1, " * 33_000_000 + "1]")


@command("card", "pair")
def front_matter_of_a_number_of_a_million_digits():
    put_front_matter("x: " + "9" * 1_000_000)


@command("card", "pair", is_allowed=True)
def a_card_of_a_million_sections():
    Path("pair/README.md").write_text("# Pair\n\n" + "".join(f"## {n}\n\nx\n\n" for n in range(1_000_000)))


@code(
    "from pathlib import Path\nfrom concat_ensemble.data.dataset_recipes import DatasetRecipe\n"
    "DatasetRecipe.read(Path('x.yaml'))"
)
def a_recipe_of_a_gigabyte():
    with Path("x.yaml").open("wb") as file:
        file.truncate(3 * GB)


@code("from pathlib import Path\nfrom concat_ensemble.training.recipe import Recipe\nRecipe.from_file(Path('x.yaml'))")
def a_recipe_of_a_billion_laughs():
    laughs = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 64))
    Path("x.yaml").write_text(f"a0: &a0 [x, x]\n{laughs}name: *a63\n")


# --- datasets -------------------------------------------------------------------------------------------------------


def add_to_tar(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


@code(DATA.format(name="x.tar"))
def a_tar_entry_that_claims_a_terabyte():
    with tarfile.open("x.tar", "w") as archive:
        entry = tarfile.TarInfo("0.png")
        entry.size = 1 << 40
        archive.fileobj.write(entry.tobuf(tarfile.GNU_FORMAT))


@code(DATA.format(name="x.tar"))
def a_sparse_tar_entry_of_a_terabyte():
    sparse = tarfile.TarInfo("0.png")
    sparse.size, sparse.type = 512, tarfile.GNUTYPE_SPARSE
    head = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    head[386:398], head[398:410] = b"00000000000\0", b"00000001000\0"  # 512 bytes at the start
    head[482], head[483:495] = 0, (1 << 40).to_bytes(12, "big")  # the whole length, in base 256
    head[483] |= 0x80
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    Path("x.tar").write_bytes(bytes(head) + bytes(512) + bytes(1024))


@code(DATA.format(name="x.tar"))
def a_tar_of_100_000_entries_of_nothing():
    with tarfile.open("x.tar", "w") as archive:
        for number in range(100_000):
            add_to_tar(archive, f"{number}.txt", b"")


@code(DATA.format(name="x.parquet"))
def a_parquet_that_claims_10_to_the_15_rows():
    import pyarrow.parquet as pq

    parquet_rows([png(8, 8 + n) for n in range(7)])
    content = bytearray(Path("x.parquet").read_bytes())
    (length,) = struct.unpack("<I", content[-8:-4])
    start = len(content) - 8 - length
    footer = content[start:-8].replace(b"\x16\x0e", b"\x16" + varint(2 * 10**15))  # thrift's i64 of 7
    Path("x.parquet").write_bytes(bytes(content[:start]) + footer + struct.pack("<I", len(footer)) + b"PAR1")
    assert pq.read_metadata("x.parquet").num_rows == 10**15


def varint(number: int) -> bytes:
    digits = []
    while number:
        digits.append(number & 127 | (128 if number > 127 else 0))
        number >>= 7
    return bytes(digits)


@code(DATA.format(name="x"))
def a_folder_of_picture_bombs():
    for label in "ab":
        Path("x", label).mkdir(parents=True)
        for number in range(5):
            Path("x", label, f"{number}.png").write_bytes(png(60_000, 60_000, rows=number))


def make_ensemble() -> None:
    """Write `pair`."""
    import timm
    import torch

    from concat_ensemble import assemble
    from concat_ensemble.studies.provenance import members_sha256
    from concat_ensemble.studies.results import Results, Row, Run

    torch.manual_seed(0)
    sees = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    small = {"channels": (8, 8, 16, 16), "stem_width": 8, "num_classes": 0}
    model = assemble([timm.create_model("resnet10t", pretrained_cfg_overlay=sees, **small)] * 2)
    model.save_pretrained("pair")
    rows = [
        Row(name, kind, 32, 2, runs=[Run(0, {"top1": 0.5}, 0.1, 10, 10)])
        for name, kind in (("pair", "ensemble"), ("raw pixels", "control"))
    ]
    Results("pair", {"name": "digits"}, {}, rows, members_sha256(model.config)).save(Path("pair/results/digits.json"))
