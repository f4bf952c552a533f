# Inside the lab: copies what is measured into RAM and makes that the root, so that no file is ever read from the host
# while something is measured: time leaps while the machine waits for its host. $1 is the prepared root, the rest is the
# command.
set -e
stage=$1
shift
mount -t tmpfs -o mode=755,size=60% bench /mnt
cp -a "$stage/." /mnt/
cd /mnt
mkdir -p proc sys dev run tmp out old
mount --rbind /proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 run run
mount -t tracefs tracefs sys/kernel/tracing
mount --bind "$COFFERDAM_LAB_OUT" out
export PATH=/bin
exec /usr/bin/unshare --mount --propagation private /mnt/bench/busybox sh -c '
  cd /mnt && /usr/sbin/pivot_root . old && cd / && /bench/busybox umount -l /old && exec "$@"' sh "$@"
