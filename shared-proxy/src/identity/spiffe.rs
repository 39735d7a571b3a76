//! SPIFFE IDs of Kubernetes workloads: `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Trust domain of a workload that names none.
pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

const SCHEME: &str = "spiffe://";
/// Longest SPIFFE ID, in bytes (SPIFFE-ID standard, section 2.3).
const MAX_ID: usize = 2048;
/// Longest trust domain, in bytes (SPIFFE-ID standard, section 2.1).
const MAX_TRUST_DOMAIN: usize = 255;

/// A workload's identity. Always valid: it can only be made of parts that form a SPIFFE ID.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    trust_domain: Arc<str>,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

/// Why a text, or three parts, are not an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// Not of the form that Kubernetes workloads have.
    #[error("`{0}` is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
    Form(String),
    /// A trust domain is made of lower-case letters, digits, dot, dash and underscore.
    #[error(
        "trust domain `{0}`: 1 to 255 lower-case letters, digits, dots, dashes and underscores are allowed"
    )]
    TrustDomain(String),
    /// A path segment is made of letters, digits, dot, dash and underscore, and is neither `.` nor `..`.
    #[error(
        "{part} `{value}`: it must not be empty, `.` or `..`, and only letters, digits, dots, dashes and underscores are allowed"
    )]
    Segment {
        /// `namespace` or `service account`.
        part: &'static str,
        /// What stood there.
        value: String,
    },
    /// Longer than SPIFFE allows.
    #[error("a SPIFFE ID of {0} bytes: 2048 are allowed")]
    Length(usize),
}

impl Identity {
    /// Makes an identity of its three parts. Fails unless they form a valid SPIFFE ID, so that no part can smuggle in a
    /// slash and pass for another identity.
    pub fn new(
        trust_domain: impl Into<Arc<str>>,
        namespace: impl Into<Arc<str>>,
        service_account: impl Into<Arc<str>>,
    ) -> Result<Self, InvalidIdentity> {
        let identity = Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        };
        check_trust_domain(&identity.trust_domain)?;
        check_segment("namespace", &identity.namespace)?;
        check_segment("service account", &identity.service_account)?;
        let length = identity.to_string().len();
        if length > MAX_ID {
            return Err(InvalidIdentity::Length(length));
        }
        Ok(identity)
    }

    /// The trust domain: who vouches for the identity.
    pub fn trust_domain(&self) -> &Arc<str> {
        &self.trust_domain
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &Arc<str> {
        &self.namespace
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &Arc<str> {
        &self.service_account
    }

    /// The identity without `spiffe://`: the form in which policies name principals.
    pub fn principal(&self) -> String {
        format!(
            "{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

/// Whether a text can be a trust domain.
pub(crate) fn check_trust_domain(trust_domain: &str) -> Result<(), InvalidIdentity> {
    let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || b".-_".contains(&c);
    if (1..=MAX_TRUST_DOMAIN).contains(&trust_domain.len()) && trust_domain.bytes().all(allowed) {
        Ok(())
    } else {
        Err(InvalidIdentity::TrustDomain(trust_domain.to_owned()))
    }
}

fn check_segment(part: &'static str, value: &str) -> Result<(), InvalidIdentity> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b".-_".contains(&c);
    if !value.is_empty() && value != "." && value != ".." && value.bytes().all(allowed) {
        Ok(())
    } else {
        Err(InvalidIdentity::Segment {
            part,
            value: value.to_owned(),
        })
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || InvalidIdentity::Form(text.to_owned());
        let mut parts = text.strip_prefix(SCHEME).ok_or_else(form)?.split('/');
        let mut next = || parts.next();
        match (next(), next(), next(), next(), next(), next()) {
            (Some(trust_domain), Some("ns"), Some(namespace), Some("sa"), Some(account), None) => {
                Self::new(trust_domain, namespace, account)
            }
            _ => Err(form()),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{SCHEME}{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Identity {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Identity {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use proptest::prelude::*;

    #[rstest::rstest]
    #[case::scheme("https://cluster.local/ns/a/sa/b")]
    #[case::upper_case_scheme("SPIFFE://cluster.local/ns/a/sa/b")]
    #[case::no_trust_domain("spiffe:///ns/a/sa/b")]
    #[case::upper_case_trust_domain("spiffe://Cluster.local/ns/a/sa/b")]
    #[case::port("spiffe://cluster.local:80/ns/a/sa/b")]
    #[case::user("spiffe://me@cluster.local/ns/a/sa/b")]
    #[case::no_path("spiffe://cluster.local")]
    #[case::other_path("spiffe://cluster.local/workload/a")]
    #[case::swapped("spiffe://cluster.local/sa/a/ns/b")]
    #[case::empty_namespace("spiffe://cluster.local/ns//sa/b")]
    #[case::dots("spiffe://cluster.local/ns/../sa/b")]
    #[case::percent("spiffe://cluster.local/ns/a%2Fb/sa/b")]
    #[case::trailing_slash("spiffe://cluster.local/ns/a/sa/b/")]
    #[case::query("spiffe://cluster.local/ns/a/sa/b?x=y")]
    #[case::fragment("spiffe://cluster.local/ns/a/sa/b#x")]
    #[case::space(" spiffe://cluster.local/ns/a/sa/b")]
    fn refuses_what_is_not_a_workload_identity(#[case] text: &str) {
        assert!(text.parse::<Identity>().is_err(), "{text}");
    }

    #[test]
    fn a_part_cannot_pass_for_two() {
        assert!(Identity::new("cluster.local", "a/sa/b", "c").is_err());
    }

    #[test]
    fn refuses_more_than_2048_bytes() {
        let fits = 2048 - "spiffe://td/ns/n/sa/".len();
        assert!(Identity::new("td", "n", "x".repeat(fits)).is_ok());
        assert_eq!(
            Identity::new("td", "n", "x".repeat(fits + 1)),
            Err(InvalidIdentity::Length(2049))
        );
    }

    proptest! {
        #[test]
        fn text_and_parts_are_the_same(td in "[a-z0-9._-]{1,20}", ns in "[a-zA-Z0-9_-]{1,20}", sa in "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,20}") {
            let identity = Identity::new(td, ns, sa).unwrap();
            prop_assert_eq!(identity.to_string().parse::<Identity>().unwrap(), identity.clone());
            prop_assert_eq!(format!("spiffe://{}", identity.principal()), identity.to_string());
        }

        #[test]
        fn parsing_never_panics_and_is_exact(text in "(spiffe://)?[ -~]{0,40}(/ns/)?.{0,20}(/sa/)?.{0,20}") {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), text);
            }
        }
    }
}
