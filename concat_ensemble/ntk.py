"""Deprecated: import NTK from concat_ensemble.features.ntk."""

import warnings

from concat_ensemble.features.ntk import NTK

__all__ = ["NTK"]
warnings.warn(
    "import NTK from concat_ensemble.features.ntk; concat_ensemble.ntk goes in 0.3", FutureWarning, stacklevel=2
)
