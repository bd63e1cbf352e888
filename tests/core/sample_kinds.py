"""Networks for what is no picture, and the samples that they take; factories for `--model sample_kinds:NAME`."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nf_pipeline.core.registry import build_registered
from nf_pipeline.samples import InputSpec, TargetSpec


class Words(nn.Module):
    """Embedding, normalisation, transposition, two 1-D convolutions; classified by the largest of every channel."""

    def __init__(self, num_tokens: int, num_outputs: int) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(num_tokens, 12), nn.LayerNorm(12)
        self.mix = nn.Linear(12, 12)
        self.conv1, self.conv2 = nn.Conv1d(12, 16, 3, padding=1), nn.Conv1d(16, 24, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(24)
        self.classifier = nn.Linear(24, num_outputs)

    def forward(self, tokens_NL: torch.Tensor) -> torch.Tensor:
        x_NCL = self.mix(self.norm(self.embedding(tokens_NL))).transpose(1, 2)
        x_NCL = torch.relu(self.bn1(self.conv1(x_NCL)))
        x_NCL = torch.relu(self.bn2(self.conv2(x_NCL)))
        return self.classifier(x_NCL.max(dim=2).values)


class Embed(nn.Module):
    """tokens_NL -> x_NCL."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_tokens, width)

    def forward(self, tokens_NL: torch.Tensor) -> torch.Tensor:
        return self.table(tokens_NL).transpose(1, 2)


class Encode(nn.Module):
    """x_NCL -> x_NCL by attention, which takes channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, x_NCL: torch.Tensor) -> torch.Tensor:
        return self.block(x_NCL.transpose(1, 2)).transpose(1, 2)


class Average(nn.Module):
    """x_NCL -> logits_NK."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_outputs)

    def forward(self, x_NCL: torch.Tensor) -> torch.Tensor:
        return self.linear(x_NCL.mean(dim=2))


class Chain(nn.Sequential):
    """Modules that are a model's layers, the last one its classifier."""

    def nf_layers(self) -> list[nn.Module]:
        return list(self)


def words(num_tokens: int, num_outputs: int) -> nn.Module:
    return Words(num_tokens, num_outputs)


def encoder(num_tokens: int, num_outputs: int) -> nn.Module:
    return Chain(Embed(num_tokens, 8), Encode(8), Encode(8), Average(8, num_outputs))


def perceptron(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    sizes = [*input_shape, 32, 32]
    hidden = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in itertools.pairwise(sizes)]
    return Chain(*hidden, nn.Linear(32, num_outputs))


def convnet(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    return build_registered("convnet", InputSpec(shape=input_shape, dtype="float32"), num_outputs)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Samples, what is predicted for them, and a network."""

    model: str
    inputs: InputSpec
    target: TargetSpec

    def build(self) -> nn.Module:
        factory: Callable[..., nn.Module] = globals()[self.model.partition(":")[2] or self.model]
        known = {"input_shape": self.inputs.shape, "num_tokens": self.inputs.num_tokens}
        names = factory.__code__.co_varnames[: factory.__code__.co_argcount]
        return factory(**{name: known[name] for name in names if name in known}, num_outputs=self.target.size)


_TOKENS = InputSpec(shape=(20,), dtype="int32", num_tokens=50)
_SERIES = InputSpec(shape=(3, 40), dtype="float32", mean=(1.0, 2.0, 3.0), std=(2.0, 2.0, 4.0))
_VOLUME = InputSpec(shape=(1, 8, 8, 8), dtype="int16", mean=(100.0,), std=(50.0,))
_VECTOR = InputSpec(shape=(10,), dtype="float32")
_CLASSES = TargetSpec(size=4)
_VALUES = TargetSpec(kind="values", size=2, mean=(10.0, -1.0), std=(5.0, 0.5))

KINDS = {
    "words": Kind(model="sample_kinds:words", inputs=_TOKENS, target=_CLASSES),
    "words, values": Kind(model="sample_kinds:words", inputs=_TOKENS, target=_VALUES),
    "encoder": Kind(model="sample_kinds:encoder", inputs=_TOKENS, target=_CLASSES),
    "series": Kind(model="convnet", inputs=_SERIES, target=_CLASSES),
    "series, values": Kind(model="convnet", inputs=_SERIES, target=_VALUES),
    "volume": Kind(model="convnet", inputs=_VOLUME, target=_CLASSES),
    "vector": Kind(model="sample_kinds:perceptron", inputs=_VECTOR, target=_CLASSES),
    "vector, values": Kind(model="sample_kinds:perceptron", inputs=_VECTOR, target=_VALUES),
}
