//! Whether a byte stream is TLS: a sequence of records (RFC 8446, section 5.1) and nothing else.

/// Largest length of a record: 2^14 bytes of plaintext and 256 for protection.
const LARGEST_RECORD: usize = (1 << 14) + 256;

/// Length of a record header: type, version, length.
const HEADER: usize = 5;

/// What is wrong with a stream that should be TLS.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotTls {
    /// No byte at all.
    #[error("the stream is empty")]
    Empty,
    /// A header that no TLS record has.
    #[error("at byte {offset}: {bytes:02x?} is not the header of a TLS record")]
    Header {
        /// Offset in the stream.
        offset: usize,
        /// The five bytes found.
        bytes: Vec<u8>,
    },
    /// Only handshake, no data.
    #[error("{records} records, but none with application data")]
    NoData {
        /// Records seen.
        records: usize,
    },
}

/// Checks that `stream` consists of TLS records, the last of which may be cut off, and that at least one carries
/// application data. Returns the number of records.
pub fn check(stream: &[u8]) -> Result<usize, NotTls> {
    if stream.is_empty() {
        return Err(NotTls::Empty);
    }
    let (mut offset, mut records, mut with_data) = (0, 0, 0);
    while offset < stream.len() {
        let rest = &stream[offset..];
        if rest.len() < HEADER {
            break;
        }
        let length = usize::from(u16::from_be_bytes([rest[3], rest[4]]));
        // Types 20 to 23; versions 3.1 (first ClientHello) and 3.3 (everything else in TLS 1.3).
        let plausible = (20..=23).contains(&rest[0])
            && rest[1] == 3
            && matches!(rest[2], 1 | 3)
            && length <= LARGEST_RECORD;
        if !plausible {
            return Err(NotTls::Header {
                offset,
                bytes: rest[..HEADER].to_vec(),
            });
        }
        with_data += usize::from(rest[0] == 23);
        records += 1;
        offset += HEADER + length;
    }
    if with_data == 0 {
        Err(NotTls::NoData { records })
    } else {
        Ok(records)
    }
}

/// The cipher that a server chose, if the stream is a server's and begins with a handshake (RFC 8446, section 4.1.3).
pub fn cipher(stream: &[u8]) -> Option<String> {
    // Record header; then type, length, version and random of the message; then the session id, which is echoed.
    let hello = stream.get(HEADER..)?;
    if stream[0] != 22 || *hello.first()? != 2 {
        return None;
    }
    let session = usize::from(*hello.get(38)?);
    let chosen = hello.get(39 + session..41 + session)?;
    Some(match *chosen {
        [0x13, 0x01] => "TLS_AES_128_GCM_SHA256".to_owned(),
        [0x13, 0x02] => "TLS_AES_256_GCM_SHA384".to_owned(),
        [0x13, 0x03] => "TLS_CHACHA20_POLY1305_SHA256".to_owned(),
        [high, low] => format!("0x{high:02x}{low:02x}"),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(kind: u8, length: usize) -> Vec<u8> {
        let mut bytes = vec![kind, 3, 3];
        bytes.extend((length as u16).to_be_bytes());
        bytes.extend(vec![0xaa; length]);
        bytes
    }

    #[test]
    fn the_cipher_is_in_the_first_message_of_a_server() {
        let mut hello = vec![22, 3, 3, 0, 90, 2, 0, 0, 86, 3, 3];
        hello.extend([7; 32]);
        hello.push(32);
        hello.extend([9; 32]);
        hello.extend([0x13, 0x02, 0]);
        assert_eq!(cipher(&hello).as_deref(), Some("TLS_AES_256_GCM_SHA384"));
        assert_eq!(cipher(&hello[..70]), None);
        hello[5] = 1;
        assert_eq!(cipher(&hello), None, "a client's");
        assert_eq!(cipher(&record(23, 100)), None, "no handshake");
    }

    #[test]
    fn records_are_counted_and_the_last_may_be_cut() {
        let mut stream = record(22, 100);
        stream.extend(record(23, 16_384));
        stream.extend(&record(23, 500)[..50]);
        assert_eq!(check(&stream), Ok(3));
    }

    #[test]
    fn plaintext_is_not_tls() {
        assert!(matches!(
            check(b"GET / HTTP/1.1\r\n\r\n"),
            Err(NotTls::Header { offset: 0, .. })
        ));
        let mut stream = record(22, 10);
        stream.extend(b"PRI * HTTP/2.0");
        assert!(matches!(
            check(&stream),
            Err(NotTls::Header { offset: 15, .. })
        ));
        assert_eq!(check(&record(22, 10)), Err(NotTls::NoData { records: 1 }));
        assert_eq!(check(&[]), Err(NotTls::Empty));
    }

    proptest! {
        #[test]
        fn no_stream_panics(stream in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = check(&stream);
        }
    }
}
