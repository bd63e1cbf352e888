"""Whatever model.json and files of weights hold, they are read or refused as damaged."""

import json
import struct
from typing import Any

import pytest
import safetensors.torch
import torch
from cases import documented, fuzz, tried
from hypothesis import strategies as st
from junk import as_json, damaged, odd_json, spoiled

from nf_pipeline.core.tensor_file import read_tensors
from nf_pipeline.errors import ConfigError, ObjectCorrupt
from nf_pipeline.model_files import ModelCard

CARD: dict[str, Any] = {
    "model": "convnet", "class_names": ["a", "b"], "head": "adaptive",
    "num_layers": 2, "exit_layer_idx": 1, "exit_layer": "conv1",
    "val_accuracy": 0.5, "test_accuracy": None, "params": 10, "params_full": 20, "memory_budget_bytes": 1000,
    "weights_checksum": "sha256:0", "temperature": 1.5, "format_version": 4, "contexts": [1],
    "inputs": {"shape": [1, 8, 8], "dtype": "uint8", "num_tokens": 0, "mean": [127.5], "std": [63.75]},
    "target": {"kind": "class", "size": 2, "mean": [], "std": []},
}  # fmt: skip
GOOD_WEIGHTS = safetensors.torch.save({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int64)})


@fuzz("weights: damaged", quick=300, thorough=20_000, data=st.one_of(damaged(GOOD_WEIGHTS), st.binary(max_size=60)))
def test_fuzz_weights_with_damage_are_read_or_refused(data: bytes) -> None:
    assert isinstance(documented(lambda: read_tensors(data, "weights")), dict | ObjectCorrupt)


HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [4], "data_offsets": [24, 56]},
    "__metadata__": {"format": "pt"},
}


@fuzz(
    "weights: headers",
    quick=300,
    thorough=10_000,
    header=st.one_of(spoiled(HEADER), odd_json),
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
def test_fuzz_weights_header_that_lies_is_refused(header: Any, length: int | None) -> None:
    text = as_json(header)
    data = struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 56
    assert isinstance(documented(lambda: read_tensors(data, "weights")), dict | ObjectCorrupt)


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "U64", "BOOL", "X", ""])
def test_weights_of_every_type_are_read_or_refused(dtype: str) -> None:
    tried("weights: types")
    text = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 8]}}).encode()
    documented(lambda: read_tensors(struct.pack("<Q", len(text)) + text + b"\0" * 8, "weights"))


@fuzz("documents: model.json", quick=300, thorough=10_000, document=st.one_of(spoiled(CARD), odd_json))
def test_fuzz_model_card_with_a_wrong_field_is_read_or_refused(document: Any) -> None:
    outcome = documented(lambda: ModelCard.from_json(document, "model.json"))
    assert isinstance(outcome, ModelCard | ObjectCorrupt)
    if isinstance(outcome, ModelCard):
        assert outcome.target.size == len(outcome.class_names)
        assert len(outcome.inputs.std) in (0, outcome.inputs.shape[0])


@fuzz("documents: models built", quick=25, thorough=400, document=spoiled(CARD))
def test_fuzz_model_of_a_wrong_card_is_built_or_explained(document: Any) -> None:
    card = documented(lambda: ModelCard.from_json(document, "model.json"))
    if isinstance(card, ModelCard) and ":" not in card.model:
        built = documented(card.build)
        assert isinstance(built, torch.nn.Module | ConfigError)
