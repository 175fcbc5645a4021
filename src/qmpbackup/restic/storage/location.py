# SPDX-License-Identifier: Apache-2.0
"""Locations in restic's words, and the storage at each (restic, doc/030_preparing_a_new_repo.rst).

Secrets come from the environment, under the names that restic reads. Messages and names of storages
hold none of them.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from qmpbackup.errors import UsageError
from qmpbackup.restic.storage.causes import setting
from qmpbackup.restic.storage.interface import Storage
from qmpbackup.restic.storage.local import LocalStorage
from qmpbackup.restic.storage.wrappers import Limited, Logged, Retrying

Environment = Mapping[str, str]

AT_ONCE: Final = 8
"""Operations that a server is asked for at once."""

_OTHERS: Final = ("sftp", "rclone", "b2", "swift")
_WEB: Final = ("http", "https")
_AWS_HOST = re.compile(r"s3[.-](?P<region>[a-z0-9-]+)\.amazonaws\.com")
_HINT: Final = "It is a path, or begins with rest:, s3:, gs: or azure:, as in restic."


def connect(location: str, environment: Environment) -> Storage:
    """The storage at a location; an empty one means `RESTIC_REPOSITORY` or what is in the file of
    `RESTIC_REPOSITORY_FILE`. Failures that may pass are tried again, and everything is logged.

    Raises:
        UsageError: the location is none, or of a kind that is not known here.
    """
    text = location or _from(environment)
    scheme, colon, rest = text.partition(":")
    if colon and scheme in _OTHERS:
        raise UsageError(
            f"qmpbackup cannot use locations that begin with {scheme}:.",
            "`rclone serve restic` reaches them as rest:http://127.0.0.1:PORT/.",
        )
    if not colon or scheme == "local" or scheme.startswith((".", "/")):
        path = rest if scheme == "local" else text
        if not path:
            raise UsageError("The location of the repository is empty.", _HINT)
        return Logged(LocalStorage(Path(path)))
    if scheme not in _MAKERS:
        raise UsageError(f"qmpbackup cannot use locations that begin with {scheme}:.", _HINT)
    return Retrying(Limited(Logged(_MAKERS[scheme](rest, environment)), AT_ONCE))


def is_remote(text: str) -> bool:
    """Whether a text reads like the location of a server, known here or not, or like its address."""
    scheme, colon, _ = text.partition(":")
    return bool(colon) and scheme in {*_MAKERS, *_OTHERS, *_WEB}


def _from(environment: Environment) -> str:
    named, file = environment.get("RESTIC_REPOSITORY"), environment.get("RESTIC_REPOSITORY_FILE")
    if named and file:
        raise UsageError("RESTIC_REPOSITORY and RESTIC_REPOSITORY_FILE are both set.", "Unset one.")
    if file:
        try:
            named = Path(file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"Cannot read RESTIC_REPOSITORY_FILE {file}: {error}.") from error
    if not named:
        raise UsageError(
            "There is no location behind restic:.", "Name one, or set RESTIC_REPOSITORY."
        )
    return named


def _rest(text: str, environment: Environment) -> Storage:
    from qmpbackup.restic.storage.rest import RestStorage

    return RestStorage(text, environment)


def _s3(text: str, environment: Environment) -> Storage:
    """`https://host:port/bucket/prefix`, or without the scheme."""
    if not text.startswith(("http://", "https://")):
        text = f"https://{text.removeprefix('//')}"
    wrong = UsageError(
        "The location behind s3: is not valid.",
        "It reads like s3:https://host/bucket/prefix; keys are in AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY.",
    )
    try:
        parts = urlsplit(text)
        usable = parts.hostname and not parts.username and parts.port != 0
    except ValueError:
        raise wrong from None  # the cause may show what stands before an @
    bucket, _, prefix = _clean(parts.path).partition("/")
    if not usable or not bucket or not parts.hostname:
        raise wrong
    from obstore.store import S3Store

    from qmpbackup.restic.storage.objects import ObjectStorage

    keys = _aws_keys(environment)
    known = _AWS_HOST.fullmatch(parts.hostname)
    region = environment.get("AWS_DEFAULT_REGION") or environment.get("AWS_REGION")
    options: Any = {
        "endpoint": f"{parts.scheme}://{parts.netloc}",
        "region": region or (known["region"] if known else "us-east-1"),
        **keys,
    }
    with _explained("s3"):
        store = S3Store(
            bucket,
            prefix=prefix or None,
            virtual_hosted_style_request=False,
            client_options=_client(parts.scheme),
            retry_config=_ONCE,
            config=options,
        )
    where = "/".join(filter(None, (bucket, prefix)))
    return ObjectStorage(store, f"s3:{parts.scheme}://{parts.netloc}/{where}")


def _aws_keys(environment: Environment) -> dict[str, str]:
    """From the environment, else from the file that AWS's own tools use."""
    names = {
        "access_key_id": "AWS_ACCESS_KEY_ID",
        "secret_access_key": "AWS_SECRET_ACCESS_KEY",
        "session_token": "AWS_SESSION_TOKEN",
    }
    found = {ours: environment[theirs] for ours, theirs in names.items() if environment.get(theirs)}
    if found:
        return found
    import configparser

    home = environment.get("HOME", "")
    path = environment.get("AWS_SHARED_CREDENTIALS_FILE") or f"{home}/.aws/credentials"
    file = configparser.ConfigParser(interpolation=None)
    try:
        file.read(path)
    except (configparser.Error, OSError, UnicodeDecodeError):
        return {}
    profile = environment.get("AWS_PROFILE") or "default"
    section = file[profile] if file.has_section(profile) else {}
    return {
        ours: section[theirs.lower()] for ours, theirs in names.items() if theirs.lower() in section
    }


def _gs(text: str, environment: Environment) -> Storage:
    bucket, prefix = _bucket(text, "gs:bucket:/prefix")
    from obstore.store import GCSStore

    from qmpbackup.restic.storage.objects import ObjectStorage

    options: Any = {}
    if token := environment.get("GOOGLE_ACCESS_TOKEN"):
        options["credential_provider"] = lambda: {"token": token, "expires_at": None}
    elif file := environment.get("GOOGLE_APPLICATION_CREDENTIALS"):
        options["config"] = {"application_credentials": file}
    with _explained("gs"):
        store = GCSStore(
            bucket,
            prefix=prefix or None,
            client_options=_client("https"),
            retry_config=_ONCE,
            **options,
        )
    return ObjectStorage(store, f"gs:{bucket}:/{prefix}")


def _azure(text: str, environment: Environment) -> Storage:
    container, prefix = _bucket(text, "azure:container:/prefix")
    from obstore.store import AzureStore

    from qmpbackup.restic.storage.objects import ObjectStorage

    names = {
        "account_name": "AZURE_ACCOUNT_NAME",
        "account_key": "AZURE_ACCOUNT_KEY",
        "sas_key": "AZURE_ACCOUNT_SAS",
    }
    options: Any = {
        ours: environment[theirs] for ours, theirs in names.items() if environment.get(theirs)
    }
    suffix = environment.get("AZURE_ENDPOINT_SUFFIX")
    if suffix and "account_name" in options:
        options["endpoint"] = f"https://{options['account_name']}.blob.{suffix}"
    with _explained("azure"):
        store = AzureStore(
            container,
            prefix=prefix or None,
            client_options=_client("https"),
            retry_config=_ONCE,
            config=options,
        )
    return ObjectStorage(store, f"azure:{container}:/{prefix}")


_MAKERS: Final = {"rest": _rest, "s3": _s3, "gs": _gs, "azure": _azure}


def _bucket(text: str, example: str) -> tuple[str, str]:
    bucket, colon, path = text.partition(":")
    if not bucket or not colon:
        kind = example.partition(":")[0]
        raise UsageError(f"The location {kind}:{text} is not valid.", f"It reads like {example}.")
    return bucket, _clean(path)


def _clean(path: str) -> str:
    """A path without slashes at its ends, and without `.` and `..`."""
    return posixpath.normpath(f"/{path}").strip("/")


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    """What the library has against a location or against its variables."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        raise UsageError(
            f"The location behind {kind}: cannot be used: {setting(str(error))}.",
            "Check it, and the variables of the store in the environment.",
        ) from None


_ONCE: Final[Any] = {"max_retries": 0}
"""Trying again is done in one place, see `Retrying`."""


def _client(scheme: str) -> Any:
    return {"allow_http": scheme == "http", "timeout": "120s", "connect_timeout": "10s"}
