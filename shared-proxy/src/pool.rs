//! Reuses multiplexed connections: many streams, few handshakes.
//!
//! Two pods never share a connection, nor do two captures of one pod: the key holds who speaks, through what, with whose
//! address, to whom. The pool knows nothing of HTTP/2: what it keeps is anything that can say whether it still takes
//! streams and how many.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::capture::ScopeId;
use crate::identity::Identity;

/// Everything in which two tunnels may differ. One connection serves one key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Through which capture.
    pub scope: ScopeId,
    /// Which attachment of that scope: a pod's namespace may be replaced by another under the same name.
    pub attachment: u64,
    /// Who speaks.
    pub source: Identity,
    /// With which address.
    pub source_address: IpAddr,
    /// To which tunnel endpoint.
    pub destination: SocketAddr,
    /// Who may answer, sorted.
    pub expected: Arc<[Identity]>,
}

/// Limits of a pool.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Streams in one connection; the next one gets another connection. The field's `POOL_MAX_STREAMS_PER_CONNECTION`.
    /// Less is used when the peer allows less.
    pub max_streams_per_connection: usize,
    /// How long a connection without streams is kept. The field's `POOL_UNUSED_RELEASE_TIMEOUT`.
    pub idle_release: Duration,
}

impl Default for PoolConfig {
    /// The field's values.
    fn default() -> Self {
        Self {
            max_streams_per_connection: 100,
            idle_release: Duration::from_secs(300),
        }
    }
}

/// A connection that carries several streams. Clones are handles to the same one; the last one dropped lets it close
/// when its streams have ended.
pub trait Multiplexed: Clone + Send + 'static {
    /// Whether it can take one more stream as far as the peer and the wire are concerned.
    fn is_open(&self) -> bool;
    /// How many streams the peer allows at once.
    fn stream_limit(&self) -> usize;
}

/// Connections by key. Cheap to clone; clones share their connections.
#[derive(Debug)]
pub struct Pool<K, C, E> {
    inner: Arc<Inner<K, C, E>>,
}

impl<K, C, E> Clone for Pool<K, C, E> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
        }
    }
}

/// Room for one stream in a connection. Given back when dropped, so it has to live as long as the stream.
#[derive(Debug)]
pub struct Lease<C> {
    connection: C,
    number: u64,
    /// Whether the connection was opened for this stream.
    fresh: bool,
    usage: Arc<Usage>,
}

struct Inner<K, C, E> {
    config: PoolConfig,
    slots: Mutex<HashMap<K, Slot<C, E>>>,
    next_number: AtomicU64,
}

impl<K, C, E> fmt::Debug for Inner<K, C, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Outcome of a connect, for all who wait for it.
type Outcome<E> = Option<Result<(), Arc<E>>>;

struct Slot<C, E> {
    connections: Vec<Pooled<C>>,
    /// The connect that is under way, if one is, by its number.
    connecting: Option<(u64, watch::Receiver<Outcome<E>>)>,
}

struct Pooled<C> {
    connection: C,
    number: u64,
    usage: Arc<Usage>,
}

#[derive(Debug)]
struct Usage {
    streams: AtomicUsize,
    idle_since: Mutex<Instant>,
}

impl<C> Lease<C> {
    /// The connection.
    pub fn connection(&self) -> &C {
        &self.connection
    }

    /// Whether the connection was opened on behalf of this lease, and not found in the pool.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }
}

impl<C> Drop for Lease<C> {
    fn drop(&mut self) {
        *self
            .usage
            .idle_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.usage.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<K, C, E> Pool<K, C, E>
where
    K: Clone + Eq + Hash + Send + 'static,
    C: Multiplexed,
    E: Send + Sync + 'static,
{
    /// An empty pool. Idle connections are released by a task that ends with the pool.
    ///
    /// Must be called on a Tokio runtime.
    pub fn new(config: PoolConfig) -> Self {
        let inner = Arc::new(Inner {
            slots: Mutex::new(HashMap::new()),
            next_number: AtomicU64::new(1),
            config,
        });
        tokio::spawn(release_idle(Arc::downgrade(&inner)));
        Self { inner }
    }

    /// Room for one stream to `key`: in a connection that stands, or in one that `connect` makes.
    ///
    /// At most one connect per key is under way at a time; the others wait for it and share its failure. It is not
    /// abandoned when the caller is.
    ///
    /// # Errors
    /// What `connect` failed with, or `None` if it panicked.
    pub async fn lease<F>(
        &self,
        key: &K,
        connect: impl Fn() -> F,
    ) -> Result<Lease<C>, Option<Arc<E>>>
    where
        F: Future<Output = Result<C, E>> + Send + 'static,
    {
        self.lease_newer_than(key, 0, connect).await
    }

    /// Takes the connection of `lease` out of the pool (the peer refused a stream in it), and makes room in one that was
    /// opened after it.
    ///
    /// # Errors
    /// As [`Pool::lease`].
    pub async fn replace<F>(
        &self,
        key: &K,
        lease: Lease<C>,
        connect: impl Fn() -> F,
    ) -> Result<Lease<C>, Option<Arc<E>>>
    where
        F: Future<Output = Result<C, E>> + Send + 'static,
    {
        let refused = lease.number;
        if let Some(slot) = self.inner.slots().get_mut(key) {
            slot.connections.retain(|pooled| pooled.number != refused);
        }
        drop(lease);
        self.lease_newer_than(key, refused, connect).await
    }

    async fn lease_newer_than<F>(
        &self,
        key: &K,
        number: u64,
        connect: impl Fn() -> F,
    ) -> Result<Lease<C>, Option<Arc<E>>>
    where
        F: Future<Output = Result<C, E>> + Send + 'static,
    {
        let mut fresh = false;
        loop {
            let mut waiting = {
                let mut slots = self.inner.slots();
                let slot = slots.entry(key.clone()).or_insert_with(Slot::new);
                if let Some(mut lease) = slot.lease(number, &self.inner.config) {
                    lease.fresh = fresh;
                    return Ok(lease);
                }
                match &slot.connecting {
                    Some((_, waiting)) => waiting.clone(),
                    None => {
                        fresh = true;
                        let (done, waiting) = watch::channel(None);
                        let number = self.inner.next_number.fetch_add(1, Ordering::Relaxed);
                        slot.connecting = Some((number, waiting.clone()));
                        let attempt = Attempt {
                            number,
                            inner: self.inner.clone(),
                            key: key.clone(),
                            done,
                        };
                        tokio::spawn(attempt.run(connect()));
                        waiting
                    }
                }
            };
            // An error means that the attempt panicked: its sender is gone without a word.
            let outcome = waiting.wait_for(Option::is_some).await.map_err(|_| None)?;
            if let Some(Err(error)) = &*outcome {
                return Err(Some(error.clone()));
            }
        }
    }

    /// Takes the connections out whose key matches. Streams in them go on.
    pub fn forget(&self, matches: impl Fn(&K) -> bool) {
        let gone: Vec<_> = self
            .inner
            .slots()
            .extract_if(|key, _| matches(key))
            .collect();
        drop(gone);
    }

    /// How many connections stand.
    pub fn connections(&self) -> usize {
        self.inner
            .slots()
            .values()
            .map(|slot| slot.connections.len())
            .sum()
    }
}

impl<C: Multiplexed, E> Slot<C, E> {
    fn new() -> Self {
        Self {
            connections: Vec::new(),
            connecting: None,
        }
    }

    /// Room in the open connection that has the fewest streams. Those that are not open any more leave.
    fn lease(&mut self, newer_than: u64, config: &PoolConfig) -> Option<Lease<C>> {
        self.connections
            .retain(|pooled| pooled.connection.is_open());
        let limit = |connection: &C| {
            connection
                .stream_limit()
                .min(config.max_streams_per_connection)
        };
        let (pooled, streams) = self
            .connections
            .iter()
            .filter(|pooled| pooled.number > newer_than)
            .map(|pooled| (pooled, pooled.usage.streams.load(Ordering::Acquire)))
            .filter(|(pooled, streams)| *streams < limit(&pooled.connection))
            .min_by_key(|(_, streams)| *streams)?;
        debug_assert!(streams < config.max_streams_per_connection);
        // Only ever raised under the lock of the pool, so it cannot pass the limit.
        pooled.usage.streams.fetch_add(1, Ordering::AcqRel);
        Some(Lease {
            connection: pooled.connection.clone(),
            number: pooled.number,
            fresh: false,
            usage: pooled.usage.clone(),
        })
    }
}

impl<K, C, E> Inner<K, C, E> {
    fn slots(&self) -> MutexGuard<'_, HashMap<K, Slot<C, E>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connect, and the duty to tell everybody how it went. A panic on the way clears the slot too.
struct Attempt<K: Eq + Hash, C, E> {
    number: u64,
    inner: Arc<Inner<K, C, E>>,
    key: K,
    done: watch::Sender<Outcome<E>>,
}

impl<K: Eq + Hash, C, E> Attempt<K, C, E> {
    async fn run(self, connect: impl Future<Output = Result<C, E>>) {
        let result = connect.await;
        let outcome = match result {
            Ok(connection) => {
                let pooled = Pooled {
                    connection,
                    number: self.number,
                    usage: Arc::new(Usage {
                        streams: AtomicUsize::new(0),
                        idle_since: Mutex::new(Instant::now()),
                    }),
                };
                // Forgotten meanwhile: whoever waits for it connects again, under the key's slot of that time.
                if let Some(slot) = self.inner.slots().get_mut(&self.key) {
                    slot.connections.push(pooled);
                }
                Ok(())
            }
            Err(error) => Err(Arc::new(error)),
        };
        let done = self.done.clone();
        drop(self);
        done.send_replace(Some(outcome));
    }
}

impl<K: Eq + Hash, C, E> Drop for Attempt<K, C, E> {
    fn drop(&mut self) {
        if let Some(slot) = self.inner.slots().get_mut(&self.key)
            && slot
                .connecting
                .as_ref()
                .is_some_and(|(number, _)| *number == self.number)
        {
            slot.connecting = None;
        }
    }
}

/// Drops connections that had no stream for long, and keys that have no connection.
async fn release_idle<K: Eq + Hash, C: Multiplexed, E>(pool: Weak<Inner<K, C, E>>) {
    let Some(every) = pool.upgrade().map(|inner| inner.config.idle_release / 4) else {
        return;
    };
    let every = every.clamp(Duration::from_millis(10), Duration::from_secs(30));
    loop {
        tokio::time::sleep(every).await;
        let Some(inner) = pool.upgrade() else { return };
        let limit = inner.config.idle_release;
        let mut released = Vec::new();
        inner.slots().retain(|_, slot| {
            released.extend(slot.connections.extract_if(.., |pooled| {
                !pooled.connection.is_open() || pooled.usage.idle_for() >= Some(limit)
            }));
            !slot.connections.is_empty() || slot.connecting.is_some()
        });
        // Closing connections takes other locks; not under ours.
        drop(released);
    }
}

impl Usage {
    /// How long there has been no stream; `None` while there is one.
    fn idle_for(&self) -> Option<Duration> {
        let since = *self
            .idle_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        (self.streams.load(Ordering::Acquire) == 0).then(|| since.elapsed())
    }
}

#[cfg(test)]
mod tests;
