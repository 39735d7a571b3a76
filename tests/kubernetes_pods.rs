//! What becomes of pods of a cluster in each capture: closed and open again, and told so; another address, an address that
//! another pod has by now, another pod of the same name; while others talk.
#![cfg(feature = "kubernetes")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod kube_api;
mod kube_cluster;
mod runtime;

use std::net::Ipv4Addr;
use std::process::Command;

use harness::Variant::{self, Inpod, NodeHybrid};
use harness::eventually;
use harness::marked::Marked;
use kube_api::Kind;
use kube_cluster::{Cluster, IN_MESH, LIMIT, lead_past};
use rstest::rstest;
use runtime::{Sandbox, ambidex, pods, state_of};
use serde_json::{Value, json};

/// A cluster with all pods of its namespaces captured, and proven to be.
fn cluster(variant: Variant, mends: bool) -> Cluster {
    let mut spec = variant.spec();
    spec.mends = mends;
    let mut cluster = Cluster::without_server(spec);
    cluster.serve();
    cluster.kubectl(&format!("label namespace alpha beta {IN_MESH}"));
    cluster.comes_to("labelled", &["pod1-1", "pod1-2", "pod2-1", "pod2-2"]);
    eventually("it is told", LIMIT, || {
        let enabled = |pod: &&str| cluster.redirection(pod).as_deref() == Some("enabled");
        ["pod1-1", "pod1-2", "pod2-1"].iter().all(enabled)
    });
    cluster
}

fn on_node(cluster: &Cluster, command: &str) -> String {
    let node = cluster.scene.lab.netns("node1").unwrap();
    let done = node.run(|| Command::new("sh").args(["-c", command]).output());
    let done = done.unwrap().unwrap();
    assert!(done.status.success(), "{command}: {done:?}");
    String::from_utf8(done.stdout).unwrap()
}

/// What leads a pod's connections past the capture although all of it is in place.
fn way_past(cluster: &Cluster, variant: Variant, verb: &str) {
    if variant.is_node() {
        let (address, verb) = (cluster.scene.ip("pod1-2"), &verb[..3]);
        on_node(
            cluster,
            &format!("ip rule {verb} pref 50 from {address} lookup main"),
        );
    } else {
        let verb = if verb == "add" { "-I" } else { "-D" };
        lead_past(&cluster.scene.lab.netns("pod1-2").unwrap(), verb);
    }
}

/// A pod that cannot be mended is closed, and its object, its events and the metric say so; then that it is open again.
#[rstest]
fn a_closed_pod_is_told(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let cluster = cluster(variant, true);
    let condition = || {
        let (status, reason) = cluster.condition("pod1-2").unwrap_or_default();
        format!("{status} {reason}")
    };
    let metric = || {
        let name = format!(
            "ambidex_capture_effective{{namespace=\"beta\",pod=\"pod1-2\",capture_mode=\"{}\"}} ",
            variant.capture()
        );
        let (_, page) = cluster.page("15014/metrics");
        let value = page.lines().find_map(|line| line.strip_prefix(&name));
        value.unwrap_or_default().to_owned()
    };
    assert_eq!(condition(), "True Proven");
    eventually("the metric is 1", LIMIT, || metric() == "1");

    way_past(&cluster, variant, "add");
    eventually("the condition says that it is closed", LIMIT, || {
        condition() == "False Closed"
    });
    assert_eq!(cluster.redirection("pod1-2").as_deref(), Some("pending"));
    eventually("an event says so", LIMIT, || {
        cluster.events("pod1-2").contains("CaptureClosed")
    });
    assert_eq!(metric(), "0");
    let message = cluster.kubectl("get pod -n beta pod1-2 -o json");
    assert!(message.contains("its TCP is stopped in"), "{message}");
    assert!(!cluster.events("pod1-1").contains("CaptureClosed"));
    assert_eq!(cluster.redirection("pod1-1").as_deref(), Some("enabled"));

    way_past(&cluster, variant, "del");
    eventually("the condition says that it is open", LIMIT, || {
        condition() == "True Proven"
    });
    assert_eq!(cluster.redirection("pod1-2").as_deref(), Some("enabled"));
    eventually("an event says so", LIMIT, || {
        cluster.events("pod1-2").contains("CaptureMended")
    });
    eventually("the metric is 1 again", LIMIT, || metric() == "1");
}

/// The owner of an address in the set of captured pods.
fn owner(cluster: &Cluster, variant: Variant, address: Ipv4Addr) -> Option<String> {
    let set = match variant {
        Inpod => "istio-inpod-probes-v4",
        _ => "ztunnel-pods-ips",
    };
    let list = on_node(cluster, &format!("ipset list {set}"));
    let entry = format!("{address} comment ");
    let found = list.lines().find_map(|line| line.strip_prefix(&entry));
    found.map(|uid| uid.trim_matches('"').to_owned())
}

/// A pod gets another address, another pod gets the one that it had, and a third one has its name: each is captured with what it
/// has, nothing is left under what it had, and pods beside them notice nothing.
#[rstest]
fn addresses_and_names_change_hands(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let cluster = cluster(variant, false);
    let (scene, lab) = (&cluster.scene, &cluster.scene.lab);
    let marked = Marked::between(scene, "pod1-1", "pod2-1");
    let pod = scene.pod("pod1-2");
    let (before, after) = (pod.ip, Ipv4Addr::new(10, 244, 1, 150));
    assert_eq!(owner(&cluster, variant, before).as_ref(), Some(&pod.uid));

    on_node(&cluster, &format!("ip route add {after} dev {}", pod.veth));
    let netns = lab.netns("pod1-2").unwrap();
    let moved = netns.run(|| {
        let script = format!(
            "ip addr add {after}/32 dev eth0 && ip route replace default via $(ip route show default | \
             cut -d' ' -f3) dev eth0 onlink src {after} && ip addr del {before}/32 dev eth0"
        );
        Command::new("sh").args(["-c", &script]).output()
    });
    let moved = moved.unwrap().unwrap();
    assert!(moved.status.success(), "{moved:?}");
    on_node(&cluster, &format!("ip route del {before}"));
    let key = (Kind::Pod, pod.namespace.clone(), pod.name.clone());
    let status = json!({"status": {"podIP": after, "podIPs": [{"ip": after}]}});
    cluster.store.patch(&key, true, false, &status).unwrap();
    eventually("it is captured with the other address", LIMIT, || {
        let known = pods(lab);
        let known = known.iter().find(|known| known["uid"] == *pod.uid);
        known.is_some_and(|known| {
            known["addresses"] == json!([after]) && known["state"] == "captured"
        })
    });
    eventually("it is told", LIMIT, || {
        cluster.redirection("pod1-2").as_deref() == Some("enabled")
    });
    assert_eq!(owner(&cluster, variant, after).as_ref(), Some(&pod.uid));
    assert_eq!(owner(&cluster, variant, before), None);
    eventually("both prove to be captured", LIMIT, || {
        ambidex(lab, "verify").code == 0
    });

    // A pod that starts gets the address.
    let other = Sandbox::wired(lab, "next1", before);
    cluster.store.namespace("gamma");
    cluster.kubectl(&format!("label namespace gamma {IN_MESH}"));
    let object = json!({
        "metadata": {"name": other.name, "namespace": other.namespace, "uid": other.uid},
        "spec": {"nodeName": "node1", "serviceAccountName": other.service_account,
            "containers": [{"name": "main", "image": "x"}]},
        "status": {"phase": "Pending"},
    });
    cluster.store.create(Kind::Pod, object).unwrap();
    other.add(lab);
    assert_eq!(owner(&cluster, variant, before).as_ref(), Some(&other.uid));
    assert_eq!(owner(&cluster, variant, after).as_ref(), Some(&pod.uid));
    eventually("all prove to be captured", LIMIT, || {
        ambidex(lab, "verify").code == 0
    });

    // The first one is deleted and comes again, and nobody but Kubernetes says so.
    let third = Ipv4Addr::new(10, 244, 1, 11);
    assert_eq!(before, third, "what a pod of that name has in this lab");
    other.del(lab);
    other.destroy(lab);
    let gone = (Kind::Pod, other.namespace.clone(), other.name.clone());
    cluster.store.delete(&gone).unwrap();
    cluster.store.delete(&key).unwrap();
    on_node(&cluster, &format!("ip route del {after}"));
    scene.recreate("pod1-2");
    cluster.put("pod1-2");
    let again = scene.pod("pod1-2");
    assert_ne!(again.uid, pod.uid);
    eventually("the next pod of that name is captured", LIMIT, || {
        state_of(lab, &again.uid).as_deref() == Some("captured")
            && state_of(lab, &pod.uid).is_none()
    });
    assert_eq!(owner(&cluster, variant, after), None);
    assert_eq!(owner(&cluster, variant, before).as_ref(), Some(&again.uid));
    eventually("all prove to be captured once more", LIMIT, || {
        ambidex(lab, "verify").code == 0
    });
    let told: Value = cluster.object("pod1-2").unwrap();
    assert_eq!(told["metadata"]["uid"], *again.uid);
    marked.flows("after all of it");
    assert_eq!(marked.failed(), 0, "connections of pods beside them fail");
    marked.assert_never_in_the_clear();
}
