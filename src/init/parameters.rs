//! What the kernel's command line says to PID 1: the words `blockferry.NAME=VALUE`, and after ` -- ` the command line
//! of blockferry itself. Pure; the steward calls it.
//!
//! Names with a dot are what the kernel keeps for modules: it neither warns of them nor hands them to init. A name that
//! begins with `blockferry.` and is not known is an error, so that a typing mistake does not pass for a decision.

use std::net::IpAddr;

use super::ending::End;
use super::words;
use crate::error::Problem;
use crate::limits::{INTERFACE_NAME_MAX, MOUNTS_MAX};

/// Everything that the kernel's command line says to us.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parameters {
    /// `blockferry.ip=`, in their order.
    pub(super) addresses: Vec<InterfaceAddress>,
    /// `blockferry.mount=`, in their order.
    pub(super) mounts: Vec<Mount>,
    /// `blockferry.start=`: each a program and its arguments.
    pub(super) start: Vec<Vec<String>>,
    /// `blockferry.restart=1`.
    pub(super) restart: bool,
    /// `blockferry.end=`.
    pub(super) end: End,
    /// The words after ` -- `; `None` when there is no ` -- `.
    pub(super) command: Option<Vec<String>>,
}

/// `IFACE=ADDR/PREFIX[,GATEWAY]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InterfaceAddress {
    /// The interface's name.
    pub(super) interface: String,
    /// The address that it gets.
    pub(super) address: IpAddr,
    /// How many bits of it are the network's.
    pub(super) prefix: u8,
    /// Where everything else goes.
    pub(super) gateway: Option<IpAddr>,
}

/// `DEV:DIR:FSTYPE[:ro]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// A device's path, which is waited for, or a word that the file system understands (`tmpfs`, a virtiofs tag).
    pub(super) device: String,
    /// Where it is mounted; it is made if it is missing.
    pub(super) directory: String,
    /// The file system's name.
    pub(super) kind: String,
    /// Whether nothing is to be written to it.
    pub(super) read_only: bool,
}

/// Reads the kernel's command line.
///
/// # Errors
/// The usage error; it names the word.
pub(super) fn parse(line: &[u8]) -> Result<Parameters, Problem> {
    let words = words::split(line).map_err(|cause| Problem::usage("init", "kernel command line", cause))?;
    let mut found = Parameters::default();
    let mut rest = words.iter();
    for word in rest.by_ref() {
        if word == "--" {
            found.command = Some(rest.cloned().collect());
            break;
        }
        if let Some(parameter) = word.strip_prefix("blockferry.") {
            found.take(parameter).map_err(|cause| Problem::usage("init", word, cause))?;
        }
    }
    Ok(found)
}

/// How the machine is to end, as far as a command line says so that is wrong elsewhere.
#[must_use]
pub(super) fn end_of(line: &[u8]) -> End {
    let text = String::from_utf8_lossy(line);
    let before = text.split_ascii_whitespace().take_while(|word| *word != "--");
    let said = before.filter_map(|word| word.strip_prefix("blockferry.end=")).filter_map(End::from_word);
    said.last().unwrap_or_default()
}

impl Parameters {
    /// One `NAME=VALUE`.
    fn take(&mut self, parameter: &str) -> Result<(), String> {
        let (name, value) = parameter.split_once('=').ok_or("has no value")?;
        match name {
            "ip" => self.addresses.push(address(value)?),
            "mount" if self.mounts.len() == MOUNTS_MAX => return Err(format!("more than {MOUNTS_MAX} mounts")),
            "mount" => self.mounts.push(mount(value)?),
            "start" => self.start.push(companion(value)?),
            "restart" => {
                self.restart = match value {
                    "0" => false,
                    "1" => true,
                    _ => return Err("is 0 or 1".to_owned()),
                }
            }
            "end" => self.end = End::from_word(value).ok_or("is poweroff, reboot or halt")?,
            _ => return Err("there is no such parameter: ip, mount, start, restart, end".to_owned()),
        }
        Ok(())
    }
}

/// `IFACE=ADDR/PREFIX[,GATEWAY]`.
fn address(value: &str) -> Result<InterfaceAddress, String> {
    const FORM: &str = "is IFACE=ADDR/PREFIX[,GATEWAY]";
    let (interface, rest) = value.split_once('=').ok_or(FORM)?;
    let is_name = |letter: char| !letter.is_whitespace() && !letter.is_control() && letter != '/' && letter != ':';
    let fits = (1..=INTERFACE_NAME_MAX).contains(&interface.len());
    if !fits || !interface.chars().all(is_name) || matches!(interface, "." | "..") {
        return Err(format!("'{interface}' is no interface's name"));
    }
    let (network, gateway) = match rest.split_once(',') {
        Some((network, gateway)) => (network, Some(gateway)),
        None => (rest, None),
    };
    let (address, prefix) = network.split_once('/').ok_or(FORM)?;
    let ip = |text: &str| text.parse::<IpAddr>().map_err(|_| format!("'{text}' is no IP address"));
    let address = ip(address)?;
    if address.is_unspecified() || address.is_multicast() {
        return Err(format!("{address} cannot be a host's address"));
    }
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let is_number = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix = prefix.parse().ok().filter(|prefix| is_number && *prefix <= bits);
    let prefix = prefix.ok_or_else(|| format!("the prefix is 0 to {bits}"))?;
    let gateway = gateway.map(ip).transpose()?;
    if gateway.is_some_and(|gateway| gateway.is_ipv4() != address.is_ipv4()) {
        return Err("address and gateway are of two families".to_owned());
    }
    Ok(InterfaceAddress { interface: interface.to_owned(), address, prefix, gateway })
}

/// `DEV:DIR:FSTYPE[:ro]`.
fn mount(value: &str) -> Result<Mount, String> {
    const FORM: &str = "is DEV:DIR:FSTYPE[:ro]";
    let parts: Vec<&str> = value.split(':').collect();
    let (device, directory, kind, read_only) = match parts.as_slice() {
        [device, directory, kind] => (*device, *directory, *kind, false),
        [device, directory, kind, "ro"] => (*device, *directory, *kind, true),
        _ => return Err(FORM.to_owned()),
    };
    let is_plain = |path: &str| path.split('/').all(|part| part != ".." && part != ".");
    if device.is_empty() || device.contains('/') && !device.starts_with("/dev/") || !is_plain(device) {
        return Err(format!("'{device}' is neither a path below /dev nor a word"));
    }
    if !directory.starts_with('/') || directory.trim_matches('/').is_empty() || !is_plain(directory) {
        return Err(format!("'{directory}' is no absolute path below /"));
    }
    if kind.is_empty() || !kind.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-')) {
        return Err(format!("'{kind}' is no file system"));
    }
    Ok(Mount { device: device.to_owned(), directory: directory.to_owned(), kind: kind.to_owned(), read_only })
}

/// A program's path and its arguments, which cannot contain blanks.
pub(super) fn companion(value: &str) -> Result<Vec<String>, String> {
    let words: Vec<String> = value.split_ascii_whitespace().map(str::to_owned).collect();
    match words.first() {
        Some(program) if program.starts_with('/') => Ok(words),
        Some(program) => Err(format!("'{program}' is no absolute path")),
        None => Err("names no program".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn good(line: &str) -> Parameters {
        parse(line.as_bytes()).expect("a good line")
    }

    fn bad(line: &str) -> String {
        parse(line.as_bytes()).expect_err(line).to_string()
    }

    #[test]
    fn a_whole_line_is_read() {
        let found = good(
            "BOOT_IMAGE=/vmlinuz console=ttyS0 quiet blockferry.ip=eth0=10.0.0.2/24,10.0.0.1 \
             blockferry.ip=eth0=fd00::2/64 blockferry.mount=/dev/vdb:/var/lib/blockferry:ext4 \
             blockferry.start=\"/bin/vmm --disk /dev/nbd0\" blockferry.restart=1 blockferry.end=reboot \
             -- serve g1 --disk vda,file=/dev/vda blockferry.end=halt\n",
        );
        let ip = |address: &str, prefix, gateway: Option<&str>| InterfaceAddress {
            interface: "eth0".to_owned(),
            address: address.parse().expect("an address"),
            prefix,
            gateway: gateway.map(|gateway| gateway.parse().expect("an address")),
        };
        assert_eq!(found.addresses, [ip("10.0.0.2", 24, Some("10.0.0.1")), ip("fd00::2", 64, None)]);
        let [mount] = found.mounts.as_slice() else { panic!("one mount: {:?}", found.mounts) };
        assert_eq!((mount.device.as_str(), mount.directory.as_str()), ("/dev/vdb", "/var/lib/blockferry"));
        assert_eq!((mount.kind.as_str(), mount.read_only), ("ext4", false));
        assert_eq!(found.start, [["/bin/vmm", "--disk", "/dev/nbd0"]]);
        assert_eq!((found.restart, found.end), (true, End::Reboot));
        let command = found.command.expect("a command");
        assert_eq!(command, ["serve", "g1", "--disk", "vda,file=/dev/vda", "blockferry.end=halt"]);
    }

    #[test]
    fn a_line_that_says_nothing_to_us_is_the_default() {
        assert_eq!(good(""), Parameters::default());
        assert_eq!(good("root=/dev/sda quiet myblockferry.ip=x"), Parameters::default());
        assert_eq!(good("quiet --").command, Some(vec![]));
        assert_eq!(good("quiet -- a -- b").command.expect("words"), ["a", "--", "b"]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_word() {
        let cases = [
            ("blockferry.ip=eth0", "is IFACE=ADDR/PREFIX[,GATEWAY]"),
            ("blockferry.ip=eth0=10.0.0.2", "is IFACE=ADDR/PREFIX[,GATEWAY]"),
            ("blockferry.ip==10.0.0.2/24", "'' is no interface's name"),
            ("blockferry.ip=a/b=10.0.0.2/24", "'a/b' is no interface's name"),
            ("blockferry.ip=sixteenletters16=10.0.0.2/24", "'sixteenletters16' is no interface's name"),
            ("blockferry.ip=eth0=10.0.0.256/24", "'10.0.0.256' is no IP address"),
            ("blockferry.ip=eth0=10.0.0.2/33", "the prefix is 0 to 32"),
            ("blockferry.ip=eth0=10.0.0.2/+8", "the prefix is 0 to 32"),
            ("blockferry.ip=eth0=10.0.0.2/", "the prefix is 0 to 32"),
            ("blockferry.ip=eth0=fd00::2/129", "the prefix is 0 to 128"),
            ("blockferry.ip=eth0=10.0.0.2/24,fd00::1", "address and gateway are of two families"),
            ("blockferry.ip=eth0=10.0.0.2/24,", "'' is no IP address"),
            ("blockferry.ip=eth0=0.0.0.0/24", "0.0.0.0 cannot be a host's address"),
            ("blockferry.ip=eth0=ff02::1/64", "ff02::1 cannot be a host's address"),
            ("blockferry.mount=/dev/vdb:/state", "is DEV:DIR:FSTYPE[:ro]"),
            ("blockferry.mount=/dev/vdb:/state:ext4:rw", "is DEV:DIR:FSTYPE[:ro]"),
            ("blockferry.mount=/etc/passwd:/state:ext4", "'/etc/passwd' is neither a path below /dev nor a word"),
            ("blockferry.mount=/dev/../x:/state:ext4", "'/dev/../x' is neither a path below /dev nor a word"),
            ("blockferry.mount=/dev/vdb:state:ext4", "'state' is no absolute path below /"),
            ("blockferry.mount=/dev/vdb://:ext4", "'//' is no absolute path below /"),
            ("blockferry.mount=/dev/vdb:/a/../..:ext4", "'/a/../..' is no absolute path below /"),
            ("blockferry.mount=/dev/vdb:/state:", "'' is no file system"),
            ("blockferry.start=", "names no program"),
            ("blockferry.start=vmm", "'vmm' is no absolute path"),
            ("blockferry.restart=yes", "is 0 or 1"),
            ("blockferry.end=off", "is poweroff, reboot or halt"),
            ("blockferry.restart", "has no value"),
            ("blockferry.ports=1", "there is no such parameter: ip, mount, start, restart, end"),
        ];
        for (word, cause) in cases {
            assert_eq!(bad(&format!("quiet {word} -- serve")), format!("blockferry: init: {word}: {cause}"));
        }
        assert_eq!(bad("a \"b"), "blockferry: init: kernel command line: a double quote is not closed");
        let many = "blockferry.mount=a:/b:tmpfs ".repeat(MOUNTS_MAX + 1);
        assert!(bad(&many).ends_with("more than 16 mounts"));
    }

    #[test]
    fn a_wrong_line_still_says_how_to_end() {
        assert_eq!(end_of(b"blockferry.end=reboot blockferry.ip=x -- blockferry.end=halt"), End::Reboot);
        assert_eq!(end_of(b"blockferry.end=off \xff \"unclosed"), End::PowerOff);
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = (parse(&line), end_of(&line));
        }

        #[test]
        fn no_value_makes_it_panic(name in "(ip|mount|start|restart|end)", value in "[a0.:=/,\\-\" é]{0,40}") {
            let _ = parse(format!("blockferry.{name}={value}").as_bytes());
        }
    }
}
