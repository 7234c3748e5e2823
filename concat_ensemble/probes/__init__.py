"""What is fitted on frozen features: scikit-learn estimators with one contract, metrics and intervals."""
