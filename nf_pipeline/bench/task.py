"""What a baseline trains: a network cut into units, and the images that the pipeline reads too.

Entry: `Task`.
"""

from dataclasses import dataclass

import torch

from nf_pipeline.bench.methods import Method
from nf_pipeline.config import RunConfig
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.local_unit import LocalUnit, build_units, even_spans
from nf_pipeline.core.models import build_model
from nf_pipeline.core.sample_changes import check_changes
from nf_pipeline.core.train_step import resolve_device
from nf_pipeline.samples import InputSpec, TargetSpec, inputs_of, target_of
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.store import Store

_DGL_HEAD = "classic"


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
        """Returns the network as one unit, which is plain backpropagation, or as a unit per layer for DGL.

        They are the pipeline's own, and train for the same loss, labels smoothed alike.

        Raises:
            ConfigError: samples cannot be changed as the configuration says.
        """
        train, cut_model = self.config.train, self.cut_model()
        check_changes(train, self.inputs)
        num_layers = len(cut_model.layers)
        unit_layers = num_layers if method.family == "backprop" else 1
        spans = even_spans(num_layers, unit_layers, segment_layers)
        return build_units(cut_model, _DGL_HEAD, spans, self.target, train.seed, train=train)
