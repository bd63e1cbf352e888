"""Which operating point of early exits somebody asks for. Entry class: `EarlyExitWish`."""

from dataclasses import dataclass

from nf_pipeline.core.early_exit_model import EarlyExitModel
from nf_pipeline.errors import ConfigError
from nf_pipeline.model_files import load_early_exit_model


@dataclass(frozen=True, kw_only=True)
class EarlyExitWish:
    """Which operating point of early exits to take; see `nf_pipeline.core.early_exit_model.EarlyExitModel`.

    Without a wish samples leave where that costs no accuracy on the validation split.

    Attributes:
        accuracy: on the validation split, in [0, 1], at least.
        flops: mean of one sample there, at most.
    """

    accuracy: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        """Refuses two wishes at once.

        Raises:
            ConfigError: both are given.
        """
        if self.accuracy is not None and self.flops is not None:
            raise ConfigError(f"early exits: got accuracy {self.accuracy:g} and flops {self.flops:g}", "give one")

    def load(self, uri: str, model: str | None = None) -> EarlyExitModel:
        """Loads a finished run's model at this operating point.

        Args:
            uri, model: see `nf_pipeline.model_files.load_early_exit_model`.

        Raises:
            ConfigError: no operating point is as wished.
            ObjectMissing: the run has no final model (yet), or has kept no exits before it.
        """
        loaded = load_early_exit_model(uri, model=model)
        if self.accuracy is not None:
            return loaded.with_accuracy(self.accuracy)
        return loaded if self.flops is None else loaded.with_flops(self.flops)
