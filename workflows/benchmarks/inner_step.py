"""Times the training step of local units with and without single changes, and prints what each change is worth.

    python workflows/benchmarks/inner_step.py            # each choice that was kept, on two models
    python workflows/benchmarks/inner_step.py --profile  # the parts of a step, by torch.profiler

Every unit of a model is timed alone, on random images of the size that it would see. The variants of a unit take
turns, step by step, in one process, so that a machine that slows down slows all of them down: what counts is the
median, over the turns, of a variant's seconds by the baseline's of the same turn. The baseline is `train_step` as
the worker runs it. Entry: `measure_unit`.

Shapes: N batch, C channels, H, W, K classes.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from measuring import make_parser, report, run_script
from torch import nn

from nf_pipeline.config import TrainConfig
from nf_pipeline.core import layout
from nf_pipeline.core.heads import build_head, head_site
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.models import build_model
from nf_pipeline.core.train_step import forward_block, make_optimizer, resolve_device, train_step
from nf_pipeline.samples import InputSpec

NUM_CLASSES = 10
IMAGE_SHAPE = (3, 32, 32)
WARM_STEPS = 2
_CHANNELS_LAST_PIXELS = layout.CHANNELS_LAST_PIXELS

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One unit and the batch that it trains on.

    Attributes:
        model: name in the registry.
        layers: half-open range of the unit's layers.
        batch_size: samples.
        device: where it trains.
    """

    model: str
    layers: tuple[int, int]
    batch_size: int
    device: torch.device

    def unit(self) -> LocalUnit:
        """Builds the unit with the head that training gives it; the same weights every time."""
        cut_model = _cut(self.model)
        start, stop = self.layers
        if stop == len(cut_model.layers):
            head = cut_model.tail
        else:
            head = build_head("adaptive", head_site(cut_model.out_shapes, stop - 1, NUM_CLASSES), 0)
        return LocalUnit(cut_model.layers[start:stop], head).to(self.device)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes x_NCHW and y_N."""
        generator = torch.Generator().manual_seed(0)
        start = self.layers[0]
        shape = IMAGE_SHAPE if start == 0 else _cut(self.model).out_shapes[start - 1]
        x_NCHW = torch.randn((self.batch_size, *shape), generator=generator)
        x_NCHW = x_NCHW if start == 0 else x_NCHW.relu()
        y_N = torch.randint(NUM_CLASSES, (self.batch_size,), generator=generator)
        return x_NCHW.to(self.device), y_N.to(self.device)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a variant of one unit took.

    Attributes:
        model, layers, batch_size: see `Scene`.
        variant: a key of `VARIANTS`.
        seconds: median of a step.
        ratio: median of the turns' quotients by the baseline: below 1 is faster.
        first_s: seconds of the very first step, which is where compiling happens.
    """

    model: str
    layers: tuple[int, int]
    batch_size: int
    variant: str
    seconds: float
    ratio: float
    first_s: float


def plain(scene: Scene) -> Step:
    """The training step as it is."""
    return _trainer(scene, scene.unit())


def channels_last(scene: Scene, precision: str = "fp32") -> Step:
    """Weights and the first input with the channels innermost, also where the activations' layout goes by size."""
    unit = scene.unit().to(memory_format=torch.channels_last)
    return _trainer(scene, unit, precision=precision, memory_format=torch.channels_last)


def contiguous(scene: Scene) -> Step:
    """Activations with the channels outermost everywhere, as they were before `nf_pipeline.core.layout`."""
    return _switched(_trainer(scene, scene.unit()), _keep_contiguous)


def bf16(scene: Scene) -> Step:
    """Forward and backward pass under autocast."""
    return _trainer(scene, scene.unit(), precision="bf16")


def bf16_channels_last(scene: Scene) -> Step:
    """Both together."""
    return channels_last(scene, precision="bf16")


def foreach_optimizer(scene: Scene) -> Step:
    """One call per kind of operation instead of the fused kernel."""
    return _trainer(scene, scene.unit(), optimizer={"foreach": True})


def loop_optimizer(scene: Scene) -> Step:
    """One call per weight instead of the fused kernel."""
    return _trainer(scene, scene.unit(), optimizer={"foreach": False})


def flush_denormal(scene: Scene) -> Step:
    """Numbers below the smallest normal one count as 0."""
    return _switched(_trainer(scene, scene.unit()), torch.set_flush_denormal)


def compiled(scene: Scene) -> Step:
    """The unit's forward and backward pass through torch.compile."""
    unit = scene.unit()
    unit.forward = torch.compile(unit.forward)
    return _trainer(scene, unit)


def compiled_channels_last(scene: Scene) -> Step:
    """The same with the channels innermost."""
    unit = scene.unit().to(memory_format=torch.channels_last)
    unit.forward = torch.compile(unit.forward)
    return _trainer(scene, unit, memory_format=torch.channels_last)


def graphed(scene: Scene) -> Step:
    """torch.compile, and on a GPU the launches of a pass recorded in CUDA graphs; on a CPU the same as "compile"."""
    unit = scene.unit()
    unit.forward = torch.compile(unit.forward, mode="reduce-overhead")
    return _trainer(scene, unit)


def read_loss(scene: Scene) -> Step:
    """Every loss read at once, which waits for a GPU."""
    step = _trainer(scene, scene.unit())
    return lambda: [loss.item() for loss in step()]


def forward_only(scene: Scene) -> Step:
    """What validating and storing activations runs: eval mode, no gradients."""
    return _forward(scene, scene.unit())


def forward_inference(scene: Scene) -> Step:
    """The same in inference mode instead of without gradients."""
    step = _forward(scene, scene.unit())

    def run() -> object:
        with torch.inference_mode():
            return step()

    return run


def forward_contiguous(scene: Scene) -> Step:
    """The same with the channels outermost everywhere."""
    return _switched(_forward(scene, scene.unit()), _keep_contiguous)


VARIANTS: dict[str, Callable[[Scene], Step]] = {
    "train": plain,
    "contiguous": contiguous,
    "channels last, weights too": channels_last,
    "bf16": bf16,
    "bf16, channels last, weights too": bf16_channels_last,
    "foreach optimiser": foreach_optimizer,
    "loop optimiser": loop_optimizer,
    "flush denormals": flush_denormal,
    "read every loss": read_loss,
    "compile": compiled,
    "compile, channels last, weights too": compiled_channels_last,
    "compile, CUDA graphs": graphed,
    "forward": forward_only,
    "forward, inference mode": forward_inference,
    "forward, contiguous": forward_contiguous,
}
KEPT = ["contiguous", "foreach optimiser", "loop optimiser", "bf16", "forward, contiguous"]
"""What was before each choice that was kept, and the precision that the user may ask for."""

BASELINES = {name: "forward" if name.startswith("forward") else "train" for name in VARIANTS}


def measure_unit(scene: Scene, variants: Sequence[str], num_turns: int) -> list[Timing]:
    """Times the variants of one unit in turns, after steps that warm each of them up.

    Args:
        scene: which unit, which batch.
        variants: keys of `VARIANTS`; their baselines are added.
        num_turns: at least 1; how often each variant is timed.
    """
    names = list(dict.fromkeys([*(BASELINES[name] for name in variants), *variants]))
    steps = {name: VARIANTS[name](scene) for name in names}
    first_s = {name: _seconds(step, scene.device) for name, step in steps.items()}
    for step in steps.values():
        for _ in range(WARM_STEPS):
            step()
    turns = [{name: _seconds(step, scene.device) for name, step in steps.items()} for _ in range(num_turns)]
    return [
        Timing(
            model=scene.model,
            layers=scene.layers,
            batch_size=scene.batch_size,
            variant=name,
            seconds=statistics.median(turn[name] for turn in turns),
            ratio=statistics.median(turn[name] / turn[BASELINES[name]] for turn in turns),
            first_s=first_s[name],
        )
        for name in names
    ]


def profile_unit(scene: Scene, num_steps: int) -> dict[str, float]:
    """Returns each operator's part of a step's time, its own kernels only, the largest first."""
    step = plain(scene)
    for _ in range(WARM_STEPS):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(num_steps):
            step()
    on_gpu = scene.device.type == "cuda"
    spent = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    total = sum(spent.values())
    return {name: part / total for name, part in sorted(spent.items(), key=lambda item: -item[1])}


def render_table(timings: Sequence[Timing]) -> str:
    """Formats one row per model, batch and variant as Markdown: seconds of all units together.

    The break-even of a variant that compiles is the number of steps after which it has won back its first one.
    """
    lines = ["| model | batch | variant | step ms, all units | by the baseline | worst unit | break-even steps |"]
    lines.append("|" + " --- |" * 7)
    groups: dict[tuple[str, int, str], list[Timing]] = {}
    for timing in timings:
        groups.setdefault((timing.model, timing.batch_size, timing.variant), []).append(timing)
    for (model, batch_size, variant), units in groups.items():
        bases = groups[model, batch_size, BASELINES[variant]]
        mine, base = (sum(unit.seconds for unit in group) for group in (units, bases))
        ratio = sum(unit.ratio * one.seconds for unit, one in zip(units, bases, strict=True)) / base
        worst, saved = max(unit.ratio for unit in units), base * (1 - ratio)
        first = sum(unit.first_s for unit in units)
        even = f"{first / saved:,.0f}" if "compile" in variant and saved > 0 else "-"
        lines.append(
            f"| {model} | {batch_size} | {variant} | {1e3 * mine:.1f} | {ratio:.2f} | {worst:.2f} | {even} |"
        )
    return "\n".join(lines)


def scenes(arguments: argparse.Namespace) -> Iterator[Scene]:
    """Yields every unit of every model at every batch size."""
    device = resolve_device(arguments.device)
    for model in arguments.models:
        num_layers = len(_cut(model).layers)
        for batch_size in arguments.batches:
            for start in range(0, num_layers, arguments.unit_layers):
                layers = (start, min(start + arguments.unit_layers, num_layers))
                yield Scene(model=model, layers=layers, batch_size=batch_size, device=device)


def _cut(model: str) -> CutModel:
    return cut(
        build_model(model, inputs=InputSpec(shape=IMAGE_SHAPE), num_outputs=NUM_CLASSES, seed=0),
        InputSpec(shape=IMAGE_SHAPE),
    )


def _trainer(
    scene: Scene,
    unit: LocalUnit,
    *,
    precision: str = "fp32",
    memory_format: torch.memory_format = torch.contiguous_format,
    optimizer: dict[str, Any] | None = None,
) -> Callable[[], list[torch.Tensor]]:
    unit.train()
    x_NCHW, y_N = scene.batch()
    x_NCHW = x_NCHW.contiguous(memory_format=memory_format)
    cfg = TrainConfig()
    if optimizer is None:
        sgd = make_optimizer(unit, cfg, 0.01)
    else:
        weights = list(unit.parameters())
        sgd = torch.optim.SGD(weights, lr=0.01, momentum=cfg.momentum, weight_decay=cfg.weight_decay, **optimizer)
    return lambda: train_step([unit], [sgd], x_NCHW, y_N, precision)


def _forward(scene: Scene, unit: nn.Module) -> Step:
    unit.eval()
    x_NCHW, _ = scene.batch()
    return lambda: forward_block([unit], x_NCHW, "fp32", with_heads=False)


def _keep_contiguous(on: bool) -> None:
    layout.CHANNELS_LAST_PIXELS = sys.maxsize if on else _CHANNELS_LAST_PIXELS


def _switched(step: Step, switch: Callable[[bool], object]) -> Step:
    def run() -> object:
        switch(True)
        try:
            return step()
        finally:
            switch(False)

    return run


def _seconds(step: Step, device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "bench-results/inner-step.json")
    parser.add_argument("--models", nargs="+", default=["vgg11_bn", "resnet18"], help="of the registry [%(default)s]")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64], help="batch sizes [%(default)s]")
    parser.add_argument("--unit-layers", type=int, default=2, help="layers per unit [%(default)s]")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=KEPT, metavar="NAME")
    parser.add_argument("--turns", type=int, default=4, help="how often each variant is timed [%(default)s]")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="[%(default)s]")
    parser.add_argument("--num-threads", type=int, default=os.cpu_count(), help="CPU threads [%(default)s]")
    parser.add_argument("--profile", action="store_true", help="print the parts of a step instead")
    return parser.parse_args()


def _main() -> None:
    arguments = _parse_arguments()
    torch.set_num_threads(arguments.num_threads)
    if arguments.profile:
        for scene in scenes(arguments):
            parts = list(profile_unit(scene, arguments.turns).items())[:8]
            shown = ", ".join(f"{name} {part:.0%}" for name, part in parts)
            print(f"{scene.model} layers {scene.layers[0]}-{scene.layers[1] - 1} batch {scene.batch_size}: {shown}")
        return
    timings = []
    for scene in scenes(arguments):
        print(f"{scene.model} layers {scene.layers} batch {scene.batch_size}", file=sys.stderr, flush=True)
        timings += measure_unit(scene, arguments.variants, arguments.turns)
        torch.compiler.reset()  # a limit on compiled versions of one function would make later units run plainly
    text = "by the baseline: above 1 a step takes longer with the variant than as training runs it now"
    report(arguments, f"{render_table(timings)}\n\n{text}", {"timings": [asdict(one) for one in timings]})


if __name__ == "__main__":
    run_script(_main)
