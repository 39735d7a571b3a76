//! All that distinguishes two routes, in comparable form, and its translation from and to rtnetlink.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RoutePreference, RouteProtocol,
    RouteScope, RouteType, RouteVia,
};

use super::super::ROUTE_PROTOCOL;
use crate::plan::{self, Route, RouteKind};

/// `RT_TABLE_COMPAT`: the number in the header's 8 bits when the table's does not fit.
const TABLE_COMPAT: u8 = 252;
const TABLE_MAIN: u32 = 254;
/// Metric that the kernel gives an IPv6 route without one.
const METRIC_V6: u32 = 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(super) table: u32,
    pub(super) dst: IpNet,
    pub(super) via: Option<IpAddr>,
    pub(super) oif: Option<u32>,
    pub(super) src: Option<IpAddr>,
    onlink: bool,
    pub(super) kind: RouteType,
    scope: RouteScope,
    pub(super) metric: u32,
    /// Properties that no plan has.
    extras: Vec<String>,
}

impl Shape {
    pub(super) fn of_plan(route: &Route, index: u32) -> Self {
        let mut shape = Self::plain(route.dst, route.via, index);
        shape.table = route.table;
        shape.src = route.src;
        shape.onlink = route.onlink;
        shape.kind = match route.kind {
            RouteKind::Unicast => RouteType::Unicast,
            RouteKind::Local => RouteType::Local,
        };
        // IPv6 routes have no scope.
        if shape.is_v4() {
            shape.scope = match route.scope {
                plan::RouteScope::Global => RouteScope::Universe,
                plan::RouteScope::Link => RouteScope::Link,
                plan::RouteScope::Host => RouteScope::Host,
            };
        }
        shape
    }

    /// A unicast route of the main table.
    pub(crate) fn plain(dst: IpNet, via: Option<IpAddr>, index: u32) -> Self {
        let v4 = matches!(dst, IpNet::V4(_));
        let scope = match via {
            None if v4 => RouteScope::Link,
            _ => RouteScope::Universe,
        };
        Self {
            table: TABLE_MAIN,
            dst,
            via,
            oif: Some(index),
            src: None,
            onlink: false,
            kind: RouteType::Unicast,
            scope,
            metric: if v4 { 0 } else { METRIC_V6 },
            extras: Vec::new(),
        }
    }

    pub(super) fn is_v4(&self) -> bool {
        matches!(self.dst, IpNet::V4(_))
    }

    /// The request that creates or deletes this route.
    pub(crate) fn message(&self, protocol: RouteProtocol) -> RouteMessage {
        let mut message = RouteMessage::default();
        let header = &mut message.header;
        header.address_family = family_of(self.is_v4());
        header.destination_prefix_length = self.dst.prefix_len();
        header.table = u8::try_from(self.table).unwrap_or(TABLE_COMPAT);
        header.protocol = protocol;
        header.scope = self.scope;
        header.kind = self.kind;
        if self.onlink {
            header.flags.insert(RouteFlags::Onlink);
        }
        let attributes = &mut message.attributes;
        attributes.push(RouteAttribute::Table(self.table));
        attributes.push(RouteAttribute::Destination(self.dst.addr().into()));
        attributes.extend(self.oif.map(RouteAttribute::Oif));
        attributes.extend(self.src.map(|ip| RouteAttribute::PrefSource(ip.into())));
        attributes.extend(self.via.map(|ip| match ip {
            IpAddr::V6(ip) if self.is_v4() => RouteAttribute::Via(RouteVia::Inet6(ip)),
            _ => RouteAttribute::Gateway(ip.into()),
        }));
        message
    }

    /// None for what is no IP route.
    pub(super) fn of_message(message: &RouteMessage) -> Option<(Self, u8)> {
        let header = &message.header;
        let v4 = match header.address_family {
            AddressFamily::Inet => true,
            AddressFamily::Inet6 => false,
            _ => return None,
        };
        let mut destination = if v4 {
            IpAddr::from(Ipv4Addr::UNSPECIFIED)
        } else {
            IpAddr::from(Ipv6Addr::UNSPECIFIED)
        };
        let mut shape = Self {
            table: header.table.into(),
            dst: IpNet::new(destination, 0).ok()?,
            via: None,
            oif: None,
            src: None,
            // The other flags are state of the device or of its driver.
            onlink: header.flags.contains(RouteFlags::Onlink),
            kind: header.kind,
            scope: header.scope,
            metric: 0,
            extras: Vec::new(),
        };
        if header.tos != 0 {
            shape.extras.push(format!("tos {:#x}", header.tos));
        }
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Table(table) => shape.table = *table,
                RouteAttribute::Destination(ip) => destination = address(ip)?,
                RouteAttribute::Oif(index) => shape.oif = Some(*index),
                RouteAttribute::Gateway(ip) => shape.via = address(ip),
                RouteAttribute::Via(RouteVia::Inet(ip)) => shape.via = Some((*ip).into()),
                RouteAttribute::Via(RouteVia::Inet6(ip)) => shape.via = Some((*ip).into()),
                RouteAttribute::PrefSource(ip) => shape.src = address(ip),
                RouteAttribute::Priority(metric) => shape.metric = *metric,
                // Counters, and the middle of three preferences, which every IPv6 route has.
                RouteAttribute::CacheInfo(_)
                | RouteAttribute::Preference(RoutePreference::Medium) => {}
                other => shape.extras.push(format!("{other:?}")),
            }
        }
        shape.dst = IpNet::new(destination, header.destination_prefix_length).ok()?;
        Some((shape, header.protocol.into()))
    }

    /// In a plan's words, if those suffice.
    /// Index of the device that it leads through.
    pub(super) fn device(&self) -> Option<u32> {
        self.oif
    }

    pub(super) fn to_plan(&self, names: &BTreeMap<u32, String>) -> Option<Route> {
        let kind = match self.kind {
            RouteType::Unicast => RouteKind::Unicast,
            RouteType::Local => RouteKind::Local,
            _ => return None,
        };
        let scope = match self.scope {
            RouteScope::Universe => plan::RouteScope::Global,
            RouteScope::Link => plan::RouteScope::Link,
            RouteScope::Host => plan::RouteScope::Host,
            _ => return None,
        };
        let usual_metric = if self.is_v4() { 0 } else { METRIC_V6 };
        if self.metric != usual_metric || !self.extras.is_empty() {
            return None;
        }
        Some(Route {
            table: self.table,
            dst: self.dst,
            dev: names.get(&self.oif?)?.clone(),
            via: self.via,
            src: self.src,
            onlink: self.onlink,
            kind,
            scope,
        })
    }

    /// As `ip route` prints it, with the table.
    pub(super) fn text(&self, names: &BTreeMap<u32, String>, protocol: u8) -> String {
        let mut words = Vec::new();
        if self.kind != RouteType::Unicast {
            words.push(format!("{:?}", self.kind).to_lowercase());
        }
        words.push(self.dst.to_string());
        words.extend(self.via.map(|ip| format!("via {ip}")));
        words.extend(self.oif.map(|index| match names.get(&index) {
            Some(name) => format!("dev {name}"),
            None => format!("dev if{index}"),
        }));
        words.push(format!("table {} proto {protocol}", self.table));
        match self.scope {
            RouteScope::Universe => {}
            RouteScope::Link => words.push("scope link".to_owned()),
            RouteScope::Host => words.push("scope host".to_owned()),
            other => words.push(format!("scope {}", u8::from(other))),
        }
        words.extend(self.src.map(|ip| format!("src {ip}")));
        if self.metric != 0 {
            words.push(format!("metric {}", self.metric));
        }
        if self.onlink {
            words.push("onlink".to_owned());
        }
        words.extend(self.extras.iter().cloned());
        words.join(" ")
    }
}

/// Asks for nothing but the routes of a table, or of all tables.
pub(super) fn listing(v4: bool, table: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family_of(v4);
    let attributes = &mut message.attributes;
    attributes.extend(table.map(RouteAttribute::Table));
    message
}

pub(super) fn family_of(v4: bool) -> AddressFamily {
    if v4 {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

pub(super) fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// What a plan says, before the device's index is known.
pub(super) fn object(route: &Route) -> String {
    format!("route {} in table {}", route.dst, route.table)
}

/// Protocol of everything that a plan makes.
pub(super) fn own_protocol() -> RouteProtocol {
    RouteProtocol::from(ROUTE_PROTOCOL)
}
