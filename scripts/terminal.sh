# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Speaking to whoever runs a script, and acting as root on their behalf. To be sourced.

SCRIPT_NAME=$(basename -- "$0" .sh)
readonly SCRIPT_NAME

say() { printf '%s: %s\n' "$SCRIPT_NAME" "$*"; }

fail() {
    printf '%s: %s\n' "$SCRIPT_NAME" "$*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        fail "Not root, and there is no sudo. Run as root: $*"
    fi
}

readonly APT_GET=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300)

update_package_lists() {
    as_root "${APT_GET[@]}" update >/dev/null ||
        say "the package lists could not be updated; trying with the old ones"
}
