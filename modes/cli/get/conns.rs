//! `ambidex get conns`: open connections, joined from the halves that proxies report.
//!
//! A connection between two captured pods has a half at the source's proxy and one at the destination's, which may be the
//! same. Both name the tunnel's TCP connection and its HTTP/2 stream (without a tunnel: the TCP connection between them),
//! which joins them when both proxies are asked.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use comfy_table::Table;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::mesh::duration;
use crate::cli::output::{OutputArgs, plain_table, print};
use crate::cli::{Failure, block_on};
use crate::proxy_client::{self, Proxy};
use crate::run_dir::RunDir;

/// A half that is younger may only be missing at the other proxy because that one was asked earlier.
const SETTLED_MILLIS: u64 = 1000;

#[derive(Debug, Args)]
pub(crate) struct ConnsArgs {
    #[command(flatten)]
    output: OutputArgs,
    /// Repeat until interrupted
    #[arg(short, long)]
    watch: bool,
    /// Seconds between two repetitions
    #[arg(long, default_value_t = 2.0, requires = "watch", value_parser = parse_interval)]
    interval: f64,
    /// Only half-open connections and those whose other half is gone
    #[arg(long)]
    half_open: bool,
    /// Run directory of a node to ask; more than one joins connections between nodes (default: AMBIDEX_RUN_DIR)
    #[arg(long, value_name = "DIR")]
    run_dir: Vec<PathBuf>,
}

fn parse_interval(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("want seconds from 0.1 to 3600".to_owned()),
    }
}

pub(super) fn run(args: ConnsArgs) -> Result<(), Failure> {
    block_on(repeat(args))??;
    Ok(())
}

async fn repeat(args: ConnsArgs) -> anyhow::Result<()> {
    loop {
        let mut connections = join(ask(&args.run_dir).await?);
        if args.half_open {
            connections.retain(|connection| connection.state != State::Open);
        }
        // A terminal shows the present; a file or a pipe gets everything.
        if args.watch && std::io::stdout().is_terminal() {
            print("\x1b[H\x1b[2J")?;
        }
        args.output
            .print(&connections, |wide| table(&connections, wide))?;
        if !args.watch {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs_f64(args.interval)).await;
    }
}

/// What one proxy says.
#[derive(Debug)]
pub(super) struct Report {
    /// Name of the proxy.
    pub(super) proxy: String,
    /// Its connections.
    pub(super) halves: Vec<Half>,
    /// `namespace/name` of the pods that it serves.
    pub(super) pods: BTreeSet<String>,
}

async fn ask(run_dirs: &[PathBuf]) -> anyhow::Result<Vec<Report>> {
    let mut proxies: Vec<(String, Proxy)> = Vec::new();
    if run_dirs.is_empty() {
        for proxy in proxy_client::all(&RunDir::from_env()).await? {
            proxies.push((proxy.name(), proxy));
        }
    }
    for run_dir in run_dirs {
        for proxy in proxy_client::all_in(run_dir).await? {
            proxies.push((format!("{}:{}", run_dir.display(), proxy.name()), proxy));
        }
    }
    let mut reports = Vec::new();
    for (name, proxy) in proxies {
        let state: Value = proxy.get("/config_dump?section=workloadState").await?;
        let pods = state.as_object().into_iter().flatten();
        let pods = pods
            .filter_map(|(_, pod)| {
                let part = |key| pod.pointer(key).and_then(Value::as_str);
                Some(format!(
                    "{}/{}",
                    part("/info/namespace")?,
                    part("/info/name")?
                ))
            })
            .collect();
        reports.push(Report {
            proxy: name,
            halves: proxy.get("/connections").await?,
            pods,
        });
    }
    Ok(reports)
}

/// What a proxy knows of a connection.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Half {
    #[serde(default)]
    pub(super) proxy: String,
    id: u64,
    direction: Direction,
    capture_mode: String,
    source: End,
    destination: End,
    service: Option<String>,
    /// `ADDRESS:PORT` or `HOSTNAME:PORT`.
    hbone_addr: Option<String>,
    mutual_tls: bool,
    sent: u64,
    received: u64,
    age_millis: u64,
    tunnel: Option<Tunnel>,
    application: Option<Application>,
    client_ended_millis: Option<u64>,
    application_ended_millis: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    Inbound,
    Outbound,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
struct End {
    addr: SocketAddr,
    workload: Option<String>,
    namespace: Option<String>,
    identity: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
struct Tunnel {
    client: SocketAddr,
    server: SocketAddr,
    stream: u32,
}

#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
struct Application {
    local: SocketAddr,
    peer: SocketAddr,
}

impl End {
    /// `namespace/name`, if it is a known workload.
    fn pod(&self) -> Option<String> {
        let (namespace, name) = (self.namespace.as_ref()?, self.workload.as_ref()?);
        Some(format!("{namespace}/{name}"))
    }

    fn shown(&self, port: u16) -> String {
        match self.pod() {
            Some(pod) => format!("{pod}:{port}"),
            None => SocketAddr::new(self.addr.ip(), port).to_string(),
        }
    }
}

/// What both halves of a connection have in common: the TCP connection between the two, and the stream in it.
type Key = (SocketAddr, SocketAddr, Option<u32>);

impl Half {
    fn key(&self) -> Option<Key> {
        match (self.tunnel, self.direction) {
            (Some(tunnel), _) => Some((tunnel.client, tunnel.server, Some(tunnel.stream))),
            (None, Direction::Outbound) => self.application.map(|leg| (leg.local, leg.peer, None)),
            // In a tunnel that has not said which.
            (None, Direction::Inbound) if self.hbone_addr.is_some() => None,
            (None, Direction::Inbound) => Some((self.source.addr, self.destination.addr, None)),
        }
    }

    #[cfg(test)]
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// The port that was asked for.
    fn port(&self) -> u16 {
        let asked = self.hbone_addr.as_deref();
        asked
            .and_then(|asked| asked.rsplit_once(':')?.1.parse().ok())
            .unwrap_or(self.destination.addr.port())
    }
}

/// How a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum State {
    /// Both directions are open.
    Open,
    /// The client has ended its direction, the application's is open.
    ClientEnded,
    /// The application has ended its direction, the client's is open.
    ApplicationEnded,
    /// The proxy of the other half was asked and does not know the connection.
    OtherHalfGone,
}

/// A connection with the halves that are known.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Connection {
    pub(super) state: State,
    /// Since when it is half-open.
    pub(super) half_open_millis: Option<u64>,
    pub(super) outbound: Option<Half>,
    pub(super) inbound: Option<Half>,
}

/// Joins the halves. Halves of one key belong together; a second half of one direction (an old proxy and its successor
/// never have the same connection) stays by itself.
pub(super) fn join(reports: Vec<Report>) -> Vec<Connection> {
    let served: BTreeSet<String> = reports
        .iter()
        .flat_map(|report| report.pods.clone())
        .collect();
    let mut connections: Vec<Connection> = Vec::new();
    let mut by_key: BTreeMap<Key, usize> = BTreeMap::new();
    let halves = reports.into_iter().flat_map(|report| {
        let proxy = report.proxy;
        report.halves.into_iter().map(move |half| Half {
            proxy: proxy.clone(),
            ..half
        })
    });
    for half in halves {
        let key = half.key();
        let joined = key.and_then(|key| by_key.get(&key).copied());
        let place = joined.map(|at| match half.direction {
            Direction::Outbound => &mut connections[at].outbound,
            Direction::Inbound => &mut connections[at].inbound,
        });
        if let Some(place) = place
            && place.is_none()
        {
            *place = Some(half);
            continue;
        }
        if let Some(key) = key {
            by_key.entry(key).or_insert(connections.len());
        }
        let (mut outbound, mut inbound) = (None, None);
        match half.direction {
            Direction::Outbound => outbound = Some(half),
            Direction::Inbound => inbound = Some(half),
        }
        connections.push(Connection {
            state: State::Open,
            half_open_millis: None,
            outbound,
            inbound,
        });
    }
    for connection in &mut connections {
        (connection.state, connection.half_open_millis) = connection.stands(&served);
    }
    connections
        .sort_by_key(|connection| std::cmp::Reverse(connection.one().map(|it| it.age_millis)));
    connections
}

impl Connection {
    fn halves(&self) -> impl Iterator<Item = &Half> {
        self.outbound.iter().chain(&self.inbound)
    }

    /// The half that knows more: the one that chose the destination.
    fn one(&self) -> Option<&Half> {
        self.halves().next()
    }

    fn stands(&self, served: &BTreeSet<String>) -> (State, Option<u64>) {
        let longest = |ended: fn(&Half) -> Option<u64>| self.halves().filter_map(ended).max();
        let client = longest(|half| half.client_ended_millis);
        let application = longest(|half| half.application_ended_millis);
        match (client, application) {
            (Some(since), None) => return (State::ClientEnded, Some(since)),
            (None, Some(since)) => return (State::ApplicationEnded, Some(since)),
            _ => {}
        }
        let missing = match (&self.outbound, &self.inbound) {
            (Some(half), None) if half.key().is_some() => half.destination.pod(),
            (None, Some(half)) if half.key().is_some() => half.source.pod(),
            _ => None,
        };
        let settled = self.halves().all(|half| half.age_millis >= SETTLED_MILLIS);
        match missing {
            Some(pod) if settled && served.contains(&pod) => (State::OtherHalfGone, None),
            _ => (State::Open, None),
        }
    }

    fn state(&self) -> String {
        let since = self.half_open_millis.map(duration).unwrap_or_default();
        match self.state {
            State::Open => "open".to_owned(),
            State::ClientEnded => format!("half-open: client ended {since} ago"),
            State::ApplicationEnded => format!("half-open: application ended {since} ago"),
            State::OtherHalfGone => "other half gone".to_owned(),
        }
    }
}

pub(super) fn table(connections: &[Connection], wide: bool) -> Table {
    let mut header = vec![
        "SOURCE",
        "DESTINATION",
        "SERVICE",
        "MODE",
        "VIA",
        "HALVES",
        "SENT",
        "RECEIVED",
        "AGE",
        "STATE",
    ];
    if wide {
        header.extend([
            "CLIENT LEG",
            "HBONE ADDRESS",
            "TUNNEL",
            "APPLICATION LEG",
            "SOURCE IDENTITY",
            "DESTINATION IDENTITY",
        ]);
    }
    let mut table = plain_table(&header);
    for connection in connections {
        if let Some(one) = connection.one() {
            table.add_row(row(connection, one, wide));
        }
    }
    table
}

fn row(connection: &Connection, one: &Half, wide: bool) -> Vec<String> {
    let (outbound, inbound) = (connection.outbound.as_ref(), connection.inbound.as_ref());
    let mut modes: Vec<&str> = connection
        .halves()
        .map(|half| half.capture_mode.as_str())
        .collect();
    modes.dedup();
    let halves = match (outbound, inbound) {
        (Some(_), Some(_)) => "both",
        (Some(_), None) => "source",
        _ => "destination",
    };
    // The end that is captured knows itself better than the other one does.
    let source = outbound.map_or(&one.source, |half| &half.source);
    let destination = inbound.map_or(&one.destination, |half| &half.destination);
    let text = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let mut row = vec![
        source.shown(source.addr.port()),
        destination.shown(inbound.unwrap_or(one).port()),
        text(one.service.clone()),
        modes.join(">"),
        if one.hbone_addr.is_some() {
            "hbone"
        } else {
            "plain"
        }
        .to_owned(),
        halves.to_owned(),
        one.sent.to_string(),
        one.received.to_string(),
        duration(one.age_millis),
        connection.state(),
    ];
    if wide {
        let tunnel = connection.halves().find_map(|half| half.tunnel);
        let asked = connection
            .halves()
            .find_map(|half| half.hbone_addr.as_ref());
        // The last hop is the destination's; a source without a tunnel has made it itself.
        let application = inbound.or(outbound).and_then(|half| half.application);
        row.extend([
            text(outbound.map(|half| half.source.addr.to_string())),
            text(asked.cloned()),
            text(tunnel.map(|it| format!("{}>{}#{}", it.client, it.server, it.stream))),
            text(application.map(|it| format!("{}>{}", it.local, it.peer))),
            text(source.identity.clone()),
            text(destination.identity.clone()),
        ]);
    }
    row
}
