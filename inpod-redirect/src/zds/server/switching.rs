//! A pod changes its capture: held, captured by both, released.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Command, ConnectionId, Registered, ZdsError, ZdsHandle, checked, lost};
use crate::zds::{Add, Delays, Release};

/// The first version of the extension that has holds.
const HOLDS: u32 = 2;

impl ZdsHandle {
    /// Holds a pod in the latest proxy, for `within` at most: none of its connections begins, those that are open go on.
    /// Returns when none is being made, and says which proxy it is.
    ///
    /// # Errors
    /// Nobody serves the pod, or the proxy cannot hold pods.
    pub async fn hold(&self, uid: &str, within: Duration) -> Result<ConnectionId, ZdsError> {
        let uid: Arc<str> = Arc::from(uid);
        let hold = |reply| Command::Hold(Arc::clone(&uid), within, reply);
        let (by, held) = self.send(&uid, None, hold)?;
        answered(&uid, held).await?;
        Ok(by)
    }

    /// Has a pod that the proxy `by` holds served by another capture, beside the one that it has. The registry goes on
    /// naming the latter: a proxy that connects meanwhile hears of that one.
    ///
    /// # Errors
    /// As for [`ZdsHandle::hold`], and as for [`ZdsHandle::add`]; or another proxy has connected since, which does not hold
    /// the pod.
    pub async fn prepare(&self, add: Add, by: ConnectionId) -> Result<(), ZdsError> {
        let add = Arc::new(checked(add)?);
        let uid = Arc::clone(&add.uid);
        let (_, prepared) = self.send(&uid, Some(by), |reply| Command::Add(add, reply))?;
        answered(&uid, prepared).await
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
        let command = |reply| Command::Release(Arc::clone(&uid), release, reply);
        let (_, released) = self.send(&uid, None, command)?;
        answered(&uid, released).await
    }

    /// Asks the latest proxy, which must know how to hold, and be the one that is wanted; says which one is asked.
    fn send<T>(
        &self,
        uid: &Arc<str>,
        wanted: Option<ConnectionId>,
        command: impl FnOnce(oneshot::Sender<Result<T, ZdsError>>) -> Command,
    ) -> Result<(ConnectionId, Asked<T>), ZdsError> {
        let state = self.shared.state();
        let Some(latest) = state.connections.last() else {
            return Err(ZdsError::NoProxy {
                uid: Arc::clone(uid),
            });
        };
        if latest.version < HOLDS {
            return Err(ZdsError::NoHold {
                uid: Arc::clone(uid),
            });
        }
        if wanted.is_some_and(|wanted| wanted != latest.id) {
            return Err(lost(uid));
        }
        let (reply, answer) = oneshot::channel();
        // A failure drops `reply`, which the receiver reports.
        let _ = latest.queue.send(command(reply));
        Ok((latest.id, answer))
    }
}

/// An answer that is still to come.
type Asked<T> = oneshot::Receiver<Result<T, ZdsError>>;

async fn answered<T>(uid: &Arc<str>, answer: Asked<T>) -> Result<T, ZdsError> {
    answer.await.unwrap_or_else(|_| Err(lost(uid)))
}
