//! Saying that a process is ready: one line on stdout, and `READY=1` to systemd or whoever set `$NOTIFY_SOCKET`.

use std::ffi::OsStr;
use std::fmt;
use std::io::{Result, Write as _};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use crate::control::wire::State;
use crate::door_at::DoorAt;
use crate::error::OneLine;
use crate::json;

/// Environment variable with the socket to notify.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// What the ready line says. Its [`Display`](fmt::Display) form is that line:
/// `blockferry: GUEST: ready: STATE order=TERM.GEN nbd=ADDR listen=ADDR`, then ` next: COMMAND` if there is one.
#[derive(Debug, Clone, Copy)]
pub struct Ready<'a> {
    /// The guest, or `export`.
    pub name: &'a str,
    /// State, term and generation; `None` for an export, which has no record and no migration door.
    pub record: Option<(State, u64, u64)>,
    /// The guest doors; `nbd=` stands once for each.
    pub nbd: &'a [DoorAt],
    /// The migration door.
    pub listen: Option<&'a DoorAt>,
    /// What to type next; empty: nothing.
    pub next: &'a str,
}

impl fmt::Display for Ready<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blockferry: {}: ready:", OneLine(self.name))?;
        if let Some((state, term, generation)) = self.record {
            write!(f, " {} order={term}.{generation}", state.word())?;
        }
        for address in self.nbd {
            write!(f, " nbd={address}")?;
        }
        match self.listen {
            Some(address) => write!(f, " listen={address}")?,
            None if self.record.is_some() => f.write_str(" listen=none")?,
            None => {}
        }
        if !self.next.is_empty() {
            write!(f, " next: {}", OneLine(self.next))?;
        }
        Ok(())
    }
}

/// Prints the ready line and notifies. Nothing of it can fail the process: who does not listen does not hear.
pub fn announce(ready: &Ready<'_>, as_json: bool) {
    let line = if as_json { json::ready(ready) } else { format!("{ready}\n") };
    let mut stdout = std::io::stdout();
    if let Err(e) = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()) {
        log::warn!("ready: stdout: {e}");
    }
    notify();
}

/// Tells whoever waits for it that this process is ready; prints nothing.
pub fn notify() {
    if let Some(name) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty())
        && let Err(e) = send(&name)
    {
        log::warn!("ready: {}: {e}", name.display());
    }
}

/// Sends `READY=1` to a datagram socket; a name that begins with `@` is an abstract one.
fn send(name: &OsStr) -> Result<()> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Address;

    fn a_ready<'a>(nbd: &'a [DoorAt]) -> Ready<'a> {
        Ready { name: "g1", record: Some((State::Owner, 1, 7)), nbd, listen: None, next: "" }
    }

    #[test]
    fn the_ready_line_is_the_contracts() {
        let nbd = [Address::Unix("/run/a".into()), Address::Tcp { host: "::1".to_owned(), port: 7 }].map(DoorAt::from);
        let listen = DoorAt::from(Address::Tcp { host: "10.0.0.1".to_owned(), port: 49152 });
        let line = Ready { listen: Some(&listen), ..a_ready(&nbd[..1]) }.to_string();
        assert_eq!(line, "blockferry: g1: ready: owner order=1.7 nbd=unix:///run/a listen=tcp://10.0.0.1:49152");
        let line = Ready { next: "blockferry claim g1", ..a_ready(&nbd) }.to_string();
        assert_eq!(
            line,
            "blockferry: g1: ready: owner order=1.7 nbd=unix:///run/a nbd=tcp://[::1]:7 listen=none \
             next: blockferry claim g1"
        );
        let line = Ready { name: "export", record: None, ..a_ready(&nbd[..1]) }.to_string();
        assert_eq!(line, "blockferry: export: ready: nbd=unix:///run/a");
    }

    #[test]
    fn both_kinds_of_notify_socket_hear_ready() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notify");
        let hears = |socket: UnixDatagram, name: &OsStr| {
            send(name).expect("sends");
            let mut got = [0; 32];
            let length = socket.recv(&mut got).expect("receives");
            assert_eq!(&got[..length], b"READY=1");
        };
        hears(UnixDatagram::bind(&path).expect("binds"), path.as_os_str());
        let name = format!("blockferry-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        hears(UnixDatagram::bind_addr(&address).expect("binds"), OsStr::new(&format!("@{name}")));
        assert!(send(OsStr::new("/nowhere/at/all")).is_err());
    }
}
