"""Refuses random changes that the samples of a run cannot take, when it is planned rather than while it trains.

How samples are changed is for the workers (`nf_pipeline.worker.augment`, `nf_pipeline.core.mixup`). Entry:
`check_changes`.
"""

from nf_pipeline.config import TrainConfig
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec

COLOR_KINDS = ("color", "randaugment")
"""Values of `train.augment` that change colours."""


def check_changes(train: TrainConfig, inputs: InputSpec) -> None:
    """Checks `augment`, `feature_augment` and `mixup` against what a sample is.

    Flips and shifts are for what has a height and a width, of any number type: a text or a series read backwards is
    another one. Colours are those of grey and RGB images of 8 bits. Mixing takes numbers.

    Raises:
        ConfigError: names the setting.
    """
    what = f"these are {inputs.dtype} of shape {inputs.shape}"
    for field in ("augment", "feature_augment"):
        if (kind := getattr(train, field)) != "none" and not inputs.is_image:
            raise ConfigError(f"train.{field} {kind} wants pictures (C, H, W), {what}", f"--set train.{field}=none")
    if train.augment in COLOR_KINDS and (inputs.dtype != "uint8" or inputs.shape[0] not in (1, 3)):
        raise ConfigError(
            f"train.augment {train.augment} wants uint8 images of 1 or 3 channels, {what}",
            "--set train.augment=crop_flip",
        )
    if train.mixup and inputs.num_tokens:
        raise ConfigError(
            f"train.mixup {train.mixup:g} mixes numbers, and samples are tokens, which have nothing in between",
            "--set train.mixup=0",
        )
