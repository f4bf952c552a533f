# Inside the lab, before anything that is measured becomes the root: a disk in RAM with a file system that page caches and
# `O_DIRECT` work with, and a tap. The rest is the command.
set -e
modprobe brd rd_nr=1 rd_size=524288
modprobe ext4
modprobe tun
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/ram0
ip tuntap add dev tap0 mode tap vnet_hdr
ip address add 172.30.0.1/30 dev tap0
ip link set tap0 up
exec "$@"
