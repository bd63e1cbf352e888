"""What a baseline trains: a network cut into units, and the images that the pipeline reads too.

Entry: `Task`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nf_pipeline.bench.methods import Method
from nf_pipeline.config import RunConfig
from nf_pipeline.core.heads import build_head, head_site
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.models import build_model
from nf_pipeline.core.train_step import resolve_device
from nf_pipeline.samples import InputSpec, TargetSpec, inputs_of, target_of
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class Task:
    """A configuration and its images.

    Attributes:
        config: model, budget, optimiser, schedule.
        store: where the images are.
        ingest: their manifest.
    """

    config: RunConfig
    store: Store
    ingest: StageManifest

    @property
    def device(self) -> torch.device:
        """Where everything is trained."""
        return resolve_device(self.config.train.device)

    @property
    def inputs(self) -> InputSpec:
        """What the network takes."""
        return inputs_of(self.ingest.facts)

    @property
    def target(self) -> TargetSpec:
        """What it predicts."""
        return target_of(self.ingest.facts)

    @property
    def budget_bytes(self) -> int:
        """What training may hold."""
        return int(self.config.memory.budget_bytes)

    def cut_model(self) -> CutModel:
        """Builds the network, with the weights that the pipeline starts from, as a chain of layers."""
        model = build_model(
            str(self.config.model.name),
            inputs=self.inputs,
            num_outputs=self.target.size,
            seed=self.config.train.seed,
        )
        return cut(model, self.inputs)

    def units(self, method: Method, segment_layers: int = 0) -> list[LocalUnit]:
        """Returns the network as one unit, which is plain backpropagation, or as a unit per layer for DGL."""
        return (_one_unit if method.family == "backprop" else _unit_per_layer)(self, segment_layers)


def _one_unit(task: Task, segment_layers: int) -> list[LocalUnit]:
    cut_model = task.cut_model()
    return [LocalUnit(cut_model.layers, cut_model.tail, segment_layers)]


def _unit_per_layer(task: Task, _segment_layers: int) -> list[LocalUnit]:
    cut_model, num_outputs, seed = task.cut_model(), task.target.size, task.config.train.seed
    sites = [head_site(cut_model.out_shapes, position, num_outputs) for position in range(len(cut_model.layers) - 1)]
    heads = [build_head("classic", site, seed + position) for position, site in enumerate(sites)]
    return _joined(cut_model.layers, [*heads, cut_model.tail])


def _joined(layers: Sequence[torch.nn.Module], heads: Sequence[torch.nn.Module]) -> list[LocalUnit]:
    return [LocalUnit([layer], head) for layer, head in zip(layers, heads, strict=True)]
