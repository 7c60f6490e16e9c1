//! Long reads over a Unix socket without a copy: the pages of the page cache go through a pipe into the socket.
//!
//! A worker fills its [`Pipe`] with references to pages, which may wait for the device, sends the head of the reply,
//! and then lets the pipe run into the socket: three system calls for up to [`PIPE_ROOM`] bytes, and the one copy that
//! is made is the client's own. Over TCP the kernel's work for each page costs what the copy would have cost, so there
//! bytes are copied (docs/performance.md has the figures).
//!
//! What a client then receives is the page as it is when the client takes it out of the socket: at the latest there, a
//! READ that is not answered yet and a WRITE to the same place are concurrent, and either order of them is right.
//!
//! Whatever cannot be spliced is read the other way, as long as nothing of its reply has left. NBD specification:
//! "Simple reply message", "Structured reply chunk message".

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::pipe::PipeFlags;

use super::reply::ReplyHead;
use super::{Connection, error_number, gone, locked};
use crate::limits::{PIPE_ROOM, PIPES_MAX};
use crate::nbd::wire::{self, Request};

/// A worker's pipe; empty between two reads.
pub(super) struct Pipe {
    from: OwnedFd,
    into: OwnedFd,
    room: usize,
    _share: Share,
}

/// The pipes of this process: descriptors are for connections and records first.
static PIPES: AtomicUsize = AtomicUsize::new(0);

/// One of the pipes that there may be; given back when it is dropped.
struct Share(&'static AtomicUsize);

impl Share {
    fn take(of: &'static AtomicUsize) -> Option<Self> {
        let one_more = |taken: usize| (taken < PIPES_MAX).then_some(taken + 1);
        of.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).ok().map(|_| Self(of))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pipe {
    /// `None`: there are enough of them, the process is out of descriptors, or the system does not have this.
    fn new() -> Option<Self> {
        let share = Share::take(&PIPES)?;
        let (from, into) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).ok()?;
        // A user has room in pipes up to a limit; past it they are smaller, and that is all.
        let room = rustix::pipe::fcntl_setpipe_size(&into, PIPE_ROOM)
            .or_else(|_| rustix::pipe::fcntl_getpipe_size(&into))
            .ok()?;
        Some(Self { from, into, room, _share: share })
    }
}

impl Connection<'_> {
    /// Answers a READ. `false`: not in this way, and nothing has been sent.
    ///
    /// # Errors
    /// The connection's end.
    pub(super) fn read_uncopied(&self, request: &Request, place: &mut Option<Pipe>) -> io::Result<bool> {
        if place.is_none() {
            *place = Pipe::new();
        }
        let Some(pipe) = place.as_ref() else { return Ok(false) };
        let whole = !self.agreed.structured || request.flags & wire::CMD_FLAG_DF != 0;
        let end = request.offset + request.length;
        // The one chunk of a READ with DF is whole before its head leaves; a simple reply can only end the connection.
        if self.agreed.structured && whole && request.length > pipe.room as u64 {
            return Ok(false);
        }
        let (mut at, mut turn) = (request.offset, None);
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let filled = match self.visit.fill_pipe(pipe.into.as_fd(), at, left.min(pipe.room)) {
                Ok(filled) => filled,
                Err(fault) => {
                    // It may hold something.
                    *place = None;
                    if at == request.offset {
                        self.uncopied.store(false, Ordering::Relaxed);
                        return Ok(false);
                    }
                    if turn.is_some() {
                        return Err(io::Error::other("a read failed after its reply had begun"));
                    }
                    return self.reply(request, error_number(&fault).ok_or_else(gone)?).map(|()| true);
                }
            };
            let begins = turn.is_none();
            let held = turn.take().unwrap_or_else(|| locked(&self.sending));
            if begins {
                let (length, last) = if whole { (left, true) } else { (filled, filled == left) };
                self.send_in_turn(ReplyHead::for_data(self.agreed, request, at, length, last).bytes(), &[])?;
            }
            self.visit.socket().send_from(&pipe.from, filled).inspect_err(|_| self.break_off())?;
            at += filled as u64;
            if whole {
                turn = Some(held);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Access, Cache, Disk};
    use crate::export::{Door, Export, Gate};
    use crate::limits::{MIB, SECTOR};
    use crate::nbd::handshake::Agreed;
    use crate::socket::Socket;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    const LENGTH: usize = 3 * MIB;

    /// An export of a disk with `bytes`, and where that is.
    fn exported(bytes: &[u8]) -> (tempfile::TempDir, Arc<Export>) {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let path = dir.path().join("a");
        std::fs::write(&path, bytes).expect("written");
        let disk = Disk::open(&path, Access::ReadWrite, Cache::Writeback).expect("opened");
        (dir, Export::new("a", Some(Arc::new(disk)), false, Gate::Serving))
    }

    /// Reads `length` bytes at `offset` of a disk with `bytes`, whose file has shrunk to `left` meanwhile: what came of
    /// it, and all that the client received.
    fn answer(bytes: &[u8], left: u64, offset: u64, length: usize, structured: bool) -> (io::Result<bool>, Vec<u8>) {
        let (dir, export) = exported(bytes);
        let file = std::fs::File::options().write(true).open(dir.path().join("a")).expect("opened");
        file.set_len(left).expect("it shrinks");
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let socket = Arc::new(Socket::new(ours.into()));
        let visit = export.enter(Door::Guest, &socket).expect("let in");
        let length = length as u64;
        let request = Request { flags: 0, command: wire::CMD_READ, cookie: 7, offset, length };
        std::thread::scope(|scope| {
            let client = scope.spawn(move || {
                let mut all = Vec::new();
                theirs.read_to_end(&mut all).map(|_| all)
            });
            let connection = Connection::new(&visit, Agreed { structured, extended: false, base_allocation: false });
            let result = connection.read_uncopied(&request, &mut None);
            visit.socket().shutdown();
            (result, client.join().expect("it does not panic").expect("received"))
        })
    }

    fn pattern() -> Vec<u8> {
        (0..LENGTH / 4).flat_map(|at| u32::try_from(at).expect("short").to_le_bytes()).collect()
    }

    /// The data of a structured reply's chunks, and how many there are.
    fn chunks(mut reply: &[u8], offset: u64) -> (Vec<u8>, usize) {
        let (mut data, mut count) = (Vec::new(), 0);
        while let Some((head, rest)) = reply.split_at_checked(wire::CHUNK_LENGTH + 8) {
            let length = u32::from_be_bytes(head[16..20].try_into().expect("four")) as usize - 8;
            assert_eq!(head[20..28], (offset + data.len() as u64).to_be_bytes());
            data.extend_from_slice(&rest[..length]);
            count += 1;
            assert_eq!(head[5] == 1, rest.len() == length, "the last chunk, and no other, says so");
            reply = &rest[length..];
        }
        (data, count)
    }

    #[test]
    fn a_long_read_is_what_the_disk_holds() {
        let bytes = pattern();
        for (offset, length) in [(0, LENGTH), (SECTOR, LENGTH - 4096 - 512), (LENGTH as u64 - 70_144, 70_144)] {
            let wanted = &bytes[usize::try_from(offset).expect("short")..][..length];
            let (result, reply) = answer(&bytes, LENGTH as u64, offset, length, false);
            assert!(result.expect("sent"), "through the pipe");
            assert!(reply[16..] == *wanted, "a simple reply at {offset}");
            let (result, reply) = answer(&bytes, LENGTH as u64, offset, length, true);
            assert!(result.expect("sent"), "through the pipe");
            let (data, count) = chunks(&reply, offset);
            assert!(data == wanted && (count > 1 || length < MIB), "{count} chunks at {offset}");
        }
    }

    #[test]
    fn a_read_in_one_chunk_fits_the_pipe_or_goes_the_other_way() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let (_dir, export) = exported(&pattern());
        let visit = export.enter(Door::Guest, &Arc::new(Socket::new(ours.into()))).expect("let in");
        let connection = Connection::new(&visit, Agreed { structured: true, extended: false, base_allocation: false });
        for (room, length, fits) in [(65_536, 65_536, true), (65_536, 131_072, false)] {
            let mut pipe = Some(Pipe { room, ..Pipe::new().expect("there are enough") });
            let request = Request { flags: wire::CMD_FLAG_DF, command: wire::CMD_READ, cookie: 7, offset: 0, length };
            assert_eq!(connection.read_uncopied(&request, &mut pipe).expect("answered"), fits, "{room}, {length}");
        }
    }

    #[test]
    fn pipes_come_to_an_end_and_back() {
        static OWN: AtomicUsize = AtomicUsize::new(0);
        let mut taken: Vec<Share> = std::iter::from_fn(|| Share::take(&OWN)).collect();
        assert_eq!(taken.len(), PIPES_MAX);
        assert!(taken.pop().is_some() && Share::take(&OWN).is_some(), "what is dropped is there again");
        drop(taken);
        assert_eq!(OWN.load(Ordering::Acquire), 0);
    }

    #[test]
    fn nothing_is_sent_when_the_first_piece_cannot_be_read() {
        for structured in [false, true] {
            let (result, reply) = answer(&pattern(), 4096, 8192, MIB, structured);
            assert!(!result.expect("the other way says what is wrong") && reply.is_empty());
        }
    }

    #[test]
    fn a_piece_that_cannot_be_read_is_an_error_chunk_or_the_end() {
        let (result, reply) = answer(&pattern(), 2 * MIB as u64, 0, LENGTH, true);
        assert!(result.expect("answered"));
        let agreed = Agreed { structured: true, extended: false, base_allocation: false };
        let request = Request { flags: 0, command: wire::CMD_READ, cookie: 7, offset: 0, length: LENGTH as u64 };
        assert!(reply.ends_with(ReplyHead::for_result(agreed, &request, wire::EIO).bytes()));
        let (result, reply) = answer(&pattern(), 2 * MIB as u64, 0, LENGTH, false);
        assert!(result.is_err() && reply.len() < LENGTH, "nobody takes it for the whole");
    }
}
