//! The journal's bytes, and with which record it counts.

use super::*;
use crate::limits::{DISK_NAME_MAX, PATH_MAX, PLACE_MAX};
use crate::ownership::{Address, Host, Images, Order, Word};

fn journal() -> Journal {
    let image = Image::File { device: 5, inode: 300, born_ns: Some(-1) };
    let entry = |disk: &str, how, image| Entry {
        disk: disk.to_owned(),
        path: format!("/d/{disk}"),
        size_bytes: 1 << 20,
        how,
        doubtful: how == How::Empty,
        image,
    };
    Journal {
        attempt: Attempt([2; 16]),
        after: Attempt([1; 16]),
        lineage: Lineage([3; 16]),
        from: Peer { host: Host([4; 16]), address: Address::try_from("tcp://a:1").expect("fits") },
        entries: vec![entry("vda", How::Created, Some(image)), entry("vdb", How::Empty, None)],
    }
}

#[test]
fn the_bytes_are_pinned() {
    let head = [&[2; 16][..], &[1; 16], &[3; 16], &[4; 16], &[9], b"tcp://a:1", &[2]].concat();
    let vda = [&[3][..], b"vda", &[6], b"/d/vda", &[0x80, 0x80, 0x40], &[0, 0], &[1, 0, 5, 0xac, 2, 1, 1]].concat();
    let vdb = [&[3][..], b"vdb", &[6], b"/d/vdb", &[0x80, 0x80, 0x40], &[1, 1], &[0]].concat();
    let bytes = journal().encode().expect("fits");
    assert_eq!(bytes[..bytes.len() - 4], [&b"BFJOURNL\x01\x00"[..], &head, &vda, &vdb].concat());
    assert_eq!(Journal::decode(&bytes), Ok(journal()));
}

#[test]
fn the_longest_list_fits() {
    let address = Address::try_from("x".repeat(PLACE_MAX).as_str()).expect("fits");
    let entry = Entry {
        disk: "d".repeat(DISK_NAME_MAX),
        path: "p".repeat(PATH_MAX),
        size_bytes: u64::MAX,
        how: How::Sealed,
        doubtful: true,
        image: Some(Image::File { device: u64::MAX, inode: u64::MAX, born_ns: Some(i128::MIN) }),
    };
    let mut journal = Journal { entries: vec![entry.clone(); DISKS_MAX], ..journal() };
    journal.from.address = address;
    assert_eq!(Journal::decode(&journal.encode().expect("fits")), Ok(journal.clone()));
    journal.entries.push(entry);
    assert!(journal.encode().is_err() || Journal::decode(&journal.encode().expect("fits")).is_err());
}

#[test]
fn what_is_broken_lists_nothing() {
    let bytes = journal().encode().expect("fits");
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        assert!(matches!(Journal::decode(&flipped), Err(Broken::Checksum | Broken::Magic)), "byte {at}");
        assert!(Journal::decode(&bytes[..at]).is_err(), "{at} bytes");
    }
    // A checksum that is right does not make sense of the rest.
    let body = &bytes[10..bytes.len() - 4];
    for at in 0..body.len() {
        assert_eq!(Journal::decode(&FORM.wrap(&body[..at]).expect("fits")), Err(Broken::Content), "{at} bytes");
    }
    assert_eq!(Journal::decode(&FORM.wrap(&[body, &[0]].concat()).expect("fits")), Err(Broken::Content));
}

#[test]
fn it_counts_only_with_the_record_of_its_attempt() {
    let journal = journal();
    let record = |state| Record {
        lineage: journal.lineage,
        order: Order::FIRST,
        word: Word([6; 16]),
        host: Host([7; 16]),
        images: Images::NONE,
        state,
    };
    let (own, before, other) = (journal.attempt, journal.after, Attempt([9; 16]));
    let receiving = |attempt| record(State::Receiving { attempt, from: journal.from.clone() });
    let void = |attempt| record(State::Void { attempt });
    for fits in [receiving(own), receiving(before), void(own), void(before)] {
        assert!(journal.fits(Some(&fits)), "{fits:?}");
        assert!(!journal.fits(Some(&Record { lineage: Lineage([8; 16]), ..fits })));
    }
    let sealed = |attempt| record(State::Sealed { attempt, from: journal.from.clone() });
    assert!(journal.fits(Some(&sealed(own))));
    let given = State::Given { attempt: own, to: journal.from.clone(), arrived: true };
    let superseded = State::Superseded { by: journal.from.clone(), tie: false };
    let past = [State::Owner { attempt: own }, given, superseded].map(record);
    for not in past.into_iter().chain([receiving(other), void(other), void(Attempt::NONE), sealed(before)]) {
        assert!(!journal.fits(Some(&not)), "{not:?}");
    }
    assert!(!journal.fits(None));
    let first = Journal { after: Attempt::NONE, ..journal.clone() };
    assert!(!first.fits(Some(&void(Attempt::NONE))), "forgotten is forgotten");
}

#[test]
fn m2_a_sealed_attempt_has_nothing_that_may_be_removed() {
    let retired = journal().retired();
    assert!(retired.entries.iter().all(|entry| entry.how != How::Created));
    assert_eq!(retired.entries.iter().map(|entry| entry.how).collect::<Vec<_>>(), [How::Sealed, How::Empty]);
}

#[test]
fn an_image_is_told_from_another_one_in_its_place() {
    let file = |device, inode, born_ns| Image::File { device, inode, born_ns };
    let known = file(1, 2, Some(3));
    assert!(known.is(known));
    assert!(known.is(file(9, 2, Some(3))), "the next boot numbers devices differently");
    for other in [file(1, 3, Some(3)), file(1, 2, Some(4)), file(1, 2, None), Image::Device] {
        assert!(!known.is(other), "{other:?}");
    }
    let unborn = file(1, 2, None);
    assert!(unborn.is(unborn) && !unborn.is(file(9, 2, None)), "nothing but the number of a file tells it");
}

proptest::proptest! {
    #[test]
    fn garbage_never_panics(bytes: Vec<u8>) {
        let _ = Journal::decode(&bytes);
    }
}
