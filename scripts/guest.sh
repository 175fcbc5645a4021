#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the small Linux that tests and demo boot: Debian's cloud kernel and an initramfs of
# busybox, e2fsprogs, the QEMU guest agent and what tests/guest/rootfs holds. No root needed:
# packages are downloaded and unpacked, not installed. Prints the folder with `vmlinuz` and
# `initramfs`; where that is there already, it does nothing else.
#
# The cache is ${XDG_CACHE_HOME:-~/.cache}/qmpbackup/guest/<digest of this script and the rootfs>.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/terminal.sh
. scripts/terminal.sh

readonly KERNEL=linux-image-cloud-amd64
readonly PROGRAMS=(busybox-static qemu-guest-agent e2fsprogs)
readonly BINARIES=(usr/sbin/qemu-ga sbin/mke2fs sbin/e2fsck sbin/dumpe2fs sbin/tune2fs sbin/resize2fs)
# Loaded at each boot, and those that `lab.modules=` on the kernel's command line may ask for.
readonly AT_BOOT=(virtio_pci virtio_console virtio_blk virtio_scsi sd_mod ext4)
readonly ON_REQUEST=(nvme dm_mod loop) # the cloud kernel has no AHCI, IDE or USB

key=$(find scripts/guest.sh tests/guest/rootfs -type f -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum | cut -c1-16)
readonly CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/qmpbackup/guest
readonly FINAL=$CACHE/$key

# The packages that programs need to run: libraries, and nothing of a Debian system around them.
libraries_of() {
    apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
        --no-replaces --no-enhances "$@" | grep -E '^(lib|zlib)' | grep -v -e perl -e : | LC_ALL=C sort -u
}

kernel_package() {
    apt-cache depends "$KERNEL" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1
}

download() {
    local image libraries
    image=$(kernel_package)
    [ -n "$image" ] || return 1
    mapfile -t libraries < <(libraries_of "${PROGRAMS[@]}")
    (cd "$work/packages" && apt-get -q download "$image" "${PROGRAMS[@]}" "${libraries[@]}") >"$work/apt.log" 2>&1
}

unpack() {
    local package
    for package in "$work"/packages/*.deb; do
        dpkg-deb -x "$package" "$work/system"
    done
}

# What ld.so finds for a program inside the unpacked system, without running any of it.
needed_libraries() {
    local loader paths
    loader=$(find "$work/system" -name 'ld-linux-x86-64.so.2' | head -n 1)
    paths=$(find "$work/system" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd:)
    "$loader" --list --library-path "$paths" "$1" | grep -o "$work/system[^ ]*" | sort -u
}

# Debian moves binaries between /sbin and /usr/sbin over the years.
find_binary() {
    find "$work/system" -path "*/${1##*/}" -type f -perm -100 | head -n 1
}

fill_initramfs() {
    local binary found library
    mkdir -p "$root"/{bin,lib,lib64,modules,proc,sys,dev,run,tmp,mnt,root}
    cp "$(find_binary bin/busybox)" "$root/bin/busybox"
    for binary in "${BINARIES[@]}"; do
        found=$(find_binary "$binary")
        [ -n "$found" ] || fail "the packages hold no ${binary##*/}"
        cp "$found" "$root/bin/"
        while read -r library; do
            cp -L "$library" "$root/lib/"
        done < <(needed_libraries "$found")
    done
    mv "$root"/lib/ld-linux-x86-64.so.2 "$root/lib64/"
    ln -s mke2fs "$root/bin/mkfs.ext4"
    cp -r tests/guest/rootfs/. "$root/"
    chmod 755 "$root/init" "$root"/bin/*
}

# Modules in the order in which insmod takes them, as `modules/<list>` and `modules/*.ko`.
fill_modules() {
    local version list name
    version=$(basename "$work"/system/lib/modules/*)
    depmod -b "$work/system" "$version"
    for list in boot "${ON_REQUEST[@]}"; do
        for name in $([ "$list" = boot ] && echo "${AT_BOOT[@]}" || echo "$list"); do
            modprobe -d "$work/system" -S "$version" --show-depends "$name" |
                sed -n "s/^insmod \([^ ]*\).*/\1/p"
        done | awk '!seen[$0]++' | while read -r module; do
            copy_module "$module"
        done >"$root/modules/$list"
    done
}

copy_module() {
    local name
    name=$(basename "$1")
    case $name in
        *.xz) name=${name%.xz} && xz -dc "$1" >"$root/modules/$name" ;;
        *.zst) name=${name%.zst} && zstd -qdc "$1" >"$root/modules/$name" ;;
        *) cp "$1" "$root/modules/$name" ;;
    esac
    echo "$name"
}

pack() {
    cp "$work"/system/boot/vmlinuz-* "$work/done/vmlinuz"
    (cd "$root" && find . -print0 | LC_ALL=C sort -z | cpio -0 -o -H newc --quiet -R 0:0) |
        gzip -1 >"$work/done/initramfs"
    (cd "$work/packages" && printf '%s\n' ./*.deb) >"$work/done/packages"
}

if [ -s "$FINAL/initramfs" ]; then
    echo "$FINAL"
    exit
fi
say "building the test guest in $FINAL" >&2
mkdir -p "$CACHE"
work=$(mktemp -d "$CACHE/building.XXXXXX")
trap 'rm -rf "$work"' EXIT
readonly work root=$work/root
chmod 755 "$work" # apt may download as its own user
mkdir -p "$work"/{packages,system/lib,done}
# One /lib for all: packages of an age with a merged /usr and of an age without.
mkdir -p "$work/system/usr/lib/modules" && rmdir "$work/system/lib" && ln -s usr/lib "$work/system/lib"
download || { update_package_lists >&2 && download; } || { cat "$work/apt.log" >&2 && fail "apt-get could not download the guest's packages"; }
unpack
fill_initramfs
fill_modules
pack
# Whoever comes second loses, and has the same.
mv -T "$work/done" "$FINAL" 2>/dev/null || [ -s "$FINAL/initramfs" ]
say "done: $(du -h "$FINAL/initramfs" | cut -f1) of initramfs, $(du -h "$FINAL/vmlinuz" | cut -f1) of kernel" >&2
echo "$FINAL"
