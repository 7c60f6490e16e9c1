//! The server's side of the handshake against clients of the field. Nothing here serves a request: these clients look
//! around and leave.

#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use blockferry::cause::Cause;
use blockferry::nbd::client::{Client, PhasesAnswer, Wants, offer_phases};
use blockferry::nbd::handshake::{
    Agreed, BASE_ALLOCATION_ID, Description, Directory, HandshakeError, OpenError, Outcome, haggle,
};
use blockferry::nbd::wire;
use blockferry::socket::Socket;

use crate::harness::{peer, scratch, until};

const SIZE: u64 = 3 << 20;

struct Door;

impl Directory for Door {
    type Opened = &'static str;

    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        each("sda", "the first disk");
        each("sdb", "");
    }

    fn describe(&self, name: &str) -> Result<Description, OpenError> {
        let text = match name {
            "sda" | "" => "the first disk",
            "sdb" => "",
            "gone" => return Err(OpenError::Shutdown(Cause::new("the guest lives elsewhere"))),
            _ => return Err(OpenError::Unknown),
        };
        let flags = wire::FLAG_SEND_FLUSH | wire::FLAG_SEND_FUA | wire::FLAG_SEND_DF | wire::FLAG_CAN_MULTI_CONN;
        let mut description = Description::new(SIZE, flags);
        description.text.push_str(text).unwrap();
        description.name.push_str(if name == "sdb" { "sdb" } else { "sda" }).unwrap();
        Ok(description)
    }

    fn open(&self, name: &str) -> Result<(Description, &'static str), OpenError> {
        Ok((self.describe(name)?, if name == "sdb" { "sdb" } else { "sda" }))
    }

    fn takes_phases(&self) -> bool {
        true
    }
}

type Ended = Result<Outcome<&'static str>, HandshakeError>;

/// Leads handshakes at `listener`, in turn, until `count` have ended, then waits for each client to leave.
fn serve(listener: UnixListener, count: usize) -> thread::JoinHandle<Vec<Ended>> {
    listener.set_nonblocking(true).unwrap();
    thread::spawn(move || {
        let mut ended = Vec::new();
        for _ in 0..count {
            let (stream, _) = until("client", || listener.accept().ok());
            stream.set_nonblocking(false).unwrap();
            let socket = Socket::new(stream.into());
            ended.push(haggle(&socket, &Door));
            socket.set_recv_timeout(Some(crate::harness::DEADLINE)).unwrap();
            while socket.recv(&mut [0; 64]).is_ok_and(|received| received > 0) {}
        }
        ended
    })
}

/// Runs a client to its end, at most until the deadline.
fn run(command: &mut Command) -> Output {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("end of the client", || child.try_wait().unwrap());
    child.wait_with_output().unwrap()
}

fn nbdinfo(folder: &Path, export: &str, arguments: &[&str]) -> Option<Output> {
    let uri = format!("nbd+unix:///{export}?socket={}", folder.join("nbd.sock").display());
    Some(run(Command::new(peer("nbdinfo")?).args(arguments).arg(uri)))
}

#[test]
fn nbdinfo_is_told_everything() {
    let folder = scratch();
    let door = serve(UnixListener::bind(folder.path().join("nbd.sock")).unwrap(), 1);
    let Some(output) = nbdinfo(folder.path(), "sda", &["--no-content"]) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    for line in [
        "protocol: newstyle-fixed without TLS, using structured packets",
        "export=\"sda\"",
        "description: the first disk",
        "export-size: 3145728",
        "base:allocation",
        "block_size_minimum: 1\n",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
        "can_df: true",
        "can_multi_conn: true",
        "can_trim: false",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    // This client only asks with INFO, and says goodbye.
    assert!(matches!(door.join().unwrap()[0], Ok(Outcome::Ended)));
}

#[test]
fn nbdsh_enters_transmission() {
    let Some(program) = peer("nbdsh") else { return };
    let folder = scratch();
    let path = folder.path().join("nbd.sock");
    let door = serve(UnixListener::bind(&path).unwrap(), 2);
    let script = "h.add_meta_context('base:allocation'); h.set_export_name('sdb'); h.connect_unix(path); \
                  print(h.get_size(), h.can_meta_context('base:allocation'), h.can_df())";
    for structured in ["True", "False"] {
        let script = format!("path = {path:?}; h.set_request_structured_replies({structured}); {script}");
        // Its module belongs to the system's Python, not to another that may stand before it.
        let output = run(Command::new(&program).env("PATH", "/usr/bin:/bin").args(["-c", &script]));
        let expected = format!("{SIZE} {structured} {structured}\n");
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{output:?}");
    }
    for (ended, structured) in door.join().unwrap().iter().zip([true, false]) {
        let Ok(Outcome::Transmission { opened, agreed }) = ended else { panic!("{ended:?}") };
        assert_eq!((*opened, *agreed), ("sdb", Agreed { structured, extended: false, base_allocation: structured }));
    }
}

#[test]
fn nbdinfo_lists_and_describes_each_export() {
    let folder = scratch();
    let door = serve(UnixListener::bind(folder.path().join("nbd.sock")).unwrap(), 1);
    let Some(output) = nbdinfo(folder.path(), "", &["--list", "--no-content"]) else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains("export=\"sda\":\n\tdescription: the first disk\n"), "{text}");
    assert!(text.contains("export=\"sdb\":"), "{text}");
    for ended in door.join().unwrap() {
        ended.unwrap();
    }
}

#[test]
fn nbdinfo_does_not_get_an_export() {
    for (export, cause) in [("nonsense", "No such file or directory"), ("gone", "gone")] {
        let folder = scratch();
        let door = serve(UnixListener::bind(folder.path().join("nbd.sock")).unwrap(), 1);
        let Some(output) = nbdinfo(folder.path(), export, &[]) else { return };
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(cause), "{output:?}");
        assert!(matches!(door.join().unwrap()[0], Ok(Outcome::Ended)));
    }
}

#[test]
fn qemu_img_is_told_why_it_does_not_get_an_export() {
    let Some(program) = peer("qemu-img") else { return };
    let folder = scratch();
    let door = serve(UnixListener::bind(folder.path().join("nbd.sock")).unwrap(), 1);
    let uri = format!("nbd+unix:///gone?socket={}", folder.path().join("nbd.sock").display());
    let output = run(Command::new(program).arg("info").arg(uri));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("the guest lives elsewhere"), "{output:?}");
    door.join().unwrap();
}

#[test]
fn nbd_client_lists() {
    let Some(program) = peer("nbd-client") else { return };
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let door = thread::spawn(move || haggle(&Socket::new(listener.accept().unwrap().0.into()), &Door));
    let output = run(Command::new(program).args(["-l", "127.0.0.1"]).arg(port.to_string()));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("sda") && text.contains("sdb"), "{output:?}");
    assert!(matches!(door.join().unwrap(), Ok(Outcome::Ended)));
}

#[test]
fn our_client_meets_our_server() {
    let folder = scratch();
    let path = folder.path().join("nbd.sock");
    let door = serve(UnixListener::bind(&path).unwrap(), 3);
    let connect = || std::sync::Arc::new(Socket::new(std::os::unix::net::UnixStream::connect(&path).unwrap().into()));
    let client = Client::connect(connect(), "sda", Wants::READING).unwrap();
    assert_eq!((client.info().size, client.info().minimum_block), (SIZE, 1));
    assert_eq!(client.info().contexts[0], Some(BASE_ALLOCATION_ID));
    client.disconnect();
    assert_eq!(offer_phases(&connect()).unwrap(), PhasesAnswer::Accepted);
    let error = Client::connect(connect(), "gone", Wants::default()).unwrap_err();
    assert_eq!(error.to_string(), "opening the export: the server refused: ERR_SHUTDOWN (the guest lives elsewhere)");
    let ended = door.join().unwrap();
    assert!(matches!(ended[1], Ok(Outcome::Phases)));
    assert!(matches!(ended[2], Ok(Outcome::Ended)), "the goodbye was said: {:?}", ended[2]);
}
