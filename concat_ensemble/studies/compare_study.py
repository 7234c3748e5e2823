"""Comparing members or ensembles by name: which of them repeat each other on a dataset.

run_compare_study(["three-backbones"], DatasetOptions(name="digits"), output=Path("overlap")).overlap.verdict
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.processes import continue_alone
from concat_ensemble.studies.ensembles import load_ensemble
from concat_ensemble.studies.outputs import check_file
from concat_ensemble.studies.overlap import extract_subjects, measure_overlap
from concat_ensemble.studies.overlap_results import Overlap


@dataclass
class CompareStudy:
    """What models have in common, and the file with it."""

    overlap: Overlap
    path: Path


def run_compare_study(
    models: Sequence[str],
    dataset: DatasetOptions,
    extraction: ExtractionOptions | None = None,
    *,
    output: Path,
    overwrite: bool = False,
    command: str = "",
) -> CompareStudy:
    """Compare the members of one ensemble, or several ensembles as wholes, on the training and validation images, and
    write a file named after the dataset.

    `models` are folders or Hub ids of ensembles, or any members that `assemble` accepts. The file, in the folder
    `output`, records `command`. Under `accelerate launch` the processes share the extraction, and then all but the
    main one end. Raises ValueError if the file exists, and for fewer than two models or members.
    """
    path = output / f"{dataset.file_stem}.json"
    check_file(path, overwrite)
    seed = dataset.seed
    loaded = {f"{k}: {Path(name).name}": load_ensemble(name, seed + k) for k, name in enumerate(models)}
    audited = dataset.load()
    extraction = extraction or ExtractionOptions()
    tables = extract_subjects(loaded, audited.data, seed=seed, **dataclasses.asdict(extraction))
    continue_alone()
    overlap = measure_overlap(*tables, quiet=extraction.quiet)
    overlap.save(path, command=command, dataset=dataset.describe(audited) | {"test_images": None})
    return CompareStudy(overlap, path)
