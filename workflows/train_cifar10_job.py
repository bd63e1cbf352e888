"""A training job to copy: CIFAR-10 in Parquet, VGG-11, workers with 64 MiB for training.

    python workflows/train_cifar10_job.py --data s3://bucket/cifar10 --store s3://bucket/runs

The same call runs on a laptop, inside a Ray job (`--address auto`; infra/kuberay/rayjob.yaml is one) and as a step of
a workflow engine. It can be repeated: finished stages are skipped, so a job that was lost is submitted again under
the same run name.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from nf_pipeline import RunConfig, train
from nf_pipeline.config import resolve_config
from nf_pipeline.errors import NFError


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the few things that differ between places where the job runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder or URI of Parquet with images and labels")
    parser.add_argument("--store", default="./nf-runs", help="folder or s3://bucket/prefix that holds runs")
    parser.add_argument("--run", default="cifar10-vgg11", help="name of the run; the same name resumes it")
    parser.add_argument(
        "--memory-budget", default="64MiB", help="what training may hold on a worker's device, or auto"
    )
    parser.add_argument("--max-train-images", type=int, help="train on a stratified, seeded subset")
    parser.add_argument("--address", help="Ray cluster to join; a local Ray is started when not given")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="any other setting")
    return parser.parse_args(given)


def make_config(arguments: argparse.Namespace) -> RunConfig:
    """Says what to train, within which budget, and where; every other setting has a default."""
    return resolve_config(
        assignments=arguments.set,
        flags={
            "run": arguments.run,
            "data.source": arguments.data,
            "data.max_train_images": arguments.max_train_images,
            "model.name": "vgg11_bn",
            "memory.budget_bytes": arguments.memory_budget,
            "storage.uri": arguments.store,
            "cluster.address": arguments.address,
        },
    )


if __name__ == "__main__":  # worker processes import this file again
    try:
        print(json.dumps(train(make_config(parse_arguments())), indent=2))
    except NFError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
