//! The four flows: every byte compared, the client's address kept, and the share that went through geneve.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use lab::bench::proof::{Counters, counters};
use lab::standing::ScopedLab;
use lab::topology::{APPLICATION_PORT, NodeFlow, SERVICE_PORT, SERVICE_VIP};
use lab::traffic::{Check, ClientOptions};

use crate::suite::{COMMAND_LIMIT, Suite};

/// Payload in each direction of one flow.
const PAYLOAD: u64 = 4 << 20;
/// Time for one check. A machine with one CPU encrypts and decrypts for both ends.
const LIMIT_MILLIS: u64 = 20_000;

/// Connections of one flow: one to learn the address, one for the payload.
const CONNECTIONS: u64 = 2;

/// A tunnel of one node.
#[derive(Clone, Copy)]
struct Tunnel {
    node: u8,
    device: &'static str,
}

const OUT_1: Tunnel = tunnel(1, "istioout");
const IN_1: Tunnel = tunnel(1, "istioin");
const OUT_2: Tunnel = tunnel(2, "istioout");
const IN_2: Tunnel = tunnel(2, "istioin");

const fn tunnel(node: u8, device: &'static str) -> Tunnel {
    Tunnel { node, device }
}

/// Who speaks to whom, and what of geneve is on the way.
struct Flow {
    client: &'static str,
    to: To,
    /// Tunnels that carry it, and at least how many connections there.
    through: &'static [(Tunnel, u64)],
    /// Tunnels that carry nothing of it.
    past: &'static [Tunnel],
}

enum To {
    Pod(&'static str),
    Service,
}

const FLOWS: [Flow; 4] = [
    // Between the proxies it is one connection that carries all.
    Flow {
        client: "pod1-1",
        to: To::Pod("pod2-1"),
        through: &[(OUT_1, CONNECTIONS), (IN_2, 1)],
        past: &[IN_1, OUT_2],
    },
    // One of the service's pods is on the own node, one on the other.
    Flow {
        client: "pod1-1",
        to: To::Service,
        through: &[(OUT_1, CONNECTIONS)],
        past: &[IN_1, OUT_2],
    },
    // From proxy to proxy on the loopback of the one that they are.
    Flow {
        client: "pod1-1",
        to: To::Pod("pod1-2"),
        through: &[(OUT_1, CONNECTIONS)],
        past: &[IN_1, OUT_2, IN_2],
    },
    // Nobody's on its own node, in the clear to the other one, and through the proxy there.
    Flow {
        client: "plain1",
        to: To::Pod("pod2-1"),
        through: &[(IN_2, CONNECTIONS)],
        past: &[OUT_1, IN_1, OUT_2],
    },
];

/// All four, and what each of them took through the tunnels.
pub fn four(suite: &mut Suite, flow: NodeFlow) -> Result<()> {
    let lab = suite.lab(flow)?;
    let _servers = ["pod1-2", "pod2-1"]
        .map(|pod| lab.serve(pod, APPLICATION_PORT))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    for case in &FLOWS {
        let to = case.address(lab)?;
        one(lab, flow, case, to).with_context(|| format!("{} → {to}", case.client))?;
    }
    Ok(())
}

fn one(lab: &ScopedLab, flow: NodeFlow, case: &Flow, to: SocketAddr) -> Result<()> {
    let tunnels = || {
        let through = case.through.iter().map(|(tunnel, _)| tunnel);
        through.chain(case.past)
    };
    let read = || {
        tunnels()
            .map(|tunnel| tunnel.usage(lab))
            .collect::<Result<Vec<_>>>()
    };
    let exchange = Check::Exchange {
        up: PAYLOAD,
        down: PAYLOAD,
    };

    let before = read()?;
    let seen = check(lab, case.client, to, Check::Who)?.seen;
    let bytes = check(lab, case.client, to, exchange)?.bytes;
    let after = read()?;

    let client = pod_address(lab, case.client)?;
    ensure!(
        seen.map(|seen| seen.ip()) == Some(client),
        "the server sees {seen:?} and not {client}"
    );
    ensure!(bytes == 2 * PAYLOAD, "{bytes} bytes were compared");
    let connections = case.through.iter().map(|(_, connections)| *connections);
    let connections = connections.chain(case.past.iter().map(|_| 0));
    for (((tunnel, from), until), connections) in tunnels().zip(before).zip(after).zip(connections)
    {
        let share = |from: u64, until: u64| (until - from) as f64 / PAYLOAD as f64;
        let shares = [
            share(from.device.tx_bytes, until.device.tx_bytes),
            share(from.device.rx_bytes, until.device.rx_bytes),
        ];
        let captured = until.captured - from.captured;
        let found = format!(
            "{} of node{}: {captured} packets of TCP to the proxy; {:.2} % of the payload there, {:.2} % back",
            tunnel.device,
            tunnel.node,
            shares[0] * 100.0,
            shares[1] * 100.0
        );
        println!("{} → {to}: {found}", case.client);
        ensure!(
            captured >= connections,
            "{found}: want each connection's first packet"
        );
        // With the flow `tunnel` there may be the last packets of flows before.
        if connections == 0 && flow == NodeFlow::Hybrid {
            ensure!(captured == 0, "{found}: want nothing");
        }
        let (least, most) = match flow {
            NodeFlow::Tunnel if connections > 0 => (0.95, f64::INFINITY),
            _ => (0.0, 0.01),
        };
        ensure!(
            shares.iter().all(|share| (least..=most).contains(share)),
            "{found}: want {:.0} % to {:.0} %",
            least * 100.0,
            most * 100.0
        );
    }
    Ok(())
}

/// What went through a tunnel.
struct Usage {
    /// On the node's device; there are always some packets of neighbour discovery, too.
    device: Counters,
    /// Packets of TCP that the proxy's TPROXY rules took out of it.
    captured: u64,
}

impl Tunnel {
    fn usage(self, lab: &ScopedLab) -> Result<Usage> {
        let Self { node, device } = self;
        let command = ["iptables-legacy-save", "-c", "-t", "mangle"];
        let rules = lab
            .run(&format!("proxy{node}"), &command, COMMAND_LIMIT)?
            .success("iptables-legacy-save")?;
        let input = format!("-i p{device} ");
        let of_this = |line: &&str| line.contains(&input) && line.contains("-j TPROXY");
        let packets = |line: &str| {
            line.strip_prefix('[')?
                .split(':')
                .next()?
                .parse::<u64>()
                .ok()
        };
        let captured: Option<Vec<u64>> =
            rules.stdout.lines().filter(of_this).map(packets).collect();
        let captured = captured.filter(|rules| !rules.is_empty());
        Ok(Usage {
            device: counters(&lab.netns(&format!("node{node}"))?, device)?,
            captured: captured
                .with_context(|| format!("no counters of TPROXY: {}", rules.stdout))?
                .iter()
                .sum(),
        })
    }
}

fn check(
    lab: &ScopedLab,
    client: &str,
    to: SocketAddr,
    check: Check,
) -> Result<lab::traffic::Outcome> {
    let options = ClientOptions {
        to,
        timeout_ms: LIMIT_MILLIS,
        from_port: None,
        check,
    };
    let outcome = lab.traffic(client, &options)?;
    ensure!(
        outcome.ok,
        "{:?}: {}",
        outcome.check,
        outcome.error.as_deref().unwrap_or("no reason given")
    );
    Ok(outcome)
}

fn pod_address(lab: &ScopedLab, name: &str) -> Result<IpAddr> {
    let topology = lab.topology();
    let (_, pod) = topology.pod(name).with_context(|| format!("no {name}"))?;
    Ok(IpAddr::V4(pod.ip))
}

impl Flow {
    fn address(&self, lab: &ScopedLab) -> Result<SocketAddr> {
        Ok(match self.to {
            To::Pod(name) => SocketAddr::new(pod_address(lab, name)?, APPLICATION_PORT),
            To::Service => SocketAddr::new(IpAddr::V4(SERVICE_VIP), SERVICE_PORT),
        })
    }
}
