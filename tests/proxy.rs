//! The proxy as its agent, its operator and its successor meet it; and proxies that are not ours.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::{Stage, eventually, own};
use host_net::netns::Netns;
use inpod_redirect::zds::client::{self, ClientOptions, WorkloadHandler};
use inpod_redirect::zds::{Add, NodeConfiguration};
use lab::standing::congestion;
use lab::standing::{Daemon, Lab};
use lab::topology::Mode;
use lab::topology::network::Attachment;
use lab::traffic::Check;
use nix::sys::signal::Signal;
use rstest::rstest;
use runtime::{
    Sandbox, assert_same, diff_is_empty, dumps, ip_batch, request, start_agent, state_of,
};
use serde_json::Value;

const PLACES: [&str; 3] = ["node1", "proxy1", "pod1-2"];
/// Far over what a daemon takes to start here.
const SOON: Duration = Duration::from_secs(20);

/// A proxy that comes back, in the same or in another namespace, is what the node's objects lead to.
#[rstest]
fn a_replaced_proxy_is_followed(#[values(Mode::Node, Mode::Mixed)] mode: Mode) {
    let scene = own(&harness::spec(mode));
    let lab = &scene.lab;
    let before = dumps(lab, &PLACES);
    lab.kill(1, Daemon::Proxy).unwrap();
    lab.start(1, Daemon::Proxy).unwrap();
    eventually("the proxy is back", SOON, || lab.is_ready(1));
    assert_same("proxy replaced", &before, &dumps(lab, &PLACES));

    lab.kill(1, Daemon::Proxy).unwrap();
    let topology = lab.topology();
    let node = topology.node(1).unwrap();
    // The old namespace stays, under another name, as one does that a process still holds.
    let old = Netns::open(Netns::path_of(&node.proxy_netns)).unwrap();
    ip_batch(&node.netns, &format!("link delete {}\n", node.proxy_veth));
    Netns::delete_named(&node.proxy_netns).unwrap();
    let kept = old
        .run(|| Command::new("sleep").arg("60").spawn())
        .unwrap()
        .unwrap();
    let _kept = Ending(kept);
    congestion::create_netns(&node.proxy_netns).unwrap();
    let attachment = Attachment {
        veth: &node.proxy_veth,
        netns: &node.proxy_netns,
        ip: node.proxy_ip,
        gateway: node.pod_gateway,
        cni: node.cni,
        families: node.families,
    };
    ip_batch(&node.netns, &attachment.node_side());
    ip_batch(&node.proxy_netns, &attachment.pod_side());
    assert_ne!(old.id(), lab.netns("proxy1").unwrap().id());
    lab.start(1, Daemon::Proxy).unwrap();
    eventually("the proxy is there", SOON, || lab.is_ready(1));
    diff_is_empty(lab, "--node");
    diff_is_empty(lab, "alpha/pod1-1");
    let place = dumps(lab, &["proxy1"]).remove(0).1;
    harness::assert_same_dump("the proxy's other namespace", &before[1].1, &place);
    let left = harness::dump(&old);
    for ours in ["TPROXY", "pistio", "20000:"] {
        assert!(
            !left.contains(ours),
            "{ours} is left in the old namespace:\n{left}"
        );
    }
    assert_eq!(scene.seen("pod1-1", scene.at("pod2-1")), scene.ip("pod1-1"));
    assert_eq!(scene.seen("pod2-2", scene.at("pod1-1")), scene.ip("pod2-2"));
}

/// An upgrade that fails: another proxy comes, takes over the node, and goes again while the one before is still there.
#[test]
fn the_node_falls_back_to_the_proxy_that_is_left() {
    let scene = own(&harness::spec(Mode::Node));
    let lab = &scene.lab;
    let other = Sandbox::wired(lab, "other1", [10, 244, 1, 105].into());
    let its_place = Netns::open(&other.netns).unwrap();
    let (before, untouched) = (dumps(lab, &PLACES), harness::dump(&its_place));
    with_proxy(lab, Some(its_place.clone()), |proxy| {
        eventually("the pods are announced to it", SOON, || {
            proxy.served.lock().unwrap().len() == 2
        });
        // It learns of the pods before anything leads to it.
        eventually("the node leads to it", SOON, || {
            harness::dump(&its_place).contains("TPROXY")
                && before[0] != dumps(lab, &PLACES)[0]
                && runtime::ambidex(lab, "diff --node").code == 0
        });
    });
    eventually("the node leads to the first again", SOON, || {
        before[0] == dumps(lab, &PLACES)[0]
    });
    assert_same("fallen back", &before, &dumps(lab, &PLACES));
    assert_eq!(untouched, harness::dump(&its_place));
    assert!(lab.is_ready(1));
    assert_eq!(scene.seen("pod1-1", scene.at("pod2-1")), scene.ip("pod1-1"));
}

/// Killed when it goes out of scope.
struct Ending(std::process::Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A proxy that is not ours.
#[derive(Default)]
struct FakeProxy {
    refuses: AtomicBool,
    served: std::sync::Mutex<Vec<String>>,
}

impl WorkloadHandler for FakeProxy {
    async fn add(&self, add: Add) -> Result<(), String> {
        if self.refuses.load(Ordering::Relaxed) {
            return Err("no room".to_owned());
        }
        let inpod = add.mode == inpod_redirect::zds::Mode::Inpod;
        assert_eq!(
            add.netns.is_some(),
            inpod,
            "the namespace comes with every pod"
        );
        self.served.lock().unwrap().push(add.info.name);
        Ok(())
    }
    async fn del(&self, _uid: &str, _drain: Duration) {
        self.served.lock().unwrap().pop();
    }
    async fn snapshot_sent(&self) {}
    async fn configure_node(&self, _: NodeConfiguration) -> Result<(), String> {
        Ok(())
    }
    fn connections(&self, _uid: &str) -> u64 {
        0
    }
    fn disconnected(&self) {}
}

/// Runs a field's proxy against the agent of node1 while `test` runs.
fn with_field_proxy(lab: &Lab, test: impl FnOnce(&FakeProxy)) {
    with_proxy(lab, None, test);
}

/// Runs a proxy against the agent of node1 while `test` runs: one in a namespace, or one of the field, which does not say.
fn with_proxy(lab: &Lab, netns: Option<Netns>, test: impl FnOnce(&FakeProxy)) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let handler = Arc::new(FakeProxy::default());
    let options = ClientOptions {
        path: lab.run_dir(1).join("ztunnel.sock"),
        extension: netns.is_some(),
        own_netns: netns.unwrap_or_else(|| Netns::current().unwrap()),
        default_drain: Duration::ZERO,
    };
    let proxy = runtime.spawn(client::run(
        options,
        Arc::clone(&handler),
        std::future::pending(),
    ));
    test(&handler);
    proxy.abort();
}

/// The field's proxy, which does not know our extension, can serve in-pod captures and is told why it cannot serve others.
#[test]
fn the_fields_proxy_serves_pods_in_their_namespaces() {
    let scene = own(&harness::spec(Mode::Inpod));
    let lab = &scene.lab;
    let sandbox = Sandbox::of(lab, "pod1-2");
    sandbox.del(lab);
    let before = dumps(lab, &PLACES);
    lab.kill(1, Daemon::Proxy).unwrap();
    eventually("the proxy is gone", SOON, || !lab.is_ready(1));
    with_field_proxy(lab, |proxy| {
        eventually("the agent takes it", SOON, || lab.is_ready(1));
        let served = || proxy.served.lock().unwrap().clone();
        assert_eq!(served(), ["pod1-1"], "the snapshot");
        sandbox.add(lab);
        assert_eq!(served(), ["pod1-1", "pod1-2"]);
        assert_ne!(before, dumps(lab, &PLACES));
        sandbox.del(lab);
        assert_eq!(served(), ["pod1-1"]);
        proxy.refuses.store(true, Ordering::Relaxed);
        let error = sandbox.call(lab, "ADD").cni_error();
        assert!(
            error["details"].as_str().unwrap().contains("no room"),
            "{error}"
        );
        assert_eq!(state_of(lab, &sandbox.uid), None);
        assert_same("refused", &before, &dumps(lab, &PLACES));
    });
}

#[test]
fn the_fields_proxy_is_told_why_it_cannot_serve_the_node_capture() {
    let scene = own(&harness::spec(Mode::Node));
    let lab = &scene.lab;
    lab.kill(1, Daemon::Proxy).unwrap();
    eventually("the proxy is gone", SOON, || !lab.is_ready(1));
    with_field_proxy(lab, |_| {
        let mut why = String::new();
        eventually("the agent says why", SOON, || {
            why = request(lab, "agent.sock", "GET /healthz", b"").1;
            why.contains("extension that node capture needs")
        });
        assert!(why.contains("--mode inpod"), "{why}");
        eventually("the agent says why", SOON, || {
            let log = std::fs::read_to_string(lab.log_path(1, Daemon::Agent)).unwrap();
            log.contains("extension that node capture needs")
        });
    });
    lab.start(1, Daemon::Proxy).unwrap();
    eventually("ours is taken", SOON, || lab.is_ready(1));
}

/// The proxy's pages, and its end: by SIGTERM and by page, with and without patience.
#[rstest]
fn the_proxy_says_how_it_is_and_ends_when_asked(#[values("SIGTERM", "/quitquitquit")] how: &str) {
    let mut spec = harness::spec(Mode::Mixed);
    spec.proxy_args = ["--drain-seconds", "3"].map(str::to_owned).to_vec();
    let scene = own(&spec);
    let lab = &scene.lab;
    scene.check("pod2-1", scene.at("pod1-1"), Check::Who);
    scene.check("pod2-1", scene.at("pod1-2"), Check::Who);

    let dump: Value = serde_json::from_str(&scene.page(1, 15000, "/config_dump")).unwrap();
    assert!(dump["workloads"].as_array().unwrap().len() >= 4);
    let certificates = dump["certificates"].as_array().unwrap();
    let identity = scene.identity("pod1-1");
    let certificate = certificates
        .iter()
        .find(|c| c["identity"] == identity)
        .expect("its certificate");
    assert_eq!(certificate["state"], "Available");
    assert!(certificate["expirationTime"].as_u64() > certificate["validFrom"].as_u64());
    let state = &dump["workloadState"];
    for (pod, mode) in [("pod1-1", "node"), ("pod1-2", "inpod")] {
        let pod = scene.pod(pod);
        let state = &state[&pod.uid];
        assert_eq!(state["state"], "Up", "{dump}");
        assert_eq!(state["captureMode"], mode);
        assert_eq!(state["info"]["name"], pod.name);
        assert_eq!(state["info"]["serviceAccount"], pod.service_account);
    }
    for page in ["/metrics", "/stats/prometheus"] {
        assert!(scene.page(1, 15020, page).contains("istio_build{"));
    }
    assert!(
        scene.metric(
            1,
            "istio_tcp_connections_opened_total",
            &[("capture_mode", "inpod")]
        ) >= 1.0
    );

    // Not ready without its agent's snapshot.
    assert_eq!(readiness(&scene), "200");
    lab.kill(1, Daemon::Agent).unwrap();
    eventually("not ready without an agent", SOON, || {
        readiness(&scene) == "500"
    });
    start_agent(lab);
    eventually("ready again", SOON, || readiness(&scene) == "200");

    // A connection that does not end by itself is given three seconds, and no more.
    let long = Check::OneByteWrites {
        count: 2000,
        pause_ms: 20_000,
    };
    std::thread::scope(|scope| {
        let through = scope
            .spawn(|| scene.attempt("pod2-1", scene.at("pod1-2"), long, Duration::from_secs(15)));
        eventually("the connection is there", SOON, || {
            let dump: Value = serde_json::from_str(&scene.page(1, 15000, "/config_dump")).unwrap();
            let state = &dump["workloadState"][&scene.pod("pod1-2").uid];
            let inbound = state["connections"]["inbound"].as_array();
            inbound.is_some_and(|inbound| !inbound.is_empty())
        });
        let proxy = lab.process(1, Daemon::Proxy).unwrap();
        let started = Instant::now();
        if how == "SIGTERM" {
            proxy.signal(Signal::SIGTERM).unwrap();
        } else {
            let url = "http://127.0.0.1:15000/quitquitquit";
            let get = lab
                .run(
                    "proxy1",
                    &["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", url],
                    SOON,
                )
                .unwrap();
            assert_eq!(get.stdout, "405", "only POST ends a proxy");
            lab.run("proxy1", &["curl", "-sf", "-X", "POST", url], SOON)
                .unwrap()
                .success(url)
                .unwrap();
        }
        std::thread::sleep(Duration::from_millis(800));
        assert!(proxy.is_alive(), "it drains");
        let refused = scene.attempt(
            "pod2-2",
            scene.at("pod1-2"),
            Check::Who,
            Duration::from_secs(2),
        );
        assert!(!refused.ok, "nothing is taken on any more: {refused:?}");
        assert!(proxy.wait_gone(Duration::from_secs(8)));
        let took = started.elapsed();
        assert!((2500..7000).contains(&took.as_millis()), "{took:?}");
        assert!(!through.join().unwrap().ok, "it was cut");
    });
    let log = scene.proxy_log(1);
    assert!(log.contains("draining") && log.contains("drained"), "{log}");
}

/// Status of the readiness page of node1's proxy.
fn readiness(scene: &Stage) -> String {
    let url = "http://127.0.0.1:15021/healthz/ready";
    let curl = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", url];
    scene.lab.run("proxy1", &curl, SOON).unwrap().stdout
}
