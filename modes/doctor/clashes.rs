//! Names and numbers that somebody else uses, too.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

use host_net::plan::{Family, OverlayKind};
use inpod_redirect::facts::PROBES_SET;
use ipnet::{IpNet, Ipv4Net};
use node_redirect::facts::{
    LIVE_PODS_SET, PODS_SET, TABLE_INBOUND, TABLE_STAYS_IN, TUNNEL_IN, TUNNEL_OUT, TUNNEL_PREFIX,
    Tunnel,
};
use shared_proxy::capture::{
    DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT, SAME_NODE_HBONE_PORT,
};
use shared_proxy::telemetry::admin::{ADMIN_PORT, METRICS_PORT, READINESS_PORT};

use super::catalogue::{BOTH, Check, Found, INPOD, NODE};
use super::facts::{Daemon, Device, Facts, NODE_PLAN, PolicyRule};
use super::filters::HOST_MARKS;

/// Preferences of the node capture's rules.
const NODE_RULES: RangeInclusive<u32> = 99..=103;
/// Under this name the in-pod capture's.
const INPOD_PLAN: &str = "host-inpod";
/// Ports of the agent's pages in the node's namespace.
const AGENT_PORTS: [u16; 2] = [8000, 15014];
/// Ports of the proxy, in its own namespace.
const PROXY_PORTS: [u16; 8] = [
    ADMIN_PORT,
    OUTBOUND_PORT,
    INBOUND_PLAINTEXT_PORT,
    HBONE_PORT,
    METRICS_PORT,
    READINESS_PORT,
    DNS_PORT,
    SAME_NODE_HBONE_PORT,
];
/// Ports of the proxy inside every pod.
const POD_PORTS: [u16; 3] = [OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, HBONE_PORT];

/// Routing tables of the node capture on the node.
pub(super) fn node_tables() -> RangeInclusive<u32> {
    TABLE_INBOUND..=TABLE_STAYS_IN
}

pub(super) static CHECKS: [Check; 13] = [
    Check {
        id: "node/rule-clash",
        title: "preferences 99 to 103 of policy routing are free",
        modes: NODE,
        why: "the order of rules decides, and a rule of somebody else between ours changes where captured packets go",
        fix: "let its owner choose another preference than 99 to 103; by hand: ip rule del pref N, or ip -6 rule del pref N",
        look: |facts| {
            let foreign = foreign_rules(facts).filter(|rule| NODE_RULES.contains(&rule.priority));
            foreign
                .map(|rule| Found::fail(called(rule), &rule.text))
                .collect()
        },
    },
    Check {
        id: "node/rule-before",
        title: "no rule of policy routing comes before those of the capture",
        modes: NODE,
        why: "what it leads elsewhere does not reach the proxy",
        fix: "let its owner choose a preference above 103, or --mode inpod",
        look: |facts| {
            let before = foreign_rules(facts)
                .filter(|rule| (1..*NODE_RULES.start()).contains(&rule.priority));
            before
                .map(|rule| Found::warn(called(rule), &rule.text))
                .collect()
        },
    },
    Check {
        id: "node/rule-mark",
        title: "no rule of policy routing selects the capture's marks",
        modes: NODE,
        why: "the marks are bits of one number, and captured packets would follow that rule too",
        fix: "let its owner use other bits than 0x3f8, or --mode inpod",
        look: |facts| {
            let foreign = foreign_rules(facts).filter(|rule| {
                rule.mark
                    .is_some_and(|mark| mark.mask & mark.value & HOST_MARKS != 0)
            });
            foreign
                .map(|rule| Found::fail(called(rule), &rule.text))
                .collect()
        },
    },
    Check {
        id: "node/table-clash",
        title: "routing tables 100 to 103 are free",
        modes: NODE,
        why: "every packet of the node is looked up in table 100, and captured ones in the others",
        fix: "let its owner choose another table; by hand: ip route flush table N, or ip -6 route flush table N",
        look: |facts| {
            let tables = node_tables().flat_map(|table| {
                [(Family::V4, ""), (Family::V6, BY_IPV6)].map(|family| (table, family))
            });
            let clash = |(table, (family, suffix)): (u32, (Family, &str))| {
                let mut foreign = facts.routes.iter().filter(|route| {
                    let of_family = route.dst.addr().is_ipv4() == family.is_v4();
                    route.table == table && !route.ours && of_family && facts.may_capture(family)
                });
                let first = foreign.next()?;
                Some(Found::fail(format!("{table}{suffix}"), &first.text))
            };
            tables.filter_map(clash).collect()
        },
    },
    Check {
        id: "node/device-clash",
        title: "istioin and istioout are free, or ours",
        modes: NODE,
        why: "the tunnels have these names, which other meshes use too, and what is somebody else's is never changed",
        fix: "remove its owner; by hand: ip link del OBJECT",
        look: |facts| {
            [TUNNEL_IN, TUNNEL_OUT]
                .iter()
                .filter_map(|tunnel| device_clash(facts, tunnel))
                .collect()
        },
    },
    Check {
        id: "node/vni-clash",
        title: "tunnel networks 1000 and 1001 are free",
        modes: NODE,
        why: "the kernel refuses a second device of the same network, port and kind",
        fix: "let the owner of OBJECT choose another network identifier or port",
        look: |facts| {
            tunnels(facts, |ours, device, facts| {
                (!device.0.external
                    && device.0.vni == ours.vni
                    && device.0.port == facts.overlay_port())
                .then(|| {
                    Found::fail(
                        &device.1.name,
                        format!(
                            "{} id {} dstport {}",
                            device.0.kind, ours.vni, device.0.port
                        ),
                    )
                })
            })
        },
    },
    Check {
        id: "node/overlay-port",
        title: "the UDP port of the tunnels is free (6081, or that of --geneve-port)",
        modes: NODE,
        why: "the kernel refuses a tunnel on a port that a device with parameters in every packet (OVN, Cilium) or a program has",
        fix: "ambidex agent --geneve-port PORT with one that OBJECT does not use, or --mode inpod",
        look: overlay_port,
    },
    Check {
        id: "node/address-clash",
        title: "192.168.126.0/30 and 192.168.127.0/30 are free",
        modes: NODE,
        why: "the ends of the tunnels have these addresses",
        fix: "renumber OBJECT",
        look: address_clash,
    },
    Check {
        id: "node/set-clash",
        title: "sets of the node capture are free, or ours",
        modes: NODE,
        why: "a set of another kind cannot hold the captured pods, and one of the same kind is another mesh's",
        fix: "remove its owner; by hand: ipset destroy OBJECT",
        look: |facts| {
            set_clash(
                facts,
                NODE_PLAN,
                &[(PODS_SET, true), (LIVE_PODS_SET, false)],
            )
        },
    },
    Check {
        id: "inpod/set-clash",
        title: "the set of the in-pod capture is free, or ours",
        modes: INPOD,
        why: "a set of another kind cannot hold the captured pods, and one of the same kind is another mesh's",
        fix: "remove its owner; by hand: ipset destroy OBJECT",
        look: |facts| set_clash(facts, INPOD_PLAN, &[(PROBES_SET, true)]),
    },
    Check {
        id: "host/agent-ports",
        title: "TCP ports 8000 and 15014 are free for the agent",
        modes: BOTH,
        why: "the agent has its health and metrics pages there",
        fix: "ambidex agent --health ADDRESS:PORT --metrics ADDRESS:PORT, or end what listens on OBJECT",
        look: |facts| match facts.agent {
            Some(Daemon::Absent) => taken(facts, &AGENT_PORTS, |port| {
                Found::fail(
                    port.to_string(),
                    "somebody listens there, and there is no agent",
                )
            }),
            _ => Vec::new(),
        },
    },
    Check {
        id: "host/proxy-ports",
        title: "the proxy's TCP ports are free in this namespace",
        modes: BOTH,
        why: "a proxy that is started here, and not in a namespace of its own, cannot listen on them",
        fix: "end what listens on OBJECT, or give the proxy a network namespace of its own",
        look: |facts| {
            if facts
                .proxies
                .values()
                .any(|proxy| *proxy == Daemon::Answers)
            {
                return Vec::new();
            }
            taken(facts, &PROXY_PORTS, |port| {
                Found::warn(port.to_string(), "somebody listens there")
            })
        },
    },
    Check {
        id: "inpod/pod-ports",
        title: "ports 15001, 15006 and 15008 are free in pods",
        modes: INPOD,
        why: "the proxy listens on them inside the pod, so this one cannot be captured",
        fix: "let the application of OBJECT listen elsewhere, or capture it with --mode node",
        look: |facts| {
            let pods = facts.namespaces.iter().filter(|pod| !pod.captured);
            pods.filter_map(|pod| {
                let ports: Vec<String> = POD_PORTS
                    .iter()
                    .filter(|port| pod.ports.contains(port))
                    .map(ToString::to_string)
                    .collect();
                (!ports.is_empty())
                    .then(|| Found::warn(&pod.name, format!("listens on {}", ports.join(", "))))
            })
            .collect()
        },
    },
];

/// Behind a number that exists in both families.
const BY_IPV6: &str = " of IPv6";

/// Rules of policy routing that somebody else made, of the families that the node may capture.
fn foreign_rules(facts: &Facts) -> impl Iterator<Item = &PolicyRule> {
    let matters = |rule: &&PolicyRule| !rule.ours && facts.may_capture(rule.family);
    facts.rules.iter().filter(matters)
}

fn called(rule: &PolicyRule) -> String {
    match rule.family {
        Family::V4 => rule.priority.to_string(),
        Family::V6 => format!("{}{BY_IPV6}", rule.priority),
    }
}

fn taken(facts: &Facts, ports: &[u16], found: impl Fn(u16) -> Found) -> Vec<Found> {
    let is_taken = |port: &&u16| {
        facts
            .listeners
            .iter()
            .any(|listener| listener.port() == **port)
    };
    ports
        .iter()
        .filter(is_taken)
        .map(|port| found(*port))
        .collect()
}

fn device_clash(facts: &Facts, tunnel: &Tunnel) -> Option<Found> {
    let device = facts.device(tunnel.host)?;
    let fits = device.overlay.as_ref().is_some_and(|overlay| {
        overlay.vni == tunnel.vni && !overlay.external && overlay.port == facts.overlay_port()
    });
    if !fits {
        let kind = device.kind.as_deref().unwrap_or("physical");
        return Some(Found::fail(
            tunnel.host,
            format!("is a device of kind {kind}, and no tunnel of ours"),
        ));
    }
    let known = facts.state.is_some() && !facts.made(NODE_PLAN);
    known.then(|| {
        Found::fail(
            tunnel.host,
            "looks like ours, but was not made by the agent of this node",
        )
    })
}

/// Foreign tunnel devices, each with its parameters.
fn foreign_tunnels(facts: &Facts) -> impl Iterator<Item = (&super::facts::Tunnel, &Device)> {
    let named = |device: &&Device| {
        ![
            TUNNEL_IN.host,
            TUNNEL_OUT.host,
            TUNNEL_IN.proxy,
            TUNNEL_OUT.proxy,
        ]
        .contains(&device.name.as_str())
    };
    facts
        .devices
        .iter()
        .filter(named)
        .filter_map(|device| Some((device.overlay.as_ref()?, device)))
}

fn tunnels(
    facts: &Facts,
    clash: impl Fn(&Tunnel, (&super::facts::Tunnel, &Device), &Facts) -> Option<Found>,
) -> Vec<Found> {
    let pairs =
        foreign_tunnels(facts).flat_map(|device| [(TUNNEL_IN, device), (TUNNEL_OUT, device)]);
    pairs
        .filter_map(|(ours, device)| clash(&ours, device, facts))
        .collect()
}

fn overlay_port(facts: &Facts) -> Vec<Found> {
    let port = facts.overlay_port();
    let on_port: Vec<_> = foreign_tunnels(facts)
        .filter(|(tunnel, _)| tunnel.port == port)
        .collect();
    let external = on_port.iter().filter(|(tunnel, _)| tunnel.external);
    let mut found: Vec<Found> = external
        .map(|(tunnel, device)| {
            let kind = match tunnel.kind {
                OverlayKind::Geneve => "geneve",
                OverlayKind::Vxlan => "vxlan",
            };
            Found::fail(
                &device.name,
                format!("is {kind} with parameters in every packet on port {port}"),
            )
        })
        .collect();
    // A tunnel device has its port's socket, too.
    let of_a_device = facts.devices.iter().any(|device| {
        device
            .overlay
            .as_ref()
            .is_some_and(|tunnel| tunnel.port == port)
    });
    if facts.udp_ports.contains(&port) && !of_a_device {
        found.push(Found::fail(format!("UDP port {port}"), "a program has it"));
    }
    found
}

fn address_clash(facts: &Facts) -> Vec<Found> {
    let mut found = Vec::new();
    for tunnel in [TUNNEL_IN, TUNNEL_OUT] {
        let Ok(network) = Ipv4Net::new(tunnel.host_addr, TUNNEL_PREFIX) else {
            continue;
        };
        let network = network.trunc();
        let overlaps = |dst: &IpNet| match dst {
            // A network that has ours within it leads elsewhere only what ours do not take.
            IpNet::V4(dst) => network.contains(&dst.addr()) && dst.addr() != Ipv4Addr::UNSPECIFIED,
            IpNet::V6(_) => false,
        };
        let own = |dev: &str| dev == tunnel.host || dev == tunnel.proxy;
        for assigned in &facts.addresses {
            let same_net = IpNet::V4(network).contains(&assigned.addr.addr())
                || assigned.addr.contains(&IpAddr::V4(tunnel.host_addr));
            if same_net && !own(&assigned.dev) {
                found.push(Found::fail(
                    &assigned.dev,
                    format!("has address {}", assigned.addr),
                ));
            }
        }
        let routes = facts
            .routes
            .iter()
            .filter(|route| !route.ours && overlaps(&route.dst));
        for route in routes.filter(|route| !route.dev.as_deref().is_some_and(own)) {
            let known = found
                .iter()
                .any(|one| Some(one.object.as_str()) == route.dev.as_deref());
            if !known {
                found.push(Found::fail(route.dst.to_string(), &route.text));
            }
        }
    }
    found
}

fn set_clash(facts: &Facts, plan: &str, sets: &[(&str, bool)]) -> Vec<Found> {
    let unknown = facts.state.is_some() && !facts.made(plan);
    let wrong = |(name, comments): &(&str, bool)| {
        let set = facts.sets.iter().find(|set| set.name == *name)?;
        if !set.plain || set.comments != *comments {
            return Some(Found::fail(*name, &set.definition));
        }
        unknown.then(|| {
            Found::fail(
                *name,
                format!(
                    "looks like ours with {} entries, but was not made by the agent of this node",
                    set.members.len()
                ),
            )
        })
    };
    sets.iter().filter_map(wrong).collect()
}

/// Plans of whole captures on the node that the journal may have.
pub(super) const HOST_PLANS: [&str; 2] = [NODE_PLAN, INPOD_PLAN];
