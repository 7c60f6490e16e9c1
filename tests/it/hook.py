"""A hook whose VMM listens at a Unix socket: says the point, carries the state, ends as it is told.

usage: hook.py SOCKET POINT. The VMM is in tests/it/hooks.rs. It answers `CODE LENGTH`, a line; LENGTH bytes of state
follow, and CODE is the exit code if all of them came.
"""
import os
import socket
import sys

path, point = sys.argv[1:]
vmm = socket.socket(socket.AF_UNIX)
vmm.connect(path)
about = [os.environ["BLOCKFERRY_" + name] for name in ("GUEST", "SIDE", "RAN", "DISKS", "PEER", "ATTEMPT", "NBD")]
vmm.sendall((" ".join([point] + [word or "-" for word in about]) + "\n").encode())
if point == "state-in":
    while data := os.read(0, 65536):
        vmm.sendall(data)
vmm.shutdown(socket.SHUT_WR)
answer = vmm.makefile("rb")
code, length = (int(word) for word in answer.readline().split())
while length:
    data = answer.read1(min(length, 65536))
    if not data:
        sys.exit("the VMM died")
    os.write(1, data)
    length -= len(data)
if code:
    print("told to fail at", point, file=sys.stderr)
sys.exit(code)
