"""The model card, README.md beside the final model: what it is, how good, within which limits."""

from typing import Any

from nf_pipeline.model_files import ModelCard
from nf_pipeline.units import format_bytes


def render_model_card(card: ModelCard, result: dict[str, Any], ingest_facts: dict[str, Any]) -> str:
    """Writes the card as Markdown from the model's description and the run's facts."""
    chosen = result["exits"][result["chosen_exit"]]
    low, high = chosen["val_interval"]
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
| corrected for the choice | {_corrected(result)} |
| test accuracy | {_test(result)} |
| calibration error | {_calibration(result["calibration"])} |
| parameters | {card.params:,} of the full network's {card.params_full:,} |
| why this exit | {result["chosen_reason"]} |

Load it with `nf_pipeline.load_model("STORE/NAME")`. Divide its logits by {card.temperature:.4g} before the softmax to
get probabilities that say how often it is right; `nf-pipeline predict` does.{_early_exits(result["early_exits"])}

The exit and the temperature were chosen on the validation split, which makes the figures on it slightly optimistic.
{_reads(result["test_reads"])} Accuracy holds for images like those of the data set, prepared in the same way.
"""


def _corrected(result: dict[str, Any]) -> str:
    low, high = result["val_interval_corrected"]
    return (
        f"{100 * result['val_accuracy_corrected']:.2f} % (interval {100 * low:.2f} to {100 * high:.2f} %, whichever "
        f"of the {len(result['exits'])} exits is chosen)"
    )


def _test(result: dict[str, Any]) -> str:
    if result["test_accuracy"] is None:
        return "no test split"
    low, high = result["test_interval"]
    return f"{100 * result['test_accuracy']:.2f} % (interval {100 * low:.2f} to {100 * high:.2f} %)"


def _calibration(found: dict[str, Any]) -> str:
    splits = [("validation", found["ece_before"], found["ece_after"])]
    if found["test_ece_before"] is not None:
        splits.append(("test", found["test_ece_before"], found["test_ece_after"]))
    errors = ", ".join(f"{100 * before:.2f} % to {100 * after:.2f} % on {name}" for name, before, after in splits)
    nats = f"{found['cross_entropy_before']:.4f} to {found['cross_entropy_after']:.4f}"
    return f"{errors} by temperature {found['temperature']:.4g}; cross-entropy {nats} on validation"


def _reads(number: int) -> str:
    if number == 0:
        return "There was no test split."
    if number == 1:
        return "The test split was read once, after the choice."
    return f"The test split was read {number} times, once after each choice: its accuracy is a little optimistic too."


def _early_exits(found: dict[str, Any] | None) -> str:
    """Tells what the exits before the final one are good for; empty if none are kept."""
    if found is None:
        return ""
    point = found["points"][found["default_point"]]
    share = point["val_flops"] / found["flops"]
    return (
        f"\n\nWith `nf_pipeline.load_early_exit_model` samples leave at the first of {len(found['exits'])} exits "
        f"that is sure enough:\n{100 * share:.0f} % of the FLOPs for {100 * point['val_accuracy']:.2f} % on "
        f"validation; summary.json has {len(found['points'])} operating points."
    )
