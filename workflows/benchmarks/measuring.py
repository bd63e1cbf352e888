"""What the measuring scripts of this folder share: their common options, what they say of the machine, their files.

They import it by its plain name, as each is started as `python workflows/benchmarks/NAME.py`. Knows nothing of what
is measured. Entries: `make_parser`, `add_run_options`, `report`, `run_script`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nf_pipeline.bench.settings import short_name
from nf_pipeline.errors import NFError

PACKAGES = ("nf_pipeline", "torch", "pyarrow", "ray", "s3fs")


def make_parser(description: str, output: str = "") -> argparse.ArgumentParser:
    """Returns a parser with `--output`.

    Args:
        description: the script's docstring.
        output: default of `--output`; "" writes nothing unless asked to.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(output) if output else None
    parser.add_argument("--output", type=Path, default=default, help="JSON; the table goes beside it [%(default)s]")
    return parser


def add_run_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Adds the options of `nf-pipeline train` that scripts measure runs with.

    Args:
        parser: of the script.
        defaults: by option, such as `epochs=3`; options without one are left out, but for `--data`.
    """
    options: dict[str, dict[str, Any]] = {
        "data": {"help": "as for nf-pipeline train"},
        "model": {"help": "as for nf-pipeline train"},
        "max_train_images": {"type": int, "help": "train on a stratified, seeded subset"},
        "memory_budget": {"help": "what training may hold on a worker"},
        "epochs": {"type": int, "help": "per block"},
        "unit_layers": {"type": int, "help": "layers per unit; None lets the planner decide"},
        "num_threads": {"type": int, "help": "CPU threads"},
        "seeds": {"type": int, "help": "how many"},
    }
    for name, value in {"data": "digits", **defaults}.items():
        settings = options[name]
        flag, text = f"--{name.replace('_', '-')}", f"{settings['help']} [%(default)s]"
        parser.add_argument(flag, default=value, **{**settings, "help": text})


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds `--set`, for settings that have no option."""
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="any other setting")


def describe_machine() -> dict[str, Any]:
    """Returns the processor, the number of CPUs, the load of the last minute and the versions."""
    return {
        "processor": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def report(arguments: argparse.Namespace, table: str, results: dict[str, Any]) -> None:
    """Prints the table; writes results, settings and machine as JSON, and the table beside it as .md.

    Args:
        arguments: of the script; `output` says where to.
        table: Markdown.
        results: JSON document.
    """
    machine = describe_machine()
    print(table)
    if arguments.output is None:
        return
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "settings": {
            # Where the images lie is nobody else's business.
            name: short_name(str(value)) if name == "data" else str(value)
            for name, value in vars(arguments).items()
            if name != "output"
        },
        **results,
    }
    title = f"{Path(sys.argv[0]).name}, {document['date']}, {machine['num_cpus']} CPUs ({machine['processor']}), load"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf8")
    text = f"{title} {machine['load']} at the end\n\n{table}\n"
    arguments.output.with_suffix(".md").write_text(text, encoding="utf8")
    print(f"\n{arguments.output}", file=sys.stderr)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main function and ends the process: a documented error is a line and an exit code."""
    try:
        main()
    except NFError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
