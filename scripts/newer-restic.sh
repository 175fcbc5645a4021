#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Unpacks the restic of a newer Debian beside the system's, see newer-debian.sh, and prints the
# folder with the command `restic`. Where it is there already, it does nothing else.
#
#   scripts/newer-restic.sh [SUITE]      SUITE is trixie (restic 0.18) unless given
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/terminal.sh
. scripts/terminal.sh
# shellcheck source=scripts/newer-debian.sh
. scripts/newer-debian.sh

write_wrappers() {
    write_wrapper restic "$1" "$2"
}

provide restic "${1:-trixie}" restic write_wrappers restic
