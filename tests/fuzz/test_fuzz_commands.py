"""Whatever is typed, the command line ends with a documented exit code and a text: usage, or what to fix."""

import contextlib
import io
import os
from pathlib import Path

import click
import pytest
from cases import ALLOWED_EXIT_CODES, fuzz, tried
from hypothesis import strategies as st
from junk import ODD_TEXTS

from nf_pipeline.cli import main
from nf_pipeline.cli.app import command_line

# What an operating system can pass: no NUL, and no surrogates but those that stand for bytes.
TYPED = [text for text in ODD_TEXTS if "\0" not in text and "\ud800" not in text and len(text) < 9000]
NEVER = {"submit", "doctor"}  # they ask a cluster, and look at this machine
COMMANDS = sorted(set(command_line.commands) - NEVER)
# The last one counts: no cluster is started, and nothing is trained.
LAST = {
    "plan": ("--executor", "inline"),
    "resume": ("--executor", "inline"),
    "train": ("--executor", "inline", "--data", "./absent"),
}

values = st.one_of(
    st.sampled_from(TYPED), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with some of its own options, values of any kind, and perhaps too much or too little."""
    name = draw(st.sampled_from(COMMANDS))
    argv = [name]
    for parameter in command_line.commands[name].params:
        if isinstance(parameter, click.Argument):
            argv += [draw(values.filter(lambda text: text.strip("/.~ ")))] * draw(st.sampled_from([1, 1, 1, 1, 0, 2]))
        elif (parameter.required and draw(st.integers(0, 9))) or draw(st.integers(0, 5)) == 0:
            flag = draw(st.sampled_from(parameter.opts))
            argv += [flag] if getattr(parameter, "is_flag", False) else [flag, draw(_value_of(parameter))]
    return argv + draw(st.lists(values, max_size=1)) if draw(st.integers(0, 9)) == 0 else argv


def _value_of(parameter: click.Parameter) -> st.SearchStrategy[str]:
    kind = parameter.type
    likely = list(kind.choices) if isinstance(kind, click.Choice) else ["1", "2", "0", "-1", "1MiB", "nan"]
    if parameter.name in ("data", "data_source"):
        return values.filter(lambda text: bool(text.strip("/.~ ")))
    return st.one_of(st.sampled_from([str(choice) for choice in likely]), values)


@fuzz("commands: argv", quick=250, thorough=2_000, argv=command_lines())
def test_fuzz_command_of_any_words_ends_with_a_documented_code(argv: list[str], _folder: Path) -> None:
    code, text = typed(argv, _folder)
    assert code in ALLOWED_EXIT_CODES, (code, text)
    assert "Internal error" not in text and ("Traceback" not in text or "--debug" in argv)
    if code:
        assert any(word in text for word in ("Fix:", "Usage:", "Error:")), text


@pytest.fixture(scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


def typed(argv: list[str], folder: Path) -> tuple[int, str]:
    """Runs a command in a folder; returns its exit code and what it printed on stderr."""
    out, err = io.StringIO(), io.StringIO()
    here = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return main([*argv, *LAST.get(argv[0], ())]), err.getvalue()
    finally:
        os.chdir(here)


@pytest.mark.parametrize("command", [*sorted(command_line.commands), "", "nothing", "--nothing", "-"])
def test_command_without_its_arguments_shows_how_it_is_used(command: str, tmp_path: Path) -> None:
    if command in ("doctor", "worker-resources", "submit"):
        pytest.skip("works without arguments")
    tried("commands: no arguments")
    code, text = typed([command], tmp_path)
    assert code == 2 and ("Usage:" in text or "Fix:" in text)
