"""The final model as files: model.safetensors and model.json, written once, loaded with `load_model`.

Loading rebuilds the architecture from its name and fills in the weights: nothing that is read can execute code,
and no training code is imported.
"""

from dataclasses import asdict, dataclass
from typing import Any

from nf_pipeline.config import FORMAT_VERSION
from nf_pipeline.core.exit_model import ExitModel, ExitSpec, build_exit_model
from nf_pipeline.core.tensor_file import read_tensors
from nf_pipeline.documents import parse_json, read_fields
from nf_pipeline.errors import ConfigError, ObjectCorrupt, ObjectMissing
from nf_pipeline.run_uri import split_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest, read_object
from nf_pipeline.storage.sealed import check_version, repair_fix
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.trust import confirm_factory

_MAX_PIXELS = 2**26  # as many as an image of a data set may have


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What model.json says: architecture, how it was chosen, how good it is.

    Attributes:
        model, image_shape, num_classes, head, num_layers: rebuild the architecture.
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
    num_layers: int
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
            OtherVersion: it is of another format version.
            ObjectCorrupt: a field is missing or unknown.
        """
        check_version(document, "model.json", where)
        try:
            card = read_fields(cls, document)
            card.check()
        except ValueError as error:
            raise ObjectCorrupt(f"model.json is no model description: {error}", where) from None
        return card

    def check(self) -> None:
        """Checks what the architecture is built from: nothing larger than the description itself says it has.

        Raises:
            ValueError: names the fields that disagree.
        """
        if not 2 <= self.num_classes == len(self.class_names):
            raise ValueError(f"num_classes: got {self.num_classes}, and {len(self.class_names)} class names")
        channels, height, width = self.image_shape
        if channels not in (1, 3) or not len(self.mean) == len(self.std) == channels or min(self.std) <= 0:
            raise ValueError(f"image_shape, mean, std: got {self.image_shape}, {self.mean}, {self.std}")
        if not (height * width <= _MAX_PIXELS and min(height, width, self.num_layers) >= 1):
            raise ValueError(f"image_shape, num_layers: got {self.image_shape}, {self.num_layers}")

    def build(self) -> ExitModel:
        """Builds the architecture with fresh weights."""
        spec = ExitSpec(
            model=self.model,
            image_shape=self.image_shape,
            num_classes=self.num_classes,
            head=self.head,
            num_layers=self.num_layers,
        )
        return build_exit_model(spec, mean=self.mean, std=self.std)


def read_card(store: Store, layout: RunLayout, manifest: StageManifest) -> ModelCard:
    """Reads model.json of a finished run, whose last stage's manifest vouches for it.

    Raises:
        ObjectCorrupt: it is not what the manifest names.
    """
    where = f"{store.uri}/{layout.model_json}"
    stored = [entry for entry in manifest.objects if entry.key == layout.model_json]
    if not stored:
        raise ObjectCorrupt(f"{layout.model_manifest} names no model.json", store.uri, repair_fix(store, layout.run))
    try:
        document = parse_json(read_object(store, stored[0]))
    except ValueError as error:
        raise ObjectCorrupt(f"model.json is not JSON: {error}", where) from None
    return ModelCard.from_json(document, where)


def load_model(uri: str, *, model: str | None = None) -> ExitModel:
    """Loads the final model of a finished run, in inference mode, on the CPU.

    Args:
        uri: STORE/NAME, such as "./nf-runs/run" or "s3://bucket/prefix/run".
        model: the factory, where the run was trained with one; registry models need nothing.

    Returns:
        A module that maps pixels_NCHW (0 to 255) to logits_NK; its `card` attribute is the `ModelCard`.

    Raises:
        ObjectMissing: the run has no final model (yet).
        ObjectCorrupt: a file is not what the run's last stage stored.
        ConfigError: the run names a factory that `model` does not.
    """
    store_uri, run = split_run_uri(uri)
    store, layout = open_store(store_uri), RunLayout(run)
    manifest = read_manifest(store, layout.model_manifest)
    if manifest is None or manifest.weights is None:
        what = f"{layout.model_manifest} is not there: the run has no final model"
        raise ObjectMissing(what, store.uri, "resume the run: it makes what is missing")
    card = read_card(store, layout, manifest)
    confirm_factory(card.model, model)
    data = read_object(store, manifest.weights)
    loaded = card.build()
    try:
        loaded.load_state_dict(read_tensors(data, f"{store.uri}/{layout.model_weights}"), strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"{card.model} no longer has the weights that were trained: {error}",
            "use the model factory as it was when the run was trained",
        ) from None
    loaded.card = card
    return loaded
