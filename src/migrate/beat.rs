//! Signs of life from a destination that is busy.
//!
//! What the source asks for may take long: a fence waits for a slow disk, PREPARE looks through large ones. The thread
//! that does it reads nothing meanwhile and could answer no PING, and the source would take it for dead. So another
//! one says PONG in its place as often as a PING would come, and a source that hears nothing at all knows that the
//! connection is dead and dials again. Called by whoever serves a phase connection; it never looks at what is done.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Instant;

use super::link::Link;
use super::wire::Message;
use crate::limits::{CONNECTION_STACK, PING_PERIOD, REPLY_TIMEOUT};

/// Does `work`, and says PONG on `link` every [`PING_PERIOD`] until it is done. An error of the link is kept by the
/// link: the next who uses it hears of it.
pub(super) fn while_working<T>(link: &mut Link, work: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        let (busy, is_busy) = channel::<()>();
        let beat = move || {
            while is_busy.recv_timeout(PING_PERIOD) == Err(RecvTimeoutError::Timeout) {
                if link.send(&Message::Pong { number: 0 }, Instant::now() + REPLY_TIMEOUT).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("beat".to_owned()).stack_size(CONNECTION_STACK);
        // Without a thread there are no signs of life; the work is done all the same.
        if let Err(error) = thread.spawn_scoped(scope, beat) {
            log::warn!("migration door: no thread for signs of life: {error}");
        }
        let done = work();
        drop(busy);
        done
    })
}
