//! Connections that are open at one moment, as a whole that can be waited for and ended.

use std::net::IpAddr;
use std::sync::Arc;

use super::connection::{Live, LiveConnections};

/// Connections that were open when they were asked for; those that come later are not among them.
#[derive(Debug)]
pub struct OpenConnections {
    registry: Arc<LiveConnections>,
    ones: Vec<Arc<Live>>,
}

impl OpenConnections {
    pub(super) fn of(
        registry: &Arc<LiveConnections>,
        addresses: &[IpAddr],
        capture_mode: &'static str,
    ) -> Self {
        let mut ones = registry.all();
        ones.retain(|live| {
            live.kind().1 == capture_mode && addresses.contains(&live.captured_end().ip())
        });
        Self {
            registry: Arc::clone(registry),
            ones,
        }
    }

    /// How many of them are still open.
    pub fn left(&self) -> usize {
        let open = |live: &&Arc<Live>| self.registry.is_open(live.id());
        self.ones.iter().filter(open).count()
    }

    /// Ends those that are still open, for this reason; their ends see a reset.
    pub fn cut(&self, reason: &str) {
        for live in &self.ones {
            live.cut_as(reason.to_owned());
        }
    }
}
