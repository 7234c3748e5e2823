"""The metadata of an ensemble's card, which the Hub reads: what the model is, its members, and its evaluations."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.members.provenance import Provenance, read_provenances
from concat_ensemble.reporting.licenses import LICENSE, OTHER, joint_license, license_name, member_licenses
from concat_ensemble.reporting.rendering import one_line
from concat_ensemble.studies.results import Results

if TYPE_CHECKING:
    from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig

METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "calibration_error": "calibration error",
}
PROBE_NAMES = {"linear": "linear probe", "fine-tuning": "fine-tuned"}
TAGS = ["concat-ensemble", "timm", "image-feature-extraction", "linear-probe", "custom_code"]
# The keys of a card's metadata that are written anew; any others are the user's and stay, and so do tags.
OWN_KEYS = (
    *("library_name", "pipeline_tag", "license", "license_name", "license_link", "base_model", "base_model_relation"),
    *("datasets", "metrics", "model-index", "model_name", "tags"),
)
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def card_metadata(
    title: str, config: ConcatEnsembleConfig, studies: dict[str, Results], earlier: dict[str, Any]
) -> ModelCardData:
    """The metadata that config and results give, with the user's tags and keys from the `earlier` metadata."""
    tags: list[str] = list(dict.fromkeys([*TAGS, *(earlier.get("tags") or [])]))
    provenances = read_provenances(config)
    hub_members = list(dict.fromkeys(str(each.hub_id) for each in provenances if is_hub_id(each.hub_id)))
    is_tuned = any(each.fine_tuned for each in provenances)
    licenses = member_licenses(config)
    license = joint_license(licenses)
    trained_on = [name.removeprefix("scattered:") for each in provenances for name in _training_data(each)]
    probed_on = [_dataset_id(study.dataset) for study in studies.values() if study.dataset.get("on_hub")]
    datasets = [name for name in dict.fromkeys([*trained_on, *probed_on]) if is_hub_id(name) and "/" in name]
    evaluations = [result for study in studies.values() for result in _evaluations(study)]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if is_classifier(config) else "image-feature-extraction",
        license=license,
        license_name=license_name(licenses) if license == OTHER else None,
        license_link=LICENSE if license == OTHER else None,
        tags=tags,
        base_model=hub_members or None,
        base_model_relation=("finetune" if is_tuned else "merge") if hub_members else None,
        datasets=datasets or None,
        metrics=["accuracy"] if studies else None,
        model_name=one_line(title) if evaluations else None,
        eval_results=evaluations or None,
    )
    for key, value in earlier.items():
        if key not in OWN_KEYS:
            metadata[key] = value
    return metadata


def _training_data(provenance: Provenance) -> list[str]:
    """Names of the datasets that a member was trained on."""
    pretrained = (provenance.recipe or {}).get("dataset") or provenance.dataset
    names = [pretrained, provenance.fine_tuned and provenance.fine_tuned.dataset]
    return [str(name) for name in names if name]


def _evaluations(study: Results) -> list[EvalResult]:
    """The entries of `model-index`, one for each metric.

    The Hub merges results that differ only in task name or dataset arguments, so the metric's name and arguments say
    what was probed and how.
    """
    dataset, subject = study.dataset, study.rows[0]
    subset = {key: _plain(dataset[key]) for key in ("classes", "shots", "limit") if dataset.get(key)}
    described = describe_dataset({"name": "", "classes": subset.get("classes"), "shots": subset.get("shots")})
    arguments = {"protocol": study.protocol, "repeats": study.repeats, "test_images": subject.runs[0].n_test, **subset}
    interval = {"interval_95": [round(bound, 4) for bound in subject.interval]}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=_dataset_id(dataset),
            dataset_name=one_line(dataset.get("name", "dataset")),
            dataset_config=_plain(dataset.get("config")),
            dataset_split=dataset.get("test_split") or "test",
            dataset_revision=_plain(dataset.get("revision")),
            metric_type="accuracy" if metric == "top1" else metric,
            metric_name=f"{probe_name(study)} {name}{one_line(described)}",
            metric_value=round(sum(run.metrics[metric] for run in subject.runs) / study.repeats, 4),
            metric_args=arguments | (interval if metric == study.metric else {}),
        )
        for metric, name in METRIC_NAMES.items()
        if all(metric in run.metrics for run in subject.runs)
    ]


def _plain(value: Any) -> Any:
    """A value of some results, in which a text is one line."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return one_line(value) if isinstance(value, str) else value


def benchmark_entries(study: Results) -> list[dict[str, Any]]:
    """The entries of `.eval_results`: one where the dataset is a benchmark on the Hub and all of it was probed."""
    dataset = study.dataset
    if not dataset.get("benchmark") or any(dataset.get(key) for key in ("classes", "shots", "limit")):
        return []
    entry = EvalResultEntry(
        dataset_id=dataset["name"],
        task_id=dataset["benchmark"],
        value=round(100 * float(study.rows[0].top1.mean()), 2),
        dataset_revision=dataset.get("revision"),
        notes=f"{probe_name(study)} top-1 in %, {study.repeats} repeat(s), protocol {study.protocol}",
    )
    return eval_result_entries_to_yaml([entry])


def is_hub_id(name: Any) -> bool:
    return bool(name) and bool(HUB_ID.fullmatch(str(name)))


def _dataset_id(dataset: dict[str, Any]) -> str:
    """The Hub id, without the prefix of scattered images, which are no other dataset; else the name."""
    name = str(dataset.get("name"))
    return name.removeprefix("scattered:") if dataset.get("on_hub") else one_line(name)


def probe_name(study: Results) -> str:
    return PROBE_NAMES.get(study.probe.get("kind", ""), PROBE_NAMES["linear"])


def is_classifier(config: ConcatEnsembleConfig) -> bool:
    return config.architectures == ["ConcatEnsembleForImageClassification"]
