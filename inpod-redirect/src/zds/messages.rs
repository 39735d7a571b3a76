//! The messages of package `istio.workload.zds` (proto3), and our extension (fields from 1000).
//!
//! `ZdsHello` travels bare, as the proxy's first packet. Everything from agent to proxy is a [`WorkloadRequest`],
//! everything later from proxy to agent a [`WorkloadResponse`].

use prost::{Enumeration, Message, Oneof};

/// Version of the extension that this implementation speaks. Version 1 has all but [`HoldWorkload`] and
/// [`ReleaseWorkload`].
pub const EXTENSION_VERSION: u32 = 2;

/// Protocol version in a [`ZdsHello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Version {
    /// Not a version.
    NotUsed = 0,
    /// The only version there is.
    V1 = 1,
}

/// First packet of the proxy.
#[derive(Clone, PartialEq, Message)]
pub struct ZdsHello {
    /// Protocol version.
    #[prost(enumeration = "Version", tag = "1")]
    pub version: i32,
    /// Extension: highest version that the proxy speaks; 0 means none.
    #[prost(uint32, tag = "1000")]
    pub extension_version: u32,
}

/// What a pod is, as far as its identity needs it.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct WorkloadInfo {
    /// Pod name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Pod namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Service account.
    #[prost(string, tag = "3")]
    pub service_account: String,
}

/// How a pod is captured (extension).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum CaptureMode {
    /// Not told, as by agents without the extension: in the pod.
    Unspecified = 0,
    /// On the node.
    Node = 1,
    /// In the pod.
    Inpod = 2,
}

/// Serve this pod.
#[derive(Clone, PartialEq, Message)]
pub struct AddWorkload {
    /// Pod UID.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// Absent in the first releases of the protocol.
    #[prost(message, optional, tag = "2")]
    pub workload_info: Option<WorkloadInfo>,
    /// Extension: how the pod is captured. With `Node` no descriptor is attached.
    #[prost(enumeration = "CaptureMode", tag = "1000")]
    pub capture_mode: i32,
    /// Extension: the pod's addresses, 4 or 16 bytes each.
    #[prost(bytes = "vec", repeated, tag = "1001")]
    pub addresses: Vec<Vec<u8>>,
    /// Extension: containers or virtual machines inside the pod are captured with it; what it sends may come from addresses
    /// of theirs.
    #[prost(bool, tag = "1002")]
    pub guests: bool,
}

/// This pod is wanted but its namespace is not at hand: keep it if it runs. Only before [`SnapshotSent`].
#[derive(Clone, PartialEq, Message)]
pub struct KeepWorkload {
    /// Pod UID.
    #[prost(string, tag = "1")]
    pub uid: String,
}

/// Stop serving this pod.
#[derive(Clone, PartialEq, Message)]
pub struct DelWorkload {
    /// Pod UID. The field number is 2, not 1.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// Extension: how long the pod's connections may drain, in milliseconds; 0 cuts them.
    #[prost(uint64, optional, tag = "1000")]
    pub drain_millis: Option<u64>,
}

/// Every pod of the node has been sent: stop what was not named.
#[derive(Clone, PartialEq, Message)]
pub struct SnapshotSent {}

/// Answer to a request.
#[derive(Clone, PartialEq, Message)]
pub struct Ack {
    /// Empty means success.
    #[prost(string, tag = "1")]
    pub error: String,
    /// Extension, of the answer to [`ReleaseWorkload`]: what the hold has cost.
    #[prost(message, optional, tag = "1000")]
    pub delays: Option<DelayReport>,
}

/// Extension: connections that began while their pod was held.
#[derive(Clone, PartialEq, Message)]
pub struct DelayReport {
    /// How many.
    #[prost(uint64, tag = "1")]
    pub count: u64,
    /// Median of their waits, in microseconds.
    #[prost(uint64, tag = "2")]
    pub median_micros: u64,
    /// The longest wait, in microseconds.
    #[prost(uint64, tag = "3")]
    pub longest_micros: u64,
    /// The first ones of them, as many as fit.
    #[prost(message, repeated, tag = "4")]
    pub connections: Vec<DelayedConnection>,
}

/// Extension: one of them.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct DelayedConnection {
    /// Address of the client, 4 or 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub client: Vec<u8>,
    /// Its port; 0 where it is not known.
    #[prost(uint32, tag = "2")]
    pub client_port: u32,
    /// Address that it was opened to, 4 or 16 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub destination: Vec<u8>,
    /// And the port.
    #[prost(uint32, tag = "4")]
    pub destination_port: u32,
    /// How long it waited, in microseconds.
    #[prost(uint64, tag = "5")]
    pub waited_micros: u64,
}

/// Extension: send the descriptor of your own network namespace.
#[derive(Clone, PartialEq, Message)]
pub struct GetNetns {}

/// Extension: how node-captured pods are served on this node.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ConfigureNode {
    /// `hybrid` or `tunnel`.
    #[prost(string, tag = "1")]
    pub flow: String,
    /// `hbone` or `direct`.
    #[prost(string, tag = "2")]
    pub same_node: String,
    /// Addresses that are local to the node, 4 or 16 bytes each: the proxy never speaks with them.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub node_addresses: Vec<Vec<u8>>,
}

/// Extension: report your workloads.
#[derive(Clone, PartialEq, Message)]
pub struct GetState {}

/// Extension: hold this pod: none of its connections begins until it is released. A pod that is held may be added with
/// another capture, which it has beside the one that it had until its release says which one stays.
#[derive(Clone, PartialEq, Message)]
pub struct HoldWorkload {
    /// Pod UID.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// The pod is released by itself after so many milliseconds, whatever has become of the agent.
    #[prost(uint64, tag = "2")]
    pub within_millis: u64,
}

/// Extension: connections of this pod go on, by the capture that was added while it was held, if one was.
#[derive(Clone, PartialEq, Message)]
pub struct ReleaseWorkload {
    /// Pod UID.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// The capture that was added is taken back, and the pod keeps the one that it had.
    #[prost(bool, tag = "2")]
    pub stays: bool,
    /// How long connections may go on that came by the capture that goes, in milliseconds.
    #[prost(uint64, tag = "3")]
    pub drain_millis: u64,
}

/// Extension: the descriptor is attached to this packet.
#[derive(Clone, PartialEq, Message)]
pub struct NetnsReply {}

/// Extension: one workload as the proxy knows it.
#[derive(Clone, PartialEq, Message)]
pub struct WorkloadState {
    /// Pod UID.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// How it is captured.
    #[prost(enumeration = "CaptureMode", tag = "2")]
    pub capture_mode: i32,
    /// Whether it is served; otherwise it is pending and `error` says why.
    #[prost(bool, tag = "3")]
    pub up: bool,
    /// Open connections.
    #[prost(uint64, tag = "4")]
    pub connections: u64,
    /// Why it is pending.
    #[prost(string, tag = "5")]
    pub error: String,
}

/// Extension: what the proxy serves.
#[derive(Clone, PartialEq, Message)]
pub struct StateReply {
    /// As many workloads as fit into a packet, by UID.
    #[prost(message, repeated, tag = "1")]
    pub workloads: Vec<WorkloadState>,
    /// How many there are.
    #[prost(uint64, tag = "2")]
    pub total: u64,
}

/// Agent to proxy.
#[derive(Clone, PartialEq, Message)]
pub struct WorkloadRequest {
    /// What is asked. None when the message holds only fields that we do not know.
    #[prost(oneof = "Request", tags = "1, 2, 3, 5, 1000, 1001, 1002, 1003, 1004")]
    pub payload: Option<Request>,
}

/// Payload of a [`WorkloadRequest`]. Number 4 is unused.
#[derive(Clone, PartialEq, Oneof)]
pub enum Request {
    /// Serve a pod; one descriptor unless the pod is node-captured.
    #[prost(message, tag = "1")]
    Add(AddWorkload),
    /// Stop serving a pod.
    #[prost(message, tag = "2")]
    Del(DelWorkload),
    /// The snapshot is complete.
    #[prost(message, tag = "3")]
    SnapshotSent(SnapshotSent),
    /// Keep a pod whose namespace the agent does not have.
    #[prost(message, tag = "5")]
    Keep(KeepWorkload),
    /// Extension: your namespace, please. As the first request it accepts the extension.
    #[prost(message, tag = "1000")]
    GetNetns(GetNetns),
    /// Extension: parameters of the node capture.
    #[prost(message, tag = "1001")]
    ConfigureNode(ConfigureNode),
    /// Extension: what do you serve?
    #[prost(message, tag = "1002")]
    GetState(GetState),
    /// Extension: begin nothing for a pod.
    #[prost(message, tag = "1003")]
    Hold(HoldWorkload),
    /// Extension: go on.
    #[prost(message, tag = "1004")]
    Release(ReleaseWorkload),
}

/// Proxy to agent.
#[derive(Clone, PartialEq, Message)]
pub struct WorkloadResponse {
    /// The answer.
    #[prost(oneof = "Response", tags = "1, 1000, 1002")]
    pub payload: Option<Response>,
}

/// Payload of a [`WorkloadResponse`].
#[derive(Clone, PartialEq, Oneof)]
pub enum Response {
    /// Done, or an error.
    #[prost(message, tag = "1")]
    Ack(Ack),
    /// Extension: the answer to [`Request::GetNetns`], with exactly one descriptor.
    #[prost(message, tag = "1000")]
    Netns(NetnsReply),
    /// Extension: the answer to [`Request::GetState`].
    #[prost(message, tag = "1002")]
    State(StateReply),
}

impl From<Request> for WorkloadRequest {
    fn from(request: Request) -> Self {
        Self {
            payload: Some(request),
        }
    }
}

impl From<Response> for WorkloadResponse {
    fn from(response: Response) -> Self {
        Self {
            payload: Some(response),
        }
    }
}

impl WorkloadResponse {
    /// An acknowledgement; `error` is empty for success.
    pub fn ack(error: impl Into<String>) -> Self {
        Response::Ack(Ack {
            error: error.into(),
            delays: None,
        })
        .into()
    }
}

/// Writes addresses as 4 or 16 bytes each.
pub fn encode_addresses(addresses: &[std::net::IpAddr]) -> Vec<Vec<u8>> {
    addresses
        .iter()
        .map(|address| match address {
            std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
            std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
        })
        .collect()
}

/// Reads addresses of 4 or 16 bytes; the error is the length of the one that is neither.
pub fn decode_addresses(addresses: &[Vec<u8>]) -> Result<Vec<std::net::IpAddr>, usize> {
    addresses
        .iter()
        .map(|bytes| {
            if let Ok(v4) = <[u8; 4]>::try_from(bytes.as_slice()) {
                Ok(v4.into())
            } else if let Ok(v6) = <[u8; 16]>::try_from(bytes.as_slice()) {
                Ok(v6.into())
            } else {
                Err(bytes.len())
            }
        })
        .collect()
}
