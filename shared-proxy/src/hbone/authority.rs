//! What a CONNECT asks for.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

/// Longest hostname, in bytes (RFC 1035, 2.3.4).
const LONGEST_HOSTNAME: usize = 253;

/// The authority of a CONNECT: an address or a hostname, and a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// By address.
    Address(SocketAddr),
    /// By hostname: the port is the service's.
    Hostname(Arc<str>, u16),
}

/// A text that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("authority {0:?} is neither ADDRESS:PORT nor HOSTNAME:PORT")]
pub struct InvalidAuthority(String);

impl Authority {
    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Hostname(_, port) => *port,
        }
    }

    /// The address, if it is one.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Address(address) => Some(*address),
            Self::Hostname(..) => None,
        }
    }
}

impl From<SocketAddr> for Authority {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

impl FromStr for Authority {
    type Err = InvalidAuthority;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            let ip = address.ip().to_canonical();
            return Ok(Self::Address(SocketAddr::new(ip, address.port())));
        }
        let invalid = || InvalidAuthority(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let digits = !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit());
        let port = port.parse().ok().filter(|_| digits).ok_or_else(invalid)?;
        if !is_hostname(host) {
            return Err(invalid());
        }
        // Names are compared as the control plane writes them.
        Ok(Self::Hostname(host.to_ascii_lowercase().into(), port))
    }
}

/// Labels of letters, digits, dashes and underscores. The last one is not a number: such a text would be an address that
/// somebody spelled wrongly (RFC 1123, 2.1).
fn is_hostname(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
    };
    let numeric = |label: &str| label.bytes().all(|c| c.is_ascii_digit());
    text.len() <= LONGEST_HOSTNAME
        && text.split('.').all(label)
        && !text.rsplit('.').next().is_none_or(numeric)
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname(hostname, port) => write!(f, "{hostname}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use proptest::prelude::*;

    #[rstest::rstest]
    #[case::address("10.0.0.1:80", Some("10.0.0.1:80"))]
    #[case::ipv6("[fd00::1]:80", Some("[fd00::1]:80"))]
    #[case::mapped("[::ffff:10.0.0.1]:80", Some("10.0.0.1:80"))]
    #[case::hostname(
        "web.default.svc.cluster.local:80",
        Some("web.default.svc.cluster.local:80")
    )]
    #[case::case_does_not_matter("Web.Example:80", Some("web.example:80"))]
    #[case::nothing("", None)]
    #[case::no_port("web.example", None)]
    #[case::address_without_port("10.0.0.1", None)]
    #[case::empty_port("web.example:", None)]
    #[case::signed_port("web.example:+80", None)]
    #[case::large_port("web.example:65536", None)]
    #[case::no_host(":80", None)]
    #[case::user("me@web.example:80", None)]
    #[case::wrong_address("10.0.0.300:80", None)]
    #[case::short_address("10.1:80", None)]
    #[case::bare_ipv6("fd00::1:80", None)]
    #[case::empty_label("web..example:80", None)]
    fn parses(#[case] text: &str, #[case] expected: Option<&str>) {
        let parsed = text.parse::<Authority>().ok().map(|a| a.to_string());
        assert_eq!(parsed.as_deref(), expected);
    }

    proptest! {
        #[test]
        fn never_panics_and_what_it_takes_it_takes_again(text in "\\PC{0,40}(:[0-9]{0,6})?") {
            if let Ok(parsed) = text.parse::<Authority>() {
                prop_assert_eq!(parsed.to_string().parse::<Authority>().unwrap(), parsed);
            }
        }
    }
}
