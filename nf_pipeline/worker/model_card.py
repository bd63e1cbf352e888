"""The model card, README.md beside the final model: what it is, how good, within which limits."""

from typing import Any

from nf_pipeline.core.metrics import results_kind
from nf_pipeline.model_files import ModelCard
from nf_pipeline.units import format_bytes
from nf_pipeline.worker.model_result import INTERVAL_NAMES


def render_model_card(card: ModelCard, result: dict[str, Any], ingest_facts: dict[str, Any]) -> str:
    """Writes the card as Markdown from the model's description and the run's facts."""
    rows = ", ".join(f"{split} {count:,}" for split, count in ingest_facts["split_rows"].items())
    measured = _Measured(card, result)
    return f"""# {card.model}, cut at exit {result["chosen_exit"]} (layer {card.exit_layer})

A model that predicts {card.target.size} {_outputs(card)}, trained block by block under a memory budget of
{format_bytes(card.memory_budget_bytes)} with nf_pipeline.

| | |
|---|---|
| data | {ingest_facts["dataset"]}: {rows} samples |
| input | {" x ".join(map(str, card.inputs.shape))} of {card.inputs.dtype} |
| validation {result["metric"]} | {measured.validation()} |
| corrected for the choice | {measured.corrected()} |
| test {result["metric"]} | {measured.test()} |{_calibration(result["calibration"])}
| parameters | {card.params:,} of the full network's {card.params_full:,} |
| why this exit | {result["chosen_reason"]} |

Load it with `nf_pipeline.load_model("STORE/NAME")`. {_use(card)}{_early_exits(result["early_exits"])}

What was chosen was chosen on the validation split, which makes the figures on it slightly optimistic.
{_reads(result["test_reads"])} They hold for samples like those of the data set, prepared in the same way.
"""


class _Measured:
    """Writes means with their intervals, by the metric of the run."""

    def __init__(self, card: ModelCard, result: dict[str, Any]) -> None:
        self._result = result
        self._kind = results_kind(card.target)
        self._interval = INTERVAL_NAMES[self._kind.metric]

    def validation(self) -> str:
        result = self._result
        interval = result["exits"][result["chosen_exit"]][f"val_{self._interval}"]
        return self._with_interval(result[f"val_{self._kind.metric}"], interval)

    def corrected(self) -> str:
        result = self._result
        interval = result[f"val_{self._interval}_corrected"]
        remark = f", whichever of the {len(result['exits'])} exits is chosen"
        return self._with_interval(result[f"val_{self._kind.metric}_corrected"], interval, remark)

    def test(self) -> str:
        mean = self._result[f"test_{self._kind.metric}"]
        return "no test split" if mean is None else self._with_interval(mean, self._result[f"test_{self._interval}"])

    def _with_interval(self, mean: float, interval: list[float], remark: str = "") -> str:
        low, high = (self._kind.show(end, 2) for end in interval)
        return f"{self._kind.show(mean, 2)} (interval {low} to {high}{remark})"


def _outputs(card: ModelCard) -> str:
    if card.target.kind == "class":
        return "classes"
    return "value" if card.target.size == 1 else "values"


def _use(card: ModelCard) -> str:
    if card.temperature is None:
        return (
            "It returns values in their own units; errors are\nparts of their variance over the train split: "
            "1 for who always predicts its mean."
        )
    return (
        f"Divide its logits by {card.temperature:.4g} before the softmax to\nget probabilities that say how often it "
        "is right; `nf-pipeline predict` does."
    )


def _calibration(found: dict[str, Any] | None) -> str:
    """Returns the table's line on probabilities; empty where there are none."""
    if found is None:
        return ""
    splits = [("validation", found["ece_before"], found["ece_after"])]
    if found["test_ece_before"] is not None:
        splits.append(("test", found["test_ece_before"], found["test_ece_after"]))
    errors = ", ".join(f"{100 * before:.2f} % to {100 * after:.2f} % on {name}" for name, before, after in splits)
    nats = f"{found['cross_entropy_before']:.4f} to {found['cross_entropy_after']:.4f}"
    text = f"{errors} by temperature {found['temperature']:.4g}; cross-entropy {nats} on validation"
    return f"\n| calibration error | {text} |"


def _reads(number: int) -> str:
    if number == 0:
        return "There was no test split."
    if number == 1:
        return "The test split was read once, after the choice."
    return (
        f"The test split was read {number} times, once after each choice: figures on it are slightly optimistic too."
    )


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
