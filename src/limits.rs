//! Every bound of the program: sizes, counts and times.
//!
//! A number that limits memory, work or waiting stands here and nowhere else, beside the other numbers it must agree
//! with; the `const` assertions at the end say how. Times are [`Duration`]s, sizes are bytes unless the name says
//! otherwise.

use std::time::Duration;

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
/// Longest cause that travels to the peer or to the command line, in bytes; longer ones are cut.
pub const CAUSE_MAX: usize = 192;
/// Most disks of one guest.
pub const DISKS_MAX: usize = 32;

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
/// Most options in one handshake.
pub const OPTIONS_MAX: usize = 128;
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
/// Receive buffer of one server connection, in bytes: as many pipelined requests as fit arrive with one system call.
pub const RECEIVE_BUFFER: usize = 256 * KIB;
/// Reply buffer of one server connection, in bytes: replies gather there and leave together.
pub const REPLY_BUFFER: usize = 256 * KIB;
/// Largest piece in which a request that needs a worker moves through memory, in bytes.
pub const SLOT_BUFFER: usize = 256 * KIB;
/// Most requests of one connection that wait for a disk or at the gate while the connection is read on.
pub const SLOTS: usize = 16;
/// Most extents in one block status reply.
pub const STATUS_EXTENTS_MAX: usize = 128;
/// Most connections through one door.
pub const CONNECTIONS_MAX: usize = 64;
/// Connections that one export recommends to a client that asks for several.
pub const CONNECTIONS_PER_DISK_MAX: usize = 8;

const _: () = assert!(SLOT_BUFFER <= RECEIVE_BUFFER, "a parked request must fit a slot");
const _: () = assert!(RECEIVE_BUFFER <= PAYLOAD_MAX as usize, "larger requests stream through the buffer");
const _: () = assert!(OPTION_PAYLOAD_MAX > EXPORT_NAME_MAX + 64, "an INFO with the longest name must be readable");

// ---- phases ------------------------------------------------------------------------------------------------------

/// Longest frame of the phase protocol without its length, in bytes; the largest message of each kind fits (a test
/// says so).
pub const FRAME_MAX: usize = 8 * KIB;
/// Most problems in one refusal; what is left out stands in the destination's log.
pub const PROBLEMS_MAX: usize = 16;
/// Longest exchange of hellos.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

const _: () = assert!(PROBLEMS_MAX * (DISK_NAME_MAX + CAUSE_MAX + 3) < FRAME_MAX, "a refusal must fit a frame");
