"""Where a dataset comes from, and how `datasets` loads it from there."""

import json
from collections.abc import Mapping
from glob import glob
from pathlib import Path

import datasets.config
import numpy as np
import sklearn.datasets
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from concat_ensemble.data.folders import load_folder, refuse_special_files
from concat_ensemble.data.images import encode_image
from concat_ensemble.data.splits import find_split_kind
from concat_ensemble.data.streams import load_tars
from concat_ensemble.errors import first_line
from concat_ensemble.files import describe_missing_folder, suggest_folder

DIGITS = "digits"
BUILDERS = ("parquet", "imagefolder", "csv", "json", "webdataset")
ENDINGS = {"webdataset": "tar"}  # of the files of a builder, where it is not its name
STREAM_SHARDS = 64  # of a folder of images, which the processes that read it share


def load_source(
    name: str | Path | Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
    *,
    config: str | None,
    revision: str | None,
    streaming: bool = False,
    use_folders: bool = False,
    limit: int | None = None,
) -> Mapping[str, Dataset | IterableDataset]:
    """Load a dataset with its own splits and columns. `name` is as for `load_data`, without `scattered:`. Where there
    is a `limit`, tars are streamed. Raises ValueError if it does not exist or cannot be read."""
    if isinstance(name, Dataset | IterableDataset):
        return {"train": name}
    if isinstance(name, DatasetDict | IterableDatasetDict):
        return {str(kind): split for kind, split in name.items()}
    if name == DIGITS:
        return {"train": load_digits()}
    builder, location = identify_source(str(name))
    try:
        if builder == "webdataset":
            return load_tars(_find_data_files(location, builder), stream=streaming or limit is not None)
        if builder == "imagefolder" and Path(location).is_dir():
            splits = load_folder(Path(location), use_folders=use_folders)
            if splits is not None:
                return {kind: _to_stream(split) for kind, split in splits.items()} if streaming else splits
        loaded = _load(builder, location, config=config, revision=revision, streaming=streaming)
    except (DatasetNotFoundError, HFValidationError, HTTPError, ConnectionError) as error:
        problem = f"no dataset {str(name)!r}: it is neither {DIGITS} nor a local path, and the Hub does not have it"
        raise ValueError(f"{problem} ({first_line(error)}){suggest_folder(str(name))}") from error
    except (DatasetsError, OSError, LookupError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        reason = first_line(cause if isinstance(cause, Exception) else error)
        raise ValueError(f"cannot load dataset {str(name)!r}: {reason}") from error
    if isinstance(loaded, Dataset | IterableDataset):
        return {"train": loaded}
    return {str(kind): split for kind, split in loaded.items()}


def identify_source(name: str) -> tuple[str, str]:
    """Find a source's kind (one of `BUILDERS`, `"saved"` or `"hub"`) and location (files, a folder or a Hub id)."""
    builder, _, location = name.partition(":")
    if builder in BUILDERS and location:
        return builder, location
    path = Path(name)
    if not path.exists():
        return "hub", name
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return "saved", name
        if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
            return "parquet", name
        return ("webdataset" if any(path.glob("*.tar")) or any(path.glob("*/*.tar")) else "imagefolder"), name
    if path.suffix in (".parquet", ".tar"):
        return ("parquet" if path.suffix == ".parquet" else "webdataset"), name
    remedy = f"give a folder of images or a .parquet file, or write its kind before it, as in csv:{path}."
    raise ValueError(f"{path} is a {path.suffix or 'file'}; {remedy}")


def load_digits() -> Dataset:
    """Load the 1,797 handwritten digits that come with scikit-learn: 8x8 pixels, 17 gray levels."""
    rows, labels = sklearn.datasets.load_digits(return_X_y=True)
    pixels = (np.asarray(rows).reshape(-1, 8, 8) / 16 * 255).round().astype(np.uint8)
    features = Features(image=Image(decode=False), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    columns = {"image": [encode_image(image) for image in pixels], "label": labels}
    return Dataset.from_dict(columns, features=features)


def _load(
    builder: str, location: str, *, config: str | None, revision: str | None, streaming: bool
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    if builder == "saved":
        _check_saved(Path(location))
        return load_from_disk(location)
    if builder == "hub":
        if not Path(datasets.config.HF_DATASETS_CACHE, location.replace("/", "___")).exists():
            # One request with a short timeout: load_dataset would retry for half a minute before it fails.
            HfApi(library_name="concat-ensemble").dataset_info(location, revision=revision, timeout=10)
        return load_dataset(location, config, revision=revision, streaming=streaming)
    if builder == "imagefolder":
        if "://" not in location and not Path(location).exists():
            raise FileNotFoundError(describe_missing_folder(location))
        if Path(location).is_file():
            raise NotADirectoryError(f"{location} is a file; name the folder that has a folder of images per class.")
        return load_dataset("imagefolder", data_dir=location, streaming=streaming)
    return load_dataset(builder, data_files=_find_data_files(location, builder), streaming=streaming)


def _check_saved(folder: Path) -> None:
    """Raise ValueError where a saved dataset has devices or pipes, or names a file elsewhere as its data."""
    refuse_special_files(folder.rglob("*"))
    for state in folder.rglob("state.json"):
        content = json.loads(state.read_text())
        entries = content.get("_data_files") if isinstance(content, dict) else None
        for entry in entries if isinstance(entries, list) else []:
            name = entry.get("filename") if isinstance(entry, dict) else None
            if not (state.parent / str(name)).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{state} names {str(name)[:200]!r}, which is not below {folder}.")


def _to_stream(split: Dataset) -> IterableDataset:
    return split.to_iterable_dataset(num_shards=min(len(split), STREAM_SHARDS))


def _find_data_files(location: str, builder: str) -> dict[str, list[str]]:
    """Group the files of a folder by the split that their names, or those of their folders, speak of; files that are
    given by a pattern are one split."""
    folder, ending = Path(location), ENDINGS.get(builder, builder)
    if not folder.is_dir():
        # `datasets` expands patterns itself.
        matches = sorted(glob(location))  # noqa: PTH207 (may be absolute)
        refuse_special_files(map(Path, matches))
        files = matches if builder == "webdataset" else [location]
        if not files:
            raise FileNotFoundError(f"there is no file {location}.")
        return {"train": files}
    files = sorted(folder.glob(f"*.{ending}")) or sorted(folder.glob(f"*/*.{ending}"))
    refuse_special_files(files)
    if not files:
        raise FileNotFoundError(f"there is no .{ending} file in {folder}.")
    files_by_split: dict[str, list[str]] = {}
    for file in files:
        kind = find_split_kind(file.stem) or (find_split_kind(file.parent.name) if file.parent != folder else None)
        files_by_split.setdefault(kind or "train", []).append(str(file))
    return files_by_split
