"""`build`: an ensemble from its members."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from concat_ensemble.commands.options import AsJson, Output, Overwrite, Quiet, command_line, print_written


def build(
    *,
    members: Annotated[
        list[str] | None,
        typer.Argument(help="timm name, random:NAME, hf-hub:ORG/NAME@REVISION, a folder, or [ARCHITECTURE=]FILE."),
    ] = None,
    output: Output,
    preprocessing: Annotated[
        str, typer.Option(help="own: each member's evaluation transform. shared: the first member's for all.")
    ] = "own",
    model_args: Annotated[
        list[str] | None,
        typer.Option(
            "--model-arg",
            help="Argument of timm's networks as NAME=VALUE, such as img_size=384; may be repeated.",
        ),
    ] = None,
    channels: Annotated[
        str | None, typer.Option(help="Numbers of the channels that each member sees, from 0, such as 2,1,0.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Mean of each channel, such as 0.5,0.4,0.3,0.2.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation of each channel.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A system of the paper, such as swav-cat5, in place of members.")
    ] = None,
    checkpoints: Annotated[Path, typer.Option(help="Folder with the files that a recipe names.")] = Path(),
    license: Annotated[str | None, typer.Option(help="License of members whose source states none.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights on disk: float32, float16 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Random seed for the weights of random: members.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Concatenate backbones into one model and save it as a Hub folder.

    concat-ensemble build resnet50.a1_in1k resnet50.tv_in1k --output two-resnets

    concat-ensemble build deit_tiny_patch16_224.fb_in1k --model-arg img_size=384 --output larger-images

    concat-ensemble build --recipe vit-objectives --output vit-objectives
    """
    from concat_ensemble.reporting.model_card import renew_card
    from concat_ensemble.studies.ensemble_folders import check_folder, replace_ensemble
    from concat_ensemble.studies.ensembles import build_ensemble

    check_folder(output, overwrite)
    model = build_ensemble(
        members or [],
        recipe=recipe,
        checkpoints=checkpoints,
        preprocessing=preprocessing,
        model_args=_parse_model_args(model_args or []),
        channels=_parse_list("--channels", channels, int),
        mean=_parse_list("--mean", mean, float),
        std=_parse_list("--std", std, float),
        license=license,
        dtype=dtype,
        seed=seed,
        command=command_line(),
    )
    replace_ensemble(output, model.save_pretrained, lambda folder: renew_card(folder, output), quiet=quiet)
    facts = {"folder": str(output), "num_features": model.config.num_features, "members": model.config.members}
    print_written(member_table(output, facts["members"]), facts, as_json, quiet)


def _parse_model_args(texts: list[str]) -> dict[str, Any]:
    """Python literals become values and anything else strings, as in timm's `--model-kwargs`."""
    parsed = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name.isidentifier() or not value:
            raise ValueError(f"--model-arg {text}: give NAME=VALUE, such as img_size=384.")
        if name in parsed:
            raise ValueError(f"--model-arg {text}: {name} is given twice; give it once.")
        if value.lower() in ("true", "false", "none"):  # as a string, "false" would count as true
            value = value.capitalize()
        try:
            parsed[name] = ast.literal_eval(value)
        except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
            parsed[name] = value
    return parsed


def _parse_list(option: str, text: str | None, kind: Callable[[str], Any]) -> list | None:
    try:
        return None if text is None else [kind(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text}: give numbers with commas between them, such as 0,1,2.") from error


def member_table(output: Path, members: list[dict]) -> Table:
    """The members' architectures, pooled features, inputs and sources."""
    num_features = sum(member["num_features"] for member in members)
    table = Table("", "architecture", "features", "input", "source", title=f"{output}: {num_features:,} features")
    for k, member in enumerate(members):
        size = "x".join(map(str, member["preprocessing"]["input_size"]))
        provenance = member["provenance"]
        weights = f" ({provenance['weights']} weights)" if "weights" in provenance else ""
        source = f"{provenance.get('source', 'not stated')}{weights}"
        table.add_row(str(k), member["architecture"], f"{member['num_features']:,}", size, source)
    return table
