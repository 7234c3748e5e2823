"""Fine-tune an ensemble on a dataset, each member alone or all members at once.

`--help` shows a command and all options; the flow is concat_ensemble/training/finetuning.py.
"""

from concat_ensemble.training.finetuning import main

if __name__ == "__main__":
    main()
