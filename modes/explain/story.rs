//! A connection from its client to its application: the legs between proxies, and the decisions between legs.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use shared_proxy::capture::{
    HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT, SAME_NODE_HBONE_PORT,
};

use super::compare;
use super::hop::Hop;
use super::mesh::{Decision, Mesh, Way};
use super::packet::{Packet, Payload, Tuple};
use super::world::{Arrival, CHOSEN_PORTS, SocketEnd, World, end};
use crate::options::Capture;

/// Client, two proxies and application make three legs; one more shows where a loop begins.
const MOST_LEGS: usize = 5;

/// A node, as far as it is known.
#[derive(Debug, Clone)]
pub struct Node {
    /// Index of its own namespace.
    pub place: usize,
    /// Index of its proxy's, where one captures by the node.
    pub proxy: Option<usize>,
    /// Whether connections stay in the overlay for life.
    pub tunnel: bool,
    /// What its proxy knows.
    pub mesh: Option<Mesh>,
}

/// A pod, as far as it is known.
#[derive(Debug, Clone)]
pub struct Pod {
    /// `namespace/name`.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Index of its node among the nodes.
    pub node: usize,
    /// Index of its namespace, if it could be opened.
    pub place: Option<usize>,
    /// How it is captured.
    pub capture: Option<Capture>,
    /// In which style, if in the pod.
    pub style: &'static str,
}

/// All that a connection is followed through.
#[derive(Debug, Clone)]
pub struct Stage {
    /// The namespaces themselves, as the places of both worlds.
    pub namespaces: Vec<host_net::netns::Netns>,
    /// The state of the kernel.
    pub live: World,
    /// The same as the plans have it.
    pub planned: World,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// Pods.
    pub pods: Vec<Pod>,
}

/// One packet of a leg.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Walk {
    /// `first` (SYN), `answer` (SYN-ACK), `later` (data from the one who began).
    pub phase: String,
    /// Its steps.
    pub hops: Vec<Hop>,
    /// Where it ended.
    pub ends: String,
}

/// A TCP connection between two sockets, and what the one that accepts it makes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Leg {
    /// Whose connection it is.
    pub title: String,
    /// Its ends as the client means them.
    pub connection: String,
    /// Its packets.
    pub walks: Vec<Walk>,
    /// What accepted it: `proxy:15001`, `application:8080`; none when nobody did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted_by: Option<String>,
    /// What the proxy decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
}

impl Leg {
    /// Its line above what is told of it; legs are counted from 0.
    pub(crate) fn heading(&self, number: usize) -> String {
        format!("{}  {}   [{}]", number + 1, self.title, self.connection)
    }
}

/// What begins a leg.
#[derive(Debug, Clone)]
struct Start {
    title: String,
    place: usize,
    from: SocketAddr,
    to: SocketAddr,
    mark: u32,
    transparent: bool,
    /// What is asked for in the tunnel that this leg is.
    asked: Option<SocketAddr>,
    /// Index of the leg.
    number: u16,
}

/// Who accepts at a place and port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Outbound,
    Plaintext,
    Tunnel,
    Application,
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Question {
    /// Index of the client's namespace.
    pub place: usize,
    /// Address of the client; unspecified for whatever its routes choose.
    pub client: IpAddr,
    /// Who it is, for the title.
    pub who: String,
    /// Where to.
    pub to: SocketAddr,
    /// The endpoint to show where a service has several.
    pub endpoint: Option<SocketAddr>,
    /// Ports that the kernel chose for those who begin the legs, as far as they are known.
    pub ports: Vec<Option<u16>>,
}

impl Question {
    fn port(&self, leg: u16) -> u16 {
        let known = self.ports.get(usize::from(leg)).copied().flatten();
        known.unwrap_or(CHOSEN_PORTS.start() + leg)
    }
}

impl Stage {
    /// How the pod of a namespace is captured, in words.
    pub fn capture_of(&self, place: usize) -> Option<String> {
        let pod = self.pods.iter().find(|pod| pod.place == Some(place))?;
        Some(match pod.capture? {
            Capture::Node if self.nodes.get(pod.node)?.tunnel => "node, tunnel".to_owned(),
            Capture::Node => "node, hybrid".to_owned(),
            Capture::Inpod => format!("inpod, {}", pod.style),
        })
    }

    /// Follows a connection. Differences from the plans are flagged where they begin.
    pub fn follow(&self, question: &Question) -> Vec<Leg> {
        let mut live = self.live.clone();
        let mut planned = self.planned.clone();
        let mut legs = self.legs(&mut live, question);
        let expected = self.legs(&mut planned, question);
        for (leg, expected) in legs.iter_mut().zip(&expected) {
            let mut walks = leg.walks.iter_mut().zip(&expected.walks);
            let differs = walks.any(|(walk, expected)| {
                compare::flag(&mut walk.hops, &expected.hops, &live, &planned);
                walk.hops.iter().any(|hop| hop.differs.is_some())
            });
            // What follows is another connection than the planned one.
            if differs {
                break;
            }
        }
        legs
    }

    fn legs(&self, world: &mut World, question: &Question) -> Vec<Leg> {
        let mut legs = Vec::new();
        let mut start = Some(Start {
            title: format!("{} → {}", question.who, question.to),
            place: question.place,
            from: SocketAddr::new(question.client, question.port(0)),
            to: question.to,
            mark: 0,
            transparent: false,
            asked: None,
            number: 0,
        });
        while let Some(begun) = start.take()
            && legs.len() < MOST_LEGS
        {
            let (mut leg, arrival) = self.leg(world, &begun);
            if let Arrival::Listener(place, port, tuple) = arrival {
                let role = self.role(place, port);
                leg.accepted_by = Some(match role {
                    Role::Application => format!("application:{port}"),
                    _ => format!("proxy:{port}"),
                });
                let (decision, next) = self.decide(world, &begun, place, role, tuple, question);
                leg.decision = decision;
                start = next;
            }
            legs.push(leg);
        }
        legs
    }

    fn role(&self, place: usize, port: u16) -> Role {
        let of_node = self.nodes.iter().any(|node| node.proxy == Some(place));
        let of_pod = self
            .pods
            .iter()
            .any(|pod| pod.place == Some(place) && pod.capture == Some(Capture::Inpod));
        match port {
            _ if !of_node && !of_pod => Role::Application,
            OUTBOUND_PORT => Role::Outbound,
            INBOUND_PLAINTEXT_PORT => Role::Plaintext,
            HBONE_PORT | SAME_NODE_HBONE_PORT => Role::Tunnel,
            _ => Role::Application,
        }
    }

    /// The mark of a connection that a listener accepted: that of the listener.
    fn listener_mark(&self, place: usize, port: u16) -> u32 {
        if let Some(node) = self.nodes.iter().find(|node| node.proxy == Some(place)) {
            return match port {
                SAME_NODE_HBONE_PORT => node_redirect::facts::MARK_SAME_NODE.value,
                OUTBOUND_PORT if node.tunnel => node_redirect::facts::MARK_SOCKET_OUTBOUND.value,
                INBOUND_PLAINTEXT_PORT | HBONE_PORT if node.tunnel => {
                    node_redirect::facts::MARK_SOCKET_INBOUND.value
                }
                _ => 0,
            };
        }
        match self.role(place, port) {
            Role::Application => 0,
            _ => inpod_redirect::facts::MARK_PROXY.value,
        }
    }

    /// The first packet of a leg, its answer, and one more.
    fn leg(&self, world: &mut World, start: &Start) -> (Leg, Arrival) {
        let mut leg = Leg {
            title: start.title.clone(),
            connection: String::new(),
            walks: Vec::new(),
            accepted_by: None,
            decision: None,
        };
        let mut from = start.from;
        if from.ip().is_unspecified() {
            let state = &world.places[start.place].state;
            let route = super::routing::look_up(state, start.to.ip(), start.mark).route;
            let own = route.and_then(|route| {
                let of_device = state.address_of(&route.device, start.to.ip());
                route.source.or(of_device)
            });
            from.set_ip(own.unwrap_or(from.ip()));
        }
        let meant = Tuple { from, to: start.to };
        leg.connection = super::world::shown(meant);
        world.places[start.place].sockets.push(SocketEnd {
            local: from,
            remote: start.to,
            transparent: start.transparent,
        });
        let first = Packet::new(meant, Payload::Syn, start.mark);
        let arrival = walk(world, start.place, first, "first", &mut leg);
        if let Arrival::Listener(place, port, tuple) = &arrival {
            world.places[*place].sockets.push(SocketEnd {
                local: tuple.from,
                remote: tuple.to,
                transparent: true,
            });
            let mark = self.listener_mark(*place, *port);
            let answer = Packet::new(*tuple, Payload::SynAck, mark);
            let answered = walk(world, *place, answer, "answer", &mut leg);
            if matches!(answered, Arrival::Socket(_)) {
                let later = Packet::new(meant, Payload::Data, start.mark);
                walk(world, start.place, later, "later", &mut leg);
            }
        }
        (leg, arrival)
    }

    /// What whoever accepted a leg does next.
    fn decide(
        &self,
        world: &World,
        begun: &Start,
        place: usize,
        role: Role,
        accepted: Tuple,
        question: &Question,
    ) -> (Option<Decision>, Option<Start>) {
        let by_pod = self.pods.iter().find(|pod| pod.place == Some(place));
        let Some(node) = self
            .nodes
            .iter()
            .find(|node| node.proxy == Some(place))
            .or_else(|| self.nodes.get(by_pod?.node))
        else {
            return (None, None);
        };
        let unknown = || {
            Decision::new(
                Way::Unknown,
                "its proxy does not say what it knows of the mesh".to_owned(),
            )
        };
        let own_node = |ip: IpAddr| world.places[node.place].state.owns(ip);
        // The proxy never speaks with an address of its own node: the answer would be the node's.
        let speaks_as = |ip: IpAddr| match node.proxy == Some(place) && own_node(ip) {
            true => IpAddr::from([0, 0, 0, 0]),
            false => ip,
        };
        let in_pod = node.proxy != Some(place);
        let pod_mark = if in_pod {
            inpod_redirect::facts::MARK_PROXY.value
        } else {
            0
        };
        let number = begun.number + 1;
        let port = question.port(number);
        // The accepted connection's ends, seen from the proxy: where it was meant for, and from whom.
        let (meant, client) = (begun.to, accepted.to);
        match role {
            Role::Application => (None, None),
            Role::Outbound => {
                let Some(mesh) = &node.mesh else {
                    return (Some(unknown()), None);
                };
                let outbound = mesh.outbound(client, meant, question.endpoint);
                let mut decision = outbound.decision;
                let Some((dialled, target)) = outbound.next else {
                    return (Some(decision), None);
                };
                let near = self.pods.iter().any(|pod| {
                    pod.addresses.contains(&dialled.ip())
                        && pod.capture == Some(Capture::Node)
                        && self
                            .nodes
                            .get(pod.node)
                            .is_some_and(|it| it.place == node.place)
                });
                let near = near && !in_pod && decision.way == Way::Hbone;
                let loops = world.places[place]
                    .state
                    .listeners
                    .iter()
                    .any(|it| it.port() == SAME_NODE_HBONE_PORT);
                let mut next = Start {
                    title: format!("proxy → {dialled}"),
                    place,
                    from: SocketAddr::new(speaks_as(client.ip()), port),
                    to: dialled,
                    mark: pod_mark,
                    transparent: true,
                    asked: (decision.way == Way::Hbone).then_some(target),
                    number,
                };
                if near && loops {
                    next.mark = node_redirect::facts::MARK_SAME_NODE.value;
                    next.from.set_ip(client.ip());
                    decision
                        .text
                        .push_str("; both pods are on this node: looped on lo");
                } else if near {
                    decision.way = Way::HandOver;
                    decision.text = format!("handed over inside the proxy, on to {target}");
                    next.to = target;
                    next.title = format!("proxy → {target}");
                    next.asked = None;
                }
                (Some(decision), Some(next))
            }
            Role::Plaintext | Role::Tunnel => {
                let target = begun
                    .asked
                    .filter(|_| role == Role::Tunnel)
                    .unwrap_or(accepted.from);
                // REDIRECT shows the listener's own address; the original destination is the one that was meant.
                let target = if role == Role::Plaintext {
                    original(world, place, accepted)
                } else {
                    target
                };
                let decision = match &node.mesh {
                    Some(mesh) => mesh.inbound(client, target, role == Role::Tunnel),
                    None => unknown(),
                };
                if decision.way == Way::Refused {
                    return (Some(decision), None);
                }
                let next = Start {
                    title: format!("proxy → application {target}"),
                    place,
                    from: SocketAddr::new(speaks_as(client.ip()), port),
                    to: target,
                    mark: pod_mark,
                    transparent: true,
                    asked: None,
                    number,
                };
                (Some(decision), Some(next))
            }
        }
    }
}

/// What connection tracking says that an accepted connection was meant for.
fn original(world: &World, place: usize, accepted: Tuple) -> SocketAddr {
    let entries = &world.places[place].tracking.entries;
    let meant = entries
        .iter()
        .find(|entry| entry.expected == accepted && entry.protocol == "tcp");
    meant.map_or(accepted.from, |entry| entry.original.to)
}

fn walk(world: &mut World, place: usize, packet: Packet, phase: &str, leg: &mut Leg) -> Arrival {
    let (hops, arrival) = world.send(place, packet);
    let ends = match &arrival {
        Arrival::Socket(place) => format!("at its socket in {}", world.places[*place].name),
        Arrival::Listener(place, port, tuple) => format!(
            "accepted on port {port} in {} as {}",
            world.places[*place].name,
            end(tuple.from)
        ),
        Arrival::Nowhere(why) | Arrival::Left(why) => why.clone(),
    };
    leg.walks.push(Walk {
        phase: phase.to_owned(),
        hops,
        ends,
    });
    arrival
}
