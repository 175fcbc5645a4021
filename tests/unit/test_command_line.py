# SPDX-License-Identifier: Apache-2.0
"""The recorded command line of a VM: every argument in its place, and no secret that has a name."""

import subprocess
import sys

import pytest

from qmpbackup.machine.command_line import masked, of_process

WHOLE = {
    "-object": [
        "secret,id=s,data=HIDDEN",
        "secret,id=s,format=raw,data=HIDDEN,,HIDDEN words",
        '{"qom-type": "secret", "data": "HIDDEN\\"HIDDEN"}',
        "{'qom-type': 'secret', 'data': 'HIDDEN'}",
        '{"qom-type":"x","PASSWORD":12345678}',
        "x,PASSWORD=HIDDEN",
    ],
    "-drive": [
        "file=https://h/x?sig=HIDDEN&se=2030,format=raw",
        "file=https://h/x?a=1&X-Amz-Signature=HIDDEN,format=raw",
        "file=rbd:pool/img:id=admin:key=HIDDEN",
        "file.driver=https,file.url=https://me:HID@DEN@h/x,file.cookie=HIDDEN",
        'file=json:{"driver":"https","url":"https://h/x?sig=HIDDEN","accessKey":"HIDDEN"}',
    ],
    "-fw_cfg": ["name=opt/x,string=HIDDEN"],
    "-smbios": ["type=1,serial=HIDDEN", "type=11,value=HIDDEN", "type=3,asset=HIDDEN,sku=HIDDEN"],
    "-append": ["root=/dev/vda api_key=HIDDEN pw=HIDDEN quiet", "x.Auth='HIDDEN HIDDEN' quiet"],
    "-set": ["object.s0.data=HIDDEN"],
    "-device": ["x,api_key=HIDDEN", "x,client-secret-token=HIDDEN", "x,pw=HIDDEN"],
}

KEPT = [
    ("-drive", "file=/x,encrypt.key-secret=sec0,format=qcow2"),
    ("-drive", "file.driver=https,file.password-secret=sec0"),
    ("-netdev", "user,id=n0,tls-creds=tls0"),
    ("-device", "virtio-blk-pci,drive=d,serial=S123,id=data"),
    ("-blockdev", '{"driver":"qcow2","node-name":"data","key-secret":"sec0","data-file":"f0"}'),
    ("-blockdev", "driver=qcow2,node-name=n,data-file.driver=file,data-file.filename=/x"),
    ("-append", "root=/dev/vda quiet"),
]


@pytest.mark.parametrize(
    ("option", "word"), [(option, word) for option, words in WHOLE.items() for word in words]
)
def test_what_is_called_a_secret_is_masked(option: str, word: str) -> None:
    first, shown = masked([option, word])
    assert first == option
    assert "HID" not in shown
    assert "DEN" not in shown
    assert "12345678" not in shown
    assert "***" in shown


@pytest.mark.parametrize(("option", "word"), KEPT)
def test_what_starts_the_vm_again_is_kept(option: str, word: str) -> None:
    assert list(masked([option, word])) == [option, word]


def test_a_parameter_beside_a_secret_is_kept() -> None:
    words = ["-append", "root=/dev/vda pw=x quiet", "-drive", "file=https://h/?sig=x,format=raw"]
    _, kernel, _, drive = masked(words)
    assert kernel == "root=/dev/vda pw=*** quiet"
    assert drive == "file=https://h/?sig=***,format=raw"


def test_every_argument_is_in_its_place() -> None:
    arguments = [sys.executable, "-c", "print(flush=True); input()", "", "a", "", ""]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        child.stdout.readline()
        assert of_process(child.pid) == tuple(arguments)
        child.stdin.write(b"\n")


def test_a_process_that_cannot_be_read_has_no_arguments() -> None:
    assert of_process(None) == ()
    assert of_process(2**22 + 1) == ()
