//! Running pods change their capture where the tunnels are geneve's, and their connections do not notice.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lab::topology::{LabSpec, Mode, NodeFlow, Overlay};

use crate::suite::{Suite, ambidex_in, build};
use crate::talk::{Echo, PORT, Talk, assert_alive};

/// The pod whose capture changes: the node's at first.
const SUBJECT: &str = "pod1-1";
/// Of both captures, on both nodes, and one without any.
const PEERS: [&str; 4] = ["plain1", "pod1-2", "pod2-1", "pod2-2"];
const CHANGES: [&str; 3] = ["inpod", "node", "inpod"];
/// Long-lived connections before the first change, half of them idle.
const CONNECTIONS: usize = 20;

/// Twenty connections, opened before the first change, and some after each: all of them say and hear every byte.
pub fn open_connections_go_on(suite: &mut Suite) -> Result<()> {
    let spec = LabSpec {
        node_flow: NodeFlow::Hybrid,
        overlay: Overlay::Geneve,
        ..LabSpec::new("gsw", Mode::Mixed, suite.programs())
    };
    let lab = build(&spec).map_err(anyhow::Error::msg)?;
    let at = |name: &str| -> Result<SocketAddr> {
        let topology = lab.topology();
        let (_, pod) = topology.pod(name).with_context(|| format!("no {name}"))?;
        Ok((pod.ip, PORT).into())
    };
    let _servers: Vec<Echo> = [&[SUBJECT], &PEERS[..]]
        .concat()
        .iter()
        .map(|pod| Echo::start(&lab, pod))
        .collect();
    let subject = at(SUBJECT)?;
    let open = |number: usize| -> Result<Talk> {
        let peer = PEERS[number / 2 % PEERS.len()];
        let idle = (number / (2 * PEERS.len())).is_multiple_of(2);
        Ok(if number.is_multiple_of(2) {
            Talk::open(&lab, SUBJECT, at(peer)?, idle)
        } else {
            Talk::open(&lab, peer, subject, idle)
        })
    };
    let mut talks: Vec<Talk> = (0..CONNECTIONS).map(open).collect::<Result<_>>()?;
    let name = {
        let topology = lab.topology();
        let (_, pod) = topology.pod(SUBJECT).context(SUBJECT)?;
        format!("{}/{}", pod.namespace, pod.name)
    };
    for to in CHANGES {
        let arguments = ["mode", "set", &name, to, "--drain", "10m"];
        let said = ambidex_in(&lab, "node1", &arguments)?;
        let told = format!("{}{}", said.stdout, said.stderr);
        println!("{}", told.trim_end());
        said.success("mode set").context(told)?;
        assert_alive(&format!("captured by {to}"), &talks);
        talks.extend((0..2 * PEERS.len()).map(open).collect::<Result<Vec<_>>>()?);
    }
    assert_alive("at the end", &talks);
    ensure!(talks.len() == CONNECTIONS + CHANGES.len() * 2 * PEERS.len());
    drop(talks);
    lab.down()
}
