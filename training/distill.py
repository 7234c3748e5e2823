"""Distill several networks into one backbone, so that inference costs one network.

    accelerate launch training/distill.py training/recipes/scattered_digits_distill.yaml --teachers "[FOLDER, FOLDER]"

`--help` lists the options; the flow is concat_ensemble/training/distillation.py.
"""

from concat_ensemble.training.distillation import main

if __name__ == "__main__":
    main()
