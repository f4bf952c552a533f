#!/usr/bin/env python3
"""Drives a micro-VM through its whole life over its REST API, with nothing but Python's standard library.

    vm_client.py COFFERDAM IMAGE

COFFERDAM is the command, IMAGE an image with a shell. The command makes and starts the VM; everything after that is
HTTP on the socket in the VM's state directory. `api/openapi.json` describes what can be asked.
"""

import http.client
import json
import socket
import struct
import subprocess
import sys


class UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path):
        super().__init__("cofferdam")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self.path)


class Vm:
    """The API of one VM."""

    def __init__(self, path):
        self.path = path

    def ask(self, method, path, document=None):
        """Asks for something, and gives the document that is answered. A problem document is an exception."""
        connection = UnixConnection(self.path)
        body = None if document is None else json.dumps(document)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        if response.status >= 400:
            problem = json.loads(text)
            raise RuntimeError(f"{problem['type']}: {problem['detail']}")
        is_json = response.headers.get_content_type() == "application/json"
        return json.loads(text) if is_json else text.decode()

    def events(self, since):
        """Yields what happens, from the event of a number on, until the VM ends."""
        connection = UnixConnection(self.path)
        connection.request("GET", f"/v1/events?follow=true&since={since}")
        for line in connection.getresponse():
            yield json.loads(line)

    def execute(self, container, arguments, given=b""):
        """Executes a program in a container; gives its exit code, its output and its errors."""
        body = json.dumps({"args": arguments, "stdin": True}).encode()
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.connect(self.path)
        head = (
            f"POST /v1/containers/{container}/processes HTTP/1.1\r\nHost: cofferdam\r\n"
            "Connection: upgrade\r\nUpgrade: cofferdam-stream\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        stream.sendall(head.encode() + body)
        answer = stream.makefile("rb")
        status = answer.readline().split()[1]
        headers = http.client.parse_headers(answer)
        if status != b"101":
            raise RuntimeError(answer.read(int(headers["Content-Length"])).decode())
        # From here on the connection is the program's streams. The end of what we send is the end of its input.
        stream.sendall(given)
        stream.shutdown(socket.SHUT_WR)
        streams = {1: b"", 2: b""}
        while header := answer.read(8):
            kind, length = struct.unpack(">BxxxI", header)
            streams[kind] += answer.read(length)
        ended = self.ask("GET", headers["Location"] + "/wait")
        return ended["exit_code"], streams[1], streams[2]


def main(cofferdam, image):
    made = subprocess.run(
        [cofferdam, "run", "-d", image, "sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.1; done"],
        check=True, capture_output=True, text=True,
    )
    main_id = made.stdout.strip()
    shown = subprocess.run([cofferdam, "inspect", main_id], check=True, capture_output=True, text=True)
    inspected = json.loads(shown.stdout)[0]
    vm = Vm(inspected["state_directory"] + "/api.sock")

    info = vm.ask("GET", "/v1/vm")
    print(f"a VM of {info['vcpus']} CPU and {info['memory_mib']} MiB is {info['state']}")

    # A second container beside the first one, made from the same definition.
    spec = inspected["container"]["spec"]
    spec.update(id="side", hostname="side")
    spec["process"]["args"] = ["sh", "-c", "echo made by hand; sleep 1000"]
    vm.ask("POST", "/v1/containers", {"spec": spec})
    vm.ask("POST", "/v1/containers/side/start")
    print("containers:", sorted(c["status"] for c in vm.ask("GET", "/v1/containers")))

    code, output, errors = vm.execute("side", ["sh", "-c", "cat; echo oops >&2; exit 3"], b"through the guest\n")
    print("executed:", code, output, errors)

    vm.ask("POST", "/v1/containers/side/pause")
    vm.ask("POST", "/v1/containers/side/resume")
    print("tasks:", vm.ask("GET", "/v1/containers/side/stats")["pids"]["current"] > 0)
    try:
        vm.ask("DELETE", "/v1/containers/side")
    except RuntimeError as problem:
        print("refused:", str(problem).split(":")[0])
    vm.ask("POST", "/v1/containers/side/kill", {"signal": 9})
    print("side ended with", vm.ask("GET", "/v1/containers/side/wait")["exit_code"])
    vm.ask("DELETE", "/v1/containers/side")

    # The VM ends with the container that it was made for.
    events = vm.events(since=1)
    vm.ask("POST", f"/v1/containers/{main_id}/kill", {"signal": 15})
    told = [event["event"] for event in events]
    print("events:", " ".join(told))
    # The socket is gone with the VM; what is left is on disk, and the command's business.
    for verb in "wait", "rm":
        subprocess.run([cofferdam, verb, main_id], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(*sys.argv[1:])
