"""`report`: several ensembles on one page."""

from pathlib import Path
from typing import Annotated

import typer

from concat_ensemble.commands.options import AsJson, Overwrite, Quiet, print_written


def report(
    *,
    folders: Annotated[list[Path], typer.Argument(help="Folders of ensembles with results, or of results files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare ensembles on one self-contained HTML page: a table to sort, accuracy against cost, what each member
    adds, and what they have in common. `app` shows the page of one ensemble as a tab; this writes it into a file.

    concat-ensemble report two-resnets three-backbones --output report.html
    """
    from concat_ensemble.reporting.html_report import write_report
    from concat_ensemble.studies.outputs import check_file

    check_file(output, overwrite)
    write_report(folders, output)
    size = output.stat().st_size
    print_written(f"{output}: {size / 1e3:,.0f} kB", {"file": str(output), "bytes": size}, as_json, quiet)
