"""Every error a user can meet: one class per cause, one exit code per family.

All of them pickle with their fields: an error raised in a worker process reaches the driver whole. For that,
every constructor passes its fields positionally to `super().__init__` and formats the text in `__str__`
(Ray replaces exceptions that cannot be rebuilt from `args` by `UnserializableException`).
The text says what, where, the values that conflict, then `Fix:` and one action.
"""

from nf_pipeline.units import format_bytes

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_PLAN = 3
EXIT_STORAGE = 4
EXIT_BLOCK = 5
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130


class NFError(Exception):
    """Base of all documented errors.

    Attributes:
        exit_code: what the command line returns when the error ends it.
    """

    exit_code = EXIT_INTERNAL


class ConfigError(NFError):
    """A setting, an input file or a model cannot be used.

    Example: `--set train.epoch=3` names no field.
    """

    exit_code = EXIT_CONFIG

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\nFix: {self.fix}" if self.fix else self.what


class DataError(ConfigError):
    """The data set has a row, a column or a split that cannot be used.

    Example: row 17 of train-00001.parquet holds bytes that no image decoder reads.
    """


class PlanError(NFError):
    """No plan fits the memory budget.

    Args:
        layer: name of the layer that needs the most at the smallest batch.
        needed_bytes: what training it takes.
        budget_bytes: what there is.
        smallest_budget_bytes: the smallest budget with which every layer trains.
    """

    exit_code = EXIT_PLAN

    def __init__(self, layer: str, needed_bytes: int, budget_bytes: int, smallest_budget_bytes: int) -> None:
        super().__init__(layer, needed_bytes, budget_bytes, smallest_budget_bytes)
        self.layer = layer
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes
        self.smallest_budget_bytes = smallest_budget_bytes

    def __str__(self) -> str:
        return (
            f"no plan fits the memory budget: layer {self.layer} needs {format_bytes(self.needed_bytes)} "
            f"({self.needed_bytes} bytes) at the smallest batch, the budget is {format_bytes(self.budget_bytes)} "
            f"({self.budget_bytes} bytes)\n"
            f"Fix: --memory-budget {self.smallest_budget_bytes} or more, or a smaller --model, "
            "--set train.unit_layers or, of images, --image-size"
        )


class StorageError(NFError):
    """The store cannot be read or written.

    Example: the bucket does not exist, the credentials are refused, the disk is full.
    """

    exit_code = EXIT_STORAGE

    def __init__(self, what: str, uri: str = "", fix: str = "") -> None:
        super().__init__(what, uri, fix)
        self.what = what
        self.uri = uri
        self.fix = fix

    def __str__(self) -> str:
        where = f" at {self.uri}" if self.uri else ""
        return f"{self.what}{where}" + (f"\nFix: {self.fix}" if self.fix else "")


class StoreUnreachable(StorageError):
    """The store does not answer, or only that it cannot now: waiting may help.

    Example: the S3 server restarts, the network is gone, requests are answered with 503.
    """


class ObjectMissing(StorageError):
    """An object that a manifest or a command names is not in the store."""


class ObjectCorrupt(StorageError):
    """An object's size, checksum or content is not what its manifest says."""


class StageOutdated(ObjectCorrupt):
    """A stage was committed for another configuration or input than the run has now.

    Args:
        what, uri, fix: as for every `StorageError`.
        commit: key of the stage's commit.
    """

    def __init__(self, what: str, uri: str = "", fix: str = "", commit: str = "") -> None:
        super().__init__(what, uri, fix)
        self.args = (what, uri, fix, commit)
        self.commit = commit


class OtherVersion(ObjectCorrupt):
    """A document is of another format version: another version of this program wrote it."""


class AlreadyExists(StorageError):
    """A create-once object is there already: another attempt committed first."""


class RunConflict(ConfigError):
    """The run's name is taken by a run with another configuration."""


class RunLocked(RunConflict):
    """Another driver works on the run."""


class BlockError(NFError):
    """A stage, most often a block, cannot be finished.

    Args:
        stage: "block-003", "ingest", ...
        what: what happened, with the values that conflict.
        fix: one action.
    """

    exit_code = EXIT_BLOCK

    def __init__(self, stage: str, what: str, fix: str = "") -> None:
        super().__init__(stage, what, fix)
        self.stage = stage
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.stage}: {self.what}"
        return f"{text}\nFix: {self.fix}" if self.fix else text


class OutOfBudget(BlockError):
    """Training took more device memory than the budget allows."""


class Diverged(BlockError):
    """A loss became NaN, infinite or exploded, or activations left the range of the storage type."""


class WorkerLost(BlockError):
    """The worker process or its node died, or never came."""


class InputReplaced(BlockError):
    """What a stage was reading, while it was still being written, was given up and is written anew."""


class StageStopped(NFError):
    """A stage was ended because another one of the same run failed."""

    exit_code = EXIT_BLOCK


class RunInterrupted(NFError):
    """The run was asked to end, and did where nothing is lost: the next start goes on from there."""

    exit_code = EXIT_INTERRUPTED


class InternalError(NFError):
    """Something that should be impossible happened: a bug."""
