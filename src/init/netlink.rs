//! The few route netlink messages that give an interface an address. Pure: bytes in, bytes out; `network` sends them.
//!
//! Numbers and layouts are those of linux/netlink.h, if_link.h, if_addr.h and rtnetlink.h; everything is in the
//! machine's own byte order.

use std::net::IpAddr;

const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;

/// `NLM_F_REQUEST | NLM_F_ACK`: every request is answered with a number, 0 or an error.
const ANSWERED: u16 = 0x1 | 0x4;
/// `NLM_F_CREATE | NLM_F_REPLACE`.
const CREATE_OR_REPLACE: u16 = 0x400 | 0x100;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// An address that is set by hand is used at once, not after a second of asking whether somebody else has it.
const IFA_F_NODAD: u8 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

/// Bytes of a message's header.
const HEADER: usize = 16;

/// A request that brings an interface up.
pub(super) fn up(index: u32) -> Vec<u8> {
    // ifinfomsg: family, pad, type (u16), index, flags, change.
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    message(RTM_NEWLINK, ANSWERED, &body)
}

/// A request that gives an interface an address.
pub(super) fn address(index: u32, address: IpAddr, prefix: u8) -> Vec<u8> {
    let (family, flags) = if address.is_ipv4() { (AF_INET, 0) } else { (AF_INET6, IFA_F_NODAD) };
    // ifaddrmsg: family, prefix, flags, scope, index.
    let mut body = vec![family, prefix, flags, 0];
    body.extend(index.to_ne_bytes());
    attribute(&mut body, IFA_LOCAL, &octets(address));
    attribute(&mut body, IFA_ADDRESS, &octets(address));
    message(RTM_NEWADDR, ANSWERED | CREATE_OR_REPLACE, &body)
}

/// A request that sends everything without a way of its own to `gateway`.
pub(super) fn default_route(index: u32, gateway: IpAddr) -> Vec<u8> {
    let family = if gateway.is_ipv4() { AF_INET } else { AF_INET6 };
    // rtmsg: family, destination's and source's length, tos, table, protocol, scope, type, flags (u32).
    let mut body = vec![family, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST, 0, 0, 0, 0];
    attribute(&mut body, RTA_GATEWAY, &octets(gateway));
    attribute(&mut body, RTA_OIF, &index.to_ne_bytes());
    message(RTM_NEWROUTE, ANSWERED | CREATE_OR_REPLACE, &body)
}

/// What an answer says: an error's number, or 0. `None`: it is no answer to a request.
pub(super) fn answer(bytes: &[u8]) -> Option<i32> {
    let word = |at: usize| -> Option<[u8; 4]> { bytes.get(at..at + 4)?.try_into().ok() };
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let length = usize::try_from(u32::from_ne_bytes(word(0)?)).ok()?;
    let whole = kind == NLMSG_ERROR && length >= HEADER + 4 && length <= bytes.len();
    let number = i32::from_ne_bytes(word(HEADER)?);
    (whole && number <= 0).then(|| number.saturating_neg())
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// One attribute; those that are used here are whole multiples of four bytes, so that nothing has to be padded.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}

/// One message: length, type, flags, sequence, port; then the body.
fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn the_bytes_are_the_kernels() {
        let link = [32, 0, 0, 0, 16, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0];
        assert_eq!(up(2), link);
        let head = [40, 0, 0, 0, 20, 0, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0];
        let body = [2, 24, 0, 0, 2, 0, 0, 0, 8, 0, 2, 0, 10, 0, 0, 2, 8, 0, 1, 0, 10, 0, 0, 2];
        assert_eq!(address(2, ip("10.0.0.2"), 24), [&head[..], &body[..]].concat());
        let head = [44, 0, 0, 0, 24, 0, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0];
        let body = [2, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0, 8, 0, 5, 0, 10, 0, 0, 1, 8, 0, 4, 0, 2, 0, 0, 0];
        assert_eq!(default_route(2, ip("10.0.0.1")), [&head[..], &body[..]].concat());
        let six = address(2, ip("fd00::2"), 64);
        assert_eq!((six.len(), &six[16..20]), (16 + 8 + 2 * 20, &[10, 64, 2, 0][..]));
    }

    #[test]
    fn answers_are_told_from_everything_else() {
        let reply = |kind: u16, number: i32| {
            let mut body = number.to_ne_bytes().to_vec();
            body.extend(up(1));
            message(kind, 0, &body)
        };
        assert_eq!(answer(&reply(NLMSG_ERROR, 0)), Some(0));
        assert_eq!(answer(&reply(NLMSG_ERROR, -17)), Some(17));
        assert_eq!(answer(&reply(NLMSG_ERROR, i32::MIN)), Some(i32::MAX));
        assert_eq!(answer(&reply(NLMSG_ERROR, 17)), None);
        assert_eq!(answer(&reply(RTM_NEWLINK, 0)), None);
        let whole = reply(NLMSG_ERROR, -1);
        for length in 0..whole.len() {
            assert_eq!(answer(&whole[..length]), None, "{length}");
        }
        let mut short = whole.clone();
        short[0] = 8;
        assert_eq!(answer(&short), None);
    }
}
