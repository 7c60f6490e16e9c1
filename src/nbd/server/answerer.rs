//! The answerer of one connection: it answers writes that are done once the mirror has copied them (D7).
//!
//! Neither the reader nor a worker waits for the mirror: they leave what is done in a queue, and this thread, started
//! when there is first something in it, waits for each in turn and replies. So while [`OWED_MAX`] writes wait, reads
//! and flushes behind them are served. When the queue is full, whoever has another waits for one to be answered: that
//! is how a guest becomes as slow as the link.

use std::io;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{self, Scope};

use super::{Connection, locked};
use crate::dirty::Owed;
use crate::limits::{OWED_MAX, WORKER_STACK};
use crate::nbd::wire::Request;

/// Requests that are done and not answered.
#[derive(Default)]
pub(super) struct Answers {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    list: heapless::Deque<Answer, OWED_MAX>,
    started: bool,
    dismissed: bool,
}

/// One of them.
pub(super) struct Answer {
    pub(super) request: Request,
    /// Of a request in pieces: its ticket.
    pub(super) ticket: Option<usize>,
    pub(super) owed: Owed,
}

impl<'a> Connection<'a> {
    /// Has a request that is done answered when its copy is acknowledged.
    pub(super) fn answer_later<'s>(&'s self, scope: &'s Scope<'s, '_>, answer: Answer) -> io::Result<()>
    where
        'a: 's,
    {
        let mut queue = locked(&self.answers.queue);
        while queue.list.is_full() {
            queue = self.answers.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        if !queue.started {
            let thread = thread::Builder::new().name("nbd answerer".to_owned()).stack_size(WORKER_STACK);
            thread.spawn_scoped(scope, move || self.answer())?;
            queue.started = true;
        }
        // There is room: waited for, under the same lock.
        let _ = queue.list.push_back(answer);
        drop(queue);
        self.answers.changed.notify_all();
        Ok(())
    }

    /// Has the answerer end when nothing is left; a worker that comes later starts another.
    pub(super) fn dismiss_answerer(&self) {
        locked(&self.answers.queue).dismissed = true;
        self.answers.changed.notify_all();
    }

    fn answer(&self) {
        let mut queue = locked(&self.answers.queue);
        loop {
            if let Some(answer) = queue.list.pop_front() {
                let was_full = queue.list.len() + 1 == OWED_MAX;
                drop(queue);
                if was_full {
                    self.answers.changed.notify_all();
                }
                self.visit.wait_for_copy(answer.owed);
                let replied = match answer.ticket {
                    None => self.reply(&answer.request, 0),
                    Some(ticket) => self.reply_after_piece(ticket, &answer.request),
                };
                // Else the connection is ending; its thread finds that out by itself.
                if let Err(error) = replied {
                    log::debug!("nbd: export {}: {error}", self.visit.export().name());
                    self.break_off();
                }
                queue = locked(&self.answers.queue);
            } else if queue.dismissed {
                queue.started = false;
                return;
            } else {
                queue = self.answers.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}
