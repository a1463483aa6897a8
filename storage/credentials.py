"""Credentials of S3 from the files that its own tools keep, where the environment has none.

obstore reads the environment by itself, and of Google and Azure also their tools' files; of S3 it does not. Read here
are ``~/.aws/credentials`` and ``~/.aws/config`` (or where AWS_SHARED_CREDENTIALS_FILE and AWS_CONFIG_FILE say), the
profile AWS_PROFILE or ``default``. Rejected: boto3's own provider (a package of 100 MB for an ini file); single
sign-on and assumed roles need it, and can be had as environment variables from 'aws configure export-credentials'.
"""

import configparser
import os
from pathlib import Path

from storage.errors import ConfigError

_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}


def aws_profile() -> dict[str, str]:
    """Settings of obstore from the profile's files; what the environment sets is left to it.

    Raises:
        ConfigError: a file is no ini file, or AWS_PROFILE names a profile that is in neither.
    """
    profile = os.environ.get("AWS_PROFILE", "default")
    found: dict[str, str] = {}
    sections = ((_read("AWS_CONFIG_FILE", "config"), f"profile {profile}" if profile != "default" else profile),
                (_read("AWS_SHARED_CREDENTIALS_FILE", "credentials"), profile))  # fmt: skip
    there = [file[name] for file, name in sections if file.has_section(name)]
    if not there and "AWS_PROFILE" in os.environ:
        raise ConfigError("no such AWS profile", found=profile, expected="one of ~/.aws/config or ~/.aws/credentials")
    for section in there:
        found |= {ours: section[theirs] for theirs, ours in _KEYS.items() if theirs in section}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        found = {name: value for name, value in found.items() if name in ("region", "endpoint")}
    if os.environ.keys() & {"AWS_REGION", "AWS_DEFAULT_REGION"}:
        found.pop("region", None)
    if os.environ.keys() & {"AWS_ENDPOINT_URL", "AWS_ENDPOINT"}:
        found.pop("endpoint", None)
    return found


def _read(variable: str, name: str) -> configparser.RawConfigParser:
    path = Path(os.environ.get(variable) or Path.home() / ".aws" / name)
    parser = configparser.RawConfigParser()
    try:
        parser.read(path)
    except (configparser.Error, UnicodeDecodeError):  # whose message would quote a line of the file
        raise ConfigError("the AWS profile file cannot be read", where=path, expected="an ini file") from None
    return parser
