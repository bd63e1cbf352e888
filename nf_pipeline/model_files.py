"""The final model as files: model.safetensors and model.json, written once, loaded with `load_model`.

Loading rebuilds the architecture from its name and fills in the weights: nothing that is read can execute code,
and no training code is imported.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch

from nf_pipeline.config import FORMAT_VERSION
from nf_pipeline.core.exit_model import ExitModel, ExitSpec, build_exit_model
from nf_pipeline.errors import ConfigError, ObjectCorrupt
from nf_pipeline.run_uri import split_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import checksum_of
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.trust import confirm_factory


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What model.json says: architecture, how it was chosen, how good it is.

    Attributes:
        model, image_shape, num_classes, head, unit_layers, num_units: rebuild the architecture.
        class_names: one per class.
        mean, std: per channel, of pixels scaled to [0, 1].
        exit_layer_idx, exit_layer: the last layer that was kept.
        val_accuracy, test_accuracy: in [0, 1]; test is None when the data has no test split.
        params, params_full: weights of this model and of the uncut one.
        weights_checksum: of model.safetensors.
        memory_budget_bytes: under which it was trained.
        format_version: of these files.
    """

    model: str
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    head: str
    unit_layers: int
    num_units: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    exit_layer_idx: int
    exit_layer: str
    val_accuracy: float
    test_accuracy: float | None
    params: int
    params_full: int
    memory_budget_bytes: int
    weights_checksum: str
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as a JSON document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Any, where: str) -> "ModelCard":
        """Reads what `to_json` returned.

        Raises:
            ObjectCorrupt: a field is missing or unknown, or the version is another one.
        """
        try:
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
            card = cls(**fields)
        except (AttributeError, TypeError) as error:
            raise ObjectCorrupt(f"model.json is no model description: {error}", where) from None
        if card.format_version != FORMAT_VERSION:
            raise ObjectCorrupt(
                f"model.json has format version {card.format_version}, this program reads {FORMAT_VERSION}",
                where,
            )
        return card

    def build(self) -> ExitModel:
        """Builds the architecture with fresh weights."""
        spec = ExitSpec(
            model=self.model,
            image_shape=self.image_shape,
            num_classes=self.num_classes,
            head=self.head,
            unit_layers=self.unit_layers,
            num_units=self.num_units,
        )
        return build_exit_model(spec, mean=self.mean, std=self.std)


def read_card(store: Store, layout: RunLayout) -> ModelCard:
    """Reads model.json of a finished run."""
    try:
        document = json.loads(bytes(store.get(layout.model_json)))
    except ValueError as error:
        raise ObjectCorrupt(f"model.json is not JSON: {error}", f"{store.uri}/{layout.model_json}") from None
    return ModelCard.from_json(document, f"{store.uri}/{layout.model_json}")


def load_model(uri: str, *, model: str | None = None) -> ExitModel:
    """Loads the final model of a finished run, in inference mode, on the CPU.

    Args:
        uri: STORE/NAME, such as "./nf-runs/run" or "s3://bucket/prefix/run".
        model: the factory, where the run was trained with one; registry models need nothing.

    Returns:
        A module that maps pixels_NCHW (0 to 255) to logits_NK; its `card` attribute is the `ModelCard`.

    Raises:
        ObjectMissing: the run has no final model (yet).
        ObjectCorrupt: the weights are not those that model.json names.
        ConfigError: the run names a factory that `model` does not.
    """
    store_uri, run = split_run_uri(uri)
    store, layout = open_store(store_uri), RunLayout(run)
    card = read_card(store, layout)
    confirm_factory(card.model, model)
    data = bytes(store.get(layout.model_weights))
    if checksum_of(data) != card.weights_checksum:
        raise ObjectCorrupt(
            f"weights have checksum {checksum_of(data)}, model.json says {card.weights_checksum}",
            f"{store.uri}/{layout.model_weights}",
            "delete the run's model/ folder and resume the run: it is assembled anew",
        )
    loaded = card.build()
    try:
        loaded.load_state_dict(safetensors.torch.load(data), strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"{card.model} no longer has the weights that were trained: {error}",
            "use the model factory as it was when the run was trained",
        ) from None
    loaded.card = card
    return loaded
