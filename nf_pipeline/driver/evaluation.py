"""How good a finished run is on labelled data: every exit, or what early exits bring.

Works in this process and streams the data; the run is only read. Entries: `evaluate`, `evaluate_adaptive`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nf_pipeline.config import DataConfig
from nf_pipeline.core.exit_model import Normalise
from nf_pipeline.core.hits import Hits
from nf_pipeline.core.metrics import results_kind
from nf_pipeline.data.images import LabelledBatch, open_labelled
from nf_pipeline.driver.early_exit_wish import EarlyExitWish
from nf_pipeline.driver.run_record import load_plan, load_run
from nf_pipeline.errors import DataError
from nf_pipeline.model_files import ModelCard
from nf_pipeline.plans import Plan
from nf_pipeline.run_uri import split_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import open_store
from nf_pipeline.trust import confirm_factory
from nf_pipeline.worker.assemble import load_units
from nf_pipeline.worker.decide import exit_costs
from nf_pipeline.worker.exit_pass import measure
from nf_pipeline.worker.stage_input import read_block, read_ingest, read_model


@torch.no_grad()
def evaluate(uri: str, data: DataConfig, model: str | None = None) -> list[dict[str, Any]]:
    """Measures every exit of a finished run on a labelled set, in one pass.

    Args:
        uri: STORE/NAME.
        data: its test split if it brings one, else all its rows.
        model: see `load_model`.

    Returns:
        One entry per exit: exit (its position in the summary's exits), layer_idx, layer, accuracy in [0, 1] or, where
        values are predicted, error (the part of the train split's variance that is left), interval around it at the
        run's confidence, num_images, chosen.

    Raises:
        ObjectMissing: the run is not finished.
        DataError: the data set cannot be used with this model.
    """
    store_uri, run = split_run_uri(uri)
    store, layout = open_store(store_uri), RunLayout(run)
    result = read_model(store, layout).facts
    plan, config, ingest = load_plan(store, layout), load_run(uri, model=model), read_ingest(store, layout).facts
    confirm_factory(plan.model, model)
    num_units = len(result["exits"])  # a run that stopped early has fewer than its plan
    blocks = [read_block(store, layout, block.block_idx) for block in plan.blocks if block.units[0] < num_units]
    units = [unit.eval() for unit in load_units(store, config, plan, blocks, num_units)]
    normalise = Normalise(plan.inputs)
    measured: list[list[np.ndarray]] = [[] for _ in units]
    for batch in _labelled(data, plan, tuple(ingest["class_names"])):
        x = normalise(torch.from_numpy(batch.images))
        for found, unit in zip(measured, units, strict=True):
            x, outputs_NK = unit(x)
            found.append(measure(outputs_NK, batch.labels, plan.target))
    kind = results_kind(plan.target)
    results = [kind.of(np.concatenate(found)) for found in measured]
    return [
        {
            "exit": position,
            "layer_idx": exit["layer_idx"],
            "layer": exit["layer"],
            kind.metric: one.mean,
            "interval": list(one.interval(config.exits.confidence)),
            "num_images": one.num_samples,
            "chosen": position == result["chosen_exit"],
        }
        for position, (exit, one) in enumerate(zip(result["exits"], results, strict=True))
    ]


def evaluate_adaptive(uri: str, data: DataConfig, wish: EarlyExitWish, model: str | None = None) -> dict[str, Any]:
    """Measures a run's model with early exits on a labelled set: how often it is right, and what that costs.

    Args:
        uri, data, model: see `evaluate`.
        wish: the operating point.

    Returns:
        accuracy in [0, 1], interval around it at the run's confidence, num_images, threshold, val_accuracy and
        val_flops of the operating point on the validation split, flops (the mean of one sample's forward pass here),
        flops_final (of the final model, where nobody leaves early), and exits: layer, and share of the samples in
        [0, 1] that left there, of every exit.

    Raises:
        ConfigError: no operating point is as wished.
        ObjectMissing: the run is not finished, or has kept no exits before the final one.
        DataError: the data set cannot be used with this model.
    """
    loaded = wish.load(uri, model)
    store_uri, run = split_run_uri(uri)
    plan, config = load_plan(open_store(store_uri), RunLayout(run)), load_run(uri, model=model)
    right, left = [], []
    for batch in _labelled(data, loaded.card, loaded.card.class_names):
        exited = loaded(torch.from_numpy(batch.images))
        right.append(measure(exited.logits_NK, batch.labels, loaded.card.target))
        left.append(exited.exit_N.numpy())
    results, exit_N = Hits.of(np.concatenate(right)), np.concatenate(left)
    costs = exit_costs(plan, loaded.num_exits)
    shares = np.bincount(exit_N, minlength=loaded.num_exits) / len(exit_N)
    return {
        "accuracy": results.mean,
        "interval": list(results.interval(config.exits.confidence)),
        "num_images": results.num_samples,
        "threshold": loaded.point.threshold,
        "val_accuracy": loaded.point.val_accuracy,
        "val_flops": loaded.point.val_flops,
        "flops": float(costs.of_leaving(loaded.point.exits)[exit_N].mean()),
        "flops_final": costs.layers[-1] + costs.heads[-1],
        "exits": [
            {"layer": layer, "share": share} for layer, share in zip(loaded.exit_layers, shares.tolist(), strict=True)
        ],
    }


def _labelled(data: DataConfig, model: Plan | ModelCard, class_names: tuple[str, ...]) -> Iterator[LabelledBatch]:
    """Yields what a model is measured on.

    Raises:
        DataError: there is nothing.
    """
    batches, is_empty = open_labelled(data, model.inputs, model.target, class_names), True
    for batch in batches:
        is_empty = False
        yield batch
    if is_empty:
        raise DataError(f"{data.source}: no samples to evaluate", "give a labelled data set with some")
