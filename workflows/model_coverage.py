"""Lists which networks of torchvision and timm this program can cut, plan and train, or why it cannot.

    python workflows/model_coverage.py --plan --train
    python workflows/model_coverage.py --models 'torchvision:resnet*' timm:dla34 --image-size 224

Each network runs in a process of its own, which ends when it takes too long. By default that is every classifier of
torchvision and, where timm is installed, the smallest network of each of its families (a family is a module of timm),
transformers included. A network is tried with the smallest images that it takes. `--plan` looks for the smallest
budget that has a plan, `--train` also trains every block of that plan for two steps and compares the bytes. Results
go beside those of the benchmarks, as JSON and as a table, where those of networks that are not tried again stay.
"""

import argparse
import fnmatch
import importlib.metadata
import importlib.util
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torchvision
from torch import nn

from nf_pipeline.config import RunConfig, resolve_config
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.local_unit import build_units
from nf_pipeline.core.memory import measure_peak
from nf_pipeline.core.models import build_model
from nf_pipeline.core.planner import make_plan
from nf_pipeline.core.profiler import count_params
from nf_pipeline.core.train_step import make_optimizer, train_step
from nf_pipeline.errors import ConfigError, NFError, PlanError
from nf_pipeline.plans import BlockPlan, Plan
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.trust import MODEL_LIBRARIES
from nf_pipeline.units import format_bytes

OUTPUT = Path(__file__).parent / "benchmarks" / "results" / "model-coverage.json"
SMALLEST = 32
NUM_CLASSES = 10
SEED = 0
# Enough rows that they bound no batch.
SPLIT_ROWS = {"train": 4096, "val": 512}


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of the plan for the smallest budget.

    Attributes:
        layers: first, and one behind the last.
        batch_size: samples.
        predicted_peak_bytes: by the plan.
        measured_peak_bytes: of two steps; None where they were not run.
    """

    layers: tuple[int, int]
    batch_size: int
    predicted_peak_bytes: int
    measured_peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What became of one network.

    Attributes:
        model: as for `--model`.
        family: the library's module that defines it.
        status: refused, cut, planned or trained: how far it came.
        reason: why no further; "" where nothing failed.
        image_size: height and width in pixels: what was asked for, or `SMALLEST`, or what the network takes.
        num_layers, params: of the cut model.
        largest_layer: part of the weights that its largest layer has.
        largest_difference: between the logits of the cut and the uncut model, in evaluation.
        smallest_budget_bytes: with which a plan exists.
        blocks: of that plan.
        seconds: that all of it took.
    """

    model: str
    family: str
    status: str = "refused"
    reason: str = ""
    image_size: int | None = None
    num_layers: int | None = None
    params: int | None = None
    largest_layer: float | None = None
    largest_difference: float | None = None
    smallest_budget_bytes: int | None = None
    blocks: tuple[Block, ...] = ()
    seconds: float = 0.0


def main() -> None:
    """Tries every network and writes what became of it."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    results = read(arguments.output)
    for name, family in select(arguments.models):
        started = time.perf_counter()
        result = run_apart(Coverage(model=name, family=family), arguments)
        results[name] = replace(result, seconds=round(time.perf_counter() - started, 1))
        print(f"{results[name].seconds:6.1f} s  {name}: {result.status} {result.reason}", file=sys.stderr, flush=True)
        write(arguments.output, in_order(results))
    print(summarise(in_order(results)))


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[], help="names or patterns such as 'torchvision:vgg*'")
    parser.add_argument("--image-size", type=int, help=f"pixels; default: {SMALLEST}, or what the network asks for")
    parser.add_argument("--plan", action="store_true", help="find the smallest budget that has a plan")
    parser.add_argument("--train", action="store_true", help="also train its blocks for two steps")
    parser.add_argument("--max-params", type=float, default=6e7, help="plan no larger networks [%(default)g]")
    parser.add_argument("--time-limit", type=float, default=180.0, help="seconds per network [%(default)g]")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON; the table goes beside it")
    return parser.parse_args()


def select(patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields names and families: all that match a pattern, or the default choice."""
    known = dict(all_torchvision())
    if importlib.util.find_spec("timm") is not None:
        known |= dict(all_timm() if patterns else smallest_of_timm())
    for name, family in known.items():
        if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            yield name, family


def all_torchvision() -> Iterator[tuple[str, str]]:
    """Yields the classifiers of torchvision, family by family."""
    names = torchvision.models.list_models(module=torchvision.models)
    families = {name: torchvision.models.get_model_builder(name).__module__.rpartition(".")[2] for name in names}
    yield from ((f"torchvision:{name}", families[name]) for name in sorted(names, key=lambda n: (families[n], n)))


def all_timm() -> Iterator[tuple[str, str]]:
    """Yields all models of timm, family by family."""
    import timm

    for family in timm.list_modules():
        yield from ((f"timm:{name}", family) for name in timm.list_models(module=family))


def smallest_of_timm() -> Iterator[tuple[str, str]]:
    """Yields the model with the fewest weights of each family."""
    import timm

    for family in timm.list_modules():
        names = timm.list_models(module=family, exclude_filters="test_*")
        if names:
            yield f"timm:{min(names, key=count_on_meta)}", family


def count_on_meta(name: str) -> float:
    """Counts a timm model's weights without making them; those that cannot be made so come last."""
    import timm

    try:
        with torch.device("meta"):
            return count_params(timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES))
    except (RuntimeError, TypeError, AssertionError, ValueError):
        return float("inf")


def run_apart(coverage: Coverage, arguments: argparse.Namespace) -> Coverage:
    """Tries a network in a process of its own; one that takes too long or dies is refused with that reason."""
    context = multiprocessing.get_context("fork")  # torch is loaded already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_stages, args=(sender, coverage, arguments), daemon=True)
    process.start()
    sender.close()
    deadline, problem = time.monotonic() + arguments.time_limit, "its process died"
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            coverage = receiver.recv()
        problem = f"took more than {arguments.time_limit:g} s"
    except EOFError:  # the process has ended, and sent everything before
        process.join()
        if process.exitcode == 0:
            return coverage
    process.kill()
    process.join()
    return replace(coverage, reason=coverage.reason or problem)


def _send_stages(sender: Connection, coverage: Coverage, arguments: argparse.Namespace) -> None:
    for result in stages(coverage, arguments):
        sender.send(result)


def stages(coverage: Coverage, arguments: argparse.Namespace) -> Iterator[Coverage]:
    """Cuts, plans and trains a network; yields after each what is known so far."""
    try:
        coverage = cut_one(coverage, arguments.image_size or SMALLEST, is_fixed=bool(arguments.image_size))
        yield coverage
        if coverage.status != "cut" or not (arguments.plan or arguments.train):
            return
        if (coverage.params or 0) > arguments.max_params:
            yield replace(coverage, reason=f"not planned: more than {arguments.max_params / 1e6:g} M parameters")
            return
        plan = plan_one(coverage)
        coverage = replace(
            coverage,
            status="planned",
            smallest_budget_bytes=plan.budget_bytes,
            blocks=tuple(_describe(block, plan) for block in plan.blocks),
        )
        yield coverage
        if arguments.train:
            yield replace(coverage, status="trained", blocks=train_one(coverage, plan))
    except NFError as error:
        yield replace(coverage, reason=_first_line(error))


def cut_one(coverage: Coverage, size: int, *, is_fixed: bool) -> Coverage:
    """Cuts a network and compares it with the uncut one, for images of that size or what the network asks for."""
    shape = (3, size, size)
    try:
        model = build_model(coverage.model, inputs=InputSpec(shape=shape), num_outputs=NUM_CLASSES, seed=SEED)
    except ConfigError as error:
        larger = re.match(r"--image-size (\d+)", error.fix)
        if larger is None or is_fixed:
            raise
        return cut_one(coverage, int(larger[1]), is_fixed=True)
    cut_model = cut(model, InputSpec(shape=shape))
    params = count_params(model)
    return replace(
        coverage,
        status="cut",
        image_size=size,
        num_layers=len(cut_model.layers),
        params=params,
        largest_layer=round(max(count_params(layer) for layer in cut_model.layers) / params, 3),
        largest_difference=_largest_difference(model, cut_model, shape),
    )


def _largest_difference(model: nn.Module, cut_model: CutModel, shape: tuple[int, int, int]) -> float:
    x_NCHW = torch.randn(2, *shape, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        return float((cut_model.whole().eval()(x_NCHW) - model.eval()(x_NCHW)).abs().max())


def plan_one(coverage: Coverage) -> Plan:
    """Makes the plan for the smallest budget that has one: the error of a budget that is too small names it."""
    try:
        _make_plan(coverage, 1024)
    except PlanError as error:
        return _make_plan(coverage, error.smallest_budget_bytes)
    raise ConfigError(f"{coverage.model}: 1 KiB is enough to train it?", "look at the planner")


def _make_plan(coverage: Coverage, budget_bytes: int) -> Plan:
    size = coverage.image_size or SMALLEST
    return make_plan(
        _config(coverage, budget_bytes),
        inputs=InputSpec(shape=(3, size, size)),
        target=TargetSpec(size=NUM_CLASSES),
        split_rows=SPLIT_ROWS,
    )


def _config(coverage: Coverage, budget_bytes: int) -> RunConfig:
    settings = {
        "model.name": coverage.model,
        "memory.budget_bytes": budget_bytes,
        "train.seed": SEED,
        "train.device": "cpu",
        "cluster.executor": "inline",
    }
    return resolve_config(flags=settings)


def _describe(block: BlockPlan, plan: Plan) -> Block:
    first, stop = plan.spans[block.units[0]], plan.spans[block.units[1] - 1]
    return Block(
        layers=(first.start, stop.stop),
        batch_size=block.batch_size,
        predicted_peak_bytes=block.predicted_peak_bytes,
    )


def train_one(coverage: Coverage, plan: Plan) -> tuple[Block, ...]:
    """Trains every block of a plan for two steps, the second one with momentum, and counts the bytes."""
    model = build_model(coverage.model, inputs=plan.inputs, num_outputs=NUM_CLASSES, seed=SEED)
    cut_model = cut(model, plan.inputs)
    return tuple(
        replace(_describe(block, plan), measured_peak_bytes=_measure(block, plan, cut_model, coverage))
        for block in plan.blocks
    )


def _measure(block: BlockPlan, plan: Plan, cut_model: CutModel, coverage: Coverage) -> int:
    train = _config(coverage, plan.budget_bytes).train
    units = build_units(
        cut_model, train.head, plan.spans, TargetSpec(size=NUM_CLASSES), SEED, units=range(*block.units)
    )
    optimizers = [make_optimizer(unit.train(), train, train.lr) for unit in units]
    in_shape = (plan.inputs.shape, *cut_model.out_shapes)[plan.spans[block.units[0]].start]
    meter = measure_peak(torch.device("cpu"))
    meter.track(*units, *optimizers)
    y_N = torch.zeros(block.batch_size, dtype=torch.int64)
    for _ in range(2):
        with meter:
            # The batch has no name here: `train_step` frees it after the first unit.
            train_step(units, optimizers, laid_out(torch.randn(block.batch_size, *in_shape)), y_N, train.precision)
    return meter.peak_bytes


def _first_line(error: NFError) -> str:
    """Returns what happened, without where in which library on this machine."""
    text = str(error).partition("\nFix:")[0].replace("\n", " ")
    return text.partition(" (/")[0]


LEGEND = """\
Result: `cut` into layers that compute what the uncut network does (difference: the largest between their logits, in
evaluation); `planned`: the smallest budget that has a plan was found; `trained`: each block of that plan took two
steps; `refused`: why stands behind. How far a network was taken, where nothing is said, is how far it was asked for.
Largest layer: part of all weights that one layer has; what is left of many networks is their classifier.
"""


def summarise(results: Sequence[Coverage]) -> str:
    """Counts by library how far networks came, and lists them."""
    lines = ["| library | networks | cut | planned | trained | refused |", "|---|---|---|---|---|---|"]
    for library in dict.fromkeys(result.model.partition(":")[0] for result in results):
        counts = Counter(r.status for r in results if r.model.startswith(f"{library}:"))
        trained, planned = counts["trained"], counts["planned"] + counts["trained"]
        cells = (sum(counts.values()), planned + counts["cut"], planned, trained, counts["refused"])
        lines.append(f"| {library} | {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "| model | result | image | layers | parameters | largest layer | difference | smallest budget | blocks | "
        "largest peak: measured / predicted | why |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_row, results)])


def _row(result: Coverage) -> str:
    if result.image_size is None:
        return f"| {result.model} | {result.status} |{' |' * 8} {result.reason.replace('|', '/')} |"
    budget = format_bytes(result.smallest_budget_bytes) if result.smallest_budget_bytes else ""
    ratios = [b.measured_peak_bytes / b.predicted_peak_bytes for b in result.blocks if b.measured_peak_bytes]
    cells = (
        result.model,
        result.status,
        result.image_size,
        result.num_layers,
        f"{(result.params or 0) / 1e6:.2f} M",
        f"{result.largest_layer or 0:.0%}",
        f"{result.largest_difference:.1g}",
        budget,
        len(result.blocks) or "",
        f"{max(ratios):.1%}" if ratios else "",
        result.reason.replace("|", "/"),
    )
    return f"| {' | '.join(map(str, cells))} |"


def read(output: Path) -> dict[str, Coverage]:
    """Reads what an earlier run found, by model; nothing where there was none."""
    if not output.exists():
        return {}
    found = {}
    for model in json.loads(output.read_text(encoding="utf8"))["models"]:
        blocks = tuple(Block(**{**block, "layers": tuple(block["layers"])}) for block in model["blocks"])
        found[model["model"]] = Coverage(**{**model, "blocks": blocks})
    return found


def in_order(results: dict[str, Coverage]) -> list[Coverage]:
    """Returns torchvision's networks, then timm's, family by family."""
    sources = list(MODEL_LIBRARIES)
    return sorted(results.values(), key=lambda r: (sources.index(r.model.partition(":")[0]), r.family, r.model))


def write(output: Path, results: Sequence[Coverage]) -> None:
    """Writes JSON, and the table beside it."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    if importlib.util.find_spec("timm") is not None:
        versions["timm"] = importlib.metadata.version("timm")
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "num_classes": NUM_CLASSES,
        "models": [asdict(result) for result in results],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf8")
    title = f"Networks of {', '.join(f'{name} {version}' for name, version in versions.items())}, {document['date']}"
    output.with_suffix(".md").write_text(f"{title}\n\n{LEGEND}\n{summarise(results)}\n", encoding="utf8")


if __name__ == "__main__":
    main()
