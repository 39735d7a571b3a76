//! What the node capture does for a pod, in the words in which operators of Istio's ambient mode know it (1.15 to 1.20).

use host_net::plan::{Member, Plan, Route, Step};
use node_redirect::facts::{PODS_SET, TABLE_INBOUND};

use super::Pod;

/// Says that a pod's objects on the node are made: a line for each address in the set, one for each route.
pub(super) fn tell(pod: &Pod, plan: &Plan) {
    for step in &plan.steps {
        match step {
            Step::Member(member) => tell_member(pod, member),
            Step::Route(route) => tell_route(pod, route),
            _ => {}
        }
    }
}

fn tell_member(pod: &Pod, member: &Member) {
    if member.set == PODS_SET {
        let (name, namespace, uid) = (&pod.name, &pod.namespace, &pod.uid);
        tracing::info!(target: "ambient", "Adding pod '{name}/{namespace}' ({uid}) to ipset");
    }
}

fn tell_route(pod: &Pod, route: &Route) {
    if let (TABLE_INBOUND, Some(via), Some(src)) = (route.table, route.via, route.src) {
        let (name, namespace) = (&pod.name, &pod.namespace);
        let Route {
            table, dst, dev, ..
        } = route;
        tracing::info!(
            target: "ambient",
            "Adding route for {name}/{namespace}: [table {table} {dst} via {via} dev {dev} src {src}]"
        );
    }
}
