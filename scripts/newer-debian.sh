# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# To be sourced: programs of a newer Debian, unpacked beside the system's without root and without
# installing them. They run with their own libraries on the system's kernel, by way of their own
# ld.so.
#
#   provide NAME SUITE WITNESS write_wrappers PACKAGE…
#
# sets FINAL to the folder NAME/SUITE-… of the cache and prints FINAL/bin, where the wrappers are.
# Where FINAL/bin/WITNESS is there already, it does nothing else. `write_wrappers` fills $1 for a
# system that lies in $2.
#
# The cache is /var/cache/qmpbackup for root, so that programs of other users can be started from
# there, else ${XDG_CACHE_HOME:-~/.cache}/qmpbackup.

# The archive from which this system gets its own packages.
archive() {
    # shellcheck disable=SC2016 # the $ are apt's
    apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' | awk '$1 == "Debian" { print $2; exit }'
}

# An apt of its own in $1, to which no package is installed yet, for the suite $2.
configure_apt() {
    local apt=$1 suite=$2 from
    from=$(archive)
    [ -n "$from" ] || fail "the package sources name no Debian archive"
    mkdir -p "$apt"/{lists,archives}/partial "$apt"/{cache,none}
    : >"$apt/status"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $from $suite main" >"$apt/sources.list"
    cat >"$apt/apt.conf" <<END
Dir::State "$apt";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Dir::Cache::archives "$apt/archives";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "$apt/none";
Dir::Etc::preferencesparts "$apt/none";
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
END
}

# Packages with all they need, by the apt in $1.
download() {
    local apt=$1
    shift
    {
        APT_CONFIG=$apt/apt.conf apt-get -q update &&
            APT_CONFIG=$apt/apt.conf apt-get -q -y --download-only install "$@"
    } >"$apt/log" 2>&1 || {
        cat "$apt/log" >&2
        fail "apt-get could not download $*"
    }
}

# The packages in $1 as a system in $2.
unpack() {
    local folder package
    mkdir -p "$2"/usr/{bin,sbin,lib,lib64}
    for folder in bin sbin lib lib64; do
        ln -s "usr/$folder" "$2/$folder"
    done
    for package in "$1"/*.deb; do
        dpkg-deb -x "$package" "$2"
    done
}

# A command $1 in the folder $2 that runs the program of this name in the system $3, with the
# arguments $4, which may be words of a shell, in front.
write_wrapper() {
    cat >"$2/$1" <<END
#!/bin/sh
exec $3/lib64/ld-linux-x86-64.so.2 --argv0 $1 \\
    --library-path $3/usr/lib/x86_64-linux-gnu $3/usr/bin/$1 ${4:-} "\$@"
END
    chmod 755 "$2/$1"
}

provide() {
    local name=$1 suite=$2 witness=$3 wrappers=$4 cache key
    shift 4
    if [ "$(id -u)" -eq 0 ]; then
        cache=/var/cache/qmpbackup
    else
        cache=${XDG_CACHE_HOME:-$HOME/.cache}/qmpbackup
    fi
    key=$(cat "scripts/newer-$name.sh" scripts/newer-debian.sh | sha256sum | cut -c1-16)
    FINAL=$cache/$name/$suite-$key
    if [ ! -x "$FINAL/bin/$witness" ]; then
        say "unpacking $* of $suite in $FINAL" >&2
        mkdir -p "${FINAL%/*}"
        work=$(mktemp -d "${FINAL%/*}/building.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        configure_apt "$work/apt" "$suite"
        download "$work/apt" "$@"
        unpack "$work/apt/archives" "$work/done/system"
        mkdir "$work/done/bin"
        chmod 755 "$work/done"
        "$wrappers" "$work/done/bin" "$FINAL/system"
        # Whoever comes second loses, and has the same.
        mv -T "$work/done" "$FINAL" 2>/dev/null || [ -x "$FINAL/bin/$witness" ]
    fi
    echo "$FINAL/bin"
}
