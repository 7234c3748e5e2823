"""Train the members of time-concatenated ensembles and the networks they are compared with, then assemble them.

`--help` shows a command and all options; the flow is concat_ensemble/training/pretraining.py.
"""

from concat_ensemble.training.pretraining import main

if __name__ == "__main__":
    main()
