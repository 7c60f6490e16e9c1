# Option haggling by libnbd's option mode. Run by interop.rs in nbdsh, with URI of a server (without an export's name) in
# the environment that has "vda" of 64 MiB, writable, and "vdb" of 1 MiB.

import os
import nbd

uri = os.environ["URI"]
M = 1 << 20


def connect(structured=True):
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.set_request_structured_replies(structured)
    handle.connect_uri(uri)
    assert handle.aio_is_negotiating()
    return handle


def fails(errno, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errno == errno, error
    else:
        raise AssertionError("did not fail")


# List, ask, fail, ask again, go: all on one connection.
h = connect()
names = []
assert h.opt_list(lambda name, text: names.append((name, text))) == 2
assert names == [("vda", ""), ("vdb", "")], names
h.set_full_info(True)
h.set_export_name("vdb")
h.opt_info()
assert h.get_size() == M and h.get_canonical_export_name() == "vdb"
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 * M
for wrong in ("vdc", "", "vd", "vdaa", "VDA", "x" * 4096, "\N{SNOWMAN}"):
    h.set_export_name(wrong)
    fails("ENOENT", h.opt_info)
    fails("ENOENT", h.opt_go)
assert h.aio_is_negotiating()
h.set_export_name("vda")
h.opt_info()
assert h.get_size() == 64 * M and not h.is_read_only()
contexts = []
h.clear_meta_contexts()
h.opt_list_meta_context(lambda name: contexts.append(name))
assert contexts == ["base:allocation"], contexts
for queries, expected in ((["base:"], ["base:allocation"]), (["base:allocation"], ["base:allocation"]),
                          (["qemu:dirty-bitmap:x", "nonsense"], []), (["x:y", "base:allocation"], ["base:allocation"])):
    contexts.clear()
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
    h.opt_list_meta_context(lambda name: contexts.append(name))
    assert contexts == expected, (queries, contexts)
h.clear_meta_contexts()
h.add_meta_context("x:unknown")
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.opt_go()
assert h.aio_is_ready() and h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION) and not h.can_meta_context("x:unknown")
assert h.get_size() == 64 * M
h.pread(4096, 64 * M - 4096)
h.shutdown()

# Go without any context; block status was not agreed on.
h = connect()
h.set_export_name("vdb")
h.opt_info()
h.opt_go()
assert not h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION) and h.can_df()
h.set_strict_mode(0)
fails("EINVAL", h.block_status, 512, 0, lambda *_: None)
h.pread(4096, 0)
h.shutdown()

# Without structured replies there are no contexts and no DF.
h = connect(structured=False)
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.set_export_name("vda")
h.opt_go()
assert not h.can_df() and not h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.pread(4096, 0)
h.shutdown()

# Goodbye from inside the haggling.
h = connect()
h.opt_abort()

# A client of an older kind: no fixed newstyle, hence no options but the one that opens; with and without the zeroes.
for flags in (0, nbd.HANDSHAKE_FLAG_NO_ZEROES, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE):
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.set_export_name("vda")
    h.connect_uri(uri.replace("///", "///vda") if uri.startswith("nbd+unix") else uri + "vda")
    assert h.get_size() == 64 * M and h.can_df() == bool(flags & nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)
    h.pwrite(b"older" * 100, 512, nbd.CMD_FLAG_FUA)
    assert h.pread(500, 512) == b"older" * 100
    h.shutdown()

# Several exports are several disks.
a, b = nbd.NBD(), nbd.NBD()
for handle, name in ((a, "vda"), (b, "vdb")):
    handle.connect_uri(uri.replace("///", "///" + name) if uri.startswith("nbd+unix") else uri + name)
    handle.pwrite(name.encode() * 1024, 8192)
    handle.flush()
assert a.pread(3072, 8192) == b"vda" * 1024 and b.pread(3072, 8192) == b"vdb" * 1024
a.shutdown()
b.shutdown()
print("options: ok")
