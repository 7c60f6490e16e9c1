//! Interfaces get their addresses, by route netlink. The steward calls it, before anything listens or dials.

use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{recv, sendto, socket_with};

use super::netlink;
use super::parameters::InterfaceAddress;
use crate::error::{Problem, reason};
use crate::limits::{INIT_DEVICE_WAIT, NETLINK_ANSWER_MAX, NETLINK_TIMEOUT, RETRY_PAUSE};

/// Brings the loopback interface up: doors on 127.0.0.1 need it.
pub(super) fn loopback() -> Result<(), Problem> {
    let index = wait_for("lo")?;
    ask(&netlink::up(index)).map_err(|error| refused("lo", &error))
}

/// Waits for an interface, brings it up and gives it its address.
pub(super) fn configure(wanted: &InterfaceAddress) -> Result<(), Problem> {
    let InterfaceAddress { interface, address, prefix, gateway } = wanted;
    let index = wait_for(interface)?;
    let refused = |error: io::Error| refused(interface, &error);
    ask(&netlink::up(index)).map_err(refused)?;
    ask(&netlink::address(index, *address, *prefix)).map_err(refused)?;
    match gateway {
        Some(gateway) => ask(&netlink::default_route(index, *gateway)).map_err(refused),
        None => Ok(()),
    }
}

fn refused(interface: &str, error: &io::Error) -> Problem {
    Problem::fatal("init", format_args!("network interface {interface}"), reason(error))
}

/// The number of an interface that is there, or comes soon.
fn wait_for(interface: &str) -> Result<u32, Problem> {
    let fail = |error: Errno| refused(interface, &error.into());
    let any = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).map_err(fail)?;
    let deadline = Instant::now() + INIT_DEVICE_WAIT;
    loop {
        match rustix::net::netdevice::name_to_index(&any, interface) {
            Err(Errno::NODEV) if Instant::now() < deadline => thread::sleep(RETRY_PAUSE),
            Err(Errno::NODEV) => {
                let cause = format!("did not appear within {} s", INIT_DEVICE_WAIT.as_secs());
                return Err(Problem::fatal("init", format_args!("network interface {interface}"), cause));
            }
            result => return result.map_err(fail),
        }
    }
}

/// Sends one request and takes its answer in.
fn ask(request: &[u8]) -> io::Result<()> {
    let socket: OwnedFd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(NETLINK_TIMEOUT))?;
    sendto(&socket, request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; NETLINK_ANSWER_MAX];
    loop {
        let (length, _) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
        match netlink::answer(&answer[..length]) {
            Some(0) => return Ok(()),
            Some(number) => return Err(io::Error::from_raw_os_error(number)),
            // Nothing else is asked for; what comes all the same is not for us.
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_answers_with_its_own_errors() {
        // Nobody has this interface; a process that may not ask is told that instead.
        let error = ask(&netlink::up(0x7fff_fff0)).expect_err("no such interface");
        let known = [Errno::NODEV, Errno::PERM].map(|errno| Some(errno.raw_os_error()));
        assert!(known.contains(&error.raw_os_error()), "{error}");
    }

    #[test]
    fn the_loopback_interface_is_found() {
        assert!(wait_for("lo").expect("every machine has it") > 0);
    }
}
