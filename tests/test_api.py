"""The names that scripts import, in any order."""

import subprocess
import sys

import pytest

import nf_pipeline


@pytest.mark.parametrize("first", nf_pipeline.__all__)
def test_every_public_name_is_what_it_says_whichever_is_used_first(first: str) -> None:
    script = (
        f"import nf_pipeline; nf_pipeline.{first}; nf_pipeline.train\n"
        "from nf_pipeline import RunConfig, load_early_exit_model, load_model, plan, resume, train\n"
        "functions = (load_early_exit_model, load_model, plan, resume, train)\n"
        "print(RunConfig.__name__, *(function.__name__ for function in functions))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    names = ["RunConfig", "load_early_exit_model", "load_model", "preview_plan", "resume", "train"]
    assert done.stdout.split() == names, done.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        nf_pipeline.trian  # noqa: B018
