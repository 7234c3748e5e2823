"""One HTML page of a classifier's errors: the most confident mistakes with their images, recall, and confusions."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from concat_ensemble.data.images import decode_image
from concat_ensemble.files import replace_file
from concat_ensemble.modeling.image_processing_concat_ensemble import convert_image
from concat_ensemble.reporting.confusion import class_recalls, confusion_matrix, shown_classes
from concat_ensemble.reporting.rendering import make_html_environment

THUMBNAIL, LOSSLESS = 256, 96  # pixels: the largest side of an image on the page, and up to which side it is a PNG
MAX_MATRIX, MAX_RECALLS, MAX_CONFUSIONS = 30, 200, 20  # rows of the tables


def write_error_page(
    path: Path,
    images: Sequence[dict[str, Any]],
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    number: int,
) -> Path:
    """Write one page that needs no other file: the `number` most confident mistakes with their images, each class's
    recall, and the confusion matrix.

    Args:
        path: File to write, whole or not at all.
        images: The N encoded images ({"bytes", "path"}), such as `data["test"]["image"]`; only those shown are read.
        labels: (N,) class numbers. probabilities: (N, C), from `predict_proba`.
        class_names: C names. They, and the names of files, may be any text.
        number: Mistakes to show, at least 0.

    Raises:
        ValueError: for shapes that do not go together, labels outside of 0 to C - 1, and NaN.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    names = list(map(str, class_names))
    _check(len(images), labels, probabilities, names, number)
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    confidence = probabilities[wrong, predicted[wrong]]
    chosen = wrong[np.argsort(-confidence, kind="stable")[:number]]
    mistakes = [_describe_mistake(images[int(row)], int(row), labels, probabilities, names) for row in chosen]
    counts = np.bincount(labels, minlength=len(names))
    recalls = class_recalls(np.bincount(labels[predicted == labels], minlength=len(names)), counts)
    environment = make_html_environment()
    page = environment.get_template("errors.html.jinja").render(
        num_images=len(labels),
        num_wrong=len(wrong),
        num_classes=len(names),
        mistakes=mistakes,
        recalls=[_describe_recall(one, names) for one in recalls[:MAX_RECALLS]],
        num_recalls=len(recalls),
        matrix=_describe_matrix(labels, predicted, names, shown_classes(recalls, len(names), MAX_MATRIX)),
        confusions=_frequent_confusions(labels[wrong], predicted[wrong], counts, names),
    )
    with replace_file(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def _check(count: int, labels: np.ndarray, probabilities: np.ndarray, names: list[str], number: int) -> None:
    if number < 0:
        raise ValueError(f"number={number} must be at least 0.")
    if not count or labels.shape != (count,) or probabilities.shape != (count, len(names)):
        shapes = f"labels {labels.shape}, probabilities {probabilities.shape} and {len(names)} class names"
        raise ValueError(f"{count} images with {shapes}: give (N,), (N, C) and C.")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels must be class numbers from 0 to {len(names) - 1}.")
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities hold NaN; leave out the images that have none.")


def _describe_mistake(
    encoded: dict[str, Any], row: int, labels: np.ndarray, probabilities: np.ndarray, names: list[str]
) -> dict[str, Any]:
    """What the page says of one image: its name, and the true and the predicted class with their probabilities."""
    true, shares = int(labels[row]), probabilities[row]
    guess, file = int(shares.argmax()), (encoded or {}).get("path")
    # The folders of a path may say more than their owner wants a page to.
    name = f"image {row}" + (f" ({Path(file).name})" if file else "")
    return {
        "name": name,
        "image": make_thumbnail(encoded, name),
        "true": names[true],
        "true_share": f"{100 * shares[true]:.1f}%",
        "predicted": names[guess],
        "predicted_share": f"{100 * shares[guess]:.1f}%",
    }


def make_thumbnail(encoded: dict[str, Any], name: str) -> str | None:
    """A data URI of an image of at most 256 pixels a side, without its metadata; None if it cannot be read."""
    try:
        image = convert_image(decode_image(encoded, name), "RGB")
    except ValueError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image = PIL.Image.fromarray(np.asarray(image))  # pixels alone: not the place where a photo was taken
    kind, buffer = "png" if max(image.size) <= LOSSLESS else "jpeg", io.BytesIO()
    image.save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _describe_recall(one, names: list[str]) -> list[str]:
    low, high = (100 * end for end in one.interval)
    return [
        names[one.number],
        f"{100 * one.recall:.1f}",
        f"[{low:.1f}, {high:.1f}]",
        f"{one.correct:,} of {one.images:,}",
    ]


def _describe_matrix(labels: np.ndarray, predicted: np.ndarray, names: list[str], shown: list[int]) -> dict[str, Any]:
    """The confusion matrix of some classes, with each cell's share of its row's images."""
    places = np.full(len(names), len(shown))  # all others are one more class
    places[shown] = range(len(shown))
    size = len(shown) + 1
    counts = confusion_matrix(places[labels], places[predicted], size)[:-1]
    last = size if len(shown) < len(names) else len(shown)
    rows = []
    for k, row in zip(shown, counts, strict=True):
        cells = [(f"{cell:,}" if cell else "", f"{cell / max(row.sum(), 1):.2f}") for cell in row[:last]]
        rows.append((names[k], cells))
    heads = [names[k] for k in shown] + ["others"] * (last - len(shown))
    return {"heads": heads, "rows": rows}


def _frequent_confusions(
    labels: np.ndarray, predicted: np.ndarray, counts: np.ndarray, names: list[str]
) -> list[list[str]]:
    """The pairs of true and predicted class with the most mistakes."""
    pairs, numbers = np.unique(labels.astype(np.int64) * len(names) + predicted, return_counts=True)
    rows = []
    for place in np.argsort(-numbers, kind="stable")[:MAX_CONFUSIONS]:
        true, guess = divmod(int(pairs[place]), len(names))
        share = f"{100 * numbers[place] / counts[true]:.1f}"
        rows.append([names[true], names[guess], f"{numbers[place]:,}", share])
    return rows
