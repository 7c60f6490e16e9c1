#!/usr/bin/env python3
"""Speaks blockferry's control protocol, version 4, from docs/protocol.md alone.
usage: control_client.py SOCKET GUEST status|claim|cancel|migrate DEST [BYTES_A_SECOND]|set BYTES_A_SECOND
SOCKET is a control door's, or that of the chardev behind a virtio port.
"""
import os, socket, sys
VERSION = 4
WORDS = {"state": "incoming receiving sealed owner offered given superseded unknown",
         "gate": "incoming receiving sealed serving quiesced fenced closed",
         "stays": "shared read-only external no-source not-chosen", "migration": "none running ended",
         "phase": "prepare bulk-pass passes state final-pass seal give abort",
         "owner": "here destination unknown elsewhere", "verify": "none written full",
         "transport": "auto nbd stream", "synchronous": "auto always never", "convergence":
         "copying converged too-long guest-is-faster"}
# Fields in order: u a varint, b a byte, t a text, d a digest, ? an option, * a sequence, a key of WORDS an enum.
LISTS = {"*disk": "name:t size:u stays:?stays gate:?gate", "*device": "name:t device:t", "*moving":
         "name:t size:u left:u sent:u zeroes:u rate:u dirty_rate:u passes:u estimate_s:?u resent:u equal:u verified:u "
         "unverified:u base:u", "receipt": "verify:verify bytes:u root:d term:u generation:u unread:u",
         "since": "dirty_rate:u rate:u", "kept": "receipt:receipt attempt:u lineage:u gave:b peer:t sent:?u equal:?u"}
REPLIES = [
    ("hello", "version:u guest:t session:u"), ("ok", ""), ("refused", "exit:b operation:t object:t cause:t"),
    ("status", "guest:t state:state term:u generation:u lineage:u peer:t migration:migration hint:t disks:*disk "
     "attached:*device receipt:?kept"),
    ("progress", "attempt:u phase:phase elapsed_ms:u convergence:convergence predicted_ms:?u downtime_limit_ms:u "
     "bandwidth:u held:b disks:*moving lost_ms:?u lost_cause:t transport:transport "
     "transport_cause:t state:u synchronous:?since base_cause:t"), ("done", "attempt:u exit:b message:t owner:owner "
     "destination:t sent:u zeroes:u passes:u total_ms:u switchover_us:?u resent:u equal:u receipt:?receipt state:?u "
     "pause_us:?u base:u")]

def crc32c(data):
    crc = 0xFFFFFFFF
    for bit in (byte >> n & 1 for byte in data for n in range(8)):
        crc ^= bit
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF

def frame(message, inverted=0):
    out = b""
    for run in (message + (crc32c(message) ^ inverted).to_bytes(4, "little")).split(b"\0"):
        while len(run) > 253: out, run = out + b"\xff" + run[:254], run[254:]
        out += bytes([len(run) + 1]) + run
    return out + b"\0"
def unframe(data, inverted=0xFFFFFFFF):  # without the zero that ends it
    out, at = b"", 0
    while at < len(data):
        end = at + data[at]
        out += data[at + 1:end] + (b"\0" if data[at] < 255 and end < len(data) else b"")
        at = end
    if at != len(data) or len(out) < 4 or crc32c(out[:-4]) ^ inverted != int.from_bytes(out[-4:], "little"):
        raise ValueError("not a control frame")
    return out[:-4]

def number(n): return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + number(n >> 7)
def text(s): return number(len(s.encode())) + s.encode()
def option(n): return b"\0" if n is None else b"\1" + number(n)
def hello(session): return b"\0" + number(VERSION) + number(session)
def migrate(to, bandwidth=0, downtime_ms=300, disks=(), overwrite=0, hold=0, connections=0, detach=0, plaintext=0,
            incremental=0, keep_partial=0, verify=1, transport=0, heedless=0, synchronous=0, same_base=0):
    return (b"\3" + text(to) + bytes([overwrite]) + number(len(disks)) + b"".join(map(text, disks)) +
            number(bandwidth) + number(downtime_ms) +
            bytes([hold, connections, detach, plaintext, incremental, keep_partial, verify, transport, heedless,
                   synchronous, same_base]))

def read(data, kind):
    if kind == "b": return next(data)
    if kind[0] == "?": return read(data, kind[1:]) if next(data) else None
    if kind == "d": return bytes(next(data) for _ in range(32)).hex()
    if kind in ("receipt", "kept", "since"): return fields(data, LISTS[kind])
    byte, value, shift = next(data), 0, 0
    while byte > 127:
        byte, value, shift = next(data), value | (byte & 127) << shift, shift + 7
    value |= byte << shift
    if kind == "t": return bytes([next(data) for _ in range(value)]).decode()
    if kind[0] == "*": return [fields(data, LISTS[kind]) for _ in range(value)]
    if kind == "convergence" and value == 3: return ("guest-is-faster", read(data, "u"), read(data, "u"))
    return WORDS[kind].split()[value] if kind in WORDS else value

def fields(data, kinds): return {name: read(data, kind) for name, kind in (k.split(":") for k in kinds.split())}
def reply(message): return REPLIES[message[0]][0], fields(iter(message[1:]), REPLIES[message[0]][1])
def replies(door):
    rest = b""
    while data := door.recv(4096):
        *frames, rest = (rest + data).split(b"\0")
        for data in frames:
            try: yield reply(unframe(data))
            except (ValueError, IndexError): pass  # noise, an empty frame, or a reply that is not known here

def main(path, guest, command, *words):
    requests = {"status": b"\1", "claim": b"\2\0", "cancel": b"\5" + text("cancelled by the manager"),
                "migrate": migrate(words[0], *map(int, words[1:])) if command == "migrate" else b"",
                "set": b"\6" + option(int(words[0])) + option(None) if command == "set" else b""}
    (door := socket.socket(socket.AF_UNIX)).settimeout(60)
    door.connect(path)
    heard, session = replies(door), int.from_bytes(os.urandom(4), "little")
    door.sendall(b"\0" + frame(hello(session)))
    said = next((said for kind, said in heard if kind == "hello" and said["session"] == session), {})
    if said.get("version") != VERSION or said.get("guest") != guest: sys.exit(f"not for us: {said}")
    door.sendall(frame(requests[command]))
    for kind, said in heard:
        print(kind, *(f"{name}={value}" for name, value in said.items()), flush=True)
        if kind in ("refused", "done") or kind != "progress" and command != "migrate": sys.exit(said.get("exit", 0))
    sys.exit("the door was closed")
if __name__ == "__main__": main(*sys.argv[1:])
