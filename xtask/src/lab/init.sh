#!/bin/busybox sh
# First program of the lab: puts the host's file tree (read-only, over 9p) under a RAM overlay and
# continues there. /settings says where the module tree (LAB_MODULES) and the writable share (LAB_OUT) are on the host.
/bin/busybox mkdir -p /proc /sys /host /ram /new
/bin/busybox --install -s /bin
export PATH=/bin
. /settings
fail() { echo "lab: $*" >&2; poweroff -f; }

mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /modules/order); do
  insmod "/modules/$module" || fail "cannot load the module $module"
done

mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,ro,cache=loose host /host || fail "cannot mount the host's files"
mount -t tmpfs -o mode=755,size=80% ram /ram
mkdir /ram/upper /ram/work
mount -t overlay -o lowerdir=/host,upperdir=/ram/upper,workdir=/ram/work overlay /new || fail "cannot put an overlay on the host's files"

mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t cgroup2 none /new/sys/fs/cgroup
mount -t devtmpfs -o mode=755 dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm /new/dev/net /new/dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /new/dev/pts
mount -t tmpfs -o mode=1777 shm /new/dev/shm
mount -t mqueue mqueue /new/dev/mqueue
# Nodes whose opening loads the module behind them.
[ -e /new/dev/net/tun ] || mknod -m 666 /new/dev/net/tun c 10 200
[ -e /new/dev/fuse ] || mknod -m 666 /new/dev/fuse c 10 229
[ -e /new/dev/loop-control ] || mknod -m 660 /new/dev/loop-control c 10 237
ln -sf /proc/self/fd /new/dev/fd
ln -sf fd/0 /new/dev/stdin
ln -sf fd/1 /new/dev/stdout
ln -sf fd/2 /new/dev/stderr
mount -t tmpfs -o mode=755 run /new/run
mkdir -p /new/run/lock /new/run/lab "/new/usr/lib/modules/$(uname -r)"
chmod 1777 /new/run/lock
mount --bind "/new$LAB_MODULES" "/new/usr/lib/modules/$(uname -r)" || fail "no modules in $LAB_MODULES"
if [ -n "$LAB_OUT" ]; then
  mkdir -p "/new$LAB_OUT"
  mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=none,access=any out "/new$LAB_OUT" || fail "cannot mount $LAB_OUT"
fi
cp /bin/busybox /settings /session.sh /command.sh /new/run/lab/
umount /sys
umount /proc
exec switch_root /new /run/lab/busybox sh /run/lab/session.sh
