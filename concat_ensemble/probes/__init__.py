"""What is fitted on frozen features: scikit-learn estimators with one contract."""

from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.neighbors import KNNProbe
from concat_ensemble.probes.prototype import PrototypeProbe
from concat_ensemble.probes.reference import ReferenceProbe
from concat_ensemble.probes.ridge import RidgeProbe

__all__ = ["KNNProbe", "LinearProbe", "PrototypeProbe", "ReferenceProbe", "RidgeProbe"]
