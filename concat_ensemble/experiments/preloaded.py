"""What a fork server imports for the trainings that it starts, without the warnings of other libraries."""

from importlib import import_module

from concat_ensemble.console import be_quiet

be_quiet()
for name in ("training.pretraining", "training.finetuning", "studies.probe_study", "reporting.training_curves"):
    import_module(f"concat_ensemble.{name}")
