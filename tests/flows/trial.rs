//! One capture, flow by flow.

use std::net::SocketAddr;

use lab::traffic::Check;
use serde::Serialize;

use super::column::Column;
use super::ground::{Ground, IMPATIENCE, PATIENCE, lab};
use super::packets::{datagrams, ping};
use super::rows::{Act, GATEWAY, GUEST, GUESTED, Outcome, Path, ROWS, Row, Seen, To, Wire};
use crate::harness::wire::Tap;

/// The link between the nodes, while it is small.
const SMALL_MTU: u16 = 1400;
const FULL_MTU: u16 = 1500;
/// Bytes each way of a flow over it.
const BULK: u64 = 300_000;

/// A flow in a capture.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    /// The flow.
    pub flow: &'static str,
    /// What became of it.
    pub works: bool,
    /// Whom the server saw, if it said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seen: Option<String>,
    /// Which proxies had a part in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Whether it was readable between the nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wire: Option<String>,
    /// Why it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<&'static str>,
    /// What is not as it should be.
    #[serde(skip)]
    wrong: Vec<String>,
    /// What to look for on the link between the nodes.
    #[serde(skip)]
    marker: Option<String>,
}

impl Cell {
    /// What is not as it should be.
    pub fn wrong(&self, column: &Column) -> Option<String> {
        let named = column.named();
        (!self.wrong.is_empty()).then(|| {
            format!(
                "{}, {}, {}: {}: {}",
                named.capture,
                named.cni,
                named.family,
                self.flow,
                self.wrong.join("; ")
            )
        })
    }
}

/// All flows in one capture.
pub fn try_all(column: &Column) -> Vec<Cell> {
    let scene = lab(column);
    let ground = Ground::prepare(&scene, column);
    let mut taps = Some([
        scene.tap("node1", "eth0", ""),
        scene.tap("node1", &scene.pod("pod1-1").veth, ""),
    ]);
    let mut cells: Vec<Cell> = Vec::new();
    let mut proxy_killed = false;
    for row in ROWS {
        if matches!(row.act, Act::Bulk(..)) && taps.is_some() {
            look_for_markers(column, &mut cells, taps.take().unwrap());
            ground.uplink_mtu(SMALL_MTU);
        }
        if matches!(row.act, Act::Proxyless(..)) && !proxy_killed {
            ground.uplink_mtu(FULL_MTU);
            ground.kill_proxy();
            proxy_killed = true;
        }
        cells.push(attempt(&ground, column, row));
    }
    cells
}

fn attempt(ground: &Ground<'_>, column: &Column, row: &Row) -> Cell {
    let outcome = row.outcome(column);
    let mut cell = Cell {
        flow: row.flow,
        works: false,
        seen: None,
        path: None,
        wire: None,
        refused: None,
        wrong: Vec::new(),
        marker: None,
    };
    let result = match outcome {
        Outcome::Works(seen, path, wire) => {
            cell.works = true;
            works(ground, row, (seen, path, wire), &mut cell)
        }
        Outcome::Refused(reason) => {
            cell.refused = Some(reason);
            refused(ground, row)
        }
    };
    if let Err(error) = result {
        cell.works = false;
        cell.wrong.push(error);
    }
    cell
}

fn works(
    ground: &Ground<'_>,
    row: &Row,
    (seen, path, wire): (Seen, Path, Wire),
    cell: &mut Cell,
) -> Result<(), String> {
    let marks = ground.marks();
    match row.act {
        Act::Tcp(from, to) => {
            let at = ground.destination(from, to);
            who(ground, from, at, seen, cell)?;
            let marker = check(ground, from, at, Check::Marker { marker: None })?;
            cell.marker = marker.marker;
            cell.wire = (wire != Wire::Elsewhere).then(|| wire.to_string());
            proven(ground, marks, path, 2, from, cell)
        }
        Act::Bulk(from, to) => {
            let at = ground.destination(from, to);
            let before = ground.too_large();
            let exchange = Check::Exchange {
                up: BULK,
                down: BULK,
            };
            check(ground, from, at, exchange)?;
            who(ground, from, at, seen, cell)?;
            proven(ground, marks, path, 2, from, cell)?;
            // A path whose limit is known already sends nothing that is too large.
            if row.flow.ends_with("pod → pod") && ground.too_large() == before {
                return Err("nothing was too large for the link".to_owned());
            }
            Ok(())
        }
        Act::Get(from, to) => {
            let at = ground.destination(from, to);
            get(ground, from, at)?;
            proven(ground, marks, path, 1, from, cell)
        }
        Act::Udp(from, to, size) => {
            let at = SocketAddr::from((ground.address(to), 0));
            // A node has several addresses, of which it takes the one on the way.
            let client = (!from.starts_with("node")).then(|| ground.address(from));
            datagrams(&ground.netns(from), &ground.netns(to), at, client, size)?;
            proven(ground, marks, path, 1, from, cell)
        }
        Act::NodeDns(from) => {
            let at = SocketAddr::from((ground.node_dns(), 53));
            let client = Some(ground.address(from));
            datagrams(&ground.netns(from), &ground.netns("node1"), at, client, 60)?;
            proven(ground, marks, path, 1, from, cell)
        }
        Act::Ping(from, to) => {
            ping(&ground.netns(from), ground.address(to))?;
            proven(ground, marks, path, 1, from, cell)
        }
        Act::Proxyless(from, to) => {
            let at = ground.destination(from, to);
            check(ground, from, at, Check::Who).map(drop)
        }
    }
}

fn refused(ground: &Ground<'_>, row: &Row) -> Result<(), String> {
    let (Act::Tcp(from, to) | Act::Bulk(from, to) | Act::Proxyless(from, to)) = row.act else {
        return Err("how it is refused is not known".to_owned());
    };
    if from == GATEWAY || to == To::Application(GATEWAY) {
        return ground.gateway_refused();
    }
    let at = ground.destination(from, to);
    let outcome = ground.attempt(from, at, Check::Who, IMPATIENCE);
    if outcome.ok {
        return Err(format!("it works: {outcome:?}"));
    }
    Ok(())
}

fn check(
    ground: &Ground<'_>,
    from: &str,
    at: SocketAddr,
    check: Check,
) -> Result<lab::traffic::Outcome, String> {
    let outcome = ground.attempt(from, at, check, PATIENCE);
    match outcome.ok {
        true => Ok(outcome),
        false => Err(format!("{outcome:?}")),
    }
}

fn who(
    ground: &Ground<'_>,
    from: &str,
    at: SocketAddr,
    wanted: Seen,
    cell: &mut Cell,
) -> Result<(), String> {
    let outcome = check(ground, from, at, Check::Who)?;
    let seen = outcome.seen.map(|seen| seen.ip());
    let wanted_address = ground.who(wanted);
    cell.seen = Some(wanted.to_string());
    if wanted_address.is_some() && seen != wanted_address {
        return Err(format!("the server saw {seen:?}, not {wanted_address:?}"));
    }
    Ok(())
}

/// The page of the proxy's metrics, which has a line of every proxy.
fn get(ground: &Ground<'_>, from: &str, at: SocketAddr) -> Result<(), String> {
    let url = format!("http://{at}/metrics");
    let argv = ["curl", "-sSf", "--max-time", "30", &url];
    let done = ground.scene.lab.run(from, &argv, PATIENCE);
    let done = done.and_then(|done| done.success(&url));
    let page = done.map_err(|error| format!("{error:#}"))?.stdout;
    match page.contains("istio_build") {
        true => Ok(()),
        false => Err(format!("not a page of metrics: {page}")),
    }
}

fn proven(
    ground: &Ground<'_>,
    marks: [crate::harness::observe::LogMark; 2],
    path: Path,
    times: usize,
    from: &str,
    cell: &mut Cell,
) -> Result<(), String> {
    let client = match from {
        GUEST => Some(GUESTED),
        pod => pod.starts_with("pod").then_some(pod),
    };
    let path = ground.path(marks, path, times, client)?;
    cell.path = Some(path.to_string());
    Ok(())
}

/// Holds what was readable on the link between the nodes, and between the first pod and its node, against what should be.
fn look_for_markers(column: &Column, cells: &mut [Cell], taps: [Tap; 2]) {
    // Of both families: a marker is in one packet, whole.
    let read = |tap: Tap| std::fs::read(tap.finish().file).unwrap();
    let [uplink, veth] = taps.map(read);
    let shows = |bytes: &[u8], marker: &str| {
        let mut windows = bytes.windows(marker.len());
        windows.any(|window| window == marker.as_bytes())
    };
    for (cell, row) in cells.iter_mut().zip(ROWS) {
        let (Some(marker), Outcome::Works(_, path, wire)) = (&cell.marker, row.outcome(column))
        else {
            continue;
        };
        if shows(&uplink, marker) != (wire == Wire::Clear) {
            let wrong = format!("on the link between the nodes it is not as it should be: {wire}");
            cell.wrong.push(wrong);
        }
        let Act::Tcp(from, to) = row.act else {
            continue;
        };
        let ends =
            from == "pod1-1" || [To::Application("pod1-1"), To::Service("own")].contains(&to);
        let leaves = to != To::Loopback && to != To::Application(from);
        // The node's proxy is on the other side of it; the pod's own is on this one.
        let in_tls = !column.is_node() && path == Path::Mesh;
        let node_port = matches!(to, To::NodePort(_, port) if [30021, 30023].contains(&port));
        let readable = (ends || node_port) && leaves && !in_tls;
        if shows(&veth, marker) != readable {
            let wrong = format!("between pod1-1 and its node: readable should be {readable}");
            cell.wrong.push(wrong);
        }
    }
}
