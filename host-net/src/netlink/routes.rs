//! Routes: of a plan, of all tables, and the one that a packet would take.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use futures_util::future::join_all;
use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage};
use nix::libc::{EEXIST, ENOENT, ESRCH};

use super::{Made, Netlink, NetlinkError, PIPELINE, Presence, ROUTE_PROTOCOL};
use crate::plan::{Family, Route};

mod shape;
pub(super) use shape::Shape;
use shape::{address, family_of, listing, object, own_protocol};

/// The route that a packet to some address would take, without a mark and from no particular source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteInfo {
    /// Output device; `lo` for an address of this namespace.
    pub dev: String,
    /// Its index.
    pub index: u32,
    /// Next hop, when not on the link.
    pub via: Option<IpAddr>,
    /// Source address that a local socket would get.
    pub src: Option<IpAddr>,
    /// The table where the route was found.
    pub table: u32,
}

/// A route as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedRoute {
    /// IPv4 or IPv6.
    pub family: Family,
    /// The same in a plan's words; none when it has properties that a plan cannot express.
    pub route: Option<Route>,
    /// Routing table; 254 is main, 255 local.
    pub table: u32,
    /// Destination.
    pub dst: IpNet,
    /// Who made it: 2 kernel, 3 by hand, [`ROUTE_PROTOCOL`] this program.
    pub protocol: u8,
    /// The route as `ip route` would print it, without state that comes and goes with the device.
    pub text: String,
}

/// What is in the tables that a batch of routes belongs to.
struct Tables {
    found: Vec<(Shape, u8)>,
    names: BTreeMap<u32, String>,
}

impl Tables {
    /// The identical route, whoever made it, or one that keeps it out: same destination, same metric.
    fn presence(&self, wanted: &Shape) -> Presence {
        if self.found.iter().any(|(found, _)| found == wanted) {
            return Presence::Same;
        }
        let key = |route: &Shape| (route.table, route.dst, route.metric);
        let other = self
            .found
            .iter()
            .find(|(found, _)| key(found) == key(wanted));
        match other {
            Some((found, protocol)) => Presence::Different {
                found: found.text(&self.names, *protocol),
            },
            None => Presence::Absent,
        }
    }

    fn has_ours(&self, wanted: &Shape) -> bool {
        let mut found = self.found.iter();
        found.any(|(route, protocol)| *protocol == ROUTE_PROTOCOL && route == wanted)
    }
}

impl Netlink {
    /// Adds a route.
    ///
    /// # Errors
    /// [`NetlinkError::NoDevice`]; [`NetlinkError::Conflict`] when the table has another route to the same
    /// destination; what the kernel refuses, such as a next hop that is not on the link.
    pub async fn add_route(&self, route: &Route) -> Result<Made, NetlinkError> {
        only(self.add_routes(std::slice::from_ref(route)).await, route)
    }

    /// Deletes exactly this route if it is ours; false when it, or its device, is not there.
    pub async fn del_route(&self, route: &Route) -> Result<bool, NetlinkError> {
        only(self.del_routes(std::slice::from_ref(route)).await, route)
    }

    /// Whether exactly this route exists.
    pub async fn has_route(&self, route: &Route) -> Result<bool, NetlinkError> {
        Ok(self.check_route(route).await? == Presence::Same)
    }

    /// Compares what stands in the place of a route.
    pub async fn check_route(&self, route: &Route) -> Result<Presence, NetlinkError> {
        let found = self.check_routes(std::slice::from_ref(route)).await?;
        Ok(found.into_iter().next().unwrap_or(Presence::Absent))
    }

    /// [`Netlink::add_route`] for many, with several requests on their way at once. One result per route, in order; a
    /// failure does not stop the others.
    pub async fn add_routes(&self, routes: &[Route]) -> Vec<Result<Made, NetlinkError>> {
        let shapes = match self.shapes(routes).await {
            Ok(shapes) => shapes,
            Err(error) => return everywhere(routes, &error),
        };
        let mut answers = Vec::with_capacity(routes.len());
        for chunk in shapes.chunks(PIPELINE) {
            let requests = chunk.iter().map(|shape| async move {
                let shape = shape.as_ref()?;
                let message = RouteNetlinkMessage::NewRoute(shape.message(own_protocol()));
                Some(self.create(message).await)
            });
            answers.extend(join_all(requests).await);
        }
        // Whatever is in the way is listed once for the whole batch.
        let taken = |answer: &Option<io::Result<()>>| matches!(answer, Some(Err(e)) if e.raw_os_error() == Some(EEXIST));
        let tables = if answers.iter().any(taken) {
            match self.tables_of(&shapes).await {
                Ok(tables) => Some(tables),
                Err(error) => return everywhere(routes, &error),
            }
        } else {
            None
        };
        let outcome =
            |((route, shape), answer): ((&Route, &Option<Shape>), Option<io::Result<()>>)| {
                let object = object(route);
                let presence = match (&tables, shape) {
                    (Some(tables), Some(shape)) => tables.presence(shape),
                    _ => Presence::Absent,
                };
                match (answer, presence) {
                    (None, _) => Err(NetlinkError::NoDevice {
                        object,
                        dev: route.dev.clone(),
                    }),
                    (Some(Ok(())), _) => Ok(Made::Created),
                    (Some(Err(e)), _) if e.raw_os_error() != Some(EEXIST) => {
                        Err(NetlinkError::kernel(object, e))
                    }
                    (Some(Err(_)), Presence::Same) => Ok(Made::Existed),
                    (Some(Err(_)), Presence::Different { found }) => {
                        Err(NetlinkError::Conflict { object, found })
                    }
                    (Some(Err(e)), Presence::Absent) => Err(NetlinkError::kernel(object, e)),
                }
            };
        routes
            .iter()
            .zip(&shapes)
            .zip(answers)
            .map(outcome)
            .collect()
    }

    /// [`Netlink::del_route`] for many. One result per route, in order; a failure does not stop the others.
    pub async fn del_routes(&self, routes: &[Route]) -> Vec<Result<bool, NetlinkError>> {
        let shapes = match self.shapes(routes).await {
            Ok(shapes) => shapes,
            Err(error) => return everywhere(routes, &error),
        };
        // The kernel takes a request that leaves something open (no source, no `onlink`) for agreement with any
        // route, so it is asked only for what was seen to be there.
        let tables = match self.tables_of(&shapes).await {
            Ok(tables) => tables,
            Err(error) => return everywhere(routes, &error),
        };
        let mut results = Vec::with_capacity(routes.len());
        let pairs: Vec<_> = routes.iter().zip(&shapes).collect();
        for chunk in pairs.chunks(PIPELINE) {
            let requests = chunk.iter().map(|(route, shape)| {
                let shape = shape.as_ref().filter(|shape| tables.has_ours(shape));
                async move {
                    let Some(shape) = shape else { return Ok(false) };
                    let message = RouteNetlinkMessage::DelRoute(shape.message(own_protocol()));
                    let answer = self.change(message).await;
                    deleted(answer).map_err(|e| NetlinkError::kernel(object(route), e))
                }
            });
            results.extend(join_all(requests).await);
        }
        results
    }

    /// [`Netlink::check_route`] for many, with one listing per table.
    pub async fn check_routes(&self, routes: &[Route]) -> Result<Vec<Presence>, NetlinkError> {
        let shapes = self.shapes(routes).await?;
        let tables = self.tables_of(&shapes).await?;
        let presences = shapes.iter().map(|shape| match shape {
            Some(shape) => tables.presence(shape),
            None => Presence::Absent,
        });
        Ok(presences.collect())
    }

    /// The route that a packet to `ip` would take, like `ip route get IP`.
    ///
    /// # Errors
    /// The kernel's, such as "Network is unreachable".
    pub async fn route_to(&self, ip: IpAddr) -> Result<RouteInfo, NetlinkError> {
        let failed = |e| NetlinkError::kernel(format!("route to {ip}"), e);
        let mut request = RouteMessage::default();
        request.header.address_family = family_of(ip.is_ipv4());
        request.header.destination_prefix_length = if ip.is_ipv4() { 32 } else { 128 };
        if ip.is_ipv4() {
            // Without it the answer names the main table, whichever it was; for IPv6 the flag is refused.
            request.header.flags = RouteFlags::LookupTable;
        }
        request
            .attributes
            .push(RouteAttribute::Destination(ip.into()));
        let answer = self.get(RouteNetlinkMessage::GetRoute(request)).await;
        let messages = answer.map_err(failed)?;
        let Some(RouteNetlinkMessage::NewRoute(found)) = messages.into_iter().next() else {
            return Err(failed(io::Error::other("the kernel's answer has no route")));
        };
        let mut table = found.header.table.into();
        let (mut index, mut via, mut src) = (None, None, None);
        for attribute in &found.attributes {
            match attribute {
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::Oif(number) => index = Some(*number),
                RouteAttribute::Gateway(ip) => via = address(ip),
                RouteAttribute::PrefSource(ip) => src = address(ip),
                _ => {}
            }
        }
        let no_device = || failed(io::Error::other("it leads to no device"));
        let index = index.ok_or_else(no_device)?;
        let link = self.link_by_index(index).await?.ok_or_else(no_device)?;
        Ok(RouteInfo {
            dev: link.name,
            index,
            via,
            src,
            table,
        })
    }

    /// The device that a route of this table to exactly this destination leads through.
    pub async fn device_to(&self, table: u32, dst: IpNet) -> Result<Option<String>, NetlinkError> {
        let v4 = matches!(dst, IpNet::V4(_));
        let found = self.list_routes(v4, Some(table)).await?;
        let index = found
            .iter()
            .find(|(shape, _)| shape.table == table && shape.dst == dst)
            .and_then(|(shape, _)| shape.device());
        match index {
            Some(index) => Ok(self.link_by_index(index).await?.map(|link| link.name)),
            None => Ok(None),
        }
    }

    /// The routes of all tables of a family.
    pub async fn routes(&self, family: Family) -> Result<Vec<ListedRoute>, NetlinkError> {
        let names = self.names().await?;
        let found = self.list_routes(family == Family::V4, None).await?;
        let listed = found.into_iter().map(|(shape, protocol)| ListedRoute {
            family,
            route: shape.to_plan(&names),
            table: shape.table,
            dst: shape.dst,
            protocol,
            text: shape.text(&names, protocol),
        });
        Ok(listed.collect())
    }

    /// Comparable forms; none where the device does not exist.
    async fn shapes(&self, routes: &[Route]) -> Result<Vec<Option<Shape>>, NetlinkError> {
        let mut indices = BTreeMap::new();
        for route in routes {
            if !indices.contains_key(&route.dev) {
                indices.insert(&route.dev, self.index_of(&route.dev).await?);
            }
        }
        let shape = |route: &Route| {
            let index = indices.get(&route.dev).copied().flatten()?;
            Some(Shape::of_plan(route, index))
        };
        Ok(routes.iter().map(shape).collect())
    }

    async fn tables_of(&self, shapes: &[Option<Shape>]) -> Result<Tables, NetlinkError> {
        let numbers: BTreeSet<_> = shapes
            .iter()
            .flatten()
            .map(|shape| (shape.is_v4(), shape.table))
            .collect();
        let mut found = Vec::new();
        for (v4, table) in numbers {
            found.extend(self.list_routes(v4, Some(table)).await?);
        }
        let mut tables = Tables {
            found,
            names: BTreeMap::new(),
        };
        // Names of devices, of which a node has one for each pod, are asked for only when there is something to tell.
        let mut presences = shapes.iter().flatten().map(|shape| tables.presence(shape));
        if presences.any(|presence| matches!(presence, Presence::Different { .. })) {
            drop(presences);
            tables.names = self.names().await?;
        }
        Ok(tables)
    }

    async fn list_routes(
        &self,
        v4: bool,
        table: Option<u32>,
    ) -> Result<Vec<(Shape, u8)>, NetlinkError> {
        let request = RouteNetlinkMessage::GetRoute(listing(v4, table));
        let messages = match self.list(request).await {
            Ok(messages) => messages,
            // The table has never had a route.
            Err(e) if e.raw_os_error() == Some(ENOENT) => Vec::new(),
            Err(e) => return Err(NetlinkError::kernel("list of routes", e)),
        };
        let shapes = messages.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => Shape::of_message(route),
            _ => None,
        });
        Ok(shapes.collect())
    }
}

/// A deletion that found nothing is no error.
pub(super) fn deleted(answer: io::Result<()>) -> io::Result<bool> {
    match answer {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(ESRCH | ENOENT)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The same failure for every route of a batch.
fn everywhere<T>(routes: &[Route], error: &NetlinkError) -> Vec<Result<T, NetlinkError>> {
    let reason = error.to_string();
    let failed =
        |route: &Route| NetlinkError::kernel(object(route), io::Error::other(reason.clone()));
    routes.iter().map(|route| Err(failed(route))).collect()
}

fn only<T>(results: Vec<Result<T, NetlinkError>>, route: &Route) -> Result<T, NetlinkError> {
    let none = || {
        let reason = io::Error::other("no answer");
        Err(NetlinkError::kernel(object(route), reason))
    };
    results.into_iter().next().unwrap_or_else(none)
}
