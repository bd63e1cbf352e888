"""Every key of a run: nothing else joins paths.

    RUN/run.json  plan.json  events.jsonl  summary.json
    RUN/lock/00000000.json        which driver works on the run
    RUN/dataset/manifest.json     dataset/train-00000.parquet     of a data set handed over, until it is ingested
    RUN/ingest/manifest.json      ingest/attempt-ID/{train-00000,held-out-labels}.parquet
    RUN/blocks/000/manifest.json  blocks/000/attempt-ID/weights.safetensors
    RUN/blocks/000/rounds/00000/manifest.json     of rounds before a pipelined block's last
                                  blocks/000/attempt-ID/{checkpoint.json,checkpoint-00001.safetensors}
                                  blocks/000/attempt-ID/activations/{train,train-view1,val}-00000.parquet
    RUN/model/manifest.json       model/{model.safetensors,model.json,README.md}
                                  model/choice-00000.json   model/early_exits.{safetensors,json} where they are kept

Objects of an attempt live below its own id; a stage's manifest.json is the commit that names the attempt that
counts. Knows nothing of stores or contents. Entry class: `RunLayout`.
"""

import re
import secrets
from dataclasses import dataclass

from nf_pipeline.errors import InternalError

_BLOCK_STAGE = re.compile(r"block-(\d{3,})")
_LOCK = re.compile(r"/lock/(\d{8,})\.json$")
_SHARD = re.compile(r"/attempt-[^/]+/activations/[^/]+\.parquet$")
_ROUND_MANIFEST = re.compile(r"/rounds/(\d{5,})/manifest\.json$")
_CHOICE = re.compile(r"/choice-(\d{5,})\.json$")


def commit_home(key: str) -> str:
    """Returns the prefix of everything that a commit may name: that of its stage, for the commit of a round too."""
    return _ROUND_MANIFEST.sub("", key).removesuffix("/manifest.json")


def stage_home(key: str, stage: str) -> str | None:
    """Returns the prefix that a stage has in the run of a key; None if there is no such stage."""
    layout = RunLayout(key.partition("/")[0])
    is_known = stage in ("ingest", "model") or _BLOCK_STAGE.fullmatch(stage)
    return layout.stage_prefix(stage) if is_known else None


def choice_key(prefix: str, number: int) -> str:
    """Key of the record of one choice made on the validation split, below `RunLayout.model` or another prefix."""
    return f"{prefix}/choice-{number:05d}.json"


def choice_number(key: str) -> int | None:
    """Reads the number back from a `choice_key`; None for any other key."""
    match = _CHOICE.search(key)
    return int(match.group(1)) if match else None


def new_attempt_id() -> str:
    """Returns 8 random hex digits."""
    return secrets.token_hex(4)


@dataclass(frozen=True)
class RunLayout:
    """The keys of one run, relative to the store.

    Attributes:
        run: name of the run, the first part of every key.
    """

    run: str

    @property
    def run_json(self) -> str:
        """Resolved config, its fingerprint, versions."""
        return f"{self.run}/run.json"

    @property
    def plan_json(self) -> str:
        """The plan."""
        return f"{self.run}/plan.json"

    @property
    def events_jsonl(self) -> str:
        """Every event, one JSON document a line."""
        return f"{self.run}/events.jsonl"

    @property
    def summary_json(self) -> str:
        """The run's result."""
        return f"{self.run}/summary.json"

    @property
    def locks(self) -> str:
        """Prefix of the lock that a driver holds while it works on the run."""
        return f"{self.run}/lock"

    def lock(self, generation: int) -> str:
        """One generation of the lock; the newest is the one that counts."""
        return f"{self.locks}/{generation:08d}.json"

    def lock_generation(self, key: str) -> int | None:
        """Reads the generation back from the key of a `lock`; None for any other key."""
        match = _LOCK.search(key)
        return int(match.group(1)) if match else None

    @property
    def dataset(self) -> str:
        """Prefix of the copy of a data set that was handed over as an object."""
        return f"{self.run}/dataset"

    @property
    def dataset_manifest(self) -> str:
        """Commit of that copy."""
        return f"{self.dataset}/manifest.json"

    def dataset_file(self, split: str, file_idx: int) -> str:
        """One file of that copy; its name tells the split."""
        return f"{self.dataset}/{split}-{file_idx:05d}.parquet"

    @property
    def ingest_manifest(self) -> str:
        """Commit of the ingested images."""
        return f"{self.run}/ingest/manifest.json"

    def ingest_attempt(self, attempt: str) -> str:
        """Prefix of one attempt at the ingest stage."""
        return self.attempt_prefix("ingest", attempt)

    def ingest_shard(self, prefix: str, split: str, shard_idx: int) -> str:
        """Key of one shard of images below an ingest attempt's prefix."""
        return f"{prefix}/{split}-{shard_idx:05d}.parquet"

    def ingest_labels(self, prefix: str) -> str:
        """Labels of the test split, apart from its images, below an ingest attempt's prefix."""
        return f"{prefix}/held-out-labels.parquet"

    @property
    def blocks(self) -> str:
        """Prefix of all blocks."""
        return f"{self.run}/blocks"

    def block(self, block_idx: int) -> str:
        """Prefix of everything about a block."""
        return f"{self.run}/blocks/{block_idx:03d}"

    def block_manifest(self, block_idx: int) -> str:
        """Commit of a block."""
        return f"{self.block(block_idx)}/manifest.json"

    def rounds(self, block_idx: int) -> str:
        """Prefix of the commits of a block's rounds before the last."""
        return f"{self.block(block_idx)}/rounds"

    def round_manifest(self, block_idx: int, round_idx: int, num_rounds: int) -> str:
        """Commit of one round of a block; that of the last round is the block's own."""
        if round_idx == num_rounds - 1:
            return self.block_manifest(block_idx)
        return f"{self.rounds(block_idx)}/{round_idx:05d}/manifest.json"

    def round_of(self, key: str) -> int | None:
        """Reads the round back from the key of a `round_manifest` before the last; None for any other key."""
        match = _ROUND_MANIFEST.search(key)
        return int(match.group(1)) if match else None

    def publications(self, block_idx: int) -> str:
        """Prefix of the records of what is being written."""
        return f"{self.block(block_idx)}/publishing/"

    def publication(self, block_idx: int, round_idx: int, part: int) -> str:
        """Record of the shards that one writer has finished while a round's activations are being written."""
        return f"{self.publications(block_idx)}{round_idx:05d}-{part:03d}.json"

    def part_record(self, prefix: str, part: int) -> str:
        """Shards that one of several workers wrote, below a block attempt's prefix."""
        return f"{prefix}/part-{part:03d}.json"

    def block_attempt(self, block_idx: int, attempt: str) -> str:
        """Prefix of one attempt at a block."""
        return f"{self.block(block_idx)}/attempt-{attempt}"

    def checkpoint_record(self, prefix: str) -> str:
        """Key of the record that names the newest checkpoint below a block attempt's prefix."""
        return f"{prefix}/checkpoint.json"

    def checkpoint_tensors(self, prefix: str, epoch: int) -> str:
        """Key of the state after so many epochs below a block attempt's prefix."""
        return f"{prefix}/checkpoint-{epoch:05d}.safetensors"

    def weights(self, block_idx: int, attempt: str) -> str:
        """Weights of a trained block: its layers and heads."""
        return f"{self.block_attempt(block_idx, attempt)}/weights.safetensors"

    def shard(self, prefix: str, split: str, shard_idx: int) -> str:
        """Key of one shard of activations below a block attempt's prefix."""
        return f"{prefix}/activations/{split}-{shard_idx:05d}.parquet"

    def is_shard(self, key: str) -> bool:
        """Whether a key is a `shard` of activations."""
        return _SHARD.search(key) is not None

    @property
    def model(self) -> str:
        """Prefix of the final model."""
        return f"{self.run}/model"

    @property
    def model_manifest(self) -> str:
        """Commit of the final model."""
        return f"{self.model}/manifest.json"

    @property
    def model_weights(self) -> str:
        """Weights of the final model."""
        return f"{self.model}/model.safetensors"

    @property
    def model_json(self) -> str:
        """Description from which the final model is rebuilt."""
        return f"{self.model}/model.json"

    @property
    def model_card(self) -> str:
        """Model card for people."""
        return f"{self.model}/README.md"

    @property
    def early_exit_heads(self) -> str:
        """Weights of the heads before the final model's, where they are kept."""
        return f"{self.model}/early_exits.safetensors"

    @property
    def early_exit_json(self) -> str:
        """Description of these exits and of the operating points to choose from."""
        return f"{self.model}/early_exits.json"

    def stage_prefix(self, stage: str) -> str:
        """Prefix of a stage named "ingest", "plan", "block-000", ... or "model"."""
        if stage in ("ingest", "plan", "model"):
            return f"{self.run}/{stage}"
        match = _BLOCK_STAGE.fullmatch(stage)
        if match is None:
            raise InternalError(f"stage {stage!r}: want ingest, plan, block-000, ... or model")
        return self.block(int(match.group(1)))

    def attempt_prefix(self, stage: str, attempt: str) -> str:
        """Prefix of one attempt at a stage."""
        return f"{self.stage_prefix(stage)}/attempt-{attempt}"
