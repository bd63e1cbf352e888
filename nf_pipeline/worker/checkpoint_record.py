"""The record of a block's newest checkpoint, as JSON beside the tensors that it names.

Deliberately knows nothing of tensors, nor imports torch: the driver reads records too. Entry: `read_record`.
"""

from dataclasses import dataclass, field

from nf_pipeline.documents import read_fields
from nf_pipeline.errors import ObjectCorrupt
from nf_pipeline.storage.sealed import read_sealed, repair_fix
from nf_pipeline.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """What the JSON record says.

    Attributes:
        fingerprint: of the block; a checkpoint of another configuration never matches.
        batch_size: that the epochs were trained with.
        epoch: epochs that are done.
        key, checksum: the tensors; empty as long as no epoch is done.
        num_val: samples of the validation split.
        val_results: what each unit of the block made of them after that epoch, see
            `nf_pipeline.core.results.Results.to_text`; a round leaves them to its manifest.
        peak_bytes: measured so far.
        train_s, loader_wait_s, write_s: seconds spent so far, over all attempts.
    """

    fingerprint: str
    batch_size: int
    epoch: int = 0
    key: str = ""
    checksum: str = ""
    num_val: int = 0
    val_results: list[str] = field(default_factory=list)
    peak_bytes: int = 0
    train_s: float = 0.0
    loader_wait_s: float = 0.0
    write_s: float = 0.0


def read_record(store: Store, key: str) -> CheckpointRecord | None:
    """Reads the record of an attempt's newest checkpoint, None if there is none.

    Args:
        store: of the run.
        key: see `RunLayout.checkpoint_record`.

    Raises:
        ObjectCorrupt: it was changed, or names what is not the block's own.
    """
    document = read_sealed(store, key)
    if document is None:
        return None
    try:
        record = read_fields(CheckpointRecord, document.get("record"))
        _check_counts(record)
    except ValueError as error:
        raise ObjectCorrupt(f"{key} is no checkpoint: {error}", store.uri, repair_fix(store, key)) from None
    block = key.rpartition("/")[0].rpartition("/")[0]
    if not record.key.startswith(f"{block}/"):
        what = f"{key} is damaged: it names {record.key}, want a key below {block}/"
        raise ObjectCorrupt(what, store.uri, repair_fix(store, key))
    return record


def _check_counts(record: CheckpointRecord) -> None:
    counts = (record.epoch, record.num_val, record.peak_bytes)
    if record.batch_size < 1 or min(counts) < 0:
        raise ValueError(f"batch_size, epoch, num_val, peak_bytes: got {record.batch_size}, {counts}")
