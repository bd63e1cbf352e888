"""Coverage-guided fuzzing of the decoders of our own formats: `python tests/fuzz/decoders.py TARGET [FLAG...]`.

Targets: shards, manifest, sealed, plan, model, weights, events, images; flags are libFuzzer's. A target lets
documented errors pass and ends the process with everything else, leaving the input that did it. The number of
executions is printed at the end. `make fuzz` runs each for some time; without atheris this says so and ends well.
"""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SHARED_FLAGS = ("-rss_limit_mb=4096", "-timeout=20", "-max_len=8192")


def _targets() -> dict[str, tuple[Callable[[bytes], object], list[bytes]]]:
    """Returns each target's decoder and the seeds it starts from."""
    from documents import EVENTS, sample_manifest, small_plan
    from test_fuzz_images import SEEDS, decoded
    from test_fuzz_shards import GOOD, read
    from test_fuzz_weights import CARD, GOOD_WEIGHTS

    from nf_pipeline.core.tensor_file import read_tensors
    from nf_pipeline.documents import parse_json
    from nf_pipeline.driver.run_record import plan_of
    from nf_pipeline.driver.status import _event
    from nf_pipeline.model_files import ModelCard
    from nf_pipeline.storage.manifest import StageManifest
    from nf_pipeline.storage.sealed import seal, unseal

    def manifest(data: bytes) -> None:
        StageManifest.from_json(parse_json(data))

    def plan(data: bytes) -> None:
        document = parse_json(data)
        if isinstance(document, dict):
            plan_of(document, "store")

    def events(data: bytes) -> None:
        for line in data.splitlines():
            _event(line)

    def card(data: bytes) -> None:
        ModelCard.from_json(parse_json(data), "model.json")

    def as_bytes(document: object) -> bytes:
        return json.dumps(document).encode()

    plan_json = small_plan().to_json()
    return {
        "shards": (lambda data: read(data, 5), GOOD),
        "manifest": (manifest, [as_bytes(sample_manifest())]),
        "sealed": (unseal, [seal(sample_manifest())]),
        "plan": (plan, [as_bytes(plan_json)]),
        "model": (card, [as_bytes(CARD)]),
        "weights": (lambda data: read_tensors(data, "weights"), [GOOD_WEIGHTS]),
        "events": (events, [as_bytes(event.to_json()) for event in EVENTS]),
        "images": (lambda data: decoded(data, None), list(SEEDS.values())),
    }


def main(argv: list[str]) -> int:
    """Fuzzes one target until libFuzzer ends."""
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install '.[fuzz]'; the coverage-guided part is left out")  # noqa: T201
        return 0
    import atheris

    with atheris.instrument_imports(include=["nf_pipeline"]):
        targets = _targets()
    from nf_pipeline.errors import InternalError, NFError

    decode, seeds = targets[argv[1]]
    corpus = Path(tempfile.mkdtemp(prefix=f"nf-fuzz-{argv[1]}-"))
    for idx, seed in enumerate(seeds):
        (corpus / f"seed-{idx}").write_bytes(seed)

    def one_input(data: bytes) -> None:
        try:
            decode(data)
        except InternalError:
            raise
        except (NFError, ValueError):  # a ValueError is what documents say to their callers
            return

    atheris.Setup([argv[0], *SHARED_FLAGS, f"-artifact_prefix={corpus}/", *argv[2:], str(corpus)], one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv))
