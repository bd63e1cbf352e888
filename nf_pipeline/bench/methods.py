"""The ways to train that are compared: one table, name -> method.

A pipeline's name may be followed by settings of its own, as in "nf+train.unit_layers=3+train.head=linear". Knows
nothing of torch. Entry: `method_named`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nf_pipeline.errors import ConfigError

REFERENCE_BATCH = 128
"""Samples per optimiser step of methods that accumulate gradients; the batch that learning rates are meant for."""

REFERENCE = "bp"
"""The method whose final accuracy is the target, and whose seconds are what equal time means."""

NEEDS_CLUSTER = "nf-pipelined"
"""One of the default methods where there is a cluster to run it on."""

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train under a budget.

    Attributes:
        title: for tables and plots.
        family: backpropagation through the whole network; DGL: a classic head of 256 filters on every layer, all
            layers trained on every batch, no gradient between them; or this project's pipeline.
        checkpointing: keep what enters each segment of layers and compute the rest again.
        micro_batch: accumulate gradients up to `REFERENCE_BATCH` over batches that fit.
        precision: of forward and backward passes.
        changes: of the pipeline's configuration, by dotted field.
    """

    title: str
    family: Literal["backprop", "dgl", "pipeline"]
    checkpointing: bool = False
    micro_batch: bool = False
    precision: Precision = "fp32"
    changes: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "nf": Method(title="nf-pipeline", family="pipeline"),
    "bp": Method(title="backprop", family="backprop"),
    "bp-ckpt": Method(title="backprop + checkpointing", family="backprop", checkpointing=True),
    "bp-micro": Method(title="backprop + micro-batches", family="backprop", micro_batch=True),
    "bp-both": Method(title="backprop + both", family="backprop", checkpointing=True, micro_batch=True),
    "bp-bf16": Method(title="backprop, bf16", family="backprop", precision="bf16"),
    "dgl": Method(title="DGL, 256-filter heads", family="dgl"),
    "nf-layer": Method(title="nf-pipeline, layer by layer", family="pipeline", changes={"train.local": "layer"}),
    "nf-block": Method(title="nf-pipeline, blocks", family="pipeline", changes={"train.local": "block"}),
    NEEDS_CLUSTER: Method(
        title="nf-pipeline, pipelined",
        family="pipeline",
        changes={"train.mode": "pipelined", "cluster.executor": "ray"},
    ),
}

DEFAULT_METHODS = ("nf", "bp", "bp-ckpt", "bp-micro", "bp-both", "bp-bf16", "dgl")


def method_named(name: str) -> Method:
    """Looks a method up, and changes its settings where its name says so.

    Raises:
        ConfigError: there is none of that name, or it has no settings.
    """
    base, *settings = name.split("+")
    if base not in METHODS:
        raise ConfigError(f"--methods {name}: unknown method", f"one or more of {','.join(METHODS)}")
    method = METHODS[base]
    if not settings:
        return method
    if method.family != "pipeline" or not all(setting.partition("=")[2] for setting in settings):
        raise ConfigError(f"--methods {name}: got {'+'.join(settings)} for {base}", "nf+section.field=value")
    changes = dict(setting.split("=", 1) for setting in settings)
    shown = ", ".join(setting.partition(".")[2] or setting for setting in settings)
    return replace(method, title=f"{method.title}, {shown}", changes={**method.changes, **changes})


def in_order(names: Iterable[str]) -> list[str]:
    """Returns each name once, in the order of `METHODS`; a method with other settings follows the one without."""
    order = list(METHODS)
    return sorted(set(names), key=lambda name: (order.index(name.partition("+")[0]), name))
