"""README.md of a folder of ensembles: what was measured with each, in one table, and the recipes that nobody ran here."""

from collections import Counter
from pathlib import Path

from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.members.ensemble_recipes import ENSEMBLES, ensemble_recipe
from concat_ensemble.recipe_files import recipe_names
from concat_ensemble.reporting.card_metadata import one_line
from concat_ensemble.reporting.model_card import CARD, best_member, escaped, hardest_first, row_texts
from concat_ensemble.studies.results import RESULTS, Results


def write_index(folder: Path) -> Path:
    (folder / CARD).write_text(index_text(folder))
    return folder / CARD


def index_text(folder: Path) -> str:
    """
    Raises:
        ValueError: when no folder in it has results.
    """
    lines = [
        f"<!-- Written by `concat-ensemble card {folder.name} --index`. -->",
        "",
        "# Ensembles that were made here",
        "",
        "A folder each, with config, results, figures and card, without weights. Top-1 in % of a linear probe [95% interval]; the best",
        "member is the best by test. One repeat means that the interval covers the draw of the test images only.",
        "",
        "| | dataset | top-1 | best member alone | minus it, paired | untrained members | raw pixels | repeats | members | columns | M parameters |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    paths = sorted(folder.glob(f"*/{RESULTS}/*.json"))
    if not paths:
        raise ValueError(f"{folder} has no ensemble with results; probe one with concat-ensemble probe {folder}/NAME.")
    found = [(path.parent.parent.name, escaped(Results.load(path))) for path in paths]
    for home, study in sorted(found, key=lambda pair: (pair[0], hardest_first(pair[1]))):
        subject, best = study.rows[0], best_member(study)
        texts, controls = row_texts(study, subject), ("untrained members", "raw pixels")
        cells = [
            f"[{home}]({home}/{CARD})",
            describe_dataset(study.dataset),
            f"{texts['top1']} [{texts['interval'].replace(' to ', ', ')}]",
        ]
        cells += [row_texts(study, best)[key] for key in ("top1", "paired")] if best else ["", ""]
        cells += [row_texts(study, study[name])["top1"] if name in study else "" for name in controls]
        cells += [str(study.repeats), *(texts[key] for key in ("num_members", "width", "parameters"))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Recipes: weights not run here",
        "",
        "`concat-ensemble build --recipe NAME` builds each of these, those of the paper from their authors' files (`--checkpoints FOLDER`).",
        "",
        "| recipe | members | trained on | licences |",
        "|---|---|---|---|",
    ]
    for name in recipe_names(ENSEMBLES):
        recipe = ensemble_recipe(name)
        told = [(recipe.provenance or {}) | (own or {}) for own in recipe.members.values()]
        counted = Counter(source.rpartition("=")[0] or source for source in recipe.members)
        members = ", ".join(f"{number} x {source}" if number > 1 else source for source, number in counted.items())
        trained, licenses = (
            "; ".join(dict.fromkeys(str(one.get(key, "")) for one in told)) for key in ("pretraining_data", "license")
        )
        cells = [f"`{name}`", members, trained, licenses or "as each states on the Hub"]
        lines.append(f"| {' | '.join(one_line(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"
