//! What can be tried without a kernel that has the driver; the rest is tried in a virtual machine.

use super::*;

#[test]
fn a_backend_says_whose_it_is() {
    let name = backend(Host([0xab; 16]), "g1", "vda");
    assert_eq!(name, "blockferry abababababababababababababababab g1 vda");
    assert_eq!(guest_and_disk(&name), Some(("g1", "vda")));
    for other in ["", "nbd-client", "blockferry", "blockferry h g1", "blockferry h g1 vda more", "qemu h g1 vda"] {
        assert_eq!(guest_and_disk(other), None, "{other}");
    }
}

#[test]
fn the_kernel_is_told_what_it_can_use_and_never_of_several_connections() {
    let flags = |read_only| server::description(1 << 20, read_only).transmission_flags & KERNEL_FLAGS;
    assert_eq!(flags(false), 0b110_1101, "flags, flush, FUA, trim, write zeroes");
    assert_eq!(flags(true), 0b111, "flags, read-only, flush");
}

#[test]
fn one_thing_at_a_time_comes_or_goes() {
    let attachments = Attachments::default();
    let token = attachments.take("an attach").expect("nobody has it");
    assert!(attachments.take("a detach").is_none());
    assert!(attachments.hold().is_none());
    assert_eq!(attachments.token_text(), "an attach");
    drop(token);
    let held = attachments.hold().expect("nobody has it");
    assert!(held.is_empty() && attachments.take("an attach").is_none());
    // Without devices everything is proved at once.
    assert_eq!(held.sync().expect("no thread").wait(Instant::now()), Ok(true));
    drop(held);
    assert!(attachments.take("an attach").is_some());
}

#[test]
fn troubles_are_said_in_words() {
    let said = |errno: Errno| trouble(&errno.into());
    assert_eq!(said(Errno::NOENT), "the kernel has no nbd driver loaded: modprobe nbd");
    assert_eq!(said(Errno::PERM), "the process that serves the guest needs CAP_SYS_ADMIN for it");
    assert_eq!(said(Errno::BUSY), "is in use");
    assert_eq!(said(Errno::INVAL), "Invalid argument");
}
