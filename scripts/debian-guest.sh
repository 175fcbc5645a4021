#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds a whole Debian 12 that the slow tests boot: GRUB for BIOS and UEFI, systemd, the QEMU guest agent; ext4,
# LVM with xfs, btrfs, FAT and NTFS on four disks. Root's rights are needed, for debootstrap alone: the disks are
# made inside a VM, by tests/guest/debian/install. Prints the folder with `system`, `data`, `fat` and `ntfs`
# (qcow2); where that is there already, it does nothing else.
#
# The cache is /var/cache/qmpbackup/debian/<digest of this script and that>.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/terminal.sh
. scripts/terminal.sh
# shellcheck source=scripts/newer-debian.sh
. scripts/newer-debian.sh

readonly SUITE=bookworm
readonly PACKAGES=(
    linux-image-amd64 initramfs-tools zstd systemd-sysv dbus udev kmod login passwd iproute2
    grub2-common grub-pc-bin grub-efi-amd64-bin qemu-guest-agent
    lvm2 xfsprogs btrfs-progs dosfstools ntfs-3g e2fsprogs fdisk
)
readonly INSTALLER_SECONDS=3600

key=$(cat scripts/debian-guest.sh tests/guest/debian/install | sha256sum | cut -c1-16)
readonly CACHE=/var/cache/qmpbackup/debian
readonly FINAL=$CACHE/$key

make_root() {
    local from packages
    from=$(archive)
    [ -n "$from" ] || fail "the package sources name no Debian archive"
    packages=$(IFS=,; echo "${PACKAGES[*]}")
    unshare --mount --pid --fork --kill-child \
        debootstrap --variant=minbase "--include=$packages" "$SUITE" "$root" "$from" >"$work/debootstrap.log" 2>&1 ||
        { tail -n 20 "$work/debootstrap.log" >&2 && fail "debootstrap could not make $SUITE"; }
}

configure() {
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* \
        "$root"/usr/share/{doc,man,locale}/*
    echo debian >"$root/etc/hostname"
    echo root:root | chroot "$root" chpasswd
    cat >"$root/etc/fstab" <<END
LABEL=root           /         ext4     defaults         0 1
LABEL=ESP            /boot/efi vfat     umask=0077       0 2
/dev/mapper/vg0-srv  /srv      xfs      defaults         0 0
LABEL=data           /data     btrfs    defaults         0 0
LABEL=FAT            /fat      vfat     defaults         0 0
LABEL=NTFS           /ntfs     ntfs-3g  defaults         0 0
END
    cat >"$root/etc/default/grub" <<END
GRUB_TIMEOUT=1
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0 no_timer_check"
GRUB_TERMINAL="console serial"
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
GRUB_DISABLE_OS_PROBER=true
END
    install -m 755 tests/guest/debian/install "$root/install"
}

# The system is on a disk of its own, without a mount: mke2fs fills it.
make_disks() {
    local disk
    truncate -s 2G "$work/installer"
    mkfs.ext4 -q -L installer -d "$root" "$work/installer"
    for disk in system:2200M data:256M fat:64M ntfs:64M; do
        qemu-img create -q -f qcow2 "$work/done/${disk%:*}" "${disk#*:}"
    done
    timeout "$INSTALLER_SECONDS" qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot \
        -machine q35 -accel tcg -smp 2 -m 1G -nic none -serial "file:$work/installer.log" \
        -kernel "$root"/boot/vmlinuz-* -initrd "$root"/boot/initrd.img-* \
        -append "root=LABEL=installer rw console=ttyS0 init=/install panic=-1" \
        -drive "file=$work/installer,format=raw,if=virtio,snapshot=on" \
        -drive "file=$work/done/system,if=virtio" -drive "file=$work/done/data,if=virtio" \
        -drive "file=$work/done/fat,if=virtio" -drive "file=$work/done/ntfs,if=virtio" >&2
    grep -q "the disks of a Debian are made" "$work/installer.log" ||
        { tail -n 20 "$work/installer.log" >&2 && fail "the disks could not be made"; }
}

if [ -s "$FINAL/system" ]; then
    echo "$FINAL"
    exit
fi
[ "$(id -u)" -eq 0 ] || fail "Run it as root: debootstrap needs that"
scripts/setup.sh debootstrap >&2
say "building a whole Debian in $FINAL; this takes some minutes" >&2
mkdir -p "$CACHE"
work=$(mktemp -d "$CACHE/building.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
readonly work root=$work/root
mkdir "$work/done"
make_root
configure
make_disks
# Whoever comes second loses, and has the same.
mv -T "$work/done" "$FINAL" 2>/dev/null || [ -s "$FINAL/system" ]
say "done: $(du -sh "$FINAL" | cut -f1)" >&2
echo "$FINAL"
