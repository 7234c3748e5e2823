"""`export`: an ensemble as one file."""

from pathlib import Path
from typing import Annotated

import typer

from concat_ensemble.commands.options import AsJson, Overwrite, Quiet, print_written


def export(
    *,
    folder: Annotated[
        Path, typer.Argument(help="Folder of an ensemble; with a head, the logits are the first output.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .onnx, or .pt2 for torch.export.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an ensemble as one file that runs without this package, checked against PyTorch.

    concat-ensemble export two-resnets --output two-resnets.onnx
    """
    from concat_ensemble.inference.export import export_onnx, export_program, load_for_export
    from concat_ensemble.studies.outputs import check_file

    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--output {output}: name a file that ends in .onnx, or in .pt2 for torch.export.")
    check_file(output, overwrite)
    check_file(output.with_name(f"{output.name}.data"), overwrite)  # where large weights go
    write = export_onnx if output.suffix == ".onnx" else export_program
    write(load_for_export(folder), output)
    size = output.stat().st_size
    print_written(f"{output}: {size / 1e6:,.1f} MB", {"file": str(output), "bytes": size}, as_json, quiet)
