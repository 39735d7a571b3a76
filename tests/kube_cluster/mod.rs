//! A lab whose pods are in a cluster too: objects on an API server, agents that follow it, and `kubectl`.
#![allow(dead_code, reason = "each test program uses another part")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use host_net::netns::Netns;
use lab::standing::Daemon;
use lab::topology::{LabSpec, OUTSIDE};
use lab::traffic::Check;
use serde_json::{Value, json};

use crate::harness::{Scene, eventually, own};
use crate::kube_api::{Kind, Server, Store, strategic};

/// Where the API server listens on the outside host.
pub const PORT: u16 = 6443;
/// How long anything may take on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(60);
/// What the agent tells of a capture.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
/// The label that takes pods into the mesh.
pub const IN_MESH: &str = "istio.io/dataplane-mode=ambient";

/// A file that leads to a server.
pub fn kubeconfig(dir: &tempfile::TempDir, server: SocketAddr) -> PathBuf {
    let path = dir.path().join("kubeconfig");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": format!("http://{server}")}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "users": [{"name": "test", "user": {}}],
    });
    std::fs::write(&path, config.to_string()).unwrap();
    path
}

/// `kubectl` with nothing of this user's.
pub fn kubectl(kubeconfig: &PathBuf) -> Command {
    let mut kubectl = Command::new("kubectl");
    let home = kubeconfig.parent().unwrap();
    kubectl
        .env("HOME", home)
        .arg("--kubeconfig")
        .arg(kubeconfig);
    kubectl
}

/// Changes the status of a pod. A `kubectl` that has no word for it puts all of it.
pub fn set_status(
    kubectl: impl Fn(&str) -> String,
    dir: &Path,
    namespace: &str,
    name: &str,
    patch: &Value,
) {
    if kubectl("patch --help").contains("--subresource") {
        let what = format!("pod -n {namespace} {name} --subresource=status");
        kubectl(&format!("patch {what} --type=strategic -p {patch}"));
        return;
    }
    let object = kubectl(&format!("get pod -n {namespace} {name} -o json"));
    let mut object = serde_json::from_str(&object).unwrap();
    strategic(&mut object, patch);
    let file = dir.join("object.json");
    std::fs::write(&file, object.to_string()).unwrap();
    let place = format!("/api/v1/namespaces/{namespace}/pods/{name}/status");
    kubectl(&format!(
        "replace --validate=false --raw {place} -f {}",
        file.display()
    ));
}

/// A lab whose pods are in a cluster too, with an agent on each node that follows it.
pub struct Cluster {
    pub scene: Scene,
    pub store: Arc<Store>,
    pub server: Option<Server>,
    pub kubeconfig: PathBuf,
    _dir: tempfile::TempDir,
}

impl Cluster {
    /// A lab of this kind without a running API server; no pod is captured.
    pub fn without_server(mut spec: LabSpec) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kubeconfig = kubeconfig(&dir, (OUTSIDE, PORT).into());
        spec.leaves_pods = true;
        spec.agent_args = vec!["--source".to_owned(), "kubernetes".to_owned()];
        let path = kubeconfig.display().to_string();
        spec.daemon_env.insert("KUBECONFIG".to_owned(), path);
        let scene = own(&spec);
        let store = Arc::new(Store::default());
        store.namespace("alpha");
        store.namespace("beta");
        let cluster = Self {
            scene,
            store,
            server: None,
            kubeconfig,
            _dir: dir,
        };
        let topology = cluster.scene.lab.topology();
        for (_, pod) in topology.pods().filter(|(_, pod)| pod.capture.is_some()) {
            cluster.put(&pod.name);
        }
        cluster
    }

    /// Starts the server.
    pub fn serve(&mut self) {
        let netns = self.scene.lab.netns("out").unwrap();
        let at = (Ipv4Addr::UNSPECIFIED, PORT).into();
        self.server = Some(Server::start(&netns, at, &self.store));
    }

    /// The object of a pod of the lab that runs.
    pub fn put(&self, name: &str) {
        let ip = self.scene.pod(name).ip;
        let status = json!({"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}]});
        self.put_with(name, &status, &json!({"app": "x"}));
    }

    /// The same with this status and these labels.
    pub fn put_with(&self, name: &str, status: &Value, labels: &Value) {
        let (node, pod) = (self.scene.node_of(name), self.scene.pod(name));
        let object = json!({
            "metadata": {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid, "labels": labels},
            "spec": {
                "nodeName": format!("node{node}"), "serviceAccountName": pod.service_account,
                "containers": [{"name": "main", "image": "x"}],
            },
            "status": status,
        });
        self.store.create(Kind::Pod, object).unwrap();
    }

    /// A pod's object.
    pub fn object(&self, pod: &str) -> Option<Value> {
        self.store.pod(&self.scene.pod(pod).namespace, pod)
    }

    /// What is told of its capture.
    pub fn redirection(&self, pod: &str) -> Option<String> {
        let object = self.object(pod)?;
        object["metadata"]["annotations"][REDIRECTION]
            .as_str()
            .map(str::to_owned)
    }

    /// Status and reason of our condition.
    pub fn condition(&self, pod: &str) -> Option<(String, String)> {
        let object = self.object(pod)?;
        let conditions = object["status"]["conditions"].as_array()?;
        let ours = conditions
            .iter()
            .find(|c| c["type"] == "ambidex.io/Captured")?;
        let text = |key: &str| ours[key].as_str().unwrap_or_default().to_owned();
        Some((text("status"), text("reason")))
    }

    /// Reasons of the events of a pod.
    pub fn events(&self, pod: &str) -> BTreeSet<String> {
        let (_, events) = self.store.list(Kind::Event, &self.scene.pod(pod).namespace);
        let of_pod = events
            .iter()
            .filter(|event| event["regarding"]["name"] == pod);
        of_pod
            .map(|event| event["reason"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Output of `kubectl`, which must succeed.
    #[track_caller]
    pub fn kubectl(&self, arguments: &str) -> String {
        let out = self.scene.lab.netns("out").unwrap();
        let mut command = kubectl(&self.kubeconfig);
        command.args(arguments.split_whitespace());
        let done = out.run(|| command.output()).unwrap().unwrap();
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "kubectl {arguments}: {errors}");
        String::from_utf8(done.stdout).unwrap()
    }

    /// Names of the pods that the agents have captured.
    pub fn captured(&self) -> BTreeSet<String> {
        let mut captured = BTreeSet::new();
        for node in [1, 2] {
            let (_, pods) = self.scene.lab.ask_agent(node, "/v1/pods").unwrap();
            let pods: Vec<Value> = serde_json::from_str(&pods).unwrap();
            let pods = pods.iter().filter(|pod| pod["state"] == "captured");
            captured.extend(pods.map(|pod| pod["name"].as_str().unwrap().to_owned()));
        }
        captured
    }

    /// Waits until exactly these pods are captured.
    #[track_caller]
    pub fn comes_to(&self, what: &str, pods: &[&str]) {
        let wanted: BTreeSet<String> = pods.iter().map(|pod| (*pod).to_owned()).collect();
        eventually(&format!("{what}: captured are {wanted:?}"), LIMIT, || {
            self.captured() == wanted
        });
    }

    /// Status and body of a page of the agent of node1.
    pub fn page(&self, path: &str) -> (String, String) {
        let url = format!("http://127.0.0.1:{path}");
        let argv = ["curl", "-s", "-w", "\n%{http_code}", &url];
        let done = self.scene.lab.run("node1", &argv, LIMIT).unwrap();
        let (body, code) = done.stdout.rsplit_once('\n').unwrap();
        (code.to_owned(), body.to_owned())
    }

    /// An agent's log.
    pub fn agent_log(&self, node: u8) -> String {
        std::fs::read_to_string(self.scene.lab.log_path(node, Daemon::Agent)).unwrap()
    }

    /// A marker goes from one pod to another, and does not show on the wire between the nodes.
    pub fn is_encrypted(&self, from: &str, to: &str) -> bool {
        let node = format!("node{}", self.scene.node_of(from));
        let tap = self.scene.tap(&node, "eth0", "");
        let marked = self
            .scene
            .check(from, self.scene.at(to), Check::Marker { marker: None });
        !tap.finish().shows(&marked.marker.unwrap())
    }
}

/// The rule that leads a pod's connections past the proxy, put in front or taken away: every object stays in place, and the
/// proof fails.
pub fn lead_past(pod: &Netns, verb: &str) {
    let rule = ["-t", "nat", verb, "OUTPUT", "-p", "tcp", "-j", "ACCEPT"];
    let done = pod.run(|| Command::new("iptables-nft").args(rule).status());
    assert!(done.unwrap().unwrap().success(), "{rule:?}");
}
