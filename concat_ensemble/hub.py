"""Publishing on the Hub: an ensemble's folder with its card, and features as a dataset."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import CommitInfo, HfApi

from concat_ensemble.modeling.modeling_concat_ensemble import push_folder

if TYPE_CHECKING:
    from concat_ensemble.features.table import FeatureTable

ROWS = 1024  # read from the table at a time


def push_ensemble(folder: Path, repo_id: str, **options) -> CommitInfo:
    """Publish an ensemble's folder: weights, config, image processor, code, card, results and figures, in one commit. A
    folder without a card is given one.

    Args:
        folder: As `concat-ensemble build` leaves it.
        repo_id: `namespace/name` of a model repo, made where there is none.
        **options: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description`, as in
            `ConcatEnsembleModel.push_to_hub`.

    Raises:
        ValueError, OSError: as `concat_ensemble.modeling.modeling_concat_ensemble.push_folder`.
    """
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} holds no ensemble ({error}); make one with concat-ensemble build.") from error
    if kind != "concat_ensemble":
        raise ValueError(f"{folder} holds a model of type {kind!r}, not an ensemble; publish it with hf upload.")
    return push_folder(folder, repo_id, card_writer=write_new_card, **options)


def write_new_card(folder: Path, title: str | None) -> None:
    from concat_ensemble.reporting.model_card import (
        write_card,  # with matplotlib, which loading a model has no use for
    )

    write_card(folder, title)


def push_features(table: FeatureTable, repo_id: str, **options) -> CommitInfo:
    """Publish a table as a Hub dataset: a row per image, a column of lists per member (`member_00`, ...), and the label.
    The table is never in memory as a whole.

    Args:
        table: From `extract_features`.
        repo_id: `namespace/name` of a dataset repo, made where there is none.
        **options: `private`, `token`, `revision`, `create_pr` and more, as in `datasets.DatasetDict.push_to_hub`.
    """
    if options.get("private"):  # which is ignored for a repo that is there already
        api = HfApi(token=options.get("token"), library_name="concat-ensemble")
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True).repo_id
        if not api.dataset_info(repo_id).private:
            raise ValueError(
                f"{repo_id} is public already, and private was asked for; make it so on the Hub or leave it out."
            )
    columns = {
        f"member_{k:02d}": List(Value(str(block.dtype)), length=block.shape[1])
        for k, block in enumerate(table[next(iter(table))].blocks)
    }
    features = Features(columns | {"label": ClassLabel(names=list(map(str, table.class_names)))})
    with tempfile.TemporaryDirectory() as folder:
        splits = DatasetDict()
        for name in table:
            split, path = table[name], f"{folder}/{name}.arrow"
            with ArrowWriter(path=path, features=features) as writer:
                for start in range(0, len(split), ROWS):
                    part = slice(start, start + ROWS)
                    rows = {column: list(block[part]) for column, block in zip(columns, split.blocks, strict=True)}
                    writer.write_batch(rows | {"label": split.labels[part]})
                writer.finalize()
            splits[name] = Dataset.from_file(path)
        return splits.push_to_hub(repo_id, **options)
