//! Agents on a real API server, if this machine has one, else on ours: what both have to answer in the same way.
#![cfg(feature = "kubernetes")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod kube_api;
mod kube_cluster;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use harness::{Scene, eventually, own};
use host_net::netns::Netns;
use kube_api::real::{Programs, RealServer, kubeconfig_of_real};
use kube_api::{Server, Store};
use kube_cluster::{IN_MESH, LIMIT, PORT, kubeconfig, kubectl, set_status};
use lab::topology::{Mode, OUTSIDE};
use lab::traffic::Check;
use serde_json::{Value, json};

/// How long a server may take to be ready on a busy machine.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// Whichever server there is.
enum AnyServer {
    Ours(#[expect(dead_code, reason = "held until it may end")] Server),
    Real(#[expect(dead_code, reason = "held until it may end")] RealServer),
}

impl AnyServer {
    fn start(netns: &Netns, dir: &Path, config: &PathBuf) -> Self {
        let at: SocketAddr = (Ipv4Addr::UNSPECIFIED, PORT).into();
        match Programs::of_this_machine() {
            Some(programs) => {
                println!("Kubernetes API: {}", programs.apiserver.display());
                let mut server = RealServer::start(netns, &programs, at, dir);
                let ready = || {
                    let mut ask = kubectl(config);
                    ask.args(["get", "--raw", "/readyz", "--request-timeout=5s"]);
                    let asked = netns.run(|| ask.output()).unwrap();
                    asked.is_ok_and(|asked| asked.status.success())
                };
                let waited = server.wait(READY_WITHIN, ready);
                waited.unwrap_or_else(|error| panic!("{error}"));
                Self::Real(server)
            }
            None => {
                println!("Kubernetes API: our watch-protocol server");
                Self::Ours(Server::start(netns, at, &Arc::new(Store::default())))
            }
        }
    }
}

fn run(scene: &Scene, config: &PathBuf, arguments: &str) -> String {
    let out = scene.lab.netns("out").unwrap();
    let mut command = kubectl(config);
    command.args(arguments.split_whitespace());
    let done = out.run(|| command.output()).unwrap().unwrap();
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "kubectl {arguments}: {errors}");
    String::from_utf8(done.stdout).unwrap()
}

fn captured(scene: &Scene) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for node in [1, 2] {
        let (_, pods) = scene.lab.ask_agent(node, "/v1/pods").unwrap();
        let pods: Vec<Value> = serde_json::from_str(&pods).unwrap();
        let pods = pods.iter().filter(|pod| pod["state"] == "captured");
        names.extend(pods.map(|pod| pod["name"].as_str().unwrap().to_owned()));
    }
    names
}

/// Pods that run are captured when their namespace gets the label, told about, and released; all of it by `kubectl` alone.
#[test]
fn agents_follow_whichever_server_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let config = match Programs::of_this_machine() {
        Some(_) => kubeconfig_of_real(dir.path(), (OUTSIDE, PORT).into()),
        None => kubeconfig(&dir, (OUTSIDE, PORT).into()),
    };
    let mut spec = harness::spec(Mode::Mixed);
    spec.leaves_pods = true;
    spec.agent_args = vec!["--source".to_owned(), "kubernetes".to_owned()];
    let path = config.display().to_string();
    spec.daemon_env.insert("KUBECONFIG".to_owned(), path);
    let scene = own(&spec);
    let server = AnyServer::start(&scene.lab.netns("out").unwrap(), dir.path(), &config);
    let kubectl = |arguments: &str| run(&scene, &config, arguments);
    println!("{}", kubectl("version").replace('\n', ", "));

    let make = |object: &Value| {
        let file = dir.path().join("made.json");
        fs::write(&file, object.to_string()).unwrap();
        kubectl(&format!("create --validate=false -f {}", file.display()));
    };
    for namespace in ["alpha", "beta"] {
        make(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}));
    }
    let topology = scene.lab.topology();
    for (node, pod) in topology.pods().filter(|(_, pod)| pod.capture.is_some()) {
        // The UID is the server's; the runtime's stands in the annotation that static pods have.
        make(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": pod.name, "namespace": pod.namespace,
                "annotations": {"kubernetes.io/config.mirror": pod.uid}},
            "spec": {"nodeName": node.name, "serviceAccountName": pod.service_account,
                "containers": [{"name": "main", "image": "x"}]},
        }));
        let status =
            json!({"status": {"phase": "Running", "podIP": pod.ip, "podIPs": [{"ip": pod.ip}]}});
        set_status(kubectl, dir.path(), &pod.namespace, &pod.name, &status);
    }
    assert_eq!(captured(&scene), BTreeSet::new());

    kubectl(&format!("label namespace alpha {IN_MESH}"));
    let alpha: BTreeSet<String> = ["pod1-1", "pod2-1"].map(str::to_owned).into();
    eventually("pods of the namespace are captured", LIMIT, || {
        captured(&scene) == alpha
    });
    let told = |pod: &str| {
        let object = kubectl(&format!("get pod -n alpha {pod} -o json"));
        let object: Value = serde_json::from_str(&object).unwrap();
        object["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled"
    };
    eventually("it is told", LIMIT, || alpha.iter().all(|pod| told(pod)));
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    eventually("an event says so", LIMIT, || {
        kubectl("get events -n alpha -o json").contains("Captured")
    });
    kubectl("delete pod -n alpha pod2-1 --wait=false --grace-period=0 --force");
    eventually("a pod that is deleted is released", LIMIT, || {
        captured(&scene) == ["pod1-1".to_owned()].into()
    });
    kubectl("label namespace alpha istio.io/dataplane-mode-");
    eventually("all are released", LIMIT, || captured(&scene).is_empty());
    drop(server);
}

/// A program that notes its arguments and does as a script says.
fn stand_in(dir: &Path, name: &str, then: &str) {
    let path = dir.join(name);
    let script = format!(
        "#!/bin/sh\nprintf '%s\\n' \"$@\" > {}.argv\n{then}\n",
        path.display()
    );
    // Written by another process than those that start it: a script that a child holds open cannot be run.
    let write = format!("printf '%s' \"$1\" > {0} && chmod 755 {0}", path.display());
    let status = Command::new("sh")
        .args(["-c", &write, "sh", &script])
        .status();
    assert!(status.unwrap().success());
}

/// Both programs of one place are taken, the directory before the search path; without both it is our own server.
#[test]
fn a_real_server_is_taken_where_there_is_one() {
    let places = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let [assets, path, half] = places.each_ref().map(tempfile::TempDir::path);
    for dir in [assets, path] {
        stand_in(dir, "etcd", "exec sleep 60");
        stand_in(dir, "kube-apiserver", "exec sleep 60");
    }
    stand_in(half, "kube-apiserver", "exec sleep 60");
    let os = |dir: &Path| dir.as_os_str().to_owned();
    let find = |assets: Option<&Path>, path: Option<&OsStr>| {
        Programs::find(assets.map(Path::as_os_str), path).map(|found| found.apiserver)
    };
    let both = std::env::join_paths([half, path]).unwrap();
    assert_eq!(
        find(Some(assets), Some(&both)),
        Some(assets.join("kube-apiserver"))
    );
    assert_eq!(
        find(Some(half), Some(&os(path))),
        Some(path.join("kube-apiserver"))
    );
    assert_eq!(find(None, Some(&os(half))), None);
    assert_eq!(find(Some(half), None), None);
    assert_eq!(find(None, None), None);
}

/// The server is started on its store, with a token and nobody else; one that ends, or is never ready, is said with its words.
#[test]
fn a_real_server_is_started_and_ends_with_the_test() {
    let netns = Netns::create_unnamed().unwrap();
    let programs = tempfile::tempdir().unwrap();
    let at: SocketAddr = (Ipv4Addr::LOCALHOST, PORT).into();
    let argv = |name: &str| {
        let file = programs.path().join(format!("{name}.argv"));
        fs::read_to_string(file).unwrap_or_default()
    };
    let start = |dir: &Path| {
        let found = Programs::find(Some(programs.path().as_os_str()), None).unwrap();
        RealServer::start(&netns, &found, at, dir)
    };
    stand_in(programs.path(), "etcd", "exec sleep 60");
    stand_in(programs.path(), "kube-apiserver", "exec sleep 60");
    let dir = tempfile::tempdir().unwrap();
    let mut server = start(dir.path());
    eventually("both run", LIMIT, || {
        !argv("etcd").is_empty() && argv("kube-apiserver").lines().count() >= 12
    });
    assert!(argv("etcd").contains("--listen-client-urls=http://127.0.0.1:2379\n"));
    let arguments = argv("kube-apiserver");
    for flag in [
        "--etcd-servers=http://127.0.0.1:2379",
        "--bind-address=127.0.0.1",
        "--secure-port=6443",
        "--anonymous-auth=false",
        &format!("--token-auth-file={}", dir.path().join("tokens").display()),
        &format!("--cert-dir={}", dir.path().join("certificates").display()),
    ] {
        assert!(
            arguments.lines().any(|line| line == flag),
            "{flag}: {arguments}"
        );
    }
    let config = fs::read_to_string(kubeconfig_of_real(dir.path(), at)).unwrap();
    let tokens = fs::read_to_string(dir.path().join("tokens")).unwrap();
    let token = tokens.split(',').next().unwrap();
    assert!(config.contains(token) && config.contains("https://127.0.0.1:6443"));
    server.wait(LIMIT, || true).unwrap();
    let late = server.wait(Duration::from_millis(300), || false);
    assert!(late.unwrap_err().contains("not ready within 300ms"));
    drop(server);

    stand_in(
        programs.path(),
        "kube-apiserver",
        "echo no such flag >&2; exit 3",
    );
    let mut server = start(dir.path());
    let ended = server.wait(LIMIT, || false).unwrap_err();
    assert!(
        ended.contains("exit status: 3") && ended.contains("no such flag"),
        "{ended}"
    );
}
