#!/bin/sh
# Hook of mmdebstrap: packs the file tree ROOT, a Debian of nothing but the essentials, as the lowest layer of several
# images, then installs programs and packs what that changed as layers of their own. Writes to OUT: base.tar,
# redis.tar and python.tar.
set -eu
root=$1 out=$2
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

# The paths of the tree, sorted, without what is only needed while it is made.
paths() {
  (cd "$root" && find . -mindepth 1 \
    \( -path './dev/*' -o -path './proc/*' -o -path './sys/*' -o -path './tmp/*' -o -path './var/cache/apt/*' \
       -o -path './var/lib/apt/lists/*' -o -path './var/log/*' \) -prune -o "$@" -print0) | sort -z
}

# pack NAME: the paths on standard input.
pack() {
  tar --create --file "$out/$1.tar" --directory "$root" --no-recursion --null --files-from=- --numeric-owner \
    --format=pax --pax-option=delete=atime,delete=ctime --xattrs --xattrs-include='*' ||
    # The kernel changes the times of /proc and /sys by itself, and tar has the code 1 for "changed while it was read".
    [ $? -eq 1 ]
}

# changes NAME: what changed since the base was packed. A change of any kind sets the time of the inode, which no
# program can set back, so that packages with old files are seen too.
changes() {
  paths -newercm "$out/base.stamp" | pack "$1"
  paths > "$out/now.list"
  rm -rf "$out/gone"
  mkdir "$out/gone"
  comm -z -23 "$out/base.list" "$out/now.list" | tr '\0' '\n' | while read -r path; do
    mkdir -p "$out/gone/${path%/*}"
    : > "$out/gone/${path%/*}/.wh.${path##*/}"
  done
  (cd "$out/gone" && find . -type f -print0) | sort -z |
    tar --append --file "$out/$1.tar" --directory "$out/gone" --null --files-from=- --owner=0 --group=0 --format=pax
}

# apt WORDS: runs apt-get, which is only heard when it fails.
apt() {
  chroot "$root" apt-get --yes -q=2 -o=Dpkg::Use-Pty=0 -o=Acquire::Retries=3 \
    -o=Dpkg::Options::=--force-unsafe-io --no-install-recommends "$@" \
    > "$out/apt.log" 2>&1 || { cat "$out/apt.log" >&2; exit 1; }
}

paths > "$out/base.list"
pack base < "$out/base.list"
touch "$out/base.stamp"

apt install redis-server
changes redis
apt purge --auto-remove redis-server

apt install python3
changes python
