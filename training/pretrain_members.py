"""Train the members of time-concatenated ensembles and the networks they are compared with, then assemble them.

    accelerate launch training/pretrain_members.py training/recipes/scattered_digits_timecat.yaml

`--help` lists the options; the flow is concat_ensemble/training/pretraining.py.
"""

from concat_ensemble.training.pretraining import main

if __name__ == "__main__":
    main()
