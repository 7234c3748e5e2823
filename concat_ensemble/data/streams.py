"""Images from streams and from WebDataset tars, of which only as many are read as are used."""

import atexit
import hashlib
import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Image, IterableDataset, Value
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetsError

from concat_ensemble.data.columns import read_column, read_features
from concat_ensemble.data.folders import IMAGE_ENDINGS
from concat_ensemble.errors import argument, first_line

BUFFER = 1000  # images among which a stream is shuffled
LOOKED_AT = 100  # samples of a tar that are read to find its fields
TEXT_FIELDS = frozenset(("cls", "txt", "text", "label", "id"))
IMAGE_FIELDS = frozenset(ending.removeprefix(".") for ending in IMAGE_ENDINGS)


def take_images(stream: IterableDataset, kind: str, *, limit: int | None, seed: int) -> Dataset:
    """The first `limit` images of a stream with the columns of `select_columns`, shuffled in a buffer, as a dataset in
    a temporary file. Raises ValueError without a limit, for a stream that fails, and where all labels are the same."""
    if limit is None:
        problem = f"the {kind} split is a stream, which is read only as far as needed"
        raise ValueError(f"{problem}; set {argument('limit')}, or load the dataset without streaming.")
    folder = tempfile.mkdtemp(prefix="concat-ensemble-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = str(Path(folder) / "images.arrow")
    rows = stream.with_format(None).shuffle(seed=seed, buffer_size=min(BUFFER, 10 * limit)).take(limit)
    try:
        with ArrowWriter(features=read_features(stream), path=path) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
    except (OSError, ValueError, TypeError, KeyError, DatasetsError, pa.ArrowException, tarfile.TarError) as error:
        raise ValueError(f"cannot read the {kind} stream: {first_line(error)}") from error
    split = Dataset.from_file(path)
    labels = read_column(split, "label").to_pylist()
    if len(labels) > 1 and set(labels) == {labels[0]} and labels[0] not in (None, -1, "", "-1"):
        problem = f"the first {len(labels):,} images of the {kind} stream have the one label {labels[0]!r}"
        remedy = f"shuffle the stream, or use a larger {argument('limit')}"
        raise ValueError(f"{problem}; it may be sorted by class: {remedy}.")
    return split


def resolve_features(stream: IterableDataset) -> IterableDataset:
    """A stream that states its columns; those of one that does not are found in its first rows."""
    if stream.features is not None:
        return stream
    try:
        return stream._resolve_features()
    except (pa.ArrowException, ValueError, TypeError) as error:
        problem = (
            f"the stream does not state its columns and their types, and they cannot be found ({first_line(error)})"
        )
        raise ValueError(f"{problem}; give them as in IterableDataset.from_generator(..., features=...).") from error


def load_tars(files: dict[str, list[str]], *, stream: bool) -> dict[str, Dataset | IterableDataset]:
    """WebDataset tars by split, with the columns `image`, those of the text files of a sample, named after their
    endings (`cls`, `txt`), and the single values in its `json` file, named after their keys.

    Without `stream` a copy of the images is written to the cache of `datasets`, and read from there the next time.
    Raises ValueError for a tar that is damaged or has no images, and for samples that differ in their fields' types.
    """
    fields: dict[str, type] = {}
    for paths in files.values():
        for path in {paths[0], paths[-1]}:
            for name, values in _find_fields(path).items():
                numbers = fields.get(name, int) is int and all(isinstance(value, int) for value in values)
                fields[name] = int if numbers else str
    columns = {name: Value("int64" if kind is int else "string") for name, kind in sorted(fields.items())}
    features = Features({"image": Image(decode=False)} | columns)
    types = tuple(sorted(fields.items(), key=lambda field: field[0]))
    if stream:
        arguments = {split: {"paths": paths, "types": types} for split, paths in files.items()}
        return {
            split: IterableDataset.from_generator(read_samples, features=features, gen_kwargs=each)
            for split, each in arguments.items()
        }
    return {split: _copy_tars(paths, types, features) for split, paths in files.items()}


def read_samples(paths: Sequence[str], types: tuple[tuple[str, type], ...]) -> Iterator[dict[str, Any]]:
    """The samples of tars one after the other, with the fields of `types`."""
    for path in paths:
        for key, fields in _read_tar(path):
            sample: dict[str, Any] = {"image": fields.get("image")}
            for name, kind in types:
                value = fields.get(name)
                if value is not None and kind is int and not isinstance(value, int):
                    problem = f"{name}={value!r} of sample {key} in {path} is no whole number, as in the first samples"
                    raise ValueError(f"{problem}; write all of them as numbers or as text.")
                sample[name] = str(value) if kind is str and value is not None else value
            yield sample


def _copy_tars(paths: list[str], types: tuple[tuple[str, type], ...], features: Features) -> Dataset:
    stamps = [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]
    identity = repr((stamps, [(name, kind.__name__) for name, kind in types]))
    return Dataset.from_generator(
        read_samples,
        features=features,
        gen_kwargs={"paths": tuple(paths), "types": types},
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:16],
    )


def _find_fields(path: str) -> dict[str, list[Any]]:
    """Names of the fields beside the image and their values in the first samples."""
    found: dict[str, list[Any]] = {}
    images = 0
    for _, fields in islice(_read_tar(path), LOOKED_AT):
        images += "image" in fields
        for name, value in fields.items():
            if name != "image":
                found.setdefault(name, []).append(value)
    if not images:
        raise ValueError(
            f"{path} has no images in its first samples; a sample is NAME.jpg (or .png, ...) and NAME.cls."
        )
    return found


def _read_tar(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The samples of a tar: runs of files whose names are alike up to their first dot."""
    key, fields = None, {}
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if member.issparse():  # a file of holes, which would be written out
                    raise ValueError(f"{member.name} in {path} is a sparse file, which no image is; remove it.")
                match = re.match(r"^((?:.*/|)[^./][^./]*)\.([^/]+)$", member.name)
                if not member.isfile() or match is None:
                    continue
                if key is not None and match[1] != key:
                    yield key, fields
                    fields = {}
                key = match[1]
                file = tar.extractfile(member)
                if file is not None:
                    _read_field(path, key, match[2].lower(), file.read(), fields)
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as a tar: {first_line(error)}; remove or repair it.") from error
    if key is not None:
        yield key, fields


def _read_field(path: str, key: str, name: str, content: bytes, fields: dict[str, Any]) -> None:
    """Put the content of one file into the fields of its sample. Arrays, masks (`seg.png`) and other files are not
    images to classify, and are left out."""
    if name in IMAGE_FIELDS:
        if "image" in fields:
            raise ValueError(f"sample {key} in {path} has several images; write one image in each sample.")
        # No file has such a name; of one that exists, `datasets` would take the content in place of the bytes.
        fields["image"] = {"bytes": content, "path": f"{path}/{key}.{name}"}
        return
    try:
        if name == "json":
            values = json.loads(content)
            values = values if isinstance(values, dict) else {}
            plain = {each: value for each, value in values.items() if isinstance(value, str | int | float)}
            fields |= {each: value for each, value in plain.items() if each != "image"}  # text would name a file
        elif name.rpartition(".")[2] in TEXT_FIELDS:
            text = content.decode().strip()
            fields[name] = int(text) if re.fullmatch(r"-?\d+", text) else text
    except ValueError as error:
        raise ValueError(f"{key}.{name} in {path} cannot be read: {first_line(error)}; repair it.") from error
