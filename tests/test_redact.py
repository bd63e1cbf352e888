import pytest

from nf_pipeline.redact import holds_credentials, names_a_secret, redacted

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7",
    "AWS_SECRET_ACCESS_KEY": "AKIAIOSFODNN7/more",
    "RAY_AUTH_TOKEN_PATH": "/home/me/token",
    "PIN_TOKEN": "short",
    "HOME": "/home/me",
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key AKIAIOSFODNN7 refused", "key *** refused"),
        ("secret AKIAIOSFODNN7/more refused", "secret *** refused"),
        ("GET http://user:word@host/x failed", "GET http://***@host/x failed"),
        ("proxy 'https://user@host:3128'", "proxy 'https://***@host:3128'"),
        ("GET https://host/x?X-Amz-Signature=abc&a=1", "GET https://host/x?X-Amz-Signature=***&a=1"),
        ("x-amz-security-token=abc", "x-amz-security-token=***"),
        ("GET http://user:wo@rd@host/x failed", "GET http://***@host/x failed"),
        ("GET http://user:wo/rd@host/x failed", "GET http://***@host/x failed"),
        ("GET http://host:9000/x@y failed", "GET http://host:9000/x@y failed"),
        ("/home/me/token is no file", "/home/me/token is no file"),
        ("a short answer", "a short answer"),
        ("s3://bucket/x@y and me@host", "s3://bucket/x@y and me@host"),
    ],
)
def test_credentials_are_cut_out_and_everything_else_stays(text: str, shown: str) -> None:
    assert redacted(text, ENVIRONMENT) == shown


@pytest.mark.parametrize(
    ("uri", "holds"),
    [
        ("s3://key:secret@bucket/x", True),
        ("https://host/x?X-Amz-Signature=abc", True),
        ("s3://bucket/a@b", False),
        ("http://host:9000/a@b", False),
        ("https://key:se/cret@host", True),
        ("./folder@home", False),
        ("torchvision:CIFAR10:/data", False),
    ],
)
def test_uri_with_credentials_is_told_from_others(uri: str, holds: bool) -> None:
    assert holds_credentials(uri) is holds


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "PGPASSWORD", "DB_PWD", "WANDB_API_KEY"])
def test_variable_is_known_for_a_secret_by_its_name(name: str) -> None:
    assert names_a_secret(name)


@pytest.mark.parametrize(
    "name", ["HOME", "PWD", "RAY_AUTH_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE", "KEYBOARD", "MONKEY"]
)
def test_variable_that_only_points_at_a_secret_is_none(name: str) -> None:
    assert not names_a_secret(name)
