//! What well-behaved peers send, one function for each target. Made by the product's own encoders, or taken from the
//! files that pin its bytes.

use blockferry::control::frame;
use blockferry::control::wire::{Reply, Request};
use blockferry::limits::CONTROL_FRAME_MAX;
use blockferry::nbd::wire::{self, OptionHead, OptionReply};

/// The bytes of every message between two hosts: `NAME HEX`.
const PHASE_GOLDEN: &str = include_str!("../../src/migrate/wire/golden.txt");
/// The bytes of every message of the control door: `KIND NAME MESSAGE FRAME MEANING`.
const CONTROL_GOLDEN: &str = include_str!("../it/golden/control.txt");

/// The client's flags: fixed newstyle, no zeroes.
const CLIENT_FLAGS: [u8; 4] = [0, 0, 0, 3];

fn from_hex(digits: &str) -> Vec<u8> {
    digits.as_bytes().chunks(2).map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
}

fn texts(lines: &[&str]) -> Vec<Vec<u8>> {
    lines.iter().map(|line| line.as_bytes().to_vec()).collect()
}

/// Messages of the phases, without their length.
fn phases() -> impl Iterator<Item = (&'static str, Vec<u8>)> {
    PHASE_GOLDEN.lines().filter_map(|line| line.split_once(' ')).map(|(name, bytes)| (name, from_hex(bytes.trim())))
}

pub(crate) fn phase_message() -> Vec<Vec<u8>> {
    phases().filter(|(name, _)| *name != "HELLO").map(|(_, bytes)| bytes).collect()
}

pub(crate) fn phase_hello() -> Vec<Vec<u8>> {
    let hellos: Vec<_> = phases().filter(|(name, _)| name.eq_ignore_ascii_case("hello")).map(|(_, b)| b).collect();
    assert!(!hellos.is_empty(), "the golden bytes have a hello");
    hellos
}

pub(crate) fn phase_export_name() -> Vec<Vec<u8>> {
    let (one, two) = ("1".repeat(32), "f0".repeat(16));
    texts(&[&format!("{one}/{two}/0000000a/{one}/vda"), &format!("{two}/{two}/ffffffff/{two}/a/b")])
}

/// Plain messages of the control door, of the given kind.
fn control(kind: &str, column: usize) -> Vec<Vec<u8>> {
    let lines = CONTROL_GOLDEN.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    lines.filter(|words| words[0] == kind && words.len() > column).map(|words| from_hex(words[column])).collect()
}

pub(crate) fn control_message() -> Vec<Vec<u8>> {
    [control("request", 2), control("reply", 2)].concat()
}

pub(crate) fn control_frame() -> Vec<Vec<u8>> {
    [control("request", 3), control("reply", 3)].concat()
}

pub(crate) fn control_stream() -> Vec<Vec<u8>> {
    let mut whole = [0; CONTROL_FRAME_MAX];
    let hello = Request::Hello { version: 3, session: 7 };
    let mut stream: Vec<u8> = Vec::new();
    for request in [hello, Request::Status, Request::Follow] {
        let length = frame::encode(&request, &mut whole).unwrap();
        stream.extend_from_slice(&whole[..length]);
    }
    let length = frame::encode(&Reply::Ok, &mut whole).unwrap();
    vec![stream.clone(), [&whole[..length], &stream].concat(), control_frame().concat()]
}

pub(crate) fn address() -> Vec<Vec<u8>> {
    texts(&[
        "unix:///run/blockferry/g1/nbd.sock",
        "tcp://127.0.0.1:49152",
        "tcp://[::1]:0",
        "tcp://host.example:10809",
        "virtio:org.blockferry.0",
    ])
}

pub(crate) fn disk_option() -> Vec<Vec<u8>> {
    texts(&[
        "vda,file=/d/g1.raw,size=20G",
        "vdb,external,shared",
        "vdc,file=/d/tools.raw,ro,cache=none",
        "sr0",
        "vdd,file=/d/a,shared,cache=writeback",
    ])
}

pub(crate) fn domain_xml() -> Vec<Vec<u8>> {
    texts(&["<domain type='kvm'><name>g1</name><devices>\
           <disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>\
           <source file='/d/g1.raw'/><target dev='vda' bus='virtio'/></disk>\
           <disk type='block' device='lun'><source dev='/dev/sdb'/><target dev='sda'/><shareable/></disk>\
           <disk type='network' device='disk'><source protocol='nbd' name='x'/><target dev='vdc'/><readonly/></disk>\
           <disk type='file' device='cdrom'><target dev='sr0'/><readonly/></disk>\
           <disk type='volume' device='floppy'><source pool='p' volume='v'/><target dev='fda'/><transient/></disk>\
           </devices></domain>"])
}

pub(crate) fn kernel_netlink() -> Vec<Vec<u8>> {
    let attribute = |kind: u16, data: &[u8]| {
        let length = u16::try_from(data.len() + 4).unwrap();
        let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), data].concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let message = |kind: u16, body: &[u8]| {
        let length = u32::try_from(body.len() + 16).unwrap();
        [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 2], &7_u32.to_ne_bytes(), &[0; 4], body].concat()
    };
    let item = attribute(1, &[attribute(1, &3_u32.to_ne_bytes()), attribute(2, &[1])].concat());
    let status = [&[4, 1, 0, 0][..], &attribute(8, &item)].concat();
    let family = [&[1, 2, 0, 0][..], &attribute(1, &31_u16.to_ne_bytes()), &attribute(2, b"nbd\0")].concat();
    let ended = message(2, &[&(-16_i32).to_ne_bytes()[..], &[0; 16]].concat());
    vec![message(31, &status), message(16, &family), [ended, message(31, &status)].concat()]
}

// ---- NBD ---------------------------------------------------------------------------------------------------------

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [&OptionHead { option, length: u32::try_from(data.len()).unwrap() }.encode()[..], data].concat()
}

fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    [&u32::try_from(name.len()).unwrap().to_be_bytes()[..], name.as_bytes(), rest].concat()
}

fn contexts(names: &[&str]) -> Vec<u8> {
    let mut data = named("vda", &u32::try_from(names.len()).unwrap().to_be_bytes());
    names.iter().for_each(|name| data.extend(named(name, &[])));
    data
}

fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u64, payload: &[u8]) -> Vec<u8> {
    [&wire::Request { flags, command, cookie, offset, length }.encode()[..], payload].concat()
}

/// The same with an extended header.
fn extended(flags: u16, command: u16, cookie: u64, length: u64, payload: &[u8]) -> Vec<u8> {
    [&wire::Request { flags, command, cookie, offset: 4096, length }.encode_extended()[..], payload].concat()
}

/// The commands that extended headers change.
fn extended_requests() -> Vec<u8> {
    let with_payload = wire::CMD_FLAG_PAYLOAD_LEN;
    let filter = [&8192_u64.to_be_bytes()[..], &1_u32.to_be_bytes()].concat();
    [
        extended(0, wire::CMD_READ, 1, 4096, &[]),
        extended(with_payload, wire::CMD_WRITE, 2, 512, &[7; 512]),
        extended(0, wire::CMD_WRITE, 3, 512, &[]),
        extended(with_payload, wire::CMD_BLOCK_STATUS, 4, 12, &filter),
        extended(0, wire::CMD_BLOCK_STATUS, 5, 65536, &[]),
        extended(with_payload, wire::CMD_TRIM, 6, 3, b"odd"),
        extended(0, wire::CMD_WRITE_ZEROES, 7, 1 << 33, &[]),
        extended(0, wire::CMD_DISC, 8, 0, &[]),
    ]
    .concat()
}

/// What a client says in transmission, every command once.
fn requests() -> Vec<u8> {
    [
        request(0, wire::CMD_READ, 1, 0, 4096, &[]),
        request(0, wire::CMD_WRITE, 2, 4096, 512, &[7; 512]),
        request(wire::CMD_FLAG_FUA, wire::CMD_WRITE, 3, 8192, 16, &[9; 16]),
        request(0, wire::CMD_WRITE_ZEROES, 4, 65536, 1 << 20, &[]),
        request(wire::CMD_FLAG_NO_HOLE, wire::CMD_WRITE_ZEROES, 5, 0, 512, &[]),
        request(0, wire::CMD_TRIM, 6, 1 << 20, 1 << 20, &[]),
        request(wire::CMD_FLAG_REQ_ONE, wire::CMD_BLOCK_STATUS, 7, 0, 1 << 20, &[]),
        request(0, wire::CMD_BLOCK_STATUS, 8, 0, 4 << 20, &[]),
        request(wire::CMD_FLAG_DF, wire::CMD_READ, 9, 0, 65536, &[]),
        request(0, wire::CMD_FLUSH, 10, 0, 0, &[]),
        request(0, wire::CMD_READ, 11, 0, 1 << 20, &[]),
        request(0, wire::CMD_DISC, 12, 0, 0, &[]),
    ]
    .concat()
}

/// What a client sends, from its flags to its goodbye.
pub(crate) fn nbd_session() -> Vec<Vec<u8>> {
    let go = option(wire::OPT_GO, &named("vda", &[0, 2, 0, 0, 0, 3]));
    let structured = option(wire::OPT_STRUCTURED_REPLY, &[]);
    let set = option(wire::OPT_SET_META_CONTEXT, &contexts(&["base:allocation"]));
    vec![
        [&CLIENT_FLAGS[..], &go, &requests()].concat(),
        [&CLIENT_FLAGS[..], &structured, &set, &go, &requests()].concat(),
        [&CLIENT_FLAGS[..], &option(wire::OPT_EXTENDED_HEADERS, &[]), &set, &go, &extended_requests()].concat(),
        [&CLIENT_FLAGS[..], &option(wire::OPT_EXPORT_NAME, b"vda"), &requests()].concat(),
        [
            &CLIENT_FLAGS[..],
            &option(wire::OPT_LIST, &[]),
            &option(wire::OPT_LIST_META_CONTEXT, &contexts(&["base:", "qemu:dirty-bitmap:"])),
            &option(wire::OPT_INFO, &named("vda", &[0, 0])),
            &option(wire::OPT_STARTTLS, &[]),
            &option(wire::OPT_BLOCKFERRY_PHASES, &[]),
            &option(4711, b"what?"),
            &option(wire::OPT_ABORT, &[]),
        ]
        .concat(),
    ]
}

/// The heads alone: an option, an option's reply, a request, a reply, a chunk.
pub(crate) fn nbd_wire() -> Vec<Vec<u8>> {
    vec![
        wire::greeting(3).to_vec(),
        OptionHead { option: wire::OPT_GO, length: 6 }.encode().to_vec(),
        OptionReply { option: wire::OPT_GO, reply: wire::REP_ACK, length: 0 }.encode().to_vec(),
        request(1, wire::CMD_WRITE, 7, 4096, 512, &[]),
        wire::simple_reply(5, 7).to_vec(),
        wire::structured_chunk(1, wire::REPLY_TYPE_OFFSET_DATA, 7, 520).to_vec(),
        extended(0, wire::CMD_READ, 7, 512, &[]),
        wire::extended_chunk(1, wire::REPLY_TYPE_OFFSET_DATA, 7, 4096, 520).to_vec(),
    ]
}

fn answer(option: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [&OptionReply { option, reply, length }.encode()[..], data].concat()
}

fn chunk(flags: u16, kind: u16, cookie: u64, parts: &[&[u8]]) -> Vec<u8> {
    let payload = parts.concat();
    let length = u32::try_from(payload.len()).unwrap();
    [&wire::structured_chunk(flags, kind, cookie, length)[..], &payload].concat()
}

fn extended_chunk(kind: u16, cookie: u64, parts: &[&[u8]]) -> Vec<u8> {
    let payload = parts.concat();
    let head = wire::extended_chunk(wire::REPLY_FLAG_DONE, kind, cookie, 0, payload.len() as u64);
    [&head[..], &payload].concat()
}

/// The cookies on the wire of a client's first three requests.
const COOKIES: [u64; 3] = [64, 129, 194];

/// What a server sends to the client of `targets::nbd_client`: extended headers or structured replies, a context, GO,
/// then answers to a read of 8 KiB, a block status and a flush.
pub(crate) fn nbd_client() -> Vec<Vec<u8>> {
    let flags = wire::FLAG_HAS_FLAGS | wire::FLAG_SEND_FLUSH | wire::FLAG_SEND_DF;
    let [first, second, third] = COOKIES;
    let unknown = answer(wire::OPT_EXTENDED_HEADERS, wire::REP_ERR_UNSUP, &[]);
    let extended = answer(wire::OPT_EXTENDED_HEADERS, wire::REP_ACK, &[]);
    let structured = [&unknown[..], &answer(wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[])].concat();
    let refused = [&unknown[..], &answer(wire::OPT_STRUCTURED_REPLY, wire::REP_ERR_UNSUP, b"no")].concat();
    let context = [&1_u32.to_be_bytes()[..], b"base:allocation"].concat();
    let set = [
        answer(wire::OPT_SET_META_CONTEXT, wire::REP_META_CONTEXT, &context),
        answer(wire::OPT_SET_META_CONTEXT, wire::REP_ACK, &[]),
    ]
    .concat();
    let go = [
        answer(wire::OPT_GO, wire::REP_INFO, &wire::info_export(1 << 20, flags)),
        answer(wire::OPT_GO, wire::REP_INFO, &wire::info_block_size(1, 4096, 1 << 20)),
        answer(wire::OPT_GO, wire::REP_ACK, &[]),
    ]
    .concat();
    let read = [
        chunk(0, wire::REPLY_TYPE_OFFSET_DATA, first, &[&wire::offset_data(0), &[7; 4096]]),
        chunk(wire::REPLY_FLAG_DONE, wire::REPLY_TYPE_OFFSET_HOLE, first, &[&wire::offset_hole(4096, 4096)]),
    ]
    .concat();
    let extents = [wire::extent(4096, 0), wire::extent(4096, 3)].concat();
    let status =
        chunk(wire::REPLY_FLAG_DONE, wire::REPLY_TYPE_BLOCK_STATUS, second, &[&wire::block_status(1), &extents]);
    let flush = chunk(wire::REPLY_FLAG_DONE, wire::REPLY_TYPE_NONE, third, &[]);
    let failed = chunk(
        wire::REPLY_FLAG_DONE,
        wire::REPLY_TYPE_ERROR_OFFSET,
        first,
        &[&wire::error_chunk(wire::EIO, 3), b"bad", &4096_u64.to_be_bytes()],
    );
    let all_extended = [
        extended_chunk(wire::REPLY_TYPE_OFFSET_DATA, first, &[&wire::offset_data(0), &[7; 8192]]),
        extended_chunk(
            wire::REPLY_TYPE_BLOCK_STATUS_EXT,
            second,
            &[&wire::block_status_ext(1, 2), &wire::extent_ext(4096, 0), &wire::extent_ext(1 << 33, 3)],
        ),
        extended_chunk(wire::REPLY_TYPE_NONE, third, &[]),
    ]
    .concat();
    let greeting = wire::greeting(3);
    vec![
        [&greeting[..], &extended, &set, &go, &all_extended].concat(),
        [&greeting[..], &structured, &set, &go, &read, &status, &flush].concat(),
        [&greeting[..], &structured, &set, &go, &failed, &status, &flush].concat(),
        [&greeting[..], &refused, &go, &wire::simple_reply(0, first), &[9; 8192], &wire::simple_reply(0, second)]
            .concat(),
        [&greeting[..], &structured, &answer(wire::OPT_GO, wire::REP_ERR_UNKNOWN, b"no such export")].concat(),
    ]
}
