#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Does what a newcomer does, on a Debian that holds nothing yet: in a fresh minimal root of its own,
# with `make` installed and nothing else, the last commit of this checkout makes its demo and runs
# its tests. So it shows that setup.sh and guest.sh install all that is used. Nothing of it is left
# afterwards, whatever happens: mounts and processes live in namespaces that end with the script.
#
#   scripts/test-fresh.sh                      Debian 12, then 13: `make demo`, then `make test`
#   scripts/test-fresh.sh SUITE [COMMAND…]     one of them, and perhaps another command
#
# $FRESH_FILE names a file that git does not know and the command needs; it gets the same place there.
# Where $FRESH_BOOT is set, the system is booted with its systemd, and the command is a service there.
# The roots get packages from where this system gets its own, with the settings of its apt and pip.
# They need 4 GiB below ${TMPDIR:-/var/tmp}, and root's rights.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/terminal.sh
. scripts/terminal.sh
# shellcheck source=scripts/newer-debian.sh
. scripts/newer-debian.sh

readonly SUITES=(bookworm trixie)
readonly NEWCOMER=(make demo test)
readonly BROUGHT=make${FRESH_BOOT:+,systemd-sysv,dbus}
readonly CHECKOUT=/srv/qmpbackup # in the fresh root, where other users may go, as some tests do

# Where pip looks for its settings, and the variables that programs which fetch something obey.
readonly PIP_SETTINGS=(/etc/pip.conf /etc/xdg/pip "$HOME/.config/pip" "$HOME/.pip")
readonly VARIABLES='^(PIP_.*|.*_PROXY|.*_proxy|.*_CA_BUNDLE|SSL_CERT_FILE)$'
# Those in use, and those from which they are made anew when the package ca-certificates arrives.
readonly CERTIFICATES=(/etc/ssl/certs/ca-certificates.crt /usr/local/share/ca-certificates)

variables() {
    local name
    compgen -e | grep -E "$VARIABLES" | while read -r name; do
        printf '%s=%s\n' "$name" "${!name}"
    done
}

# The folders on this machine in which pip may look for packages, with what lies beside them: an
# index points to files in other folders.
folders_of_pip() {
    {
        find "${PIP_SETTINGS[@]}" -name '*.conf' -exec cat {} + 2>/dev/null || true
        variables | grep '^PIP_' || true
    } | grep -oE '/[^ ,]+' | sed -E 's,^//+,/,; s,/$,,' | while read -r folder; do
        [ ! -d "$folder" ] || dirname "$folder"
    done | grep -v -x / | sort -u || true
}

make_root() {
    local suite=$1 from setting
    from=$(archive)
    [ -n "$from" ] || fail "the package sources name no Debian archive"
    say "making a minimal $suite"
    debootstrap --variant=minbase --include="$BROUGHT" "$suite" "$root" "$from" >"$root.log" 2>&1 ||
        { tail -n 20 "$root.log" >&2 && fail "debootstrap could not make $suite"; }
    apt-config dump | grep -E '^Acquire::(https?::|Check-|Retries|ForceIP)' >"$root/etc/apt/apt.conf.d/99host" || true
    for setting in "${PIP_SETTINGS[@]}" "${CERTIFICATES[@]}" /etc/resolv.conf /etc/hosts; do
        [ ! -e "$setting" ] || copy_into_root "$setting"
    done
    git clone --quiet . "$root$CHECKOUT"
    [ -z "${FRESH_FILE:-}" ] || install -D "$FRESH_FILE" "$root$CHECKOUT/$FRESH_FILE"
}

# To the same place, but that the home of whoever runs this is root's there.
copy_into_root() {
    local place=${1/#$HOME//root}
    mkdir -p "$root${place%/*}"
    cp -rL --remove-destination "$1" "$root${place%/*}/"
}

mount_around() {
    local folder
    mount --bind "$root" "$root"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/dev/shm"
    mount --rbind /sys "$root/sys"
    mount -t proc proc "$root/proc"
    mount -t tmpfs tmpfs "$root/run"
    folders_of_pip | while read -r folder; do
        mkdir -p "$root$folder"
        mount --bind -o ro "$folder" "$root$folder"
    done
}

# Instead of a chroot: a container with an init of its own, which ends with the command's exit code.
boot() {
    local folder folders=() environment each
    mapfile -t environment < <(variables)
    {
        echo '[Service]'
        echo "WorkingDirectory=$CHECKOUT"
        for each in HOME=/root LANG=C.UTF-8 "${environment[@]}"; do
            printf 'Environment="%s"\n' "$each"
        done
        echo 'StandardOutput=file:/dev/console'
        printf 'ExecStart=/bin/sh -c '"'"'"$$@"; systemctl exit $$?'"'"' sh'
        printf ' "%s"' "$@"
    } >"$root/etc/systemd/system/fresh.service"
    ln -s ../fresh.service "$root/etc/systemd/system/multi-user.target.wants/"
    ln -s /dev/null "$root/etc/systemd/system/console-getty.service" # which would take the terminal
    while read -r folder; do
        folders+=("--bind-ro=$folder")
    done < <(folders_of_pip)
    SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 exec systemd-nspawn --quiet --directory "$root" --boot \
        --register=no --keep-unit --console=read-only "${folders[@]}" \
        systemd.show_status=no systemd.log_target=null
}

# All of it, in namespaces of its own for mounts and processes, and in the folder $1.
inside() {
    local suite=$2 root=$1/root
    shift 2
    mount --make-rprivate /
    mount -t proc proc /proc
    make_root "$suite"
    say "$suite: $*"
    [ -z "${FRESH_BOOT:-}" ] || boot "$@"
    mount_around
    mapfile -t environment < <(variables)
    # The shell stays, as the process 1 that collects orphans.
    exec chroot "$root" /usr/bin/env --ignore-environment "${environment[@]}" \
        HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        sh -c "cd $CHECKOUT && \"\$@\"; exit \$?" sh "$@"
}

try() {
    local status=0
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/qmpbackup-fresh.XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT
    # Whoever ends this script ends all that runs inside.
    setpriv --pdeathsig KILL -- \
        unshare --mount --pid --fork --kill-child "$0" --inside "$work" "$@" || status=$?
    rm -rf --one-file-system "$work"
    [ "$status" -eq 0 ] || fail "$* ended with $status"
    say "$1: all well"
}

if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
fi
[ "$(id -u)" -eq 0 ] || fail "Run it as root: it makes a system of its own and mounts what that needs"
scripts/setup.sh debootstrap git ${FRESH_BOOT:+systemd-container}
if [ $# -gt 1 ]; then
    try "$@"
else
    for suite in "${@:-${SUITES[@]}}"; do
        try "$suite" "${NEWCOMER[@]}"
    done
fi
