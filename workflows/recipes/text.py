"""Text classification: in which of eight languages is a name written?

    python -m workflows.recipes.text --task convolutions
    python -m workflows.recipes.text --task transformer

The texts are the names of countries, regions, languages, scripts and currencies that pycountry ships with their
translations by the iso-codes project. A name counts where one language alone writes it so. Every name is one sample,
as numbers of its characters; names of the same thing are in the same split, whatever their language. Two networks
read the same samples: an embedding with 1-D convolutions, and encoder blocks of a transformer.
"""

import gettext
from collections import defaultdict

import numpy as np
import torch
from torch import nn

from workflows.recipes.networks import Chain, convolutions
from workflows.recipes.recipe import Recipe, Samples, Splits, majority_class, run_recipes

LANGUAGES = ("de", "es", "fr", "hu", "it", "nl", "pl", "tr")
CATALOGUES = ("iso639-3", "iso3166-1", "iso3166-2", "iso4217", "iso15924")
LENGTH = 32
# 0 pads, 1 is any character that is rare.
CHARACTERS = "abcdefghijklmnopqrstuvwxyz '-.,()áàâäãåąćčçéèêëęěğíìîïıłńñóòôöõőøśšşúùûüűýźżžß"
NUM_TOKENS = len(CHARACTERS) + 2
WIDTH = 32


def encode(text: str) -> np.ndarray:
    """Returns the tokens of a text, int32 [LENGTH], cut or padded."""
    tokens = [CHARACTERS.find(character) + 2 or 1 for character in text.lower()[:LENGTH]]
    return np.array(tokens + [0] * (LENGTH - len(tokens)), dtype=np.int32)


def read_names() -> list[tuple[str, str, str]]:
    """Returns what each name is a name of, the name, and the one language that writes it so; sorted."""
    import pycountry

    databases = (pycountry.languages, pycountry.countries, pycountry.subdivisions)
    databases += (pycountry.currencies, pycountry.scripts)
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for catalogue, database in zip(CATALOGUES, databases, strict=True):
        things = sorted({entry.name for entry in database})
        for language in LANGUAGES:
            translate = gettext.translation(catalogue, pycountry.LOCALES_DIR, [language], fallback=True).gettext
            for thing in things:
                found[translate(thing)].add((thing, language if translate(thing) != thing else "en"))
    own = {name: next(iter(uses)) for name, uses in found.items() if len(uses) == 1}
    return sorted((thing, name, language) for name, (thing, language) in own.items() if language in LANGUAGES)


def load_names(rows: int, seed: int) -> Splits:
    """Draws as many names of every language, and splits them by what they are names of: 8, 1 and 1 tenths."""
    names = read_names()
    rng = np.random.default_rng(seed)
    things = sorted({thing for thing, _, _ in names})
    part = dict(zip(things, rng.choice(["train", "val", "test"], len(things), p=[0.8, 0.1, 0.1]), strict=True))
    chosen: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for split, share in {"train": rows, "val": rows // 4, "test": rows // 4}.items():
        for language in LANGUAGES:
            texts = [name for thing, name, other in names if other == language and part[thing] == split]
            picked = rng.permutation(len(texts))[: share // len(LANGUAGES)]
            chosen[split] += [(texts[i], language) for i in picked]
    return {split: _samples(pairs) for split, pairs in chosen.items()}


def _samples(pairs: list[tuple[str, str]]) -> Samples:
    return Samples(inputs=np.stack([encode(text) for text, _ in pairs]), labels=np.array([name for _, name in pairs]))


class Embed(nn.Module):
    """tokens_NL -> x_NCL: what the character is and, where wanted, where it stands."""

    def __init__(self, num_tokens: int, length: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(num_tokens, WIDTH)
        self.places_CL = nn.Parameter(torch.randn(WIDTH, length) * 0.1) if length else None

    def forward(self, tokens_NL: torch.Tensor) -> torch.Tensor:
        """Returns channels first."""
        x_NCL = self.characters(tokens_NL).transpose(1, 2)
        return x_NCL if self.places_CL is None else x_NCL + self.places_CL


class Encode(nn.Module):
    """x_NCL -> x_NCL: one encoder block; between layers channels are first, inside they are last."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)

    def forward(self, x_NCL: torch.Tensor) -> torch.Tensor:
        """Returns channels first."""
        return self.block(x_NCL.transpose(1, 2)).transpose(1, 2)


def convnet(num_tokens: int, num_outputs: int) -> nn.Module:
    """Builds an embedding and three 1-D convolutions."""
    return nn.Sequential(Embed(num_tokens, 0), *convolutions((WIDTH, LENGTH), (64, 64, 64), num_outputs))


def transformer(num_tokens: int, num_outputs: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Builds an embedding and three encoder blocks, which say themselves where they may be cut."""
    classifier = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(WIDTH, num_outputs))
    return Chain(Embed(num_tokens, input_shape[0]), Encode(), Encode(), Encode(), classifier)


RECIPES = {
    "convolutions": Recipe(
        load=load_names,
        rows=6400,
        model="workflows.recipes.text:convnet",
        budget="768KiB",
        settings={"data.num_tokens": NUM_TOKENS, "memory.max_batch_size": 64},
        baseline=majority_class,
    ),
    "transformer": Recipe(
        load=load_names,
        rows=6400,
        model="workflows.recipes.text:transformer",
        budget="640KiB",
        settings={"data.num_tokens": NUM_TOKENS, "memory.max_batch_size": 64, "train.lr": 0.2},
        baseline=majority_class,
    ),
}

if __name__ == "__main__":  # worker processes import this file again
    run_recipes(__doc__, RECIPES)
