#!/bin/sh
# tools/setup.sh PYTHON [interop]: what the build, or `make interop`, needs and pip cannot bring. As root on Debian and
# Ubuntu it installs what is missing; elsewhere it stops with the command to type.
set -eu
python=${1:-python3}
purpose=${2:-build}

missing() {
  if [ "$purpose" = interop ]; then
    "$python" -c 'import ctypes; ctypes.CDLL("libgthread-2.0.so.0")' 2>/dev/null || echo "GLib, which Qt needs"
    return
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "Python 3.10 or newer"
    return
  fi
  "$python" -c 'import venv, ensurepip' 2>/dev/null || echo "Python's venv module"
  "$python" native/needs.py
}

lacks=$(missing | paste -sd, -)
[ -n "$lacks" ] || exit 0

apt="gcc libc6-dev python3 python3-dev python3-venv liburing-dev"
dnf="gcc python3 python3-devel liburing-devel"
apk="gcc musl-dev python3 python3-dev liburing-dev"
pacman="gcc python liburing"
if [ "$purpose" = interop ]; then
  apt=libglib2.0-0 dnf=glib2 apk=glib pacman=glib2
fi

if command -v apt-get >/dev/null; then
  install="apt-get install -y --no-install-recommends $apt"
elif command -v dnf >/dev/null; then
  install="dnf install -y $dnf"
elif command -v apk >/dev/null; then
  install="apk add $apk"
elif command -v pacman >/dev/null; then
  install="pacman -S --needed $pacman"
else
  echo "Missing: $lacks. Install it with your package manager." >&2
  exit 1
fi

if [ "$(id -u)" != 0 ]; then
  install="sudo $install"
elif [ "${install%% *}" = apt-get ]; then
  echo "Missing: $lacks. Running: $install"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  $install -qq >/dev/null
  lacks=$(missing | paste -sd, -)
  [ -n "$lacks" ] || exit 0
  echo "Still missing for $python: $lacks. The package may be too old, or belong to another Python." >&2
  exit 1
fi
printf 'Missing: %s. Type:\n\n    %s\n\n' "$lacks" "$install" >&2
exit 1
