//! The namespaces that are known, wired to each other, and packets on their way through them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::hooks::{CONNECTION_TRACKING, DESTINATIONS, Hook, SOURCES, Verdict};
use super::hop::{Change, Hop, Kind};
use super::packet::{End, Packet, Payload, Tracking, Tuple, at};
use super::routing::{self, look_up, refused_source};
use super::state::{Device, State, table_name};

/// Ports that stand for those that the kernel chooses.
pub(super) const CHOSEN_PORTS: std::ops::RangeInclusive<u16> = 65_501..=65_535;
/// Hops after which a packet goes in circles: the kernel's time to live is 64 routers of a few hops each.
const MOST_HOPS: usize = 600;

/// Rules of the plans, by table and chain.
#[derive(Debug, Clone, Default)]
pub struct OwnRules(pub(super) BTreeSet<(String, String, String)>);

impl OwnRules {
    /// Whether a plan has this rule.
    pub fn contains(&self, table: &str, chain: &str, rule: &str) -> bool {
        let wanted = (table.to_owned(), chain.to_owned(), rule.to_owned());
        self.0.contains(&wanted)
    }
}

/// An open end of a TCP connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketEnd {
    /// Own address.
    pub local: SocketAddr,
    /// The other's.
    pub remote: SocketAddr,
    /// Whether it speaks with any address.
    pub transparent: bool,
}

/// A namespace.
#[derive(Debug, Clone)]
pub struct Place {
    /// Name in the output.
    pub name: String,
    /// Its network state.
    pub state: Arc<State>,
    /// What is in its plans.
    pub own: Arc<OwnRules>,
    /// Connections.
    pub tracking: Tracking,
    /// Open ends.
    pub sockets: Vec<SocketEnd>,
}

/// All namespaces.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// By index.
    pub places: Vec<Place>,
}

/// Where a packet ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Arrival {
    /// At a socket that has an open connection.
    Socket(usize),
    /// At a socket that listens: place, port, and the ends as the accepted connection has them.
    Listener(usize, u16, Tuple),
    /// Nowhere: it was dropped, refused, or has no route.
    Nowhere(String),
    /// Somewhere that nothing is known of here.
    Left(String),
}

impl World {
    /// Index of a place by name.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.places.iter().position(|place| place.name == name)
    }

    /// Sends a packet from a socket of a place.
    pub(super) fn send(&mut self, place: usize, packet: Packet) -> (Vec<Hop>, Arrival) {
        let mut walk = Walk {
            world: self,
            hops: Vec::new(),
        };
        let text = match packet.payload {
            Payload::Syn => "a socket begins a connection",
            Payload::SynAck => "the socket answers",
            _ => "the socket sends",
        };
        walk.note(place, None, Kind::Sent, text.to_owned(), &packet);
        let arrival = walk.output(place, packet);
        (walk.hops, arrival)
    }
}

struct Walk<'w> {
    world: &'w mut World,
    hops: Vec<Hop>,
}

impl Walk<'_> {
    fn note(
        &mut self,
        place: usize,
        device: Option<&str>,
        kind: Kind,
        text: String,
        packet: &Packet,
    ) {
        let place = &self.world.places[place];
        let connmark = place.tracking.mark(packet);
        self.hops.push(Hop {
            place: place.name.clone(),
            device: device.map(str::to_owned),
            kind,
            text,
            packet: shown(packet.tuple),
            mark: Change::of(packet.mark, packet.mark),
            connmark: Change::of(connmark, connmark),
            rule: None,
            route: None,
            detail: false,
            unknown: None,
            differs: None,
        });
    }

    fn nowhere(
        &mut self,
        place: usize,
        device: Option<&str>,
        why: String,
        packet: &Packet,
    ) -> Arrival {
        self.note(place, device, Kind::Dropped, why.clone(), packet);
        Arrival::Nowhere(why)
    }

    /// Runs something at a hook.
    fn at_hook<T>(
        &mut self,
        place: usize,
        packet: &mut Packet,
        devices: (Option<&str>, Option<&str>),
        run: impl FnOnce(&mut Hook<'_>) -> T,
    ) -> T {
        let place = &mut self.world.places[place];
        let mut hook = Hook::new(
            &place.name,
            &place.state,
            &place.sockets,
            &place.own,
            &mut place.tracking,
            packet,
            devices.0,
            devices.1,
            &mut self.hops,
        );
        run(&mut hook)
    }

    /// All of a hook that comes before destinations are translated, with connection tracking on the way. Returns whether the
    /// route is looked up again, too.
    fn before_routing(
        &mut self,
        place: usize,
        packet: &mut Packet,
        devices: (Option<&str>, Option<&str>),
        chain: &str,
    ) -> (Verdict, bool) {
        self.at_hook(place, packet, devices, |hook| {
            if hook.pass(chain, i32::MIN..CONNECTION_TRACKING) == Verdict::Drop {
                return (Verdict::Drop, false);
            }
            // What was looked up already came by loopback.
            if hook.packet.tracked.is_none()
                && let Some(zone) = hook.zone
            {
                hook.packet.tracked = Some(hook.tracking.look_up(hook.packet, zone));
            }
            let verdict = hook.pass(chain, CONNECTION_TRACKING..DESTINATIONS);
            (verdict, hook.reroute)
        })
    }

    fn route(&mut self, place: usize, packet: &Packet, what: &str) -> Option<super::state::Route> {
        let chosen = look_up(
            &self.world.places[place].state,
            packet.tuple.to.ip(),
            packet.mark,
        );
        let routing::Chosen {
            route,
            taken,
            unknown,
        } = chosen;
        let text = match &taken {
            Some(taken) => format!(
                "{what}: ip rule {}; table {}: {}",
                taken.rule,
                table_name(&taken.table.to_string()),
                taken.route
            ),
            None => format!("{what}: no rule leads to a route"),
        };
        let device = route.as_ref().map(|route| route.device.clone());
        self.note(place, device.as_deref(), Kind::Routed, text, packet);
        if let Some(hop) = self.hops.last_mut() {
            hop.route = taken;
            hop.unknown = unknown;
        }
        route
    }

    /// From a socket, or from an overlay device.
    fn output(&mut self, place: usize, mut packet: Packet) -> Arrival {
        if self.hops.len() > MOST_HOPS {
            return self.nowhere(place, None, "it goes in circles".to_owned(), &packet);
        }
        let Some(mut route) = self.route(place, &packet, "route") else {
            return self.nowhere(place, None, "no route".to_owned(), &packet);
        };
        if packet.tuple.from.ip().is_unspecified() {
            let state = &self.world.places[place].state;
            let own = route
                .source
                .or_else(|| state.address_of(&route.device, packet.tuple.to.ip()));
            packet
                .tuple
                .from
                .set_ip(own.unwrap_or(packet.tuple.to.ip()));
        }
        // The device that rules see stays the first one, whatever the packet is led to.
        let first = output_device(&route).to_owned();
        let devices = (None, Some(first.as_str()));
        let (verdict, again) = self.before_routing(place, &mut packet, devices, "OUTPUT");
        if verdict == Verdict::Drop {
            return Arrival::Nowhere("dropped by a rule".to_owned());
        }
        if again {
            match self.route(place, &packet, "route again, by its new mark") {
                Some(again) => route = again,
                None => return self.nowhere(place, None, "no route".to_owned(), &packet),
            }
        }
        let to = packet.tuple.to;
        let verdict = self.at_hook(place, &mut packet, devices, |hook| {
            hook.translate("OUTPUT", End::Destination)
        });
        if verdict == Verdict::Drop {
            return Arrival::Nowhere("dropped by a rule".to_owned());
        }
        if packet.tuple.to != to {
            match self.route(place, &packet, "route again, by its new destination") {
                Some(again) => route = again,
                None => return self.nowhere(place, None, "no route".to_owned(), &packet),
            }
        }
        let (verdict, again) = self.at_hook(place, &mut packet, devices, |hook| {
            let verdict = hook.pass("OUTPUT", DESTINATIONS..i32::MAX);
            (verdict, hook.reroute)
        });
        if verdict == Verdict::Drop {
            return Arrival::Nowhere("dropped by a rule".to_owned());
        }
        if again {
            match self.route(place, &packet, "route again, by its new mark") {
                Some(again) => route = again,
                None => return self.nowhere(place, None, "no route".to_owned(), &packet),
            }
        }
        self.leave(place, packet, &route)
    }

    /// In by a device.
    fn input(&mut self, place: usize, mut packet: Packet, device: &str) -> Arrival {
        if self.hops.len() > MOST_HOPS {
            return self.nowhere(place, None, "it goes in circles".to_owned(), &packet);
        }
        self.note(
            place,
            Some(device),
            Kind::Received,
            format!("in by {device}"),
            &packet,
        );
        let devices = (Some(device), None);
        let (verdict, _) = self.before_routing(place, &mut packet, devices, "PREROUTING");
        if verdict == Verdict::Drop {
            return Arrival::Nowhere("dropped by a rule".to_owned());
        }
        let verdict = self.at_hook(place, &mut packet, devices, |hook| {
            match hook.translate("PREROUTING", End::Destination) {
                Verdict::Accept => hook.pass("PREROUTING", DESTINATIONS..i32::MAX),
                Verdict::Drop => Verdict::Drop,
            }
        });
        if verdict == Verdict::Drop {
            return Arrival::Nowhere("dropped by a rule".to_owned());
        }
        let Some(route) = self.route(place, &packet, "route") else {
            return self.nowhere(place, Some(device), "no route".to_owned(), &packet);
        };
        let state = Arc::clone(&self.world.places[place].state);
        if let Some(why) = refused_source(&state, packet.tuple.from.ip(), device, packet.mark) {
            return self.nowhere(place, Some(device), why, &packet);
        }
        if route.kind == "local" {
            let verdict = self.at_hook(place, &mut packet, devices, |hook| {
                match hook.pass("INPUT", i32::MIN..i32::MAX) {
                    Verdict::Accept => hook.translate("INPUT", End::Source),
                    Verdict::Drop => Verdict::Drop,
                }
            });
            if verdict == Verdict::Drop {
                return Arrival::Nowhere("dropped by a rule".to_owned());
            }
            return self.deliver(place, packet, device);
        }
        if route.kind != "unicast" {
            return self.nowhere(
                place,
                Some(device),
                format!("the route says {}", route.kind),
                &packet,
            );
        }
        let forwards = match packet.tuple.to {
            SocketAddr::V4(_) => "net/ipv4/ip_forward",
            SocketAddr::V6(_) => "net/ipv6/conf/all/forwarding",
        };
        // A dump that does not have it says nothing.
        if state.sysctls.contains_key(forwards) && state.sysctl(forwards) == 0 {
            let key = forwards.rsplit('/').next().unwrap_or_default();
            let why = format!("not for this namespace, which does not forward ({key} = 0)");
            return self.nowhere(place, Some(device), why, &packet);
        }
        let devices = (Some(device), Some(route.device.as_str()));
        let verdict = self.at_hook(place, &mut packet, devices, |hook| {
            hook.pass("FORWARD", i32::MIN..i32::MAX)
        });
        if verdict == Verdict::Drop {
            return Arrival::Nowhere("dropped by a rule".to_owned());
        }
        self.leave(place, packet, &route)
    }

    /// Past POSTROUTING and out by the route's device.
    fn leave(&mut self, place: usize, mut packet: Packet, route: &super::state::Route) -> Arrival {
        if !["unicast", "local"].contains(&route.kind.as_str()) {
            return self.nowhere(
                place,
                None,
                format!("the route says {}", route.kind),
                &packet,
            );
        }
        let device = output_device(route).to_owned();
        let devices = (None, Some(device.as_str()));
        let verdict = self.at_hook(place, &mut packet, devices, |hook| {
            let verdict = hook.pass("POSTROUTING", i32::MIN..SOURCES);
            let verdict = match verdict {
                Verdict::Accept => hook.translate("POSTROUTING", End::Source),
                Verdict::Drop => Verdict::Drop,
            };
            match verdict {
                Verdict::Accept => hook.pass("POSTROUTING", SOURCES..i32::MAX),
                Verdict::Drop => Verdict::Drop,
            }
        });
        if verdict == Verdict::Drop {
            return Arrival::Nowhere("dropped by a rule".to_owned());
        }
        if device == "lo" {
            return self.input(place, packet, "lo");
        }
        let state = Arc::clone(&self.world.places[place].state);
        let overlay = state
            .device(&device)
            .and_then(|device| device.overlay.clone());
        if let Some(overlay) = overlay {
            let text = format!(
                "into the tunnel {}: {} id {} remote {} dstport {}",
                state.shown(&device, packet.tuple.to.ip()),
                overlay.kind,
                overlay.vni,
                overlay.remote,
                overlay.port
            );
            self.note(place, Some(&device), Kind::Wrapped, text, &packet);
            // The kernel chooses the source port by a hash of what is inside.
            let from = at(unspecified(overlay.remote), *CHOSEN_PORTS.end());
            let to = at(overlay.remote, overlay.port);
            let mut outer = Packet::new(Tuple { from, to }, Payload::Overlay, packet.mark);
            outer.from_socket = false;
            outer.inner = Some((Box::new(packet), overlay.vni));
            return self.output(place, outer);
        }
        self.note(
            place,
            Some(&device),
            Kind::Transmitted,
            format!("out by {device}"),
            &packet,
        );
        let next = route.via.unwrap_or(packet.tuple.to.ip());
        match self.other_end(place, &device, next) {
            Some((other, device)) => self.input(other, packet.crossed(), &device),
            None => {
                let where_to = format!("by {device} to {next}, where nothing is known from here");
                self.note(place, Some(&device), Kind::Left, where_to.clone(), &packet);
                Arrival::Left(where_to)
            }
        }
    }

    /// Where a veth, or a bridge's port, leads. Indices are not unique among namespaces, so of several the one counts that
    /// has the address of the next hop.
    fn other_end(&self, place: usize, device: &str, next: IpAddr) -> Option<(usize, String)> {
        let state = &self.world.places[place].state;
        let out = state.device(device)?;
        let ports: Vec<&Device> = if out.peer.is_some() {
            vec![out]
        } else {
            let of_bridge = |port: &&Device| port.master.as_deref() == Some(device);
            state.devices.iter().filter(of_bridge).collect()
        };
        let mut found = None;
        for (index, other) in self.world.places.iter().enumerate() {
            for end in &other.state.devices {
                let wired = ports.iter().any(|port| {
                    index != place && end.peer == Some(port.index) && port.peer == Some(end.index)
                });
                if !wired {
                    continue;
                }
                let seen = end.master.clone().unwrap_or_else(|| end.name.clone());
                if other.state.owns(next) {
                    return Some((index, seen));
                }
                found.get_or_insert((index, seen));
            }
        }
        // A port of a bridge that does not have the address is not where the bridge sends it.
        found.filter(|_| out.peer.is_some())
    }

    fn deliver(&mut self, place: usize, mut packet: Packet, device: &str) -> Arrival {
        let state = Arc::clone(&self.world.places[place].state);
        if let Some((inner, vni)) = packet.inner.take() {
            let into = state.devices.iter().find(|device| {
                device.overlay.as_ref().is_some_and(|overlay| {
                    overlay.vni == vni
                        && overlay.port == packet.tuple.to.port()
                        && overlay.remote == packet.tuple.from.ip()
                })
            });
            let Some(into) = into else {
                let why = format!(
                    "no overlay device for id {vni} from {}",
                    packet.tuple.from.ip()
                );
                return self.nowhere(place, Some(device), why, &packet);
            };
            let name = into.name.clone();
            let text = format!(
                "out of the tunnel {}",
                state.shown(&name, inner.tuple.to.ip())
            );
            let mark = packet.mark;
            let mut inner = inner.crossed();
            inner.mark = mark;
            self.note(place, Some(&name), Kind::Unwrapped, text, &inner);
            return self.input(place, inner, &name);
        }
        let to = &self.world.places[place].sockets;
        let open = to
            .iter()
            .any(|socket| socket.local == packet.tuple.to && socket.remote == packet.tuple.from);
        if open {
            self.note(
                place,
                Some(device),
                Kind::Delivered,
                "to its socket".to_owned(),
                &packet,
            );
            return Arrival::Socket(place);
        }
        let port = packet.given_to.unwrap_or(packet.tuple.to.port());
        let at = SocketAddr::new(packet.tuple.to.ip(), port);
        let listens = state.listens(at) && (packet.given_to.is_some() || state.owns(at.ip()));
        if packet.payload == Payload::Syn && listens {
            self.note(
                place,
                Some(device),
                Kind::Delivered,
                format!("accepted on port {port}"),
                &packet,
            );
            return Arrival::Listener(place, port, packet.tuple.reversed());
        }
        let why = match packet.payload {
            Payload::Syn => format!("refused: nobody listens on port {port}"),
            _ => "no socket waits for it: answered with a reset".to_owned(),
        };
        self.nowhere(place, Some(device), why, &packet)
    }
}

/// What is local goes out by loopback, whichever device has the address.
fn output_device(route: &super::state::Route) -> &str {
    if route.kind == "local" {
        "lo"
    } else {
        &route.device
    }
}

fn unspecified(like: IpAddr) -> IpAddr {
    if like.is_ipv4() {
        IpAddr::from([0, 0, 0, 0])
    } else {
        IpAddr::from([0_u16; 8])
    }
}

/// The ends of a packet; ports that the kernel chooses as `*`.
pub(super) fn shown(tuple: Tuple) -> String {
    format!("{} > {}", end(tuple.from), end(tuple.to))
}

/// One end of it.
pub(super) fn end(end: SocketAddr) -> String {
    if CHOSEN_PORTS.contains(&end.port()) {
        match end.ip() {
            IpAddr::V4(ip) => format!("{ip}:*"),
            IpAddr::V6(ip) => format!("[{ip}]:*"),
        }
    } else {
        end.to_string()
    }
}
