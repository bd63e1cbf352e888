"""The main job against a real S3 server: same weights as in a folder, by either executor."""

from collections.abc import Callable

import pytest

from nf_pipeline import load_model
from nf_pipeline.config import RunConfig
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.status import read_status
from nf_pipeline.driver.use import predict
from nf_pipeline.errors import StorageError
from nf_pipeline.events import EpochDone, Event

pytestmark = pytest.mark.s3

MakeConfig = Callable[..., RunConfig]


@pytest.mark.ray
def test_run_on_s3_by_ray_ends_with_the_weights_of_a_local_inline_run(
    digits_config: MakeConfig, minio_uri: str, tmp_path: object
) -> None:
    local = train(digits_config())
    remote = train(digits_config(storage__uri=minio_uri, cluster__executor="ray"))
    assert remote["weights_checksum"] == local["weights_checksum"]
    assert [b["num_shards"] for b in remote["blocks"]] == [b["num_shards"] for b in local["blocks"]]
    uri = f"{minio_uri}/run"
    assert load_model(uri).card.test_accuracy == local["test_accuracy"]
    assert read_status(uri)["state"] == "done"
    assert predict(uri, "digits", f"{tmp_path}/out.parquet")["rows"] == 1797


def test_run_on_s3_stopped_in_a_block_resumes_to_the_same_weights(digits_config: MakeConfig, minio_uri: str) -> None:
    straight = train(digits_config())

    def stop(event: Event) -> None:
        if isinstance(event, EpochDone) and event.stage == "block-001":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(digits_config(storage__uri=minio_uri), on_event=stop)
    assert read_status(f"{minio_uri}/run")["state"] == "running"
    resumed = resume(f"{minio_uri}/run")
    assert resumed["weights_checksum"] == straight["weights_checksum"]
    removed = [item.key for item in collect_garbage(f"{minio_uri}/run", dry_run=False)]
    assert removed, "the stopped attempt left a checkpoint"
    assert resume(f"{minio_uri}/run")["weights_checksum"] == straight["weights_checksum"]


def test_missing_bucket_ends_with_a_storage_error_that_names_it(digits_config: MakeConfig, minio_uri: str) -> None:
    with pytest.raises(StorageError, match="no-such-bucket"):
        train(digits_config(storage__uri="s3://no-such-bucket/runs"))
