#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Does with the package in build/deb what an administrator does, each time on a Debian of its own that
# holds nothing yet, see test-fresh.sh: installs it, makes backups of a running VM of another user's,
# upgrades, removes, purges.
#
#   scripts/test-deb.sh            on Debian 12, then 13
#   scripts/test-deb.sh SUITE…     on one of them
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/terminal.sh
. scripts/terminal.sh

readonly TARGET=/backup/vm
readonly VM=/var/lib/vms/vm

expect() {
    "$@" || fail "this is not so: $*"
}

start_vm() {
    mkdir -p "$VM"
    qemu-img create -q -f qcow2 "$VM/disk.qcow2" 64M
    qemu-io -c 'write -P 0x5a 1M 3M' "$VM/disk.qcow2" >/dev/null
    chown -R nobody: "$VM"
    chmod 700 "$VM"
    setpriv --reuid nobody --regid nogroup --clear-groups qemu-system-x86_64 -accel tcg -display none \
        -name vm -drive "file=$VM/disk.qcow2,format=qcow2,if=none,id=drive" \
        -device virtio-blk-pci,drive=drive,id=disk -qmp "unix:$VM/qmp,server=on,wait=off" &
    until [ -S "$VM/qmp" ]; do kill -0 $! && sleep 0.1; done
}

backed_up() { qmpbackup --socket "$VM/qmp" backup --level "$1" --target "$2" --json; }

restored() {
    rm -rf /restored
    qmpbackup restore --target "$1" --output /restored
    qemu-img compare -U "$(find /restored -type f -size +0 | head -n 1)" "$VM/disk.qcow2"
}

installed() {
    say "is installed, and starts nothing"
    "${APT_GET[@]}" install --no-install-recommends "./$1" qemu-system-x86 systemd man-db bash-completion >/dev/null
    expect qmpbackup --version
    (cd /tmp && expect qmprebase --help >/dev/null && expect qmprestore --help >/dev/null)
    expect [ -z "$(find /etc/systemd -name 'qmpbackup*')" ]
    expect [ "$(stat -c %a /etc/qmpbackup/secrets)" = 700 ]
    expect grep -q '^[^#]*' /etc/qmpbackup/config.toml
    expect systemd-analyze verify --man=no qmpbackup.timer qmpbackup.service qmpbackup-failed@x.service
    # shellcheck source=/dev/null
    (. /usr/share/bash-completion/completions/qmpbackup && expect declare -F _shtab_qmpbackup >/dev/null)
}

works() {
    say "makes backups of a running VM of another user's"
    start_vm
    mkdir -p "$TARGET"
    expect backed_up full "$TARGET"
    expect backed_up inc "$TARGET"
    expect restored "$TARGET"
    export RESTIC_PASSWORD=word
    expect qmpbackup init --target restic:/backup/repository
    expect backed_up auto restic:/backup/repository
    expect restored restic:/backup/repository
    unset RESTIC_PASSWORD
}

upgraded() {
    say "is upgraded while the VM runs, and goes on where it was"
    local next=/root/next
    dpkg-deb -R "$1" $next
    sed -i 's/^Version: .*/&+1/' $next/DEBIAN/control
    echo 'raise SystemExit' >$next/usr/lib/qmpbackup/lib/python3/site-packages/new_module.py
    dpkg-deb -Zxz -b $next $next.deb >/dev/null
    echo '# mine' >>/etc/qmpbackup/config.toml
    "${APT_GET[@]}" install $next.deb >/dev/null
    expect grep -qx '# mine' /etc/qmpbackup/config.toml
    expect backed_up inc "$TARGET"
    "${APT_GET[@]}" install --allow-downgrades "./$1" >/dev/null
    expect [ ! -e /usr/lib/qmpbackup/lib/python3/site-packages/new_module.py ]
    expect backed_up inc "$TARGET"
}

removed() {
    say "is removed, and what is the administrator's stays"
    mkdir -p /var/lib/qmpbackup /var/cache/qmpbackup
    echo word >/etc/qmpbackup/secrets/main
    "${APT_GET[@]}" remove qmpbackup >/dev/null
    expect [ ! -e /usr/bin/qmpbackup ]
    expect [ ! -e /usr/lib/qmpbackup ]
    expect [ -e /etc/qmpbackup/config.toml ]
    expect [ -d /var/lib/qmpbackup ]
    "${APT_GET[@]}" purge qmpbackup >/dev/null
    expect [ ! -e /var/lib/qmpbackup ]
    expect [ ! -e /var/cache/qmpbackup ]
    expect [ ! -e /etc/qmpbackup/config.toml ]
    expect [ "$(cat /etc/qmpbackup/secrets/main)" = word ]
    expect qemu-img check -q "$(find $TARGET -name 'FULL-*' | head -n 1)"
    expect [ -e /backup/repository/config ]
}

inside() {
    update_package_lists
    installed "$1"
    works
    upgraded "$1"
    removed
}

if [ "${1:-}" = --inside ]; then
    inside "$2"
    exit
fi
FRESH_FILE=$(find build/deb -name '*.deb' | head -n 1)
[ -n "$FRESH_FILE" ] || fail "there is no package; make deb builds it"
export FRESH_FILE
[ $# -gt 0 ] || set -- bookworm trixie
for suite; do
    scripts/test-fresh.sh "$suite" scripts/test-deb.sh --inside "$FRESH_FILE"
done
