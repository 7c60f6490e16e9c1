//! The doors: accepts connections, carries them through the NBD handshake, and hands them to whoever speaks next.
//!
//! The guest door (and the only door of `export`) offers exports to the VMM; the migration door shows nothing to
//! anybody, opens exports to those who know a migration's secret names, and turns a connection that asks for it into
//! the phase protocol. What stands behind a door is given to [`open`] as a closure; this file knows neither the record
//! nor the phases.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::cause::Cause;
use crate::export::{Door, Export, Visit};
use crate::limits::{CONNECTION_STACK, CONNECTIONS_MAX, MAKE_ROOM_MAX};
use crate::listener::Listener;
use crate::nbd::handshake::{self, Description, Directory, OpenError, Outcome};
use crate::nbd::server;
use crate::socket::Socket;

/// Opens a door: from now on each connection to `listener` runs `serve` on a thread of its own, at most
/// [`CONNECTIONS_MAX`] at a time. When there are as many, who comes takes the place of the one that has haggled the
/// longest; when all are through with that, who comes is closed at once. So clients that say nothing keep nobody out.
///
/// # Errors
/// The system cannot start a thread.
pub fn open(
    name: &'static str,
    listener: Arc<Listener>,
    serve: impl Fn(&Arc<Socket>, &Place) + Send + Sync + 'static,
) -> std::io::Result<()> {
    run(name, listener, Arc::new(serve))
}

/// What is done with a connection.
type Serve = dyn Fn(&Arc<Socket>, &Place) + Send + Sync;

fn run(name: &'static str, listener: Arc<Listener>, serve: Arc<Serve>) -> std::io::Result<()> {
    let hall = Arc::new(Hall::default());
    thread::Builder::new().name(format!("{name} door")).stack_size(CONNECTION_STACK).spawn(move || {
        loop {
            let socket = match listener.accept() {
                Ok(Some(socket)) => Arc::new(socket),
                Ok(None) => return,
                Err(error) => {
                    log::error!("{name} door: {}: {error}", listener.at());
                    return;
                }
            };
            let Some(place) = Hall::enter(&hall, &socket, CONNECTIONS_MAX) else {
                log::warn!("{name} door: {}: more than {CONNECTIONS_MAX} connections", listener.at());
                continue;
            };
            let serve = Arc::clone(&serve);
            let thread = thread::Builder::new().name(format!("{name} connection")).stack_size(CONNECTION_STACK);
            let started = thread.spawn(move || {
                serve(&socket, &place);
                // Before the socket: who learns of this one's end finds room.
                drop(place);
            });
            if let Err(error) = started {
                log::warn!("{name} door: {}: no thread for a connection: {error}", listener.at());
            }
        }
    })?;
    Ok(())
}

/// The connections of one door.
#[derive(Debug, Default)]
struct Hall {
    inside: Mutex<Inside>,
    /// Somebody has left.
    left: Condvar,
}

#[derive(Debug, Default)]
struct Inside {
    count: usize,
    /// Those that are still in the handshake, who came first first.
    haggling: Vec<Arc<Socket>>,
}

impl Hall {
    /// A place for one more, of `most`; `None`: there is none.
    fn enter(hall: &Arc<Self>, socket: &Arc<Socket>, most: usize) -> Option<Place> {
        let mut inside = hall.lock();
        if inside.count >= most {
            inside.haggling.first()?.shutdown();
            inside.haggling.remove(0);
            // Its thread is gone in a moment, unless it waits for the disk.
            let deadline = Instant::now() + MAKE_ROOM_MAX;
            while inside.count >= most {
                let left = deadline.saturating_duration_since(Instant::now());
                if left == Duration::ZERO {
                    return None;
                }
                inside = hall.left.wait_timeout(inside, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        inside.count += 1;
        inside.haggling.push(Arc::clone(socket));
        Some(Place { hall: Arc::clone(hall), socket: Arc::clone(socket) })
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's place inside a door; free again when it is dropped, however the connection's thread ends.
#[derive(Debug)]
pub struct Place {
    hall: Arc<Hall>,
    socket: Arc<Socket>,
}

impl Place {
    /// The handshake is as good as over: nobody gets this place before the connection ends.
    fn settle(&self) {
        self.hall.lock().haggling.retain(|socket| !Arc::ptr_eq(socket, &self.socket));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.settle();
        self.hall.lock().count -= 1;
        self.hall.left.notify_all();
    }
}

/// Serves one connection that came through `name`'s door, up to the point where the phases begin: then `phases` has
/// the socket. Without a place it came through none, and takes nobody else's.
pub fn serve_nbd(
    name: &str,
    socket: &Arc<Socket>,
    place: Option<&Place>,
    directory: &dyn Directory<Opened = Visit>,
    phases: impl FnOnce(&Arc<Socket>),
) {
    match handshake::haggle(socket, &Settling { directory, place }) {
        Ok(Outcome::Transmission { opened, agreed }) => {
            let export = Arc::clone(opened.export());
            log::debug!("{name} door: export {}: opened", export.name());
            if let Err(error) = server::transmit(&opened, agreed) {
                log::info!("{name} door: export {}: connection closed: {error}", export.name());
            }
        }
        Ok(Outcome::Phases) => phases(socket),
        Ok(Outcome::Ended) => {}
        Err(error) => log::info!("{name} door: connection closed: {error}"),
    }
}

/// Gives its place for good to a connection that opens something, before the client can know that it has.
struct Settling<'a> {
    directory: &'a dyn Directory<Opened = Visit>,
    place: Option<&'a Place>,
}

impl Directory for Settling<'_> {
    type Opened = Visit;

    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        self.directory.list(each);
    }

    fn describe(&self, name: &str) -> Result<Description, OpenError> {
        self.directory.describe(name)
    }

    fn open(&self, name: &str) -> Result<(Description, Visit), OpenError> {
        self.directory.open(name).inspect(|_| self.place.iter().for_each(|place| place.settle()))
    }

    fn takes_phases(&self) -> bool {
        let takes = self.directory.takes_phases();
        self.place.iter().filter(|_| takes).for_each(|place| place.settle());
        takes
    }
}

/// What the guest door offers to one connection: every disk of the guest that exists.
pub struct GuestDirectory<'a> {
    /// The guest's exports.
    pub exports: &'a [Arc<Export>],
    /// The connection that asks.
    pub socket: &'a Arc<Socket>,
    /// Says why a fenced or closed export is refused, naming the owner or whom it waits for.
    pub fenced: &'a dyn Fn() -> String,
}

impl GuestDirectory<'_> {
    /// The export of that name; without a name the only one there is.
    fn find(&self, name: &str) -> Result<(&Arc<Export>, Description), OpenError> {
        let export = match (name, self.exports) {
            ("", [only]) => Some(only),
            _ => self.exports.iter().find(|export| export.name() == name),
        };
        let export = export.ok_or(OpenError::Unknown)?;
        if export.gate().is_shut() {
            return Err(OpenError::Shutdown(Cause::new((self.fenced)())));
        }
        let disk = export.disk().ok_or_else(|| OpenError::Refused(Cause::new("this disk does not exist yet")))?;
        let mut description = server::description(disk.size(), export.is_read_only());
        // A disk's name fits.
        description.name = export.name().try_into().unwrap_or_default();
        Ok((export, description))
    }
}

impl Directory for GuestDirectory<'_> {
    type Opened = Visit;

    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        for export in self.exports.iter().filter(|export| export.disk().is_some()) {
            each(export.name(), "");
        }
    }

    fn describe(&self, name: &str) -> Result<Description, OpenError> {
        self.find(name).map(|(_, description)| description)
    }

    fn open(&self, name: &str) -> Result<(Description, Visit), OpenError> {
        let (export, description) = self.find(name)?;
        let visit = export.enter(Door::Guest, self.socket).map_err(|why| OpenError::Refused(Cause::new(why)))?;
        Ok((description, visit))
    }

    fn takes_phases(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn pair() -> (Arc<Socket>, Socket) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        (Arc::new(Socket::new(ours.into())), Socket::new(theirs.into()))
    }

    #[test]
    fn who_comes_takes_the_place_of_who_haggles_longest_and_of_nobody_else() {
        let hall = Arc::new(Hall::default());
        let [(settled, at_ease), (first, evicted), (second, patient), (last, newcomer)] =
            std::array::from_fn(|_| pair());
        let places = [&settled, &first, &second].map(|socket| Hall::enter(&hall, socket, 3).expect("room"));
        let [one, two, three] = places;
        one.settle();
        let leaves = thread::spawn(move || {
            // As the thread of a connection does: it reads, and finds that there is nobody.
            assert_eq!(first.recv(&mut [0]).expect("the end"), 0);
            drop(two);
        });
        let four = Hall::enter(&hall, &last, 3).expect("the first one's place");
        leaves.join().expect("no panic");
        assert!(evicted.has_hung_up() && [&at_ease, &patient, &newcomer].iter().all(|socket| !socket.has_hung_up()));
        three.settle();
        four.settle();
        let (late, _turned_away) = pair();
        assert!(Hall::enter(&hall, &late, 3).is_none(), "all are through");
        drop(one);
        drop(Hall::enter(&hall, &late, 3).expect("room again"));
        assert_eq!(hall.lock().count, 2);
        assert!(hall.lock().haggling.is_empty());
    }

    #[test]
    fn who_cannot_leave_at_once_is_not_waited_for_long() {
        let hall = Arc::new(Hall::default());
        let (stuck, _one) = pair();
        let (late, _two) = pair();
        let _place = Hall::enter(&hall, &stuck, 1).expect("room");
        let began = Instant::now();
        assert!(Hall::enter(&hall, &late, 1).is_none());
        assert!(began.elapsed() >= MAKE_ROOM_MAX);
    }
}
