"""What one sample is: the tensor that goes in, and what the network is to predict for it.

Everything that differs between pictures, texts, series and logged behaviour is here: found once, when the data is
ingested, and written down in every plan and model. Plain Python. Entries: `InputSpec`, `TargetSpec`, `inputs_of`,
`target_of`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nf_pipeline.documents import read_fields

TargetKind = Literal["class", "values"]


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One sample as it is stored, and how it becomes what the network takes.

    Attributes:
        shape: channels first: (C, H, W), (C, L), (C, D, H, W) or (F,); of tokens (L,).
        dtype: that is stored: "uint8", "uint16", "int16" or "float32", and "int32" for tokens.
        num_tokens: above 0 the numbers are tokens, whole numbers below this one, which the network is given as int64;
            0: they are quantities, which it is given as float32.
        mean, std: over the train split, for each of `shape[0]` channels, in stored units; the network is given
            (x - mean) / std. Empty: it is given what is stored.
    """

    shape: tuple[int, ...]
    dtype: str = "uint8"
    num_tokens: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON document that `inputs_of` reads under the name "inputs"."""
        return {**asdict(self), "shape": list(self.shape), "mean": list(self.mean), "std": list(self.std)}

    @property
    def is_image(self) -> bool:
        """Whether it is a map of channels with height and width."""
        return len(self.shape) == 3

    def check(self) -> None:
        """Checks what is computed with it.

        Raises:
            ValueError: names the field.
        """
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"inputs.shape: got {list(self.shape)}, want one or more sizes of at least 1")
        if self.num_tokens < 0:
            raise ValueError(f"inputs.num_tokens: got {self.num_tokens}, want 0 or more")
        _check_scaling("inputs", self.mean, self.std, self.shape[0])


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """What the network is to predict for one sample.

    Attributes:
        kind: one of several classes, or values.
        size: numbers that it returns: a score per class, or each value.
        mean, std: of each value over the train split; networks are trained on (value - mean) / std, final models
            return values in their own units. Empty for classes.
    """

    kind: TargetKind = "class"
    size: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON document that `target_of` reads under the name "target"."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @property
    def label_values(self) -> int:
        """Values in the label of a sample; 0 where it is a class."""
        return self.size if self.kind == "values" else 0

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None where values are predicted."""
        return self.size if self.kind == "class" else None

    def check(self) -> None:
        """Checks what is computed with it.

        Raises:
            ValueError: names the field.
        """
        if self.size < 1:
            raise ValueError(f"target.size: got {self.size}, want 1 or more")
        _check_scaling("target", self.mean, self.std, self.size)


def inputs_of(facts: Mapping[str, Any]) -> InputSpec:
    """Reads the inputs from the facts of an ingest stage.

    Raises:
        ValueError: they are missing or damaged.
    """
    inputs = read_fields(InputSpec, facts.get("inputs"))
    inputs.check()
    return inputs


def target_of(facts: Mapping[str, Any]) -> TargetSpec:
    """Reads the target from the facts of an ingest stage.

    Raises:
        ValueError: it is missing or damaged.
    """
    target = read_fields(TargetSpec, facts.get("target"))
    target.check()
    return target


def _check_scaling(what: str, mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    if len(mean) != len(std) or len(mean) not in (0, channels):
        raise ValueError(f"{what}.mean, std: got {len(mean)} and {len(std)} numbers, want {channels} each, or none")
    if not all(map(math.isfinite, mean)) or not all(0 < value < math.inf for value in std):
        raise ValueError(f"{what}.mean, std: want finite numbers, and std above 0")
