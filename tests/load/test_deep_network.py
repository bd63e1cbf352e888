"""Networks of two hundred layers are cut, planned and trained like small ones."""

from pathlib import Path

import pytest
from load_config import make_config

from nf_pipeline import train


@pytest.mark.parametrize(
    ("factory", "num_layers", "unit_layers"),
    [
        ("residual", 101, 25),
        pytest.param("residual", 101, 1, marks=pytest.mark.slow),
        ("chain", 200, 25),
        pytest.param("chain", 200, 2, marks=pytest.mark.slow),
    ],
)
def test_deep_network_trains_in_blocks_with_an_exit_after_every_unit(
    tmp_path: Path, factory: str, num_layers: int, unit_layers: int
) -> None:
    config = make_config(
        tmp_path,
        model__name=f"deep_networks:{factory}",
        memory__budget_bytes="1MiB",
        train__unit_layers=unit_layers,
        data__max_train_images=100,
        memory__max_batch_size=16,
    )
    summary = train(config)
    num_units = -(-num_layers // unit_layers)
    assert [summary["exits"][0]["layer_idx"], summary["exits"][-1]["layer_idx"]] == [unit_layers - 1, num_layers - 1]
    assert len(summary["exits"]) == num_units
    layers = [tuple(block["layers"]) for block in summary["blocks"]]
    assert [start for start, _ in layers[1:]] == [stop for _, stop in layers[:-1]]
    assert (layers[0][0], layers[-1][1]) == (0, num_layers)
    assert all(block["measured_peak_bytes"] <= 2**20 for block in summary["blocks"])
