"""Splitting STORE/NAME: pure text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.errors import ConfigError
from nf_pipeline.run_uri import join_run_uri, split_run_uri


@pytest.mark.parametrize(
    ("uri", "store", "name"),
    [
        ("./nf-runs/run", "./nf-runs", "run"),
        ("./nf-runs/run/", "./nf-runs", "run"),
        ("nf-runs//run", "nf-runs", "run"),
        ("./run", ".", "run"),
        ("../runs/a.b-c_1", "../runs", "a.b-c_1"),
        ("/run", "/", "run"),
        ("/data/run", "/data", "run"),
        ("file:///data/run", "file:///data", "run"),
        ("file:///run", "file:///", "run"),
        ("s3://bucket/run", "s3://bucket", "run"),
        ("s3://bucket/prefix/deep/run", "s3://bucket/prefix/deep", "run"),
    ],
)
def test_split_run_uri_takes_the_last_part_as_the_name(uri: str, store: str, name: str) -> None:
    assert split_run_uri(uri) == (store, name)


def test_split_run_uri_of_a_bare_name_means_the_default_store() -> None:
    assert split_run_uri("run") == ("./nf-runs", "run")


@pytest.mark.parametrize("uri", ["", "/", ".", "..", "runs/..", "s3://", "s3://bucket", "s3:///run", "runs/a b"])
def test_split_run_uri_without_a_usable_name_is_refused_with_an_example(uri: str) -> None:
    with pytest.raises(ConfigError, match="STORE/NAME") as caught:
        split_run_uri(uri)
    assert repr(uri) in str(caught.value)


_parts = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True)


@given(
    scheme=st.sampled_from(["", "/", "./", "file:///", "s3://"]),
    folders=st.lists(_parts, min_size=1, max_size=3),
    name=_parts,
)
def test_split_run_uri_undoes_join_run_uri(scheme: str, folders: list[str], name: str) -> None:
    store = scheme + "/".join(folders)
    assert split_run_uri(join_run_uri(store, name)) == (store, name)


@pytest.mark.parametrize("store", ["/", "file:///", "s3://bucket"])
def test_join_run_uri_keeps_roots_apart(store: str) -> None:
    assert split_run_uri(join_run_uri(store, "run")) == (store, "run")
