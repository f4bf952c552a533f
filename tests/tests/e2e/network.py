#!/usr/bin/python3
"""A monitor that gives its VM a network device, and is then the real one.

The arguments are the device as JSON, a number, the real monitor, and the real monitor's arguments. With a number above zero
the tap that the device names is opened here, so many times, and handed down.
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


network, handed_down, monitor, *arguments = sys.argv[1:]
path = arguments[arguments.index("--config") + 1]
with open(path) as file:
    config = json.load(file)
network = json.loads(network)
if int(handed_down):
    name = network["tap"]["name"]
    network["tap"] = {"descriptors": [opened(name) for _ in range(int(handed_down))]}
config["vm"]["networks"] = [network]
with open(path, "w") as file:
    json.dump(config, file)
os.execv(monitor, [monitor] + arguments)
