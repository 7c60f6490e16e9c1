//! NBD URIs: where a server listens, and which export of it is meant.
//!
//! Pure: text in, [`NbdUri`] out, and back. Understood are `nbd://HOST[:PORT]/EXPORT` and
//! `nbd+unix:///EXPORT?socket=PATH`, with percent-encoding. TLS and vsock forms are told apart from nonsense.
//!
//! NBD URI specification (doc/uri.md of the NBD project).

use std::fmt;
use std::fmt::Write as _;

use crate::address::Address;
use crate::limits::{EXPORT_NAME_MAX, URI_MAX};

/// The port of `nbd://HOST/`.
pub const NBD_PORT: u16 = 10809;

/// One export of an NBD server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    /// Where the server listens.
    pub address: Address,
    /// The export's name; empty: the default export.
    pub export: String,
}

/// Whether `text` is meant to be the URI of an NBD server, right or wrong.
#[must_use]
pub fn is_nbd(text: &str) -> bool {
    text.split_once(':').is_some_and(|(scheme, _)| {
        let scheme = scheme.to_ascii_lowercase();
        let (name, way) = scheme.split_once('+').unwrap_or((&scheme, ""));
        matches!(name, "nbd" | "nbds") && matches!(way, "" | "unix" | "vsock" | "tcp" | "ssh")
    })
}

impl NbdUri {
    /// Reads a URI.
    ///
    /// # Errors
    /// The cause, for a usage error.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() > URI_MAX {
            return Err(format!("the URI is longer than {URI_MAX} bytes"));
        }
        if !is_nbd(text) {
            return Err(format!(
                "'{text}' is not an NBD URI: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
            ));
        }
        let wrong = |cause: &str| format!("'{text}': {cause}");
        let (scheme, rest) = text.split_once("://").ok_or_else(|| wrong("'//' must follow the scheme"))?;
        let (rest, fragment) = rest.split_once('#').map_or((rest, ""), |(rest, fragment)| (rest, fragment));
        if !fragment.is_empty() {
            return Err(wrong("a '#' must be written %23"));
        }
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = place.split_once('/').unwrap_or((place, ""));
        let export = decode(path).map_err(|cause| wrong(&cause))?;
        if export.len() > EXPORT_NAME_MAX {
            return Err(wrong(&format!("the export's name is longer than {EXPORT_NAME_MAX} bytes")));
        }
        let mut socket = None;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("socket", path)) if socket.is_none() => {
                    socket = Some(decode(path).map_err(|cause| wrong(&cause))?);
                }
                Some(("socket", _)) => return Err(wrong("'socket' is given twice")),
                _ => return Err(wrong(&format!("the parameter '{pair}' is not known; there is socket="))),
            }
        }
        let address = match (scheme.to_ascii_lowercase().as_str(), socket) {
            ("nbd+unix", Some(_)) if !authority.is_empty() => {
                return Err(wrong("a Unix socket has no host: nbd+unix:///EXPORT?socket=PATH"));
            }
            ("nbd+unix", Some(path)) => Address::parse(&format!("unix://{path}")),
            ("nbd+unix", None) => return Err(wrong("socket=PATH is missing")),
            ("nbd" | "nbd+tcp", None) => tcp(authority).ok_or_else(|| wrong("expected nbd://HOST[:PORT]/EXPORT"))?,
            ("nbd" | "nbd+tcp", Some(_)) => return Err(wrong("socket= belongs to nbd+unix:")),
            (other, _) => return Err(wrong(&format!("{other}: is not supported yet"))),
        };
        Ok(Self { address: address.map_err(|cause| wrong(&cause))?, export })
    }

    /// The same server, another export.
    #[must_use]
    pub fn with_export(&self, export: &str) -> Self {
        Self { address: self.address.clone(), export: export.to_owned() }
    }
}

/// `HOST[:PORT]`, an IPv6 host in brackets; `None`: neither.
fn tcp(authority: &str) -> Option<Result<Address, String>> {
    let bare = authority.strip_prefix('[').map_or(!authority.contains(':'), |rest| rest.ends_with(']'));
    if authority.is_empty() || authority.contains('@') {
        return None;
    }
    let place = if bare { format!("{authority}:{NBD_PORT}") } else { authority.to_owned() };
    match Address::parse(&format!("tcp://{place}")) {
        Ok(Address::Tcp { port: 0, .. }) => None,
        address => Some(address),
    }
}

fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        match (digit(rest.next()), digit(rest.next())) {
            (Some(high), Some(low)) => bytes.push(u8::try_from(high * 16 + low).unwrap_or_default()),
            _ => return Err("after a '%' come two hexadecimal digits".to_owned()),
        }
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err("a name that is no text".to_owned()),
    }
}

/// As much of a name as means itself in a URI.
fn encode(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => f.write_char(byte.into())?,
            _ => write!(f, "%{byte:02X}")?,
        }
    }
    Ok(())
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "nbd://[{host}]")?
                } else {
                    write!(f, "nbd://{host}")?
                }
                if *port != NBD_PORT {
                    write!(f, ":{port}")?;
                }
                f.write_char('/')?;
                encode(&self.export, f)
            }
            Address::Unix(path) => {
                f.write_str("nbd+unix:///")?;
                encode(&self.export, f)?;
                f.write_str("?socket=")?;
                encode(&path.to_string_lossy(), f)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_read_and_written_back() {
        for (text, address, export, back) in [
            ("nbd://b/vda", "tcp://b:10809", "vda", "nbd://b/vda"),
            ("nbd://b", "tcp://b:10809", "", "nbd://b/"),
            ("NBD://127.0.0.1:1/a%20b/c", "tcp://127.0.0.1:1", "a b/c", "nbd://127.0.0.1:1/a%20b/c"),
            ("nbd://[::1]/x", "tcp://[::1]:10809", "x", "nbd://[::1]/x"),
            ("nbd://[::1]:99/", "tcp://[::1]:99", "", "nbd://[::1]:99/"),
            (
                "nbd+unix:///vda?socket=/run/a%3Fb.sock",
                "unix:///run/a?b.sock",
                "vda",
                "nbd+unix:///vda?socket=/run/a%3Fb.sock",
            ),
            ("nbd+unix://?socket=/s", "unix:///s", "", "nbd+unix:///?socket=/s"),
        ] {
            let uri = NbdUri::parse(text).expect(text);
            assert_eq!((uri.address.to_string().as_str(), uri.export.as_str()), (address, export), "{text}");
            assert_eq!(uri.to_string(), back);
            assert_eq!(NbdUri::parse(back), Ok(uri));
        }
    }

    #[test]
    fn every_wrong_uri_says_what_is_wrong() {
        for (text, cause) in [
            ("nbd:unix:/x", "'//' must follow the scheme"),
            ("nbd+unix:///vda", "socket=PATH is missing"),
            ("nbd+unix:///vda?socket=x", "the path must be absolute"),
            ("nbd+unix://host/vda?socket=/x", "a Unix socket has no host"),
            ("nbd+unix:///vda?socket=/x&socket=/y", "'socket' is given twice"),
            ("nbd://h/x?tls=1", "the parameter 'tls=1' is not known; there is socket="),
            ("nbd://h/x?socket=/y", "socket= belongs to nbd+unix:"),
            ("nbd:///x", "expected nbd://HOST[:PORT]/EXPORT"),
            ("nbd://h:0/x", "expected nbd://HOST[:PORT]/EXPORT"),
            ("nbd://u@h/x", "expected nbd://HOST[:PORT]/EXPORT"),
            ("nbd://h:port/x", "'port' is not a port (0 to 65535)"),
            ("nbd://h/%2", "after a '%' come two hexadecimal digits"),
            ("nbd://h/%00", "a name that is no text"),
            ("nbd://h/x#y", "a '#' must be written %23"),
            ("nbds://h/x", "nbds: is not supported yet"),
            ("nbd+vsock://1/x", "nbd+vsock: is not supported yet"),
        ] {
            let said = NbdUri::parse(text).expect_err(text);
            assert!(said.contains(cause), "{text}: {said}");
        }
        assert!(!is_nbd("/d/nbd.raw") && !is_nbd("nbd.raw") && !is_nbd("http://x") && is_nbd("nbd+unix:///"));
    }
}
