//! Who may talk to a workload: authorization at layer 4.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};

use super::{Snapshot, Workload};
use crate::identity::Identity;

/// A policy. Serialized in the field's LOCAL_XDS form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Policy {
    /// Name.
    pub name: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Which workloads it applies to.
    pub scope: PolicyScope,
    /// What it does to connections that match.
    pub action: Action,
    /// Any rule that matches makes the policy match; without rules it never does.
    pub rules: Vec<Rule>,
    /// It only logs what it would do.
    pub dry_run: bool,
}

/// Clauses that must all match. An empty rule matches.
pub type Rule = Vec<Clause>;
/// Matches of which one suffices. An empty clause matches.
pub type Clause = Vec<Match>;

/// Which workloads a policy applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PolicyScope {
    /// All.
    Global,
    /// Those of its namespace.
    Namespace,
    /// Those that name it.
    WorkloadSelector,
}

/// What a policy does to connections that match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    /// Lets them pass, and makes those pass only that some policy lets pass.
    Allow,
    /// Refuses them.
    Deny,
}

/// Conditions on a connection, all of which must hold. A condition holds if one of its values fits and none of its `not_`
/// values does; without values it holds. Without any values at all the match counts as false.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Match {
    /// Namespace of the peer's identity; the empty text if it has none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<StringMatch>,
    /// See [`namespaces`](Self::namespaces).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_namespaces: Vec<StringMatch>,
    /// The peer's identity without `spiffe://`. A peer without one fits nothing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<StringMatch>,
    /// See [`principals`](Self::principals).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_principals: Vec<StringMatch>,
    /// Namespace and service account of the peer's identity.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// See [`service_accounts`](Self::service_accounts).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// The peer's address.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "networks")]
    pub source_ips: Vec<IpNet>,
    /// See [`source_ips`](Self::source_ips).
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "networks")]
    pub not_source_ips: Vec<IpNet>,
    /// The address the peer connects to.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "networks")]
    pub destination_ips: Vec<IpNet>,
    /// See [`destination_ips`](Self::destination_ips).
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "networks")]
    pub not_destination_ips: Vec<IpNet>,
    /// The port the peer connects to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ports: Vec<u16>,
    /// See [`destination_ports`](Self::destination_ports).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ports: Vec<u16>,
}

/// A condition on a text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StringMatch {
    /// It is this.
    Exact(Arc<str>),
    /// It begins with this.
    Prefix(Arc<str>),
    /// It ends with this.
    Suffix(Arc<str>),
    /// It is not empty. Written `Presence: []`.
    Presence(),
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceAccountMatch {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub service_account: Arc<str>,
}

/// Networks in CIDR form; a bare address stands for itself alone.
fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let texts = Vec::<Cow<'de, str>>::deserialize(deserializer)?;
    texts
        .iter()
        .map(|text| match text.parse::<IpAddr>() {
            Ok(ip) => Ok(IpNet::from(ip)),
            Err(_) => text.parse().map_err(|_| {
                serde::de::Error::custom(format!(
                    "`{text}` is no network: write 10.0.0.0/8 or an address"
                ))
            }),
        })
        .collect()
}

/// A connection, as policies see it.
#[derive(Debug, Clone, Copy)]
pub struct Peer<'a> {
    /// What the peer proved; none for plaintext.
    pub identity: Option<&'a Identity>,
    /// The peer's address.
    pub source: IpAddr,
    /// What it connects to: the workload's address and the port of its application.
    pub destination: SocketAddr,
}

/// Whether a connection may pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Allow,
    /// It may not.
    Deny {
        /// `namespace/name` of the policy that denies it; none if there are ALLOW policies and it matches none of them.
        policy: Option<Arc<str>>,
    },
}

impl Verdict {
    /// Whether it may pass.
    pub fn is_allowed(&self) -> bool {
        *self == Self::Allow
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow => f.write_str("allowed"),
            Self::Deny {
                policy: Some(policy),
            } => write!(f, "denied by policy {policy}"),
            Self::Deny { policy: None } => f.write_str("no ALLOW policy matches"),
        }
    }
}

/// Whether a connection to `workload` may pass. Denied if a DENY policy matches; else allowed if there is no ALLOW policy
/// or one matches; else denied. Policies in dry run are evaluated and logged, and otherwise count as absent.
pub fn authorize(snapshot: &Snapshot, workload: &Workload, peer: &Peer<'_>) -> Verdict {
    let subject = Subject::new(peer);
    let mut allow_policies = false;
    let mut allowed = false;
    for policy in snapshot.policies_for(workload) {
        if policy.dry_run {
            if policy.matches(&subject) {
                tracing::info!(policy = %policy.key(), action = ?policy.action, workload = %workload.uid, ?peer, "dry run: the policy matches");
            }
            continue;
        }
        match policy.action {
            Action::Deny if policy.matches(&subject) => {
                return Verdict::Deny {
                    policy: Some(policy.key().into()),
                };
            }
            Action::Deny => {}
            Action::Allow => {
                allow_policies = true;
                allowed = allowed || policy.matches(&subject);
            }
        }
    }
    if allowed || !allow_policies {
        Verdict::Allow
    } else {
        Verdict::Deny { policy: None }
    }
}

/// A peer with the texts that policies compare, made once per decision.
struct Subject<'a> {
    peer: &'a Peer<'a>,
    principal: Option<String>,
    namespace: &'a str,
}

impl<'a> Subject<'a> {
    fn new(peer: &'a Peer<'a>) -> Self {
        Self {
            peer,
            principal: peer.identity.map(Identity::principal),
            namespace: peer.identity.map_or("", |identity| identity.namespace()),
        }
    }
}

impl Policy {
    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn matches(&self, subject: &Subject<'_>) -> bool {
        let clause_matches =
            |clause: &Clause| clause.is_empty() || clause.iter().any(|m| m.matches(subject));
        self.rules
            .iter()
            .any(|rule| rule.iter().all(clause_matches))
    }
}

impl Match {
    fn matches(&self, subject: &Subject<'_>) -> bool {
        let Peer {
            identity,
            source,
            destination,
        } = *subject.peer;
        let namespace = |m: &StringMatch| m.fits(subject.namespace);
        let principal = |m: &StringMatch| subject.principal.as_ref().is_some_and(|p| m.fits(p));
        let account = |m: &ServiceAccountMatch| identity.is_some_and(|identity| m.fits(identity));
        let from = |network: &IpNet| network.contains(&source);
        let to = |network: &IpNet| network.contains(&destination.ip());
        let port = |port: &u16| *port == destination.port();
        !self.is_empty()
            && holds(&self.namespaces, &self.not_namespaces, namespace)
            && holds(&self.principals, &self.not_principals, principal)
            && holds(&self.service_accounts, &self.not_service_accounts, account)
            && holds(&self.source_ips, &self.not_source_ips, from)
            && holds(&self.destination_ips, &self.not_destination_ips, to)
            && holds(&self.destination_ports, &self.not_destination_ports, port)
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// One of `values` fits, or there are none; and none of `not` does.
fn holds<T>(values: &[T], not: &[T], fits: impl Fn(&T) -> bool) -> bool {
    (values.is_empty() || values.iter().any(&fits)) && !not.iter().any(&fits)
}

impl StringMatch {
    fn fits(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == &**exact,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Presence() => !text.is_empty(),
        }
    }
}

impl ServiceAccountMatch {
    fn fits(&self, identity: &Identity) -> bool {
        self.namespace == *identity.namespace()
            && self.service_account == *identity.service_account()
    }
}

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod rows;
#[cfg(test)]
mod tests;
