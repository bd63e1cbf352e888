"""Images and tensors in: sources, splits, parallel decoding, and the ingest stage that stores them as shards.

Entry functions: `sources.open_source`, `ingest.ingest` and `ingest.ingest_fingerprint` for training;
`images.open_images` and `images.open_labelled` for a finished model; `handed_over.with_dataset` for data sets that
are objects. For data workflows: `Predictor` and `ActivationShards`. Importing the package loads none of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nf_pipeline.data.activation_shards import ActivationShards
    from nf_pipeline.data.predictor import Predictor

__all__ = ["ActivationShards", "Predictor"]

_PLACES = {
    "ActivationShards": "nf_pipeline.data.activation_shards",
    "Predictor": "nf_pipeline.data.predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'nf_pipeline.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
