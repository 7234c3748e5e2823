"""Small pictures of handwritten digits with marks or in styles, and the same at random places on canvases."""

from collections.abc import Callable, Sequence

import numpy as np
import sklearn.datasets
import torch
from datasets import ClassLabel, Dataset, Features, Image
from scipy.ndimage import maximum_filter
from torch.nn import functional

from concat_ensemble.data.images import encode_image
from concat_ensemble.data.scattered import Scatter

NUM_CLASSES = 10
CANVAS = 24  # pixels, the side of what a network sees
NO_MARK = -1
STYLE_SIDE = 16  # pixels, the side of a picture in a style


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as pixels (1797, 8, 8) from 0 to 1, and their labels (1797,)."""
    rows, labels = sklearn.datasets.load_digits(return_X_y=True)
    return np.asarray(rows, np.float32).reshape(-1, 8, 8) / 16, np.asarray(labels)


def draw_parts(labels: np.ndarray, counts: Sequence[Sequence[int]], rng: np.random.Generator) -> list[np.ndarray]:
    """Row numbers of disjoint random parts: part p has counts[p][c] rows of class c."""
    parts: list[list[np.ndarray]] = [[] for _ in counts]
    for c in range(NUM_CLASSES):
        rows, start = rng.permutation(np.flatnonzero(labels == c)), 0
        for part, own in zip(parts, counts, strict=True):
            part.append(rows[start : start + own[c]])
            start += own[c]
    return [np.concatenate(part) for part in parts]


def draw_marks(labels: np.ndarray, agreement: float, rng: np.random.Generator) -> np.ndarray:
    """(N,) a mark for each image: in each class, the share `agreement` gets the mark of its class, and the others that
    of another class, each equally often as far as possible."""
    marks = np.empty_like(labels)
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        agreeing = round(agreement * len(rows))
        others = rng.permutation(np.delete(np.arange(NUM_CLASSES), c))
        marks[rows[:agreeing]] = c
        marks[rows[agreeing:]] = np.resize(others, len(rows) - agreeing)
    return marks


def add_marks(digits: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Digits (N, 8, 8) in a black frame of one pixel, where mark m is a white bar two pixels high: on the left for 0
    to 4, on the right for 5 to 9, from top to bottom. -> (N, 10, 10)"""
    pictures = np.pad(digits, ((0, 0), (1, 1), (1, 1)))
    for picture, mark in zip(pictures, marks, strict=True):
        if mark != NO_MARK:
            side, height = divmod(int(mark), NUM_CLASSES // 2)
            picture[2 * height : 2 * height + 2, -side] = 1  # column 0 or -1
    return pictures


def thicken(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Strokes that are two pixels wider."""
    return _to_color(maximum_filter(digits, size=(1, 3, 3)))


def invert(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black on white."""
    return _to_color(1 - digits)


def color(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random color on another, which differs from it by at least 0.3 in each channel."""
    background = rng.random((len(digits), 1, 1, 3), dtype=np.float32)
    digit = (background + rng.uniform(0.3, 0.7, background.shape).astype(np.float32)) % 1
    return background + (digit - background) * digits[..., None]


def add_texture(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White on stripes of random direction, width and phase, which are at most half as bright."""
    angle, phase = rng.uniform(0, 2 * np.pi, (2, len(digits), 1, 1))
    cycles = rng.uniform(2, 4, (len(digits), 1, 1))
    y, x = np.mgrid[: digits.shape[1], : digits.shape[2]] / digits.shape[1]
    stripes = 0.25 + 0.25 * np.sin(2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return _to_color((stripes * (1 - digits) + digits).astype(np.float32))


# (N, 16, 16) and a generator -> (N, 16, 16, 3)
STYLES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "thick": thicken,
    "inverted": invert,
    "colored": color,
    "textured": add_texture,
}


def draw_in_style(digits: np.ndarray, style: str, rng: np.random.Generator) -> np.ndarray:
    """Digits (N, 8, 8) in one of `STYLES`, twice as large: (N, 16, 16, 3)."""
    enlarged = functional.interpolate(torch.from_numpy(digits)[:, None], STYLE_SIDE, mode="bilinear")
    return STYLES[style](enlarged[:, 0].numpy(), rng)


def _to_color(pictures: np.ndarray) -> np.ndarray:
    return np.repeat(pictures[..., None], 3, axis=-1)


def scatter_pictures(pictures: np.ndarray, seed: int) -> np.ndarray:
    """Pictures (N, H, W) or (N, H, W, 3), each once at a random place on a noisy canvas, as training places them anew
    in every step: (N, `CANVAS`, `CANVAS`) or with 3 channels. Places and noise depend on N and the seed alone."""
    channels_first = np.moveaxis(pictures, -1, 1) if pictures.ndim == 4 else pictures[:, None]
    scatter = Scatter(CANVAS, generator=torch.Generator().manual_seed(seed))
    canvases = scatter(torch.from_numpy(np.ascontiguousarray(channels_first))).numpy()
    return np.moveaxis(canvases, 1, -1) if pictures.ndim == 4 else canvases[:, 0]


def to_dataset(pictures: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Dataset:
    """Pictures from 0 to 1 as a split with the columns of `load_data`."""
    features = Features(image=Image(decode=False), label=ClassLabel(names=list(names)))
    images = [encode_image(picture) for picture in (pictures * 255).round().astype(np.uint8)]
    return Dataset.from_dict({"image": images, "label": np.asarray(labels).tolist()}, features=features)
