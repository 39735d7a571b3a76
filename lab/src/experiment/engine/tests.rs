#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;

#[test]
fn a_hello_is_read_as_it_was_written_and_nothing_else_is_one() {
    let hello = Hello {
        id: (3 << 40) | 77,
        message_bytes: 512,
    };
    assert_eq!(Hello::parse(&hello.bytes()), Some(hello));
    let mut other = hello.bytes();
    other[0] ^= 1;
    assert_eq!(Hello::parse(&other), None);
    let empty = Hello {
        message_bytes: 0,
        ..hello
    };
    assert_eq!(
        Hello::parse(&empty.bytes()),
        None,
        "a message of no bytes never ends"
    );
}
