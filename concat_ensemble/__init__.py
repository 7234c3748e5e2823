"""Several pretrained image backbones as one richer model. The classes come from `concat_ensemble.modeling`, never from
a bare `modeling`: that makes second ones.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from concat_ensemble.assemble import assemble
from concat_ensemble.data import load_data
from concat_ensemble.features import extract_features
from concat_ensemble.hub import push_features, write_new_card
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.modeling.image_processing_concat_ensemble import ConcatEnsembleImageProcessor
from concat_ensemble.modeling.modeling_concat_ensemble import (
    ConcatEnsembleForImageClassification,
    ConcatEnsembleModel,
    ConcatEnsemblePreTrainedModel,
)
from concat_ensemble.probes import KNNProbe, LinearProbe, PrototypeProbe, ReferenceProbe, RidgeProbe

__all__ = [
    "ConcatEnsembleConfig",
    "ConcatEnsembleForImageClassification",
    "ConcatEnsembleImageProcessor",
    "ConcatEnsembleModel",
    "KNNProbe",
    "LinearProbe",
    "PrototypeProbe",
    "ReferenceProbe",
    "RidgeProbe",
    "assemble",
    "extract_features",
    "load_data",
    "push_features",
]

# With these, importing the package is enough to load an ensemble without `trust_remote_code`.
AutoConfig.register("concat_ensemble", ConcatEnsembleConfig)
AutoModel.register(ConcatEnsembleConfig, ConcatEnsembleModel)
AutoModelForImageClassification.register(ConcatEnsembleConfig, ConcatEnsembleForImageClassification)
AutoImageProcessor.register(
    ConcatEnsembleConfig,
    image_processor_classes={"torchvision": ConcatEnsembleImageProcessor, "pil": ConcatEnsembleImageProcessor},
)
ConcatEnsemblePreTrainedModel.card_writer = staticmethod(write_new_card)
