#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Unpacks the QEMU of a newer Debian beside the system's, see newer-debian.sh, and prints the folder
# with its commands, to be put in front of PATH. Where it is there already, it does nothing else.
#
#   scripts/newer-qemu.sh [SUITE]        SUITE is trixie (QEMU 10.0) unless given
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/terminal.sh
. scripts/terminal.sh
# shellcheck source=scripts/newer-debian.sh
. scripts/newer-debian.sh

write_wrappers() {
    write_wrapper qemu-system-x86_64 "$1" "$2" "-L $2/usr/share/qemu -L $2/usr/share/seabios"
    local command
    for command in qemu-img qemu-io qemu-nbd; do
        write_wrapper "$command" "$1" "$2"
    done
}

provide qemu "${1:-trixie}" qemu-img write_wrappers qemu-system-x86 qemu-utils
