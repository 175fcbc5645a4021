#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests on real QEMU with the QEMU of a newer Debian. Where that cannot be had, says so
# loudly and leaves with 0: it is for want of a download, not a defect.
#
#   scripts/test-versions.sh PYTEST…     the command that runs pytest, without the tests
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/terminal.sh
. scripts/terminal.sh

readonly BUILD_SECONDS=600

if ! newer=$(timeout "$BUILD_SECONDS" scripts/newer-qemu.sh); then
    say '**********************************************************************'
    say 'SKIPPED: no newer QEMU could be downloaded; NOTHING was tested with it.'
    say '**********************************************************************'
    exit 0
fi
export PATH=$newer:$PATH
say "$(qemu-system-x86_64 --version | head -n 1)"
exec "$@" -m 'not slow and not guest' tests/lab tests/qemu tests/fault
