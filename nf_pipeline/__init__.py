"""Train CNNs that do not fit a small GPU: block by block, under a memory budget.

    from nf_pipeline import RunConfig, plan, train, resume, load_model

Importing the package is cheap: torch, Ray and the rest are imported by what is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nf_pipeline.config import RunConfig
    from nf_pipeline.driver.preview import preview_plan as plan
    from nf_pipeline.driver.run import resume, train
    from nf_pipeline.model_files import load_early_exit_model, load_model

__all__ = ["RunConfig", "load_early_exit_model", "load_model", "plan", "resume", "train"]

_PLACES = {
    "RunConfig": ("nf_pipeline.config", "RunConfig"),
    "load_early_exit_model": ("nf_pipeline.model_files", "load_early_exit_model"),
    "load_model": ("nf_pipeline.model_files", "load_model"),
    "plan": ("nf_pipeline.driver.preview", "preview_plan"),
    "resume": ("nf_pipeline.driver.run", "resume"),
    "train": ("nf_pipeline.driver.run", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'nf_pipeline' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)
