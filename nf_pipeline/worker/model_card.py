"""The model card, README.md beside the final model: what it is, how good, within which limits."""

from typing import Any

from nf_pipeline.model_files import ModelCard
from nf_pipeline.units import format_bytes


def render_model_card(card: ModelCard, result: dict[str, Any], ingest_facts: dict[str, Any]) -> str:
    """Writes the card as Markdown from the model's description and the run's facts."""
    chosen = result["exits"][result["chosen_exit"]]
    low, high = chosen["val_interval"]
    test = "no test split" if card.test_accuracy is None else f"{100 * card.test_accuracy:.2f} %"
    channels, height, width = card.image_shape
    rows = ", ".join(f"{split} {count:,}" for split, count in ingest_facts["split_rows"].items())
    return f"""# {card.model}, cut at exit {result["chosen_exit"]} (layer {card.exit_layer})

An image classifier with {card.num_classes} classes, trained block by block under a memory budget of
{format_bytes(card.memory_budget_bytes)} with nf_pipeline.

| | |
|---|---|
| data | {ingest_facts["dataset"]}: {rows} images |
| input | {channels} x {height} x {width} pixels, 0 to 255 |
| validation accuracy | {100 * card.val_accuracy:.2f} % (interval {100 * low:.2f} to {100 * high:.2f} %) |
| test accuracy | {test} |
| parameters | {card.params:,} of the full network's {card.params_full:,} |
| why this exit | {result["chosen_reason"]} |

Load it with `nf_pipeline.load_model("STORE/NAME")`.

The exit was chosen on the validation split, which makes its validation accuracy slightly optimistic; the test
split was read once, after the choice. Accuracy holds for images like those of the data set, prepared in the same way.
"""
