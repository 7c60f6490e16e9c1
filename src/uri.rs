//! NBD URIs: where a server listens, and which of its exports is meant.
//!
//! `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`, with percent-encoding. Whoever takes a disk, or a
//! server to ask, from the command line parses one here. Nothing is resolved or dialled: that is [`Address`]'s work,
//! and so is the refusal of TCP beyond this host. A relative socket path is made absolute when it is read.
//!
//! NBD URI specification (doc/uri.md of the NBD project), RFC 3986.

use std::fmt::{self, Write as _};

use crate::address::Address;
use crate::limits::{EXPORT_NAME_MAX, URI_MAX};

/// The port of a URI without one: the number that IANA gave to NBD.
pub const NBD_PORT: u16 = 10809;

/// One export of an NBD server. Its [`Display`](fmt::Display) form parses back to itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    /// Where the server listens.
    pub address: Address,
    /// The export's name; empty: the default export.
    pub export: String,
}

/// Whether `text` is meant as the URI of an NBD server, rather than as a file's name: a file of such a name is written
/// with its directory, `./nbd://x`.
#[must_use]
pub fn is_nbd(text: &str) -> bool {
    let Some((scheme, _)) = text.split_once(':') else { return false };
    let scheme = scheme.to_ascii_lowercase();
    matches!(scheme.split('+').next(), Some("nbd" | "nbds")) && !scheme.contains('/')
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
        if text.contains(char::is_control) {
            return Err("the URI contains a control character".to_owned());
        }
        parse(text).map_err(|cause| format!("'{text}': {cause}"))
    }

    /// The same server, another export.
    #[must_use]
    pub fn with_export(&self, export: &str) -> Self {
        Self { address: self.address.clone(), export: export.to_owned() }
    }
}

fn parse(text: &str) -> Result<NbdUri, String> {
    let Some((scheme, rest)) = text.split_once("://").filter(|_| is_nbd(text)) else {
        return Err("is not an NBD URI: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH".to_owned());
    };
    let scheme = scheme.to_ascii_lowercase();
    match scheme.as_str() {
        "nbd" | "nbd+tcp" | "nbd+unix" => {}
        "nbds" | "nbds+tcp" | "nbds+unix" => return Err(format!("{scheme}: TLS is not supported yet")),
        _ => return Err(format!("{scheme}: is not supported; use nbd: or nbd+unix:")),
    }
    let over_unix = scheme == "nbd+unix";
    if rest.contains('#') {
        return Err("an NBD URI has no fragment; a '#' in a name is written %23".to_owned());
    }
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    // Only the first slash is the URI's: what follows is the name, further slashes included.
    let (authority, path) = place.split_once('/').unwrap_or((place, ""));
    let export = decode(path, "the export's name")?;
    if export.len() > EXPORT_NAME_MAX {
        return Err(format!("the export's name is longer than {EXPORT_NAME_MAX} bytes"));
    }
    let socket = socket(query)?;
    let address = match (over_unix, socket) {
        (true, Some(_)) if !authority.is_empty() => {
            return Err("a Unix socket has no host: nbd+unix:///EXPORT?socket=PATH".to_owned());
        }
        (true, Some(path)) => unix(&path)?,
        (true, None) => return Err("lacks the socket: nbd+unix:///EXPORT?socket=PATH".to_owned()),
        (false, Some(_)) => return Err("socket= belongs to nbd+unix:".to_owned()),
        (false, None) => tcp(authority)?,
    };
    Ok(NbdUri { address, export })
}

/// The one parameter that is understood; the specification wants the others to be diagnosed.
fn socket(query: &str) -> Result<Option<String>, String> {
    let mut socket = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=').unwrap_or((pair, "")) {
            ("socket", path) if socket.is_none() => socket = Some(decode(path, "the socket's path")?),
            ("socket", _) => return Err("socket= is given twice".to_owned()),
            (name, _) if name.starts_with("tls-") => return Err(format!("{name}=: TLS is not supported yet")),
            (name, _) => return Err(format!("there is no parameter '{name}', only socket=")),
        }
    }
    Ok(socket)
}

fn unix(path: &str) -> Result<Address, String> {
    let absolute = std::path::absolute(path).map_err(|error| format!("the socket's path '{path}': {error}"))?;
    Address::parse(&format!("unix://{}", absolute.display()))
}

/// `HOST[:PORT]`, an IPv6 host in brackets.
fn tcp(authority: &str) -> Result<Address, String> {
    if authority.contains('@') {
        return Err("a user's name in a URI is for TLS, which is not supported yet".to_owned());
    }
    let authority = decode(authority, "the host")?;
    if authority.is_empty() {
        return Err("lacks a host: nbd://HOST[:PORT]/EXPORT".to_owned());
    }
    let has_port = match authority.strip_prefix('[') {
        Some(rest) => !rest.ends_with(']'),
        None => authority.contains(':'),
    };
    // A port that is empty is none.
    let (authority, has_port) = match authority.strip_suffix(':') {
        Some(host) if has_port => (host.to_owned(), false),
        _ => (authority, has_port),
    };
    let place = if has_port { authority } else { format!("{authority}:{NBD_PORT}") };
    match Address::parse(&format!("tcp://{place}"))? {
        Address::Tcp { port: 0, .. } => Err("port 0 can be listened on only".to_owned()),
        address => Ok(address),
    }
}

/// Undoes percent-encoding.
fn decode(text: &str, what: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        let byte =
            digit(rest.next()).zip(digit(rest.next())).and_then(|(high, low)| u8::try_from(high << 4 | low).ok());
        bytes.push(byte.ok_or_else(|| format!("{what}: '%' is followed by two hexadecimal digits"))?);
    }
    match String::from_utf8(bytes) {
        Ok(text) if text.contains('\0') => Err(format!("{what} contains a NUL")),
        Ok(text) => Ok(text),
        Err(_) => Err(format!("{what} is not UTF-8")),
    }
}

/// Writes a name so that all of it means itself in a URI.
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
                // A zone, which is all of a host that needs it, has its '%' encoded.
                let host = host.replace('%', "%25");
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
                // It came from text.
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
            ("nbd://example.com:10809/export", "tcp://example.com:10809", "export", "nbd://example.com/export"),
            ("nbd://b", "tcp://b:10809", "", "nbd://b/"),
            ("nbd://b/", "tcp://b:10809", "", "nbd://b/"),
            ("nbd://b:/x", "tcp://b:10809", "x", "nbd://b/x"),
            ("nbd://[::1]:/x", "tcp://[::1]:10809", "x", "nbd://[::1]/x"),
            ("nbd://b//disk", "tcp://b:10809", "/disk", "nbd://b//disk"),
            ("NBD+TCP://127.0.0.1:1/a%20b/c", "tcp://127.0.0.1:1", "a b/c", "nbd://127.0.0.1:1/a%20b/c"),
            ("nbd://b/%C3%a4+%3f", "tcp://b:10809", "ä+?", "nbd://b/%C3%A4%2B%3F"),
            ("nbd://[::1]/x", "tcp://[::1]:10809", "x", "nbd://[::1]/x"),
            ("nbd://[fe80::1%25eth0]:99/", "tcp://[fe80::1%eth0]:99", "", "nbd://[fe80::1%25eth0]:99/"),
            ("nbd+unix:///vda?socket=/r/a%3Fb", "unix:///r/a?b", "vda", "nbd+unix:///vda?socket=/r/a%3Fb"),
            ("nbd+unix://?socket=/s", "unix:///s", "", "nbd+unix:///?socket=/s"),
        ] {
            let uri = NbdUri::parse(text).expect(text);
            assert_eq!((uri.address.to_string().as_str(), uri.export.as_str()), (address, export), "{text}");
            assert_eq!(uri.to_string(), back);
            assert_eq!(NbdUri::parse(back), Ok(uri));
        }
        let uri = NbdUri::parse("nbd://b/x").expect("a URI").with_export("y z");
        assert_eq!(uri.to_string(), "nbd://b/y%20z");
    }

    #[test]
    fn a_relative_socket_is_this_directorys() {
        let here = std::env::current_dir().expect("a directory").join("nbd.sock");
        let uri = NbdUri::parse("nbd+unix:///?socket=nbd.sock").expect("a URI");
        assert_eq!(uri.address, Address::Unix(here));
    }

    #[test]
    fn every_wrong_uri_says_what_is_wrong() {
        let form = "is not an NBD URI: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH";
        let long = format!("nbd://h/{}", "x".repeat(EXPORT_NAME_MAX + 1));
        for (text, cause) in [
            ("/d/g1.raw", form),
            ("http://h/x", form),
            ("nbd:unix:/x", form),
            ("nbds://h/x", "nbds: TLS is not supported yet"),
            ("nbds+unix:///x?socket=/s", "nbds+unix: TLS is not supported yet"),
            ("nbd+vsock://2:5/x", "nbd+vsock: is not supported; use nbd: or nbd+unix:"),
            ("nbd+ssh://h/x", "nbd+ssh: is not supported; use nbd: or nbd+unix:"),
            ("nbd://h/x?tls-type=psk", "tls-type=: TLS is not supported yet"),
            ("nbd://u@h/x", "a user's name in a URI is for TLS, which is not supported yet"),
            ("nbd+unix:///vda", "lacks the socket: nbd+unix:///EXPORT?socket=PATH"),
            ("nbd+unix://h/vda?socket=/x", "a Unix socket has no host: nbd+unix:///EXPORT?socket=PATH"),
            ("nbd+unix:///vda?socket=/x&socket=/y", "socket= is given twice"),
            ("nbd+unix:///?socket=%00/abstract", "the socket's path contains a NUL"),
            ("nbd+unix:///?socket=", "the socket's path '': cannot make an empty path absolute"),
            ("nbd://h/x?x-new=1", "there is no parameter 'x-new', only socket="),
            ("nbd://h/x?socket=/y", "socket= belongs to nbd+unix:"),
            ("nbd:///x", "lacks a host: nbd://HOST[:PORT]/EXPORT"),
            ("nbd://:/x", "'tcp://:10809' lacks a host: tcp://HOST:PORT"),
            ("nbd://h:0/x", "port 0 can be listened on only"),
            ("nbd://h:port/x", "'tcp://h:port': 'port' is not a port (0 to 65535)"),
            ("nbd://::1/x", "'tcp://::1': an IPv6 address stands in brackets: tcp://[IPV6]:PORT"),
            ("nbd://h/%2", "the export's name: '%' is followed by two hexadecimal digits"),
            ("nbd://h/%+1", "the export's name: '%' is followed by two hexadecimal digits"),
            ("nbd://h/%00", "the export's name contains a NUL"),
            ("nbd://h/%FF", "the export's name is not UTF-8"),
            ("nbd://h/x#y", "an NBD URI has no fragment; a '#' in a name is written %23"),
            (long.as_str(), "the export's name is longer than 4096 bytes"),
        ] {
            assert_eq!(NbdUri::parse(text), Err(format!("'{text}': {cause}")));
        }
        let longer = format!("nbd://h/{}", "%20".repeat(EXPORT_NAME_MAX + 200));
        assert_eq!(NbdUri::parse(&longer), Err(format!("the URI is longer than {URI_MAX} bytes")));
        assert_eq!(NbdUri::parse("nbd://h/\n"), Err("the URI contains a control character".to_owned()));
    }

    #[test]
    fn a_file_is_told_from_a_server() {
        for text in ["nbd://h", "NBD:x", "nbd+unix:///", "nbds+tcp://h", "nbd+vsock://2"] {
            assert!(is_nbd(text), "{text}");
        }
        for text in ["/d/nbd.raw", "nbd.raw", "./nbd://h", "http://nbd", "nbd/x:y", "nbdx://h"] {
            assert!(!is_nbd(text), "{text}");
        }
    }
}
