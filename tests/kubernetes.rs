//! Pods from Kubernetes: labels, annotations, an API server that goes and comes back; with real agents, proxies and pods, and
//! `kubectl`.
#![cfg(feature = "kubernetes")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod kube_api;
mod kube_cluster;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use harness::eventually;
use host_net::netns::Netns;
use kube_api::{Kind, Server, Store};
use kube_cluster::{Cluster, IN_MESH, LIMIT, PORT, kubeconfig, kubectl, lead_past, set_status};
use lab::topology::Mode;
use serde_json::{Value, json};

/// For how long the API server is away.
const OUTAGE: Duration = Duration::from_secs(5);

const ALL: [&str; 4] = ["pod1-1", "pod1-2", "pod2-1", "pod2-2"];

#[test]
fn pods_follow_their_labels() {
    let mut cluster = Cluster::without_server(harness::spec(Mode::Mixed));
    let broken = cluster.scene.lab.netns("pod1-2").unwrap();
    // The tables that the command leaves behind.
    ["-I", "-D"]
        .iter()
        .for_each(|verb| lead_past(&broken, verb));
    let clean: Vec<String> = ["pod1-1", "pod1-2", "node1"]
        .map(|at| cluster.scene.dump(at))
        .into();

    // Nobody knows who is captured, so nobody starts, and the agent is not ready.
    let (code, why) = cluster.page("8000/readyz");
    assert_eq!(code, "503", "{why}");
    assert!(why.contains("API server"), "{why}");
    let refused = cluster.scene.lab.add_pod("pod1-1").unwrap_err().to_string();
    assert!(refused.contains("API server cannot be asked"), "{refused}");
    cluster.serve();
    eventually("the agent is ready", LIMIT, || {
        cluster.page("8000/readyz").0 == "200"
    });
    assert!(
        cluster
            .page("15014/metrics")
            .1
            .contains("\nambidex_kubernetes_connected 1")
    );
    cluster.scene.lab.add_pod("pod1-1").unwrap();
    assert_eq!(cluster.captured(), BTreeSet::new(), "no label says so");

    // Running pods are captured, in both modes; what cannot be proven is not told.
    lead_past(&broken, "-I");
    cluster.kubectl(&format!("label namespace alpha beta {IN_MESH}"));
    cluster.comes_to("labelled namespaces", &ALL);
    eventually("what is proven is told", LIMIT, || {
        let enabled = |pod: &&str| cluster.redirection(pod).as_deref() == Some("enabled");
        ["pod1-1", "pod2-1", "pod2-2"].iter().all(enabled)
            && cluster.redirection("pod1-2").as_deref() == Some("pending")
    });
    let not_effective = ("False".to_owned(), "NotEffective".to_owned());
    assert_eq!(cluster.condition("pod1-2"), Some(not_effective));
    lead_past(&broken, "-D");
    eventually("it is tried again and told", LIMIT, || {
        cluster.redirection("pod1-2").as_deref() == Some("enabled")
    });
    assert_eq!(
        cluster.condition("pod1-2"),
        Some(("True".to_owned(), "Proven".to_owned()))
    );
    eventually("events say so", LIMIT, || {
        cluster
            .events("pod1-2")
            .is_superset(&["CaptureBroken", "CaptureMended"].map(str::to_owned).into())
            && cluster.events("pod1-1").contains("Captured")
    });
    assert!(cluster.is_encrypted("pod1-1", "pod2-2"));
    assert!(cluster.is_encrypted("pod1-2", "pod2-1"));

    // The API server goes away, and comes back with another state and no history.
    drop(cluster.server.take());
    let alpha = |name: &str| (Kind::Pod, "alpha".to_owned(), name.to_owned());
    let none = json!({"metadata": {"labels": {"ambidex.io/capture-mode": "none"}}});
    cluster
        .store
        .patch(&alpha("pod1-1"), false, false, &none)
        .unwrap();
    let beta = (Kind::Pod, "beta".to_owned(), "pod2-2".to_owned());
    cluster.store.delete(&beta).unwrap();
    cluster.store.forget_history();
    std::thread::sleep(OUTAGE);
    assert!(
        cluster.is_encrypted("pod1-1", "pod2-1"),
        "captured pods stay captured"
    );
    cluster.comes_to("without an API server nothing changes", &ALL);
    cluster.serve();
    cluster.comes_to("what changed meanwhile is found", &["pod1-2", "pod2-1"]);
    eventually("it is told", LIMIT, || {
        cluster.redirection("pod1-1").is_none()
    });
    assert_eq!(cluster.condition("pod1-1"), None);

    // Out of the mesh: everything is as before, and it is told.
    cluster.kubectl("label namespace beta istio.io/dataplane-mode-");
    cluster.comes_to("beta is not labelled any more", &["pod2-1"]);
    for (place, clean) in ["pod1-1", "pod1-2", "node1"].iter().zip(&clean) {
        eventually(&format!("{place} is as before"), LIMIT, || {
            cluster.scene.dump(place) == *clean
        });
    }
    assert!(!cluster.is_encrypted("pod1-2", "pod2-2"));

    // What may not be told is said once, and pods are captured all the same.
    cluster.store.deny("patch", "pods/status");
    cluster.kubectl("label pod -n alpha pod1-1 ambidex.io/capture-mode=inpod --overwrite");
    cluster.comes_to("another mode", &["pod1-1", "pod2-1"]);
    eventually("the log says what is missing", LIMIT, || {
        cluster.agent_log(1).contains("patch pods/status: ")
    });
    let mode = |uid: &str| {
        let (_, pods) = cluster.scene.lab.ask_agent(1, "/v1/pods").unwrap();
        let pods: Vec<Value> = serde_json::from_str(&pods).unwrap();
        let pod = pods.into_iter().find(|pod| pod["uid"] == uid).unwrap();
        pod["mode"].as_str().unwrap().to_owned()
    };
    assert_eq!(mode(&cluster.scene.pod("pod1-1").uid), "inpod");
    let patches = || {
        let requests = cluster.store.requests();
        requests
            .iter()
            .filter(|request| *request == "patch pods/status pod1-1")
            .count()
    };
    let before = patches();
    std::thread::sleep(Duration::from_secs(2));
    assert!(patches() <= before + 1, "asked again and again");
    cluster.store.allow_all();

    // A pod that ended, and one whose name another one has by now.
    let ended = json!({"status": {"phase": "Succeeded"}});
    let dir = cluster.kubeconfig.parent().unwrap();
    set_status(
        |arguments| cluster.kubectl(arguments),
        dir,
        "alpha",
        "pod1-1",
        &ended,
    );
    cluster.comes_to("a pod that has ended", &["pod2-1"]);
    let old = cluster.scene.pod("pod2-1").uid;
    cluster.kubectl("delete pod -n alpha pod2-1 --wait=false");
    cluster.comes_to("a pod that is deleted", &[]);
    cluster.scene.recreate("pod2-1");
    cluster.put("pod2-1");
    cluster.comes_to("another pod of that name", &["pod2-1"]);
    assert_ne!(cluster.scene.pod("pod2-1").uid, old);
    eventually("its capture is told", LIMIT, || {
        cluster.redirection("pod2-1").as_deref() == Some("enabled")
    });

    // What a runtime adds is judged by its labels: captured before it starts, or not at all.
    let in_mesh = json!({"istio.io/dataplane-mode": "ambient"});
    cluster.put_with("pod2-2", &json!({"phase": "Pending"}), &in_mesh);
    cluster.scene.lab.add_pod("pod2-2").unwrap();
    assert!(cluster.captured().contains("pod2-2"));
    eventually("its capture is told, too", LIMIT, || {
        cluster.redirection("pod2-2").as_deref() == Some("enabled")
    });
}

/// The server is one to those who know others.
#[test]
fn kubectl_takes_the_server() {
    let store = Arc::new(Store::default());
    store.namespace("shop");
    let netns = Netns::create_unnamed().unwrap();
    let up = netns.run(|| {
        Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status()
    });
    assert!(up.unwrap().unwrap().success());
    let at: SocketAddr = (Ipv4Addr::LOCALHOST, PORT).into();
    let _server = Server::start(&netns, at, &store);
    let dir = tempfile::tempdir().unwrap();
    let config = kubeconfig(&dir, at);
    let run = |arguments: &str| {
        let mut command = kubectl(&config);
        command.args(arguments.split_whitespace());
        let done = netns.run(|| command.output()).unwrap().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            done.status.success(),
            text(&done.stdout),
            text(&done.stderr),
        )
    };
    let fine = |arguments: &str| {
        let (fine, out, errors) = run(arguments);
        assert!(fine, "kubectl {arguments}: {errors}");
        out
    };
    println!(
        "Kubernetes API: our watch-protocol server; {}",
        fine("version").replace('\n', ", ")
    );
    for name in ["till", "stock"] {
        let object = json!({"metadata": {"name": name, "namespace": "shop"},
            "spec": {"nodeName": format!("node-of-{name}")}, "status": {"phase": "Running"}});
        store.create(Kind::Pod, object).unwrap();
    }
    let names = fine("get pods -n shop -o name");
    assert_eq!(names, "pod/stock\npod/till\n");
    let one = fine("get pods -A -o name --field-selector spec.nodeName=node-of-till");
    assert_eq!(one, "pod/till\n");

    let mut watching = kubectl(&config);
    watching.args([
        "get",
        "pods",
        "-n",
        "shop",
        "-w",
        "--no-headers",
        "--output-watch-events",
    ]);
    watching.stdout(Stdio::piped());
    let mut watching = netns.run(|| watching.spawn()).unwrap().unwrap();
    let lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let (sender, seen) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        lines
            .map_while(Result::ok)
            .try_for_each(|line| sender.send(line))
    });
    let sees = |wanted: &str| {
        let line = seen.recv_timeout(LIMIT).expect(wanted);
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[..2], wanted.split(' ').collect::<Vec<_>>());
    };
    sees("ADDED stock");
    sees("ADDED till");
    fine("label pod -n shop till tier=front");
    sees("MODIFIED till");
    assert_eq!(fine("get pods -n shop -l tier=front -o name"), "pod/till\n");
    assert_eq!(
        fine("get pods -n shop -l tier!=front -o name"),
        "pod/stock\n"
    );
    fine("annotate pod -n shop till note=x");
    sees("MODIFIED till");
    let condition = json!({"status": {"conditions": [{"type": "A", "status": "True"}]}});
    set_status(fine, dir.path(), "shop", "till", &condition);
    sees("MODIFIED till");
    let more = json!({"spec": {"nodeName": "n"}, "status": {"conditions": [
        {"type": "B", "status": "True"}, {"type": "A", "status": "False"}]}});
    set_status(fine, dir.path(), "shop", "till", &more);
    sees("MODIFIED till");
    let till = store.pod("shop", "till").unwrap();
    let statuses = till["status"]["conditions"].as_array().unwrap();
    let statuses: Vec<&str> = statuses
        .iter()
        .map(|c| c["status"].as_str().unwrap())
        .collect();
    assert_eq!(statuses, ["False", "True"]);
    assert_eq!(
        till["spec"]["nodeName"], "node-of-till",
        "the status alone was meant"
    );
    let (taken, _, why) =
        run("patch pod -n shop till --type=merge -p {\"metadata\":{\"uid\":\"other\"}}");
    assert!(!taken && why.contains("Conflict"), "{why}");
    let (found, _, why) = run("get pod -n shop nobody");
    assert!(!found && why.contains("NotFound"), "{why}");
    store.deny("delete", "pods");
    let (done, _, why) = run("delete pod -n shop till");
    assert!(!done && why.contains("Forbidden"), "{why}");
    store.allow_all();
    fine("delete pod -n shop till");
    sees("DELETED till");
    watching.kill().unwrap();
    watching.wait().unwrap();
}
