"""Networks for samples of any rank, for the factories of the recipes. Entries: `convolutions`, `Chain`."""

from collections.abc import Sequence

from torch import nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGES = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class Chain(nn.Sequential):
    """Modules that say themselves that they are the layers, the last one the classifier."""

    def nf_layers(self) -> list[nn.Module]:
        """Returns the modules in order."""
        return list(self)


def convolutions(input_shape: Sequence[int], widths: Sequence[int], num_outputs: int, bins: int = 1) -> nn.Sequential:
    """Builds convolutions of three taps along every axis, and halves the map after each but the last.

    Args:
        input_shape: channels first: (C, L), (C, H, W) or (C, D, H, W).
        widths: channels after each convolution.
        num_outputs: of the classifier.
        bins: positions along every axis that the classifier sees.
    """
    rank, channels = len(input_shape) - 1, input_shape[0]
    layers: list[nn.Module] = []
    for width in widths:
        layers += [CONVOLUTIONS[rank](channels, width, 3, padding=1, bias=False), NORMS[rank](width), nn.ReLU()]
        layers.append(POOLS[rank](2, ceil_mode=True))
        channels = width
    layers[-1] = AVERAGES[rank](bins)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * bins**rank, num_outputs))
