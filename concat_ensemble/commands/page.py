"""`app`: a page on this computer that shows what an ensemble and its members say of an image."""

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from concat_ensemble.console import errors, out
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.errors import argument


def app(
    *,
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of an ensemble with a head; with --dataset, of any ensemble.")
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="Show each member alone, too, and the nearest training images of this dataset: a Hub id, "
            "imagefolder:FOLDER, or whatever probe takes.",
        ),
    ] = None,
    dataset: DatasetOptions,
    extraction: ExtractionOptions,
    host: Annotated[str, typer.Option(help="Address to listen on; by default, of this computer alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 for any that is free.")] = 7860,
) -> None:
    """Serve a page on which you drop an image and see its classes, by the ensemble and by each member alone, and the
    training images that are nearest. Results in the ensemble's folder are a tab of the page, as `report` writes them.
    Ctrl-C ends it.

    concat-ensemble app two-resnets --dataset imagefolder:photos
    """
    from concat_ensemble.inference.explorer import load_explorer
    from concat_ensemble.inference.serving import require_gradio, serve_page
    from concat_ensemble.reporting.html_report import has_results, render_report
    from concat_ensemble.reporting.image_page import build_page

    require_gradio()
    explorer = load_explorer(model, choose_dataset(name, dataset), extraction)
    folder = Path(model)
    report = render_report([folder]) if has_results(folder) else None
    page = build_page(explorer.answer, title=model, notes=explorer.notes, report=report)

    def on_start(address: str) -> None:
        out.print(f"{address} shows {model}; Ctrl-C ends it", soft_wrap=True)

    with suppress(KeyboardInterrupt):  # not raised where a shell started this in the background
        serve_page(page, host, port, on_start)
    if not extraction.quiet:
        errors.print("ended")


def choose_dataset(name: str | None, dataset: DatasetOptions) -> DatasetOptions | None:
    """The dataset that was named, or None. Raises ValueError for options of a dataset without its name."""
    if name is None and dataset.recipe is None:
        changed = [
            field.name for field in dataclasses.fields(dataset) if getattr(dataset, field.name) != field.default
        ]
        if changed:
            others = " and ".join(map(argument, changed))
            raise ValueError(f"{others} must come with a dataset; name it with {argument('name')}.")
        return None
    return dataclasses.replace(dataset, name=name)
