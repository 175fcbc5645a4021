#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
#
# First process of the appliance. It takes one line after the other from the port that QEMU gives it:
# `answer MARK FUNCTION WORD…`, each word quoted for this shell by the host. The answer is what the
# function prints, MARK, the function's status and what it complained of, up to a line feed. So the
# host sees the end of an answer whatever it holds: MARK is new and unknown to any disk.
#
# Programs that busybox has as well are named by their path: its shell takes its own first.
export PATH=/bin LC_ALL=C.UTF-8
readonly FORM='%y\0%m\0%U\0%G\0%s\0%T@\0%n\0%P\0%l\0'
readonly LARGE=8388608
readonly NOT_THERE=44 NOT_MOUNTED=45 NO_FILE=46

mount -t devtmpfs dev /dev
prepare() {
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t devtmpfs dev /dev
    echo /bin/modprobe >/proc/sys/kernel/modprobe
    for each in virtio_pci virtio_console virtio_blk loop; do
        modprobe $each
    done
    mkdir -p /etc/lvm /run/lvm /run/lock/lvm /dev/mapper
    cat >/etc/lvm/lvm.conf <<END
devices { external_device_info_source="none" obtain_device_list_from_udev=0 use_devicesfile=0 }
activation { udev_sync=0 udev_rules=0 monitoring=0 }
global { thin_check_executable="" cache_check_executable="" event_activation=0 }
backup { backup=0 archive=0 }
END
    ln -s /proc/mounts /etc/mtab
}

# The one port there is, which comes a moment after its driver.
port() {
    tries=0
    while [ $tries -lt 1000 ]; do
        for each in /dev/vport*; do
            [ -e "$each" ] && echo "$each" && return
        done
        usleep 5000
        tries=$((tries + 1))
    done
}

answer() {
    mark=$1
    shift
    "$@" >&3 3>&- 2>/tmp/said </dev/null
    printf '%s%s ' "$mark" $? >&3
    tail -c 2000 /tmp/said | tr '\n\0' '  ' >&3
    echo >&3
}

# Disks and what they are made of

devices() {
    for each in /sys/class/block/*; do
        case ${each##*/} in
            vd* | dm-* | md* | loop*p*) echo "${each##*/}" ;;
        esac
    done
}

types() {
    types_of $(devices)
}

types_of() {
    for each; do
        /bin/blkid -p -s TYPE -o value "/dev/$each"
    done
}

# The numbers in a partition table count sectors, and nothing in a disk says how large those were. This
# kernel is given disks with sectors of 512 bytes. Where that leads to nothing, they had 4 KiB, if
# that leads to anything.
large_sectors() {
    for disk in /sys/class/block/vd*; do
        [ -e "$disk/partition" ] && continue
        disk=${disk##*/}
        [ "$(dd if="/dev/$disk" bs=1 skip=510 count=2 2>/dev/null | od -An -tx1)" = ' 55 aa' ] || continue
        [ -z "$(types_of "$disk" $(partitions "$disk"))" ] || continue
        loop=$(/bin/losetup --find --show --partscan --sector-size 4096 "/dev/$disk") || continue
        [ -n "$(types_of $(partitions "${loop##*/}"))" ] || /bin/losetup --detach "$loop"
    done
}

partitions() {
    for each in "/sys/class/block/$1"/*/partition; do
        [ -e "$each" ] && each=${each%/*} && echo "${each##*/}"
    done
}

# Mirrors are written to, but only what is asked for: they are not made whole again, which would read them.
assemble() {
    large_sectors
    case $(types) in *raid_member*)
        modprobe -a md_mod raid0 raid1 raid10 raid456 linear
        echo 0 >/proc/sys/dev/raid/speed_limit_min
        echo 1 >/proc/sys/dev/raid/speed_limit_max
        echo 'AUTO +all' >/etc/mdadm.conf
        mdadm --assemble --scan --no-degraded --config=/etc/mdadm.conf
        ;;
    esac
    case $(types) in *LVM2_member*)
        modprobe dm_mod
        for each in $(lvm lvs -a --noheadings -o segtype); do
            volumes_of "$each"
        done
        lvm vgchange -q -ay --sysinit
        ;;
    esac
}

# Not all of them at once: some measure the processor first, which takes a second.
volumes_of() {
    case $1 in
        thin*) modprobe dm_thin_pool ;;
        raid*) modprobe dm_raid ;;
        mirror) modprobe dm_mirror ;;
        snapshot) modprobe dm_snapshot ;;
        cache*) modprobe -a dm_cache dm_cache_smq ;;
        writecache) modprobe dm_writecache ;;
        integrity) modprobe dm_integrity ;;
    esac
}

# NAME, WHAT IT IS, SECTORS, WHAT BLKID SAYS, each ended by a zero byte.
scan() {
    assemble >/tmp/assembled 2>&1
    for name in $(devices); do
        printf '%s\0%s\0%s\0' "$name" "$(identity "$name")" "$(cat "/sys/class/block/$name/size")"
        /bin/blkid -p -o export "/dev/$name" 2>/dev/null
        printf '\0'
    done
    :
}

identity() {
    sys=/sys/class/block/$1
    if [ -e "$sys/partition" ]; then
        parent=$(readlink -f "$sys/..")
        echo "part $(cat "$sys/partition") $(identity "${parent##*/}")"
    elif [ -e "$sys/dm/name" ]; then
        echo "dm $(cat "$sys/dm/uuid") $(cat "$sys/dm/name")"
    elif [ -e "$sys/loop/backing_file" ]; then
        identity "$(sed 's|.*/||' "$sys/loop/backing_file")"
    elif [ -e "$sys/md" ]; then
        echo "md $(mdadm --detail --export "/dev/$1" | sed -n 's/^MD_NAME=//p')"
    else
        echo "disk $(cat "$sys/serial")"
    fi
}

# unlock DEVICE PASSPHRASE
unlock() {
    modprobe -a dm_mod dm_crypt algif_skcipher algif_hash
    printf %s "$2" | cryptsetup open --type luks --key-file=- "/dev/$1" "luks-$1"
}

# File systems

# opened DEVICE TYPE: mounted as `$root`. Journals are replayed, into the overlay.
opened() {
    root=/m/$1
    [ -d "$root" ] && return
    mkdir "$root"
    read_ahead "$1"
    mounted "$1" "$2" || {
        rmdir "$root"
        return $NOT_MOUNTED
    }
}

# Questions to a disk take much longer than what it answers.
read_ahead() {
    sys=/sys/class/block/$1
    [ -e "$sys/partition" ] && sys=$sys/..
    echo 1024 >"$sys/queue/read_ahead_kb"
}

mounted() {
    safe=ro,nodev,nosuid,noexec
    case $2 in
        ext2 | ext3 | ext4) mount_cached ext4 "$1" errors=remount-ro ;;
        xfs) mount_cached xfs "$1" nouuid ;;
        btrfs)
            modprobe btrfs
            btrfs device scan >/dev/null
            mount -t btrfs -o $safe,subvolid=5 "/dev/$1" "$root"
            ;;
        vfat) mount_cached vfat "$1" utf8,shortname=mixed ;;
        exfat) mount_cached exfat "$1" iocharset=utf8 ;;
        ntfs) modprobe fuse && ntfs-3g -o ro "/dev/$1" "$root" ;;
        iso9660 | udf | squashfs | erofs) mount_cached "$2" "$1" nodev ;;
        *) echo "nothing here reads file systems of this kind" >&2 && false ;;
    esac
}

# mount_cached TYPE DEVICE OPTIONS: by way of a loop device. What that reads comes out of the cache of
# the disk, which is read ahead; so small files that lie beside each other are one question, and not one
# each.
mount_cached() {
    loop=$(/bin/losetup --find --show "/dev/$2") || return
    read_ahead "${loop##*/}"
    mount -t "$1" -o "$safe,$3" "$loop" "$root" || {
        /bin/losetup --detach "$loop"
        return 1
    }
    echo "${loop##*/}" >"/tmp/loop-$2"
}

# Of a large file nothing else is read meanwhile, and the cache would only be one more copy: it is read
# past it.
cache_for() {
    [ -e "/tmp/loop-$1" ] || return 0
    loop=$(cat "/tmp/loop-$1") past=0
    [ -f "$at" ] && [ "$(stat -c %s "$at")" -ge $LARGE ] && past=1
    [ "$(cat "/sys/class/block/$loop/loop/dio")" = $past ] && return 0
    case $past in 1) past=on ;; *) past=off ;; esac
    /bin/losetup --direct-io=$past "/dev/$loop" 2>/dev/null
    :
}

# place DEVICE TYPE PATH: `$at` is the path below the mounted file system. Links lead to where they lead
# for the guest: never out of its file system.
place() {
    opened "$1" "$2" || return
    rest=$3 at=$root links=0
    while [ -n "$rest" ]; do
        head=${rest%%/*}
        case $rest in */*) rest=${rest#*/} ;; *) rest= ;; esac
        case $head in
            '' | .) continue ;;
            ..)
                [ "$at" = "$root" ] || at=${at%/*}
                continue
                ;;
        esac
        if [ -L "$at/$head" ]; then
            links=$((links + 1))
            [ $links -gt 40 ] && echo "too many links" >&2 && return $NOT_THERE
            link=$(readlink -n "$at/$head" && echo .)
            case $link in /*) at=$root ;; esac
            rest=${link%.}/$rest
        elif [ -e "$at/$head" ]; then
            at=$at/$head
        else
            return $NOT_THERE
        fi
    done
}

subvolumes() {
    opened "$1" btrfs && btrfs subvolume list "$root"
}

is_there() {
    place "$@"
}

is_folder() {
    place "$@" && [ -d "$at" ]
}

list() {
    place "$1" "$2" "$3" || return
    if [ -d "$at" ]; then
        /bin/find "$at/" -mindepth 1 -maxdepth 1 -printf "$FORM"
    else
        /bin/find "$at" -maxdepth 0 -printf "$FORM"
    fi
}

search() {
    place "$1" "$2" "$3" || return
    shift 3
    /bin/find "$at/" -mindepth 1 -xdev "$@" -printf "$FORM"
}

send() {
    place "$1" "$2" "$3" || return
    [ -f "$at" ] || return $NO_FILE
    cache_for "$1"
    cat "$at"
}

archive() {
    place "$1" "$2" "$3" || return
    cache_for "$1"
    name=.
    [ -d "$at" ] || name=./${at##*/} at=${at%/*}
    /bin/tar --create --directory "$at" --format=pax --pax-option=delete=atime,delete=ctime \
        --numeric-owner --sparse --hole-detection=seek --xattrs '--xattrs-include=*' \
        --sort=inode --blocking-factor=64 "$name"
}

prepare 2>/dev/null
exec 3<>"$(port)"
echo ready >&3
while IFS= read -r line <&3; do
    eval "$line"
done
poweroff -f
