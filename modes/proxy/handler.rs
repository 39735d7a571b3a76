//! What the agent's requests do in the proxy: scopes are attached to the core and detached from it.

mod switching;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use host_net::netns::Netns;
use inpod_redirect::scope::InpodScope;
use inpod_redirect::zds::client::WorkloadHandler;
use inpod_redirect::zds::{Add, Delays, Mode, NodeConfiguration, Release};
use node_redirect::plan::Flow;
use node_redirect::scope::{NodeScope, NodeScopeConfig, SameNode};
use serde_json::Value;
use shared_proxy::capture::{LocalWorkload, Scope};
use shared_proxy::core::{Attached, Core};
use shared_proxy::drain::Drain;
use shared_proxy::identity::{Certificates, Identity};
use shared_proxy::telemetry::{ConnectionInfo, Readiness, ReadinessTask, Telemetry};

use super::{ProxyConfig, dump};
use switching::Switch;

/// Readiness task that is open until the agent's snapshot is served.
const MANAGER: &str = "workload proxy manager";

/// How long a pod's certificate may take. Less than the agent waits for the acknowledgement (5 s), so that it hears why.
const CERTIFICATE_WITHIN: Duration = Duration::from_secs(4);

/// A pod that is served.
struct Served {
    workload: LocalWorkload,
    identity: Identity,
    /// Its own scope, if it has one; node-captured pods share theirs.
    scope: Option<Attached>,
    /// While its capture changes.
    switch: Option<Switch>,
}

/// The node-wide scope and the configuration that it was made with.
struct NodeWide {
    configuration: NodeConfiguration,
    scope: Arc<NodeScope>,
    attached: Attached,
}

/// The pods that this proxy serves.
pub(super) struct Workloads {
    core: Core,
    certificates: Arc<Certificates>,
    telemetry: Arc<Telemetry>,
    own_netns: Netns,
    trust_domain: String,
    drain: Duration,
    readiness: Readiness,
    not_ready: Mutex<Option<ReadinessTask>>,
    served: Mutex<HashMap<Arc<str>, Served>>,
    node: Mutex<Option<NodeWide>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workloads {
    pub(super) fn new(
        core: Core,
        certificates: Arc<Certificates>,
        telemetry: Arc<Telemetry>,
        own_netns: Netns,
        config: &ProxyConfig,
        readiness: Readiness,
    ) -> Self {
        Self {
            core,
            certificates,
            telemetry,
            own_netns,
            trust_domain: config.trust_domain.clone(),
            drain: config.drain,
            not_ready: Mutex::new(Some(readiness.register(MANAGER))),
            readiness,
            served: Mutex::default(),
            node: Mutex::default(),
        }
    }

    /// The section `workloadState` of the configuration dump.
    pub(super) fn state(&self) -> Value {
        let served = lock(&self.served);
        let open = self.telemetry.connections();
        served
            .values()
            .map(|served| {
                let mode = match served.scope {
                    Some(_) => Mode::Inpod,
                    None => Mode::Node,
                };
                let state = dump::workload_state(
                    &served.workload,
                    &self.trust_domain,
                    mode.as_str(),
                    &open,
                );
                (served.workload.uid.to_string(), state)
            })
            .collect::<serde_json::Map<_, _>>()
            .into()
    }

    async fn start(&self, add: Add) -> Result<(), String> {
        let workload = LocalWorkload {
            uid: Arc::clone(&add.uid),
            name: add.info.name.as_str().into(),
            namespace: add.info.namespace.as_str().into(),
            service_account: add.info.service_account.as_str().into(),
            addresses: add.addresses.into(),
        };
        let identity = Identity::new(
            self.trust_domain.as_str(),
            add.info.namespace.as_str(),
            add.info.service_account.as_str(),
        )
        .map_err(|error| error.to_string())?;
        let scope = (add.mode, add.netns, add.guests);
        let served = self.serve(workload, &identity, scope).await;
        if served.is_err() {
            self.forget_unused(&identity);
        }
        served
    }

    async fn serve(
        &self,
        workload: LocalWorkload,
        identity: &Identity,
        (mode, netns, guests): (Mode, Option<Netns>, bool),
    ) -> Result<(), String> {
        // An acknowledgement promises that the pod's connections can be served: with its certificate.
        tokio::time::timeout(CERTIFICATE_WITHIN, self.certificates.get(identity))
            .await
            .map_err(|_| format!("no certificate for {identity} within {CERTIFICATE_WITHIN:?}"))?
            .map_err(|error| error.to_string())?;
        let scope = match (mode, netns) {
            (Mode::Inpod, Some(netns)) => Some(self.attach(&workload, netns, guests).await?),
            (Mode::Inpod, None) => {
                return Err("in-pod capture needs the pod's network namespace".to_owned());
            }
            (Mode::Node, _) => {
                let node = lock(&self.node);
                let node = node
                    .as_ref()
                    .ok_or("the agent has not configured node capture")?;
                node.scope.announce(workload.clone());
                None
            }
        };
        lock(&self.served).insert(
            Arc::clone(&workload.uid),
            Served {
                workload,
                identity: identity.clone(),
                scope,
                switch: None,
            },
        );
        self.telemetry.workload_manager().proxy_started();
        Ok(())
    }

    /// Serves a pod inside its namespace.
    async fn attach(
        &self,
        workload: &LocalWorkload,
        netns: Netns,
        guests: bool,
    ) -> Result<Attached, String> {
        let scope = InpodScope::new(netns, workload.clone(), &self.own_netns)
            .map_err(|error| error.to_string())?
            .with_guests(guests);
        let attached = self.core.attach(Arc::new(scope)).await;
        attached.map_err(|error| error.to_string())
    }

    /// Stops renewing the certificate of an identity that no served pod has.
    fn forget_unused(&self, identity: &Identity) {
        if !lock(&self.served)
            .values()
            .any(|served| served.identity == *identity)
        {
            self.certificates.forget(identity);
        }
    }
}

impl WorkloadHandler for Workloads {
    async fn add(&self, add: Add) -> Result<(), String> {
        self.start(add).await
    }

    async fn del(&self, uid: &str, drain: Duration) {
        let Some(served) = lock(&self.served).remove(uid) else {
            return;
        };
        self.telemetry.workload_manager().proxy_stopped();
        self.forget_unused(&served.identity);
        match served.scope {
            Some(mut attached) => {
                attached.stop_accepting().await;
                tokio::spawn(attached.detach(Drain::within(drain)));
            }
            None => {
                let capture_mode = lock(&self.node).as_ref().map(|node| {
                    node.scope.withdraw(uid);
                    node.scope.id().capture_mode
                });
                let Some(capture_mode) = capture_mode else {
                    return;
                };
                let core = self.core.clone();
                let end = async move {
                    let drain = Drain::within(drain);
                    core.end_pod(&served.workload, capture_mode, drain).await;
                };
                // Whoever gives no time wants to hear when it is over.
                match drain.is_zero() {
                    true => end.await,
                    false => drop(tokio::spawn(end)),
                }
            }
        }
    }

    async fn hold(&self, uid: &str, within: Duration) -> Result<(), String> {
        self.begin_switch(uid, within).await
    }

    async fn prepare(&self, add: Add) -> Result<(), String> {
        self.prepare_switch(add).await
    }

    async fn release(&self, uid: &str, release: Release) -> Delays {
        self.end_switch(uid, release).await
    }

    async fn snapshot_sent(&self) {
        if let Some(task) = lock(&self.not_ready).take() {
            task.done();
        }
    }

    async fn configure_node(&self, configuration: NodeConfiguration) -> Result<(), String> {
        if lock(&self.node)
            .as_ref()
            .is_some_and(|node| node.configuration == configuration)
        {
            return Ok(());
        }
        let scope = Arc::new(NodeScope::new(
            self.own_netns.clone(),
            NodeScopeConfig {
                flow: configuration
                    .flow
                    .parse::<Flow>()
                    .map_err(|error| error.to_string())?,
                same_node: configuration
                    .same_node
                    .parse::<SameNode>()
                    .map_err(|error| error.to_string())?,
                local_addresses: configuration.node_addresses.clone(),
            },
        ));
        let previous = lock(&self.node).take();
        if let Some(mut previous) = previous {
            // Its ports are wanted again; its connections may go on, and the agent does not wait for them.
            previous.attached.stop_accepting().await;
            tokio::spawn(previous.attached.detach(Drain::within(self.drain)));
        }
        for served in lock(&self.served)
            .values()
            .filter(|served| served.scope.is_none())
        {
            scope.announce(served.workload.clone());
        }
        let attached = self
            .core
            .attach(Arc::clone(&scope) as Arc<_>)
            .await
            .map_err(|error| error.to_string())?;
        *lock(&self.node) = Some(NodeWide {
            configuration,
            scope,
            attached,
        });
        Ok(())
    }

    fn pending(&self, pods: usize) {
        self.telemetry.workload_manager().set_pending(pods);
    }

    fn connections(&self, uid: &str) -> u64 {
        let open = self.telemetry.connections();
        lock(&self.served)
            .get(uid)
            .map_or(0, |served| connections_of(&served.workload, &open))
    }

    fn disconnected(&self) {
        let mut not_ready = lock(&self.not_ready);
        if not_ready.is_none() {
            *not_ready = Some(self.readiness.register(MANAGER));
        }
    }
}

/// How many of the open connections a pod is one end of.
fn connections_of(workload: &LocalWorkload, open: &[ConnectionInfo]) -> u64 {
    let of_pod = |address: SocketAddr| workload.addresses.contains(&address.ip());
    let of_pod = |connection: &&ConnectionInfo| {
        of_pod(connection.source.addr) || of_pod(connection.destination.addr)
    };
    open.iter().filter(of_pod).count() as u64
}
