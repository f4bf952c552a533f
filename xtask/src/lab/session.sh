# Second half of the lab's process 1: sets up what a booted machine has, runs the command with its three
# streams on their own ports, and reports its exit code with the number of bytes it wrote.
lab() { tool=$1; shift; /run/lab/busybox "$tool" "$@"; }
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
cd /run/lab
. ./settings

for port in /sys/class/virtio-ports/*; do
  read -r name <"$port/name"
  lab ln -s "/dev/${port##*/}" "$name"
done
exec 9<>control

lab hostname lab
printf '127.0.1.1 lab\n' >>/etc/hosts
lab ifconfig lo up
/sbin/modprobe kvm-amd || echo "lab: cannot load kvm-amd" >&2
# As distributions have it that let every user run guests.
lab chmod 666 /dev/kvm
# Without cpuset: a process that is moved into a group of it gets all of the group's CPUs, the first one as well (see below).
for controller in cpu io memory hugetlb pids misc; do
  echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done 2>/dev/null

# The ports can be opened once each, and programs open /dev/stdout again: the command gets pipes. The relays
# are xtask's own (see lab/relay.rs for why) and say how many bytes they passed on.
lab mkfifo in out err
lab cat stdin >in 2>/dev/null &
# The host may build its xtask anew while we run, and a program whose file is gone stops at its next page.
lab cp "$LAB_RELAY" relay
./relay lab-relay stdout <out >out.count &
relays=$!
./relay lab-relay stderr <err >err.count &
relays="$relays $!"
# Compiled filters are code that is written while other CPUs run what lies beside it (see lab/hold.rs): interpret them.
{ echo 0 >/proc/sys/net/core/bpf_jit_enable; } 2>/dev/null || :
# Several CPUs need things that stay (see lab/hold.rs), and are asked whether they go on.
if [ "$(lab nproc)" -gt 1 ]; then
  lab mkfifo held
  ./relay lab-hold >held &
  read -r _ <held
  ./relay lab-pulse pulse &
fi
# Guests may run on all CPUs but the first (see `smp` in lab/mod.rs).
cpus=$(lab nproc)
mask=1
[ "$cpus" = 1 ] || mask=$(printf %x $(((1 << cpus) - 2)))
echo up >&9
lab taskset "$mask" /run/lab/busybox setsid /run/lab/busybox sh /run/lab/command.sh <in >out 2>err 9>&-
code=$?
# What the command left behind ends with it, so that its streams end too. The kernel's threads and this
# script with its relays are in session 0, the command and all that came of it in others.
left=1
while [ -n "$left" ]; do
  left=
  for stat in /proc/[0-9]*/stat; do
    read -r line <"$stat" || continue
    set -- ${line##*) }
    if [ "$4" != 0 ] && [ "$1" != Z ]; then
      left=1
      kill -9 "${line%% *}"
    fi
  done
done 2>/dev/null
wait $relays
read -r written_out <out.count
read -r written_err <err.count
lab sync
echo "exit $code $written_out $written_err" >&9
read -r _ <&9
lab poweroff -f
