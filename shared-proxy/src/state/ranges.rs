//! Ranges of virtual addresses: which service has the longest one that an address is in.
//!
//! Ranges are looked up as the addresses are, by hashing: the address is cut to each length that any range has, the longest
//! first. A mesh has a handful of lengths, however many ranges it has, and one without ranges costs nothing.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::persistent_map::PersistentMap;
use super::snapshot::Holders;
use super::{NetworkAddress, NetworkRange, Service};

/// An index of ranges. Cloning it is cheap.
#[derive(Debug, Clone, Default)]
pub(super) struct Ranges {
    by_range: PersistentMap<NetworkRange, Holders<Service>>,
    lengths: Arc<Lengths>,
}

/// How many different ranges there are of each length, by family.
#[derive(Debug, Clone, Default)]
struct Lengths {
    ipv4: BTreeMap<u8, usize>,
    ipv6: BTreeMap<u8, usize>,
}

impl Lengths {
    fn of(&self, ip: IpAddr) -> &BTreeMap<u8, usize> {
        match ip {
            IpAddr::V4(_) => &self.ipv4,
            IpAddr::V6(_) => &self.ipv6,
        }
    }

    fn of_mut(&mut self, ip: IpAddr) -> &mut BTreeMap<u8, usize> {
        match ip {
            IpAddr::V4(_) => &mut self.ipv4,
            IpAddr::V6(_) => &mut self.ipv6,
        }
    }
}

impl Ranges {
    pub(super) fn is_empty(&self) -> bool {
        self.by_range.len() == 0
    }

    pub(super) fn add(&mut self, range: &NetworkRange, service: &Arc<Service>) {
        let before = self.by_range.len();
        Holders::add(&mut self.by_range, range.clone(), service);
        if self.by_range.len() > before {
            let lengths = Arc::make_mut(&mut self.lengths).of_mut(range.range.addr());
            *lengths.entry(range.range.prefix_len()).or_default() += 1;
        }
    }

    pub(super) fn remove(&mut self, range: &NetworkRange, service: &Arc<Service>) {
        let before = self.by_range.len();
        Holders::remove(&mut self.by_range, range, service);
        if self.by_range.len() < before {
            let lengths = Arc::make_mut(&mut self.lengths).of_mut(range.range.addr());
            let length = range.range.prefix_len();
            if let Some(count) = lengths.get_mut(&length) {
                *count -= 1;
                if *count == 0 {
                    lengths.remove(&length);
                }
            }
        }
    }

    /// Those who have the longest range that an address is in.
    pub(super) fn longest(&self, address: &NetworkAddress) -> Option<&Holders<Service>> {
        let lengths = self.lengths.of(address.ip).keys().rev();
        lengths
            .filter_map(|length| IpNet::new(address.ip, *length).ok())
            .find_map(|range| {
                let range = NetworkRange::new(Arc::clone(&address.network), range);
                self.by_range.get(&range)
            })
    }
}

#[cfg(test)]
mod tests;
