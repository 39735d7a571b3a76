//! Names of things in the mesh that are written as one text: `network/ip` and `namespace/hostname`.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An address within a network, written `network/ip`. The network may be empty: `/10.0.0.1`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// The network. Addresses of different networks may be equal and are not reachable from each other.
    pub network: Arc<str>,
    /// The address; an IPv4 address is never written as an IPv6 one.
    pub ip: IpAddr,
}

/// A range of addresses within a network, written `network/ip/length`. The network may be empty: `/10.0.0.0/8`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkRange {
    /// The network.
    pub network: Arc<str>,
    /// The addresses; their first one is written.
    pub range: IpNet,
}

/// A service's name in the mesh, written `namespace/hostname`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedHostname {
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Hostname, such as `web.default.svc.cluster.local`.
    pub hostname: Arc<str>,
}

/// A text that names neither.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    /// Not `network/ip`.
    #[error("`{0}` is not of the form network/ip (the network may be empty: /10.0.0.1)")]
    NetworkAddress(String),
    /// Not `network/ip/length`.
    #[error("`{0}` is not of the form network/ip/length (the network may be empty: /10.0.0.0/8)")]
    NetworkRange(String),
    /// Not `namespace/hostname`.
    #[error("`{0}` is not of the form namespace/hostname")]
    NamespacedHostname(String),
}

impl NetworkAddress {
    /// An address in a network.
    pub fn new(network: impl Into<Arc<str>>, ip: IpAddr) -> Self {
        Self {
            network: network.into(),
            ip: ip.to_canonical(),
        }
    }
}

impl NetworkRange {
    /// A range in a network. Bits behind the prefix do not count. A range of IPv4-mapped IPv6 addresses is one of IPv4
    /// addresses, which is what captured sockets report.
    pub fn new(network: impl Into<Arc<str>>, range: IpNet) -> Self {
        let mapped = match range {
            IpNet::V6(v6) => v6.addr().to_ipv4_mapped().and_then(|ip| {
                let length = v6.prefix_len().checked_sub(128 - 32)?;
                IpNet::new(IpAddr::V4(ip), length).ok()
            }),
            IpNet::V4(_) => None,
        };
        Self {
            network: network.into(),
            range: mapped.unwrap_or(range).trunc(),
        }
    }

    /// Whether an address belongs to it.
    pub fn contains(&self, address: &NetworkAddress) -> bool {
        self.network == address.network && self.range.contains(&address.ip)
    }
}

impl FromStr for NetworkAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split_once('/')
            .and_then(|(network, ip)| Some(Self::new(network, ip.parse().ok()?)))
            .ok_or_else(|| InvalidAddress::NetworkAddress(text.to_owned()))
    }
}

impl FromStr for NetworkRange {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split_once('/')
            .and_then(|(network, range)| Some(Self::new(network, range.parse().ok()?)))
            .ok_or_else(|| InvalidAddress::NetworkRange(text.to_owned()))
    }
}

impl FromStr for NamespacedHostname {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, hostname))
                if !namespace.is_empty() && !hostname.is_empty() && !hostname.contains('/') =>
            {
                Ok(Self {
                    namespace: namespace.into(),
                    hostname: hostname.into(),
                })
            }
            _ => Err(InvalidAddress::NamespacedHostname(text.to_owned())),
        }
    }
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

impl fmt::Display for NetworkRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.range)
    }
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

/// Serde as the one text.
macro_rules! as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = Cow::<str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

as_text!(NetworkAddress);
as_text!(NetworkRange);
as_text!(NamespacedHostname);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[rstest::rstest]
    #[case::in_a_network("east/10.0.0.1", Some(("east", "10.0.0.1")))]
    #[case::no_network("/10.0.0.1", Some(("", "10.0.0.1")))]
    #[case::ipv6("/fd00::1", Some(("", "fd00::1")))]
    #[case::mapped("/::ffff:10.0.0.1", Some(("", "10.0.0.1")))]
    #[case::no_slash("10.0.0.1", None)]
    #[case::no_ip("east/", None)]
    #[case::name("default/web.example", None)]
    fn network_address(#[case] text: &str, #[case] parts: Option<(&str, &str)>) {
        let want = parts.map(|(network, ip)| NetworkAddress::new(network, ip.parse().unwrap()));
        assert_eq!(text.parse().ok(), want);
    }

    #[rstest::rstest]
    #[case::in_a_network("east/10.0.0.0/8", Some("east/10.0.0.0/8"))]
    #[case::no_network("/10.0.0.0/8", Some("/10.0.0.0/8"))]
    #[case::bits_behind_the_prefix("/10.1.2.3/8", Some("/10.0.0.0/8"))]
    #[case::everything("/0.0.0.0/0", Some("/0.0.0.0/0"))]
    #[case::ipv6("/fd00::/8", Some("/fd00::/8"))]
    #[case::mapped("/::ffff:10.0.0.0/104", Some("/10.0.0.0/8"))]
    #[case::no_length("/10.0.0.0", None)]
    #[case::long("/10.0.0.0/33", None)]
    #[case::no_slash("10.0.0.0/8", None)]
    fn network_range(#[case] text: &str, #[case] written: Option<&str>) {
        let parsed = text.parse::<NetworkRange>().ok();
        assert_eq!(parsed.map(|range| range.to_string()).as_deref(), written);
    }

    #[rstest::rstest]
    #[case("default/web", true)]
    #[case("/web", false)]
    #[case("default/", false)]
    #[case("web", false)]
    #[case("a/b/c", false)]
    fn namespaced_hostname(#[case] text: &str, #[case] valid: bool) {
        let parsed = text.parse::<NamespacedHostname>();
        assert_eq!(parsed.is_ok(), valid);
        if let Ok(parsed) = parsed {
            assert_eq!(parsed.to_string(), text);
        }
    }
}
