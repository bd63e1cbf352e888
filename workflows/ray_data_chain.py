"""A data workflow on one Ray cluster: Ray Data prepares images, nf_pipeline trains, Ray Data predicts to Parquet.

    python workflows/ray_data_chain.py                                         # digits, about a minute
    python workflows/ray_data_chain.py --data s3://bucket/photos --images --image-size 32 \\
        --memory-budget 64MiB --store s3://bucket/runs --address auto --output s3://bucket/predictions

Copy it and change `clean` and `make_config`. It can be repeated: finished stages are skipped, the prepared images
are read again only if their ingest was not finished, and the predictions replace those of the last time.
"""

import argparse
import hashlib
import io
import json
import logging
import sys
from importlib import resources
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import ray
import ray.data
from PIL import Image

from nf_pipeline import RunConfig, train
from nf_pipeline.config import resolve_config
from nf_pipeline.data import Predictor
from nf_pipeline.errors import EXIT_CONFIG, NFError

PREDICT_BATCH = 256


def parse_arguments() -> argparse.Namespace:
    """Reads what differs between places where the chain runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder or URI of Parquet with image {bytes, path} and label; default: digits")
    parser.add_argument("--images", action="store_true", help="--data holds image files, a folder for each class")
    parser.add_argument("--image-size", type=int, default=8, help="pixels on both sides after preparation")
    parser.add_argument("--memory-budget", default="4MiB", help="what training may hold on a worker's device")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the train split, per block")
    parser.add_argument("--max-train-images", type=int, help="train on a stratified, seeded subset")
    parser.add_argument("--num-threads", type=int, default=1, help="CPUs of a training task: Ray must have them free")
    parser.add_argument("--store", default="./nf-runs", help="folder or s3://bucket/prefix that holds runs")
    parser.add_argument("--run", default="ray-data-chain", help="name of the run; the same name resumes it")
    parser.add_argument("--output", default="./nf-runs/ray-data-chain-predictions", help="folder or URI of Parquet")
    parser.add_argument("--address", help="Ray cluster to join; a local Ray is started when not given")
    return parser.parse_args()


def start_ray(address: str | None) -> None:
    """Joins the cluster that all three steps share, or starts one here."""
    ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def read(arguments: argparse.Namespace) -> ray.data.Dataset:
    """Returns rows with `image` (encoded, or pixels) and `label`; nothing is read yet."""
    if arguments.images:
        rows = ray.data.read_images(arguments.data, mode="RGB", include_paths=True)
        return rows.map(lambda row: {**row, "label": PurePosixPath(row["path"]).parent.name, "id": row["path"]})
    return ray.data.read_parquet(arguments.data or str(resources.files("nf_pipeline.data") / "digits.parquet"))


def clean(row: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Prepares one row: pixels of one size, a tidy label, a name. Replace it with what your data needs."""
    stored = row["image"]
    image = Image.fromarray(stored) if isinstance(stored, np.ndarray) else Image.open(io.BytesIO(stored["bytes"]))
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    pixels = np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR))
    name = row.get("id") or hashlib.sha256(pixels).hexdigest()[:16]
    return {"id": name, "image": pixels, "label": str(row["label"]).strip().lower()}


def is_usable(row: dict[str, Any]) -> bool:
    """Leaves out images that show nothing, and rows without a label."""
    return bool(row["label"]) and int(row["image"].max()) > int(row["image"].min())


def prepare(arguments: argparse.Namespace) -> ray.data.Dataset:
    """Returns the prepared rows; like everything in Ray Data they are computed where they are consumed."""
    rows = read(arguments).map(clean, fn_kwargs={"image_size": arguments.image_size})
    return rows.filter(is_usable)


def make_config(arguments: argparse.Namespace) -> RunConfig:
    """Says within which budget to train; the data comes from Ray Data."""
    return resolve_config(
        flags={
            "run": arguments.run,
            "data.image_column": "image",
            "data.label_column": "label",
            "data.max_train_images": arguments.max_train_images,
            "memory.budget_bytes": arguments.memory_budget,
            "train.epochs": arguments.epochs,
            "storage.uri": arguments.store,
            "cluster.num_threads": arguments.num_threads,
        }
    )


def predict(rows: ray.data.Dataset, uri: str, output: str) -> None:
    """Writes id, label, prediction, label_idx and probability of every row to Parquet."""
    predicted = rows.map_batches(
        Predictor,
        fn_constructor_kwargs={"uri": uri, "image_column": "image"},
        batch_size=PREDICT_BATCH,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    predicted.write_parquet(output, mode="overwrite")


def main() -> dict[str, Any]:
    """Runs the chain and returns what it did."""
    arguments = parse_arguments()
    config = make_config(arguments)
    start_ray(arguments.address)
    rows = prepare(arguments)
    # The training tasks use this process's Ray: Ray Data is done with its CPUs before they start.
    summary = train(config, dataset=rows)
    predict(rows, f"{arguments.store.rstrip('/')}/{arguments.run}", arguments.output)
    facts = ("chosen_exit", "val_accuracy", "test_accuracy", "params_final", "params_full", "wall_s")
    return {name: summary[name] for name in facts} | {"run": arguments.run, "predictions": arguments.output}


if __name__ == "__main__":  # worker processes import this file again
    try:
        print(json.dumps(main(), indent=2))
    except NFError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except FileNotFoundError as error:  # Ray Data looks for --data when it is told of it
        print(f"Error: {error}\nFix: --data that exists", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
