import os
from pathlib import Path

import pytest

from storage.credentials import aws_profile
from storage.errors import ConfigError
from storage.remote import RemoteStore

CREDENTIALS = """[default]
aws_access_key_id = AKIADEFAULT
aws_secret_access_key = default-secret
[work]
aws_access_key_id = AKIAWORK
aws_secret_access_key = work-secret
aws_session_token = work-token
"""
CONFIG = """[default]
region = eu-west-1
[profile work]
region = eu-central-1
endpoint_url = http://127.0.0.1:9
output = json
"""


@pytest.fixture(autouse=True)
def profile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(CREDENTIALS)
    (tmp_path / "config").write_text(CONFIG)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


def test_the_default_profile_is_read_from_both_files():
    assert aws_profile() == {
        "access_key_id": "AKIADEFAULT", "secret_access_key": "default-secret", "region": "eu-west-1",
    }  # fmt: skip


def test_a_named_profile_is_read_with_its_token_and_endpoint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert aws_profile() == {
        "access_key_id": "AKIAWORK", "secret_access_key": "work-secret", "session_token": "work-token",
        "region": "eu-central-1", "endpoint": "http://127.0.0.1:9",
    }  # fmt: skip
    assert RemoteStore("s3://bucket/x").shown == "s3://bucket/x"


def test_the_environment_goes_before_the_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAENV")
    monkeypatch.setenv("AWS_REGION", "us-east-2")
    assert aws_profile() == {}


def test_a_profile_that_is_nowhere_and_a_file_that_is_none_are_told_without_their_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_PROFILE", "missing")
    with pytest.raises(ConfigError, match="no such AWS profile"):
        RemoteStore("s3://bucket/x")
    (tmp_path / "credentials").write_text("aws_secret_access_key = leaked-secret")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        RemoteStore("s3://bucket/x")
    assert "leaked" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_without_files_there_is_nothing_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    assert aws_profile() == {}
