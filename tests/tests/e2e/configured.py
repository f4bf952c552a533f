#!/usr/bin/python3
"""A monitor whose VM has more than its container asked for, and which is then the real one.

The arguments are what to change in the VM's configuration as JSON, the real monitor, and the real monitor's arguments. What
is a list is added to the one that is there; anything else takes the place of what is there.
"""

import json
import os
import sys

changes, monitor, *arguments = sys.argv[1:]
path = arguments[arguments.index("--config") + 1]
with open(path) as file:
    config = json.load(file)
for name, value in json.loads(changes).items():
    there = config["vm"].get(name)
    config["vm"][name] = (there or []) + value if isinstance(value, list) else value
with open(path, "w") as file:
    json.dump(config, file)
os.execv(monitor, [monitor] + arguments)
