#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Does with the package in build/deb what an administrator does, each time on a Debian of its own that
# holds nothing yet, see test-fresh.sh: installs it, makes backups of a running VM of another user's, by
# hand and by systemd's timer, upgrades, removes, purges.
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
    vm_pid=$!
    until [ -S "$VM/qmp" ]; do kill -0 $vm_pid && sleep 0.1; done
}

backed_up() { qmpbackup --socket "$VM/qmp" backup --level "$1" --target "$2" --json; }

restored() {
    rm -rf /restored
    qmpbackup restore --target "$1" --output /restored
    qemu-img compare -U "$(find /restored -type f -size +0 | head -n 1)" "$VM/disk.qcow2"
}

installed() {
    say "is installed, and starts nothing"
    "${APT_GET[@]}" install --no-install-recommends "./$1" qemu-system-x86 restic man-db procps bash-completion >/dev/null
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

# As docs/how-to/install.md and all-vms.md tell it: two drop-ins, and a configuration.
configure() {
    mkdir -p /etc/systemd/system/qmpbackup.service.d /etc/systemd/system/qmpbackup.timer.d
    cat >/etc/systemd/system/qmpbackup.service.d/local.conf <<-END
	[Service]
	ReadWritePaths=$VM
	LoadCredential=offsite:/etc/qmpbackup/secrets/offsite
	END
    printf '[Timer]\nOnActiveSec=1\nAccuracySec=1us\nRandomizedDelaySec=0\n' \
        >/etc/systemd/system/qmpbackup.timer.d/soon.conf
    (umask 077 && echo word >/etc/qmpbackup/secrets/offsite)
    cat >/etc/qmpbackup/config.toml <<-END
	[vm.vm]
	socket = "$VM/qmp"
	targets = ["main", "offsite"]
	[target.main]
	location = "/backup/{vm}-nightly"
	keep = { last = 5 }
	[target.offsite]
	location = "restic:/backup/repository"
	password = { credential = "offsite" }
	keep = { last = 5 }
	[notify.file]
	type = "command"
	command = ["/bin/sh", "-c", "cat >>/var/lib/qmpbackup/told"]
	END
    expect qmpbackup config check
}

of_unit() { systemctl show --value --property "$1" "$2"; }

# Waits for a unit that was begun by something else.
over() {
    until [ "$(of_unit ExecMainExitTimestampMonotonic "$1")" -gt "${2:-0}" ]; do sleep 0.2; done
}

scheduled() {
    say "is run by systemd's timer, confined, and with a credential"
    configure
    systemctl daemon-reload
    systemctl enable --quiet --now qmpbackup.timer
    over qmpbackup.service
    journalctl --quiet --unit qmpbackup.service
    expect [ -n "$(journalctl --quiet --output=cat QMPBACKUP_VM=vm QMPBACKUP_TARGET=main)" ]
    expect [ "$(of_unit Result qmpbackup.service)" = success ]
    expect qmpbackup status --check
    expect restored /backup/vm-nightly
    expect [ ! -e /var/lib/qmpbackup/told ]
    expect [ -z "$(find "$VM" -mindepth 1 ! -name disk.qcow2 ! -name qmp)" ]
    killed
}

# Waits until the next minute, in which both backups are due.
due() {
    until [ "$(qmpbackup run --dry-run | grep -c ': backup')" = 2 ]; do sleep 1; done
}

killed() {
    say "tells once of a run that is killed, and once when it is well again"
    sed -i 's/^socket/schedule = "*:*"\n&/' /etc/qmpbackup/config.toml
    kill -STOP "$vm_pid"
    due
    systemctl start --no-block qmpbackup.service
    until pgrep -f 'qmpbackup.* backup ' >/dev/null; do sleep 0.1; done
    systemctl kill --signal KILL qmpbackup.service
    over qmpbackup-failed@qmpbackup.service.service
    expect [ "$(grep -c qmpbackup.service /var/lib/qmpbackup/told)" = 1 ]
    kill -CONT "$vm_pid"
    due
    expect systemctl start qmpbackup.service
    expect qmpbackup status --check
    expect [ "$(grep -o '"recovered": \["qmpbackup.service"\]' /var/lib/qmpbackup/told | wc -l)" = 1 ]
    systemctl disable --now qmpbackup.timer
    rm -r /etc/systemd/system/qmpbackup.*.d
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
    scheduled
    upgraded "$1"
    removed
}

if [ "${1:-}" = --inside ]; then
    inside "$2"
    exit
fi
FRESH_FILE=$(find build/deb -name '*.deb' | head -n 1)
[ -n "$FRESH_FILE" ] || fail "there is no package; make deb builds it"
export FRESH_FILE FRESH_BOOT=1
[ $# -gt 0 ] || set -- bookworm trixie
for suite; do
    scripts/test-fresh.sh "$suite" scripts/test-deb.sh --inside "$FRESH_FILE"
done
