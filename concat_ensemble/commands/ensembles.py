"""`build` and `export`: ensembles as folders and files."""

from itertools import repeat
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from concat_ensemble.commands.options import (
    AsJson,
    Output,
    Overwrite,
    Quiet,
    Seed,
    command_line,
    new_file,
    new_folder,
    tell,
)


def build(
    output: Output,
    members: Annotated[
        list[str] | None,
        typer.Argument(help="timm name, random:NAME, hf-hub:ORG/NAME@REVISION, a folder, or [ARCHITECTURE=]FILE."),
    ] = None,
    preprocessing: Annotated[
        str, typer.Option(help="own: each member's evaluation transform. shared: the first one's for all.")
    ] = "own",
    recipe: Annotated[
        str | None, typer.Option(help="A system of the paper, such as swav-cat5, in place of members.")
    ] = None,
    checkpoints: Annotated[Path, typer.Option(help="Folder of the files that a recipe names.")] = Path(),
    license: Annotated[str | None, typer.Option(help="Of members whose source states none.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights on disk: float32, float16 or bfloat16.")] = "float32",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Concatenate backbones into one model and save it as a Hub folder.

    concat-ensemble build resnet50.a1_in1k resnet50.tv_in1k --output two-resnets

    concat-ensemble build --recipe vit-objectives --output vit-objectives
    """
    import torch

    from concat_ensemble.members.assemble import assemble
    from concat_ensemble.members.ensemble_recipes import ensemble_recipe
    from concat_ensemble.reporting.model_card import write_card

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"--dtype {dtype}: give {', '.join(dtypes)}.")
    if recipe and members:
        raise ValueError(f"--recipe {recipe} names its members; leave out {' '.join(members)}, or --recipe.")
    asked = ensemble_recipe(recipe).resolve_members(checkpoints) if recipe else {}
    with new_folder(output, overwrite) as folder:
        model = assemble(asked or members or [], preprocessing=preprocessing, seed=seed, license=license)
        if dtype != "float32":  # weights are known by their digest in float32, so what rounding makes of them is
            model = assemble(model.to(dtypes[dtype])).to(dtypes[dtype])
        for member, known in zip(model.config.members, asked.values() or repeat({}), strict=False):
            member["provenance"] = {"command": command_line()} | known | member["provenance"]
        model.save_pretrained(folder)
        write_card(folder, title=output.name)
    config = model.config
    table = Table(
        "", "architecture", "features", "input", "source", title=f"{output}: {config.num_features:,} features"
    )
    for k, member in enumerate(config.members):
        size = "x".join(map(str, member["preprocessing"]["input_size"]))
        table.add_row(
            str(k), member["architecture"], f"{member['num_features']:,}", size, member["provenance"]["source"]
        )
    facts = {"folder": str(output), "num_features": config.num_features, "members": config.members}
    tell(table, facts, as_json, quiet)


def export(
    folder: Annotated[Path, typer.Argument(help="An ensemble's folder; with a head, its logits come first.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .onnx, or .pt2 for torch.export.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an ensemble as one file that runs without this package, checked against PyTorch.

    concat-ensemble export two-resnets --output two-resnets.onnx
    """
    from concat_ensemble.inference.export import export_onnx, export_program, load_for_export

    write = {".onnx": export_onnx, ".pt2": export_program}.get(output.suffix)
    if write is None:
        raise ValueError(f"--output {output}: name a file that ends in .onnx, or in .pt2 for torch.export.")
    new_file(output, overwrite)
    write(load_for_export(folder), output)
    size = output.stat().st_size
    tell(f"{output}: {size / 1e6:,.1f} MB", {"file": str(output), "bytes": size}, as_json, quiet)
