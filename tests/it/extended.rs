//! Extended headers: `blockferry export` against a raw client, and against our own.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use blockferry::nbd::client::{Client, Extent, Wants};
use blockferry::nbd::wire::{self, OptionHead, OptionReply, ReplyFront, ReplyHead, Request};

use crate::exported::Exported;
use crate::images::disk_scratch;

const GIB: u64 = 1 << 30;
const SIZE: u64 = 8 * GIB;
const WITH_PAYLOAD: u16 = wire::CMD_FLAG_PAYLOAD_LEN;

/// An extended client that speaks bytes.
struct Raw(UnixStream);

/// A chunk's type, and its payload.
type Chunk = (u16, Vec<u8>);

impl Raw {
    /// Opens the default export with extended headers and `base:allocation`; returns the transmission flags too.
    fn open(exported: &Exported) -> (Self, u16) {
        let mut raw = Self(UnixStream::connect(exported.socket()).unwrap());
        raw.0.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(raw.take::<{ wire::GREETING_LENGTH }>(), wire::greeting(3));
        raw.0.write_all(&3_u32.to_be_bytes()).unwrap();
        raw.option(wire::OPT_EXTENDED_HEADERS, &[]);
        let query = wire::BASE_ALLOCATION.as_bytes();
        let length = u32::try_from(query.len()).unwrap().to_be_bytes();
        raw.option(wire::OPT_SET_META_CONTEXT, &[&[0, 0, 0, 0, 0, 0, 0, 1], &length[..], query].concat());
        let info = raw.option(wire::OPT_GO, &[0; 6]);
        (raw, u16::from_be_bytes([info[10], info[11]]))
    }

    /// Asks for an option that must succeed; returns the data of its first reply.
    fn option(&mut self, option: u32, data: &[u8]) -> Vec<u8> {
        let head = OptionHead { option, length: u32::try_from(data.len()).unwrap() };
        self.0.write_all(&[&head.encode()[..], data].concat()).unwrap();
        let mut first = None;
        loop {
            let head = OptionReply::parse(&self.take()).unwrap();
            let mut data = vec![0; head.length as usize];
            self.0.read_exact(&mut data).unwrap();
            assert!(!head.is_error(), "{head:?}");
            let first = first.get_or_insert(data);
            if head.reply == wire::REP_ACK {
                return std::mem::take(first);
            }
        }
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn send(&mut self, flags: u16, command: u16, offset: u64, length: u64, payload: &[u8]) {
        let request = Request { flags, command, cookie: 0x1122_3344_5566_7788, offset, length };
        self.0.write_all(&[&request.encode_extended()[..], payload].concat()).unwrap();
    }

    /// Does one request and returns its only chunk.
    fn ask(&mut self, flags: u16, command: u16, offset: u64, length: u64, payload: &[u8]) -> Chunk {
        self.send(flags, command, offset, length, payload);
        let head = self.take::<{ wire::EXTENDED_CHUNK_LENGTH }>();
        let ReplyFront::Head(ReplyHead::Chunk { flags, kind, cookie, length, offset: of }, _) =
            ReplyFront::parse(&head)
        else {
            panic!("no extended chunk: {head:?}");
        };
        assert_eq!((flags, cookie, of), (wire::REPLY_FLAG_DONE, 0x1122_3344_5566_7788, Some(offset)));
        let mut data = vec![0; usize::try_from(length).unwrap()];
        self.0.read_exact(&mut data).unwrap();
        (kind, data)
    }

    /// Does one request that must fail; returns the error.
    fn fails(&mut self, flags: u16, command: u16, offset: u64, length: u64, payload: &[u8]) -> u32 {
        let (kind, data) = self.ask(flags, command, offset, length, payload);
        let text = usize::from(u16::from_be_bytes([data[4], data[5]]));
        assert_eq!((kind, data.len()), (wire::REPLY_TYPE_ERROR, 6 + text));
        assert!(text > 0, "an error has words");
        u32::from_be_bytes(*data.first_chunk().unwrap())
    }
}

const NONE: Chunk = (wire::REPLY_TYPE_NONE, Vec::new());

/// A file of 8 GiB of holes.
fn sparse(folder: &tempfile::TempDir) -> Exported {
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    Exported::start([path])
}

#[test]
fn a_raw_client_uses_64_bit_lengths() {
    let folder = disk_scratch();
    let exported = sparse(&folder);
    let (mut raw, flags) = Raw::open(&exported);
    let offered = wire::FLAG_BLOCK_STATUS_PAYLOAD | wire::FLAG_SEND_DF | wire::FLAG_SEND_WRITE_ZEROES;
    assert_eq!(flags & offered, offered);

    assert_eq!(raw.ask(WITH_PAYLOAD, wire::CMD_WRITE, 5 * GIB, 512, &[7; 512]), NONE);
    let mut expected = (5 * GIB).to_be_bytes().to_vec();
    expected.extend([7; 512]);
    assert_eq!(raw.ask(0, wire::CMD_READ, 5 * GIB, 512, &[]), (wire::REPLY_TYPE_OFFSET_DATA, expected));

    // One extent for what 32 bits cannot say.
    let extents = |extents: &[(u64, u64)]| {
        let count = u32::try_from(extents.len()).unwrap();
        let mut data = wire::block_status_ext(1, count).to_vec();
        extents.iter().for_each(|&(length, flags)| data.extend(wire::extent_ext(length, flags)));
        (wire::REPLY_TYPE_BLOCK_STATUS_EXT, data)
    };
    let hole = u64::from(wire::STATE_HOLE | wire::STATE_ZERO);
    let (kind, whole) = raw.ask(0, wire::CMD_BLOCK_STATUS, 0, SIZE, &[]);
    assert_eq!((kind, &whole[..8]), (wire::REPLY_TYPE_BLOCK_STATUS_EXT, &wire::block_status_ext(1, 3)[..]));
    assert_eq!(whole[8..24], wire::extent_ext(5 * GIB, hole));
    assert_eq!(raw.ask(wire::CMD_FLAG_REQ_ONE, wire::CMD_BLOCK_STATUS, 0, SIZE, &[]), extents(&[(5 * GIB, hole)]));

    // With a payload, the length is the payload's, and the contexts are those that it names.
    let filter = |length: u64, contexts: &[u32]| {
        let mut payload = length.to_be_bytes().to_vec();
        contexts.iter().for_each(|context| payload.extend(context.to_be_bytes()));
        payload
    };
    let mut status = |payload: &[u8]| raw.ask(WITH_PAYLOAD, wire::CMD_BLOCK_STATUS, 0, payload.len() as u64, payload);
    assert_eq!(status(&filter(5 * GIB, &[1])), extents(&[(5 * GIB, hole)]));
    let invalid = [filter(512, &[]), filter(512, &[2]), filter(512, &[1, 1]), filter(SIZE + 1, &[1]), vec![0; 7]];
    for payload in invalid {
        let (kind, data) = status(&payload);
        assert_eq!((kind, data[3]), (wire::REPLY_TYPE_ERROR, 22), "{payload:?}");
    }

    assert_eq!(raw.ask(0, wire::CMD_WRITE_ZEROES, GIB, 6 * GIB, &[]), NONE);
    assert_eq!(raw.ask(0, wire::CMD_TRIM, 0, SIZE, &[]), NONE);
    assert_eq!(raw.ask(0, wire::CMD_CACHE, 0, SIZE, &[]), NONE);
    assert_eq!(raw.ask(0, wire::CMD_FLUSH, 0, 0, &[]), NONE);
    assert_eq!(raw.ask(0, wire::CMD_BLOCK_STATUS, 0, SIZE, &[]), extents(&[(SIZE, hole)]));

    raw.send(0, wire::CMD_DISC, 0, 0, &[]);
    assert_eq!(raw.0.read(&mut [0]).unwrap(), 0, "closed");
}

#[test]
fn a_raw_client_misuses_extended_headers() {
    let folder = disk_scratch();
    let exported = sparse(&folder);
    let (mut raw, _) = Raw::open(&exported);
    let einval = wire::EINVAL;
    assert_eq!(raw.ask(0, wire::CMD_WRITE, 0, 512, &[1; 512]), NONE, "what QEMU sends: the flag is missing");
    assert_eq!(raw.fails(WITH_PAYLOAD, wire::CMD_TRIM, 0, 300_000, &vec![1; 300_000]), einval);
    assert_eq!(raw.fails(WITH_PAYLOAD, wire::CMD_READ, 0, 3, b"odd"), einval);
    assert_eq!(raw.fails(WITH_PAYLOAD, 99, 0, 3, b"odd"), einval);
    assert_eq!(raw.fails(1 << 6, wire::CMD_READ, 0, 512, &[]), einval);
    assert_eq!(raw.fails(0, wire::CMD_READ, 0, 5 * GIB, &[]), wire::EOVERFLOW, "more than a payload may have");
    assert_eq!(raw.fails(0, wire::CMD_READ, 0, SIZE + 1, &[]), einval);
    assert_eq!(raw.fails(0, wire::CMD_TRIM, u64::MAX, u64::MAX, &[]), einval);
    assert_eq!(raw.fails(0, wire::CMD_WRITE_ZEROES, 512, SIZE, &[]), wire::ENOSPC);
    assert_eq!(raw.fails(WITH_PAYLOAD, wire::CMD_WRITE, SIZE, 512, &[1; 512]), wire::ENOSPC);
    assert_eq!(raw.ask(WITH_PAYLOAD, wire::CMD_WRITE, 0, 512, &[1; 512]), NONE, "it lives on");
    for (flags, command) in [(WITH_PAYLOAD, wire::CMD_WRITE), (WITH_PAYLOAD, wire::CMD_BLOCK_STATUS)] {
        let (mut raw, _) = Raw::open(&exported);
        raw.send(flags, command, 0, 6 * GIB, &[]);
        assert_eq!(raw.0.read(&mut [0]).unwrap(), 0, "closed");
    }
    // A compact request after extended headers.
    let request = Request { flags: 0, command: wire::CMD_READ, cookie: 1, offset: 0, length: 512 };
    raw.0.write_all(&[&request.encode()[..], &[0; 4]].concat()).unwrap();
    assert_eq!(raw.0.read(&mut [0]).unwrap(), 0, "closed");
}

#[test]
fn our_client_uses_them_with_our_server() {
    let folder = disk_scratch();
    let exported = sparse(&folder);
    for extended in [true, false] {
        let mut client = Client::connect(exported.connect(), "", Wants { extended, ..Wants::READING }).unwrap();
        assert_eq!((client.info().extended, client.info().structured), (extended, true));
        let bytes: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 7 % 255) as u8).collect();
        client.write_all(6 * GIB + 5, &bytes).unwrap();
        let mut read = vec![0; bytes.len()];
        client.read_exact(6 * GIB + 5, &mut read).unwrap();
        assert!(read == bytes);
        client.flush().unwrap();
        let mut first = None;
        let mut each = |extent: Extent| {
            first.get_or_insert(extent.length);
        };
        client.block_status(0, SIZE, &mut each).unwrap();
        let longest = if extended { 6 * GIB } else { (4 * GIB) - 65536 };
        assert_eq!(first, Some(longest));
        client.write_zeroes(5 * GIB, 2 * GIB, true).unwrap();
        client.trim(0, SIZE).unwrap();
        let mut data = 0;
        client.allocation(0, SIZE, &mut |length, flags| data += if flags == 0 { length } else { 0 }).unwrap();
        assert_eq!(data, 0);
        client.disconnect();
    }
}
