"""What is fitted on frozen features: scikit-learn estimators with one result type."""

from concat_ensemble.probes.linear import LinearProbe

__all__ = ["LinearProbe"]
