"""Folders of images: which of their folders are splits, and which are classes.

`datasets` reads a folder by rules that lose images or mix classes without a word: a class named `train` is taken for
the only split, `cats/a` and `dogs/a` are one class, and one image beside the class folders removes all labels.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from concat_ensemble.data.splits import split_kind
from concat_ensemble.errors import argument
from concat_ensemble.files import is_special
from concat_ensemble.modeling.image_processing_concat_ensemble import IMAGE_FORMATS

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = frozenset(
    ending for ending, name in PIL.Image.registered_extensions().items() if name in IMAGE_FORMATS
)
OTHER_PICTURES = frozenset((".avif", ".cr2", ".dcm", ".dng", ".heic", ".heif", ".nef", ".svg"))
OTHER_PICTURES |= frozenset(ImageFolder.EXTENSIONS) - IMAGE_ENDINGS
ARCHIVES = frozenset((".7z", ".gz", ".rar", ".tgz", ".zip"))
METADATA = frozenset(ImageFolder.METADATA_FILENAMES)
EXAMPLE = "put the images of each class into a folder of its own, as in cat/1.jpg or train/cat/1.jpg"

Parts = tuple[str, ...]  # a path below the folder


def load_folder(folder: Path, *, use_folders: bool = False) -> dict[str, Dataset] | None:
    """The splits of a folder of images with one folder for each class, or None for one with a metadata file,
    which `datasets` reads, unless `use_folders`.

    Folders with the name of a split (`train`, `Val`, `TEST`, `test-images`, ...) that hold class folders are splits,
    and a folder of such a name that holds images themselves has hidden labels. Beside `train`, a folder such as
    `train_mini` is a split of its own, as it may be a part of it. Without these, all images are one
    split. A class has the name of the folder that its images are in. Hidden files are ignored.

    Raises ValueError if that does not give every image one class: images beside the class folders, or at different
    depths, a class in several places, and folders without images.
    """
    files, folders = _walk(folder)
    images = [path for path in files if PurePosixPath(path[-1]).suffix.lower() in IMAGE_ENDINGS]
    metadata = [folder.joinpath(*path) for path in files if path[-1] in METADATA]
    if metadata and not use_folders:
        refuse_special_files(metadata)
        return None
    others = Counter(PurePosixPath(path[-1]).suffix.lower() for path in files)
    if not images:
        raise ValueError(f"there are no images{_describe_endings(others)}; {EXAMPLE}.")
    if pictures := {ending: count for ending, count in others.items() if ending in OTHER_PICTURES}:
        logger.warning("%s: pictures in other formats are ignored%s", folder, _describe_endings(Counter(pictures)))
    roots = _find_splits(folder, images)
    classes = {split: _read_classes(folder, root_images) for split, (_, root_images) in roots.items()}
    names = sorted({name for each in classes.values() for name in each if name is not None})
    for split_roots, _ in roots.values():
        _refuse_empty_classes(split_roots, files, folders, set(names))
    numbers = {name: number for number, name in enumerate(names)}
    features = Features(image=Image(decode=False), label=ClassLabel(names=names))
    splits = {}
    for split, (_, paths) in roots.items():
        encoded = [{"bytes": None, "path": str(folder.joinpath(*root, *path))} for root, path in paths]
        labels = [-1 if name is None else numbers[name] for name in classes[split]]
        splits[split] = Dataset.from_dict({"image": encoded, "label": labels}, features=features)
    return splits


def refuse_special_files(files: Iterable[Path]) -> None:
    """Raise ValueError for a device or a pipe, which would be read without an end."""
    for file in files:
        if is_special(file):
            raise ValueError(f"{file} is not a regular file; remove it.")


def folder_hint(name: object, use_folders: bool) -> str:
    """The end of an error message about the metadata file of a folder of images; empty for other datasets."""
    if use_folders or not isinstance(name, str | Path):
        return ""
    folder = Path(str(name).removeprefix("imagefolder:"))
    if not folder.is_dir() or not any(path[-1] in METADATA for path in _walk(folder)[0]):
        return ""
    return f" To take the classes from the folders instead of the metadata file, set {argument('use_folders')}."


def _walk(folder: Path) -> tuple[list[Parts], set[Parts]]:
    """All files, in the order of their paths, and all folders below a folder, without hidden ones. Links are followed,
    except one to a folder that it is in."""
    files, folders = [], set()
    for current, names, contents in os.walk(folder, followlinks=True):
        below = Path(current).relative_to(folder).parts
        if below and Path(current).is_symlink() and Path(current).resolve() in Path(current).parent.resolve().parents:
            names.clear()
            continue
        names[:] = [name for name in names if not name.startswith(".") and name != "__MACOSX"]
        folders.add(below)
        files += [(*below, name) for name in contents if not name.startswith(".")]
    return sorted(files, key="/".join), folders


def _find_splits(folder: Path, images: list[Parts]) -> dict[str, tuple[list[Parts], list[tuple[Parts, Parts]]]]:
    """For each split the folders that it consists of, and its images as (folder, path below it)."""
    outer = _common_folders(images)
    inner = [path[len(outer) :] for path in images]
    tops = {path[0] for path in inner if len(path) > 1}
    with_classes = {path[0] for path in inner if len(path) > 2}
    kinds = {top: _folder_kind(top) for top in tops}
    if not any(kinds[top] for top in with_classes):
        if not tops or all(kinds.values()):
            raise ValueError(f"there are {len(images):,} images but no class folders; {EXAMPLE}.")
        return {"train": ([outer], [(outer, path) for path in inner])}
    splits: dict[str, tuple[list[Parts], list[tuple[Parts, Parts]]]] = {}
    whole = {split_kind(top) for top in tops}
    for top in sorted(tops):
        if kinds[top] or top in with_classes:
            root = (*outer, top)
            kind = kinds[top] or top
            if kind in whole and not split_kind(top):
                logger.warning("%s: %s is a split of its own, no part of %s", folder, top, kind)
                kind = top
            roots, paths = splits.setdefault(kind, ([], []))
            roots.append(root)
            paths += [(root, path[1:]) for path in inner if path[0] == top and len(path) > 1]
    return splits


def _common_folders(images: list[Parts]) -> Parts:
    """The folders that all images are in, up to the first that is a split or the only class."""
    common = []
    for names in zip(*(path[:-2] for path in images), strict=False):  # as deep as the shortest path
        if len(set(names)) > 1 or _folder_kind(names[0]):
            break
        common.append(names[0])
    return tuple(common)


def _folder_kind(name: str) -> str | None:
    """The split that a folder's name begins or ends with, as in `Train`, `test-images`, `val2017` or `my_test`."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    kinds = [split_kind(word) for word in (words[:1] + words[-1:])]
    return next(filter(None, kinds), None)


def _read_classes(folder: Path, images: list[tuple[Parts, Parts]]) -> list[str | None]:
    """The class of each image, or None for all of a split without class folders."""
    depths = Counter(len(path) for _, path in images)
    if set(depths) == {1}:
        return [None] * len(images)
    if len(depths) > 1:
        examples = {len(path): "/".join(root + path) for root, path in reversed(images)}
        shallow, deep = examples[min(depths)], examples[max(depths)]
        if 1 in depths:
            count = "1 image lies" if depths[1] == 1 else f"{depths[1]:,} images lie"
            problem = f"{count} beside the class folders, such as {shallow}"
            raise ValueError(f"{problem}; move each into the folder of its class, or remove it.")
        problem = f"images lie at different depths, such as {shallow} and {deep}"
        raise ValueError(f"{problem}; put the images of a class into its folder, without folders in between.")
    parents: dict[str, set[str]] = {}
    for _, path in images:
        parents.setdefault(path[-2], set()).add("/".join(path[:-1]))
    if repeated := {name: sorted(places) for name, places in parents.items() if len(places) > 1}:
        name, places = min(repeated.items())
        count = "1 class has" if len(repeated) == 1 else f"{len(repeated):,} classes have"
        problem = f"{count} several folders: {name!r} is {' and '.join(places[:3])}"
        remedy = "give each class one folder, or one in each split, as in train/cat and test/cat"
        raise ValueError(f"{problem}; a class is named after its innermost folder: {remedy}.")
    classes: list[str | None] = [path[-2] for _, path in images]
    if max(depths) > 2:
        counts = ", ".join(f"{name} ({count:,})" for name, count in Counter(classes).most_common(12))
        logger.warning("%s: classes are the innermost folders: %s", folder, counts)
    return classes


def _refuse_empty_classes(roots: list[Parts], files: list[Parts], folders: set[Parts], names: set[str]) -> None:
    """Raise ValueError for folders below a split that hold neither images nor folders, unless another split has images
    of that class."""
    parents = {path[:-1] for path in folders}
    filled = {path[:-1] for path in files if PurePosixPath(path[-1]).suffix.lower() in IMAGE_ENDINGS}
    for root in roots:
        empty = [path for path in folders - parents - filled if path[: len(root)] == root and path[-1] not in names]
        if empty:
            first = min(empty)
            endings = Counter(PurePosixPath(path[-1]).suffix.lower() for path in files if path[:-1] == first)
            problem = f"the folder {'/'.join(first)} has no images{_describe_endings(endings)}"
            raise ValueError(f"{problem}; add images of this class, or remove the folder.")


def _describe_endings(endings: Counter) -> str:
    """In brackets, the most common endings of files."""
    if not endings:
        return " (it is empty)"
    listed = ", ".join(f"{count:,} {ending or 'files without an ending'}" for ending, count in endings.most_common(3))
    remedy = ""
    if OTHER_PICTURES & set(endings):
        remedy = ": convert them to PNG or JPEG"
    elif ARCHIVES & set(endings):
        remedy = ": unpack them"
    return f" (only {listed}{remedy})"
