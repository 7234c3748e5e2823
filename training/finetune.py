"""Fine-tune an ensemble on a dataset, each member alone or all members at once.

    accelerate launch training/finetune.py training/recipes/scattered_digits_finetune.yaml --model FOLDER

`--help` lists the options; the flow is concat_ensemble/training/finetuning.py.
"""

from concat_ensemble.training.finetuning import main

if __name__ == "__main__":
    main()
