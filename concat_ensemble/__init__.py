"""Several pretrained image backbones as one richer model.

Importing the package costs next to nothing. Its names are imported when they are first used, and its classes are
registered with transformers' Auto classes as soon as those are imported, before or after this package.
"""

import functools
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

import wrapt

if TYPE_CHECKING:
    from concat_ensemble.data.loading import load_data
    from concat_ensemble.features.extraction import extract_features
    from concat_ensemble.features.table import FeatureTable
    from concat_ensemble.hub import push_features
    from concat_ensemble.inference.prediction import predict_images
    from concat_ensemble.members.assemble import assemble
    from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
    from concat_ensemble.modeling.image_processing_concat_ensemble import ConcatEnsembleImageProcessor
    from concat_ensemble.modeling.modeling_concat_ensemble import (
        ConcatEnsembleForImageClassification,
        ConcatEnsembleModel,
    )
    from concat_ensemble.probes.linear import LinearProbe
    from concat_ensemble.probes.neighbors import KNNProbe
    from concat_ensemble.probes.prototype import PrototypeProbe
    from concat_ensemble.probes.reference import ReferenceProbe
    from concat_ensemble.probes.ridge import RidgeProbe

__all__ = [
    "ConcatEnsembleConfig",
    "ConcatEnsembleForImageClassification",
    "ConcatEnsembleImageProcessor",
    "ConcatEnsembleModel",
    "FeatureTable",
    "KNNProbe",
    "LinearProbe",
    "PrototypeProbe",
    "ReferenceProbe",
    "RidgeProbe",
    "assemble",
    "extract_features",
    "load_data",
    "predict_images",
    "push_features",
]

_MODULES = {
    "ConcatEnsembleConfig": "modeling.configuration_concat_ensemble",
    "ConcatEnsembleForImageClassification": "modeling.modeling_concat_ensemble",
    "ConcatEnsembleImageProcessor": "modeling.image_processing_concat_ensemble",
    "ConcatEnsembleModel": "modeling.modeling_concat_ensemble",
    "FeatureTable": "features.table",
    "KNNProbe": "probes.neighbors",
    "LinearProbe": "probes.linear",
    "PrototypeProbe": "probes.prototype",
    "ReferenceProbe": "probes.reference",
    "RidgeProbe": "probes.ridge",
    "assemble": "members.assemble",
    "extract_features": "features.extraction",
    "load_data": "data.loading",
    "predict_images": "inference.prediction",
    "push_features": "hub",
}
# Modules of transformers that load classes from a repo's own code, and their function that does it.
_LOADERS = (
    *(f"models.auto.{kind}_auto" for kind in ("configuration", "feature_extraction", "image_processing")),
    *(f"models.auto.{kind}_auto" for kind in ("processing", "tokenization", "video_processing")),
    "models.auto.auto_factory",
    "pipelines",
)
_LOAD_CLASS = "get_class_from_dynamic_module"


def __getattr__(name: str):
    if name == "__version__":
        return version("concat-ensemble")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"concat_ensemble.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register_config(auto) -> None:
    from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig

    auto.AutoConfig.register("concat_ensemble", ConcatEnsembleConfig)


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register_models(auto) -> None:
    from concat_ensemble.modeling import modeling_concat_ensemble as modeling

    auto.AutoModel.register(modeling.ConcatEnsembleConfig, modeling.ConcatEnsembleModel)
    classifier = modeling.ConcatEnsembleForImageClassification
    auto.AutoModelForImageClassification.register(modeling.ConcatEnsembleConfig, classifier)


def _load_image_processor(load, instance, args, kwargs):
    """Called in place of `AutoImageProcessor.from_pretrained(repo, **options)`, which goes by the class that the
    processor's file names: an ensemble's processor is ours."""
    from concat_ensemble.modeling.image_processing_concat_ensemble import ConcatEnsembleImageProcessor

    name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if not _is_ensemble(name, kwargs):
        return load(*args, **kwargs)
    choices = ("backend", "code_revision", "config", "trust_remote_code", "use_fast")  # between classes
    options = {key: value for key, value in kwargs.items() if key not in choices}
    return ConcatEnsembleImageProcessor.from_pretrained(*args, **options)


@wrapt.when_imported("transformers.models.auto.image_processing_auto")
def _register_image_processor(auto) -> None:
    from concat_ensemble.modeling import image_processing_concat_ensemble as processing

    classes = dict.fromkeys(("torchvision", "pil"), processing.ConcatEnsembleImageProcessor)
    auto.AutoImageProcessor.register(processing.ConcatEnsembleConfig, image_processor_classes=classes)
    wrapt.wrap_function_wrapper(auto, "AutoImageProcessor.from_pretrained", _load_image_processor)


def _is_ensemble(name, options) -> bool:
    """Whether the config of a folder or a repo is an ensemble's."""
    from transformers import PreTrainedConfig

    settings = {}
    with suppress(OSError):  # there is no config
        settings, _ = PreTrainedConfig.get_config_dict(name, **options)
    return settings.get("model_type") == "concat_ensemble"


def _refuse_code_of_ensembles(load_class, instance, args, kwargs):
    """Called in place of transformers' `get_class_from_dynamic_module(reference, repo, **options)`: the classes of an
    ensemble are the installed ones, so that code is run only of repos whose config is not an ensemble's."""
    _, repo = args
    if _is_ensemble(repo, kwargs):
        remedy = "leave out trust_remote_code: its classes are those of the installed package"
        raise ValueError(f"{repo} is an ensemble, and none of the code beside it is run; {remedy}.")
    return load_class(*args, **kwargs)


def _guard_loader(module) -> None:
    if hasattr(module, _LOAD_CLASS):
        wrapt.wrap_function_wrapper(module, _LOAD_CLASS, _refuse_code_of_ensembles)


for _name in _LOADERS:
    wrapt.register_post_import_hook(_guard_loader, f"transformers.{_name}")


@wrapt.when_imported("concat_ensemble.modeling.modeling_concat_ensemble")
def _attach_methods(modeling) -> None:
    """Give the classes what the Hub payload alone cannot do: a push that writes a card, and BatchNorm folding."""
    base = modeling.ConcatEnsemblePreTrainedModel

    @functools.wraps(base.push_to_hub)
    def push_to_hub(self, repo_id, **options):
        from concat_ensemble.hub import push_model

        return push_model(self, repo_id, **options)

    @functools.wraps(base.fold_batchnorm)
    def fold_batchnorm(self):
        from concat_ensemble.inference.folding import fold_batchnorm

        return fold_batchnorm(self)

    base.push_to_hub, base.fold_batchnorm = push_to_hub, fold_batchnorm
