//! A bad link: the kernel's *netem* on what leaves an interface, set by one route netlink request. `main` calls it.
//!
//! Numbers and layouts are those of linux/rtnetlink.h and linux/pkt_sched.h.

use std::os::fd::OwnedFd;

use rustix::net::netdevice::name_to_index;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

const RTM_NEWQDISC: u16 = 36;
/// `NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE`.
const FLAGS: u16 = 0x1 | 0x4 | 0x400 | 0x100;
const TC_H_ROOT: u32 = 0xffff_ffff;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_NETEM_LATENCY64: u16 = 10;
/// Packets that may wait.
const LIMIT: u32 = 10_000;

/// Delays and loses what leaves an interface.
pub(crate) fn set(interface: &str, delay_ms: u64, loss_permille: u64) -> Result<(), String> {
    let fail = |error: rustix::io::Errno| format!("{interface}: {error}");
    let open = |family, kind| -> Result<OwnedFd, String> {
        socket_with(family, kind, SocketFlags::CLOEXEC, None).map_err(fail)
    };
    let index = name_to_index(open(AddressFamily::INET, SocketType::DGRAM)?, interface).map_err(fail)?;
    let socket = open(AddressFamily::NETLINK, SocketType::RAW)?;
    let message = request(index, delay_ms, loss_permille)?;
    sendto(&socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0)).map_err(fail)?;
    let mut answer = [0; 4096];
    let (length, _) = recv(&socket, &mut answer[..], RecvFlags::empty()).map_err(fail)?;
    // NLMSG_ERROR: a header of 16 bytes, then the number; 0 is a good answer.
    match answer[..length].get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(number) => Err(format!("{interface}: {}", std::io::Error::from_raw_os_error(number.saturating_neg()))),
        None => Err(format!("{interface}: no answer")),
    }
}

fn request(index: u32, delay_ms: u64, loss_permille: u64) -> Result<Vec<u8>, String> {
    if delay_ms > 10_000 || loss_permille > 1000 {
        return Err("more than 10 s, or than all".to_owned());
    }
    // tcmsg: family and padding (4 bytes), interface, handle, parent, info.
    let mut body = vec![0; 4];
    for field in [index, 0, TC_H_ROOT, 0] {
        body.extend(field.to_ne_bytes());
    }
    attribute(&mut body, TCA_KIND, b"netem\0");
    // tc_netem_qopt: latency (in ticks; the attribute after it counts), limit, loss, gap, duplicate, jitter.
    let loss = u32::try_from(u64::from(u32::MAX) * loss_permille / 1000).unwrap_or(u32::MAX);
    let mut options: Vec<u8> = [0, LIMIT, loss, 0, 0, 0].iter().flat_map(|field: &u32| field.to_ne_bytes()).collect();
    attribute(&mut options, TCA_NETEM_LATENCY64, &(delay_ms * 1_000_000).to_ne_bytes());
    attribute(&mut body, TCA_OPTIONS, &options);
    let length = u32::try_from(16 + body.len()).map_err(|error| error.to_string())?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(RTM_NEWQDISC.to_ne_bytes());
    message.extend(FLAGS.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    Ok(message)
}

/// One attribute, padded to four bytes.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend(u16::try_from(4 + value.len()).unwrap_or(u16::MAX).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_its_parts() {
        let message = request(2, 10, 10).expect("a request");
        assert_eq!(message.len(), 16 + 20 + 12 + 4 + 24 + 12);
        assert_eq!(&message[40..46], b"netem\0");
        assert_eq!(u32::from_ne_bytes(message[..4].try_into().expect("four")), 88);
        assert!(request(2, 10_001, 0).is_err() && request(2, 0, 1001).is_err());
    }
}
