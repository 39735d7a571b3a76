//! What a container runtime and an operator do to a node of a lab: plugin calls with any content, raw requests to the
//! agent's sockets, commands; and the network state of all places that an agent touches.
#![allow(dead_code, reason = "each test program uses another part")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod hostile;
pub mod successor;

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use host_net::netns::Netns;
use lab::standing::{Daemon, Lab};
use lab::topology::network::Attachment;
use serde_json::{Value, json};

use crate::harness;

/// A program's end.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Done {
    /// Runs a program to its end.
    pub fn of(command: &mut Command, input: &[u8]) -> Self {
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        // A program may end without reading.
        let _ = child.stdin.take().unwrap().write_all(input);
        let output = child.wait_with_output().unwrap();
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
            took: started.elapsed(),
        }
    }

    /// Standard output, if the exit code is `code`.
    #[track_caller]
    pub fn with_code(self, code: i32) -> String {
        assert_eq!(self.code, code, "{}{}", self.stdout, self.stderr);
        self.stdout
    }

    /// The CNI error object, if it failed with one.
    #[track_caller]
    pub fn cni_error(&self) -> Value {
        assert_eq!(self.code, 1, "{self:?}");
        let error: Value = serde_json::from_str(&self.stdout).expect("an error object");
        for key in ["cniVersion", "code", "msg", "details"] {
            assert!(!error[key].is_null(), "no {key} in {error}");
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        error
    }
}

/// The plugin.
pub fn plugin() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ambidex-cni"))
}

/// A sandbox as the runtime knows it.
#[derive(Debug, Clone)]
pub struct Sandbox {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub service_account: String,
    pub container_id: String,
    pub netns: PathBuf,
    pub ip: Ipv4Addr,
}

impl Sandbox {
    /// A pod of the lab.
    pub fn of(lab: &Lab, pod: &str) -> Self {
        let topology = lab.topology();
        let (_, pod) = topology.pod(pod).unwrap();
        Self {
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            uid: pod.uid.clone(),
            service_account: pod.service_account.clone(),
            container_id: pod.container_id.clone(),
            netns: Netns::path_of(&pod.netns),
            ip: pod.ip,
        }
    }

    /// A pod that the lab did not plan: a namespace wired to node1. It goes with the lab.
    pub fn wired(lab: &Lab, name: &str, ip: Ipv4Addr) -> Self {
        let sandbox = Self::unwired(lab, name, ip);
        sandbox.wire(lab);
        sandbox
    }

    fn netns_name(lab: &Lab, name: &str) -> String {
        format!("{}{name}", lab::topology::netns_prefix(&lab.name()))
    }

    fn unwired(lab: &Lab, name: &str, ip: Ipv4Addr) -> Self {
        let netns = Self::netns_name(lab, name);
        Netns::create_named(&netns).unwrap();
        Self {
            name: name.to_owned(),
            namespace: "gamma".to_owned(),
            uid: format!("uid-{name}"),
            service_account: "many".to_owned(),
            container_id: format!("sandbox-{name}"),
            netns: Netns::path_of(&netns),
            ip,
        }
    }

    /// The node's end of the veth.
    pub fn veth(&self) -> String {
        format!("v{}", self.name)
    }

    /// Wires the namespace to node1.
    pub fn wire(&self, lab: &Lab) {
        let topology = lab.topology();
        let node = topology.node(1).unwrap();
        let netns = self.netns.file_name().unwrap().to_str().unwrap().to_owned();
        let attachment = Attachment {
            veth: &self.veth(),
            netns: &netns,
            ip: self.ip,
            gateway: node.pod_gateway,
            cni: node.cni,
            families: node.families,
        };
        ip_batch(&node.netns, &attachment.node_side());
        ip_batch(&netns, &attachment.pod_side());
    }

    /// Removes the namespace, as a runtime does after DEL, or without one.
    pub fn destroy(&self, lab: &Lab) {
        let topology = lab.topology();
        let node = topology.node(1).unwrap();
        ip_batch(&node.netns, &format!("link delete {}\n", self.veth()));
        Netns::delete_named(self.netns.file_name().unwrap().to_str().unwrap()).unwrap();
    }

    fn prev_result(&self) -> Value {
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "eth0", "sandbox": self.netns}],
            "ips": [{"interface": 0, "address": format!("{}/32", self.ip)}],
        })
    }

    /// Name of the network that all pods of a lab are attached to.
    pub fn network(lab: &Lab) -> String {
        format!("ambidex-lab-{}", lab.name())
    }

    /// The configuration that the plugin gets.
    pub fn config(&self, lab: &Lab) -> Value {
        json!({
            "cniVersion": "1.1.0",
            "name": Self::network(lab),
            "type": "ambidex-cni",
            "cni_agent_run_dir": lab.run_dir(1),
            "ambient_enabled": true,
            "prevResult": self.prev_result(),
        })
    }

    /// The event that the plugin makes of it.
    pub fn event(&self) -> Value {
        json!({
            "Netns": self.netns, "PodName": self.name, "PodNamespace": self.namespace, "PodUID": self.uid,
            "ServiceAccount": self.service_account, "ContainerID": self.container_id,
            "IPs": [{"Interface": 0, "Address": {"IP": self.ip, "Mask": "/////w=="}, "Gateway": null}],
        })
    }

    /// Calls the plugin.
    pub fn call(&self, lab: &Lab, verb: &str) -> Done {
        self.call_with(verb, self.config(lab).to_string().as_bytes())
    }

    /// Calls the plugin with any standard input.
    pub fn call_with(&self, verb: &str, input: &[u8]) -> Done {
        Done::of(&mut self.command(verb), input)
    }

    /// A call of the plugin.
    pub fn command(&self, verb: &str) -> Command {
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_UID={};AMBIDEX_SERVICE_ACCOUNT={}",
            self.namespace, self.name, self.uid, self.service_account
        );
        let mut command = plugin();
        command
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", "/");
        command
    }

    /// ADD that must succeed.
    #[track_caller]
    pub fn add(&self, lab: &Lab) {
        self.call(lab, "ADD").with_code(0);
    }

    /// DEL that must succeed.
    #[track_caller]
    pub fn del(&self, lab: &Lab) {
        assert_eq!(self.call(lab, "DEL").with_code(0), "");
    }
}

/// `ip -batch` in a namespace.
pub fn ip_batch(netns: &str, batch: &str) {
    let mut command = Command::new("ip");
    command.args(["-netns", netns, "-batch", "-"]);
    Done::of(&mut command, batch.as_bytes()).with_code(0);
}

/// `ambidex` as an operator of node1 runs it.
pub fn ambidex(lab: &Lab, arguments: &str) -> Done {
    let mut command = Command::new(harness::ambidex());
    command.args(arguments.split(' ')).envs(lab.environment(1));
    let node = lab.netns("node1").unwrap();
    node.run(|| Done::of(&mut command, b"")).unwrap()
}

/// `ambidex diff` finds nothing on node1.
#[track_caller]
pub fn diff_is_empty(lab: &Lab, subject: &str) {
    assert_eq!(ambidex(lab, &format!("diff {subject}")).with_code(0), "");
}

/// The pods that the agent of node1 knows.
pub fn pods(lab: &Lab) -> Vec<Value> {
    let json = ambidex(lab, "get pods -o json").with_code(0);
    serde_json::from_str(&json).unwrap()
}

/// State of a pod, if the agent of node1 knows it.
pub fn state_of(lab: &Lab, uid: &str) -> Option<String> {
    let pods = pods(lab);
    let pod = pods.iter().find(|pod| pod["uid"] == uid)?;
    Some(pod["state"].as_str().unwrap().to_owned())
}

/// The state of namespaces of the lab, by target.
pub fn dumps(lab: &Lab, targets: &[&str]) -> Vec<(String, String)> {
    let dump = |target: &&str| {
        let dump = harness::dump(&lab.netns(target).unwrap());
        (target.to_string(), dump)
    };
    targets.iter().map(dump).collect()
}

/// Fails with what differs.
#[track_caller]
pub fn assert_same(what: &str, before: &[(String, String)], after: &[(String, String)]) {
    for ((target, before), (_, after)) in before.iter().zip(after) {
        harness::assert_same_dump(&format!("{what}: {target}"), before, after);
    }
}

/// Starts the agent of node1 and waits until pods can be enrolled.
pub fn start_agent(lab: &Lab) {
    lab.start(1, Daemon::Agent).unwrap();
    lab.wait_ready(1, &|_| {}).unwrap();
}

/// Kills the agent of node1 and starts another one.
pub fn replace_agent(lab: &Lab) {
    lab.kill(1, Daemon::Agent).unwrap();
    start_agent(lab);
}

/// A request to a socket of the agent of node1, sent but not answered.
pub fn send(lab: &Lab, socket: &str, head: &str, body: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(lab.run_dir(1).join(socket)).unwrap();
    let limit = Some(Duration::from_secs(20));
    stream.set_read_timeout(limit).unwrap();
    let head = format!(
        "{head} HTTP/1.1\r\nHost: unix\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    stream
}

/// A request to a socket of the agent of node1: status and body.
pub fn request(lab: &Lab, socket: &str, head: &str, body: &[u8]) -> (u16, String) {
    let mut answer = Vec::new();
    send(lab, socket, head, body)
        .read_to_end(&mut answer)
        .unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}
