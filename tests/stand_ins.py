"""Small datasets with the structure of those that the recipes name: splits, columns, classes and kinds of images.

Images are a few pixels, and there are as few of each class as the structure allows.
"""

import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

IMAGENET_CLASSES, SPECIES = 1_000, 8_142
ROTATED = 6  # EXIF's number for an image that was taken with the camera on its side


def encode(number: int, *, mode: str = "RGB", size: tuple[int, int] = (12, 10), kind: str = "PNG", **options) -> bytes:
    """An image file; the pixels differ between numbers."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def imagenet_images(count: int, first: int) -> list[dict]:
    """Among them are such as ImageNet has: gray and CMYK JPEGs, PNGs under the name of a JPEG, one that is rotated by
    EXIF, and tiny ones."""
    exif = PILImage.Exif()
    exif[0x0112] = ROTATED
    special = [{"mode": "L", "kind": "JPEG"}, {"mode": "CMYK", "kind": "JPEG"}, {"mode": "P"}]
    special += [{"kind": "JPEG", "exif": exif}, {"size": (1, 3)}, {"size": (60, 9), "kind": "JPEG"}]
    options = special + [{}] * max(count - len(special), 0)
    return [{"bytes": encode(first + k, **options[k]), "path": f"n{first + k:08}.JPEG"} for k in range(count)]


def write_imagenet(folder: Path, *, per_class: int = 1) -> str:
    """ILSVRC/imagenet-1k: `train`, `validation` and `test` as parquet files, whose test labels are all -1."""
    feature = {"image": Image(), "label": ClassLabel(num_classes=IMAGENET_CLASSES)}
    labels = np.repeat(np.arange(IMAGENET_CLASSES), per_class)
    splits = {"train": labels, "validation": np.arange(40) * 25, "test": np.full(30, -1)}
    (folder / "data").mkdir(parents=True)
    first = 0
    for name, numbers in splits.items():
        rows = {"image": imagenet_images(len(numbers), first), "label": numbers}
        Dataset.from_dict(rows, Features(feature)).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
        first += len(numbers)
    return str(folder)


def write_inaturalist(folder: Path, classes: int = SPECIES) -> str:
    """The table of iNaturalist 2018: `train`, with a long tail of classes that have one image, `validation` and a
    hidden `test`; the classes are whole numbers in the column `target`, beside the names of the files."""
    tail = np.arange(classes)
    labels = {"train": np.concatenate([tail, tail[:60].repeat(3)]), "validation": tail[:80], "test": [-1] * 20}
    feature = {"image": Image(), "file_name": Value("string"), "target": Value("int32")}
    pictures = [encode(number, size=(6, 5)) for number in range(64)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in labels.items():
        files = [f"train_val2018/Aves/{label}/{k}.jpg" for k, label in enumerate(numbers)]
        images = [{"bytes": pictures[k % 64] + str(k).encode(), "path": file} for k, file in enumerate(files)]
        rows = {"image": images, "file_name": files, "target": numbers}
        Dataset.from_dict(rows, Features(feature)).to_parquet(folder / f"{name}.parquet")
    return str(folder)


def write_cifar100(folder: Path) -> str:
    """uoft-cs/cifar100: `train` and `test` of 32 x 32 pixels, with the columns img, fine_label and coarse_label."""
    feature = {"img": Image(), "fine_label": ClassLabel(num_classes=100), "coarse_label": ClassLabel(num_classes=20)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, first in (("train", 0), ("test", 200)):
        labels = np.arange(200) % 100
        images = [{"bytes": encode(first + k, size=(32, 32)), "path": None} for k in range(200)]
        rows = {"img": images, "fine_label": labels, "coarse_label": labels % 20}
        Dataset.from_dict(rows, Features(feature)).to_parquet(folder / f"{name}.parquet")
    return str(folder)
