//! Who a captured pod is, to the certificate authority and to the control plane.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::time::{Instant, timeout, timeout_at};

use super::{Attachment, Failure};
use crate::capture::LocalWorkload;
use crate::identity::Identity;
use crate::state::{Snapshot, Workload};

impl Attachment {
    /// The identity of a captured pod.
    pub(crate) fn identity_of(&self, pod: &LocalWorkload) -> Result<Identity, Failure> {
        Identity::new(
            self.core.config.trust_domain.clone(),
            pod.namespace.clone(),
            pod.service_account.clone(),
        )
        .map_err(|error| Failure::Identity(error.to_string()))
    }

    /// The captured pod as the control plane describes it, with the snapshot that does. Waits for it a little: a pod may
    /// speak before the control plane has told of it. An address that still belongs to another pod there counts as not
    /// told.
    pub(crate) async fn workload_of(
        &self,
        pod: &LocalWorkload,
        address: IpAddr,
    ) -> Result<(Arc<Snapshot>, Arc<Workload>), Failure> {
        let store = &self.core.store;
        if let Some(found) = find(store.load(), pod, address) {
            return Ok(found);
        }
        let mut changes = store.subscribe();
        let deadline = Instant::now() + self.core.config.workload_wait;
        // Where workloads are told of on demand, somebody has to ask; elsewhere this returns at once.
        let _ = timeout_at(deadline, store.knowing(address)).await;
        loop {
            // Looked up after subscribing, so that no change is missed.
            if let Some(found) = find(store.load(), pod, address) {
                return Ok(found);
            }
            match timeout_at(deadline, changes.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => {
                    return Err(Failure::UnknownWorkload {
                        address,
                        pod: format!("{}/{}", pod.namespace, pod.name),
                    });
                }
            }
        }
    }
}

impl Attachment {
    /// The mesh as far as a connection to `address` needs it. Where workloads are told of on demand, a control plane that
    /// does not answer fails the connection: an address must not pass for nobody's because nobody could be asked.
    pub(crate) async fn mesh_for(&self, address: IpAddr) -> Result<Arc<Snapshot>, Failure> {
        let wait = self.core.config.workload_wait;
        timeout(wait, self.core.store.knowing(address))
            .await
            .map_err(|_| Failure::NotTold(address))
    }
}

fn find(
    snapshot: Arc<Snapshot>,
    pod: &LocalWorkload,
    address: IpAddr,
) -> Option<(Arc<Snapshot>, Arc<Workload>)> {
    let workload = snapshot.workload_by_ip(address)?;
    let same =
        *workload.namespace == *pod.namespace && *workload.service_account == *pod.service_account;
    same.then_some((snapshot, workload))
}
