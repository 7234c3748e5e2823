"""Datasets that name files of this machine as their images: only regular files below the dataset's own folder are
opened. Each attack is loaded as a user would; `world` sees that it neither hangs nor takes a gigabyte."""

import io
import json
import os
import tarfile
from itertools import islice
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset

from concat_ensemble import load_data
from concat_ensemble.data.images import image_hashes, read_image
from concat_ensemble.data.loading import load_stream
from concat_ensemble.inference.image_sources import open_images
from concat_ensemble.training.images import Images, Pixels
from concat_ensemble.training.recipe import Recipe

ROWS = 12


@pytest.fixture
def data(world):
    """A folder for a dataset, beside a private picture, a pipe and links out of it."""
    folder = world / "data"
    (folder / "inner").mkdir(parents=True)
    own = [folder / f"own{n}.png" for n in range(ROWS)]
    for place in (world / "private.png", world / "data-private.png", folder / "inner/own.png", *own):
        PIL.Image.effect_noise((8, 8), 50).save(place)
    PIL.Image.effect_noise((8, 8), 50).save(world / "../outside/photo.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(world / "private.png")
    (folder / "linked").symlink_to(world)
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "memory.png").symlink_to("/proc/self/mem")
    yield folder
    (world / "../outside/photo.png").unlink()


PATHS = {
    "a device": "/dev/zero",
    "a terminal": "/dev/tty",
    "standard input": "/dev/stdin",
    "a descriptor": "/dev/fd/0",
    "a file of the system": "/etc/passwd",
    "the environment": "/proc/self/environ",
    "this very folder by another way": "/proc/self/cwd/private.png",
    "above": "{data}/../private.png",
    "above, in the middle": "{data}/inner/../../private.png",
    "above, after what does not exist": "{data}/no/../../private.png",
    "above, relative": "data/../private.png",
    "beside, with the same beginning": "{data}-private.png",
    "absolute": "{world}/private.png",
    "relative to where the process stands": "private.png",
    "outside": "{world}/../outside/photo.png",
    "a link": "{data}/link.png",
    "through a linked folder": "{data}/linked/private.png",
    "a link to a device": "{data}/device.png",
    "a link to memory": "{data}/memory.png",
    "a web address": "https://evil.example/x.png",
    "an unsafe web address": "http://evil.example/x.png",
    "an address of a file": "file:///etc/passwd",
    "an address of a file beside": "file://{world}/private.png",
    "the Hub": "hf://datasets/me/private/x.png",
    "a bucket": "s3://private/x.png",
    "a file in an archive": "zip://x.png::{world}/private.zip",
    "in capitals": "HTTPS://evil.example/x.png",
    "the home folder": "~/private.png",
    "nothing before a zero byte": "{data}/own.png\0.png",
    "markup on several lines": "{world}/\n\x1b[31m<script>private.png",
    "an empty name": "",
    "the root": "/",
    "the folder itself": "{data}/.",
}
# Inside the folder, and still no regular file: named when it is read.
INSIDE = {
    "a link to itself": "{data}/loop.png",
    "a name too long": "{data}/" + "x" * 5000,
    "a pipe": "{data}/pipe.png",
    "a folder": "{data}/inner",
    "no file": "{data}/no",
}


def name(path, folder):
    return path.format(data=folder, world=folder.parent)


def own(folder):
    return [f"{folder}/own{n}.png" for n in range(ROWS - 1)]


def write_parquet(folder, path):
    good = PIL.Image.new("L", (8, 8))
    rows = []
    for number in range(ROWS):
        buffer = io.BytesIO()
        good.putpixel((0, 0), number)
        good.save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": path}, "label": f"{number % 2}"})
    rows[ROWS - 1]["image"] = {"bytes": None, "path": path}
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return f"parquet:{folder}/*.parquet"


def write_strings(folder, path):
    rows = {"image": [*own(folder), path], "label": [f"{n % 2}" for n in range(ROWS)]}
    pq.write_table(pa.table(rows), folder / "train.parquet")
    return str(folder)


def write_csv(folder, path):
    lines = [f"{each},{n % 2}" for n, each in enumerate(own(folder))]
    quoted = '"' + path.replace('"', '""') + '"'
    (folder / "train.csv").write_text("\n".join(["image,label", *lines, f"{quoted},1"]) + "\n")
    return f"csv:{folder}/train.csv"


def write_json(folder, path):
    rows = [{"image": {"bytes": None, "path": each}, "label": n % 2} for n, each in enumerate(own(folder))]
    rows.append({"image": {"bytes": None, "path": path}, "label": 1})
    (folder / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"json:{folder}"


def write_saved(folder, path):
    rows = [{"bytes": None, "path": each} for each in (*own(folder), path)]
    features = Features(image={"bytes": Value("binary"), "path": Value("string")}, label=ClassLabel(names=["a", "b"]))
    split = Dataset.from_dict({"image": rows, "label": [n % 2 for n in range(ROWS)]}, features=features)
    for special in ("pipe.png", "loop.png", "device.png"):
        (folder / special).unlink()
    split.save_to_disk(folder)
    return str(folder)


SOURCES = {"parquet": write_parquet, "strings": write_strings, "csv": write_csv, "json": write_json}


def all_ways(source):
    """Everything that reads the images of a dataset."""
    splits = load_data(source)
    for split in splits.values():
        image_hashes(split)
        for row in range(len(split)):
            read_image(split, row)
    images = open_images(source)
    for number in range(len(images)):
        images.read(number)


KINDS = ["a device", "above", "absolute", "a link", "a web address", "an address of a file"]
CASES = [("parquet", attack) for attack in PATHS]
CASES += [(source, attack) for source in ("strings", "csv", "json") for attack in KINDS]


@pytest.mark.parametrize(("source", "attack"), CASES)
def test_a_table_that_names_a_file_elsewhere(source, attack, data):
    path = name(PATHS[attack], data)
    source = SOURCES[source](data, path)
    for read in (load_data, open_images):
        with pytest.raises(ValueError) as error:
            read(source) if path else all_ways(source)
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value) and len(str(error.value)) < 700
        if path and "://" not in path:
            assert f"image {ROWS - 1} of the " in str(error.value), error.value


@pytest.mark.parametrize(
    ("source", "attack"), [("parquet", attack) for attack in INSIDE] + [("csv", "a pipe"), ("json", "a pipe")]
)
def test_a_table_that_names_no_regular_file_of_its_own(source, attack, data):
    source = SOURCES[source](data, name(INSIDE[attack], data))
    with pytest.raises(ValueError, match=r"image \d+ .*cannot be read") as error:
        all_ways(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("attack", KINDS)
def test_a_saved_dataset_that_names_a_file_elsewhere(attack, data):
    with pytest.raises(ValueError, match=r"image 11 of the|are addresses"):
        load_data(write_saved(data, name(PATHS[attack], data)))


@pytest.mark.parametrize("attack", KINDS)
def test_a_stream_that_names_a_file_elsewhere(attack, data):
    path = name(PATHS[attack], data)
    source = write_parquet(data, path)
    table = pq.read_table(data / "train.parquet")
    table = table.set_column(1, "label", pa.array([number % 2 for number in range(ROWS)]))
    features = Features(image=Image(), label=ClassLabel(names=["0", "1"]))
    settings = {b"huggingface": json.dumps({"info": {"features": features.to_dict()}}).encode()}
    pq.write_table(table.replace_schema_metadata(settings), data / "train.parquet")
    with pytest.raises(ValueError, match=r"image 11 of the train split|are addresses"):
        list(load_stream(source))
    for row in islice(load_stream(source), ROWS - 1):
        assert row["image"]["bytes"].startswith(b"\x89PNG"), "the file was taken in place of the bytes"
    stream = load_dataset("parquet", data_files=str(data / "train.parquet"), streaming=True)
    if attack == "absolute":
        assert len(load_data(stream, limit=ROWS - 1)) == 3  # the user's own; the bytes are those of the table
    recipe = Path(__file__).parents[2] / "training/recipes/imagenet_resnet50_cat1.yaml"
    settings = Recipe.from_file(recipe, dataset=source, streaming=True, batch_size=4, evaluate_every=0, num_workers=0)
    with pytest.raises(ValueError, match=r"image 11 of the train split|are addresses"):
        for _ in zip(range(9), Images(settings, Pixels((1, 8, 8), (0.5,), (0.5,))).batches([0], 0), strict=False):
            pass


def test_files_of_its_own_are_read(data):
    for write in SOURCES.values():
        for path in (f"{data}/inner/own.png", f"{data}/inner/../own11.png", "data/own11.png"):
            all_ways(write(data, path))
            for file in data.glob("train.*"):
                file.unlink()


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "{data}/pipe.png", "{data}/device.png", "/proc/self/mem"])
def test_a_dataset_in_memory_may_name_any_file_but_no_device(path, data):
    paths = [f"{data.parent}/private.png", *own(data)[1:], name(path, data)]
    features = Features(image=Image(decode=False), label=ClassLabel(names=["a", "b"]))
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "label": [n % 2 for n in range(12)]}
    dataset = Dataset.from_dict(rows, features=features)
    all_ways(dataset.select(range(11)))
    with pytest.raises(ValueError, match=r"cannot be read: it is not a regular file|the file is empty"):
        all_ways(dataset)
    with pytest.raises(ValueError, match="cannot be read"):
        all_ways(DatasetDict(train=dataset))


# --- folders of images ----------------------------------------------------------------------------------------------


def photos(folder):
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for n in range(6):
            PIL.Image.effect_noise((8, 8), 50).save(folder / label / f"{n}.png")
    return folder


def test_links_in_a_folder_of_images_are_followed(data, world):
    folder = photos(world / "photos")
    (folder / "a/link.png").symlink_to(world / "private.png")
    (world / "more").mkdir()
    PIL.Image.effect_noise((8, 8), 50).save(world / "more/x.png")
    (folder / "c").symlink_to(world / "more")
    for source in (folder, f"imagefolder:{folder}", str(folder)):
        all_ways(source)
    assert sum(map(len, load_data(folder).values())) == 14


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/tty", "/proc/self/mem", "pipe", "{data}/pipe.png", "/"])
def test_a_folder_of_images_with_a_device_or_a_pipe(target, data, world):
    place = photos(world / "photos") / "a/9.png"
    if target == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(name(target, data))
    with pytest.raises(ValueError, match=r"9\.png.* cannot be read|a folder"):
        all_ways(world / "photos")
        raise ValueError("a folder is no image and is left out" if target == "/" else "it was read")


@pytest.mark.parametrize("path", ["../private.png", "{world}/private.png", "a/../../private.png", "/dev/zero", "//x"])
@pytest.mark.parametrize("kind", ["metadata.csv", "metadata.jsonl"])
def test_metadata_of_a_folder_of_images_that_points_elsewhere(kind, path, data, world):
    folder, path = photos(world / "photos"), name(path, data)
    rows = [{"file_name": f"a/{n}.png", "label": "a"} for n in range(3)] + [{"file_name": path, "label": "b"}]
    text = "file_name,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in rows)
    (folder / kind).write_text(text if kind.endswith("csv") else "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError):
        all_ways(folder)


@pytest.mark.parametrize("kind", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_metadata_that_is_a_pipe(kind, world):
    os.mkfifo(photos(world / "photos") / kind)
    with pytest.raises(ValueError, match="is not a regular file; remove it"):
        load_data(world / "photos")


# --- files of tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "webdataset"])
def test_a_table_that_is_a_pipe_or_a_device(kind, world):
    ending = {"webdataset": "tar"}.get(kind, kind)
    (world / "data").mkdir()
    os.mkfifo(world / f"data/train.{ending}")
    os.mkfifo(world / f"data/x.{ending}")
    for source in (f"{kind}:{world}/data", f"{kind}:{world}/data/x.{ending}", f"{kind}:/dev/zero"):
        with pytest.raises(ValueError, match="is not a regular file"):
            load_data(source)


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow", "x"])
def test_a_saved_dataset_with_a_pipe(file, world):
    rows = {"image": [{"bytes": b"x", "path": None}], "label": [0]}
    Dataset.from_dict(rows).save_to_disk("saved")
    (world / "saved" / file).unlink(missing_ok=True)
    (world / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    os.mkfifo(world / "saved" / file)
    with pytest.raises(ValueError, match="is not a regular file"):
        load_data("saved")


@pytest.mark.parametrize(
    "target", ["../other/data-00000-of-00001.arrow", "{world}/other/x.arrow", "/dev/zero", "link"]
)
def test_a_saved_dataset_whose_data_is_elsewhere(target, world):
    rows = {"image": [{"bytes": b"x", "path": None}] * 9, "label": [n % 2 for n in range(9)]}
    for folder in ("saved", "other"):
        Dataset.from_dict(rows).save_to_disk(folder)
    state = json.loads((world / "saved/state.json").read_text())
    if target == "link":
        data = world / "saved" / state["_data_files"][0]["filename"]
        data.unlink()
        data.symlink_to(world / "other/data-00000-of-00001.arrow")
    else:
        state["_data_files"] = [{"filename": target.format(world=world)}]
        (world / "saved/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state\.json names .*, which is not below"):
        load_data("saved")


@pytest.mark.parametrize("kind", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "5", "[]", '{"_data_files": 5}', '{"_data_files": [5]}', "\x00", "{"])
def test_a_saved_dataset_of_another_form(kind, text, world):
    Dataset.from_dict({"label": [0]}).save_to_disk("saved")
    (world / "saved" / kind).write_text(text)
    with pytest.raises((ValueError, OSError)):
        load_data("saved")


def test_text_in_a_tar_names_no_file(data):
    with tarfile.open(data / "train.tar", "w") as archive:
        for n in range(ROWS):
            content = json.dumps({"image": f"{data.parent}/private.png", "path": "/dev/zero", "cls": n % 2}).encode()
            buffer = io.BytesIO()
            PIL.Image.effect_noise((8, 8), 50).save(buffer, "PNG")
            for ending, file in (("png", buffer.getvalue()), ("json", content)):
                entry = tarfile.TarInfo(f"{n:04}.{ending}")
                entry.size = len(file)
                archive.addfile(entry, io.BytesIO(file))
    for options in ({}, {"limit": 10}):
        for split in load_data(f"webdataset:{data}", label_column="cls", **options).values():
            assert all(image["bytes"] for image in split.with_format(None)["image"])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_left_out(kind, data):
    with tarfile.open(data / "train.tar", "w") as archive:
        for n in range(ROWS):
            link = tarfile.TarInfo(f"{n:04}.png")
            link.type, link.linkname = kind, str(data.parent / "private.png")
            archive.addfile(link)
            entry = tarfile.TarInfo(f"{n:04}.cls")
            entry.size = 1
            archive.addfile(entry, io.BytesIO(b"01"[n % 2 : n % 2 + 1]))
    with pytest.raises(ValueError, match="has no images"):
        load_data(f"webdataset:{data}")


def test_the_tables_would_be_read_where_nobody_takes_care(data):
    """What `datasets` does with such a row, so that the attacks are real ones."""
    write_parquet(data, str(data.parent / "private.png"))
    rows = load_dataset("parquet", data_files=str(data / "train.parquet"), split="train").cast_column("image", Image())
    assert rows[ROWS - 1]["image"].tobytes() == PIL.Image.open(data.parent / "private.png").tobytes()
