"""Ensembles by name: loading one from anywhere, and building one from members or from a recipe of the paper."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from concat_ensemble.errors import argument
from concat_ensemble.files import is_hub_id
from concat_ensemble.members.assemble import HUB, UnknownRepoError, assemble
from concat_ensemble.members.ensemble_recipes import ensemble_recipe
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel

DTYPES = ("float32", "float16", "bfloat16")


def load_ensemble(name: str, seed: int = 0) -> ConcatEnsembleModel:
    """Load an ensemble, such as "two-resnets" or "me/two-resnets@main", or make one of any member that `assemble`
    accepts, such as "random:resnet18", whose weights `seed` determines. Errors are those of `assemble`."""
    if not is_hub_id(name):
        return assemble([name], seed=seed)
    try:
        return assemble([HUB + name], seed=seed)
    except UnknownRepoError as error:
        raise ValueError(f"no such folder: {name}, and {error}") from error


def is_local_ensemble(name: str) -> bool:
    """Whether results and a card can be written into the folder of this name."""
    return (Path(name) / "config.json").is_file()


def build_ensemble(
    members: Sequence[str],
    *,
    recipe: str | None = None,
    checkpoints: Path = Path(),
    preprocessing: str = "own",
    model_args: dict[str, Any] | None = None,
    channels: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    license: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    command: str = "",
) -> ConcatEnsembleModel:
    """Assemble members, or those of a recipe, and record in their provenance the command that did it.

    Args:
        members, preprocessing, model_args, channels, mean, std, license, seed: Arguments of `assemble`; no members
            with a recipe.
        recipe: Name of an ensemble recipe, such as "swav-cat5".
        checkpoints: Folder with the files that a recipe names.
        dtype: Of the weights: one of `DTYPES`.
        command: The command line.

    Raises:
        ValueError: for an unknown dtype or recipe, members beside a recipe, and as `assemble`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{argument('dtype', dtype)}: give {', '.join(DTYPES)}.")
    if recipe and members:
        named = f"{argument('recipe', recipe)} names its members"
        raise ValueError(f"{named}; leave out {' '.join(members)}, or {argument('recipe')}.")
    provenances = ensemble_recipe(recipe).resolve_members(checkpoints) if recipe else {}
    sources = list(provenances) if recipe else list(members)
    pixels = {"preprocessing": preprocessing, "channels": channels, "mean": mean, "std": std}
    model = assemble(sources, **pixels, model_args=model_args, seed=seed, license=license)
    if dtype != "float32":  # a member's digest is that of its weights in float32: assemble again what rounding left
        model = assemble(model.to(getattr(torch, dtype))).to(getattr(torch, dtype))
    known = provenances.values() if recipe else itertools.repeat({})
    for member, provenance in zip(model.config.members, known, strict=False):
        member["provenance"] = {"command": command} | provenance | member["provenance"]
    return model
