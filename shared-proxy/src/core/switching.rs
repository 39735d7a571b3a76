//! A pod changes its capture while it speaks: its new connections wait meanwhile, and are made by the capture that it has
//! afterwards, whichever one they came by.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use super::{Attached, Attachment, Core};
use crate::capture::{LocalWorkload, Scope};

/// What is known of one address. An address that is idle and has its capture of old has no entry.
#[derive(Default)]
struct Entry {
    /// How many held it. While anybody does, nothing begins.
    holds: usize,
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
        self.holds == 0 && self.dials == 0 && self.capture.is_none()
    }
}

/// The captures that pods have, as far as connections must know.
#[derive(Default)]
pub(crate) struct Captures {
    entries: Mutex<HashMap<IpAddr, Entry>>,
    /// Something was released, or a dial has ended while an address was held.
    changed: Notify,
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
        then: impl FnOnce(&mut HashMap<IpAddr, Entry>) -> T,
    ) -> T {
        loop {
            let changed = self.changed.notified();
            {
                let mut entries = self.entries();
                let held = |address| entries.get(address).is_some_and(|entry| entry.holds > 0);
                if !addresses.iter().any(held) {
                    return then(&mut entries);
                }
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
    pub(crate) async fn released(self, pod: IpAddr) -> Attachment {
        let captures = &self.core.captures;
        let capture = captures
            .open(&[pod], |entries| {
                entries.get(&pod).and_then(|entry| entry.capture.clone())
            })
            .await;
        self.by(capture)
    }

    /// Begins a connection from or to `pod`, one of this node, as soon as neither end is held.
    pub(super) async fn dialling(&self, pod: IpAddr, other: IpAddr) -> (Dialling, Attachment) {
        let captures = &self.core.captures;
        let addresses = [pod, other];
        let capture = captures
            .open(&addresses, |entries| {
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
                    held |= entry.holds > 0;
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
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.captures
            .change(&self.addresses, |entry| entry.holds -= 1);
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
        captures.change(&addresses, |entry| entry.holds += 1);
        let hold = Hold {
            captures,
            addresses,
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
