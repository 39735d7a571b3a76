//! Connections while they live: what is known about each, and what it has moved.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::Serialize;

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
    pub hbone_addr: Option<SocketAddr>,
    pub mutual_tls: bool,
    series: Option<Arc<Series>>,
    counted: Moved,
}

#[derive(Debug)]
pub(super) struct Live {
    id: u64,
    fixed: Fixed,
    late: Mutex<Late>,
    sent: AtomicU64,
    received: AtomicU64,
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
            hbone_addr: late.hbone_addr,
            mutual_tls: late.mutual_tls,
            sent: moved.sent,
            received: moved.received,
            age_millis: u64::try_from(self.fixed.started.elapsed().as_millis()).unwrap_or(u64::MAX),
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
    /// Destination inside the tunnel.
    pub hbone_addr: Option<SocketAddr>,
    /// Whether the peers authenticated each other.
    pub mutual_tls: bool,
    /// Bytes from the client towards the destination.
    pub sent: u64,
    /// Bytes from the destination back to the client.
    pub received: u64,
    /// Milliseconds since it was opened.
    pub age_millis: u64,
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
                series: None,
                counted: Moved {
                    sent: 0,
                    received: 0,
                },
            }),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
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

    /// Tells where the connection goes, if that was not known at opening. The labels of the metrics are fixed by whatever
    /// comes first: an opening with a destination workload or service, this call, a scrape, or the end. Later calls
    /// change the access log only.
    pub fn set_destination(
        &self,
        destination: Endpoint,
        service: Option<Arc<Service>>,
        hbone_addr: Option<SocketAddr>,
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
        self.end(outcome.err().as_ref());
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
            self.end(Some(&ConnectionError::new(ResponseFlag::None, "aborted")));
        }
    }
}
