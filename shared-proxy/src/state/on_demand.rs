//! A store that learns of workloads and services when connections need them.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use futures_util::future::{BoxFuture, join_all};

use super::workload::{GatewayAddress, GatewayDestination};
use super::{NetworkAddress, Snapshot, Store};

/// Asks the control plane for single workloads and services.
pub trait OnDemand: fmt::Debug + Send + Sync + 'static {
    /// Returns when the control plane has answered for a name - `network/ip`, `namespace/hostname` or a uid - and the store
    /// holds what it stands for, if there is anything. While the control plane is not reachable that may take for ever.
    fn ask(&self, name: String) -> BoxFuture<'_, ()>;
}

impl Store {
    /// Makes the store ask for what it does not hold. Once; a second source is not used.
    pub fn learn_from(&self, source: Arc<dyn OnDemand>) {
        let _ = self.on_demand.set(source);
    }

    /// A snapshot with everything that a connection to an address of the local network needs to know: whose it is, and the
    /// gateways on the way there. At once, unless the store [asks](Store::learn_from) for what it does not hold.
    pub async fn knowing(&self, ip: IpAddr) -> Arc<Snapshot> {
        let Some(source) = self.on_demand.get() else {
            return self.load();
        };
        let mut asked = BTreeSet::new();
        loop {
            let snapshot = self.load();
            let mut missing = snapshot.missing_for(ip);
            // What was asked for and is still missing does not exist.
            missing.retain(|name| asked.insert(name.clone()));
            if missing.is_empty() {
                return snapshot;
            }
            join_all(missing.into_iter().map(|name| source.ask(name))).await;
        }
    }
}

impl Snapshot {
    /// Names of what is not known of an address and of the way to it.
    fn missing_for(&self, ip: IpAddr) -> Vec<String> {
        let address = self.local(ip);
        let mut missing = Vec::new();
        // A range that is known says nothing of the addresses in it that others have, and they come first.
        if !self.has_address(&address) {
            missing.push(address.to_string());
        }
        let service = self.service_by_address(&address);
        let workload = self.workload_by_address(&address);
        let mut gateways: Vec<GatewayAddress> = Vec::new();
        if let Some(service) = &service {
            gateways.extend(service.waypoints().cloned());
            let endpoints = self.endpoints(service).iter();
            gateways.extend(endpoints.filter_map(|endpoint| endpoint.network_gateway.clone()));
        }
        if let Some(workload) = &workload {
            gateways.extend(workload.waypoint.clone());
            gateways.extend(workload.network_gateway.clone());
        }
        gateways.sort_by_key(|gateway| gateway.destination.to_string());
        gateways.dedup_by(|a, b| a.destination == b.destination);
        let unknown = |gateway: &&GatewayAddress| match &gateway.destination {
            GatewayDestination::Address(address) => !self.holds(address),
            GatewayDestination::Hostname(name) => self.service(name).is_none(),
        };
        let unknown = gateways.iter().filter(unknown);
        missing.extend(unknown.map(|gateway| gateway.destination.to_string()));
        missing
    }

    fn holds(&self, address: &NetworkAddress) -> bool {
        self.workload_by_address(address).is_some() || self.service_by_address(address).is_some()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::sync::Mutex;

    use futures_util::FutureExt;

    use super::*;
    use crate::state::{Change, local_xds};

    /// A control plane that is asked.
    #[derive(Debug)]
    struct Knows {
        store: Arc<Store>,
        mesh: Snapshot,
        asked: Mutex<Vec<String>>,
    }

    impl OnDemand for Knows {
        fn ask(&self, name: String) -> BoxFuture<'_, ()> {
            async move {
                if let Ok(address) = name.parse::<NetworkAddress>() {
                    let workload = self.mesh.workload_by_address(&address);
                    self.store.update(workload.map(Change::Workload));
                    let service = self.mesh.service_by_address(&address);
                    self.store.update(service.map(Change::Service));
                } else {
                    let service = self.mesh.service(&name.parse().unwrap());
                    self.store.update(service.map(Change::Service));
                }
                self.asked.lock().unwrap().push(name);
            }
            .boxed()
        }
    }

    #[tokio::test]
    async fn asks_for_an_address_and_for_the_gateways_on_the_way_once_each() {
        let mesh = "
workloads:
- {uid: w, namespace: a, workloadIps: [10.0.0.1], services: {}, waypoint: {destination: a/way}}
services:
- {name: web, namespace: a, hostname: web, vips: [/10.1.0.1], ports: {80: 80}, waypoint: {destination: /10.1.0.2}}
- {name: way, namespace: a, hostname: way, vips: [/10.1.0.2], ports: {80: 80}}
- {name: wide, namespace: a, hostname: wide, vips: [], cidrVips: [/10.2.0.0/16], ports: {80: 80}}
- {name: inner, namespace: a, hostname: inner, vips: [/10.2.3.5], ports: {80: 80}}
";
        let store = Arc::new(Store::new());
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(
            store
                .knowing(ip("10.0.0.1"))
                .await
                .workload_by_ip(ip("10.0.0.1"))
                .is_none()
        );
        let source = Arc::new(Knows {
            store: Arc::clone(&store),
            mesh: local_xds::parse(mesh).unwrap(),
            asked: Mutex::default(),
        });
        store.learn_from(Arc::clone(&source) as Arc<_>);
        let asked = || std::mem::take(&mut *source.asked.lock().unwrap());
        let snapshot = store.knowing(ip("10.1.0.1")).await;
        assert!(snapshot.service_by_vip(ip("10.1.0.2")).is_some());
        assert_eq!(asked(), ["/10.1.0.1", "/10.1.0.2"]);
        let snapshot = store.knowing(ip("10.0.0.1")).await;
        assert!(snapshot.workload_by_ip(ip("10.0.0.1")).is_some());
        // The waypoint is known already.
        assert_eq!(asked(), ["/10.0.0.1"]);
        // What does not exist is asked for once per connection.
        store.knowing(ip("10.9.9.9")).await;
        assert_eq!(asked(), ["/10.9.9.9"]);
        // A range answers for what is in it, but may not have all of it to itself.
        let snapshot = store.knowing(ip("10.2.3.4")).await;
        assert_eq!(
            &*snapshot.service_by_vip(ip("10.2.3.4")).unwrap().name,
            "wide"
        );
        assert_eq!(asked(), ["/10.2.3.4"]);
        let snapshot = store.knowing(ip("10.2.3.5")).await;
        assert_eq!(
            &*snapshot.service_by_vip(ip("10.2.3.5")).unwrap().name,
            "inner"
        );
        assert_eq!(asked(), ["/10.2.3.5"]);
    }
}
