"""A stored run may name a model factory; importing it runs code, so the user must name it too.

Whoever can write to the store could otherwise choose which module a reader imports. Entry: `confirm_factory`.
"""

from nf_pipeline.errors import ConfigError

MODEL_LIBRARIES = ("torchvision", "timm")
"""`LIBRARY:NAME` picks from a library's own list of models; nothing else can be imported or called by it."""


def is_factory(name: str) -> bool:
    """Whether a model's name is a `package.module:factory`: code of the user's choice."""
    source, colon, _ = name.partition(":")
    return bool(colon) and source not in MODEL_LIBRARIES


def confirm_factory(recorded: str | None, named: str | None) -> None:
    """Accepts names of the registry and of libraries, and a factory only if the user gave the same one.

    Args:
        recorded: model name as stored with the run.
        named: what the user gave with `--model` or `model=`; None if nothing.

    Raises:
        ConfigError: the run names a factory that the user did not.
    """
    if recorded is None or not is_factory(recorded) or recorded == named:
        return
    raise ConfigError(
        f"the run's model is the factory {recorded!r}, which is code; it is imported only if you name it too, "
        f"got {named!r}",
        f"--model {recorded} (model={recorded!r} in Python), if that is your code",
    )
