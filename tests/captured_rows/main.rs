//! The tables of decisions once more, row by row, behind each capture: what the core's own tests show on sockets of their
//! making has to hold where owner, original destination and source address come from the kernel.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../harness/mod.rs"]
mod harness;
mod policies;
mod requests;
mod routes;

use std::sync::OnceLock;

use harness::{Scene, SharedStage, Variant, shared_in};
use lab::topology::workloads::{LocalXds, Service};
use lab::topology::{APPLICATION_PORT, SERVICE_PORT};
use serde_json::Value;

/// Pods of each node.
const PODS: u8 = 7;
/// Calls: `alpha/client` on node 1.
const CLIENT: &str = "pod1-1";
/// Is called: an endpoint of the lab's service, `alpha/server` on node 2.
const SERVER: &str = "pod2-1";
/// Is a waypoint.
const WAYPOINT: &str = "pod2-2";
/// Has an application tunnel.
const TUNNEL: &str = "pod2-3";
/// Lets nobody in.
const CLOSED: &str = "pod1-3";
/// Nobody has told of it.
const UNKNOWN: &str = "pod1-2";
/// Has no proxy.
const PLAIN: &str = "plain1";
/// Far over what any answer takes, also one that waits 5 s for the control plane.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);

fn set(state: &mut LocalXds, pod: &str, key: &str, value: Value) {
    let workload = state.workload_mut(pod).expect("the pod is a workload");
    workload.more.insert(key.to_owned(), value);
}

/// A service beside the lab's own, with the workload that is its endpoint.
fn service(state: &mut LocalXds, name: &str, vips: &[String], endpoint: Option<&str>) -> Service {
    let hostname = format!("{name}.beta.svc.cluster.local");
    if let Some(endpoint) = endpoint {
        let ports = [(SERVICE_PORT, APPLICATION_PORT)].into();
        let workload = state.workload_mut(endpoint).unwrap();
        workload.services.insert(format!("beta/{hostname}"), ports);
    }
    Service {
        name: name.to_owned(),
        hostname,
        vips: vips.to_vec(),
        ..state.services[0].clone()
    }
}

/// The lab of a capture, in which each test makes the state that it wants.
fn shared(variant: Variant) -> Scene {
    static STAGES: [OnceLock<SharedStage>; 3] = [const { OnceLock::new() }; 3];
    shared_in(&STAGES[variant as usize], || {
        let mut spec = variant.spec();
        spec.pods_per_node = PODS;
        spec
    })
}
