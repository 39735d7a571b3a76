//! The snapshot in force.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::{Change, OnDemand, Snapshot};

/// Holds the snapshot in force. Reading takes no lock.
#[derive(Debug)]
pub struct Store {
    current: ArcSwap<Snapshot>,
    /// Held while the next snapshot is made, so that no change is lost between two writers.
    writing: Mutex<()>,
    version: watch::Sender<u64>,
    network: Arc<str>,
    pub(super) on_demand: OnceLock<Arc<dyn OnDemand>>,
}

impl Store {
    /// An empty store of a proxy in the network without a name.
    pub fn new() -> Self {
        Self::in_network("")
    }

    /// An empty store of a proxy in `network`: bare addresses seen on sockets belong to it.
    pub fn in_network(network: impl Into<Arc<str>>) -> Self {
        let network = network.into();
        Self {
            current: ArcSwap::from_pointee(Snapshot::default().in_network(Arc::clone(&network))),
            writing: Mutex::default(),
            version: watch::Sender::new(0),
            network,
            on_demand: OnceLock::new(),
        }
    }

    /// The snapshot in force.
    pub fn load(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Puts another snapshot in force and tells the subscribers.
    pub fn replace(&self, snapshot: Snapshot) {
        let _writing = self.writing();
        self.put(snapshot.in_network(Arc::clone(&self.network)));
    }

    /// Changes some objects, all at once, and tells the subscribers. See [`Snapshot::updated`].
    pub fn update(&self, changes: impl IntoIterator<Item = Change>) {
        let _writing = self.writing();
        self.put(self.load().updated(changes));
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, snapshot: Snapshot) {
        self.current.store(Arc::new(snapshot));
        self.version.send_modify(|version| *version += 1);
    }

    /// Follows the number of replacements. When it changes, [`load`](Self::load) returns that snapshot or a later one.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}
