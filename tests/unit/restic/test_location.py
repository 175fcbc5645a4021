# SPDX-License-Identifier: Apache-2.0
"""Locations in restic's words: where they lead, what is refused, and that secrets stay secret."""

import traceback
from pathlib import Path

import pytest

from qmpbackup.errors import UsageError
from qmpbackup.restic.storage.location import connect

SECRET = "V3ryS3cret"  # noqa: S105 - of nobody
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AZURE_ACCOUNT_NAME": "account",
    "AZURE_ACCOUNT_SAS": f"sv=2024&sig={SECRET}",
    "GOOGLE_ACCESS_TOKEN": SECRET,
    "RESTIC_REST_PASSWORD": SECRET,
}


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("/a b/c", "/a b/c"),
        ("relative", "relative"),
        ("./a:b", "a:b"),
        ("local:x:y", "x:y"),
        ("rest:http://host", "rest:http://host/"),
        ("rest:https://host:8000/a/b", "rest:https://host:8000/a/b/"),
        ("rest:http://[::1]:8000/", "rest:http://[::1]:8000/"),
        ("rest:http://host/mine and ü", "rest:http://host/mine%20and%20%C3%BC/"),
        ("rest:http://host/a%2Fb/", "rest:http://host/a%2Fb/"),
        (f"rest:https://me:{SECRET}@host/", "rest:https://me:***@host/"),
        ("s3:host/bucket", "s3:https://host/bucket"),
        ("s3://host/bucket/", "s3:https://host/bucket"),
        ("s3:http://host:9000/bucket/a//b/../c/", "s3:http://host:9000/bucket/a/c"),
        ("gs:bucket:/", "gs:bucket:/"),
        ("gs:bucket:/some/prefix/", "gs:bucket:/some/prefix"),
        ("azure:container:/prefix", "azure:container:/prefix"),
    ],
)
def test_where_a_location_leads(location: str, name: str) -> None:
    with connect(location, ENVIRONMENT) as storage:
        assert storage.name == name
        assert SECRET not in repr(storage)


@pytest.mark.parametrize("kind", ["sftp", "rclone", "b2", "swift"])
def test_what_rclone_reaches(kind: str) -> None:
    with pytest.raises(UsageError, match="rclone serve restic"):
        connect(f"{kind}:there", {})


@pytest.mark.parametrize(
    "location",
    [
        "other:there",
        "local:",
        "rest:",
        "rest:host/path",
        "rest:ftp://host/",
        f"rest:http://me:{SECRET}@[::1/",
        f"rest:http://me:{SECRET}@host:99999/",
        f"rest:http://me:{SECRET}@h\u2100st/",
        "s3:",
        "s3:host",
        "s3:http://host//",
        f"s3:https://id:{SECRET}@host/bucket",
        f"s3:https://id:{SECRET}@[::1/bucket",
        "s3:http://host:port/bucket",
        "gs:",
        "gs:bucket",
        "gs::/prefix",
        "azure:container",
    ],
)
def test_what_is_no_location(location: str) -> None:
    with pytest.raises(UsageError) as raised:
        connect(location, ENVIRONMENT)
    assert raised.value.hint
    assert SECRET not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    ("location", "environment"),
    [
        ("azure:container:/", {}),
        ("azure:container:/", {"AZURE_ACCOUNT_NAME": "a", "AZURE_ACCOUNT_KEY": f"no {SECRET}"}),
        ("azure:container:/", {"AZURE_ACCOUNT_NAME": "a", "AZURE_ACCOUNT_SAS": SECRET}),
        ("gs:bucket:/", {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere"}),
        ("rest:https://host/", {"RESTIC_CACERT": "/nowhere"}),
        ("rest:https://host/", {"RESTIC_CACERT": __file__}),
    ],
)
def test_variables_that_cannot_be_used(location: str, environment: dict[str, str]) -> None:
    with pytest.raises(UsageError) as raised:
        connect(location, environment)
    assert SECRET not in "".join(traceback.format_exception(raised.value))


def test_the_location_in_the_environment(tmp_path: Path) -> None:
    assert connect("", {"RESTIC_REPOSITORY": "/here"}).name == "/here"
    assert connect("/given", {"RESTIC_REPOSITORY": "/here"}).name == "/given"
    file = tmp_path / "file"
    file.write_text("\n/in a file \n")
    assert connect("", {"RESTIC_REPOSITORY_FILE": str(file)}).name == "/in a file"
    for wrong in (
        {},
        {"RESTIC_REPOSITORY_FILE": str(tmp_path / "none")},
        {"RESTIC_REPOSITORY": "/here", "RESTIC_REPOSITORY_FILE": str(file)},
    ):
        with pytest.raises(UsageError):
            connect("", wrong)
