//! The pods that the agent names: their listeners and connections.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use host_net::netns::Netns;
use inpod_redirect::scope::InpodScope;
use inpod_redirect::zds::client::WorkloadHandler;
use inpod_redirect::zds::{Add, Mode, NodeConfiguration};
use shared_proxy::capture::{LocalWorkload, Role, Scope};
use shared_proxy::drain::{Drain, Drainer};
use shared_proxy::state::Store;
use tokio::task::JoinHandle;

use crate::pipe::Pipes;
use crate::serve::{self, Service};

/// The roles that are listened for; the same as the proxy's.
const ROLES: [Role; 3] = [Role::Outbound, Role::InboundPlaintext, Role::InboundHbone];

/// A pod that is served.
struct Served {
    drainer: Drainer,
    listeners: Vec<JoinHandle<()>>,
}

/// All pods of a relay.
pub(crate) struct Pods {
    store: Arc<Store>,
    pipes: Arc<Pipes>,
    own_netns: Netns,
    served: Mutex<HashMap<Arc<str>, Served>>,
}

impl Pods {
    pub(crate) fn new(store: Arc<Store>, pipes: Arc<Pipes>, own_netns: Netns) -> Self {
        Self {
            store,
            pipes,
            own_netns,
            served: Mutex::default(),
        }
    }

    /// Closes all listeners and lets connections end until the deadline.
    pub(crate) async fn shutdown(&self, deadline: Duration) {
        let served: Vec<Served> = self.lock().drain().map(|(_, served)| served).collect();
        for pod in &served {
            pod.drainer.drain();
        }
        let ending: Vec<JoinHandle<()>> = served
            .into_iter()
            .map(|pod| tokio::spawn(async move { pod.drainer.run(Drain::within(deadline)).await }))
            .collect();
        for task in ending {
            // A task that panicked has ended as well.
            let _ = task.await;
        }
    }

    fn start(&self, add: Add) -> Result<(), String> {
        let (Mode::Inpod, Some(netns)) = (add.mode, add.netns) else {
            return Err("the relay serves pods in their own network namespaces only".to_owned());
        };
        let workload = LocalWorkload {
            uid: Arc::clone(&add.uid),
            name: add.info.name.as_str().into(),
            namespace: add.info.namespace.as_str().into(),
            service_account: add.info.service_account.as_str().into(),
            addresses: add.addresses.into(),
        };
        let scope =
            InpodScope::new(netns, workload, &self.own_netns).map_err(|error| error.to_string())?;
        let mut listeners = Vec::new();
        for role in ROLES {
            for listener in scope.listen(role).map_err(|error| error.to_string())? {
                serve::set_options(&listener.as_socket()).map_err(|error| error.to_string())?;
                listeners.push(listener);
            }
        }
        let service = Service {
            scope: Arc::new(scope),
            store: Arc::clone(&self.store),
            pipes: Arc::clone(&self.pipes),
        };
        let drainer = Drainer::new();
        let listeners = listeners
            .into_iter()
            .map(|listener| {
                let accepting = serve::accept(service.clone(), listener, drainer.signal());
                tokio::spawn(accepting)
            })
            .collect();
        self.lock().insert(add.uid, Served { drainer, listeners });
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WorkloadHandler for Pods {
    async fn add(&self, add: Add) -> Result<(), String> {
        self.start(add)
    }

    async fn del(&self, uid: &str, drain: Duration) {
        let Some(served) = self.lock().remove(uid) else {
            return;
        };
        served.drainer.drain();
        for listener in served.listeners {
            // A listener's task ends by returning, which closes the listener; one that panicked has closed it too.
            let _ = listener.await;
        }
        let drainer = served.drainer;
        tokio::spawn(async move { drainer.run(Drain::within(drain)).await });
    }

    async fn snapshot_sent(&self) {}

    async fn configure_node(&self, _: NodeConfiguration) -> Result<(), String> {
        Err("the relay does not capture on the node".to_owned())
    }

    fn connections(&self, uid: &str) -> u64 {
        let served = self.lock();
        served.get(uid).map_or(0, |pod| {
            // Each listener's task holds a signal as each connection does.
            pod.drainer.members().saturating_sub(pod.listeners.len()) as u64
        })
    }

    fn disconnected(&self) {}
}
