//! A disk that tells the time: each sector that is read holds the host's clock.
//!
//! A virtual machine's own clock stands still while the machine does, so a guest that is moved cannot see by it how
//! long it was away. It reads this disk instead: both QEMUs have it from the same server, as a shared disk that
//! nobody copies, and a read that is under way when a machine stops is finished before. `live` starts it; the
//! guest's side is initramfs/guest/src/live.rs.

use crate::util::{Error, Result};
use blockferry::nbd::wire;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// The disk's size.
pub(crate) const SIZE: u64 = 1 << 20;
/// What can hold a time of its own.
const SECTOR: usize = 512;
/// The most that may be read at once, and the longest option that is listened to.
const READ_MAX: usize = 1 << 20;
const OPTION_MAX: usize = 8192;
/// The first bytes of every sector.
const MAGIC: &[u8; 8] = b"HOSTTIME";
/// How long a client may need to take a reply.
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves the clock at a Unix socket, under whatever export name, for as long as this process lives.
pub(crate) fn serve(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path).map_err(|error| Error::new("clock", path.display(), error))?;
    let epoch = Instant::now();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // What a client does wrong ends its connection and nothing else.
            thread::spawn(move || answer(&client, epoch));
        }
    });
    Ok(())
}

/// One client, to its end.
fn answer(client: &UnixStream, epoch: Instant) -> io::Result<()> {
    client.set_write_timeout(Some(PATIENCE))?;
    let mut input = BufReader::new(client);
    if !handshake(&mut input, client)? {
        return Ok(());
    }
    let mut data = Vec::with_capacity(READ_MAX);
    loop {
        let request = wire::Request::parse(&bytes(&mut input)?).ok_or(io::ErrorKind::InvalidData)?;
        let length = usize::try_from(request.length).unwrap_or(usize::MAX);
        data.clear();
        let error = match request.command {
            wire::CMD_DISC => return Ok(()),
            wire::CMD_READ if length <= READ_MAX && request.offset.saturating_add(length as u64) <= SIZE => {
                tell(&mut data, length, epoch);
                0
            }
            wire::CMD_FLUSH => 0,
            // Its payload is of no use to anybody, and neither is the client.
            wire::CMD_WRITE => return Err(io::ErrorKind::InvalidData.into()),
            _ => wire::EINVAL,
        };
        let mut output = client;
        output.write_all(&[&wire::simple_reply(error, request.cookie)[..], &data].concat())?;
    }
}

/// The options; true when a client goes on to read.
fn handshake(input: &mut impl Read, mut output: &UnixStream) -> io::Result<bool> {
    let flags = wire::FLAG_HAS_FLAGS | wire::FLAG_READ_ONLY | wire::FLAG_SEND_FLUSH | wire::FLAG_CAN_MULTI_CONN;
    output.write_all(&wire::greeting(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES))?;
    bytes::<4>(input)?;
    loop {
        let head = wire::OptionHead::parse(&bytes(input)?).ok_or(io::ErrorKind::InvalidData)?;
        let length = usize::try_from(head.length).unwrap_or(usize::MAX);
        if length > OPTION_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        input.read_exact(&mut vec![0; length])?;
        let mut reply = |reply, data: &[u8]| {
            let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
            let head = wire::OptionReply { option: head.option, reply, length }.encode();
            output.write_all(&[&head[..], data].concat())
        };
        match head.option {
            wire::OPT_GO | wire::OPT_INFO => {
                reply(wire::REP_INFO, &wire::info_export(SIZE, flags))?;
                reply(wire::REP_ACK, &[])?;
                if head.option == wire::OPT_GO {
                    return Ok(true);
                }
            }
            wire::OPT_ABORT => return reply(wire::REP_ACK, &[]).map(|()| false),
            _ => reply(wire::REP_ERR_UNSUP, &[])?,
        }
    }
}

/// So many bytes that tell the time.
fn tell(data: &mut Vec<u8>, length: usize, epoch: Instant) {
    let now_ns = u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let mut sector = [0; SECTOR];
    sector[..8].copy_from_slice(MAGIC);
    sector[8..16].copy_from_slice(&now_ns.to_le_bytes());
    while data.len() < length {
        let count = SECTOR.min(length - data.len());
        data.extend_from_slice(&sector[..count]);
    }
}

fn bytes<const COUNT: usize>(input: &mut impl Read) -> io::Result<[u8; COUNT]> {
    let mut bytes = [0; COUNT];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::util::{self, QUESTION};
    use std::process::Command;

    #[test]
    fn two_reads_of_a_foreign_client_tell_two_times() {
        if util::find_program("qemu-io").is_none() {
            eprintln!("SKIP: no qemu-io here");
            return;
        }
        let path = std::env::temp_dir().join(format!("xtask-clock-{}", std::process::id()));
        serve(&path).expect("it listens");
        let mut client = Command::new("qemu-io");
        client.args(["-r", "-f", "raw", "-c", "read -v 0 512", "-c", "sleep 5", "-c", "read -v 4096 512"]);
        client.arg(format!("nbd+unix:///clock?socket={}", path.display()));
        let said = util::capture("clock", &mut client, QUESTION).expect("it runs");
        let times: Vec<&str> = said.stdout.lines().filter(|line| line.contains("HOSTTIME")).collect();
        assert_eq!(times.len(), 2, "{} {}", said.stdout, said.stderr);
        assert_ne!(times[0].get(10..), times[1].get(10..));
        std::fs::remove_file(&path).expect("it was there");
    }
}
