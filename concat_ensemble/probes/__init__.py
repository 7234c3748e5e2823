"""What is fitted on frozen features: scikit-learn estimators with one contract."""

from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.ridge import RidgeProbe

__all__ = ["LinearProbe", "RidgeProbe"]
