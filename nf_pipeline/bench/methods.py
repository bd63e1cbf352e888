"""The ways to train that are compared: one table, name -> method.

A name may be followed by settings of its own, as in "nf+train.unit_layers=3+train.head=linear" or
"bp+train.label_smoothing=0.1": the pipeline takes all of its settings, baselines those of `BASELINE_SETTINGS`. Knows
nothing of torch. Entries: `method_named`, `shared_settings`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nf_pipeline.errors import ConfigError

REFERENCE_BATCH = 128
"""Samples per optimiser step of methods that accumulate gradients; the batch that learning rates are meant for."""

REFERENCE = "bp"
"""The method whose final accuracy is the target, and whose seconds are what equal time means."""

NEEDS_CLUSTER = "nf-pipelined"
"""One of the default methods where there is a cluster to run it on."""

BASELINE_SETTINGS: Mapping[str, Sequence[str]] = {
    "train.label_smoothing": (),
    "train.mixup": (),
    "train.loss": ("auto", "cross_entropy"),
    "train.momentum": (),
    "train.weight_decay": (),
    "train.warmup_epochs": (),
}
"""What baselines train with just as the pipeline does, and with which values, where not with all. Everything else is
the benchmark's own, or means nothing to backpropagation, and is refused."""

Precision = Literal["fp32", "bf16"]

# A "+" may be part of a value, as in 1e+3: what begins a setting is followed by section.field=.
_BEGIN = re.compile(r"\+(?=[a-z_]+\.[a-z_]+=)")


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
        changes: of the configuration, by dotted field.
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
        ConfigError: there is none of that name, or it does not take such a setting.
    """
    known, plus, rest = name.partition("+")
    if known not in METHODS:
        raise ConfigError(f"--methods {name}: unknown method", f"one or more of {','.join(METHODS)}")
    base, *settings = _BEGIN.split(name)
    if base != known or not all(setting.partition("=")[2] for setting in settings):
        raise ConfigError(f"--methods {name}: got {plus}{rest} behind {known}", f"{known}+section.field=value")
    method = METHODS[known]
    if not settings:
        return method
    changes = dict(setting.split("=", 1) for setting in settings)
    if method.family != "pipeline":
        _check_baseline(changes, f"--methods {name}")
    shown = ", ".join(setting.partition(".")[2] for setting in settings)
    return replace(method, title=f"{method.title}, {shown}", changes={**method.changes, **changes})


def shared_settings(assignments: Iterable[str]) -> dict[str, str]:
    """Returns the settings that all methods are to train with, by dotted field.

    Args:
        assignments: "section.field=value".

    Raises:
        ConfigError: one is no assignment, or baselines do not take it.
    """
    changes = {}
    for assignment in assignments:
        name, _, value = (part.strip() for part in assignment.partition("="))
        _check_baseline({name: value}, f"--set {assignment}")
        changes[name] = value
    return changes


def _check_baseline(changes: Mapping[str, str], where: str) -> None:
    """Refuses what a baseline would ignore: its numbers would be taken for those of another training."""
    for name, value in changes.items():
        wanted = BASELINE_SETTINGS.get(name)
        if wanted is None:
            fix = f"one of {', '.join(BASELINE_SETTINGS)}; others only behind nf, as in nf+{name}=..."
            raise ConfigError(f"{where}: backpropagation and DGL do not take {name}", fix)
        if not value or (wanted and value not in wanted):
            fix = f"{name}={' or '.join(wanted) or 'VALUE'}"
            raise ConfigError(f"{where}: got {value!r}, which backpropagation and DGL do not train with", fix)


def in_order(names: Iterable[str]) -> list[str]:
    """Returns each name once, in the order of `METHODS`; a method with other settings follows the one without."""
    order = list(METHODS)
    return sorted(set(names), key=lambda name: (order.index(name.partition("+")[0]), name))
