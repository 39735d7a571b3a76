//! Package `istio.security`: policies.

use prost::{Enumeration, Message, Oneof};

/// A policy.
#[derive(Clone, PartialEq, Message)]
pub struct Authorization {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Kubernetes namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Which workloads it applies to.
    #[prost(enumeration = "Scope", tag = "3")]
    pub scope: i32,
    /// What it does.
    #[prost(enumeration = "Action", tag = "4")]
    pub action: i32,
    /// Alternatives.
    #[prost(message, repeated, tag = "5")]
    pub rules: Vec<Rule>,
    /// It only logs.
    #[prost(bool, tag = "6")]
    pub dry_run: bool,
}

/// Which workloads a policy applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Scope {
    /// All.
    Global = 0,
    /// Those of its namespace.
    Namespace = 1,
    /// Those that name it.
    WorkloadSelector = 2,
}

/// What a policy does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Action {
    /// Lets pass.
    Allow = 0,
    /// Refuses.
    Deny = 1,
}

/// Clauses that must all match.
#[derive(Clone, PartialEq, Message)]
pub struct Rule {
    /// The clauses.
    #[prost(message, repeated, tag = "1")]
    pub clauses: Vec<Clause>,
}

/// Matches of which one suffices.
#[derive(Clone, PartialEq, Message)]
pub struct Clause {
    /// The matches.
    #[prost(message, repeated, tag = "2")]
    pub matches: Vec<Match>,
}

/// Conditions that must all hold.
#[derive(Clone, PartialEq, Message)]
pub struct Match {
    /// Namespace of the peer.
    #[prost(message, repeated, tag = "1")]
    pub namespaces: Vec<StringMatch>,
    /// None of these.
    #[prost(message, repeated, tag = "2")]
    pub not_namespaces: Vec<StringMatch>,
    /// Identity of the peer.
    #[prost(message, repeated, tag = "3")]
    pub principals: Vec<StringMatch>,
    /// None of these.
    #[prost(message, repeated, tag = "4")]
    pub not_principals: Vec<StringMatch>,
    /// Address of the peer.
    #[prost(message, repeated, tag = "5")]
    pub source_ips: Vec<Network>,
    /// None of these.
    #[prost(message, repeated, tag = "6")]
    pub not_source_ips: Vec<Network>,
    /// Address that the peer connects to.
    #[prost(message, repeated, tag = "7")]
    pub destination_ips: Vec<Network>,
    /// None of these.
    #[prost(message, repeated, tag = "8")]
    pub not_destination_ips: Vec<Network>,
    /// Port that the peer connects to.
    #[prost(uint32, repeated, tag = "9")]
    pub destination_ports: Vec<u32>,
    /// None of these.
    #[prost(uint32, repeated, tag = "10")]
    pub not_destination_ports: Vec<u32>,
    /// Service account of the peer.
    #[prost(message, repeated, tag = "11")]
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// None of these.
    #[prost(message, repeated, tag = "12")]
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// Conditions that somebody added. None is known here.
    #[prost(message, repeated, tag = "13")]
    pub extensions: Vec<Extension>,
}

/// Something that somebody added to a message.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Extension {
    /// What it is.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// A network (the message's name is `Address`).
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Network {
    /// 4 or 16 bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub address: bytes::Bytes,
    /// Length of the prefix in bits.
    #[prost(uint32, tag = "2")]
    pub length: u32,
}

/// A service account.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct ServiceAccountMatch {
    /// Its namespace.
    #[prost(string, tag = "1")]
    pub namespace: String,
    /// Its name.
    #[prost(string, tag = "2")]
    pub service_account: String,
}

/// A condition on a text.
#[derive(Clone, PartialEq, Message)]
pub struct StringMatch {
    /// Which.
    #[prost(oneof = "MatchType", tags = "1, 2, 3, 4")]
    pub match_type: Option<MatchType>,
}

/// The conditions on a text.
#[derive(Clone, PartialEq, Oneof)]
pub enum MatchType {
    /// It is this.
    #[prost(string, tag = "1")]
    Exact(String),
    /// It begins with this.
    #[prost(string, tag = "2")]
    Prefix(String),
    /// It ends with this.
    #[prost(string, tag = "3")]
    Suffix(String),
    /// It is not empty.
    #[prost(message, tag = "4")]
    Presence(()),
}
