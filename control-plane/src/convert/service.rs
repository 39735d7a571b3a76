//! Services.

use shared_proxy::state::Service;
use shared_proxy::state::service::{
    HealthPolicy, IpFamilies, LoadBalancer, LoadBalancerMode, Scope, Visibility, WeightedWaypoint,
};

use super::{
    Texts, Unusable, gateway, network_address, network_range, ports, value, wire_gateway,
    wire_network_address, wire_network_range, wire_ports,
};
use crate::messages::workload as wire;

const SCOPES: [(Scope, wire::Scope); 6] = [
    (Scope::Region, wire::Scope::Region),
    (Scope::Zone, wire::Scope::Zone),
    (Scope::Subzone, wire::Scope::Subzone),
    (Scope::Node, wire::Scope::Node),
    (Scope::Cluster, wire::Scope::Cluster),
    (Scope::Network, wire::Scope::Network),
];

pub(super) fn from_wire(message: wire::Service, texts: &mut Texts) -> Result<Service, Unusable> {
    for (field, text) in [
        ("namespace", &message.namespace),
        ("hostname", &message.hostname),
    ] {
        if text.is_empty() {
            return Err(Unusable::Missing(field));
        }
        if text.contains('/') {
            return Err(value(field, format_args!("{text:?}, which has a slash")));
        }
    }
    let (mut vips, mut cidr_vips) = (Vec::new(), Vec::new());
    for address in &message.addresses {
        match network_range("addresses", address, texts)? {
            Some(range) => cidr_vips.push(range),
            None => vips.push(network_address("addresses", address, texts)?),
        }
    }
    Ok(Service {
        name: message.name.as_str().into(),
        namespace: texts.get(&message.namespace),
        hostname: texts.get(&message.hostname),
        vips,
        cidr_vips,
        ports: ports(&message.ports)?,
        subject_alt_names: message
            .subject_alt_names
            .iter()
            .map(|name| texts.get(name))
            .collect(),
        waypoint: message
            .waypoint
            .map(|waypoint| gateway("waypoint", waypoint, texts))
            .transpose()?,
        load_balancer: message.load_balancing.map(|lb| load_balancer(&lb)),
        ip_families: match wire::IpFamilies::try_from(message.ip_families) {
            Ok(wire::IpFamilies::Ipv4Only) => Some(IpFamilies::IPv4),
            Ok(wire::IpFamilies::Ipv6Only) => Some(IpFamilies::IPv6),
            Ok(wire::IpFamilies::Dual) => Some(IpFamilies::Dual),
            Ok(wire::IpFamilies::Automatic) | Err(_) => None,
        },
        canonical: message.canonical,
        ingress_use_waypoint: message.ingress_use_waypoint,
        weighted_waypoints: message
            .weighted_waypoints
            .into_iter()
            .filter_map(|waypoint| Some((waypoint.destination?, waypoint.weight)))
            .map(|(destination, weight)| {
                Ok(WeightedWaypoint {
                    destination: gateway("weighted_waypoints", destination, texts)?,
                    weight,
                })
            })
            .collect::<Result<_, Unusable>>()?,
        visibility: match message.visibility {
            1 => Visibility::Namespace,
            _ => Visibility::Public,
        },
    })
}

fn load_balancer(message: &wire::LoadBalancing) -> LoadBalancer {
    let known = |number: &i32| SCOPES.iter().find(|(_, wire)| *wire as i32 == *number);
    LoadBalancer {
        routing_preferences: message
            .routing_preference
            .iter()
            .filter_map(known)
            .map(|(scope, _)| *scope)
            .collect(),
        mode: match wire::Mode::try_from(message.mode) {
            Ok(wire::Mode::Strict) => LoadBalancerMode::Strict,
            Ok(wire::Mode::Failover) => LoadBalancerMode::Failover,
            Ok(wire::Mode::Passthrough) => LoadBalancerMode::Passthrough,
            Ok(wire::Mode::Unspecified) | Err(_) => LoadBalancerMode::Standard,
        },
        health_policy: match wire::HealthPolicy::try_from(message.health_policy) {
            Ok(wire::HealthPolicy::AllowAll) => HealthPolicy::AllowAll,
            Ok(wire::HealthPolicy::OnlyHealthy) | Err(_) => HealthPolicy::OnlyHealthy,
        },
    }
}

pub(super) fn to_wire(service: &Service) -> wire::Service {
    wire::Service {
        name: service.name.to_string(),
        namespace: service.namespace.to_string(),
        hostname: service.hostname.to_string(),
        addresses: service
            .vips
            .iter()
            .map(wire_network_address)
            .chain(service.cidr_vips.iter().map(wire_network_range))
            .collect(),
        ports: wire_ports(&service.ports),
        subject_alt_names: service
            .subject_alt_names
            .iter()
            .map(ToString::to_string)
            .collect(),
        waypoint: service.waypoint.as_ref().map(wire_gateway),
        load_balancing: service.load_balancer.as_ref().map(wire_load_balancer),
        ip_families: match service.ip_families {
            None => wire::IpFamilies::Automatic,
            Some(IpFamilies::IPv4) => wire::IpFamilies::Ipv4Only,
            Some(IpFamilies::IPv6) => wire::IpFamilies::Ipv6Only,
            Some(IpFamilies::Dual) => wire::IpFamilies::Dual,
        }
        .into(),
        canonical: service.canonical,
        ingress_use_waypoint: service.ingress_use_waypoint,
        weighted_waypoints: service
            .weighted_waypoints
            .iter()
            .map(|waypoint| wire::WeightedWaypoint {
                destination: Some(wire_gateway(&waypoint.destination)),
                weight: waypoint.weight,
            })
            .collect(),
        visibility: match service.visibility {
            Visibility::Public => 0,
            Visibility::Namespace => 1,
        },
    }
}

fn wire_load_balancer(balancer: &LoadBalancer) -> wire::LoadBalancing {
    let number = |scope: &Scope| SCOPES.iter().find(|(known, _)| known == scope);
    wire::LoadBalancing {
        routing_preference: balancer
            .routing_preferences
            .iter()
            .filter_map(number)
            .map(|(_, wire)| *wire as i32)
            .collect(),
        mode: match balancer.mode {
            LoadBalancerMode::Standard => wire::Mode::Unspecified,
            LoadBalancerMode::Strict => wire::Mode::Strict,
            LoadBalancerMode::Failover => wire::Mode::Failover,
            LoadBalancerMode::Passthrough => wire::Mode::Passthrough,
        }
        .into(),
        health_policy: match balancer.health_policy {
            HealthPolicy::OnlyHealthy => wire::HealthPolicy::OnlyHealthy,
            HealthPolicy::AllowAll => wire::HealthPolicy::AllowAll,
        }
        .into(),
    }
}
