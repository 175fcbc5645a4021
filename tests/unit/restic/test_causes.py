# SPDX-License-Identifier: Apache-2.0
"""What object stores' library says, in words for users. The contract tests have the library say it."""

import pytest

from qmpbackup.restic.storage.causes import asks_for_keys, cause, plain

FAILED = "Generic S3 error: Error performing HEAD http://h/b/config in 9.7ms - "
SENDING = FAILED + "HTTP error: error sending request\n\nDebug source:\nGeneric {{ {} }}"
ANSWERED = FAILED + "Server returned non-2xx status code: {}"
METADATA = "Error performing GET http://169.254.169.254/token?audience=x in 1.0ms - "


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        (SENDING.format("kind: ConnectionRefused"), "nobody listens", "server runs"),
        (SENDING.format('"dns error", Custom'), "leads nowhere", "name server"),
        (SENDING.format("InvalidCertificate(UnknownIssuer)"), "not trusted", "issued"),
        (SENDING.format("InvalidMessage(InvalidContentType)"), "speak TLS", "http://"),
        (SENDING.format("kind: Timeout"), "not answer in time", "port"),
        (SENDING.format('message: "No route to host"'), "no route to host", ""),
        (SENDING.format("something new"), "error sending request", ""),
        (ANSWERED.format("400 Bad Request: <Error>\n</Error>"), "400 Bad Request", "REGION"),
        (ANSWERED.format("403 Forbidden: <Error>"), "does not allow", "keys"),
        (ANSWERED.format("503 Service Unavailable: "), "503 Service Unavailable", ""),
        (
            FAILED + "Received redirect without LOCATION, incorrectly configured region",
            "",
            "REGION",
        ),
        (f"Generic S3 error: {METADATA}HTTP error: x", "no keys", "AWS_SECRET"),
        (
            f"Generic S3 error: {METADATA}Server returned status code: 404 x",
            "no keys",
            "AWS_SECRET",
        ),
    ],
)
def test_a_clause_and_what_to_do(text: str, said: str, hint: str) -> None:
    found = cause(text, "s3")
    assert said in found.said
    assert hint in found.hint
    shown = found.said + found.hint
    for word in ("Generic", "performing", "9.7ms", "Debug", "<", "{"):
        assert word not in shown


def test_each_store_has_keys_of_its_own() -> None:
    text = f"Generic GCS error: Error performing token request: {METADATA}HTTP error"
    assert asks_for_keys(text)
    assert "GOOGLE_APPLICATION_CREDENTIALS" in cause(text, "gs").hint
    assert "AZURE_ACCOUNT_KEY" in cause(text, "azure").hint
    assert not asks_for_keys(FAILED)


@pytest.mark.parametrize("text", ["", "\n\nDebug source:", "x" * 10_000])
def test_anything_is_a_clause(text: str) -> None:
    assert 0 < len(cause(text, "s3").said) <= 300


def test_no_signature_is_shown() -> None:
    text = "Generic X error: Error performing GET https://h/c?sig=S3cret in 1s - HTTP error: h/c?sig=S3cret"
    assert "S3cret" not in plain(text) + cause(text, "azure").said
