"""The chain prepare -> train -> predict as tasks of a workflow engine (Luigi, https://luigi.readthedocs.io).

    python workflows/luigi_chain.py                                            # digits, about a minute
    python workflows/luigi_chain.py --data ./photos.parquet --memory-budget 64MiB --folder ./work

Every task names what it makes; a task whose target is there is not run again, so running the chain twice does
nothing the second time and running it after a failure goes on where it stopped. Inside `Train` the same holds for
every stage. Without `__main__`, the tasks are what a scheduler of yours calls:

    luigi --module luigi_chain Predict --folder ./work --local-scheduler
"""

import argparse
import sys
from importlib import resources
from pathlib import Path

import luigi
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nf_pipeline import train
from nf_pipeline.config import resolve_config
from nf_pipeline.driver.use import predict
from nf_pipeline.errors import NFError
from nf_pipeline.run_uri import join_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import open_store

RUN = "luigi-chain"


class StoredObject(luigi.Target):
    """An object of a run's store, in a folder or in S3."""

    def __init__(self, store_uri: str, key: str) -> None:
        self.store_uri, self.key = store_uri, key

    def exists(self) -> bool:
        """Tells whether it was written."""
        return open_store(self.store_uri).size(self.key) is not None


class Chain(luigi.Task):
    """What the three tasks are told."""

    data = luigi.Parameter(default="", description="Parquet file or folder; default: digits")
    folder = luigi.Parameter(default="./nf-runs/luigi", description="folder for prepared data and predictions")
    store = luigi.Parameter(default="", description="folder or s3://bucket/prefix of the run; default: FOLDER/runs")
    memory_budget = luigi.Parameter(default="4MiB")
    epochs = luigi.IntParameter(default=4)
    max_train_images = luigi.OptionalIntParameter(default=None)
    executor = luigi.Parameter(default="inline", description="inline or ray")
    num_threads = luigi.OptionalIntParameter(default=None)

    @property
    def store_uri(self) -> str:
        """Where the run goes."""
        return self.store or f"{self.folder}/runs"

    def on_failure(self, exception: BaseException) -> str:
        """Shows a documented error as it is, anything else with its traceback."""
        if isinstance(exception, NFError):
            print(f"Error: {exception}", file=sys.stderr)
            return str(exception)
        return super().on_failure(exception)


class Prepare(Chain):
    """Cleans rows and labels into one Parquet file. Replace its body with what your data needs."""

    def output(self) -> luigi.LocalTarget:
        """The prepared file, which appears when it is complete."""
        return luigi.LocalTarget(f"{self.folder}/prepared.parquet")

    def run(self) -> None:
        """Keeps rows that have an image, and writes labels as tidy text."""
        source = self.data or str(resources.files("nf_pipeline.data") / "digits.parquet")
        table = pq.read_table(source, columns=["image", "label"])
        table = table.filter(pc.is_valid(pc.struct_field(table["image"], "bytes")))
        labels = pc.utf8_lower(pc.utf8_trim_whitespace(pc.cast(table["label"], pa.string())))
        with self.output().temporary_path() as path:
            pq.write_table(table.set_column(1, "label", labels), path, row_group_size=600)


class Train(Chain):
    """Trains the model; its target is the run's summary, which is written last."""

    def requires(self) -> Prepare:
        """The prepared file."""
        return self.clone(Prepare)

    def output(self) -> StoredObject:
        """The run's summary."""
        return StoredObject(self.store_uri, RunLayout(RUN).summary_json)

    def run(self) -> None:
        """Trains, or goes on with a run that was interrupted."""
        flags = {
            "run": RUN,
            "data.source": self.input().path,
            "data.max_train_images": self.max_train_images,
            "memory.budget_bytes": self.memory_budget,
            "train.epochs": self.epochs,
            "storage.uri": self.store_uri,
            "cluster.executor": self.executor,
            "cluster.num_threads": self.num_threads,
        }
        train(resolve_config(flags=flags))


class Predict(Chain):
    """Predicts every prepared image with the final model."""

    def requires(self) -> dict[str, luigi.Task]:
        """The model and the images."""
        return {"model": self.clone(Train), "images": self.clone(Prepare)}

    def output(self) -> luigi.LocalTarget:
        """Parquet with id, label, class name, probability and exit."""
        return luigi.LocalTarget(f"{self.folder}/predictions.parquet")

    def run(self) -> None:
        """Writes the predictions; the file appears when it is complete."""
        predict(join_run_uri(self.store_uri, RUN), self.input()["images"].path, self.output().path)


def parse_arguments() -> argparse.Namespace:
    """Reads the parameters of the tasks that differ most often."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in Chain.get_params():
        kind = int if isinstance(parameter, luigi.IntParameter | luigi.OptionalIntParameter) else str
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=parameter.task_value(Chain.task_family, name))
    return parser.parse_args()


def main() -> int:
    """Runs what is missing of the chain; returns 0 if all of it is there in the end."""
    arguments = parse_arguments()
    Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    done = luigi.build([Predict(**vars(arguments))], local_scheduler=True, log_level="WARNING", detailed_summary=True)
    print(done.summary_text)
    return 0 if done.scheduling_succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
