# SPDX-License-Identifier: Apache-2.0
"""Whom a server behind TLS may be, and who we are to it: `RESTIC_CACERT` and `RESTIC_TLS_CLIENT_CERT`,
as restic takes them, and what it means when that is not enough."""

import ssl
from collections.abc import Mapping
from typing import Final, NoReturn

from qmpbackup.errors import StorageError, UsageError

_OURS: Final = (
    "RESTIC_TLS_CLIENT_CERT names a PEM file with a certificate that it accepts, and its key."
)

_ALERTS: Final = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a client certificate",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "it ends the TLS handshake, as for want of a client certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept the client certificate, or the want of one",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the client certificate has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "the client certificate has been revoked",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not accept the client certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it does not accept client certificates of this kind",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know who issued the client certificate",
    "TLSV1_ALERT_ACCESS_DENIED": "it does not let the owner of the client certificate in",
}
"""What a server says before it ends a connection, in OpenSSL's words; trying again will not help."""


def trust(environment: Mapping[str, str]) -> ssl.SSLContext:
    """The certificates of the machine, or in their place those in the files of `RESTIC_CACERT`; and
    the certificate with which we show who we are, where `RESTIC_TLS_CLIENT_CERT` names one.

    Raises:
        UsageError: a file cannot be used.
    """
    files = [file for file in environment.get("RESTIC_CACERT", "").split(",") if file]
    context = ssl.create_default_context(cafile=None) if not files else _trusting(files)
    if own := environment.get("RESTIC_TLS_CLIENT_CERT"):
        _show(context, own)
    return context


def _trusting(files: list[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for file in files:
        try:
            context.load_verify_locations(cafile=file)
        except OSError as error:
            raise UsageError(
                f"RESTIC_CACERT: {file} cannot be used: {_why(error)}.", "Name a PEM file."
            ) from error
    return context


def _show(context: ssl.SSLContext, file: str) -> None:
    try:
        context.load_cert_chain(file, password=_locked)
    except _Locked:
        raise UsageError(
            f"RESTIC_TLS_CLIENT_CERT: the key in {file} is locked with a password.",
            "Write it without one: `openssl pkey -in FILE`; restic needs that, too.",
        ) from None
    except OSError as error:
        raise UsageError(
            f"RESTIC_TLS_CLIENT_CERT: {file} cannot be used: {_why(error)}.",
            "Name a PEM file that holds a certificate and its private key.",
        ) from error


class _Locked(Exception):
    """A key is locked with a password."""


def _locked() -> NoReturn:
    """In place of OpenSSL's question on the terminal."""
    raise _Locked


def _why(error: OSError) -> str:
    """OpenSSL's reasons for a file that holds something else are of use to nobody."""
    if isinstance(error, ssl.SSLError):
        is_mismatch = error.reason == "KEY_VALUES_MISMATCH"
        return "its key is that of another certificate" if is_mismatch else "it holds no such thing"
    return error.strerror or str(error)


def refusal(cannot: str, error: Exception) -> StorageError | None:
    """What a failure of TLS means, where it is one that lasts."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return StorageError(
            f"{cannot}: its certificate is not trusted ({error.verify_message}).",
            "RESTIC_CACERT names a file with the certificate to trust.",
        )
    said = _ALERTS.get(error.reason or "") if isinstance(error, ssl.SSLError) else None
    return StorageError(f"{cannot}: {said}.", _OURS) if said else None


def words_for_restic(environment: Mapping[str, str]) -> list[str]:
    """The same as options: restic reads these two variables only since 0.16."""
    words = {"--cacert": "RESTIC_CACERT", "--tls-client-cert": "RESTIC_TLS_CLIENT_CERT"}
    return [f"{word}={environment[name]}" for word, name in words.items() if environment.get(name)]
