//! From messages to the proxy's own objects and back.
//!
//! What a message says wrongly is an [`Unusable`] that names field and value. What it says in numbers that did not exist
//! when this was written counts as the field's default where that is harmless, and is refused where it decides who may
//! talk to whom or whether bytes are encrypted.

mod authorization;
mod service;
mod workload;

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use prost::Message;
use shared_proxy::identity::InvalidIdentity;
use shared_proxy::state::workload::{GatewayAddress, GatewayDestination, PortMap};
use shared_proxy::state::{
    NamespacedHostname, NetworkAddress, NetworkRange, Policy, Service, Workload,
};

use crate::messages::workload as wire;

/// A message that decodes but means nothing usable.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// Not a message of this type.
    #[error("cannot be decoded: {0}")]
    Encoding(#[from] prost::DecodeError),
    /// The resource is of another type than the response says.
    #[error("is of type {0}")]
    Type(String),
    /// A field that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field's value makes no sense.
    #[error("{field} is {value}")]
    Value {
        /// Name of the field.
        field: &'static str,
        /// Its value, and what would do.
        value: String,
    },
    /// Namespace, service account or trust domain cannot be part of an identity.
    #[error(transparent)]
    Identity(#[from] InvalidIdentity),
}

fn value(field: &'static str, value: impl ToString) -> Unusable {
    Unusable::Value {
        field,
        value: value.to_string(),
    }
}

/// An object that has a wire form.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// A workload.
    Workload(Arc<Workload>),
    /// A service.
    Service(Arc<Service>),
    /// A policy.
    Policy(Arc<Policy>),
}

/// Keeps one copy of texts that recur in nearly every object: namespaces, clusters, nodes, trust domains. Without it a
/// large mesh spends more memory on them than on what tells its workloads apart.
#[derive(Debug, Default)]
pub struct Texts {
    known: HashSet<Arc<str>>,
    /// The size at which texts that nobody uses any more are thrown away.
    sweep_at: usize,
}

impl Texts {
    const FIRST_SWEEP: usize = 4096;

    fn get(&mut self, text: &str) -> Arc<str> {
        if text.is_empty() {
            return Arc::default();
        }
        if let Some(known) = self.known.get(text) {
            return Arc::clone(known);
        }
        if self.known.len() >= self.sweep_at.max(Self::FIRST_SWEEP) {
            self.known.retain(|text| Arc::strong_count(text) > 1);
            self.sweep_at = self.known.len() * 2;
        }
        let text: Arc<str> = text.into();
        self.known.insert(Arc::clone(&text));
        text
    }

    fn get_or(&mut self, text: &str, default: &str) -> Arc<str> {
        self.get(if text.is_empty() { default } else { text })
    }
}

/// A workload or a service from the value of an [`ADDRESS_TYPE`](crate::messages::ADDRESS_TYPE) resource.
pub fn address(bytes: bytes::Bytes, texts: &mut Texts) -> Result<Object, Unusable> {
    match wire::Address::decode(bytes)?.kind {
        Some(wire::AddressType::Workload(workload)) => {
            workload::from_wire(*workload, texts).map(|w| Object::Workload(Arc::new(w)))
        }
        Some(wire::AddressType::Service(service)) => {
            service::from_wire(*service, texts).map(|s| Object::Service(Arc::new(s)))
        }
        None => Err(Unusable::Missing("workload or service")),
    }
}

/// A policy from the value of an [`AUTHORIZATION_TYPE`](crate::messages::AUTHORIZATION_TYPE) resource.
pub fn policy(bytes: bytes::Bytes, texts: &mut Texts) -> Result<Object, Unusable> {
    let message = crate::messages::authorization::Authorization::decode(bytes)?;
    authorization::from_wire(message, texts).map(|p| Object::Policy(Arc::new(p)))
}

impl Object {
    /// The name under which the object travels: uid, `namespace/hostname` or `namespace/name`.
    pub fn resource_name(&self) -> String {
        match self {
            Self::Workload(workload) => workload.uid.to_string(),
            Self::Service(service) => service.key().to_string(),
            Self::Policy(policy) => policy.key(),
        }
    }

    /// The object's message. The same object always gives the same bytes.
    pub fn encode(&self) -> Vec<u8> {
        let address = |kind| wire::Address { kind: Some(kind) }.encode_to_vec();
        match self {
            Self::Workload(object) => address(wire::AddressType::Workload(Box::new(
                workload::to_wire(object),
            ))),
            Self::Service(object) => address(wire::AddressType::Service(Box::new(
                service::to_wire(object),
            ))),
            Self::Policy(object) => authorization::to_wire(object).encode_to_vec(),
        }
    }
}

fn ip(field: &'static str, bytes: &[u8]) -> Result<IpAddr, Unusable> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::from(four));
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(sixteen) => Ok(IpAddr::from(sixteen).to_canonical()),
        Err(_) => Err(value(
            field,
            format_args!("{} bytes long, not 4 or 16", bytes.len()),
        )),
    }
}

fn ip_bytes(ip: IpAddr) -> bytes::Bytes {
    match ip {
        IpAddr::V4(ip) => bytes::Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => bytes::Bytes::copy_from_slice(&ip.octets()),
    }
}

fn port(field: &'static str, port: u32) -> Result<u16, Unusable> {
    u16::try_from(port).map_err(|_| value(field, format_args!("{port}, not a port")))
}

fn ports(ports: &[wire::Port]) -> Result<PortMap, Unusable> {
    ports
        .iter()
        .map(|p| {
            Ok((
                port("service_port", p.service_port)?,
                port("target_port", p.target_port)?,
            ))
        })
        .collect()
}

fn wire_ports(ports: &PortMap) -> Vec<wire::Port> {
    ports
        .iter()
        .map(|(service, target)| wire::Port {
            service_port: u32::from(*service),
            target_port: u32::from(*target),
        })
        .collect()
}

fn network_address(
    field: &'static str,
    address: &wire::NetworkAddress,
    texts: &mut Texts,
) -> Result<NetworkAddress, Unusable> {
    Ok(NetworkAddress::new(
        texts.get(&address.network),
        ip(field, &address.address)?,
    ))
}

/// The range that an address stands for, if it is not for itself alone.
fn network_range(
    field: &'static str,
    address: &wire::NetworkAddress,
    texts: &mut Texts,
) -> Result<Option<NetworkRange>, Unusable> {
    let all_bits = address.address.len() * 8;
    let Some(length) = address.length.filter(|length| *length as usize != all_bits) else {
        return Ok(None);
    };
    // Not canonical: the length belongs to the bytes as they came.
    let ip = match <[u8; 16]>::try_from(&*address.address) {
        Ok(sixteen) => IpAddr::from(sixteen),
        Err(_) => ip(field, &address.address)?,
    };
    let range = u8::try_from(length)
        .ok()
        .and_then(|length| IpNet::new(ip, length).ok())
        .ok_or_else(|| value(field, format_args!("{ip}/{length}, too long")))?;
    Ok(Some(NetworkRange::new(texts.get(&address.network), range)))
}

fn wire_network_range(range: &NetworkRange) -> wire::NetworkAddress {
    wire::NetworkAddress {
        network: range.network.to_string(),
        address: ip_bytes(range.range.addr()),
        length: Some(u32::from(range.range.prefix_len())),
    }
}

fn wire_network_address(address: &NetworkAddress) -> wire::NetworkAddress {
    wire::NetworkAddress {
        network: address.network.to_string(),
        address: ip_bytes(address.ip),
        length: None,
    }
}

fn hostname(
    field: &'static str,
    key: &str,
    texts: &mut Texts,
) -> Result<NamespacedHostname, Unusable> {
    let parsed: NamespacedHostname = key.parse().map_err(|error| value(field, error))?;
    Ok(NamespacedHostname {
        namespace: texts.get(&parsed.namespace),
        hostname: texts.get(&parsed.hostname),
    })
}

fn gateway(
    field: &'static str,
    gateway: wire::GatewayAddress,
    texts: &mut Texts,
) -> Result<GatewayAddress, Unusable> {
    let destination = match gateway.destination {
        Some(wire::Destination::Address(address)) => {
            GatewayDestination::Address(network_address(field, &address, texts)?)
        }
        Some(wire::Destination::Hostname(name)) => GatewayDestination::Hostname(hostname(
            field,
            &format!("{}/{}", name.namespace, name.hostname),
            texts,
        )?),
        None => return Err(Unusable::Missing(field)),
    };
    Ok(GatewayAddress {
        destination,
        hbone_mtls_port: match gateway.hbone_mtls_port {
            0 => shared_proxy::capture::HBONE_PORT,
            other => port(field, other)?,
        },
    })
}

fn wire_gateway(gateway: &GatewayAddress) -> wire::GatewayAddress {
    let destination = match &gateway.destination {
        GatewayDestination::Address(address) => {
            wire::Destination::Address(wire_network_address(address))
        }
        GatewayDestination::Hostname(name) => {
            wire::Destination::Hostname(wire::NamespacedHostname {
                namespace: name.namespace.to_string(),
                hostname: name.hostname.to_string(),
            })
        }
    };
    wire::GatewayAddress {
        destination: Some(destination),
        hbone_mtls_port: u32::from(gateway.hbone_mtls_port),
    }
}

#[cfg(test)]
mod tests;
