//! Every bound of the program: sizes, counts and times.
//!
//! A number that limits memory, work or waiting stands here and nowhere else, beside the other numbers it must agree
//! with; the `const` assertions at the end say how. Those of VMM drivers are in `limits/vmm.rs`. Times are
//! [`Duration`]s, sizes are bytes unless the name says otherwise.

use std::time::Duration;

pub use vmm::*;

mod vmm;

/// One kibibyte, in bytes.
pub const KIB: usize = 1024;
/// One mebibyte, in bytes.
pub const MIB: usize = 1024 * KIB;
/// One gibibyte, in bytes.
pub const GIB: u64 = 1024 * MIB as u64;

// ---- names -------------------------------------------------------------------------------------------------------

/// Longest guest name, in bytes of UTF-8. The hello has a fixed field of this size.
pub const GUEST_NAME_MAX: usize = 64;
/// Longest disk name, in bytes of UTF-8.
pub const DISK_NAME_MAX: usize = 64;
/// Longest printable address, in bytes. The hello has a fixed field of this size.
pub const ADDRESS_MAX: usize = 128;
/// Longest text that says where another host is reached, in bytes: an address, or a command. What a host says of itself
/// is an address ([`ADDRESS_MAX`]).
pub const PLACE_MAX: usize = 256;
/// Longest cause that travels to the peer or to the command line, in bytes; longer ones are cut.
pub const CAUSE_MAX: usize = 192;
/// Longest list of all that a refusal names, in bytes.
pub const REPORT_MAX: usize = 4 * KIB + KIB / 2;
/// Most disks of one guest.
pub const DISKS_MAX: usize = 32;

// ---- the ownership record ----------------------------------------------------------------------------------------

/// Longest file of an ownership record, in bytes; a test says that the longest record fits.
pub const RECORD_FILE_MAX: usize = 4 * KIB;
/// Longest file that lists what a migration made, in bytes: every disk with the longest path that the kernel takes.
pub const JOURNAL_FILE_MAX: usize = KIB + DISKS_MAX * (DISK_NAME_MAX + PATH_MAX + 128);
/// Longest path, in bytes.
pub const PATH_MAX: usize = 4 * KIB;
/// Longest file of a note that a guest moves, in bytes; a test says that it fits.
pub const MOVING_FILE_MAX: usize = 64;
/// Longest file of a receipt, in bytes; a test says that the longest one fits.
pub const RECEIPT_FILE_MAX: usize = 512;
/// Longest text that shows a record to its operator, in bytes.
pub const RECORD_TEXT_MAX: usize = 512;
/// Most things that `recover` says to type, each in its place.
pub const NEXT_STEPS_MAX: usize = 4;

// ---- sectors and granules ----------------------------------------------------------------------------------------

/// A disk's size is a multiple of this: what every guest believes a sector to be, in bytes.
pub const SECTOR: u64 = 512;
/// Finest granularity of a dirty map, in bytes.
pub const GRANULARITY_MIN: u64 = 4096;
/// Most memory that the lowest level of one dirty map may take, in bytes; the granularity grows to keep it.
pub const DIRTY_MAP_MAX: usize = MIB;

// ---- NBD: handshake ----------------------------------------------------------------------------------------------

/// Longest option payload that is read into memory; a longer one is skipped and refused.
pub const OPTION_PAYLOAD_MAX: usize = 8 * KIB;
/// Longest option payload that is skipped to refuse it politely; beyond it the connection is closed.
pub const OPTION_SKIP_MAX: usize = MIB;
/// Longest export name (the NBD specification's own limit for strings), in bytes.
pub const EXPORT_NAME_MAX: usize = 4096;
/// Longest description of an export that we give, in bytes.
pub const EXPORT_TEXT_MAX: usize = 128;
/// Most options in one handshake.
pub const OPTIONS_MAX: usize = 128;
/// Most replies to one option that a client listens to.
pub const OPTION_REPLIES_MAX: usize = 64;
/// Longest whole handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for a connection to be established.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

// ---- NBD: transmission -------------------------------------------------------------------------------------------

/// Largest payload of a WRITE and largest length of a READ, in bytes; what the NBD specification lets every client
/// assume.
pub const PAYLOAD_MAX: u32 = 32 * 1024 * 1024;
/// Preferred request size that exports advertise, in bytes.
pub const PREFERRED_BLOCK: u32 = 4096;
/// Send buffer of a Unix socket, in bytes; the kernel takes twice that, for its own books.
pub const UNIX_SEND_BUFFER: usize = 512 * KIB;
/// Receive buffer of one server connection, in bytes: as many pipelined requests as fit arrive with one system call.
pub const RECEIVE_BUFFER: usize = 256 * KIB;
/// Reply buffer of one server connection, in bytes: replies gather there and leave together.
pub const REPLY_BUFFER: usize = 256 * KIB;
/// Largest piece in which a request that needs a worker moves through memory, in bytes.
pub const SLOT_BUFFER: usize = 128 * KIB;
/// The same where every request waits for the device and is longer than that: few and large ones are cheaper there.
pub const LONG_BUFFER: usize = 512 * KIB;
/// Workers of one connection that may have such a buffer.
pub const LONG_SLOTS: usize = 4;
/// How long a long request waits for one of these when all are busy, before any other worker does it piece by piece.
pub const LONG_WAIT: Duration = Duration::from_millis(20);
/// Most requests of one connection that wait for a disk or at the gate while the connection is read on.
pub const SLOTS: usize = 16;
/// Stack of a connection's worker, in bytes; it touches a few KiB.
pub const WORKER_STACK: usize = 64 * KIB;
/// Stack of a thread that serves a connection or runs a door, in bytes.
pub const CONNECTION_STACK: usize = 256 * KIB;
/// Most extents in one block status reply.
pub const STATUS_EXTENTS_MAX: usize = 128;
/// Most connections through one door.
pub const CONNECTIONS_MAX: usize = 64;
/// How long who comes to a full door waits for one that has been sent away from it.
pub const MAKE_ROOM_MAX: Duration = Duration::from_millis(100);
/// A client over TCP that says nothing for so long is asked, by the kernel, whether its host is still there; one that
/// is not keeps its place for about twice as long.
pub const CLIENT_QUIET: Duration = Duration::from_secs(60);
/// Connections of a migration door that are kept for the phases.
pub const PHASE_CONNECTIONS_MAX: usize = 8;
/// Connections that one export recommends to a client that asks for several.
pub const CONNECTIONS_PER_DISK_MAX: usize = 8;

// ---- NBD: a client in transmission -------------------------------------------------------------------------------

/// Largest minimum block size that a client accepts from a server (the NBD specification's own limit), in bytes.
pub const MINIMUM_BLOCK_MAX: u32 = 64 * 1024;
/// Most requests of one client connection in flight.
pub const WINDOW_MAX: usize = 64;
/// Most metadata contexts that a client asks for on one connection.
pub const CONTEXTS_MAX: usize = 4;
/// Most parts that a client splits one request into to keep a server's maximum payload: half the window, so that two
/// such requests are in flight.
pub const PARTS_MAX: u32 = 32;
/// Largest WRITE of zeroes that stands for a part of a WRITE_ZEROES which the server does not offer, in bytes.
pub const ZERO_PART_MAX: u32 = 64 * 1024;
/// Most exports that a client listens to when a server lists them.
pub const EXPORT_LIST_MAX: usize = 4096;
/// Most metadata contexts that a client listens to when a server lists them.
pub const CONTEXT_LIST_MAX: usize = 1024;
/// Receive buffer of one client connection, in bytes. Only a client that reads ever touches more than its first pages.
pub const CLIENT_RECEIVE_BUFFER: usize = 320 * KIB;
/// Send buffer of one client connection, in bytes: small requests gather there and leave together.
pub const SEND_BUFFER: usize = 64 * KIB;
/// Largest payload of a WRITE that is copied to gather with others; a larger one leaves from where it is. At 4 KiB a
/// copy costs a tenth of a system call.
pub const SEND_COPY_MAX: usize = 8 * KIB;
/// Most separate pieces of one READ that may stand there while its reply is incomplete. Servers answer in order, then
/// it is one.
pub const READ_PIECES_MAX: usize = 16;
/// Largest error chunk that a client takes, in bytes: the longest message and room for fields that we do not know.
pub const ERROR_CHUNK_MAX: usize = 4096 + 64;
/// Most extents in one block status reply that a client takes (the NBD specification's own advice).
pub const CLIENT_EXTENTS_MAX: u32 = 1024 * 1024;
/// Largest READ or WRITE that the simple calls of a client make, in bytes.
pub const CLIENT_REQUEST_MAX: u32 = 1024 * 1024;
/// Largest WRITE_ZEROES that the simple calls of a client make, in bytes.
pub const ZERO_REQUEST_MAX: u32 = 128 * 1024 * 1024;
/// Longest time in which a server with requests in flight moves no byte in either direction, where a client cannot do
/// anything but wait for it. Long, because a flush of a slow disk is one silence.
pub const SILENCE_MAX: Duration = Duration::from_secs(300);
/// Longest wait to say goodbye.
pub const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

const _: () = assert!(CONTEXTS_MAX <= 8, "a client keeps the contexts of a reply in 8 bits");
const _: () = assert!(PARTS_MAX as usize <= WINDOW_MAX, "all parts of a request are in flight at once");
const _: () = assert!(ZERO_PART_MAX >= MINIMUM_BLOCK_MAX, "zeroes are written in whole blocks");
const _: () = assert!(WINDOW_MAX <= 64, "a client keeps its free slots in 64 bits");
const _: () = assert!(
    WINDOW_MAX * (32 + ERROR_CHUNK_MAX) <= CLIENT_RECEIVE_BUFFER,
    "all replies to writes fit while a write is being sent, even if each is an error with a long message"
);
const _: () = assert!(WINDOW_MAX * 32 + SEND_COPY_MAX < SEND_BUFFER, "a window of small requests fits the send buffer");
const _: () = assert!(SLOT_BUFFER <= RECEIVE_BUFFER, "a parked request must fit a slot");
const _: () = assert!(RECEIVE_BUFFER <= PAYLOAD_MAX as usize, "larger requests stream through the buffer");
const _: () = assert!(OPTION_PAYLOAD_MAX > EXPORT_NAME_MAX + 64, "an INFO with the longest name must be readable");

// ---- disks -------------------------------------------------------------------------------------------------------

/// Alignment of offset, length and memory that a disk opened with `cache=none` wants, in bytes. Requests that have it
/// bypass the page cache, the others take the way through it.
pub const DIRECT_ALIGN: usize = 4096;
/// The largest folio of the page cache, on every machine this is built for: what is in one leaves only with all of it.
pub const FOLIO_MAX: u64 = 2 * MIB as u64;
/// Bytes that one system call writes where zeroes have to be written out.
pub const ZERO_WRITE: usize = 64 * KIB;
/// A disk that took longer than this for a small write is not written from a connection's own thread for a while.
pub const SLOW_WRITE: Duration = Duration::from_millis(8);
/// So many writes go to the workers after a slow one.
pub const SLOW_WRITE_MEMORY: u32 = 32;
/// Longest READ that a connection's own thread serves from the page cache; longer ones go to a worker.
pub const INLINE_READ_MAX: usize = 64 * KIB;
/// Room of the pipe through which a worker serves long reads over a Unix socket, in bytes: what a process without
/// privileges may have.
pub const PIPE_ROOM: usize = MIB;
/// Most such pipes in one process, of two descriptors each: whoever finds none copies. A process often may have no more
/// than 1024 descriptors, and needs them for connections and records.
pub const PIPES_MAX: usize = 64;
/// Where a target cannot tell its holes (a block device), it is probed in so many places for data.
pub const PROBES: u64 = 1024;
/// Bytes read at each probe.
pub const PROBE_BYTES: usize = 64 * KIB;

/// What a file system must have free beyond what disks will need of it, to keep its books: this part of it ...
pub const FREE_MARGIN_PART: u64 = 64;
/// ... and no less than this, in bytes.
pub const FREE_MARGIN_MIN: u64 = MIB as u64;

// ---- the gate ----------------------------------------------------------------------------------------------------

/// Longest quiesce, drain included, before SEAL is sent: after it the gate opens and the guest goes on.
pub const QUIESCE_MAX: Duration = Duration::from_secs(5);
/// How often a request that waits at the gate looks whether its client is still there.
pub const GATE_LOOK: Duration = Duration::from_millis(100);
/// Longest wait for the requests in flight when dirty tracking is armed, or for a dead connection's last ones.
pub const DRAIN_MAX: Duration = Duration::from_secs(60);

// ---- writing back on the destination -----------------------------------------------------------------------------

/// A receiving disk is synced in the background whenever so many bytes have come since the last time.
pub const WRITE_BACK_BYTES: u64 = 32 * MIB as u64;
/// ... or so much time has passed with anything written.
pub const WRITE_BACK_PERIOD: Duration = Duration::from_millis(200);
/// A receiving disk never has more bytes than this written and not yet synced: writers wait.
pub const UNSYNCED_MAX: u64 = 256 * MIB as u64;
/// What was synced leaves the page cache when so much has been synced after it: by then its digests have been taken,
/// unless the disk is faster than whoever hashes.
pub const CACHED_BYTES: u64 = 128 * MIB as u64;
/// ... or so many syncs have been.
pub const WRITE_BACKS_CACHED: usize = 16;

// ---- the mirror --------------------------------------------------------------------------------------------------

/// Largest region that the mirror takes at once, in bytes.
pub const REGION_MAX: usize = 512 * KIB;
/// Most regions of one disk in flight at once, over all its connections.
pub const REGIONS_IN_FLIGHT_MAX: usize = CONNECTIONS_PER_DISK_MAX * LANE_REGIONS_MAX;
/// Most regions in flight on one connection of the mirror.
pub const LANE_REGIONS_MAX: usize = 32;
/// A run of zeroes inside a region travels as write-zeroes from this length on, in bytes.
pub const ZERO_RUN_MIN: usize = 16 * KIB;
/// Zeroes are looked for in steps of this, in bytes.
pub const ZERO_STEP: usize = 4 * KIB;
/// Most requests that one region is split into.
pub const REGION_REQUESTS_MAX: usize = 16;
/// A pass begins no sooner than this after the one before: what the guest writes twice meanwhile travels once.
pub const PASS_PERIOD: Duration = Duration::from_millis(20);
/// How long a connection of the mirror waits for a reply before it looks for orders again.
pub const LANE_LOOK: Duration = Duration::from_millis(5);
/// The same while guest writes wait for the mirror (D7): one of them would wait as long for a lane that listens.
pub const SYNCHRONOUS_LOOK: Duration = Duration::from_micros(300);
/// A data connection on which a request has not been answered for this long is given up, although the phase connection
/// says that the destination is there: one silence is the flush of a slow disk, and a fence would wait for it too.
pub const LANE_SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long what has been sent to a plain server is waited for when an attempt ends.
pub const LAND_MAX: Duration = Duration::from_secs(5);
/// Longest wait of a guest write for its copy in synchronous mode (D7), whatever the link does: after it the guest is
/// answered, and the copy comes later. If nothing at all was acknowledged meanwhile, nobody waits any more until
/// something is. Far below what guests take for a broken disk (30 s and more); long enough for [`OWED_MAX`] small
/// writes, or a few large ones, over a link of some MB/s.
pub const SYNCHRONOUS_WAIT_MAX: Duration = Duration::from_secs(2);
/// Most guest writes of one disk whose granules are copied first because somebody waits for them; others wait for a
/// place.
pub const WAITERS_MAX: usize = 256;
/// Most requests of one guest connection that are done and wait for their copies; what comes after is not read until
/// one is answered. As many as the kernel's nbd driver keeps in flight.
pub const OWED_MAX: usize = 128;
/// Largest region that is copied in synchronous mode though nobody waits for it, in bytes.
pub const SYNCHRONOUS_REGION_MAX: usize = 256 * KIB;
/// Most bytes that nobody waits for in flight on one connection in synchronous mode: what a guest write waits behind.
pub const SYNCHRONOUS_WINDOW: usize = 2 * SYNCHRONOUS_REGION_MAX;
/// After so many regions that somebody waits for, a lane takes one that nobody does: the rest must become less too.
pub const SYNCHRONOUS_TURNS: u32 = 4;
/// A mirror that passes and has not come a good piece nearer to its end for so long does not converge: with
/// `--synchronous auto` guest writes wait from then on.
pub const CONVERGENCE_PATIENCE: Duration = Duration::from_secs(3);
/// Time over which the rates that are shown and predicted with are averaged.
pub const RATE_WINDOW: Duration = Duration::from_secs(1);
/// Time between two samples of the rates.
pub const METER_PERIOD: Duration = Duration::from_millis(100);
/// With at least so many bytes outstanding the mirror counts as copying all the time.
pub const SATURATED_MIN: u64 = 4 * MIB as u64;
/// Rate that is predicted with before any was measured, in bytes a second: small, so that little is promised.
pub const ASSUMED_RATE: u64 = 10 * MIB as u64;
/// What a bandwidth budget lets through at once after a pause, as time at the set rate.
pub const BUDGET_BURST: Duration = Duration::from_millis(50);

// ---- the stream path ---------------------------------------------------------------------------------------------

/// Most bytes of data in one frame of the stream path: a message waits for no more than one frame.
pub const STREAM_BLOCK_MAX: usize = 64 * KIB;
/// Most blocks of one connection that are not acknowledged; the destination has room for as many.
pub const STREAM_SLOTS: usize = 64;
/// Bytes that may always be in flight, however slow the way is.
pub const STREAM_WINDOW_MIN: usize = 2 * STREAM_BLOCK_MAX;
/// Most bytes in flight on one connection.
pub const STREAM_WINDOW_MAX: usize = STREAM_SLOTS * STREAM_BLOCK_MAX;
/// Blocks wait about so long in buffers on the way, and so does a message behind them.
pub const STREAM_QUEUE: Duration = Duration::from_millis(250);
/// Receive buffer of one end, in bytes, for heads and messages; blocks go past it.
pub const STREAM_RECEIVE_BUFFER: usize = 4 * KIB;
/// Room for the guest's state where it arrives, in bytes.
pub const STREAM_STATE_ROOM: usize = 2 * MIB;
/// The same for what the VMM there answers.
pub const STREAM_STATE_ROOM_BACK: usize = STREAM_BLOCK_MAX;
/// Most messages of one kind that wait.
pub const STREAM_MESSAGES_MAX: usize = 256;

const _: () = assert!(STREAM_SLOTS <= 128, "a slot's number is one byte");
const _: () = assert!(STREAM_RECEIVE_BUFFER >= 64, "a head must fit");

/// Most words of a command that is the way to another host.
pub const COMMAND_WORDS_MAX: usize = 64;
/// Longest line of what such a command says on standard error that is taken as one, in bytes.
pub const COMMAND_LINE_MAX: u64 = KIB as u64;
/// How long a command has to end after its connection has, and again after it was told to.
pub const COMMAND_GRACE: Duration = Duration::from_secs(1);
/// A connection that a command has closed is explained by its end, if that comes so soon.
pub const COMMAND_LAST_WORDS: Duration = Duration::from_millis(500);
/// Buffer of each direction of `accept`, in bytes.
pub const RELAY_BUFFER: usize = 128 * KIB;
/// Most connections to the migration door that came in through the control door.
pub const RELAYED_MAX: usize = PHASE_CONNECTIONS_MAX;

const _: () = assert!(PLACE_MAX >= ADDRESS_MAX, "every address is a place");

// ---- domain XML --------------------------------------------------------------------------------------------------

/// Largest libvirt domain XML, in bytes; those of large guests have some ten thousand.
pub const DOMAIN_XML_MAX: u64 = 4 * MIB as u64;
/// Most XML nodes in one.
pub const DOMAIN_XML_NODES_MAX: u32 = 100_000;

// ---- digests -----------------------------------------------------------------------------------------------------

/// Finest region that has a digest of its own, in bytes; always a whole number of granules.
pub const DIGEST_REGION_MIN: u64 = 64 * KIB as u64;
/// Most bytes that the digests of one disk take; larger disks have larger regions.
pub const DIGEST_TABLE_MAX: usize = 4 * MIB;
/// Most digests in one message.
pub const DIGESTS_MAX: usize = 32;
/// Most bytes that one message asks to be hashed; or one region, if that is longer.
pub const DIGEST_QUESTION_MAX: u64 = 2 * MIB as u64;
/// The rate, in bytes a second, below which a destination that hashes counts as one that does not answer.
pub const DIGEST_RATE_MIN: u64 = 10 * MIB as u64;
/// Bytes read at once to be hashed: they stay in a core's own cache between the two, and a system call and what the
/// kernel does for each is paid for many of them (64 KiB: 0.255, 256 KiB: 0.24, 1 MiB: 0.22 CPU seconds a GiB).
pub const DIGEST_READ: usize = 512 * KIB;
/// Most questions of one connection that are not answered yet.
pub const QUESTIONS_MAX: usize = 8;
/// Most connections that ask for digests, for all disks together.
pub const DIGEST_CONNECTIONS_MAX: usize = 4;
/// Most runs of one disk that are held to be verified at once.
pub const CLAIMS_MAX: usize = QUESTIONS_MAX;
/// How many places of a map are looked at for something to verify before its lock is given up for a moment.
pub const CLAIM_STEPS: usize = 64;
/// A verification pass begins no sooner than this after the one before: what is written twice meanwhile is hashed once.
pub const VERIFY_PERIOD: Duration = Duration::from_millis(100);
/// Pause before a map is asked again for something to hash that had none just now.
pub const DIGEST_PAUSE: Duration = Duration::from_micros(200);
/// Rate of hashing that is predicted with before any was measured, in bytes a second.
pub const ASSUMED_HASH_RATE: u64 = 500 * MIB as u64;

const _: () = assert!(RECEIVE_BUFFER.is_multiple_of(DIRECT_ALIGN) && SLOT_BUFFER.is_multiple_of(DIRECT_ALIGN));
const _: () = assert!(LONG_BUFFER.is_multiple_of(DIRECT_ALIGN) && LONG_SLOTS <= SLOTS);
const _: () = assert!(WRITE_BACK_BYTES < UNSYNCED_MAX, "writers must not wait before the write-back begins");
const _: () = assert!(DISKS_MAX <= CONNECTIONS_MAX - PHASE_CONNECTIONS_MAX, "each disk has a connection");
const _: () = assert!(REGION_MAX <= PAYLOAD_MAX as usize, "a region travels as one request");
const _: () = assert!(CLAIMS_MAX <= REGIONS_IN_FLIGHT_MAX, "what is compared is held where copies are");
const _: () = assert!(DIGESTS_MAX <= 32 && DIGESTS_MAX * 32 + 256 < FRAME_MAX, "an answer must fit a frame");
const _: () = assert!(DIGEST_CONNECTIONS_MAX < PHASE_CONNECTIONS_MAX / 2 + 1, "room is left for the phases");
const _: () = assert!(DIGEST_REGION_MIN >= 16 * GRANULARITY_MIN, "a region is a whole number of granules");
// ---- doors and addresses -----------------------------------------------------------------------------------------

/// Longest Unix socket path that the kernel takes, in bytes.
pub const UNIX_PATH_MAX: usize = 107;
/// Longest NBD URI, in bytes: an export's name of the greatest length, all of it percent-encoded, and an address.
pub const URI_MAX: usize = 3 * EXPORT_NAME_MAX + 3 * ADDRESS_MAX;
/// Longest description of another server's export that is shown, in bytes; longer ones are cut.
pub const INFO_TEXT_MAX: usize = 1024;
/// Mode of a door's socket at its widest: what stands for reading, writing and running, and nothing special.
pub const SOCKET_MODE_MAX: u32 = 0o777;
/// Number of the first socket that a service manager passes on.
pub const PASSED_FIRST: u32 = 3;
/// Sockets that a service manager may pass on to one process.
pub const PASSED_MAX: u32 = 32;
/// Highest number of a descriptor that is passed on; more than a process has by default.
pub const FD_MAX: u32 = 65535;
/// Most descriptors passed on with one request.
pub const PASSENGERS_MAX: usize = 2;
/// Connections that wait at a door until they are accepted.
pub const LISTEN_BACKLOG: i32 = 128;
/// Longest wait for another process that is binding a socket in the same directory.
pub const BIND_LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// A process that starts waits so long for the doors, the disks and the record of one that is ending: it may have been
/// killed a moment ago, in the middle of a sync.
pub const RESTART_PATIENCE: Duration = Duration::from_secs(3);
/// Pause between two looks at them.
pub const RESTART_LOOK: Duration = Duration::from_millis(50);
/// Pause between two looks at something that cannot be waited for.
pub const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// Pause of a door that cannot accept because the process or the host is out of descriptors or memory.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

// ---- the kernel's nbd devices ------------------------------------------------------------------------------------

/// Devices of the kernel's nbd driver that are known: N of /dev/nbdN is below this. With 32 partitions each the driver
/// has room for as many.
pub const NBD_DEVICES_MAX: u32 = 32 * 1024;
/// Longest path of such a device, in bytes.
pub const NBD_DEVICE_PATH_MAX: usize = 16;
/// Longest request to the driver, in bytes.
pub const NETLINK_REQUEST_MAX: usize = 512;
/// How long the driver keeps requests while nobody serves the device: longer than anybody takes to start `serve` again
/// after a weekend. What it has kept longer fails, and with it what is only in the page cache.
pub const NBD_DEAD_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// After this the driver looks whether the connection over which it sent a request has been replaced.
pub const NBD_LOOK: Duration = Duration::from_secs(5);
/// How often the devices that are attached are looked at: whether they are still connected, and whether they may be.
pub const ATTACHED_LOOK: Duration = Duration::from_millis(500);
/// Longest wait, while the guest runs, for a device's page cache to be written back before a switchover.
pub const ATTACHED_SYNC_MAX: Duration = Duration::from_secs(60);
/// Longest wait for the proof that a device's page cache holds nothing while the gates are closed.
pub const ATTACHED_PROOF_MAX: Duration = Duration::from_secs(2);
/// Longest wait of `detach` for the device's page cache to be written back.
pub const DETACH_SYNC_MAX: Duration = Duration::from_secs(40);
/// Longest wait for a device that was disconnected to be free.
pub const DETACH_FREE_MAX: Duration = Duration::from_secs(5);
/// Longest wait that `attach` can be asked for, in seconds.
pub const ATTACH_WAIT_MAX_S: u32 = 7 * 24 * 3600;

const _: () = assert!(NETLINK_REQUEST_MAX >= 128 + GUEST_NAME_MAX + DISK_NAME_MAX + 64, "a connect must fit");
const _: () = assert!(ATTACHED_PROOF_MAX.as_secs() < QUIESCE_MAX.as_secs(), "a proof that fails leaves time");
const _: () = assert!(
    DETACH_SYNC_MAX.as_secs() + DETACH_FREE_MAX.as_secs() + NETLINK_TIMEOUT.as_secs() < CONTROL_REPLY_TIMEOUT.as_secs(),
    "detach says how it went before its command gives up"
);

// ---- control door and command line -------------------------------------------------------------------------------

/// Longest frame on the control door, encoded, in bytes. A test checks that the largest message fits.
pub const CONTROL_FRAME_MAX: usize = 8 * KIB;
/// Most connections through the control doors.
pub const CONTROL_CONNECTIONS_MAX: usize = 16;
/// A control connection that sends nothing for this long is closed.
pub const CONTROL_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// A hello at the control door that is not answered is said again after this, until [`HELLO_TIMEOUT`] is over. Longer
/// than a port that has opened goes unseen ([`PORT_LOOK`]).
pub const HELLO_REPEAT: Duration = Duration::from_secs(1);
/// Longest time for a whole reply to leave through the control door.
pub const CONTROL_SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait of the command line for a reply or for further news; `claim` writes a record before it answers.
pub const CONTROL_REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// A virtio port whose host end is closed is looked at this often: the kernel cannot be waited for there, it calls such
/// a port readable all the time.
pub const PORT_LOOK: Duration = Duration::from_millis(250);
/// A virtio port that is not there, or not ours, is looked for this often, for as long as the process lives.
pub const PORT_SEARCH_PERIOD: Duration = Duration::from_secs(1);
/// A follower looks this often whether its client has gone.
pub const HANG_UP_POLL: Duration = Duration::from_millis(100);
/// Shortest time between two progress frames of the same phase.
pub const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// Shortest time between two progress lines of the same phase where stdout is no terminal.
pub const PROGRESS_LINE_INTERVAL: Duration = Duration::from_secs(1);
/// Longest text that says what is, or what to type and where, in bytes: a place and the words around it.
pub const WORDS_MAX: usize = PLACE_MAX + CAUSE_MAX;
/// Longest operation name that travels to the command line, in bytes; longer ones are cut.
pub const OPERATION_MAX: usize = 32;
/// Downtime that `migrate` allows when it is not told.
pub const DOWNTIME_LIMIT_DEFAULT_MS: u32 = 300;
/// Longest downtime that can be allowed.
pub const DOWNTIME_LIMIT_MAX_MS: u32 = 60_000;
/// Longest line of `--json`, in bytes.
pub const JSON_LINE_MAX: usize = 64 * KIB;

const _: () = assert!(
    (7 + NEXT_STEPS_MAX) * (WORDS_MAX + 2) + PLACE_MAX + RECORD_TEXT_MAX + RECEIPT_FILE_MAX < CONTROL_FRAME_MAX,
    "what recover says must fit a frame"
);
const _: () = assert!(ADDRESS_MAX > UNIX_PATH_MAX + "unix://".len(), "every Unix address must be printable");
const _: () = assert!(PORT_LOOK.as_millis() * 2 < HELLO_REPEAT.as_millis(), "a repeated hello finds the port open");
const _: () = assert!(HELLO_REPEAT.as_secs() * 5 <= HELLO_TIMEOUT.as_secs(), "a hello is repeated several times");
const _: () = assert!(HANG_UP_POLL.as_millis() <= 200, "a client that goes away is noticed within 200 ms");
// ---- servers as disks and destinations ---------------------------------------------------------------------------

/// Connections to the server behind one disk: as many requests are under way at once.
pub const BACKEND_CONNECTIONS_MAX: usize = 8;
/// How long one more connection to it may take to be made, while there are others.
pub const BACKEND_MORE_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes that a server is asked about at once when it is asked for extents: what it says of more would be thrown away.
pub const BACKEND_STATUS: u64 = 128 * MIB as u64;

// ---- phases ------------------------------------------------------------------------------------------------------

/// Longest frame of the phase protocol without its length, in bytes; the largest message of each kind fits (a test
/// says so).
pub const FRAME_MAX: usize = 8 * KIB;
/// Most problems in one refusal; what is left out stands in the destination's log.
pub const PROBLEMS_MAX: usize = 16;
/// Longest exchange of hellos.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a side of a phase connection looks for orders of its own while it waits for messages.
pub const LINK_LOOK: Duration = Duration::from_millis(50);
/// How long the driver of a migration waits for a message before it looks at its mirrors again.
pub const TICK: Duration = Duration::from_millis(5);
/// A source asks this often whether the destination is still there.
pub const PING_PERIOD: Duration = Duration::from_secs(1);
/// A source whose PING, or anything else that wants an answer, is followed by nothing at all for so long gives the
/// phase connection up and dials again. A destination that is busy says so every [`PING_PERIOD`], whatever its disks
/// do; four losses of one packet in a row (3 s of TCP's patience) are no dead link yet.
pub const LINK_SILENCE_MAX: Duration = Duration::from_secs(5);
/// A destination gives up a phase connection on which nothing has come for so long. Nothing depends on it: the source
/// does not ask anything while it waits for a final pass.
pub const LINK_IDLE_MAX: Duration = Duration::from_secs(15);
/// Longest wait for a message to leave, or for an answer that needs no disk.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest PREPARE: the destination looks through its disks.
pub const PREPARE_MAX: Duration = Duration::from_secs(120);
/// Longest fence: requests in flight end, or the destination's disk is broken.
pub const FENCE_MAX: Duration = Duration::from_secs(75);
/// Longest wait for SEALED, with the guest quiesced: the destination's last sync.
pub const SEAL_MAX: Duration = Duration::from_secs(10);
/// Longest dial: connection, NBD handshake and hellos, each within its own time.
pub const DIAL_MAX: Duration = Duration::from_secs(30);
/// How long a destination that is out of reach is dialled again before the attempt is aborted. A switch that is
/// restarted takes a minute or two; the guest is not disturbed meanwhile, and what has been copied took longer.
pub const RECONNECT_MAX: Duration = Duration::from_secs(300);
/// The same where the network is there and somebody answers that the destination is not: its process has ended, and
/// the attempt with it (D12). Long enough for a proxy or a firewall that comes up before the way behind it does.
pub const ABSENT_MAX: Duration = Duration::from_secs(30);
/// Longest single dial of a lost destination: the next one has a fresh start, and finds a link that is back within
/// about three seconds, because the kernel repeats the first packet of a dial after 1, 3 and 7 s.
pub const REDIAL_MAX: Duration = Duration::from_secs(5);
/// First and longest pause between two dials.
pub const RECONNECT_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// GO that was not answered for so long is said again over a new connection: the guest stands still meanwhile.
pub const GO_PATIENCE: Duration = Duration::from_secs(2);
/// How long `migrate` waits for RUNNING; the process goes on asking.
pub const RUNNING_PATIENCE: Duration = Duration::from_secs(15);
/// How long an aborted migration waits for UNSEALED; the process goes on asking if it must know.
pub const UNSEALED_PATIENCE: Duration = Duration::from_secs(5);
/// The same where the destination was out of reach already.
pub const LOST_PATIENCE: Duration = Duration::from_secs(1);
/// A record that could not be made durable is written again after this.
pub const REWRITE_PAUSE: Duration = Duration::from_secs(1);
/// A sealed destination that hears nothing asks its source this often.
pub const ASK_PERIOD: Duration = Duration::from_secs(5);
/// A switchover that did not come to SEAL in time is tried again after this.
pub const SWITCHOVER_PAUSE: Duration = Duration::from_secs(1);
/// So many switchovers may fail to quiesce or to finish in time before the attempt is aborted.
pub const SWITCHOVERS_MAX: u32 = 10;
/// A mirror's flush is measured at least this often before it has converged.
pub const FLUSH_PERIOD: Duration = Duration::from_millis(250);
/// A destination whose answer takes longer than this is distant: what one connection may have in flight does not fill
/// the way there, and several are opened where nobody says how many. Near by one carries 1 GB/s and more, and two would
/// write to one file at once and spend a third more CPU on waiting for each other.
pub const DISTANT: Duration = Duration::from_millis(2);
/// Connections to a distant destination, for all disks together.
pub const LANES_DISTANT: usize = 4;
/// Stack of the thread that drives a migration, in bytes.
pub const DRIVER_STACK: usize = 256 * KIB;

const _: () =
    assert!(SYNCHRONOUS_WAIT_MAX.as_secs() < QUIESCE_MAX.as_secs(), "who waits is not what a quiesce fails by");
const _: () = assert!(QUIESCE_MAX.as_secs() < LINK_IDLE_MAX.as_secs(), "a quiet link outlives a quiesce");
const _: () = assert!(PING_PERIOD.as_secs() * 3 < LINK_SILENCE_MAX.as_secs(), "one late PONG is no dead link");
const _: () = assert!(LINK_SILENCE_MAX.as_secs() < SEAL_MAX.as_secs(), "SEAL is said again over a new link");
const _: () = assert!(ABSENT_MAX.as_secs() < RECONNECT_MAX.as_secs());
const _: () = assert!(DRAIN_MAX.as_secs() < FENCE_MAX.as_secs(), "the destination gives up a fence first");
const _: () = assert!(PROBLEMS_MAX * (DISK_NAME_MAX + CAUSE_MAX + 3) < FRAME_MAX, "a refusal must fit a frame");
const _: () = assert!(PROBLEMS_MAX * (DISK_NAME_MAX + CAUSE_MAX + 9) + 32 < REPORT_MAX, "and what is shown of it");
const _: () =
    assert!(DIAL_MAX.as_secs() >= CONNECT_TIMEOUT.as_secs() + HANDSHAKE_TIMEOUT.as_secs() + HELLO_TIMEOUT.as_secs());
const _: () = assert!(GO_PATIENCE.as_secs() < RUNNING_PATIENCE.as_secs(), "GO is repeated while migrate waits");

// ---- PID 1 -------------------------------------------------------------------------------------------------------

/// Most words of a command line that comes from the kernel or from fw_cfg.
pub const INIT_WORDS_MAX: usize = 256;
/// Longest command line of either, in bytes.
pub const INIT_TEXT_MAX: usize = 64 * KIB;
/// Longest name of a network interface, in bytes (the kernel's IFNAMSIZ without its NUL).
pub const INTERFACE_NAME_MAX: usize = 15;
/// Most mounts that the kernel's command line may ask for.
pub const MOUNTS_MAX: usize = 16;
/// Longest wait for a network interface or a disk to appear.
pub const INIT_DEVICE_WAIT: Duration = Duration::from_secs(10);
/// Longest wait for the kernel's answer to a netlink request.
pub const NETLINK_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest answer to a netlink request: an error, and the request again.
pub const NETLINK_ANSWER_MAX: usize = 4 * KIB;
/// How often init looks whether the command has said that it is ready.
pub const INIT_READY_LOOK: Duration = Duration::from_millis(50);
/// First and longest pause before a command that crashed is started again; each is twice the one before.
pub const INIT_RESTART_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// A command that ran for so long begins with the first pause again.
pub const INIT_RESTART_CALM: Duration = Duration::from_secs(60);
/// How long everybody else has to end after SIGTERM, and after SIGKILL.
pub const INIT_GRACE: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(2));
/// Longest sync before the machine ends: a disk that hangs does not keep it on.
pub const INIT_SYNC_MAX: Duration = Duration::from_secs(10);

// ---- copying -----------------------------------------------------------------------------------------------------

/// Most bytes of a file that a copy reads, and then writes, at once.
pub const COPY_PIECE: usize = 512 * KIB;
/// Most bytes that it asks an export for with one request.
pub const COPY_ASK: usize = 256 * KIB;
/// Such requests on one connection.
pub const COPY_SLOTS: usize = 16;
/// Threads of a copy, each with connections of its own where the servers allow it.
pub const COPY_LANES: usize = 2;
/// Bytes of a disk whose extents are asked for at once.
pub const COPY_WINDOW: u64 = 256 * MIB as u64;
/// A copy has the kernel write back a file whenever it has written so much of it.
pub const TRAIL_STEP: u64 = 8 * MIB as u64;
/// ... and after so many times syncs it, and lets go of it in the page cache.
pub const TRAIL_STEPS: u32 = 8;
/// Bytes that are read at once to be compared.
pub const COPY_VERIFY_READ: usize = MIB;
