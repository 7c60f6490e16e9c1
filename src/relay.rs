//! Carries bytes between a pair of descriptors and a socket until one side ends: `blockferry accept`, and two pipes
//! that somebody has passed on as the way to another host.
//!
//! Two threads, one buffer each; what has been read is always written before the end is reported. It looks at nothing
//! that it carries.

use std::io::Result;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::channel;

use rustix::io::Errno;

use crate::limits::{CONNECTION_STACK, RELAY_BUFFER};
use crate::socket::Socket;

/// Whose end it was.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// Nothing more comes from the descriptor.
    Input,
    /// The socket's peer has closed.
    Socket,
}

/// Relays until one of the two ends, and says which. What has come from the socket `before` goes first. The other
/// direction's thread may still be waiting then: whoever
/// calls this ends its process, or closes the descriptors.
///
/// # Errors
/// The error of a descriptor or of the socket, or there is no thread.
pub fn relay(input: OwnedFd, output: OwnedFd, socket: &Arc<Socket>, before: &[u8]) -> Result<End> {
    write(&output, before)?;
    let (say, hear) = channel();
    let thread = |name: &str| std::thread::Builder::new().name(name.to_owned()).stack_size(CONNECTION_STACK);
    let (sender, said) = (Arc::clone(socket), say.clone());
    thread("relay in").spawn(move || {
        let _ = said.send(carry_in(&input, &sender).map(|()| End::Input));
    })?;
    let receiver = Arc::clone(socket);
    thread("relay out").spawn(move || {
        let _ = say.send(carry_out(&receiver, &output).map(|()| End::Socket));
    })?;
    hear.recv().unwrap_or(Ok(End::Socket))
}

/// Makes one connection of a pair of descriptors, and relays until either side ends. Whoever is at the other end of
/// `output` then finds it closed, and is expected to close `input` as well.
///
/// # Errors
/// There is no socket pair, or no thread.
pub fn join(input: OwnedFd, output: OwnedFd) -> Result<Socket> {
    let (ours, theirs) = UnixStream::pair()?;
    let theirs = Arc::new(Socket::new(theirs.into()));
    let thread = std::thread::Builder::new().name("relay".to_owned()).stack_size(CONNECTION_STACK);
    thread.spawn(move || {
        if let Err(error) = relay(input, output, &theirs, &[]) {
            log::info!("passed pipes: {}", crate::error::reason(&error));
        }
        theirs.shutdown();
    })?;
    Ok(Socket::new(ours.into()))
}

fn carry_in(input: impl AsFd, socket: &Socket) -> Result<()> {
    let mut buffer = vec![0; RELAY_BUFFER];
    loop {
        match rustix::io::read(&input, &mut buffer[..]) {
            Ok(0) => return Ok(()),
            Ok(count) => socket.send_all(&buffer[..count])?,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => crate::socket::wait(&input, true, false, None).map(drop)?,
            Err(error) => return Err(error.into()),
        }
    }
}

fn carry_out(socket: &Socket, output: impl AsFd) -> Result<()> {
    let mut buffer = vec![0; RELAY_BUFFER];
    loop {
        let count = socket.recv(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        write(&output, &buffer[..count])?;
    }
}

fn write(output: impl AsFd, bytes: &[u8]) -> Result<()> {
    let mut left = bytes;
    while !left.is_empty() {
        match rustix::io::write(&output, left) {
            Ok(written) => left = &left[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => crate::socket::wait(&output, false, true, None).map(drop)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn bytes_go_both_ways_until_one_side_ends() {
        for side in [End::Input, End::Socket] {
            let pair = || UnixStream::pair().expect("a pair");
            let ((mut feed, input), (output, mut drain), (near, mut far)) = (pair(), pair(), pair());
            let socket = Arc::new(Socket::new(near.into()));
            let relayed = std::thread::spawn(move || relay(input.into(), output.into(), &socket, b"first"));
            let (there, back) = (vec![1; 3 * RELAY_BUFFER + 1], vec![2; 2 * RELAY_BUFFER + 3]);
            std::thread::scope(|scope| {
                let mut feeder = feed.try_clone().expect("a clone");
                let mut answerer = far.try_clone().expect("a clone");
                let (there, back) = (&there, &back);
                scope.spawn(move || feeder.write_all(there).expect("sent"));
                scope.spawn(move || answerer.write_all(back).expect("sent"));
                let mut got = vec![0; there.len()];
                far.read_exact(&mut got).expect("received");
                assert!(&got == there);
                let mut first = [0; 5];
                drain.read_exact(&mut first).expect("received");
                assert_eq!(&first, b"first");
                let mut got = vec![0; back.len()];
                drain.read_exact(&mut got).expect("received");
                assert!(&got == back);
            });
            match side {
                End::Input => feed.shutdown(std::net::Shutdown::Both).expect("shut"),
                End::Socket => far.shutdown(std::net::Shutdown::Both).expect("shut"),
            }
            let _ = &mut feed;
            assert_eq!(relayed.join().expect("no panic").expect("relayed"), side);
        }
    }
}
