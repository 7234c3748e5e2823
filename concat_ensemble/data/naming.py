"""Datasets and metrics in words; a light module, since the command line shows them."""

# "top1", "mean_per_class" and "macro_f1" compare predicted classes; the others rank the images of each class.
METRICS = ("top1", "mean_per_class", "macro_f1", "auroc", "average_precision")


def describe_dataset(dataset: dict) -> str:
    """One line about a dataset, from what a results file records of it."""
    config = f" ({dataset['config']})" if dataset.get("config") else ""
    classes = f", classes {', '.join(map(str, dataset['classes']))}" if dataset.get("classes") else ""
    shots = f", {dataset['shots']} labels a class" if dataset.get("shots") else ""
    images = f", {dataset['test_images']:,} test images" if dataset.get("test_images") else ""
    return f"{dataset.get('name', 'dataset')}{config}{classes}{shots}{images}"
