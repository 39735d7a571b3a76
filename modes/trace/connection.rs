//! The connection itself: made from where the client is, or awaited, and what the proxies say of it while it is open.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use crate::explain::Prepared;
use crate::proxy_client;

/// How long the connection may take to be accepted.
const ACCEPTED_WITHIN: Duration = Duration::from_secs(5);
/// How long proxies may take to have all of its halves: a tunnel's handshake on a busy node.
const KNOWN_WITHIN: Duration = Duration::from_secs(3);
/// How long what the client sent may take to pass the last proxy.
const PASSED_WITHIN: Duration = Duration::from_secs(10);
/// From there, or without proxies, to the application.
const ARRIVED_WITHIN: Duration = Duration::from_millis(200);
/// Between two questions to the proxies.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// Ends of one leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ends {
    /// Who began it.
    pub from: SocketAddr,
    /// Whom it was meant for.
    pub to: SocketAddr,
}

/// What was seen of a connection at its ends and in the proxies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Observed {
    /// The legs that are known, in order.
    pub legs: Vec<Ends>,
    /// The endpoint that was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<SocketAddr>,
    /// Whether it went through a tunnel with mutual TLS; none when no proxy had it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<bool>,
    /// The destination's identity, as the source's proxy verified it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_identity: Option<String>,
    /// The client's identity, as the destination's proxy verified it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_identity: Option<String>,
    /// Why it came to nothing, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

/// A connection as a proxy shows it on its page.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Half {
    id: u64,
    direction: String,
    source: End,
    destination: End,
    mutual_tls: bool,
    sent: u64,
    received: u64,
    service: Option<String>,
    hbone_addr: Option<String>,
    tunnel: Option<Tunnel>,
    application: Option<Application>,
}

#[derive(Debug, Clone, Deserialize)]
struct End {
    addr: SocketAddr,
    identity: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
struct Tunnel {
    client: SocketAddr,
    server: SocketAddr,
    stream: u32,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Application {
    local: SocketAddr,
    peer: SocketAddr,
}

/// Makes a connection and sends so many bytes.
pub(super) async fn make(prepared: &Prepared, bytes: usize) -> Result<Observed> {
    let question = &prepared.question;
    let to = question.to;
    let netns = &prepared.stage.namespaces[question.place];
    // A socket stays in the namespace that it was made in.
    let socket = netns
        .run(|| match to {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        })
        .and_then(|socket| socket)?;
    // With the address that was predicted, and a port of the kernel's choice.
    socket.bind(SocketAddr::new(question.client, 0))?;
    let mut ends = Ends {
        from: socket.local_addr()?,
        to,
    };
    let stream = match timeout(ACCEPTED_WITHIN, socket.connect(to)).await {
        Ok(Ok(stream)) => stream,
        failed => {
            let error = failed.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            return Ok(Observed {
                legs: vec![ends],
                failed: error.err().map(|error| format!("connecting: {error}")),
                ..Observed::default()
            });
        }
    };
    ends.from = stream.local_addr()?;
    let observed = known(prepared, ends).await;
    Ok(send(prepared, stream, bytes.max(1), observed).await)
}

async fn send(
    prepared: &Prepared,
    mut stream: TcpStream,
    bytes: usize,
    mut observed: Observed,
) -> Observed {
    if let Err(error) = stream.write_all(&vec![b'.'; bytes]).await {
        observed.failed = Some(format!("sending: {error}"));
    }
    let begun = Instant::now();
    while observed.tunnel.is_some()
        && begun.elapsed() < PASSED_WITHIN
        && !passed(&halves(prepared).await, &observed, bytes as u64)
    {
        sleep(ASK_EVERY).await;
    }
    sleep(ARRIVED_WITHIN).await;
    observed
}

/// Whether so many bytes went through all that proxies have of the connection. One that has ended needs no waiting for.
fn passed(halves: &[Half], observed: &Observed, bytes: u64) -> bool {
    let ends = |number: usize| observed.legs.get(number).map(|leg| leg.from);
    let mut of_connection = halves.iter().filter(|half| {
        let application = half.application.map(|leg| leg.local);
        Some(half.source.addr) == ends(0) || (application.is_some() && application == ends(2))
    });
    of_connection.all(|half| half.sent.max(half.received) >= bytes)
}

/// What the proxies say of a connection, as soon as they have all of it.
async fn known(prepared: &Prepared, ends: Ends) -> Observed {
    let predicted = prepared.explain(&prepared.question);
    let direct = predicted.legs.len() == 1
        && predicted.legs[0]
            .accepted_by
            .as_ref()
            .is_some_and(|who| who.starts_with("application"));
    let wanted = if direct {
        1
    } else {
        predicted.legs.len().max(2)
    };
    let begun = Instant::now();
    loop {
        let halves = halves(prepared).await;
        let own = |direction: &str| {
            let mut own = halves.iter().filter(|half| half.source.addr == ends.from);
            own.find(|half| half.direction == direction)
        };
        let observed = match (own("outbound"), own("inbound")) {
            (Some(outbound), _) => joined(ends, outbound, &halves),
            (None, Some(inbound)) => of_plain(ends, inbound),
            (None, None) => bare(ends),
        };
        if observed.legs.len() >= wanted || begun.elapsed() > KNOWN_WITHIN {
            return observed;
        }
        sleep(ASK_EVERY).await;
    }
}

fn bare(ends: Ends) -> Observed {
    Observed {
        legs: vec![ends],
        ..Observed::default()
    }
}

/// A connection that reached the proxy of its destination in the clear.
fn of_plain(ends: Ends, half: &Half) -> Observed {
    let application = half.application;
    Observed {
        legs: std::iter::once(ends)
            .chain(application.map(leg_to_application))
            .collect(),
        tunnel: Some(false),
        destination_identity: half.destination.identity.clone(),
        ..Observed::default()
    }
}

fn leg_to_application(application: Application) -> Ends {
    Ends {
        from: application.local,
        to: application.peer,
    }
}

/// The legs of a connection that its source's proxy took.
fn joined(ends: Ends, outbound: &Half, halves: &[Half]) -> Observed {
    let mut observed = bare(ends);
    observed.tunnel = Some(outbound.hbone_addr.is_some() && outbound.mutual_tls);
    observed.endpoint = outbound
        .hbone_addr
        .as_ref()
        .and_then(|address| address.parse().ok())
        .or(outbound.application.map(|leg| leg.peer));
    observed.destination_identity = outbound.destination.identity.clone();
    let Some(tunnel) = outbound.tunnel else {
        observed
            .legs
            .extend(outbound.application.map(leg_to_application));
        return observed;
    };
    observed.legs.push(Ends {
        from: tunnel.client,
        to: tunnel.server,
    });
    let inbound = halves
        .iter()
        .find(|half| half.direction == "inbound" && half.tunnel == Some(tunnel));
    if let Some(inbound) = inbound {
        observed.source_identity = inbound.source.identity.clone();
        observed
            .legs
            .extend(inbound.application.map(leg_to_application));
    }
    observed
}

/// Open connections of all proxies that answer.
async fn halves(prepared: &Prepared) -> Vec<Half> {
    let mut halves = Vec::new();
    for node in &prepared.found.nodes {
        let Ok(proxies) = proxy_client::all_in(node.run_dir.path()).await else {
            continue;
        };
        for proxy in proxies {
            let page: Result<Vec<Half>> = proxy.get("/connections").await;
            halves.extend(page.unwrap_or_default());
        }
    }
    halves
}

/// Awaits the next connection of the client to the destination.
pub(super) async fn follow(prepared: &Prepared, limit: Duration) -> Result<Observed> {
    let question = &prepared.question;
    let mesh = prepared
        .found
        .nodes
        .iter()
        .find_map(|node| node.mesh.as_ref());
    let service = mesh.and_then(|mesh| mesh.service_at(question.to.ip()));
    let legs = prepared.explain(question).legs;
    let first = legs.first().and_then(|leg| leg.accepted_by.as_deref());
    let side = match first.unwrap_or_default() {
        "proxy:15001" => "outbound",
        who if who.starts_with("proxy") => "inbound",
        who => bail!(
            "no proxy sees this connection{}, so none can be awaited: leave out --follow",
            if who.is_empty() {
                ""
            } else {
                ": it goes straight to the application"
            }
        ),
    };
    let is_it = |half: &Half| {
        let meant = match (&service, &half.service) {
            (Some(wanted), Some(service)) => service.contains(wanted.as_str()),
            (Some(_), None) => false,
            (None, _) => {
                half.destination.addr == question.to
                    || half.hbone_addr == Some(question.to.to_string())
            }
        };
        // A client without a proxy of its own is first seen by that of the destination.
        meant && half.direction == side && half.source.addr.ip() == question.client
    };
    // Each proxy counts its own connections, and a client's port may be used again.
    let key = |half: &Half| (half.id, half.direction.clone(), half.source.addr);
    let before: HashSet<_> = halves(prepared).await.iter().map(key).collect();
    // Standard output is for the trace.
    eprintln!(
        "waiting for the next connection of {} to {} (for {} s)",
        question.who,
        question.to,
        limit.as_secs()
    );
    let begun = Instant::now();
    while begun.elapsed() < limit {
        let now = halves(prepared).await;
        let next = now
            .iter()
            .find(|half| is_it(half) && !before.contains(&key(half)));
        if let Some(half) = next {
            let ends = Ends {
                from: half.source.addr,
                to: question.to,
            };
            let observed = known(prepared, ends).await;
            sleep(ARRIVED_WITHIN).await;
            return Ok(observed);
        }
        sleep(ASK_EVERY).await;
    }
    bail!(
        "no connection of {} to {} within {limit:?} (--wait); it has to last for a few tens of milliseconds",
        question.who,
        question.to
    )
}
