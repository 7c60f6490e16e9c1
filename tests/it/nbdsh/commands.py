# Every command of the transmission phase, by libnbd. Run by interop.rs in nbdsh, with these in the environment:
# URI of a writable export of 64 MiB, STRUCTURED=0|1, FILE behind it, SPARSE=1 if that is a file with holes.

import os
import nbd

uri, path = os.environ["URI"], os.environ["FILE"]
structured, sparse = os.environ["STRUCTURED"] == "1", os.environ["SPARSE"] == "1"
K, M = 1 << 10, 1 << 20
SIZE = 64 * M


def connect():
    handle = nbd.NBD()
    handle.set_request_structured_replies(structured)
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_uri(uri)
    return handle


def pattern(offset, length):
    """Bytes that tell where they stand: each page holds its number."""
    first, last = offset // 4096, (offset + length + 4095) // 4096
    pages = b"".join(page.to_bytes(8, "big") * 512 for page in range(first + 1, last + 1))
    return pages[offset % 4096:][:length]


def on_disk(offset, length):
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def extents(offset, length, flags=0):
    found = []

    def each(context, at, entries, error):
        assert (context, at) == (nbd.CONTEXT_BASE_ALLOCATION, offset), (context, at)
        found.extend(zip(entries[::2], entries[1::2]))

    h.block_status(length, offset, each, flags)
    assert all(length > 0 for length, _ in found), found
    return found


def same(offset, expected):
    got = bytes(h.pread(len(expected), offset))
    if got != expected:
        wrong = next(at for at in range(len(got)) if got[at] != expected[at])
        raise AssertionError("at %d + %d: %r" % (offset, wrong, got[wrong:wrong + 16]))


h = connect()
assert h.get_size() == SIZE and not h.is_read_only()
assert h.get_structured_replies_negotiated() == structured
assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION) == structured and h.can_df() == structured
for can in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "multi_conn"):
    assert getattr(h, "can_" + can)(), can
sizes = [h.get_block_size(which) for which in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
assert sizes == [1, 4096, 32 * M], sizes

# Writes of every kind of size and alignment, each read back: one byte, a sector, a page, what a connection's own
# thread serves and what passes through workers in pieces, up to the largest there is.
for offset, length in ((0, 512), (4095, 2), (70000, 1), (123457, 65537), (M, 4 * K), (2 * M - 7, 128 * K),
                       (3 * M, 128 * K + 1), (4 * M + 3, 3 * M + 11), (SIZE - 1, 1), (SIZE - 300 * K, 300 * K),
                       (16 * M + 512, 32 * M)):
    # To sync the largest ones each time takes long and tells nothing.
    for flags in (0, nbd.CMD_FLAG_FUA) if length < M else (nbd.CMD_FLAG_FUA if offset % 2 else 0,):
        h.pwrite(b"\xff" * length, offset)
        same(offset, b"\xff" * length)
        h.pwrite(pattern(offset, length), offset, flags)
        same(offset, pattern(offset, length))
    assert on_disk(offset, length) == pattern(offset, length), (offset, length)
h.pwrite(pattern(0, 32 * M), 0)
h.pwrite(pattern(32 * M, 32 * M), 32 * M, nbd.CMD_FLAG_FUA)
same(0, pattern(0, 32 * M))
same(32 * M, pattern(32 * M, 32 * M))
same(SIZE - 3, pattern(SIZE - 3, 3))
h.flush()

# Chunks of structured replies cover the request, in whatever order, and are one with DF.
if structured:
    for flags, most, requests in (
        (0, 32 * M // (128 * K), ((32 * M, 4 * M), (200 * K, 77))),
        (nbd.CMD_FLAG_DF, 1, ((128 * K, 4 * M), (100 * K, 77), (512, 0))),
    ):
        for length, offset in requests:
            chunks = []
            h.pread_structured(length, offset, lambda data, at, kind, error: chunks.append((at, bytes(data), kind)), flags)
            assert 1 <= len(chunks) <= most and all(kind == nbd.READ_DATA for _, _, kind in chunks), len(chunks)
            assert b"".join(data for _, data, _ in sorted(chunks)) == pattern(offset, length)
    try:
        h.pread_structured(128 * K + 1, 0, lambda *chunk: None, nbd.CMD_FLAG_DF)
    except nbd.Error as error:
        assert error.errno == "EOVERFLOW", error
    else:
        raise AssertionError("a chunk that cannot be one was sent as one")

# Zeroes. A hole gives room back, NO_HOLE keeps it; both read as zero, with and without FUA, and nothing beside them.
def allocated():
    return os.stat(path).st_blocks * 512


for offset, length in ((M, M), (9 * M + 5, 70001), (12 * M, 8 * M), (SIZE - 4096, 4096)):
    for flags in (nbd.CMD_FLAG_NO_HOLE, 0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA):
        before = (max(offset - 100, 0), offset - max(offset - 100, 0))
        behind = (offset + length, min(100, SIZE - offset - length))
        h.pwrite(pattern(offset, length), offset)
        h.flush()
        full = allocated()
        h.zero(length, offset, flags)
        same(offset, bytes(length))
        for there in (before, behind):
            if there[1]:
                same(there[0], pattern(*there))
        if sparse and length >= M:
            kept = allocated() >= full - 64 * K
            assert kept == bool(flags & nbd.CMD_FLAG_NO_HOLE), (full, allocated(), flags)
    h.pwrite(pattern(offset, length), offset)
    # A fast zero is done, or refused in a moment; never half done.
    for flags in (nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE):
        try:
            h.zero(length, offset, flags)
            same(offset, bytes(length))
        except nbd.Error as error:
            assert error.errno == "ENOTSUP", error
            same(offset, pattern(offset, length))
        h.pwrite(pattern(offset, length), offset)
h.zero(SIZE, 0)
same(16 * M, bytes(32 * M))

# Trim: what is there afterwards is not promised, but beside it nothing changes.
h.pwrite(pattern(0, 8 * M), 0)
h.flush()
full = allocated()
h.trim(4 * M, 2 * M)
h.trim(70000, M + 3, nbd.CMD_FLAG_FUA)
same(0, pattern(0, M + 3))
same(6 * M, pattern(6 * M, 2 * M))
assert not sparse or allocated() <= full - 4 * M, (full, allocated())

# Cache is a hint.
h.cache(8 * M, 0)
h.cache(1, SIZE - 1)
same(0, pattern(0, M + 3))

# Block status: extents cover what was asked, or begin to; with REQ_ONE there is one.
if structured:
    h.zero(SIZE, 0)
    for at in range(8):
        h.pwrite(pattern(at * 2 * M, M), at * 2 * M)
    h.flush()
    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    if sparse:
        assert extents(0, 16 * M) == [(M, 0), (M, hole)] * 8, extents(0, 16 * M)
        assert extents(M + 512, 2 * M) == [(M - 512, hole), (M, 0), (512, hole)], extents(M + 512, 2 * M)
        assert extents(0, SIZE, nbd.CMD_FLAG_REQ_ONE) == [(M, 0)]
        assert extents(16 * M, 48 * M) == [(48 * M, hole)]
    else:
        assert extents(0, SIZE) == [(SIZE, 0)], extents(0, SIZE)
    for offset, length in ((0, SIZE), (5 * M, 1), (SIZE - 1, 1), (M - 1, 2)):
        (one,) = extents(offset, length, nbd.CMD_FLAG_REQ_ONE)
        assert one[0] <= length, one
        assert sum(extent[0] for extent in extents(offset, length)) == length

# Many requests under way at once, from two connections: what one has flushed the other reads.
other = connect()
buffers = []
for at in range(64):
    buffer = nbd.Buffer.from_bytearray(bytearray(pattern(at * M, 100 * K)))
    buffers.append((at, buffer, h.aio_pwrite(buffer, at * M)))
while h.aio_in_flight():
    h.poll(10000)
for _, _, cookie in buffers:
    assert h.aio_command_completed(cookie)
h.flush()
reads = [(at, buffer, other.aio_pread(buffer, at * M)) for at in range(64) for buffer in [nbd.Buffer(100 * K)]]
while other.aio_in_flight():
    other.poll(10000)
for at, buffer, cookie in reads:
    assert other.aio_command_completed(cookie)
    assert bytes(buffer.to_bytearray()) == pattern(at * M, 100 * K), at
other.shutdown()
h.shutdown()
print("commands: ok")
