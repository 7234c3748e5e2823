"""Recipes of the training scripts, installed as `concat_ensemble.training.recipes`."""
