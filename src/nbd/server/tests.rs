//! What waits for what on one connection.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;
use crate::disk::{Cache, Disk};
use crate::export::{Export, Gate, quiesce};
use crate::socket::Socket;

const MIB: u32 = 1 << 20;
const PLAIN: Agreed = Agreed { structured: false, extended: false, base_allocation: false };

/// An export of a disk past the page cache, and one connection to it.
struct Bench {
    export: Arc<Export>,
    client: UnixStream,
    server: JoinHandle<io::Result<Goodbye>>,
    _dir: tempfile::TempDir,
}

impl Bench {
    /// `None`: no `O_DIRECT` here.
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir_in(".").expect("on a real file system");
        let Ok(disk) = Disk::create(&dir.path().join("disk"), u64::from(8 * MIB), Cache::None) else {
            eprintln!("SKIP: no O_DIRECT on this file system");
            return None;
        };
        let export = Export::new("vda", Some(Arc::new(disk)), false, Gate::Serving);
        let (ours, client) = UnixStream::pair().expect("a socket pair");
        client.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        client.set_write_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let visit = export.enter(Door::Guest, &Arc::new(Socket::new(ours.into()))).expect("let in");
        let server = thread::spawn(move || transmit(&visit, PLAIN));
        Some(Self { export, client, server, _dir: dir })
    }

    fn send(&mut self, command: u16, cookie: u64, offset: u64, length: u32, payload: &[u8]) {
        self.send_flagged(0, command, cookie, offset, length, payload);
    }

    fn send_flagged(&mut self, flags: u16, command: u16, cookie: u64, offset: u64, length: u32, payload: &[u8]) {
        let request = Request { flags, command, cookie, offset, length: u64::from(length) };
        let bytes = [&request.encode(), payload].concat();
        self.client.write_all(&bytes).expect("sent");
    }

    /// The cookie of the next reply, which is no error, and the data of a READ of `length(cookie)` bytes.
    fn reply(&mut self, length: impl Fn(u64) -> usize) -> (u64, Vec<u8>) {
        let mut head = [0; 16];
        self.client.read_exact(&mut head).expect("a reply");
        assert_eq!(head[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
        let cookie = u64::from_be_bytes(*head.last_chunk().expect("long enough"));
        let mut data = vec![0; length(cookie)];
        self.client.read_exact(&mut data).expect("the data");
        (cookie, data)
    }

    fn end(self) {
        drop(self.client);
        assert_eq!(self.server.join().expect("no panic").expect("no error"), Goodbye::HungUp);
    }
}

#[test]
fn reads_and_flushes_pass_long_and_short_writes_that_wait_at_the_gate() {
    let Some(mut bench) = Bench::new() else { return };
    let quiesced = quiesce(&[Arc::clone(&bench.export)], Instant::now() + Duration::from_secs(5)).expect("at rest");
    // As many as have large buffers, and one that needs as many of them again.
    for cookie in 1..=4 {
        bench.send(wire::CMD_WRITE, cookie, cookie * 4096, 4096, &[7; 4096]);
    }
    bench.send(wire::CMD_WRITE, 5, u64::from(MIB), MIB, &vec![8; MIB as usize]);
    bench.send(wire::CMD_READ, 6, 0, 2 * MIB, &[]);
    bench.send(wire::CMD_FLUSH, 7, 0, 0, &[]);
    let length = |cookie| if cookie == 6 { 2 * MIB as usize } else { 0 };
    let mut first = [bench.reply(length), bench.reply(length)];
    first.sort();
    assert_eq!([first[0].0, first[1].0], [6, 7]);
    assert!(first[0].1.iter().all(|byte| *byte == 0), "nothing has been written");
    drop(quiesced);
    let mut rest: Vec<u64> = (0..5).map(|_| bench.reply(length).0).collect();
    rest.sort_unstable();
    assert_eq!(rest, [1, 2, 3, 4, 5]);
    bench.end();
}

#[test]
fn a_long_write_with_fua_is_answered_when_its_last_piece_is_done() {
    let Some(mut bench) = Bench::new() else { return };
    let quiesced = quiesce(&[Arc::clone(&bench.export)], Instant::now() + Duration::from_secs(5)).expect("at rest");
    bench.send_flagged(wire::CMD_FLAG_FUA, wire::CMD_WRITE, 1, 0, MIB, &vec![8; MIB as usize]);
    // Read behind it: by then all of its pieces wait at the gate.
    bench.send(wire::CMD_READ, 2, u64::from(4 * MIB), 4096, &[]);
    let length = |cookie| if cookie == 2 { 4096 } else { 0 };
    assert_eq!(bench.reply(length).0, 2);
    drop(quiesced);
    assert_eq!(bench.reply(length).0, 1);
    bench.send(wire::CMD_READ, 2, u64::from(MIB) - 4096, 4096, &[]);
    assert_eq!(bench.reply(length), (2, vec![8; 4096]));
    bench.end();
}

#[test]
fn long_requests_need_not_begin_or_end_where_pages_do() {
    let Some(mut bench) = Bench::new() else { return };
    let byte = |at: u64| at.wrapping_mul(2_654_435_761).to_le_bytes()[3];
    let ranges = [(512, 3 * MIB + 512), (u64::from(4 * MIB), MIB), (u64::from(5 * MIB) - 4096, MIB + 8192)];
    for (cookie, (offset, length)) in (1..).zip(ranges) {
        let payload: Vec<u8> = (offset..offset + u64::from(length)).map(byte).collect();
        bench.send(wire::CMD_WRITE, cookie, offset, length, &payload);
        // A short one behind it.
        bench.send(wire::CMD_WRITE, cookie + 10, u64::from(7 * MIB) + cookie * 512, 512, &[1; 512]);
        assert_eq!((bench.reply(|_| 0).0 + bench.reply(|_| 0).0), 2 * cookie + 10);
    }
    for (cookie, (offset, length)) in (1..).zip(ranges) {
        bench.send(wire::CMD_READ, cookie, offset, length, &[]);
        let (_, data) = bench.reply(|_| length as usize);
        let wrong = (offset..).zip(&data).find(|(at, found)| byte(*at) != **found);
        assert_eq!(wrong, None, "{length} bytes at {offset}");
    }
    bench.end();
}
