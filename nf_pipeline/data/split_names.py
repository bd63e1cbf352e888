"""Which split a file or folder belongs to, by its name.

`train-00000-of-00005.parquet`, `data/validation.parquet`, `test/0001.parquet`: Hugging Face's conventions.
Entry: `split_of`.
"""

import re

from nf_pipeline.data.base import Split

_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def split_of(name: str) -> Split | None:
    """Returns the split that a relative path names, None if none.

    The file's own name decides before its folders, the innermost folder first; of a name, the first word.
    """
    for part in reversed(name.split("/")):
        word = re.split(r"[^a-z]", part.lower(), maxsplit=1)[0]
        if word in _WORDS:
            return _WORDS[word]
    return None
