#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests on real QEMU and restic with those of a newer Debian. Where these cannot be had, says
# so loudly and leaves with 0: it is for want of a download, not a defect.
#
#   scripts/test-versions.sh PYTEST…     the command that runs pytest, without the tests
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/terminal.sh
. scripts/terminal.sh

readonly BUILD_SECONDS=600

if ! { qemu=$(timeout "$BUILD_SECONDS" scripts/newer-qemu.sh) &&
    restic=$(timeout "$BUILD_SECONDS" scripts/newer-restic.sh); }; then
    say '**********************************************************************'
    say 'SKIPPED: no newer QEMU and restic could be downloaded; NOTHING was tested with them.'
    say '**********************************************************************'
    exit 0
fi
export PATH=$qemu:$restic:$PATH
say "$(qemu-system-x86_64 --version | head -n 1)"
say "$(restic version)"
exec "$@" -m 'not slow and not guest' tests/lab tests/images tests/qemu tests/fault tests/contract
