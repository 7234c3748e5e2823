"""Ensemble recipes: the paper's systems, each a YAML file in `recipes/` that names its members."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from concat_ensemble.errors import argument
from concat_ensemble.recipe_files import find_recipe, read_recipe

ENSEMBLES = files("concat_ensemble.members") / "recipes"


@dataclass(frozen=True, kw_only=True)
class EnsembleRecipe:
    """The content of a recipe file."""

    recipe: str  # name of the file without its extension
    members: dict  # sources for `assemble`, each with provenance of its own or None
    provenance: dict | None = None  # of all members
    checkpoints: str | None = None  # where to download the checkpoint files, in words

    def resolve_members(self, folder: Path) -> dict[str, dict[str, Any]]:
        """The source of each member, with checkpoint files in `folder`, and its provenance.

        Raises:
            ValueError: for a file that is not there, with where to download it.
        """
        members = {}
        for source, own in self.members.items():
            architecture, is_file, name = source.rpartition("=")
            if is_file and not (folder / name).is_file():
                remedy = f"it is in {self.checkpoints}; name its folder with {argument('checkpoints')}"
                raise ValueError(f"no {folder / name}; {remedy}.")
            member = f"{architecture}={folder / name}" if is_file else name
            members[member] = {"ensemble_recipe": self.recipe} | (self.provenance or {}) | (own or {})
        return members


def ensemble_recipe(name: str) -> EnsembleRecipe:
    """Read one of the package's recipes. Raises ValueError for an unknown name, with similar names and all names."""
    return read_recipe(EnsembleRecipe, find_recipe(name, ENSEMBLES))
