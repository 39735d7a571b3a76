//! Incremental discovery: package `envoy.service.discovery.v3`, with what it uses of `envoy.config.core.v3`,
//! `google.protobuf` and `google.rpc`.

use std::collections::{BTreeMap, HashMap};

use prost::{Message, Oneof};

use super::Any;

/// What a client wants, and how it took the last answer.
#[derive(Clone, PartialEq, Message)]
pub struct DeltaDiscoveryRequest {
    /// Who asks; in the first request of a stream.
    #[prost(message, optional, tag = "1")]
    pub node: Option<Node>,
    /// Type of the resources that this is about.
    #[prost(string, tag = "2")]
    pub type_url: String,
    /// Names to follow from here on. In the first request of a type none means all, and `*` means all at any time.
    #[prost(string, repeated, tag = "3")]
    pub resource_names_subscribe: Vec<String>,
    /// Names not to follow any more.
    #[prost(string, repeated, tag = "4")]
    pub resource_names_unsubscribe: Vec<String>,
    /// Versions of what the client holds from an earlier stream, by name; in the first request of a type.
    #[prost(map = "string, string", tag = "5")]
    pub initial_resource_versions: HashMap<String, String>,
    /// Nonce of the response that this acknowledges or refuses.
    #[prost(string, tag = "6")]
    pub response_nonce: String,
    /// The response is refused, wholly or in part, and why.
    #[prost(message, optional, tag = "7")]
    pub error_detail: Option<Status>,
}

/// What has changed.
#[derive(Clone, PartialEq, Message)]
pub struct DeltaDiscoveryResponse {
    /// Version of the server's whole state, for people.
    #[prost(string, tag = "1")]
    pub system_version_info: String,
    /// Resources that are new or changed.
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Resource>,
    /// Type of all of them.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// Repeated by the client's acknowledgement.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// Names of resources that are gone, or that were asked for and do not exist.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
}

/// A resource.
#[derive(Clone, PartialEq, Message)]
pub struct Resource {
    /// Differs whenever the content differs.
    #[prost(string, tag = "1")]
    pub version: String,
    /// The content.
    #[prost(message, optional, tag = "2")]
    pub resource: Option<Any>,
    /// Name, unique within the type.
    #[prost(string, tag = "3")]
    pub name: String,
    /// Other names that it answers to.
    #[prost(string, repeated, tag = "4")]
    pub aliases: Vec<String>,
}

/// Who asks.
#[derive(Clone, PartialEq, Message)]
pub struct Node {
    /// `ztunnel~ip~pod.namespace~namespace.svc.cluster.local`.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Service cluster; unused by the mesh.
    #[prost(string, tag = "2")]
    pub cluster: String,
    /// Facts about it.
    #[prost(message, optional, tag = "3")]
    pub metadata: Option<Struct>,
}

/// Package `google.rpc`: why something failed.
#[derive(Clone, PartialEq, Message)]
pub struct Status {
    /// A gRPC code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// Package `google.protobuf`: a JSON object.
#[derive(Clone, PartialEq, Message)]
pub struct Struct {
    /// Its members.
    #[prost(btree_map = "string, message", tag = "1")]
    pub fields: BTreeMap<String, Value>,
}

/// Package `google.protobuf`: a JSON value.
#[derive(Clone, PartialEq, Message)]
pub struct Value {
    /// Which.
    #[prost(oneof = "Kind", tags = "1, 2, 3, 4, 5, 6")]
    pub kind: Option<Kind>,
}

/// The kinds of JSON value.
#[derive(Clone, PartialEq, Oneof)]
pub enum Kind {
    /// `null`; always 0.
    #[prost(int32, tag = "1")]
    Null(i32),
    /// A number.
    #[prost(double, tag = "2")]
    Number(f64),
    /// A text.
    #[prost(string, tag = "3")]
    Text(String),
    /// A truth value.
    #[prost(bool, tag = "4")]
    Bool(bool),
    /// An object.
    #[prost(message, tag = "5")]
    Object(Struct),
    /// A list.
    #[prost(message, tag = "6")]
    List(ListValue),
}

/// Package `google.protobuf`: a JSON list.
#[derive(Clone, PartialEq, Message)]
pub struct ListValue {
    /// Its values.
    #[prost(message, repeated, tag = "1")]
    pub values: Vec<Value>,
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self {
            kind: Some(Kind::Text(text)),
        }
    }
}

impl From<serde_json::Value> for Value {
    fn from(value: serde_json::Value) -> Self {
        use serde_json::Value as Json;
        let kind = match value {
            Json::Null => Kind::Null(0),
            Json::Bool(value) => Kind::Bool(value),
            // Every JSON number has a nearest one here.
            Json::Number(value) => Kind::Number(value.as_f64().unwrap_or(f64::NAN)),
            Json::String(text) => Kind::Text(text),
            Json::Array(values) => Kind::List(ListValue {
                values: values.into_iter().map(Self::from).collect(),
            }),
            Json::Object(members) => Kind::Object(Struct {
                fields: members
                    .into_iter()
                    .map(|(name, value)| (name, value.into()))
                    .collect(),
            }),
        };
        Self { kind: Some(kind) }
    }
}

impl Struct {
    /// The member `name`, if it is a text.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.fields.get(name)?.kind.as_ref()? {
            Kind::Text(text) => Some(text),
            _ => None,
        }
    }
}
