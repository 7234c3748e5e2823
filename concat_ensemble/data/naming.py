"""How a dataset is named in words."""


def describe_dataset(dataset: dict) -> str:
    """One line: the dataset, its classes where they were chosen, its test images."""
    classes = f", classes {', '.join(map(str, dataset['classes']))}" if dataset.get("classes") else ""
    images = f", {dataset['test_images']:,} test images" if dataset.get("test_images") else ""
    config = f" ({dataset['config']})" if dataset.get("config") else ""
    shots = f", {dataset['shots']} labels a class" if dataset.get("shots") else ""
    return f"{dataset.get('name', 'dataset')}{config}{classes}{shots}{images}"
