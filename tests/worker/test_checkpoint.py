from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nf_pipeline.errors import ObjectCorrupt
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.sealed import seal, unseal
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.checkpoint import (
    CheckpointRecord,
    find_checkpoint,
    load_checkpoint,
    pack_units,
    save_record,
    save_tensors,
    unpack_units,
)

LAYOUT = RunLayout("r")


def make_unit(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    unit = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    return unit, torch.optim.SGD(unit.parameters(), lr=0.1, momentum=0.9)


def train(unit: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x_NCHW = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(step))
        unit(x_NCHW).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def save(store: Store, attempt: str, epoch: int, record: CheckpointRecord | None = None) -> CheckpointRecord:
    unit, optimizer = make_unit(0)
    train(unit, optimizer, epoch)
    record = record or CheckpointRecord(fingerprint="f", batch_size=4)
    prefix = LAYOUT.block_attempt(0, attempt)
    tensors = save_tensors(store, LAYOUT.checkpoint_tensors(prefix, epoch), [unit], [optimizer])
    return save_record(store, LAYOUT, prefix, replace(record, epoch=epoch), tensors)


def test_restored_training_continues_bit_for_bit(store: Store) -> None:
    save(store, "a", 3)
    straight, straight_optimizer = make_unit(0)
    train(straight, straight_optimizer, 3)
    train(straight, straight_optimizer, 2)
    restored, optimizer = make_unit(1)
    load_checkpoint(store, find_checkpoint(store, LAYOUT, 0, "f", 4), [restored], [optimizer])
    train(restored, optimizer, 2)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name


def test_newest_epoch_of_any_attempt_is_found(store: Store) -> None:
    save(store, "a", 1)
    save(store, "b", 3)
    save(store, "c", 2)
    assert find_checkpoint(store, LAYOUT, 0, "f", 4).epoch == 3


def test_checkpoint_of_another_fingerprint_or_block_is_not_found(store: Store) -> None:
    save(store, "a", 1)
    assert find_checkpoint(store, LAYOUT, 0, "other", 4) is None
    assert find_checkpoint(store, LAYOUT, 1, "f", 4) is None


def test_only_the_newest_tensors_of_an_attempt_are_kept(store: Store) -> None:
    first = save(store, "a", 1)
    second = save(store, "a", 2, first)
    assert store.size(first.key) is None
    assert store.size(second.key) is not None


def test_tensors_without_a_record_are_no_checkpoint(store: Store) -> None:
    save(store, "a", 1)
    unit, optimizer = make_unit(0)
    key = LAYOUT.checkpoint_tensors(LAYOUT.block_attempt(0, "a"), 2)
    save_tensors(store, key, [unit], [optimizer])
    assert find_checkpoint(store, LAYOUT, 0, "f", 4).epoch == 1


def test_flipped_bit_is_an_error_that_names_the_checkpoint(store: Store) -> None:
    record = save(store, "a", 1)
    data = bytearray(store.get(record.key))
    data[-1] ^= 1
    store.put(record.key, bytes(data))
    unit, optimizer = make_unit(1)
    with pytest.raises(ObjectCorrupt, match="checkpoint-00001"):
        load_checkpoint(store, record, [unit], [optimizer])


def test_changed_record_is_an_error_that_names_it_and_offers_a_repair(store: Store) -> None:
    save(store, "a", 1)
    save(store, "b", 2)
    key = f"{LAYOUT.block_attempt(0, 'b')}/checkpoint.json"
    store.put(key, bytes(store.get(key)).replace(b'"epoch": 2', b'"epoch": 3'))
    with pytest.raises(ObjectCorrupt, match=key) as caught:
        find_checkpoint(store, LAYOUT, 0, "f", 4)
    assert "/r --repair" in caught.value.fix


def test_record_that_names_another_blocks_tensors_is_refused(store: Store) -> None:
    save(store, "a", 1)
    key = f"{LAYOUT.block_attempt(0, 'a')}/checkpoint.json"
    document = unseal(store.get(key))
    document["record"]["key"] = "r/blocks/001/attempt-a/checkpoint-00001.safetensors"
    store.put(key, seal(document))
    with pytest.raises(ObjectCorrupt, match="want a key below r/blocks/000/"):
        find_checkpoint(store, LAYOUT, 0, "f", 4)


def test_checkpoint_without_its_tensors_gives_way_to_an_older_one(store: Store) -> None:
    save(store, "a", 1)
    store.delete([save(store, "b", 2).key])
    assert find_checkpoint(store, LAYOUT, 0, "f", 4).epoch == 1


def test_packed_units_carry_their_index_and_load_back() -> None:
    source, target = make_unit(0)[0], make_unit(1)[0]
    packed = pack_units([source], 3)
    assert set(packed) == {f"3.{name}" for name in source.state_dict()}
    unpack_units([target], 3, packed)
    assert all(torch.equal(t, target.state_dict()[n]) for n, t in source.state_dict().items())
