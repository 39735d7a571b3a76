//! A pod changes its capture: held, captured by both, released.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Command, Registered, ZdsError, ZdsHandle, checked, lost};
use crate::zds::{Add, Delays, Release};

/// The first version of the extension that has holds.
const HOLDS: u32 = 2;

impl ZdsHandle {
    /// Holds a pod in the latest proxy, for `within` at most: none of its connections begins, those that are open go on.
    /// Returns when none is being made.
    ///
    /// # Errors
    /// Nobody serves the pod, or the proxy cannot hold pods.
    pub async fn hold(&self, uid: &str, within: Duration) -> Result<(), ZdsError> {
        let uid: Arc<str> = Arc::from(uid);
        self.ask(&uid, |reply| Command::Hold(Arc::clone(&uid), within, reply))
            .await
    }

    /// Has a held pod served by another capture, beside the one that it has. The registry goes on naming the latter: a
    /// proxy that connects meanwhile hears of that one.
    ///
    /// # Errors
    /// As for [`ZdsHandle::hold`], and as for [`ZdsHandle::add`].
    pub async fn prepare(&self, add: Add) -> Result<(), ZdsError> {
        let add = Arc::new(checked(add)?);
        let uid = Arc::clone(&add.uid);
        self.ask(&uid, |reply| Command::Add(add, reply)).await
    }

    /// Releases a held pod. With [`Release::Changes`] it is registered as `add` says, which is what was prepared, whatever
    /// the proxy answers. Returns what waited meanwhile.
    ///
    /// # Errors
    /// The proxy was lost, or does not hold the pod any more: it may have been another one that was asked to.
    pub async fn release(&self, add: Add, release: Release) -> Result<Delays, ZdsError> {
        let uid = Arc::clone(&add.uid);
        if release != Release::Stays {
            let add = Arc::new(checked(add)?);
            let mut state = self.shared.state();
            state
                .registry
                .insert(Arc::clone(&uid), Registered::Ready(add));
        }
        self.ask(&uid, |reply| {
            Command::Release(Arc::clone(&uid), release, reply)
        })
        .await
    }

    /// Asks the latest proxy, which must know how to hold.
    async fn ask<T>(
        &self,
        uid: &Arc<str>,
        command: impl FnOnce(oneshot::Sender<Result<T, ZdsError>>) -> Command,
    ) -> Result<T, ZdsError> {
        let uid = Arc::clone(uid);
        let answer = {
            let state = self.shared.state();
            let Some(latest) = state.connections.last() else {
                return Err(ZdsError::NoProxy { uid });
            };
            if latest.version < HOLDS {
                return Err(ZdsError::NoHold { uid });
            }
            let (reply, answer) = oneshot::channel();
            // A failure drops `reply`, which the receiver reports.
            let _ = latest.queue.send(command(reply));
            answer
        };
        answer.await.unwrap_or_else(|_| Err(lost(&uid)))
    }
}
