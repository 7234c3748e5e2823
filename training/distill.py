"""Distill several networks into one backbone, so that inference costs one network.

`--help` shows a command and all options; the flow is concat_ensemble/training/distillation.py.
"""

from concat_ensemble.training.distillation import main

if __name__ == "__main__":
    main()
