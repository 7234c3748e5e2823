"""`predict`: the classes of images, by an ensemble with a head."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from concat_ensemble.commands.options import AsJson, Overwrite, print_json, print_written
from concat_ensemble.console import errors
from concat_ensemble.data.options import ExtractionOptions

if TYPE_CHECKING:
    from concat_ensemble.inference.image_sources import ImageSource
    from concat_ensemble.inference.prediction_file import Summary

MAX_NAMED = 20  # unreadable images


def predict(
    *,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an ensemble with a head.")],
    images: Annotated[
        str, typer.Argument(help="Folder of images, at any depth and without labels; an image; or any dataset.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV file to write; stdout when left out, or for -.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Write this many classes an image, the most probable ones; else all.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without unreadable images; their cells stay empty.")
    ] = False,
    split: Annotated[
        str | None, typer.Option(help="Split of a dataset; test when left out, or the only one there is.")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column with the images; found by its type when left out.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub dataset.")] = None,
    extraction: ExtractionOptions,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Predict the classes of images, with probabilities, as a CSV file.

    concat-ensemble predict two-resnets photos --output predictions.csv
    """
    from concat_ensemble.inference.image_sources import open_images
    from concat_ensemble.inference.prediction import class_names, load_classifier, stream_predictions
    from concat_ensemble.inference.prediction_file import describe_predictions, write_predictions
    from concat_ensemble.studies.outputs import check_file

    path = None if output in (None, Path("-")) else output
    if path is not None:
        check_file(path, overwrite)
    source = open_images(images, split=split, image_column=image_column, config=config, revision=revision)
    classifier = load_classifier(model)
    predictions = stream_predictions(
        classifier,
        source,
        skip_bad=skip_bad,
        batch_size=extraction.batch_size,
        num_workers=extraction.num_workers,
        quiet=extraction.quiet,
    )
    names, where = class_names(classifier), path or "stdout"
    if as_json and path is None:
        print_json({"classes": names, "images": describe_predictions(source.heading, names, predictions, top=top)})
        return
    try:
        summary = write_predictions(path, source.heading, names, predictions, top=top)
    except KeyboardInterrupt:
        errors.print(f"{where}: nothing was written.", soft_wrap=True)
        raise
    if not extraction.quiet:
        print_left_out(source, summary)
    if path is not None:
        facts = {
            "file": str(path),
            "images": summary.num_images,
            "predicted": dict(summary.counts.most_common()),
            "unreadable": summary.problems,
            "ignored_files": source.ignored,
        }
        print_written(describe_summary(path, summary), facts, as_json, extraction.quiet)


def describe_summary(path: Path, summary: "Summary") -> str:
    """One line: the file, its number of images, and the classes that were predicted most often."""
    counts = summary.counts.most_common(6)
    classes = ", ".join(f"{name} {count:,}" for name, count in counts)
    rest = f", {len(summary.counts) - len(counts):,} other classes" if len(summary.counts) > len(counts) else ""
    unreadable = f", {len(summary.problems):,} unreadable" if summary.problems else ""
    return f"{path}: {summary.num_images:,} images{unreadable}; {classes}{rest}"


def print_left_out(source: "ImageSource", summary: "Summary") -> None:
    """Say on stderr which files are no images, and which images could not be read."""
    lines = [f"unreadable: {problem}" for problem in summary.problems[:MAX_NAMED]]
    if len(summary.problems) > MAX_NAMED:
        lines.append(f"and {len(summary.problems) - MAX_NAMED:,} more unreadable images")
    if source.ignored:
        first = ", ".join(source.ignored[:3]) + ", ..." * (len(source.ignored) > 3)
        lines.append(f"left out, since they are no images: {first} ({len(source.ignored):,} in all)")
    for line in lines:
        errors.print(line, soft_wrap=True)
