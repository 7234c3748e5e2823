"""One way to name any image dataset, and what comes back: splits with the columns `image` and `label`."""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from sklearn.model_selection import train_test_split
from torch.nn import functional
from torchvision.transforms import v2

from concat_ensemble.errors import first_line

EMBEDDED = "digits"
SCATTERED = "scattered:"
BUILDERS = ("parquet", "imagefolder", "csv", "json")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
IMAGE_NAMES = ("image", "img", "picture", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "y")


def load_data(
    name: str | Path | Dataset | DatasetDict,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: Iterable[int | str] | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    validation_size: float = 0.2,
    test_size: float = 0.5,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Load an image classification dataset with the splits `train`, `validation` and `test`.

    Args:
        name: `"digits"` (scikit-learn's 1,797 real handwritten digits, 8x8 grey); a Hub id; `"parquet:FILES"` or
            `"imagefolder:FOLDER"`; a path, whose kind is then seen from what is there; or a `Dataset` or `DatasetDict`
            in memory. `"scattered:NAME"` puts each image of one of these, which must be of one size, grey at a random
            place, scale and rotation on a noisy 32x32 canvas (see `Scatter`).
        config, revision: Of a Hub dataset.
        image_column, label_column: Found by type and common names when left out.
        classes: Keep these, by number or name; labels are then renumbered from 0 in the order of the dataset's
            classes.
        train_split, validation_split, test_split: Names of the splits, in `datasets` syntax; found by common names
            among those not named when left out. A missing test split is `test_size` of the training split; where there
            is a validation split but no test split, that one is the test. A missing validation split is
            `validation_size` of what is left to train on. Both cuts are stratified and drawn by `seed`.
        limit: Keep at most this many images of each split, drawn by `seed`.
        shots: Keep this many images of each class for training and validation together, drawn by `seed`.
        seed: Of the cuts, the limit, the shots, and the placement of scattered images.

    Returns:
        `image`: encoded images, read when asked for; `label`: `ClassLabel`. Image bytes are kept as they are: palette,
        CMYK, 16-bit and rotated images are set right by the image processor (see `convert_image` there).

    Raises:
        ValueError, FileNotFoundError: for a dataset, column, split or class that does not exist, an empty split, one
            class only, or labels that are not classes.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1.")
    if shots is not None and shots < 2:
        raise ValueError(f"shots={shots} must be at least 2: some are for validation.")
    scattered = isinstance(name, str) and name.startswith(SCATTERED)
    loaded = _load(name.removeprefix(SCATTERED) if scattered else name, config, revision)
    asked = {"train": train_split, "validation": validation_split, "test": test_split}
    taken = {split.partition("[")[0] for split in asked.values() if split}  # not to be found again by a common name
    splits = {kind: _pick_split(loaded, kind, split, taken) for kind, split in asked.items()}
    if splits["train"] is None:
        raise ValueError(f"no training split among {sorted(loaded)}; name it with train_split.")
    for kind, split in splits.items():
        _refuse_empty(split, kind)
    splits = {
        kind: _two_columns(split, image_column, label_column, kind)
        for kind, split in splits.items()
        if split is not None
    }
    splits = _same_classes(splits)
    if classes is not None:
        splits = _only_classes(splits, list(classes))
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if "test" not in splits:
        splits["train"], splits["test"] = _cut(splits["train"], test_size, seed, "test_size")
    if shots is not None:
        known = [splits["train"], *([splits.pop("validation")] if "validation" in splits else [])]
        splits["train"] = _few_of_each(concatenate_datasets(known), shots, seed)
    if "validation" not in splits:
        splits["train"], splits["validation"] = _cut(splits["train"], validation_size, seed, "validation_size")
    for kind, split in splits.items():
        if limit is not None and limit < len(split):
            chosen = np.sort(np.random.default_rng(seed).permutation(len(split))[:limit])
            splits[kind] = split = split.select(chosen)
        _refuse_empty(split, kind)
    present = np.unique(_labels(splits["train"]))
    if len(present) < 2:
        raise ValueError(
            f"the train split has the one class {class_names(splits['train'])[present[0]]!r}; a probe needs two."
        )
    ordered = {kind: splits[kind] for kind in ("train", "validation", "test")}
    return DatasetDict(_scattered(ordered, seed) if scattered else ordered)


def load_stream(
    name: str | Path,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
) -> IterableDataset:
    """The training split of a dataset as `load_data` names it, read while it is used and never held: `image`, encoded, and `label`.

    Raises:
        ValueError: for what cannot be streamed: what is embedded, in memory or saved by `datasets`, and labels whose classes are not
            told beforehand.
    """
    loaded = _load(name, config, revision, streaming=True)
    found = _pick_split(loaded, "train", split, set())
    if not isinstance(found, IterableDataset):
        raise ValueError(f"{name} cannot be streamed: it is here already.")
    found = _renamed(found, image_column, label_column, "train")
    if not isinstance(found.features["label"], ClassLabel):
        raise ValueError(
            f"{name} cannot be streamed: its labels are {found.features['label'].dtype}, and which classes there are is not told."
        )
    return found


def read_image(split: Dataset, index: int) -> PIL.Image.Image:
    """Image `index` of a split of `load_data`, as PIL reads it.

    Raises:
        ValueError: naming the image, when it cannot be read.
    """
    return decode_image(split[index]["image"], describe_image(split, index))


def decode_image(encoded: dict, name: str) -> PIL.Image.Image:
    """An encoded image ({"bytes", "path"}) as PIL reads it; `name` is what an error calls it.

    Raises:
        ValueError: when it cannot be read.
    """
    try:
        image = PIL.Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"])
        image.load()
        return image
    except (
        OSError,
        SyntaxError,
        ValueError,
        PIL.Image.DecompressionBombError,
    ) as error:  # PIL's ways of saying that this is no image
        raise ValueError(f"{name} cannot be read: {first_line(error)}; remove or repair it.") from error


def describe_image(split: Dataset, index: int) -> str:
    """For messages: the image's number, and its file where it has one."""
    path = split[index]["image"]["path"]
    return f"image {index} ({path})" if path else f"image {index}"


class Scatter(v2.Transform):
    """Put each image of a batch at a random place, scale and rotation on a noisy canvas, in the manner of Translated
    MNIST.

    Args:
        size: Side of the canvas in pixels.
        scale: Range of an image's side, as a share of the canvas.
        degrees: Largest rotation either way.
        noise: Standard deviation of the Gaussian noise, in shares of white.
        generator: Where the randomness comes from; torch's global one when left out.

    Maps (B, 1, H, W) float images in [0, 1] to (B, 1, `size`, `size`) in [0, 1], rounded to 8 bits as a stored image
    would be.
    """

    def __init__(
        self,
        size: int = 32,
        scale: tuple[float, float] = (0.5, 0.8),
        degrees: float = 15.0,
        noise: float = 0.1,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.size, self.scale, self.degrees, self.noise, self.generator = size, scale, degrees, noise, generator

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        def draw(low, high):
            return low + (high - low) * torch.rand(len(images), generator=self.generator)

        share = draw(*self.scale)
        angle = torch.deg2rad(draw(-self.degrees, self.degrees))
        # grid_sample asks where each pixel of the canvas comes from, so this is the inverse: shift, then rotate and
        # enlarge.
        shift_x, shift_y = (draw(-1, 1) * (1 - share) for _ in range(2))
        cos, sin = torch.cos(angle) / share, torch.sin(angle) / share
        rows = [cos, sin, -(cos * shift_x + sin * shift_y), -sin, cos, sin * shift_x - cos * shift_y]
        grid = functional.affine_grid(
            torch.stack(rows, 1).view(-1, 2, 3), [len(images), 1, self.size, self.size], align_corners=False
        )
        placed = functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        noisy = placed + self.noise * torch.randn(placed.shape, generator=self.generator)
        return (noisy.clamp(0, 1) * 255).round() / 255


def class_names(split: Dataset) -> list[str]:
    """Names of a split's classes, in the order of their numbers."""
    return list(split.features["label"].names)


def _load(name, config, revision, streaming=False) -> dict[str, Dataset | IterableDataset]:
    if isinstance(name, Dataset):
        return {"train": name}
    if isinstance(name, DatasetDict):
        return dict(name)
    if name == EMBEDDED:
        return {"train": _digits()}
    builder, _, files = str(name).partition(":")
    if builder not in BUILDERS or not files:
        builder, files = _kind_of_path(Path(name)) if Path(name).exists() else ("hub", str(name))
    try:
        if builder == "hub" and not Path(datasets.config.HF_DATASETS_CACHE, files.replace("/", "___")).exists():
            HfApi(library_name="concat-ensemble").dataset_info(
                files, revision=revision, timeout=10
            )  # one question, where a download asks for half a minute
        if builder == "saved":
            loaded = load_from_disk(files)
        elif builder == "hub":
            loaded = load_dataset(files, config, revision=revision, streaming=streaming)
        elif builder == "imagefolder":
            loaded = load_dataset("imagefolder", data_dir=_existing(files), streaming=streaming)
        else:
            loaded = load_dataset(builder, data_files=_data_files(Path(files), builder), streaming=streaming)
    except (DatasetNotFoundError, HFValidationError, HTTPError, ConnectionError) as error:
        raise ValueError(
            f"no dataset {str(name)!r}: it is neither {EMBEDDED}, nor a path here, and the Hub does not give it "
            f"({first_line(error)})."
        ) from error
    except (DatasetsError, FileNotFoundError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load dataset {str(name)!r}: {first_line(error)}") from error
    return {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)


def _refuse_empty(split: Dataset | None, kind: str) -> None:
    if split is not None and not len(split):
        raise ValueError(f"the {kind} split is empty; name another with {kind}_split, or keep more of it.")


def _existing(path: str) -> str:
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no {path}.")
    return path


def _kind_of_path(path: Path) -> tuple[str, str]:
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return "saved", str(path)
    if path.is_dir() and not any(path.glob("*.parquet")) and not any(path.glob("data/*.parquet")):
        return "imagefolder", str(path)
    if path.is_dir() or path.suffix == ".parquet":
        return "parquet", str(path)
    raise ValueError(
        f"{path} is a {path.suffix or 'file'}; give a folder of images or a .parquet file, or say what it is as in csv:{path}."
    )


def _data_files(path: Path, builder: str) -> str | dict[str, str]:
    """Files of a folder by the split their names begin with ("train-00000.parquet"); a file or pattern as it is."""
    if not path.is_dir():
        return _existing(str(path)) if "*" not in str(path) else str(path)
    files = sorted(path.glob(f"*.{builder}")) or sorted(path.glob(f"data/*.{builder}"))
    if not files:
        raise FileNotFoundError(f"there is no .{builder} file in {path}.")
    by_split: dict[str, list[str]] = {}
    for file in files:
        split = next((names[0] for names in SPLIT_NAMES.values() if file.stem.startswith(names)), "train")
        by_split.setdefault(split, []).append(str(file))
    return by_split


def _pick_split(loaded: dict[str, Dataset], kind: str, asked: str | None, taken: set[str]) -> Dataset | None:
    if asked is None:
        free = [name for name in loaded if name not in taken]
        found = [name for name in free if name in SPLIT_NAMES[kind]]
        if not found and kind == "train" and len(loaded) == 1:
            found = free
        return loaded[found[0]] if found else None
    base, bracket, slice_ = asked.partition("[")
    if base not in loaded:
        raise ValueError(f"{kind}_split={asked!r} does not exist; the dataset has {', '.join(loaded)}.")
    if not bracket:
        return loaded[base]
    try:  # datasets' own slicing, as in train[:80%], on what is already loaded
        if not slice_.endswith("]"):
            raise ValueError("no closing bracket")
        start, stop = (_position(part, len(loaded[base])) for part in slice_[:-1].split(":"))
    except ValueError as error:
        raise ValueError(f"{kind}_split={asked!r} is not a slice such as train[:80%] or train[1000:2000].") from error
    start, stop, _ = slice(start, stop).indices(len(loaded[base]))
    return loaded[base].select(np.arange(start, max(start, stop)))


def _position(part: str, total: int) -> int | None:
    if not part:
        return None
    return round(float(part[:-1]) / 100 * total) if part.endswith("%") else int(part)


def _two_columns(split: Dataset, image_column: str | None, label_column: str | None, kind: str) -> Dataset:
    return _with_class_labels(_renamed(split, image_column, label_column, kind), kind)


def _renamed(split, image_column: str | None, label_column: str | None, kind: str):
    """The columns of images and labels, found or named, as `image` (encoded) and `label`."""
    features = split.features
    for asked in (image_column, label_column):
        if asked is not None and asked not in features:
            raise ValueError(f"the {kind} split has no column {asked!r}; it has {', '.join(features)}.")
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    image = image_column or next(iter([*images, *(name for name in IMAGE_NAMES if name in features)]), None)
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel) and name in LABEL_NAMES]
    labels += [name for name in LABEL_NAMES if name in features] + [
        name for name, feature in features.items() if isinstance(feature, ClassLabel)
    ]
    label = label_column or next(iter(labels), None)
    for column, what in ((image, "image"), (label, "label")):
        if column is None:
            raise ValueError(
                f"found no {what} column among {', '.join(features)} in the {kind} split; name it with {what}_column."
            )
    if image == label:
        raise ValueError(f"image_column and label_column are both {image!r}; the dataset has {', '.join(features)}.")
    split = split.select_columns([image, label])
    if image != "image":
        split = split.rename_column(image, "image")
    if label != "label":
        split = split.rename_column(label, "label")
    return split.cast_column("image", Image(decode=False))


def _with_class_labels(split: Dataset, kind: str) -> Dataset:
    feature = split.features["label"]
    if split.data.column("label").null_count:
        raise ValueError(f"the {kind} split has images without a label; remove them or name another label_column.")
    if isinstance(feature, ClassLabel):
        if _labels(split).min() < 0:
            raise ValueError(f"the {kind} split's labels are hidden (-1); name a split that has them.")
        return split
    if not isinstance(feature, Value) or not (
        feature.dtype.startswith(("int", "uint")) or feature.dtype in ("string", "large_string", "bool")
    ):
        raise ValueError(
            f"the labels of the {kind} split are {getattr(feature, 'dtype', feature)}; class names or whole numbers are wanted."
        )
    names, numbers = np.unique(_labels(split), return_inverse=True)
    return _relabelled(split, numbers, [str(name) for name in names])


def _labels(split: Dataset) -> np.ndarray:
    return np.asarray(split.with_format("numpy")["label"][:])


def _relabelled(split: Dataset, numbers: np.ndarray, names: list[str]) -> Dataset:
    """The split with other labels; the images stay where they are on disk, which `Dataset.map` would copy."""
    labels = Dataset.from_dict({"label": numbers}, features=Features(label=ClassLabel(names=names)))
    return concatenate_datasets([split.select_columns(["image"]), labels], axis=1)


def _same_classes(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """One numbering for all splits: those that came as names or plain numbers may lack a class here or there."""
    names = list(dict.fromkeys(name for split in splits.values() for name in class_names(split)))
    if all(class_names(split) == names for split in splits.values()):
        return splits
    names = sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    return {kind: _renumbered(split, names) for kind, split in splits.items()}


def _renumbered(split: Dataset, names: list[str]) -> Dataset:
    """Labels as places in `names`; -1 where a class is not among them."""
    new = np.array([names.index(name) if name in names else -1 for name in class_names(split)])
    return _relabelled(split, new[_labels(split)], names)


def _only_classes(splits: dict[str, Dataset], classes: list[int | str]) -> dict[str, Dataset]:
    names = class_names(splits["train"])
    unknown = [c for c in classes if (c not in names if isinstance(c, str) else not 0 <= c < len(names))]
    if unknown or not classes:
        raise ValueError(
            f"classes={unknown or classes!r}: the dataset has {len(names)}, {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}."
        )
    kept = sorted({names.index(c) if isinstance(c, str) else c for c in classes})
    chosen = [names[number] for number in kept]
    renumbered = {kind: _renumbered(split, chosen) for kind, split in splits.items()}
    return {kind: split.select(np.flatnonzero(_labels(split) >= 0)) for kind, split in renumbered.items()}


def _cut(split: Dataset, size: float, seed: int, what: str) -> tuple[Dataset, Dataset]:
    labels = _labels(split)
    if not 0 < size < 1:
        raise ValueError(f"{what}={size} must be a share between 0 and 1.")
    counts = np.bincount(labels)
    stratify = (
        labels if counts[counts > 0].min() >= 2 and min(size, 1 - size) * len(labels) >= (counts > 0).sum() else None
    )
    try:
        kept, cut = train_test_split(np.arange(len(labels)), test_size=size, random_state=seed, stratify=stratify)
    except ValueError as error:
        raise ValueError(f"cannot cut {what}={size} off {len(labels)} images: {error}") from error
    return split.select(np.sort(kept)), split.select(np.sort(cut))


def _few_of_each(split: Dataset, shots: int, seed: int) -> Dataset:
    order = np.random.default_rng(seed).permutation(len(split))
    labels = _labels(split)[order]
    chosen = [order[labels == label][:shots] for label in np.unique(labels)]
    fewest = min(map(len, chosen))
    if fewest < shots:
        raise ValueError(f"shots={shots}: a class has {fewest} images for training and validation; ask for fewer.")
    return split.select(np.sort(np.concatenate(chosen)))


def _scattered(splits: dict[str, Dataset], seed: int) -> dict[str, Dataset]:
    """Every image on a canvas of its own, the same one for the same image, seed and bytes, whatever is left out beside it."""
    placed = {}
    for kind, split in splits.items():
        images = [np.asarray(read_image(split, number).convert("L")) for number in range(len(split))]
        if len({image.shape for image in images}) > 1:
            raise ValueError(f"{SCATTERED} wants images of one size; the {kind} split has several.")
        canvases = []
        for number, image in enumerate(images):
            drawn = int.from_bytes(
                hashlib.sha256(split[number]["image"]["bytes"] or image.tobytes()).digest()[:6], "big"
            )
            generator = torch.Generator().manual_seed(drawn ^ seed)
            canvases.append(Scatter(generator=generator)(torch.from_numpy(image / np.float32(255))[None, None])[0, 0])
        pixels = (torch.stack(canvases) * 255).round().to(torch.uint8).numpy()
        encoded = [{"bytes": _png(image), "path": None} for image in pixels]
        placed[kind] = Dataset.from_dict({"image": encoded, "label": _labels(split)}, features=split.features)
    return placed


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # its file lies in the installed package

    digits = load_digits()
    encoded = [{"bytes": _png(image), "path": None} for image in (digits.images / 16 * 255).round().astype(np.uint8)]
    features = Features(image=Image(decode=False), label=ClassLabel(names=[str(n) for n in range(10)]))
    return Dataset.from_dict({"image": encoded, "label": digits.target}, features=features)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
