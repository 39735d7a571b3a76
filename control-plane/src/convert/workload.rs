//! Workloads.

use shared_proxy::identity::DEFAULT_TRUST_DOMAIN;
use shared_proxy::state::Workload;
use shared_proxy::state::workload::{
    ApplicationProtocol, ApplicationTunnel, Health, Locality, NetworkMode, Protocol,
};

use super::{
    Texts, Unusable, gateway, hostname, ip, ip_bytes, port, ports, value, wire_gateway, wire_ports,
};
use crate::messages::workload as wire;

const DEFAULT_SERVICE_ACCOUNT: &str = "default";
const DEFAULT_CLUSTER: &str = "Kubernetes";

/// Names of the kinds of controllers, by their numbers on the wire.
const TYPES: [(wire::WorkloadType, &str); 4] = [
    (wire::WorkloadType::Deployment, "deployment"),
    (wire::WorkloadType::Cronjob, "cronjob"),
    (wire::WorkloadType::Pod, "pod"),
    (wire::WorkloadType::Job, "job"),
];

pub(super) fn from_wire(message: wire::Workload, texts: &mut Texts) -> Result<Workload, Unusable> {
    if message.uid.is_empty() {
        return Err(Unusable::Missing("uid"));
    }
    let protocol = match wire::TunnelProtocol::try_from(message.tunnel_protocol) {
        Ok(wire::TunnelProtocol::None) => Protocol::Tcp,
        Ok(wire::TunnelProtocol::Hbone) => Protocol::Hbone,
        Ok(wire::TunnelProtocol::LegacyIstioMtls) | Err(_) => {
            return Err(value(
                "tunnel_protocol",
                format_args!("{}, neither NONE nor HBONE", message.tunnel_protocol),
            ));
        }
    };
    let workload_type = TYPES
        .iter()
        .find(|(number, _)| *number as i32 == message.workload_type)
        .map_or(TYPES[0].1, |(_, name)| name);
    let mut services = std::collections::BTreeMap::new();
    for (key, list) in &message.services {
        services.insert(hostname("services", key, texts)?, ports(&list.ports)?);
    }
    let workload = Workload {
        uid: message.uid.as_str().into(),
        name: message.name.as_str().into(),
        namespace: texts.get(&message.namespace),
        service_account: texts.get_or(&message.service_account, DEFAULT_SERVICE_ACCOUNT),
        trust_domain: texts.get_or(&message.trust_domain, DEFAULT_TRUST_DOMAIN),
        addresses: message
            .addresses
            .iter()
            .map(|bytes| ip("addresses", bytes))
            .collect::<Result<_, _>>()?,
        network: texts.get(&message.network),
        protocol,
        network_mode: match wire::NetworkMode::try_from(message.network_mode) {
            Ok(wire::NetworkMode::HostNetwork) => NetworkMode::HostNetwork,
            Ok(wire::NetworkMode::Standard) | Err(_) => NetworkMode::Standard,
        },
        node: texts.get(&message.node),
        cluster_id: texts.get_or(&message.cluster_id, DEFAULT_CLUSTER),
        hostname: texts.get(&message.hostname),
        canonical_name: texts.get(&message.canonical_name),
        canonical_revision: texts.get(&message.canonical_revision),
        workload_name: texts.get(&message.workload_name),
        workload_type: texts.get(workload_type),
        native_tunnel: message.native_tunnel,
        waypoint: message
            .waypoint
            .map(|waypoint| gateway("waypoint", waypoint, texts))
            .transpose()?,
        network_gateway: message
            .network_gateway
            .map(|waypoint| gateway("network_gateway", waypoint, texts))
            .transpose()?,
        application_tunnel: message
            .application_tunnel
            .map(application_tunnel)
            .transpose()?,
        services,
        authorization_policies: message
            .authorization_policies
            .iter()
            .map(|name| texts.get(name))
            .collect(),
        status: match wire::WorkloadStatus::try_from(message.status) {
            Ok(wire::WorkloadStatus::Healthy) => Health::Healthy,
            Ok(wire::WorkloadStatus::Unhealthy) | Err(_) => Health::Unhealthy,
        },
        capacity: message.capacity.unwrap_or(1),
        locality: message
            .locality
            .map_or_else(Locality::default, |locality| Locality {
                region: texts.get(&locality.region),
                zone: texts.get(&locality.zone),
                subzone: texts.get(&locality.subzone),
            }),
    };
    workload.identity()?;
    Ok(workload)
}

fn application_tunnel(tunnel: wire::ApplicationTunnel) -> Result<ApplicationTunnel, Unusable> {
    Ok(ApplicationTunnel {
        protocol: match wire::ApplicationProtocol::try_from(tunnel.protocol) {
            Ok(wire::ApplicationProtocol::None) => ApplicationProtocol::None,
            Ok(wire::ApplicationProtocol::Proxy) => ApplicationProtocol::Proxy,
            Err(_) => {
                return Err(value(
                    "application_tunnel",
                    format_args!("{}, neither NONE nor PROXY", tunnel.protocol),
                ));
            }
        },
        port: match tunnel.port {
            0 => None,
            other => Some(port("application_tunnel", other)?),
        },
    })
}

pub(super) fn to_wire(workload: &Workload) -> wire::Workload {
    let locality = &workload.locality;
    wire::Workload {
        name: workload.name.to_string(),
        namespace: workload.namespace.to_string(),
        addresses: workload.addresses.iter().map(|ip| ip_bytes(*ip)).collect(),
        network: workload.network.to_string(),
        tunnel_protocol: match workload.protocol {
            Protocol::Tcp => wire::TunnelProtocol::None,
            Protocol::Hbone => wire::TunnelProtocol::Hbone,
        }
        .into(),
        trust_domain: workload.trust_domain.to_string(),
        service_account: workload.service_account.to_string(),
        waypoint: workload.waypoint.as_ref().map(wire_gateway),
        node: workload.node.to_string(),
        canonical_name: workload.canonical_name.to_string(),
        canonical_revision: workload.canonical_revision.to_string(),
        workload_type: TYPES
            .iter()
            .find(|(_, name)| *name == &*workload.workload_type)
            .map_or(wire::WorkloadType::Deployment, |(number, _)| *number)
            .into(),
        workload_name: workload.workload_name.to_string(),
        native_tunnel: workload.native_tunnel,
        authorization_policies: workload
            .authorization_policies
            .iter()
            .map(ToString::to_string)
            .collect(),
        status: match workload.status {
            Health::Healthy => wire::WorkloadStatus::Healthy,
            Health::Unhealthy => wire::WorkloadStatus::Unhealthy,
        }
        .into(),
        cluster_id: workload.cluster_id.to_string(),
        network_gateway: workload.network_gateway.as_ref().map(wire_gateway),
        uid: workload.uid.to_string(),
        hostname: workload.hostname.to_string(),
        services: workload
            .services
            .iter()
            .map(|(key, ports)| {
                let ports = wire_ports(ports);
                (key.to_string(), wire::PortList { ports })
            })
            .collect(),
        application_tunnel: workload.application_tunnel.as_ref().map(|tunnel| {
            wire::ApplicationTunnel {
                protocol: match tunnel.protocol {
                    ApplicationProtocol::None => wire::ApplicationProtocol::None,
                    ApplicationProtocol::Proxy => wire::ApplicationProtocol::Proxy,
                }
                .into(),
                port: u32::from(tunnel.port.unwrap_or(0)),
            }
        }),
        locality: (*locality != Locality::default()).then(|| wire::Locality {
            region: locality.region.to_string(),
            zone: locality.zone.to_string(),
            subzone: locality.subzone.to_string(),
        }),
        network_mode: match workload.network_mode {
            NetworkMode::Standard => wire::NetworkMode::Standard,
            NetworkMode::HostNetwork => wire::NetworkMode::HostNetwork,
        }
        .into(),
        capacity: (workload.capacity != 1).then_some(workload.capacity),
    }
}
