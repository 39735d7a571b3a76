//! Connections while they live: what is known about each, and what it has moved.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::drain::Cutter;
use crate::hbone::authority::Authority;
use crate::state::Service;

use super::access_log::{self, Moved};
use super::labels::ConnectionLabels;
use super::latency::{Latencies, Step};
use super::series::{Series, SeriesTable};
use super::{ConnectionError, Direction, Endpoint, Opening, ResponseFlag};

/// What does not change after the connection was opened.
#[derive(Debug)]
pub(super) struct Fixed {
    pub direction: Direction,
    pub capture_mode: &'static str,
    pub source: Endpoint,
    pub started: Instant,
}

/// What may become known later, and what was already counted. Locked at most a few times in a connection's life and by a
/// scrape, never per byte.
#[derive(Debug)]
pub(super) struct Late {
    pub destination: Endpoint,
    pub service: Option<Arc<Service>>,
    pub hbone_addr: Option<Authority>,
    pub mutual_tls: bool,
    legs: Legs,
    cutter: Option<Cutter>,
    series: Option<Arc<Series>>,
    counted: Moved,
}

/// The connections of which a connection consists, as far as the proxy made or accepted them.
#[derive(Debug, Clone, Default)]
struct Legs {
    tunnel: Option<TunnelLeg>,
    application: Option<ApplicationLeg>,
}

#[derive(Debug)]
pub(super) struct Live {
    id: u64,
    fixed: Fixed,
    late: Mutex<Late>,
    sent: AtomicU64,
    received: AtomicU64,
    client_ended: Moment,
    application_ended: Moment,
    /// Why it was ended from here, if it was.
    cut_because: OnceLock<String>,
}

/// When something happened, in milliseconds after the connection was opened and one more; 0 if it has not.
#[derive(Debug, Default)]
struct Moment(AtomicU64);

impl Moment {
    /// Takes the first call only.
    fn set(&self, started: Instant) {
        let millis = millis_since(started).saturating_add(1);
        // An error means that it has happened before.
        let _ = self.0.compare_exchange(0, millis, Relaxed, Relaxed);
    }

    /// How long ago it happened.
    fn millis_ago(&self, started: Instant) -> Option<u64> {
        let at = self.0.load(Relaxed).checked_sub(1)?;
        Some(millis_since(started).saturating_sub(at))
    }
}

fn millis_since(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)
}

impl Live {
    fn late(&self) -> MutexGuard<'_, Late> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moved(&self) -> Moved {
        Moved {
            sent: self.sent.load(Relaxed),
            received: self.received.load(Relaxed),
        }
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    /// Address of the end that is captured here.
    pub fn captured_end(&self) -> SocketAddr {
        match self.fixed.direction {
            Direction::Inbound => self.late().destination.addr,
            Direction::Outbound => self.fixed.source.addr,
        }
    }

    /// Everything that was moved.
    pub fn bytes(&self) -> u64 {
        let moved = self.moved();
        moved.sent.wrapping_add(moved.received)
    }

    /// The end that has ended its direction while the other one has not.
    pub fn half_open(&self) -> Option<&'static str> {
        let ended = |moment: &Moment| moment.0.load(Relaxed) != 0;
        match (ended(&self.client_ended), ended(&self.application_ended)) {
            (true, false) => Some("client"),
            (false, true) => Some("application"),
            _ => None,
        }
    }

    /// Ends the connection for this reason. False if it cannot be ended, or was before.
    pub fn cut_as(&self, reason: String) -> bool {
        let Some(cutter) = self.late().cutter.clone() else {
            return false;
        };
        let first = self.cut_because.set(reason).is_ok();
        if first {
            cutter.cut();
        }
        first
    }

    pub fn kind(&self) -> (Direction, &'static str) {
        (self.fixed.direction, self.fixed.capture_mode)
    }

    /// Adds to the counters what was moved since the last call.
    pub fn flush(&self, table: &SeriesTable) {
        self.flush_locked(&mut self.late(), table);
    }

    fn flush_locked(&self, late: &mut Late, table: &SeriesTable) -> Arc<Series> {
        let series = self.series(late, table);
        let moved = self.moved();
        if moved != late.counted {
            table.used(&series);
        }
        series
            .sent
            .fetch_add(moved.sent.saturating_sub(late.counted.sent), Relaxed);
        series.received.fetch_add(
            moved.received.saturating_sub(late.counted.received),
            Relaxed,
        );
        late.counted = moved;
        series
    }

    /// The connection's series, chosen at the first call and kept, so that what was counted as opened is counted as
    /// closed under the same labels.
    fn series(&self, late: &mut Late, table: &SeriesTable) -> Arc<Series> {
        if let Some(series) = &late.series {
            return Arc::clone(series);
        }
        let series = table.get(ConnectionLabels::new(
            self.fixed.direction,
            self.fixed.capture_mode,
            &self.fixed.source,
            &late.destination,
            late.service.as_deref(),
            late.mutual_tls,
        ));
        series.opened.fetch_add(1, Relaxed);
        late.series = Some(Arc::clone(&series));
        access_log::opened(&self.fixed, late);
        series
    }

    fn info(&self) -> ConnectionInfo {
        let late = self.late();
        let moved = self.moved();
        let source = &self.fixed.source;
        ConnectionInfo {
            id: self.id,
            direction: self.fixed.direction,
            capture_mode: self.fixed.capture_mode,
            source: source.into(),
            destination: (&late.destination).into(),
            service: late.service.as_ref().map(|s| s.hostname.to_string()),
            hbone_addr: late.hbone_addr.as_ref().map(ToString::to_string),
            mutual_tls: late.mutual_tls,
            sent: moved.sent,
            received: moved.received,
            age_millis: millis_since(self.fixed.started),
            tunnel: late.legs.tunnel,
            application: late.legs.application,
            client_ended_millis: self.client_ended.millis_ago(self.fixed.started),
            application_ended_millis: self.application_ended.millis_ago(self.fixed.started),
        }
    }
}

/// Registry of the live connections. Sharded, because every connection enters and leaves it once.
#[derive(Debug, Default)]
pub(super) struct LiveConnections {
    next: AtomicU64,
    shards: [Mutex<HashMap<u64, Arc<Live>>>; 16],
}

impl LiveConnections {
    fn shard(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Arc<Live>>> {
        self.shards[id as usize % self.shards.len()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_open(&self, id: u64) -> bool {
        self.shard(id).contains_key(&id)
    }

    /// The live connections, in no order. No lock is held when it returns.
    pub fn all(&self) -> Vec<Arc<Live>> {
        let mut all = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(shard.values().cloned());
        }
        all
    }

    /// The live connections, oldest first.
    pub fn infos(&self) -> Vec<ConnectionInfo> {
        let mut infos: Vec<_> = self.all().iter().map(|live| live.info()).collect();
        infos.sort_by_key(|info| info.id);
        infos
    }
}

/// One open connection, for operators.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionInfo {
    /// Number of the connection in this process, in the order of opening.
    pub id: u64,
    /// Which end of the connection is captured here.
    pub direction: Direction,
    /// The capture that brought it.
    pub capture_mode: &'static str,
    /// Who opened it.
    pub source: EndpointInfo,
    /// Where it goes.
    pub destination: EndpointInfo,
    /// Host name of the service that the client named.
    pub service: Option<String>,
    /// Destination inside the tunnel: `ADDRESS:PORT` or `HOSTNAME:PORT`.
    pub hbone_addr: Option<String>,
    /// Whether the peers authenticated each other.
    pub mutual_tls: bool,
    /// Bytes from the client towards the destination.
    pub sent: u64,
    /// Bytes from the destination back to the client.
    pub received: u64,
    /// Milliseconds since it was opened.
    pub age_millis: u64,
    /// The tunnel's stream that carries it, if one does.
    pub tunnel: Option<TunnelLeg>,
    /// The TCP connection to the application, or to the next hop, that this proxy made for it alone.
    pub application: Option<ApplicationLeg>,
    /// Milliseconds since the client has ended its direction, if it has.
    pub client_ended_millis: Option<u64>,
    /// Milliseconds since the application has ended its direction, if it has.
    pub application_ended_millis: Option<u64>,
}

/// One stream of one tunnel. Both ends of the tunnel name it alike, which joins the halves of a connection that two
/// proxies serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelLeg {
    /// The end that opened the tunnel.
    pub client: SocketAddr,
    /// The end that accepted it.
    pub server: SocketAddr,
    /// HTTP/2 stream.
    pub stream: u32,
}

/// A TCP connection of the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ApplicationLeg {
    /// The proxy's end, with whatever address it speaks.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
}

/// One end of a [`ConnectionInfo`].
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointInfo {
    /// Address and port.
    pub addr: SocketAddr,
    /// Name of the workload.
    pub workload: Option<String>,
    /// Namespace of the workload.
    pub namespace: Option<String>,
    /// SPIFFE ID.
    pub identity: Option<String>,
}

impl From<&Endpoint> for EndpointInfo {
    fn from(endpoint: &Endpoint) -> Self {
        let workload = endpoint.workload.as_deref();
        Self {
            addr: endpoint.addr,
            workload: workload.map(|w| w.name.to_string()),
            namespace: workload.map(|w| w.namespace.to_string()),
            identity: endpoint.identity.as_ref().map(ToString::to_string),
        }
    }
}

/// The accounting of one connection. Bytes are added without a lock; [`ConnectionRecord::finish`] writes the access log
/// and closes the account. A record that is dropped unfinished (its task was cancelled) ends with the error `aborted`.
#[derive(Debug)]
pub struct ConnectionRecord {
    live: Arc<Live>,
    table: Arc<SeriesTable>,
    registry: Arc<LiveConnections>,
    latencies: Arc<Latencies>,
    finished: bool,
}

impl ConnectionRecord {
    pub(super) fn open(
        opening: Opening,
        table: &Arc<SeriesTable>,
        registry: &Arc<LiveConnections>,
        latencies: &Arc<Latencies>,
    ) -> Self {
        let destination_known =
            opening.destination.workload.is_some() || opening.destination_service.is_some();
        let live = Arc::new(Live {
            id: registry.next.fetch_add(1, Relaxed),
            fixed: Fixed {
                direction: opening.direction,
                capture_mode: opening.capture_mode,
                source: opening.source,
                started: Instant::now(),
            },
            late: Mutex::new(Late {
                destination: opening.destination,
                service: opening.destination_service,
                hbone_addr: opening.hbone_addr,
                mutual_tls: opening.mutual_tls,
                legs: Legs::default(),
                cutter: None,
                series: None,
                counted: Moved {
                    sent: 0,
                    received: 0,
                },
            }),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            client_ended: Moment::default(),
            application_ended: Moment::default(),
            cut_because: OnceLock::new(),
        });
        if destination_known {
            live.flush(table);
        }
        registry.shard(live.id).insert(live.id, Arc::clone(&live));
        Self {
            live,
            table: Arc::clone(table),
            registry: Arc::clone(registry),
            latencies: Arc::clone(latencies),
            finished: false,
        }
    }

    /// Adds bytes that went from the client towards the destination.
    pub fn sent(&self, bytes: u64) {
        self.live.sent.fetch_add(bytes, Relaxed);
    }

    /// Adds bytes that went from the destination back to the client.
    pub fn received(&self, bytes: u64) {
        if self.live.received.fetch_add(bytes, Relaxed) == 0 && bytes > 0 {
            let (direction, capture_mode) = self.live.kind();
            let time = self.live.fixed.started.elapsed();
            self.latencies
                .observe(Step::FirstByte, capture_mode, direction, time);
        }
    }

    /// The client will send nothing more; the other direction goes on.
    pub fn client_ended(&self) {
        self.live.client_ended.set(self.live.fixed.started);
    }

    /// The application will send nothing more; the other direction goes on.
    pub fn application_ended(&self) {
        self.live.application_ended.set(self.live.fixed.started);
    }

    /// Tells which stream of which tunnel carries the connection.
    pub fn through_tunnel(&self, tunnel: TunnelLeg) {
        self.live.late().legs.tunnel = Some(tunnel);
    }

    /// Tells which connection was made for it.
    pub fn to_application(&self, leg: ApplicationLeg) {
        self.live.late().legs.application = Some(leg);
    }

    /// Tells what ends the task of the connection: to be called before anything is waited for.
    pub fn ended_by(&self, cutter: Cutter) {
        self.live.late().cutter = Some(cutter);
    }

    /// Tells where the connection goes, if that was not known at opening. The labels of the metrics are fixed by whatever
    /// comes first: an opening with a destination workload or service, this call, a scrape, or the end. Later calls
    /// change the access log only.
    pub fn set_destination(
        &self,
        destination: Endpoint,
        service: Option<Arc<Service>>,
        hbone_addr: Option<Authority>,
        mutual_tls: bool,
    ) {
        let mut late = self.live.late();
        late.destination = destination;
        late.service = service;
        late.hbone_addr = hbone_addr;
        late.mutual_tls = mutual_tls;
        self.live.series(&mut late, &self.table);
    }

    /// Ends the connection: counters, access log, and it leaves the list of live connections.
    pub fn finish(mut self, outcome: Result<(), ConnectionError>) {
        let because = self.live.cut_because.get();
        let because = because.map(|reason| ConnectionError::new(ResponseFlag::None, reason));
        let error = outcome.err().map(|error| because.unwrap_or(error));
        self.end(error.as_ref());
    }

    fn end(&mut self, error: Option<&ConnectionError>) {
        self.finished = true;
        let mut late = self.live.late();
        let series = self.live.flush_locked(&mut late, &self.table);
        self.table.used(&series);
        match error {
            None => {
                series.closed.fetch_add(1, Relaxed);
            }
            Some(error) => {
                let series = match error.flag() {
                    ResponseFlag::None => series,
                    flag => self.table.get(series.labels.with_flag(flag)),
                };
                series.closed.fetch_add(1, Relaxed);
                series.failed.fetch_add(1, Relaxed);
            }
        }
        drop(late);
        self.registry.shard(self.live.id).remove(&self.live.id);
        // Last, and out of the registry: a slow log must not make a scrape wait for this connection.
        let late = self.live.late();
        access_log::complete(&self.live.fixed, &late, late.counted, error);
    }
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        if !self.finished {
            let reason = self.live.cut_because.get();
            let reason = reason.map_or("aborted", String::as_str).to_owned();
            self.end(Some(&ConnectionError::new(ResponseFlag::None, reason)));
        }
    }
}
