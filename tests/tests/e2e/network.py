#!/usr/bin/python3
"""A monitor that gives its VM a network device, and is then the real one.

COFFERDAM_TEST_NETWORK is the device; with COFFERDAM_TEST_HANDED_DOWN=N, the tap that it names is opened here, N times, and
handed down.
"""

import fcntl
import json
import os
import struct
import sys

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x2, 0x100, 0x1000, 0x4000


def opened(name):
    """The number of a new queue of the tap."""
    queue = os.open("/dev/net/tun", os.O_RDWR)
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE
    fcntl.ioctl(queue, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    os.set_inheritable(queue, True)
    return queue


path = sys.argv[sys.argv.index("--config") + 1]
with open(path) as file:
    config = json.load(file)
network = json.loads(os.environ["COFFERDAM_TEST_NETWORK"])
handed_down = int(os.environ["COFFERDAM_TEST_HANDED_DOWN"])
if handed_down:
    name = network["tap"]["name"]
    network["tap"] = {"descriptors": [opened(name) for _ in range(handed_down)]}
config["vm"]["networks"] = [network]
with open(path, "w") as file:
    json.dump(config, file)
monitor = os.environ["COFFERDAM_TEST_MONITOR"]
os.execv(monitor, [monitor] + sys.argv[1:])
