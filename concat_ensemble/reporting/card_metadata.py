"""The metadata of an ensemble's card, which the Hub reads: what it is, of what it is made, and what was measured."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.reporting.licenses import OTHER, joint_license
from concat_ensemble.studies.results import Results

if TYPE_CHECKING:
    from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig

LICENSE = "LICENSE.md"
METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class accuracy",
    "macro_f1": "macro F1",
    "calibration_error": "calibration error",
}
PROBES = {  # what a study's number is, in short and for its table
    "linear": (
        "linear probe",
        "Linear probe: multinomial logistic regression on frozen features, its L2 strength chosen on validation data, the test split read once.",
    ),
    "fine-tuning": (
        "fine-tuned",
        "The ensemble and its head were trained together on this dataset; the test split was read once.",
    ),
}
TAGS = ["concat-ensemble", "timm", "image-feature-extraction", "linear-probe", "custom_code"]
OURS = ("library_name", "pipeline_tag", "license", "license_name", "license_link", "base_model", "base_model_relation", "datasets", "metrics", "model-index")  # fmt: skip
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def card_metadata(
    title: str, config: ConcatEnsembleConfig, studies: dict[str, Results], earlier: dict[str, Any]
) -> ModelCardData:
    """What config and results give, and of the `earlier` metadata the tags and keys that are not ours."""
    own = {key: value for key, value in earlier.items() if key not in OURS}
    provenances = [config.members[k]["provenance"] for k in config.built_members]
    hub_members = list(dict.fromkeys(str(p["hub_id"]) for p in provenances if is_hub_id(p.get("hub_id"))))
    licenses = member_licenses(config)
    license = joint_license(licenses)
    recipes = [provenance.get("recipe") for provenance in provenances]
    trained_on = [str(recipe.get("dataset")) for recipe in recipes if isinstance(recipe, dict)]
    probed_on = [_dataset_id(study.dataset) for study in studies.values() if study.dataset.get("on_hub")]
    datasets = [name for name in dict.fromkeys([*trained_on, *probed_on]) if is_hub_id(name) and "/" in name]
    evaluations = [found for study in studies.values() for found in _evaluations(study)]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag(config),
        license=license,
        license_name=_license_name(licenses) if license == OTHER else None,
        license_link=LICENSE if license == OTHER else None,
        tags=list(dict.fromkeys([*TAGS, *(own.pop("tags", None) or [])])),
        base_model=hub_members or None,
        base_model_relation="merge" if hub_members else None,
        datasets=datasets or None,
        metrics=["accuracy"] if studies else None,
        model_name=one_line(title) if evaluations else None,
        eval_results=evaluations or None,
        **own,
    )


def _evaluations(study: Results) -> list[EvalResult]:
    """For `model-index`. The Hub merges results that differ in task name or dataset arguments only, so what was probed and how
    stands in the metric.
    """
    dataset, subject = study.dataset, study.rows[0]
    what = {key: dataset[key] for key in ("classes", "shots", "limit") if dataset.get(key)}
    part = describe_dataset({"name": "", **{key: what.get(key) for key in ("classes", "shots")}})
    low, high = subject.interval
    arguments = {"protocol": study.protocol, "repeats": study.repeats, "test_images": subject.runs[0].n_test, **what}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=_dataset_id(dataset),
            dataset_name=one_line(dataset.get("name", "dataset")),
            dataset_config=dataset.get("config"),
            dataset_split=dataset.get("test_split") or "test",
            dataset_revision=dataset.get("revision"),
            metric_type="accuracy" if metric == "top1" else metric,
            metric_name=f"{probe_name(study)[0]} {name}{one_line(part)}",
            metric_value=round(sum(run.metrics[metric] for run in subject.runs) / study.repeats, 4),
            metric_args=arguments | ({"interval_95": [round(low, 4), round(high, 4)]} if metric == "top1" else {}),
        )
        for metric, name in METRIC_NAMES.items()
        if metric in subject.runs[0].metrics
    ]


def benchmark_entries(study: Results) -> list[dict[str, Any]]:
    """For `.eval_results`: where the recipe names the dataset's task as the Hub registered it, and all of it was probed."""
    dataset = study.dataset
    if not dataset.get("benchmark") or any(dataset.get(key) for key in ("classes", "shots", "limit")):
        return []
    entry = EvalResultEntry(
        dataset_id=dataset["name"],
        task_id=dataset["benchmark"],
        value=round(100 * study.rows[0].mean, 2),
        dataset_revision=dataset.get("revision"),
        notes=f"{probe_name(study)[0]} top-1 in %, {study.repeats} repeat(s), protocol {study.protocol}",
    )
    return eval_result_entries_to_yaml([entry])


def one_line(value: Any) -> str:
    """Without what moves a terminal's cursor, too."""
    return "".join(filter(str.isprintable, " ".join(str(value).split())))


def is_hub_id(name: Any) -> bool:
    return bool(name) and bool(HUB_ID.fullmatch(str(name)))


def _dataset_id(dataset: dict[str, Any]) -> str:
    """On the Hub where it is there; scattering is ours and no other dataset."""
    name = str(dataset.get("name"))
    return name.removeprefix("scattered:") if dataset.get("on_hub") else one_line(name)


def probe_name(study: Results) -> tuple[str, str]:
    return PROBES.get(study.probe.get("kind"), PROBES["linear"])


def pipeline_tag(config: ConcatEnsembleConfig) -> str:
    return (
        "image-classification"
        if config.architectures == ["ConcatEnsembleForImageClassification"]
        else "image-feature-extraction"
    )


def member_licenses(config: ConcatEnsembleConfig) -> list[str | None]:
    """As the built members' provenance states them."""
    stated = [config.members[k]["provenance"].get("license") for k in config.built_members]
    return [None if license is None else one_line(license) for license in stated]


def _license_name(licenses: list[str | None]) -> str:
    """The id of one licence that the Hub does not know, or how it is with several."""
    named = set(licenses)
    if named <= {None}:
        return "not-stated"
    return re.sub(r"[^a-z0-9.-]+", "-", str(*named).lower()).strip("-") if len(named) == 1 else "mixed"
