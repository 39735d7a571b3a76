//! A pod changes its capture while it speaks: its new connections wait meanwhile, and are made by the capture that it has
//! afterwards, whichever one they came by.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use super::delays::{Delays, Subject, Waiting};
use super::{Attached, Attachment, Core};
use crate::capture::{LocalWorkload, Scope};

/// What is known of one address. An address that is idle and has its capture of old has no entry.
#[derive(Default)]
struct Entry {
    /// Who holds it. While anybody does, nothing begins.
    holds: Vec<(u64, Delays)>,
    /// Connections from or to it that are being made.
    dials: usize,
    /// Its capture, if connections may still come by another one.
    capture: Option<Capture>,
    /// How many captures that it had still have connections.
    left: usize,
}

/// An attachment without the core that it is of, which keeps this.
#[derive(Clone)]
struct Capture {
    scope: Arc<dyn Scope>,
    number: u64,
}

impl Entry {
    fn is_idle(&self) -> bool {
        self.holds.is_empty() && self.dials == 0 && self.capture.is_none()
    }
}

/// The captures that pods have, as far as connections must know.
#[derive(Default)]
pub(crate) struct Captures {
    entries: Mutex<HashMap<IpAddr, Entry>>,
    /// Something was released, or a dial has ended while an address was held.
    changed: Notify,
    next_hold: AtomicU64,
}

impl Captures {
    fn entries(&self) -> MutexGuard<'_, HashMap<IpAddr, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the entries of some addresses; those that became idle go.
    fn change(&self, addresses: &[IpAddr], change: impl Fn(&mut Entry)) {
        let mut entries = self.entries();
        for address in addresses {
            let entry = entries.entry(*address).or_default();
            change(entry);
            if entry.is_idle() {
                entries.remove(address);
            }
        }
    }

    /// Waits until nobody holds any of the addresses, and calls `then` before anybody can.
    async fn open<T>(
        &self,
        addresses: &[IpAddr],
        who: Subject,
        then: impl FnOnce(&mut HashMap<IpAddr, Entry>) -> T,
    ) -> T {
        let mut waiting: Option<Waiting> = None;
        loop {
            let changed = self.changed.notified();
            {
                let mut entries = self.entries();
                let found = addresses.iter().filter_map(|address| entries.get(address));
                let mut holds = found.flat_map(|entry| &entry.holds).peekable();
                if holds.peek().is_none() {
                    drop(holds);
                    return then(&mut entries);
                }
                let waiting = waiting.get_or_insert_with(|| Waiting::new(who));
                waiting.on(holds.map(|(_, delays)| delays));
            }
            changed.await;
        }
    }

    /// Waits until no connection from or to the addresses is being made.
    async fn quiet(&self, addresses: &[IpAddr]) {
        loop {
            let changed = self.changed.notified();
            {
                let entries = self.entries();
                let busy = |address| entries.get(address).is_some_and(|entry| entry.dials > 0);
                if !addresses.iter().any(busy) {
                    return;
                }
            }
            changed.await;
        }
    }
}

impl Attachment {
    /// Waits while the pod at an address is held. What it has afterwards is by the capture that it has then.
    pub(crate) async fn released(self, pod: IpAddr, who: Subject) -> Attachment {
        let captures = &self.core.captures;
        let capture = captures
            .open(&[pod], who, |entries| {
                entries.get(&pod).and_then(|entry| entry.capture.clone())
            })
            .await;
        self.by(capture)
    }

    /// Begins a connection from or to `pod`, one of this node, as soon as neither end is held.
    pub(super) async fn dialling(
        &self,
        pod: IpAddr,
        other: IpAddr,
        who: Subject,
    ) -> (Dialling, Attachment) {
        let captures = &self.core.captures;
        let addresses = [pod, other];
        let capture = captures
            .open(&addresses, who, |entries| {
                for address in addresses {
                    entries.entry(address).or_default().dials += 1;
                }
                entries.get(&pod).and_then(|entry| entry.capture.clone())
            })
            .await;
        let dialling = Dialling {
            captures: captures.clone(),
            addresses,
        };
        (dialling, self.clone().by(capture))
    }

    fn by(self, capture: Option<Capture>) -> Attachment {
        match capture {
            Some(Capture { scope, number }) => Attachment {
                core: self.core,
                scope,
                number,
            },
            None => self,
        }
    }
}

/// A connection is being made until this is dropped.
pub(super) struct Dialling {
    captures: Arc<Captures>,
    addresses: [IpAddr; 2],
}

impl Drop for Dialling {
    fn drop(&mut self) {
        let mut held = false;
        {
            let mut entries = self.captures.entries();
            for address in &self.addresses {
                if let Some(entry) = entries.get_mut(address) {
                    entry.dials = entry.dials.saturating_sub(1);
                    held |= !entry.holds.is_empty();
                    if entry.is_idle() {
                        entries.remove(address);
                    }
                }
            }
        }
        if held {
            self.captures.changed.notify_waiters();
        }
    }
}

/// A pod's new connections wait until this is dropped. What was open before goes on.
#[must_use = "dropping it lets the pod's connections go on"]
pub struct Hold {
    captures: Arc<Captures>,
    addresses: Arc<[IpAddr]>,
    number: u64,
    delays: Delays,
}

impl Hold {
    /// The account of what waits for it.
    pub fn delays(&self) -> Delays {
        self.delays.clone()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.captures.change(&self.addresses, |entry| {
            entry.holds.retain(|(number, _)| *number != self.number);
        });
        self.captures.changed.notify_waiters();
    }
}

impl Core {
    /// Holds a pod: no connection from or to it begins. Connections that arrive are accepted and wait, before anything is
    /// decided about them. Returns when those that were being made are there or have failed, or after `within`: what is
    /// still being made then has sent its first packet already.
    pub async fn hold(&self, pod: &LocalWorkload, within: Duration) -> Hold {
        let captures = self.shared.captures.clone();
        let addresses = pod.addresses.clone();
        let number = captures.next_hold.fetch_add(1, Ordering::Relaxed);
        let delays = Delays::default();
        captures.change(&addresses, |entry| {
            entry.holds.push((number, delays.clone()));
        });
        let hold = Hold {
            captures,
            addresses,
            number,
            delays,
        };
        // An error means that somebody does not answer; nobody waits for that.
        let _ = timeout(within, hold.captures.quiet(&hold.addresses)).await;
        hold
    }

    /// From here on, whatever is begun for a pod is begun by `capture`, also when it came by another one. To be called
    /// while the pod is held.
    pub fn captured_by(&self, pod: &LocalWorkload, capture: &Attached) {
        let number = capture.number;
        self.shared.captures.change(&pod.addresses, |entry| {
            entry.left += 1;
            entry.capture = Some(Capture {
                scope: capture.scope.clone(),
                number,
            });
        });
        // Its tunnels were made by the other capture: they carry what they carry, and nothing more.
        self.shared
            .pool
            .forget(|key| key.attachment != number && pod.addresses.contains(&key.source_address));
    }

    /// To be called once for each call of [`Core::captured_by`], when nothing can come any more by the capture that the pod
    /// had before it. After the last one, a connection is made by the capture that it came by.
    pub fn captured_as_accepted(&self, pod: &LocalWorkload) {
        self.shared.captures.change(&pod.addresses, |entry| {
            entry.left = entry.left.saturating_sub(1);
            if entry.left == 0 {
                entry.capture = None;
            }
        });
    }
}
