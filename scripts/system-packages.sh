#!/bin/sh
# What a bare Debian or Ubuntu lacks before `make` can go on: the venv module, and libpython for Triton's Python stub.
# `make test` asks for the programs that tests run, too. A test whose program is missing is skipped, and fails in CI.
# Usage: scripts/system-packages.sh PYTHON [test]
set -eu
python=$1
programs=
[ "${2:-}" = test ] && programs="nginx curl jq openssl chromium"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.11 | 3.12) ;;
    *)
        echo "Python $version: the bundled Triton needs numpy<2, which has builds for Python 3.11 and 3.12 here." >&2
        echo "Name one of them (make PYTHON=python3.12 …), or use the container in docker/." >&2
        exit 1
        ;;
esac

missing=
"$python" -c 'import ensurepip' 2>/dev/null || missing="$missing python$version-venv"
"$python" - <<'PYTHON' || missing="$missing libpython$version"
import sys, sysconfig
from pathlib import Path
name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
folders = [sysconfig.get_config_var("LIBDIR"), "/usr/lib/" + (sysconfig.get_config_var("MULTIARCH") or ""), "/usr/local/lib"]
sys.exit(not any((Path(folder) / name).is_file() for folder in folders if folder))
PYTHON
PATH=$PATH:/usr/sbin
for program in $programs; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
if [ "${2:-}" = test ] && ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
    missing="$missing postgresql"  # its programs are on no path
fi
[ -z "$missing" ] && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing$missing"
    apt-get update -qq && apt-get install -qq -y --no-install-recommends $missing || [ -n "$programs" ]
else
    echo "missing:$missing. Install with: sudo apt-get install$missing" >&2
    [ -n "$programs" ] || exit 1
fi
