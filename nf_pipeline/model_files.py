"""The final model as files: model.safetensors and model.json, written once, loaded with `load_model`.

Where exits before the final one are kept, early_exits.safetensors has their heads and early_exits.json says how
samples leave: `load_early_exit_model`. Loading rebuilds the architecture from its name and fills in the weights:
nothing that is read can execute code, and no training code is imported.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import nn

from nf_pipeline.config import FORMAT_VERSION
from nf_pipeline.core.early_exit_model import EarlyExitModel, EarlyExitPlan, build_early_heads
from nf_pipeline.core.exit_model import ExitModel, ExitSpec, build_exit_model
from nf_pipeline.core.tensor_file import read_tensors
from nf_pipeline.documents import parse_json, read_fields
from nf_pipeline.errors import ConfigError, ObjectCorrupt, ObjectMissing
from nf_pipeline.run_uri import split_run_uri
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest, read_object
from nf_pipeline.storage.sealed import check_version, repair_fix
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.trust import confirm_factory

_MAX_NUMBERS = 3 * 2**26  # as many as an image of a data set may have

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What model.json says: architecture, how it was chosen, how good it is.

    Attributes:
        model, inputs, target, head, num_layers, contexts: rebuild the architecture, see `ExitSpec`.
        class_names: one per class; none for values.
        exit_layer_idx, exit_layer: the last layer that was kept.
        val_accuracy, test_accuracy: in [0, 1], of classes; test is None when the data has no test split.
        val_error, test_error: of values, the part of their variance that is left, 0 or more; likewise.
        temperature: of classes, that logits are divided by before the softmax, for probabilities that say how often
            the model is right; fitted on the validation split.
        params, params_full: weights of this model and of the uncut one.
        weights_checksum: of model.safetensors.
        memory_budget_bytes: under which it was trained.
        format_version: of these files.
    """

    model: str
    inputs: InputSpec
    target: TargetSpec
    class_names: tuple[str, ...]
    head: str
    num_layers: int
    exit_layer_idx: int
    exit_layer: str
    val_accuracy: float | None
    test_accuracy: float | None
    temperature: float | None
    params: int
    params_full: int
    memory_budget_bytes: int
    weights_checksum: str
    val_error: float | None = None
    test_error: float | None = None
    contexts: tuple[int, ...] = ()
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
        self.inputs.check()
        self.target.check()
        if len(self.class_names) != (self.target.num_classes or 0):
            raise ValueError(f"target: got {self.target.size} outputs, and {len(self.class_names)} class names")
        if self.target.kind == "class" and (self.target.size < 2 or self.target.mean):
            raise ValueError(f"target: got {self.target.size} classes with {len(self.target.mean)} means")
        if len(self.target.mean) != self.target.label_values:
            raise ValueError(f"target: got {len(self.target.mean)} means of {self.target.label_values} values")
        if math.prod(self.inputs.shape) > _MAX_NUMBERS or self.num_layers < 1:
            raise ValueError(f"inputs, num_layers: got {list(self.inputs.shape)}, {self.num_layers}")
        if list(self.contexts) != sorted(set(self.contexts)) or not all(
            0 < layer < self.num_layers for layer in self.contexts
        ):
            raise ValueError(f"contexts: got {list(self.contexts)[:5]}, want ascending layers of {self.num_layers}")
        if (self.temperature is None) != (self.target.kind == "values"):
            raise ValueError(f"temperature: got {self.temperature}, and target.kind {self.target.kind}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature}, want a number above 0")

    @property
    def spec(self) -> ExitSpec:
        """Which layers of which model."""
        return ExitSpec(
            model=self.model,
            inputs=self.inputs,
            target=self.target,
            head=self.head,
            num_layers=self.num_layers,
            contexts=self.contexts,
        )

    def build(self) -> ExitModel:
        """Builds the architecture with fresh weights."""
        return build_exit_model(self.spec)


@dataclass(frozen=True, kw_only=True)
class KeptExit:
    """An exit before the final model's own.

    Attributes:
        num_layers: layers from the model's input to it.
        layer: name of its last layer.
        head: name of its auxiliary head.
    """

    num_layers: int
    layer: str
    head: str


@dataclass(frozen=True, kw_only=True)
class EarlyExitCard:
    """What early_exits.json says.

    Attributes:
        exits: before the final model's own, in order.
        plan: how samples leave.
        format_version: of this file.
    """

    exits: tuple[KeptExit, ...]
    plan: EarlyExitPlan
    format_version: int = FORMAT_VERSION

    def check(self, num_layers: int) -> None:
        """Checks what the model is built from.

        Args:
            num_layers: of the final model.

        Raises:
            ValueError: names the fields that disagree.
        """
        stops = [0, *(one.num_layers for one in self.exits), num_layers]
        if stops != sorted(set(stops)) or len(self.plan.temperatures) != len(self.exits) + 1:
            temperatures = len(self.plan.temperatures)
            raise ValueError(f"exits: got layers {stops[1:-1]} of {num_layers}, and {temperatures} temperatures")
        self.plan.check()


def read_card(store: Store, layout: RunLayout, manifest: StageManifest) -> ModelCard:
    """Reads model.json of a finished run, whose last stage's manifest vouches for it.

    Raises:
        ObjectCorrupt: it is not what the manifest names.
    """
    document = _read_json(store, layout, manifest, layout.model_json)
    return ModelCard.from_json(document, f"{store.uri}/{layout.model_json}")


def read_early_exits(store: Store, layout: RunLayout, manifest: StageManifest, card: ModelCard) -> EarlyExitCard:
    """Reads early_exits.json of a finished run.

    Raises:
        ObjectMissing: the run has kept no other exit than the final model's.
        ObjectCorrupt: it is not what the manifest names.
    """
    if all(entry.key != layout.early_exit_json for entry in manifest.objects):
        what = f"{layout.run} has kept the chosen exit alone"
        raise ObjectMissing(what, store.uri, "train another --run with --exits all")
    document = _read_json(store, layout, manifest, layout.early_exit_json)
    where = f"{store.uri}/{layout.early_exit_json}"
    check_version(document, "early_exits.json", where)
    try:
        early = read_fields(EarlyExitCard, document)
        early.check(card.num_layers)
    except ValueError as error:
        raise ObjectCorrupt(f"early_exits.json describes no exits: {error}", where) from None
    return early


def load_model(uri: str, *, model: str | None = None) -> ExitModel:
    """Loads the final model of a finished run, in inference mode, on the CPU.

    Args:
        uri: STORE/NAME, such as "./nf-runs/run" or "s3://bucket/prefix/run".
        model: the factory, where the run was trained with one; registry models need nothing.

    Returns:
        A module that maps samples as they are stored, such as pixels_NCHW (0 to 255), to logits_NK, or to values_NK
        in their own units; its `card` attribute is the `ModelCard`. The logits are as the network makes them: divided
        by `card.temperature`, their softmax says how often the model is right.

    Raises:
        ObjectMissing: the run has no final model (yet).
        ObjectCorrupt: a file is not what the run's last stage stored.
        ConfigError: the run names a factory that `model` does not.
    """
    store, layout, manifest = _open(uri)
    return _load_final(store, layout, manifest, model)


def load_early_exit_model(uri: str, *, model: str | None = None) -> EarlyExitModel:
    """Loads the final model of a finished run together with the exits before it, in inference mode, on the CPU.

    Args:
        uri, model: see `load_model`; the run was trained with `exits.keep` all.

    Returns:
        A module that maps pixels_NCHW (0 to 255) to calibrated logits_NK and the exit at which each sample left; its
        `card` attribute is the `ModelCard` of the final model, `exit_layers` has the names of the exits.

    Raises:
        ObjectMissing: the run has no final model (yet), or no other exits.
        ObjectCorrupt: a file is not what the run's last stage stored.
        ConfigError: the run names a factory that `model` does not.
    """
    store, layout, manifest = _open(uri)
    final = _load_final(store, layout, manifest, model)
    early = read_early_exits(store, layout, manifest, final.card)
    heads = nn.ModuleList(build_early_heads(final.card.spec, [(one.num_layers, one.head) for one in early.exits]))
    data = _read_named(store, layout, manifest, layout.early_exit_heads)
    _fill(heads, data, f"{store.uri}/{layout.early_exit_heads}", final.card.model)
    loaded = EarlyExitModel(final, list(heads), [one.num_layers for one in early.exits], early.plan)
    loaded.card, loaded.exit_layers = final.card, (*(one.layer for one in early.exits), final.card.exit_layer)
    return loaded


def _open(uri: str) -> tuple[Store, RunLayout, StageManifest]:
    store_uri, run = split_run_uri(uri)
    store, layout = open_store(store_uri), RunLayout(run)
    manifest = read_manifest(store, layout.model_manifest)
    if manifest is None or manifest.weights is None:
        what = f"{layout.model_manifest} is not there: the run has no final model"
        raise ObjectMissing(what, store.uri, "resume the run: it makes what is missing")
    return store, layout, manifest


def _load_final(store: Store, layout: RunLayout, manifest: StageManifest, model: str | None) -> ExitModel:
    card = read_card(store, layout, manifest)
    confirm_factory(card.model, model)
    data = read_object(store, manifest.weights)
    loaded = _fill(card.build(), data, f"{store.uri}/{layout.model_weights}", card.model)
    loaded.card = card
    return loaded


def _fill(module: ModelT, data: bytes, where: str, name: str) -> ModelT:
    try:
        module.load_state_dict(read_tensors(data, where), strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"{name} no longer has the weights that were trained: {error}",
            "use the model factory as it was when the run was trained",
        ) from None
    return module


def _read_json(store: Store, layout: RunLayout, manifest: StageManifest, key: str) -> Any:
    try:
        return parse_json(_read_named(store, layout, manifest, key))
    except ValueError as error:
        raise ObjectCorrupt(f"{key.rpartition('/')[2]} is not JSON: {error}", f"{store.uri}/{key}") from None


def _read_named(store: Store, layout: RunLayout, manifest: StageManifest, key: str) -> bytes:
    stored = [entry for entry in manifest.objects if entry.key == key]
    if not stored:
        name = key.rpartition("/")[2]
        raise ObjectCorrupt(f"{layout.model_manifest} names no {name}", store.uri, repair_fix(store, layout.run))
    return read_object(store, stored[0])
