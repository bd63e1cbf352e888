"""A stored run may name a model factory; importing it runs code, so the user must name it too.

Whoever can write to the store could otherwise choose which module a reader imports. Entry: `confirm_factory`.
"""

from nf_pipeline.errors import ConfigError


def confirm_factory(recorded: str | None, named: str | None) -> None:
    """Accepts registry names, and a factory only if the user gave the same one.

    Args:
        recorded: model name as stored with the run.
        named: what the user gave with `--model` or `model=`; None if nothing.

    Raises:
        ConfigError: the run names a factory that the user did not.
    """
    if recorded is None or ":" not in recorded or recorded == named:
        return
    raise ConfigError(
        f"the run's model is the factory {recorded!r}, which is code; it is imported only if you name it too, "
        f"got {named!r}",
        f"--model {recorded} (model={recorded!r} in Python), if that is your code",
    )
