"""README.md of a folder of ensembles: what was measured with each, in one table, and the recipes not run here."""

from collections import Counter
from pathlib import Path

from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.files import check_regular_files, replace_file
from concat_ensemble.members.ensemble_recipes import ENSEMBLES, ensemble_recipe
from concat_ensemble.recipe_files import recipe_names
from concat_ensemble.reporting.model_card import CARD
from concat_ensemble.reporting.rendering import Markdown, escape_text, escape_url, format_code, format_table
from concat_ensemble.reporting.tables import METRIC_NAMES, best_member, hardest_first, row_texts
from concat_ensemble.studies.results import PIXELS, RESULTS, UNTRAINED, Results

INTRODUCTION = """\
# Ensembles that were made here

Each has a folder with config, results, figures and card, without weights. Top-1 in % of a linear probe, or the metric
that is named [95% interval].
The best member is the best on the test images. With one repeat the interval covers variation over test images only.

"""
ENSEMBLE_HEADINGS = [
    *("", "dataset", "top-1", "best member alone", "minus it, paired", "untrained members", "raw pixels", "repeats"),
    *("members", "features", "M parameters"),
]
RECIPES = """
## Recipes: weights not run here

`concat-ensemble build --recipe NAME` builds each of these; those of the paper need their authors' files \
(`--checkpoints FOLDER`).

"""
RECIPE_HEADINGS = ["recipe", "members", "trained on", "licences"]


def write_index(folder: Path) -> Path:
    """Write README.md of a folder of ensembles."""
    text = index_text(folder)
    with replace_file(folder / CARD) as aside:
        aside.write_text(text, encoding="utf-8")
    return folder / CARD


def index_text(folder: Path) -> str:
    """The text of README.md for a folder of ensembles. Raises ValueError if none of them has results, and OSError if
    there is no such folder."""
    check_regular_files(folder)
    paths = sorted(folder.glob(f"*/{RESULTS}/*.json"))
    if not paths:
        raise ValueError(f"{folder} has no ensemble with results; probe one with concat-ensemble probe {folder}/NAME.")
    studies = [(path.parent.parent.name, Results.load(path)) for path in paths]
    studies.sort(key=lambda pair: (pair[0], hardest_first(pair[1])))
    ensembles = format_table([ENSEMBLE_HEADINGS, *(_ensemble_row(name, study) for name, study in studies)])
    recipes = format_table([RECIPE_HEADINGS, *map(_recipe_row, recipe_names(ENSEMBLES))])
    note = f"<!-- Written by `concat-ensemble card {escape_text(folder.name)} --index`. -->\n\n"
    return f"{note}{INTRODUCTION}{ensembles}\n{RECIPES}{recipes}\n"


def _ensemble_row(name: str, study: Results) -> list[str]:
    best, texts = best_member(study), row_texts(study, study.rows[0])
    member = row_texts(study, best) if best else {"value": "", "paired": ""}
    metric = "" if study.metric == "top1" else f" {METRIC_NAMES[study.metric]}"
    interval = texts["interval"].replace(" to ", ", ")
    link = Markdown(f"[{escape_text(name)}]({escape_url(f'{name}/{CARD}')})")
    cells = [link, describe_dataset(study.dataset), f"{texts['value']}{metric} [{interval}]"]
    cells += [member["value"], member["paired"]]
    for control in (UNTRAINED, PIXELS):
        cells.append(row_texts(study, study[control])["value"] if control in study else "")
    return [*cells, str(study.repeats), texts["num_members"], texts["num_features"], texts["parameters"]]


def _recipe_row(name: str) -> list[str]:
    recipe = ensemble_recipe(name)
    provenances = [(recipe.provenance or {}) | (own or {}) for own in recipe.members.values()]
    counts = Counter(source.rpartition("=")[0] or source for source in recipe.members)
    members = ", ".join(f"{count} x {source}" if count > 1 else source for source, count in counts.items())
    pretraining_data, licenses = (
        "; ".join(dict.fromkeys(str(provenance.get(key, "")) for provenance in provenances))
        for key in ("pretraining_data", "license")
    )
    return [format_code(name), members, pretraining_data, licenses or "as each states on the Hub"]
