#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds what is given out, in build/.
#
#   scripts/package.sh dist     wheel and sdist in build/dist, as PyPI takes them
#   scripts/package.sh deb      one package for Debian 12 and 13 and Ubuntu 24.04, in build/deb
#
# The package for Debian holds the libraries that Debian 12 does not have, at the versions of
# requirements.txt, compiled for each of PYTHONS: only the names of compiled modules differ, so that all
# of them lie in one folder. That is laid out as a virtual environment of the system's own Python, which
# so finds them wherever it is started from.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/terminal.sh
. scripts/terminal.sh

readonly PYTHONS=(3.11 3.12 3.13 3.14)
readonly GLIBC=36 # 2.36 is Debian 12's
readonly TOOLS=build/tools
readonly HOME_OF_ALL=usr/lib/qmpbackup
readonly COMMANDS=(qmpbackup qmprebase qmprestore)

PIP=("$TOOLS/bin/python" -m pip --quiet --quiet --disable-pip-version-check --no-input)

provide_tools() {
    local wanted
    wanted=$(sha256sum <packaging/requirements.txt)
    [ "$wanted" = "$(cat "$TOOLS/.made" 2>/dev/null)" ] && return 0
    say "fetching the tools that build packages"
    scripts/setup.sh python3-venv
    rm -rf "$TOOLS"
    /usr/bin/python3 -m venv "$TOOLS"
    "${PIP[@]}" install -r packaging/requirements.txt
    echo "$wanted" >"$TOOLS/.made"
}

version() { sed -n 's/^__version__ = "\(.*\)"/\1/p' src/qmpbackup/__init__.py; }

# The time of the last commit: the same commit makes the same package.
epoch() { git log -1 --format=%ct 2>/dev/null || date +%s; }

dist() {
    rm -rf build/dist
    "$TOOLS/bin/python" -m build --no-isolation --outdir build/dist . >build/dist.log 2>&1 ||
        { cat build/dist.log >&2 && fail "no distribution could be built"; }
    "$TOOLS/bin/python" -m twine check --strict build/dist/*
}

# Wheels for this system's Python in build/wheels, from sources where a project has no wheel, and those
# of compiled modules for the other versions.
wheels() {
    local python compiled=() platforms=() minor
    rm -rf build/wheels
    "${PIP[@]}" wheel --no-deps --wheel-dir build/wheels -r requirements.txt
    "${PIP[@]}" wheel --no-deps --no-build-isolation --wheel-dir build/wheels .
    mapfile -t compiled < <(find build/wheels -name '*.whl' -not -name '*-none-any.whl' -printf '%f\n' |
        sed -E 's/^([^-]+)-([^-]+)-.*/\1==\2/')
    for minor in $(seq 17 $GLIBC); do
        platforms+=(--platform "manylinux_2_${minor}_$(uname -m)")
    done
    for python in "${PYTHONS[@]}"; do
        "${PIP[@]}" download --no-deps --only-binary :all: --python-version "$python" \
            "${platforms[@]}" --platform "manylinux2014_$(uname -m)" --dest "build/wheels/$python" "${compiled[@]}"
    done
}

lay_out() {
    local root=$1 place=$1/$HOME_OF_ALL wheel python command
    mkdir -p "$place/bin" "$place/lib/python3/site-packages" "$root/usr/bin"
    for wheel in build/wheels/*.whl build/wheels/*/*.whl; do
        "$TOOLS/bin/python" -m zipfile -e "$wheel" "$place/lib/python3/site-packages"
    done
    # What nobody loads: sources of C, tests, and a second backend of zstandard's.
    find "$place" \( -name '*.c' -o -name '*.h' -o -name '*.pyx' -o -name '_cffi.*.so' -o -name '.gitignore' \) -delete
    find "$place" \( -name '*.data' -o -name include \) -type d -prune -exec rm -r {} +
    find "$place" -name '*.so' -exec strip --strip-unneeded {} + -exec chmod 644 {} +
    for python in "${PYTHONS[@]}"; do
        ln -s python3 "$place/lib/python$python"
    done
    ln -s ../../../bin/python3 "$place/bin/python3"
    printf 'home = /usr/bin\ninclude-system-site-packages = true\n' >"$place/pyvenv.cfg"
    for command in "${COMMANDS[@]}"; do
        printf '#!/%s/bin/python3 -sP\nfrom qmpbackup.cli.main import %s\n\n%s()\n' \
            "$HOME_OF_ALL" "$command" "$command" >"$root/usr/bin/$command"
        chmod 755 "$root/usr/bin/$command"
    done
}

furnish() {
    local root=$1 doc=$1/usr/share/doc/qmpbackup
    mkdir -p "$doc/examples" "$root/usr/lib/systemd/system" "$root/usr/share/lintian/overrides"
    install -m 644 dist/systemd/*.timer dist/systemd/*.service "$root/usr/lib/systemd/system/"
    find dist -mindepth 1 -maxdepth 1 -not -name systemd -exec cp -r {} "$doc/examples/" \;
    [ ! -d dist/systemd/examples ] || cp -r dist/systemd/examples/. "$doc/examples/"
    install -m 644 packaging/copyright README.md "$doc/"
    cp -r docs "$doc/"
    gzip -9nc CHANGELOG.md >"$doc/NEWS.md.gz"
    {
        printf 'qmpbackup (%s) unstable; urgency=medium\n\n  * What is new stands in NEWS.md.gz.\n\n' "$(version)"
        printf ' -- %s  %s\n' "$(sed -n 's/^Maintainer: //p' packaging/control)" "$(date -R -u -d "@$(epoch)")"
    } | gzip -9n >"$doc/changelog.gz"
    install -m 644 packaging/lintian-overrides "$root/usr/share/lintian/overrides/qmpbackup"
    PYTHONPATH=$root/$HOME_OF_ALL/lib/python3/site-packages PYTHONDONTWRITEBYTECODE=1 \
        "$TOOLS/bin/python" packaging/pages.py "$root"
    install -d -m 755 "$root/etc/qmpbackup/conf.d"
    install -d -m 700 "$root/etc/qmpbackup/secrets"
}

describe() {
    local root=$1 architecture=$2 script
    mkdir -p "$root/DEBIAN"
    for script in postinst prerm postrm; do
        install -m 755 "packaging/$script" "$root/DEBIAN/$script"
    done
    echo /etc/qmpbackup/config.toml >"$root/DEBIAN/conffiles"
    (cd "$root" && find usr -type f -printf '%P\0' | sed -z 's,^,usr/,' | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
    sed -e "s/@VERSION@/$(version)/" -e "s/@ARCHITECTURE@/$architecture/" \
        -e "s/@SIZE@/$(du -sk --exclude=DEBIAN "$root" | cut -f1)/" packaging/control >"$root/DEBIAN/control"
}

deb() {
    local root=build/deb/root architecture file
    scripts/setup.sh binutils lintian
    architecture=$(dpkg --print-architecture)
    file=build/deb/qmpbackup_$(version)_$architecture.deb
    rm -rf build/deb
    umask 022
    mkdir -p "$root"
    say "fetching libraries for Python ${PYTHONS[*]}"
    wheels
    lay_out "$root"
    furnish "$root"
    describe "$root" "$architecture"
    SOURCE_DATE_EPOCH=$(epoch) dpkg-deb --root-owner-group -Zxz --build "$root" "$file" >/dev/null
    rm -rf "$root"
    lintian --allow-root --fail-on error,warning "$file"
    say "$file"
}

case ${1:-} in
dist | deb)
    mkdir -p build
    provide_tools
    "$1"
    ;;
*) fail "which: dist or deb?" ;;
esac
