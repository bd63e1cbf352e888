"""A configuration on the shipped digits that runs in a few seconds."""

DIGITS = {
    "memory.budget_bytes": "4MiB",
    "data.max_train_images": 400,
    "train.epochs": 2,
    "train.unit_layers": 2,
    "exits.patience": "never",
    "cluster.executor": "inline",
    "cluster.num_threads": 1,
    "train.device": "cpu",
}
