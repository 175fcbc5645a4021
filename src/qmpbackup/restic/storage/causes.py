# SPDX-License-Identifier: Apache-2.0
"""What obstore's errors mean, in a clause and with what to do: it tells the cause in a dump of its own
structures, and in the first line little more than that a request failed.

Pure text, so that a new version of the library that words it otherwise costs clearness only.
"""

import re
from dataclasses import dataclass
from typing import Final

_KEYS: Final = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account.",
    "azure": "Set AZURE_ACCOUNT_KEY, or AZURE_ACCOUNT_SAS.",
}
_ADDRESS: Final = "Check the address and the port, and that the server runs."
_REGION: Final = "AWS_DEFAULT_REGION names the region of the bucket."

_STATUS: Final = re.compile(r"status code: ((\d{3})[ A-Za-z']*)")
_SYSTEM: Final = re.compile(r'message: "([^"\\]{1,100})"')
_NOISE: Final = re.compile(
    r"^(Generic \w+ error|Object at location .*? (not found|already exists)): "
    r"|Error performing .*? in [^ ]*s - "
)
_QUERY: Final = re.compile(r"(?<!<)\?\S+")
_LONGEST: Final = 300


@dataclass(frozen=True, slots=True)
class Cause:
    """A clause; what to do, if there is anything; whether it may pass by itself, and whether there is
    somebody who answers."""

    said: str
    hint: str = ""
    passes: bool = True
    answers: bool = True


DENIED: Final = Cause(
    "the store does not allow it", "Check the keys, and what they are allowed to do.", passes=False
)
_SIGNS: Final = (
    (
        "dns error",
        Cause(
            "its name leads nowhere",
            "Check the address, and this host's name server.",
            answers=False,
        ),
    ),
    ("kind: ConnectionRefused", Cause("nobody listens there", _ADDRESS, answers=False)),
    (
        "InvalidCertificate(",
        Cause("its certificate is not trusted", "Let this host trust who issued it.", passes=False),
    ),
    (
        "InvalidMessage(",
        Cause("it does not speak TLS", "Write http:// where a server has none.", passes=False),
    ),
    ("IncompleteMessage", Cause("it ended the connection", "A server with TLS wants https://.")),
    ("kind: Timeout", Cause("it does not answer in time", _ADDRESS, answers=False)),
    (
        "incorrectly configured region",
        Cause("it sends us elsewhere, as for a wrong region", _REGION, passes=False),
    ),
)

_SETTINGS: Final = (
    ("Missing SecretAccessKey", "AWS_SECRET_ACCESS_KEY is not set"),
    ("Missing AccessKeyId", "AWS_ACCESS_KEY_ID is not set"),
    ("Missing AccessKey", "AWS_ACCESS_KEY_ID is not set"),
    ("Account must be specified", "AZURE_ACCOUNT_NAME is not set"),
    ("Invalid Access Key", "AZURE_ACCOUNT_KEY is no key"),
    ("SAS query pair", "AZURE_ACCOUNT_SAS is no signature"),
    (
        "Unable to decode service account",
        "GOOGLE_APPLICATION_CREDENTIALS names no service account's file",
    ),
    (
        "Unable to open service account",
        "the file that GOOGLE_APPLICATION_CREDENTIALS names cannot be opened",
    ),
)


def cause(text: str, scheme: str) -> Cause:
    """What an error of the library says of a store whose location begins with `scheme`."""
    if asks_for_keys(text):
        return Cause("no keys are given, and this machine has none of its own", _KEYS[scheme])
    found = next((each for sign, each in _SIGNS if sign in text), None)
    if found is not None:
        return found
    answer = _STATUS.search(_first(text))
    if answer is not None and answer[2] in {"401", "403"}:
        return DENIED
    if answer is not None:
        hint = f"Check address and keys. {_REGION}" if answer[2] == "400" else ""
        return Cause(f"it answers {answer[1].strip()}", hint)
    system = _SYSTEM.search(text)
    return Cause(_lower(system[1]) if system else plain(text))


def setting(text: str) -> str:
    """What an error of the library says of a location or of the variables in the environment."""
    found = next((said for sign, said in _SETTINGS if sign in text), None)
    return found or _lower(plain(text))


def asks_for_keys(text: str) -> bool:
    """Whether it is not the store that failed, but a service of clouds that gives machines keys."""
    first = _first(text)
    return "://169.254." in first or "://metadata." in first


def plain(text: str) -> str:
    """What the library says, without what it shows for developers, without XML of an answer, and
    without what follows an address, where Azure's signatures are."""
    lines = _first(text).strip().splitlines()
    first = _NOISE.sub("", _QUERY.sub("?…", lines[0])) if lines else "it failed without a word"
    return first.partition(": <")[0][:_LONGEST].rstrip(".: ")


def _first(text: str) -> str:
    return text.partition("\n\nDebug source")[0]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
