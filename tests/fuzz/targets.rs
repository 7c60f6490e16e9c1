//! What is fed, and what must be true whatever it is fed with. Beyond what is asserted here: no panic, in no thread;
//! an end within the patience of `main.rs`; no memory that grows with what a peer claims.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Once, OnceLock};
use std::time::Duration;

use blockferry::address::Address;
use blockferry::attach::wire::{Answer, answers, connected_in, family_in};
use blockferry::control::frame::{self, Assembler};
use blockferry::control::wire::{Reply, Request};
use blockferry::disk::{Access, Cache, Disk};
use blockferry::domain;
use blockferry::doors::{GuestDirectory, serve_nbd};
use blockferry::export::{Export, Gate};
use blockferry::limits::CONTROL_FRAME_MAX;
use blockferry::migrate::wire::{ExportName, FRAME_HEAD, HELLO_LENGTH, Hello, Message, frame_length};
use blockferry::nbd::client::{Client, Event, Submitted, Wants};
use blockferry::nbd::wire::{Greeting, OptionHead, OptionReply, ReplyFront};
use blockferry::socket::Socket;

static PANICS: AtomicU64 = AtomicU64::new(0);

/// How many panics there have been, in whichever thread.
pub(crate) fn panics() -> u64 {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(info);
        }));
    });
    PANICS.load(Ordering::SeqCst)
}

/// The most that this process has ever had resident, in bytes.
pub(crate) fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

// ---- text --------------------------------------------------------------------------------------------------------

pub(crate) fn address(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    if let Ok(address) = Address::parse(&text) {
        let again = Address::parse(&address.to_string());
        assert_eq!(again.as_ref(), Ok(&address), "an address reads what it prints");
    }
}

pub(crate) fn disk_option(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    if let Ok(disk) = domain::Disk::parse(&text) {
        domain::check_disk_name(&disk.name).expect("a disk that was accepted has a good name");
        let _ = disk.stays();
    }
}

pub(crate) fn domain_xml(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    if let Ok(disks) = domain::xml::disks(&text) {
        let _ = domain::check_disks(&disks);
        let _ = domain::moving(&disks, &[] as &[&str]);
    }
}

// ---- the control door --------------------------------------------------------------------------------------------

pub(crate) fn control_frame(input: &[u8]) {
    let _ = frame::decode::<Request>(input);
    let _ = frame::decode::<Reply>(input);
}

/// What passes the checksum: the input becomes the message of a frame that is whole.
pub(crate) fn control_message(input: &[u8]) {
    let wrapped = |inverted: u32| {
        let checksum = (crc32c::crc32c(input) ^ inverted).to_le_bytes();
        let mut frame = vec![0; cobs::max_encoding_length(input.len() + 4)];
        let length = cobs::encode(&[input, &checksum].concat(), &mut frame);
        frame.truncate(length);
        frame
    };
    if let Ok(request) = frame::decode::<Request>(&wrapped(0)) {
        assert_eq!(frame::decode::<Request>(&encoded(&request)), Ok(request));
    }
    if let Ok(reply) = frame::decode::<Reply>(&wrapped(u32::MAX)) {
        assert_eq!(frame::decode::<Reply>(&encoded(&reply)), Ok(reply));
    }
}

/// The frame of a message, without its delimiter.
fn encoded<T: frame::Message>(message: &T) -> Vec<u8> {
    let mut bytes = [0; CONTROL_FRAME_MAX];
    let length = frame::encode(message, &mut bytes).expect("what was decoded is encoded");
    bytes[..length - 1].to_vec()
}

/// The same frames come out however the stream is cut.
pub(crate) fn control_stream(input: &[u8]) {
    let taken = |step: usize| {
        let mut assembler = Assembler::default();
        let mut taken = Vec::new();
        for piece in input.chunks(step) {
            let mut piece = piece;
            while !piece.is_empty() {
                let space = assembler.space();
                assert!(!space.is_empty(), "there is always room for more");
                let count = space.len().min(piece.len());
                space[..count].copy_from_slice(&piece[..count]);
                assembler.received(count);
                piece = &piece[count..];
                loop {
                    match assembler.take::<Request>() {
                        Ok(None) => break,
                        one => taken.push(one),
                    }
                }
            }
        }
        taken
    };
    let whole = taken(usize::MAX);
    assert_eq!(taken(1 + input.len() % 61), whole);
}

// ---- the phases --------------------------------------------------------------------------------------------------

pub(crate) fn phase_message(input: &[u8]) {
    let Some((head, body)) = input.split_first_chunk::<FRAME_HEAD>() else { return };
    let _ = frame_length(*head);
    if let Ok(message) = Message::decode(body) {
        let _ = (message.name(), message.stamp());
        let mut buffer = [0; FRAME_HEAD + blockferry::limits::FRAME_MAX];
        let frame = message.encode(&mut buffer).expect("what was decoded is encoded");
        assert_eq!(Message::decode(&frame[FRAME_HEAD..]), Ok(message));
    }
}

pub(crate) fn phase_hello(input: &[u8]) {
    let mut bytes = [0; HELLO_LENGTH];
    let length = input.len().min(HELLO_LENGTH);
    bytes[..length].copy_from_slice(&input[..length]);
    if let Ok(hello) = Hello::parse(&bytes) {
        assert_eq!(Hello::parse(&hello.encode()).as_ref(), Ok(&hello));
    }
}

pub(crate) fn phase_export_name(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    if let Some(name) = ExportName::parse(&text) {
        assert!(!name.disk.is_empty() && text.ends_with(name.disk));
    }
}

// ---- the kernel --------------------------------------------------------------------------------------------------

pub(crate) fn kernel_netlink(input: &[u8]) {
    for answer in answers(input) {
        if let Answer::Content { attributes, .. } = answer {
            let _ = (family_in(attributes), connected_in(attributes, 3));
        }
    }
}

// ---- NBD ---------------------------------------------------------------------------------------------------------

pub(crate) fn nbd_wire(input: &[u8]) {
    if let Some(bytes) = input.first_chunk() {
        let _ = Greeting::parse(bytes);
    }
    if let Some(bytes) = input.first_chunk()
        && let Some(head) = OptionHead::parse(bytes)
    {
        assert_eq!(&head.encode(), bytes);
    }
    if let Some(bytes) = input.first_chunk()
        && let Some(head) = OptionReply::parse(bytes)
    {
        assert_eq!(&head.encode(), bytes);
    }
    if let Some(bytes) = input.first_chunk()
        && let Some(request) = blockferry::nbd::wire::Request::parse(bytes)
    {
        assert_eq!(&request.encode(), bytes);
    }
    if let Some(bytes) = input.first_chunk()
        && let Some(request) = blockferry::nbd::wire::Request::parse_extended(bytes)
    {
        assert_eq!(&request.encode_extended(), bytes);
    }
    if let ReplyFront::Head(_, length) = ReplyFront::parse(input) {
        assert!(length <= input.len());
    }
}

/// A socket with `input` in it and nothing more to come; what is answered is read and forgotten by somebody else.
fn conversation(input: &[u8]) -> Arc<Socket> {
    static DRAIN: OnceLock<Sender<UnixStream>> = OnceLock::new();
    let drain = DRAIN.get_or_init(|| {
        let (sender, receiver) = channel::<UnixStream>();
        std::thread::spawn(move || {
            for mut peer in receiver {
                let _ = std::io::copy(&mut peer, &mut std::io::sink());
            }
        });
        sender
    });
    let (ours, theirs) = UnixStream::pair().unwrap();
    // No more than the socket's buffer takes without a reader: see INPUT_MAX.
    std::io::Write::write_all(&mut &ours, input).unwrap();
    ours.shutdown(std::net::Shutdown::Write).unwrap();
    drain.send(ours).unwrap();
    Arc::new(Socket::new(OwnedFd::from(theirs)))
}

/// A whole connection to a server, from the client's flags on.
pub(crate) fn nbd_session(input: &[u8]) {
    const SIZE: u64 = 8 << 20;
    static EXPORTS: OnceLock<(tempfile::TempDir, Vec<Arc<Export>>)> = OnceLock::new();
    let (_, exports) = EXPORTS.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vda");
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        let disk = Disk::open(&path, Access::ReadWrite, Cache::Writeback).unwrap();
        (folder, vec![Export::new("vda", Some(Arc::new(disk)), false, Gate::Serving)])
    });
    let socket = conversation(input);
    let fenced = || "fenced".to_owned();
    serve_nbd("fuzz", &socket, None, &GuestDirectory { exports, socket: &socket, fenced: &fenced }, |_| {});
    assert_eq!(exports[0].connections(blockferry::export::Door::Guest), 0, "nobody is left inside");
    assert_eq!(exports[0].disk().unwrap().size(), SIZE);
}

/// A client whose server says anything: it reads, asks for extents, flushes. What it is told to be done covers all that
/// it asked for, once.
pub(crate) fn nbd_client(input: &[u8]) {
    const LENGTH: usize = 8192;
    let wants = Wants::READING;
    let Ok(mut client) = Client::connect(conversation(input), "vda", wants) else { return };
    let info = *client.info();
    assert!(info.minimum_block.is_power_of_two() && info.maximum_payload >= info.minimum_block);
    let length = u32::try_from(LENGTH).unwrap();
    if info.size < LENGTH as u64 || info.maximum_payload < length || info.minimum_block > length {
        return;
    }
    let mut asked = u32::from(matches!(client.submit_read(0, 0, length), Ok(Submitted::Taken)));
    if info.base_allocation.is_some() {
        let taken = client.submit_block_status(1, 0, LENGTH as u64);
        asked += u32::from(matches!(taken, Ok(Submitted::Taken)));
    }
    asked += u32::from(matches!(client.submit_flush(2), Ok(Submitted::Taken)));
    let mut covered = [false; LENGTH];
    let mut cover = |offset: u64, length: usize| {
        let at = usize::try_from(offset).unwrap();
        let part = &mut covered[at..at + length];
        assert!(part.iter().all(|one| !one), "no byte comes twice");
        part.fill(true);
    };
    let (mut done, mut good_read) = (0, false);
    while done < asked {
        let waited = client.wait(Some(Duration::from_secs(5)), &mut |event| match event {
            Event::Data { cookie: 0, offset, bytes } => cover(offset, bytes.len()),
            Event::Zero { cookie: 0, offset, length } => cover(offset, usize::try_from(length).unwrap()),
            Event::Data { .. } | Event::Zero { .. } => panic!("nobody asked for this"),
            Event::Status { .. } => {}
            Event::Done { cookie, result } => {
                assert!(cookie < 3);
                good_read |= cookie == 0 && result.is_ok();
                done += 1;
            }
        });
        if !matches!(waited, Ok(events) if events > 0) {
            break;
        }
    }
    assert!(!good_read || covered.iter().all(|one| *one), "a read that is done has covered what was asked for");
}
