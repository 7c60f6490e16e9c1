# Requests that must be refused, each with the error that the specification names, on a connection that lives on. Run by
# interop.rs in nbdsh, with URI of an export of 64 MiB, STRUCTURED=0|1 and WRITABLE=0|1 in the environment.

import os
import nbd

uri, structured, writable = os.environ["URI"], os.environ["STRUCTURED"] == "1", os.environ["WRITABLE"] == "1"
M = 1 << 20
SIZE = 64 * M

h = nbd.NBD()
h.set_request_structured_replies(structured)
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(uri)
# libnbd is to send what it is told, right or wrong.
h.set_strict_mode(0)
assert h.is_read_only() != writable
beginning = h.pread(4096, 0)


def refused(errno, command, *arguments):
    try:
        getattr(h, command)(*arguments)
    except nbd.Error as error:
        assert error.errno == errno, (command, arguments[1:], error)
    else:
        raise AssertionError("%s%r was not refused" % (command, arguments[1:]))
    assert h.aio_is_ready(), command
    assert h.pread(4096, 0) == beginning, command


def ignore(*_):
    pass


refused("EINVAL", "pread", 1, SIZE)
refused("EINVAL", "pread", 2, SIZE - 1)
refused("EINVAL", "pread", 4096, 1 << 62)
refused("EINVAL", "pread", 0, 0)
refused("EOVERFLOW" if structured else "EINVAL", "pread", 32 * M + 1, 0)
refused("EINVAL", "pread", 512, 0, nbd.CMD_FLAG_NO_HOLE)
refused("EINVAL", "pread", 512, 0, 1 << 15)
refused("EINVAL", "cache", 512, SIZE)
refused("EINVAL", "cache", 0, 0)
refused("EINVAL", "flush", 1 << 14)
if structured:
    refused("EINVAL", "block_status", 1, SIZE, ignore)
    refused("EINVAL", "block_status", 0, 0, ignore)
    refused("EINVAL", "block_status", 1, 0, ignore, nbd.CMD_FLAG_NO_HOLE)
    refused("EINVAL", "pread_structured", 2, SIZE - 1, ignore)
else:
    # Nobody agreed on block status, nor on chunks that must not be split.
    refused("EINVAL", "pread", 512, 0, nbd.CMD_FLAG_DF)
    refused("EINVAL", "block_status", 512, 0, ignore)

if writable:
    refused("ENOSPC", "pwrite", bytes(1), SIZE)
    refused("ENOSPC", "pwrite", bytes(4097), SIZE - 4096)
    refused("ENOSPC", "pwrite", bytes(32 * M), SIZE - 4096)
    refused("ENOSPC", "pwrite", bytes(32 * M), 1 << 62)
    refused("ENOSPC", "zero", 4096, SIZE)
    refused("ENOSPC", "zero", SIZE, 512)
    refused("EINVAL", "trim", 4096, SIZE - 512)
    refused("EINVAL", "pwrite", bytes(), 0)
    refused("EINVAL", "pwrite", bytes(512), 0, nbd.CMD_FLAG_DF)
    refused("EINVAL", "pwrite", bytes(3 * M), 0, 1 << 13)
    refused("EINVAL", "zero", 0, 0)
    refused("EINVAL", "zero", 512, 0, nbd.CMD_FLAG_REQ_ONE)
    refused("EINVAL", "trim", 0, 0)
    refused("EINVAL", "trim", 512, 0, nbd.CMD_FLAG_NO_HOLE)
else:
    for command, what in (("pwrite", bytes(512)), ("pwrite", bytes(32 * M)), ("zero", 4096), ("trim", 4096)):
        refused("EPERM", command, what, 0)
        refused("EPERM", command, what, SIZE - 512)
    h.flush()
h.shutdown()
print("refusals: ok")
