"""Ensemble recipes: the paper's systems, each a YAML file in `recipes/` that names its members."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from concat_ensemble.recipe_files import find_recipe, read_recipe

ENSEMBLES = files("concat_ensemble.members") / "recipes"


@dataclass(frozen=True, kw_only=True)
class EnsembleRecipe:
    """What an ensemble's file says: `members` as `assemble` takes them, with what is known of each alone; the `provenance`
    of them all; and in words where their `checkpoints` come from.
    """

    recipe: str
    members: dict
    provenance: dict | None = None
    checkpoints: str | None = None

    def described(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Each member, its file in `folder` if it has one, and its provenance.

        Raises:
            ValueError: for a file that is not there, saying where it comes from.
        """
        found = {}
        for source, own in self.members.items():
            architecture, is_file, name = source.rpartition("=")
            if is_file and not (folder / name).is_file():
                raise ValueError(
                    f"no {folder / name}; it is in {self.checkpoints}; say where with --checkpoints FOLDER."
                )
            member = f"{architecture}={folder / name}" if is_file else name
            found[member] = {"ensemble_recipe": self.recipe} | (self.provenance or {}) | (own or {})
        return found


def ensemble_recipe(name: str) -> EnsembleRecipe:
    """
    Raises:
        ValueError: for an unknown name, with those that are near and all there are.
    """
    return read_recipe(EnsembleRecipe, find_recipe(name, ENSEMBLES))
