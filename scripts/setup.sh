#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Brings what is missing for developing and testing: Debian packages, and a .venv with the package
# (editable) and its pinned dependencies. Says what it does; does nothing, quickly, when nothing is
# missing. Run it as root or as a user who may use sudo.
#
#   scripts/setup.sh            what the tools and tests need
#   scripts/setup.sh PACKAGE…   only these Debian packages
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/terminal.sh
. scripts/terminal.sh

readonly PYTHON=/usr/bin/python3 # Debian's own, because python3-libnbd is built for it
readonly STAMP=.venv/.set-up
readonly PACKAGES=(
    qemu-system-x86 # the VMs of the tests
    qemu-utils      # qemu-img, qemu-nbd, qemu-io
    python3-libnbd  # NBD from Python
    libnbd-bin      # nbdcopy and nbdinfo, which read what is served
    python3-venv    # .venv
    restic          # reads and tends the repositories of tests
    fuse3           # mounts them
    rclone          # serves them over REST
    libvirt-daemon  # VMs as libvirt keeps them; the tests start a daemon of their own
    libvirt-daemon-driver-qemu
    libvirt-clients # virsh
    systemd         # systemd-analyze judges the units
    kmod            # modprobe --show-depends and depmod for the test guest
    xz-utils        # unpacks its modules
    zstd            # or these, depending on the kernel
    cpio            # packs it
    dosfstools      # makes FATs for tests
    mtools          # puts files on them
    xfsprogs        # makes other file systems of guests
    btrfs-progs
    ntfs-3g
    exfatprogs
    genisoimage     # and discs
    e2fsprogs       # looks at its file systems, and makes some for tests
    git
    make
    shellcheck # a gate of `make check`
)

# Prints those of the given packages that are not installed.
missing_packages() {
    local state package
    local -A installed=()
    while read -r state package; do
        [ "$state" = ii ] && installed[$package]=1
    done < <(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' "$@" 2>/dev/null)
    for package; do
        [ -n "${installed[$package]:-}" ] || printf '%s\n' "$package"
    done
}

install_packages() {
    local missing
    command -v dpkg-query >/dev/null ||
        fail "This is no Debian or Ubuntu. Install by hand what these packages hold: $*"
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing Debian packages: ${missing[*]}"
    update_package_lists
    as_root "${APT_GET[@]}" install --no-install-recommends "${missing[@]}" >/dev/null ||
        fail "apt-get could not install: ${missing[*]}"
}

# What the .venv depends on. Its scripts name its own path, hence the folder.
fingerprint() {
    {
        pwd
        "$PYTHON" --version
        cat requirements.txt requirements-dev.txt scripts/setup.sh
        sed '/^\[tool\./,$d' pyproject.toml # settings of tools install nothing
    } | sha256sum
}

# A fingerprint alone would not see that somebody removed a part of it.
venv_is_whole() {
    [ -e "$STAMP" ] && [ "$(fingerprint)" = "$(cat "$STAMP")" ] &&
        [ -x .venv/bin/qmpbackup ] && [ -x .venv/bin/pytest ] && [ -x .venv/bin/mypy ] &&
        [ -x .venv/bin/ruff ] && [ -x .venv/bin/lint-imports ] &&
        .venv/bin/python -c 'import nbd, blake3, cryptography, obstore, zstandard, msgspec, oncalendar, prometheus_client, rich, moto, qmpbackup, qemu' 2>/dev/null
}

make_venv() {
    venv_is_whole && return 0
    say "making .venv with the package and its pinned dependencies"
    rm -f "$STAMP"
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        rm -rf .venv
        "$PYTHON" -m venv --system-site-packages .venv
    fi
    local -a pip=(.venv/bin/python -m pip --quiet --quiet --disable-pip-version-check --no-input)
    "${pip[@]}" install -r requirements.txt -r requirements-dev.txt
    "${pip[@]}" install --no-build-isolation --no-deps --editable .
    fingerprint >"$STAMP"
    say "done; .venv/bin/qmpbackup is the tool of this folder"
}

main() {
    if [ $# -gt 0 ]; then
        install_packages "$@"
        return
    fi
    exec 9<. # one set-up of this folder at a time
    flock 9
    install_packages "${PACKAGES[@]}"
    make_venv
}

main "$@"
