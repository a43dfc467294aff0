"""What gRPC says of handshakes becomes reasons; what others say on standard error is passed on."""

import os

import psutil
import pytest

from dfl_lora.networks.refused_handshakes import LONGEST_LINE, Listening

SAID = (
    "I1122 23:07:26.274524   17174 ssl_transport_security.cc:1885] Handshake failed with error SSL_ERROR_SSL: "
    "error:1000007d:SSL routines:OPENSSL_internal:{code}\n"
)
REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "without a certificate",
    "CERTIFICATE_VERIFY_FAILED: self-signed certificate": "not in the roster",
    "CERTIFICATE_VERIFY_FAILED: certificate has expired": "expired",
    "NO_SHARED_CIPHER": "TLS 1.2",
    "UNSUPPORTED_PROTOCOL": "TLS 1.1",
    "HTTP_REQUEST": "without TLS",
    "WRONG_VERSION_NUMBER": "without TLS",
    "SOMETHING_NEW": "with whom TLS failed (something new)",
}


@pytest.mark.parametrize(("code", "reason"), REASONS.items())
def test_a_failed_handshake_is_told_once_for_each_reason_and_counted(
    code: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    with Listening(told.append) as listening:
        for _ in range(3):
            os.write(2, SAID.format(code=code).encode())
    assert len(told) == 1 and reason in told[0]
    assert listening.counts == {told[0]: 3}
    assert capfd.readouterr().err == ""


def test_lines_of_others_are_passed_on_as_they_are_and_other_lines_of_grpc_are_not(
    capfd: pytest.CaptureFixture[str],
) -> None:
    long = "x" * (3 * LONGEST_LINE)
    with Listening(lambda why: pytest.fail(why)):
        os.write(2, b"I1122 23:07:26.274524   17174 chttp2_transport.cc:1403] Got goaway\n")
        os.write(2, b"A warning,\nin two lines\n")
        os.write(2, long.encode())
        os.write(2, b"\nand no end")
    assert capfd.readouterr().err == f"A warning,\nin two lines\n{long}\nand no end"


def test_after_it_standard_error_is_what_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = psutil.Process().num_fds()
    for _ in range(5):
        with Listening(lambda why: None):
            pass
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"
    assert psutil.Process().num_fds() == before
