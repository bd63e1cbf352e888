"""Tables as aligned text: they look the same on a terminal, in a log and pasted into an issue.

Takes plain documents (a plan, summary.json, a status) and returns text; decides nothing and prints nothing.
A column "exit" is the position in summary.json's exits, counted from 0; the layer's name stands beside it.
Entry: `plan_text`, `summary_text`, `status_text`, `evaluation_text`, `adaptive_text`, `prediction_text`,
`checks_text`, `garbage_text`, `verify_text`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nf_pipeline.cli.metric_text import metric_text, percent
from nf_pipeline.cli.run_view import format_duration, format_peak
from nf_pipeline.driver.garbage import Garbage, by_kind
from nf_pipeline.plans import BlockPlan, Plan
from nf_pipeline.samples import TargetSpec
from nf_pipeline.units import format_bytes

STALE_AFTER_S = 600.0
SHOWN_CANDIDATES = 8


def align(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a table: columns two spaces apart, a rule under the headers, numbers to the right.

    A column is a column of numbers when every filled cell below its header starts with a digit.
    """
    widths = [max(len(row[idx]) for row in [headers, *rows]) for idx in range(len(headers))]
    numeric = [all(row[idx][:1].isdigit() for row in rows if row[idx]) for idx in range(len(headers))]

    def layout(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([layout(headers), rule, *map(layout, rows)])


def plan_text(plan: Plan, placement: Mapping[str, Any]) -> str:
    """Describes a plan: the model, every block with its batch and predicted peak, and where it would run.

    Args:
        plan: what would happen.
        placement: as `nf_pipeline.driver.preview.Preview` describes it.
    """
    shape = "x".join(map(str, plan.inputs.shape))
    head = (
        f"{plan.model}: {len(plan.layers)} layers, {len(plan.units)} units, "
        f"{_count(plan.params_full)} parameters, samples {shape}, {_predicted(plan.target)}, "
        f"budget {format_bytes(plan.budget_bytes)}"
    )
    rows = [_plan_row(plan, block) for block in plan.blocks]
    titles = ["block", "layers", "input", "output", "batch", "predicted peak / budget", "shards"]
    if None not in placement["workers_that_fit"]:
        titles += ["asks for", "workers that fit"]
        asked = zip(rows, placement["block_memory_bytes"], placement["workers_that_fit"], strict=True)
        rows = [[*row, format_bytes(needed), str(fitting)] for row, needed, fitting in asked]
    table = align(titles, rows)
    shards = sum(block.shard_bytes for block in plan.blocks)
    foot = (
        f"placement: {_how(placement)} {_where(placement)}, device {placement['device']}; "
        f"activations {format_bytes(shards)} in all; profiled in {plan.profile_s:.1f} s"
    )
    buffers = (
        f"host memory of a worker: up to {format_bytes(placement['host_buffer_bytes'])} to read and write shards "
        "(--set storage.shard_bytes=SIZE), on top of what training and its libraries take"
    )
    reasons = [f"block {block.block_idx + 1}: {block.reason}" for block in plan.blocks]
    return "\n".join([head, "", table, "", *reasons, *_candidates(plan), "", foot, buffers])


def _predicted(target: TargetSpec) -> str:
    one, several = ("class", "classes") if target.kind == "class" else ("value", "values")
    return f"{target.size} {one if target.size == 1 else several}"


def _candidates(plan: Plan) -> list[str]:
    """Lists the plans that were compared, fastest first."""
    if not plan.candidates:
        return []
    rows = [
        [
            candidate.name,
            str(candidate.num_units),
            ", ".join(map(str, candidate.batch_sizes)),
            format_bytes(candidate.predicted_peak_bytes),
            f"{candidate.predicted_s:.0f} s",
            candidate.verdict,
        ]
        for candidate in plan.candidates[:SHOWN_CANDIDATES]
    ]
    table = align(["plan", "heads", "batch by block", "predicted peak", "predicted time", ""], rows)
    rule = "the fastest whose batches train well is taken, of equal ones that with the fewest heads; without storage"
    return ["", f"The fastest of {len(plan.candidates)} plans that fit; {rule}:", table]


def summary_text(summary: Mapping[str, Any], run_uri: str) -> str:
    """Describes a finished run: what each block took, and every exit with the one that was chosen and why.

    Args:
        summary: the document of summary.json.
        run_uri: STORE/NAME, for the commands that come next.
    """
    budget, metric = summary["memory_budget_bytes"], metric_text(summary)
    blocks = align(
        ["block", "layers", "batch", "measured peak / budget", "predicted", "train", "shards", "attempts"],
        [_block_row(block, budget) for block in summary["blocks"]],
    )
    exits = align(
        ["", "exit", "layer", f"val {metric.name}", "interval", "parameters", "of full model", "GFLOPs"],
        [_exit_row(exit_idx, summary) for exit_idx in range(len(summary["exits"]))],
    )
    chosen = summary["chosen_exit"]
    layer = summary["exits"][chosen]["layer"]
    lines = [blocks, "", exits, "", f"chosen: exit {chosen} ({layer}), {summary['chosen_reason']}"]
    lines.append(_measured_line(summary))
    lines.append(_honesty_line(summary))
    lines.append(f"next: nf-pipeline predict {run_uri} INPUT --output predictions.parquet")
    return "\n".join(lines)


def status_text(status: Mapping[str, Any]) -> str:
    """Describes how far a run is; says how to continue one that fell silent or failed."""
    val = "val error" if any(stage["val_error"] is not None for stage in status["stages"]) else "val"
    table = align(
        ["stage", "state", "epoch", "loss", val, "last sign", "attempts", "attempt", "worker"],
        [_status_row(stage) for stage in status["stages"]],
    )
    lines = [f"{status['uri']}: {status['state']}", "", table]
    for stage in status["stages"]:
        if stage["error"] and stage["state"] == "failed":
            lines += ["", f"{stage['stage']} failed: {stage['error']}"]
    silent = [s for s in status["stages"] if s["state"] == "running" and (s["updated_s"] or 0) > STALE_AFTER_S]
    if silent:
        lines += ["", f"{silent[0]['stage']} has been silent for {format_duration(silent[0]['updated_s'])}."]
    if silent or status["state"] in ("failed", "waiting"):
        lines.append(f"If nobody works on it: nf-pipeline resume {status['uri']}")
    return "\n".join(lines)


def evaluation_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lists the accuracy or error of every exit; the chosen one is marked."""
    metric = metric_text(rows[0])
    cells = [
        [
            "*" if row["chosen"] else "",
            str(row["exit"]),
            row["layer"],
            metric.show(row[metric.name]),
            metric.show_interval(row["interval"]),
            f"{row['num_images']:,}",
        ]
        for row in rows
    ]
    return align(["", "exit", "layer", metric.name, "interval", "samples"], cells)


def adaptive_text(found: Mapping[str, Any]) -> str:
    """Says how good a model with early exits is, what it costs, and where samples left."""
    metric = metric_text(found)
    accuracy = f"accuracy {metric.show(found['accuracy'])} ({metric.show_interval(found['interval'])})"
    share = found["flops"] / found["flops_final"]
    lines = [
        f"{accuracy} on {found['num_images']:,} samples",
        f"{found['flops'] / 1e9:.3f} GFLOPs per sample, {percent(share)} of those without early exits",
        f"threshold {found['threshold']:.3f}; on validation it had {metric.show(found['val_accuracy'])} with "
        f"{found['val_flops'] / 1e9:.3f} GFLOPs",
        "left: " + ", ".join(f"{percent(exit['share'])} at {exit['layer']}" for exit in found["exits"]),
    ]
    return "\n".join(lines)


def prediction_text(written: Mapping[str, Any]) -> str:
    """Says how many samples were predicted and where, and how many were left out, if any."""
    text = f"{written['rows']:,} predictions in {written['output']}"
    skipped = written["num_skipped"]
    if skipped:
        text = f"{text}, {skipped:,} samples skipped that cannot be read"
    left = ", ".join(f"{rows:,} at {layer}" for layer, rows in written.get("rows_by_exit", {}).items())
    return f"{text}\nleft: {left}" if left else text


def checks_text(checks: Sequence[Any]) -> str:
    """Lists what `doctor` found, each fix below its check."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<4}  {check.name:<{width}}  {check.detail}")
        if check.fix:
            lines.append(f"{'':<6}{'':<{width}}  Fix: {check.fix}")
    return "\n".join(lines)


def garbage_text(garbage: Sequence[Garbage], *, dry_run: bool) -> str:
    """Lists what `gc` deleted, or would delete, and its bytes, altogether and by kind."""
    total = format_bytes(sum(item.num_bytes for item in garbage))
    lines = [f"{format_bytes(item.num_bytes):>10}  {item.key}" for item in garbage]
    kinds = [f"{count} {kind} ({format_bytes(size)})" for kind, count, size in by_kind(garbage)]
    verb = "would delete" if dry_run else "deleted"
    line = f"{verb} {len(garbage)} objects, {total}"
    return "\n".join([*lines, f"{line}: {', '.join(kinds)}" if kinds else line])


def verify_text(report: Mapping[str, Any]) -> str:
    """Lists the stages of a run that was verified, then every damaged object, then what to do.

    Args:
        report: fields of `nf_pipeline.driver.verify.VerifyReport`.
    """
    rows = [
        [stage["stage"], stage["state"], f"{stage['num_objects']:,}", format_bytes(stage["num_bytes"])]
        for stage in report["stages"]
    ]
    lines = [align(["stage", "state", "objects", "bytes"], rows), ""]
    lines += [f"{problem['stage']}: {problem['what']}" for problem in report["problems"]]
    num_unreadable = sum(problem["is_unreadable"] for problem in report["problems"])
    num_damaged = len(report["problems"]) - num_unreadable
    if num_unreadable:
        lines += [
            "",
            f"{num_unreadable} cannot be read and may be whole: see to the store, then verify again",
        ]
    if num_damaged:
        lines += ["", f"{num_damaged} damaged; to repair: nf-pipeline resume {report['uri']} --repair"]
    if not report["problems"]:
        lines.append("whole: every byte is as it was written")
    if report["problems"] and report["holder"]:
        lines.append(f"{report['holder']} works on the run: verify again when it has ended")
    if report["num_leftovers"]:
        size = format_bytes(report["leftover_bytes"])
        lines.append(f"{report['num_leftovers']} objects, {size}, are not needed: nf-pipeline gc {report['uri']}")
    return "\n".join(lines)


def _how(placement: Mapping[str, Any]) -> str:
    blocks = "one block after another" if placement["mode"] == "sequential" else "all blocks side by side, in rounds,"
    num_workers = placement["workers_per_block"]
    return blocks if num_workers == 1 else f"{blocks} with {num_workers} workers each"


def _where(placement: Mapping[str, Any]) -> str:
    if placement["executor"] == "inline":
        return "in this process"
    return f"on the Ray at {placement['address']}" if placement["address"] else "on a local Ray"


def _plan_row(plan: Plan, block: BlockPlan) -> list[str]:
    return [
        f"{block.block_idx + 1}/{len(plan.blocks)}",
        f"{block.layers[0]}-{block.layers[1] - 1}",
        _source(block),
        "x".join(map(str, plan.layers[block.layers[1] - 1].out_shape)),
        str(block.batch_size),
        format_peak(block.predicted_peak_bytes, block.budget_bytes),
        format_bytes(block.shard_bytes) if block.shard_bytes else "",
    ]


def _source(block: BlockPlan) -> str:
    """Names what a block reads, and the blocks whose layers run again on it."""
    source = "images" if block.source_block < 0 else f"block {block.source_block + 1}"
    if not block.recomputed:
        return source
    first, last = block.recomputed[0] + 1, block.recomputed[-1] + 1
    return f"{source}, {first} again" if first == last else f"{source}, {first}-{last} again"


def _block_row(block: Mapping[str, Any], budget_bytes: int) -> list[str]:
    layers = block["layers"]
    return [
        str(block["block_idx"] + 1),
        f"{layers[0]}-{layers[1] - 1}",
        str(block["batch_size"]),
        format_peak(block["measured_peak_bytes"], block.get("budget_bytes", budget_bytes)),
        format_bytes(block["predicted_peak_bytes"]),
        format_duration(block["train_s"]),
        format_bytes(block["shard_bytes"]) if block["shard_bytes"] else "",
        str(block["attempts"]),
    ]


def _exit_row(exit_idx: int, summary: Mapping[str, Any]) -> list[str]:
    row, metric = summary["exits"][exit_idx], metric_text(summary)
    return [
        "*" if exit_idx == summary["chosen_exit"] else "",
        str(exit_idx),
        row["layer"],
        metric.show(row[f"val_{metric.name}"]),
        metric.show_interval(row[f"val_{metric.interval}"]),
        _count(row["params"]),
        percent(row["params"] / summary["params_full"]),
        f"{row['flops'] / 1e9:.3f}",
    ]


def _split_name(summary: Mapping[str, Any]) -> str:
    """Names the validation split, and what was measured on it where that is not the accuracy."""
    name = metric_text(summary).name
    return "validation" if name == "accuracy" else f"{name} on validation"


def _measured_line(summary: Mapping[str, Any]) -> str:
    smaller, metric = summary["params_full"] / summary["params_final"], metric_text(summary)
    validation, test = (metric.show(summary[f"{split}_{metric.name}"]) for split in ("val", "test"))
    line = (
        f"{_split_name(summary)} {validation}, test {test}, "
        f"{_count(summary['params_final'])} of {_count(summary['params_full'])} parameters "
        f"({smaller:.1f}x smaller), {format_duration(summary['wall_s'])} in all"
    )
    return line + (", stopped early" if summary["stopped_early"] else "")


def _honesty_line(summary: Mapping[str, Any]) -> str:
    """Says what the choice may have made look better than it is, and how far probabilities can be trusted."""
    metric, found, reads = metric_text(summary), summary["calibration"], summary["test_reads"]
    corrected = metric.show(summary[f"val_{metric.name}_corrected"])
    interval = metric.show_interval(summary[f"val_{metric.interval}_corrected"])
    line = f"corrected for the choice: {_split_name(summary)} {corrected} ({interval})"
    if found is not None:
        line += (
            f"; calibration error {percent(found['ece_before'])} before and {percent(found['ece_after'])} after "
            f"temperature {found['temperature']:.3g}"
        )
    return line if reads < 2 else f"{line}; the test split was read {reads} times"


def _status_row(stage: Mapping[str, Any]) -> list[str]:
    epoch = f"{stage['epoch']}/{stage['num_epochs']}" if stage["num_epochs"] else ""
    return [
        stage["stage"],
        stage["state"],
        epoch,
        "" if stage["loss"] is None else f"{stage['loss']:.3f}",
        _status_val(stage),
        "" if stage["updated_s"] is None else f"{format_duration(stage['updated_s'])} ago",
        str(stage["attempts"]) if stage["attempts"] else "",
        stage["attempt"] or "",
        stage["worker"] or "",
    ]


def _status_val(stage: Mapping[str, Any]) -> str:
    for metric in (metric_text({"metric": name}) for name in ("accuracy", "error")):
        if stage[f"val_{metric.name}"] is not None:
            return metric.show(stage[f"val_{metric.name}"])
    return ""


def _count(number: int) -> str:
    if number < 10_000:
        return f"{number:,}"
    return f"{number / 1e6:.2f} M" if number >= 1_000_000 else f"{number / 1e3:.1f} k"
