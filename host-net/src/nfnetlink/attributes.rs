//! Netlink attributes: type-length-value, padded to four bytes (linux/netlink.h, `struct nlattr`).

use std::iter::FusedIterator;

use thiserror::Error;

const NESTED: u16 = 0x8000;
const NET_BYTE_ORDER: u16 = 0x4000;
const KIND_MASK: u16 = 0x3fff;
const HEADER: usize = 4;

/// Bytes that are not attributes, or not the ones that were expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum Malformed {
    #[error("a length points outside the message")]
    Truncated,
    #[error("attribute {0} has an unexpected size")]
    Size(u16),
    #[error("attribute {0} is not text")]
    Text(u16),
    #[error("attribute {0} is missing")]
    Missing(u16),
    #[error("the request does not fit an attribute")]
    TooLong,
}

/// One attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attribute<'a> {
    pub(crate) kind: u16,
    pub(crate) value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// A NUL-terminated string; the terminator may be missing.
    pub(crate) fn text(&self) -> Result<&'a str, Malformed> {
        let end = self.value.iter().position(|byte| *byte == 0);
        let text = &self.value[..end.unwrap_or(self.value.len())];
        std::str::from_utf8(text).map_err(|_| Malformed::Text(self.kind))
    }

    pub(crate) fn byte(&self) -> Result<u8, Malformed> {
        match self.value {
            [value] => Ok(*value),
            _ => Err(Malformed::Size(self.kind)),
        }
    }

    /// A 32-bit number in network byte order.
    pub(crate) fn number(&self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.bytes()?))
    }

    pub(crate) fn bytes<const N: usize>(&self) -> Result<[u8; N], Malformed> {
        self.value
            .try_into()
            .map_err(|_| Malformed::Size(self.kind))
    }

    pub(crate) fn nested(&self) -> Attributes<'a> {
        Attributes(self.value)
    }
}

/// The attributes in a piece of a message, in order. Ends after the first malformed one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Attributes<'a> {
    /// The first attribute of this kind.
    pub(crate) fn find(self, kind: u16) -> Result<Option<Attribute<'a>>, Malformed> {
        for attribute in self {
            let attribute = attribute?;
            if attribute.kind == kind {
                return Ok(Some(attribute));
            }
        }
        Ok(None)
    }

    /// The first attribute of this kind, which the protocol promises.
    pub(crate) fn require(self, kind: u16) -> Result<Attribute<'a>, Malformed> {
        self.find(kind)?.ok_or(Malformed::Missing(kind))
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<Attribute<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut self.0);
        let Some(&[l0, l1, k0, k1]) = bytes.first_chunk::<HEADER>() else {
            return Some(Err(Malformed::Truncated));
        };
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let Some(value) = bytes.get(HEADER..length) else {
            return Some(Err(Malformed::Truncated));
        };
        self.0 = bytes
            .get(length.next_multiple_of(HEADER)..)
            .unwrap_or_default();
        Some(Ok(Attribute {
            kind: u16::from_ne_bytes([k0, k1]) & KIND_MASK,
            value,
        }))
    }
}

impl FusedIterator for Attributes<'_> {}

/// Puts attributes together.
#[derive(Debug, Default)]
pub(crate) struct AttributeWriter {
    bytes: Vec<u8>,
    too_long: bool,
}

impl AttributeWriter {
    /// The encoded attributes; an error when one exceeds the 16-bit length field.
    pub(crate) fn finish(self) -> Result<Vec<u8>, Malformed> {
        if self.too_long {
            return Err(Malformed::TooLong);
        }
        Ok(self.bytes)
    }

    pub(crate) fn byte(self, kind: u16, value: u8) -> Self {
        self.raw(kind, &[value])
    }

    pub(crate) fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.raw(kind, &bytes)
    }

    /// A number in network byte order, marked as such.
    pub(crate) fn number(self, kind: u16, value: u32) -> Self {
        self.raw(kind | NET_BYTE_ORDER, &value.to_be_bytes())
    }

    /// Bytes that are in network byte order already, marked as such.
    pub(crate) fn network_bytes<const N: usize>(self, kind: u16, value: [u8; N]) -> Self {
        self.raw(kind | NET_BYTE_ORDER, &value)
    }

    pub(crate) fn nested(mut self, kind: u16, inner: AttributeWriter) -> Self {
        self.too_long |= inner.too_long;
        self.raw(kind | NESTED, &inner.bytes)
    }

    /// Appends what another writer holds, on the same level.
    pub(crate) fn extend(&mut self, other: AttributeWriter) {
        self.too_long |= other.too_long;
        self.bytes.extend_from_slice(&other.bytes);
    }

    /// Encoded size so far, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn raw(mut self, kind: u16, value: &[u8]) -> Self {
        match u16::try_from(HEADER + value.len()) {
            Ok(length) => {
                self.bytes.extend_from_slice(&length.to_ne_bytes());
                self.bytes.extend_from_slice(&kind.to_ne_bytes());
                self.bytes.extend_from_slice(value);
                self.bytes
                    .resize(self.bytes.len().next_multiple_of(HEADER), 0);
            }
            Err(_) => self.too_long = true,
        }
        self
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_attribute_longer_than_its_length_field_is_refused() {
        let fits = AttributeWriter::default().raw(1, &vec![0; 65531]).finish();
        assert_eq!(fits.unwrap().len(), 65536);
        let nested = AttributeWriter::default().raw(1, &vec![0; 65532]);
        let outer = AttributeWriter::default().nested(2, nested);
        assert_eq!(outer.finish(), Err(Malformed::TooLong));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(values in proptest::collection::vec((0u16..KIND_MASK, proptest::collection::vec(any::<u8>(), 0..40)), 0..8)) {
            let mut writer = AttributeWriter::default();
            for (kind, value) in &values {
                writer = writer.raw(*kind, value);
            }
            let bytes = writer.finish().unwrap();
            let read: Vec<(u16, Vec<u8>)> = Attributes(&bytes)
                .map(|attribute| attribute.map(|a| (a.kind, a.value.to_vec())))
                .collect::<Result<_, _>>()
                .unwrap();
            prop_assert_eq!(read, values);
        }

        #[test]
        fn arbitrary_bytes_end_and_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut errors = 0;
            for attribute in Attributes(&bytes) {
                match attribute {
                    Ok(attribute) => {
                        let _ = (attribute.text(), attribute.byte(), attribute.number());
                        prop_assert!(attribute.nested().count() <= bytes.len());
                    }
                    Err(_) => errors += 1,
                }
            }
            prop_assert!(errors <= 1);
        }
    }
}
