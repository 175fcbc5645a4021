#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Unpacks the QEMU of a newer Debian beside the system's, without root and without installing it,
# and prints the folder with its commands, to be put in front of PATH. Where it is there already, it
# does nothing else.
#
#   scripts/newer-qemu.sh [SUITE]        SUITE is trixie (QEMU 10.0) unless given
#
# Its programs run with their own libraries on the system's kernel, by way of their own ld.so.
# The cache is /var/cache/qmpbackup for root, so that a QEMU that runs as another user can be
# started from there, else ${XDG_CACHE_HOME:-~/.cache}/qmpbackup.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/terminal.sh
. scripts/terminal.sh

readonly SUITE=${1:-trixie}
readonly PACKAGES=(qemu-system-x86 qemu-utils)
readonly COMMANDS=(qemu-system-x86_64 qemu-img qemu-io qemu-nbd)

if [ "$(id -u)" -eq 0 ]; then
    cache=/var/cache/qmpbackup
else
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/qmpbackup
fi
key=$(sha256sum <scripts/newer-qemu.sh | cut -c1-16)
readonly FINAL=$cache/qemu/$SUITE-$key

# The archive from which this system gets its own packages.
archive() {
    # shellcheck disable=SC2016 # the $ are apt's
    apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' | awk '$1 == "Debian" { print $2; exit }'
}

# An apt of its own, to which no package is installed yet.
configure_apt() {
    local from
    from=$(archive)
    [ -n "$from" ] || fail "the package sources name no Debian archive"
    mkdir -p "$work"/apt/{lists,archives}/partial "$work"/apt/{cache,none}
    : >"$work/apt/status"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $from $SUITE main" >"$work/apt/sources.list"
    cat >"$work/apt/apt.conf" <<END
Dir::State "$work/apt";
Dir::State::lists "$work/apt/lists";
Dir::State::status "$work/apt/status";
Dir::Cache "$work/apt/cache";
Dir::Cache::archives "$work/apt/archives";
Dir::Etc::sourcelist "$work/apt/sources.list";
Dir::Etc::sourceparts "$work/apt/none";
Dir::Etc::preferencesparts "$work/apt/none";
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
END
}

download() {
    export APT_CONFIG=$work/apt/apt.conf
    { apt-get -q update && apt-get -q -y --download-only install "${PACKAGES[@]}"; } >"$work/apt.log" 2>&1 || {
        cat "$work/apt.log" >&2
        fail "apt-get could not download QEMU from $SUITE"
    }
}

unpack() {
    local folder package
    mkdir -p "$work"/done/bin "$work"/done/system/usr/{bin,sbin,lib,lib64}
    for folder in bin sbin lib lib64; do
        ln -s "usr/$folder" "$work/done/system/$folder"
    done
    for package in "$work"/apt/archives/*.deb; do
        dpkg-deb -x "$package" "$work/done/system"
    done
}

write_wrappers() {
    local command firmware system=$FINAL/system
    for command in "${COMMANDS[@]}"; do
        firmware=
        [ "$command" = qemu-system-x86_64 ] &&
            firmware="-L $system/usr/share/qemu -L $system/usr/share/seabios"
        cat >"$work/done/bin/$command" <<END
#!/bin/sh
exec $system/lib64/ld-linux-x86-64.so.2 --argv0 $command \\
    --library-path $system/usr/lib/x86_64-linux-gnu $system/usr/bin/$command $firmware "\$@"
END
        chmod 755 "$work/done/bin/$command"
    done
}

if [ ! -x "$FINAL/bin/qemu-img" ]; then
    say "unpacking the QEMU of $SUITE in $FINAL" >&2
    mkdir -p "${FINAL%/*}"
    work=$(mktemp -d "${FINAL%/*}/building.XXXXXX")
    readonly work
    trap 'rm -rf "$work"' EXIT
    configure_apt
    download
    unpack
    write_wrappers
    # Whoever comes second loses, and has the same.
    mv -T "$work/done" "$FINAL" 2>/dev/null || [ -x "$FINAL/bin/qemu-img" ]
fi
echo "$FINAL/bin"
