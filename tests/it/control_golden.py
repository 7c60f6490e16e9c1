#!/usr/bin/env python3
"""Holds control_client.py against the golden bytes: control_golden.py FILE"""
import sys

import control_client as client

# What is asked here, by the names of the golden lines.
ASKED = {
    "hello": client.hello(0x12345678),
    "status": b"\1",
    "claim": b"\2\0",
    "migrate": client.migrate("tcp://b:1", 300, 2, ["vda"], overwrite=1, connections=4, detach=1, plaintext=1,
                              incremental=1, keep_partial=1, verify=2, transport=2, heedless=1,
                              synchronous=2, same_base=1),
    "cancel": b"\5" + client.text("no"),
    "set": b"\6" + client.option(100 << 20) + client.option(300),
    "set-no-limit": b"\6" + client.option(0) + client.option(None),
}
# What is understood here. The keys of a reply are in the order of its fields.
DISK = {"name": "a", "size": 512, "stays": "external", "gate": "serving"}
MOVING = {"name": "a", "size": 1, "left": 2, "sent": 3, "zeroes": 4, "rate": 5, "dirty_rate": 6, "passes": 7,
          "estimate_s": 8, "resent": 9, "equal": 10, "verified": 11, "unverified": 12, "base": 18}
KEPT = {"receipt": {"verify": "full", "bytes": 21, "root": "16" * 32, "term": 23, "generation": 24, "unread": 28}, "attempt": 25,
        "lineage": 26, "gave": 1, "peer": "q", "sent": 27, "equal": None}
RECEIPT = {"verify": "written", "bytes": 11, "root": "0c" * 32, "term": 13, "generation": 14, "unread": 17}
UNDERSTOOD = {
    "hello": ("hello", [4, "g1", 0x12345678]),
    "ok": ("ok", []),
    "refused": ("refused", [1, "claim", "g1", "there is a record"]),
    "status": ("status", ["g", "owner", 1, 2, 3, "p", "running", "h", [DISK], [{"name": "a", "device": "/dev/nbd0"}], KEPT]),
    "progress": ("progress", [5, "passes", 6, ("guest-is-faster", 9, 8), 7, 10, 11, 1, [MOVING], 13, "c", "stream", "n", 14,
                 {"dirty_rate": 15, "rate": 16}, "b"]),
    "progress-first": ("progress", [5, "prepare", 0, "copying", None, 0, 0, 0, [], None, "", "auto", "", 0, None, ""]),
    "done": ("done", [1, 3, "x", "destination", "d", 4, 5, 6, 7, 8, 9, 10, RECEIPT, 15, 16, 18]),
    "done-aborted": ("done", [1, 3, "x", "here", "d", 4, 5, 6, 7, None, 9, 10, None, 15, 16, 18]),
}

asked, understood, words = set(), set(), {kind: [] for kind in client.WORDS}
for line in open(sys.argv[1]):
    if not line.strip() or line.startswith("#"):
        continue
    kind, name, message, framed, _meaning = line.split(" ", 4)
    message = bytes.fromhex(message)
    if kind in ("request", "reply"):
        inverted = 0xFFFFFFFF if kind == "reply" else 0
        framed = bytes.fromhex(framed)
        assert client.frame(message, inverted) == framed, line
        assert framed[-1] == 0 and client.unframe(framed[:-1], inverted) == message, line
    if kind == "request" and name in ASKED:
        assert ASKED[name] == message, (line, ASKED[name].hex())
        asked.add(name)
    elif kind == "reply" and name in UNDERSTOOD:
        got, fields = client.reply(message)
        assert (got, list(fields.values())) == UNDERSTOOD[name], (line, got, fields)
        understood.add(name)
    elif kind in words:
        assert message[0] == len(words[kind]), line
        word = {"TooLong": "too-long", "GuestIsFaster": "guest-is-faster"}.get(name, name.lower())
        words[kind].append(word)
assert asked == set(ASKED) and understood == set(UNDERSTOOD), (asked, understood)
for kind, found in words.items():
    assert found == client.WORDS[kind].split(), (kind, found)
print(f"{len(asked)} requests, {len(understood)} replies, {sum(map(len, words.values()))} words agree")
