"""What stands above the tables: on what they were measured, and what exactly the numbers hold. Entry: `explain`."""

from typing import Any

from nf_pipeline.bench.settings import short_name

_SECONDS = (
    "Seconds hold training and a validation after every epoch; the pipeline's hold profiling, planning, caching "
    "and loading too. Starting the process, reading the data set, finding the batch of a baseline, the search for "
    "a learning rate and the test are in nobody's. The pipeline's accuracy at a time is that of its best exit so "
    "far; the exit that it keeps may be up to `exits.tolerance` (0.5 points) below, and the best of several exits "
    "is a little lucky."
)
_BYTES = (
    "Bytes read are those of the shards that the batches come from, each time that they are gone through, mapped or "
    "not. Bytes written are the process's own, through system calls, measuring the store included. Where other "
    "processes train (pipelined), neither is known to the one that measures: a dash."
)
_SHARED = (
    "The pipeline has a search of its own at every budget, with one plan for its tries. Baselines whose optimiser "
    "takes the same steps share one: backpropagation as it is, with checkpointing, in micro-batches and in bf16, "
    "where the batch of a step lies between the same powers of two (a rate is given for batch 128 and follows the "
    "batch linearly)."
)


def explain(document: dict[str, Any]) -> list[str]:
    """Returns title and paragraphs.

    Args:
        document: see `nf_pipeline.bench.results.make_document`.
    """
    machine, settings = document["machine"], document["settings"]
    return [
        f"# Benchmark: {machine['device']}",
        f"{document['date']}, {machine['cpu']}, {settings['num_threads']} of {machine['cores']} cores, "
        f"python {machine['python']}, torch {machine['torch']}, nf_pipeline {machine['nf_pipeline']}.",
        f"Data {short_name(settings['data'])}, {settings['max_train_images'] or 'all'} training images, "
        f"augmentation {settings['augment']}, {settings['epochs']} epochs (the pipeline: per block), batches of "
        f"{settings['max_batch']} at most, {settings['num_seeds']} seeds, interleaved; medians, smallest and largest "
        "in brackets.",
        *_shared_note(settings),
        _SECONDS,
        _search_note(settings),
        _limit_note(settings),
        _BYTES,
    ]


def _shared_note(settings: dict[str, Any]) -> list[str]:
    shared = settings["assignments"]
    return [f"All methods train with {', '.join(shared)}."] if shared else []


def _search_note(settings: dict[str, Any]) -> str:
    if not settings["search_seconds"]:
        return "No learning rate was searched: all methods train at the default."
    return (
        f"Learning rates: up to {settings['search_tries']} tries per search, with the first seed, on the validation "
        f"split. A try is a whole schedule of as many epochs as take about {settings['search_seconds']:g} s with "
        f"that method and batch, at least one, at most {settings['epochs']}. {_SHARED}"
    )


def _limit_note(settings: dict[str, Any]) -> str:
    if settings["give_up"] is None:
        return "Every method trains its whole schedule."
    return (
        f"A baseline is given up before the epoch with which it would pass {settings['give_up']:g} times the seconds "
        "of backpropagation's whole schedule at this budget (or the smallest larger one where that runs), if it has "
        'not reached the accuracy by then: "not in N s", its curve so far, no test. Backpropagation and the pipeline '
        "are never given up."
    )
