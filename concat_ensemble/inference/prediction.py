"""Predictions of an ensemble with a classification head, for images without labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedConfig

from concat_ensemble.console import show_progress
from concat_ensemble.errors import argument, first_line
from concat_ensemble.features.memory import keep_freed_memory
from concat_ensemble.features.standardized import default_device
from concat_ensemble.files import check_regular_files, is_hub_id
from concat_ensemble.inference.folding import fold_batchnorm
from concat_ensemble.inference.image_sources import ImageSource, open_images
from concat_ensemble.modeling.image_processing_concat_ensemble import ConcatEnsembleImageProcessor
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleForImageClassification

MAX_NAMED = 20  # unreadable images in an error


class Prediction(NamedTuple):
    """What a model says of one image."""

    name: str
    probabilities: np.ndarray | None  # (C,) float32; None for an image that cannot be read
    problem: str | None = None  # why it cannot be read


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of images, in the order of `names`."""

    heading: str  # what the names are: "file", relative to the folder, or "row" of the dataset
    names: list[str]
    class_names: list[str]
    probabilities: np.ndarray  # (N, C) float32; NaN for an image that cannot be read
    problems: dict[str, str] = field(default_factory=dict)  # name of an image that cannot be read -> why

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        counts = Counter(name for name in self.predicted if name is not None).most_common(6)
        classes = ", ".join(f"{name} {count:,}" for name, count in counts) or "none"
        return f"Predictions({len(self):,} images, {len(self.problems):,} unreadable; most often {classes})"

    @property
    def predicted(self) -> list[str | None]:
        """The most probable class of each image; None for one that cannot be read."""
        known = np.isfinite(self.probabilities).all(axis=1)
        best = np.where(known, np.nan_to_num(self.probabilities).argmax(axis=1), -1)
        return [None if k < 0 else self.class_names[k] for k in best.tolist()]


def predict_images(
    model: str | Path | ConcatEnsembleForImageClassification,
    images: Any,
    *,
    split: str | None = None,
    image_column: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    skip_bad: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    quiet: bool = False,
) -> Predictions:
    """Predict the classes of images, with the probabilities that transformers' pipeline gives.

    Args:
        model: Folder or Hub id of an ensemble with a head; or such a model, which runs where and as it is.
        images, split, image_column, config, revision: As in `image_sources.open_images`.
        skip_bad: Give unreadable images no probabilities. By default they are an error, which names them.
        batch_size, num_workers: Images in a batch, and processes that read them.
        quiet: Show no progress.

    Raises:
        ValueError: for a model without a head, images that do not exist, and unreadable ones.
    """
    classifier = load_classifier(model) if isinstance(model, str | Path) else model
    source = open_images(images, split=split, image_column=image_column, config=config, revision=revision)
    rows, problems, names = [], {}, class_names(classifier)
    for prediction in stream_predictions(
        classifier, source, skip_bad=skip_bad, batch_size=batch_size, num_workers=num_workers, quiet=quiet
    ):
        rows.append(np.full(len(names), np.nan) if prediction.probabilities is None else prediction.probabilities)
        if prediction.problem is not None:
            problems[prediction.name] = prediction.problem
    return Predictions(source.heading, source.names, names, np.stack(rows).astype(np.float32), problems)


def load_classifier(name: str | Path) -> ConcatEnsembleForImageClassification:
    """Load an ensemble with a head for fast predictions, as `prepare_classifier` says.

    Args:
        name: A folder, or a Hub id such as "me/two-resnets" or "me/two-resnets@main".

    Raises:
        ValueError: for something else than an ensemble, and for an ensemble without a head or with one that does not
            choose one of several classes.
    """
    model = read_classifier(name)
    if model is None:
        remedy = f"fit one: concat-ensemble probe {name} --dataset ... --save-head"
        raise ValueError(f"{name} has no classification head; {remedy}.")
    return prepare_classifier(model)


def read_classifier(name: str | Path) -> ConcatEnsembleForImageClassification | None:
    """An ensemble with a head as it was saved, in float32; None for an ensemble without a head. Other errors are those
    of `load_classifier`."""
    hub_id, _, revision = str(name).partition("@")
    if is_hub_id(str(name)):
        location, arguments = hub_id, {"revision": revision or "main"}
    else:
        location, arguments = str(name), {}
        check_regular_files(Path(name))
    try:
        settings = PreTrainedConfig.get_config_dict(location, **arguments)[0]
    except (OSError, ValueError) as error:
        reason = f"{name} is neither a folder with a model nor one on the Hub ({first_line(error)})"
        raise ValueError(f"{reason}; make one with concat-ensemble build.") from error
    kind = settings.get("model_type")
    if kind != "concat_ensemble":
        content = f"a model of type {kind!r}, not an ensemble" if kind else "no model (no config.json)"
        raise ValueError(f"{name} holds {content}; make an ensemble with concat-ensemble build.")
    if ConcatEnsembleForImageClassification.__name__ not in (settings.get("architectures") or ()):
        return None
    model: Any = ConcatEnsembleForImageClassification.from_pretrained(location, dtype=torch.float32, **arguments)
    _check_head(model)
    return model


def prepare_classifier(model: ConcatEnsembleForImageClassification) -> ConcatEnsembleForImageClassification:
    """Make a classifier fast, in place: on the GPU if there is one, with BatchNorm folded and the layout for
    convolutions."""
    with suppress(ValueError):  # a member whose features folding would change runs as it is
        fold_batchnorm(model.eval())
    prepared: Any = model
    return prepared.to(default_device(), memory_format=torch.channels_last)


def class_names(model: ConcatEnsembleForImageClassification) -> list[str]:
    """Names of a classifier's classes, in the order of its logits. Raises ValueError for a model without a head."""
    _check_head(model)
    config: Any = model.config
    return [str(config.id2label.get(k, f"LABEL_{k}")) for k in range(config.num_labels)]


def stream_predictions(
    model: ConcatEnsembleForImageClassification,
    source: ImageSource,
    *,
    skip_bad: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    quiet: bool = False,
) -> Iterator[Prediction]:
    """Predict one image after the other, in the order of `source`.

    Once an image is unreadable and `skip_bad` is False, the others are only read, not predicted, so that the
    ValueError at the end names all of them (up to twenty, then their number). Raises ValueError also for a model that
    gives NaN.
    """
    _check_head(model)
    processor = ConcatEnsembleImageProcessor.from_config(model.config)
    batches = DataLoader(
        _PixelDataset(source, processor), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate
    )
    problems, number = [], 0
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        if model.device.type == "cpu":
            stack.enter_context(keep_freed_memory())
        advance = stack.enter_context(show_progress("predictions", len(source), quiet=quiet))
        for pixels, messages in batches:
            problems += [message for message in messages if message is not None]
            is_failed = bool(problems) and not skip_bad
            rows = iter(()) if is_failed or pixels is None else iter(_predict(model, pixels))
            for message in messages:
                name, number = source.names[number], number + 1
                if not is_failed:
                    yield Prediction(name, next(rows) if message is None else None, message)
            advance(len(messages))
    if problems and not skip_bad:
        raise ValueError(_describe_problems(problems))


def _check_head(model: ConcatEnsembleForImageClassification) -> None:
    """Raise ValueError unless the model chooses one of several classes."""
    config: Any = model.config
    if getattr(model, "classifier", None) is None:
        raise ValueError("the model has no classification head; fit one: concat-ensemble probe ... --save-head.")
    if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        kind = f"problem_type={config.problem_type!r} with {config.num_labels} classes"
        raise ValueError(f"{kind}: predict chooses one of two or more classes; call the model itself.")


@torch.inference_mode()
def _predict(model: ConcatEnsembleForImageClassification, pixels: torch.Tensor) -> np.ndarray:
    """(B, C) float32 probabilities."""
    logits = model(pixels.to(model.device, model.dtype)).logits
    probabilities = logits.float().softmax(dim=1).cpu().numpy()
    if not np.isfinite(probabilities).all():
        raise ValueError("the model gives NaN; check its weights with concat-ensemble verify.")
    return probabilities


class _PixelDataset(TorchDataset):
    """`pixel_values` of an image, or why it cannot be read."""

    def __init__(self, source: ImageSource, processor: ConcatEnsembleImageProcessor):
        self.source, self.processor = source, processor

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> torch.Tensor | str:
        try:
            return read_pixels(self.source, number, self.processor)
        except ValueError as error:
            return str(error)


def read_pixels(source: ImageSource, number: int, processor: ConcatEnsembleImageProcessor) -> torch.Tensor:
    """`pixel_values` of an image, without a batch dimension. Raises ValueError naming it if it cannot be read."""
    image = source.read(number, processor)
    try:
        return processor([image], return_tensors="pt")["pixel_values"][0]
    except ValueError as error:
        raise ValueError(f"{source.describe(number)}: {error.__cause__ or error}") from error


def _collate(items: Sequence[torch.Tensor | str]) -> tuple[torch.Tensor | None, list[str | None]]:
    """The pixels of the readable images, and for each image None or why it cannot be read."""
    pixels = [item for item in items if not isinstance(item, str)]
    return torch.stack(pixels) if pixels else None, [item if isinstance(item, str) else None for item in items]


def _describe_problems(problems: list[str]) -> str:
    named = "; ".join(problem.rstrip(".").removesuffix("; remove or repair it") for problem in problems[:MAX_NAMED])
    rest = f"; and {len(problems) - MAX_NAMED:,} more" if len(problems) > MAX_NAMED else ""
    count = "1 image" if len(problems) == 1 else f"{len(problems):,} images"
    remedy = f"Remove or repair them, or go on without them by {argument('skip_bad', True)}"
    return f"{count} cannot be read: {named}{rest}. {remedy}."
