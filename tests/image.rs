//! The image: what is in it, and that agent, proxy and installer do their work out of it with exactly what the manifests give
//! them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod image_store;
mod manifests;

use std::fs;
use std::path::Path;
use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid};
use harness::{Stage, eventually, own};
use host_net::netns::Netns;
use image_store::{Run, Store};
use lab::standing::Daemon;
use manifests::{Objects, container, list, pod, rendered, tool, written};
use rstest::rstest;
use serde_json::Value;

/// Far over what a daemon takes to start here.
const SOON: Duration = Duration::from_secs(90);
const CLIENT: &str = "pod1-1";
const SERVER: &str = "pod2-1";

fn all() -> bool {
    std::env::var("AMBIDEX_TEST_SUITE").is_ok_and(|suite| suite == "all")
}

/// The manifests of a capture: those that are written down are for the in-pod capture. None: nothing here makes others.
fn manifests_of(variant: Variant) -> Option<Objects> {
    if variant == Inpod {
        return Some(written("kustomize/base/ambidex.yaml"));
    }
    let helm = tool("helm")?;
    Some(rendered(&helm, &["mode=node"]))
}

/// A container of the lab's first node in the place of a daemon: what the manifest says, in the lab's directories.
fn daemon<'a>(store: &'a Store, scene: &Stage, objects: &Objects, name: &str) -> Run<'a> {
    let lab = &scene.lab;
    let agent = name == "agent";
    let of_pod = pod(
        objects,
        if agent {
            "ambidex-agent"
        } else {
            "ambidex-proxy"
        },
    );
    let described = container(of_pod, name);
    let target = if agent { "node1" } else { "proxy1" };
    let topology = lab.topology();
    let netns = Netns::path_of(&topology.target(target).unwrap().1);
    let dir = lab.dir().display();
    let mut run = store
        .run(described)
        .with("--detach")
        .with(format!("--name={name}"))
        .with(format!("--network=ns:{}", netns.display()))
        // Stands for the run and state directories.
        .with(format!("--volume={dir}:{dir}"));
    for mount in list(described, "volumeMounts") {
        let at = mount["mountPath"].as_str().unwrap();
        run = match mount["name"].as_str().unwrap() {
            "run" | "state" | "token" | "root" => run,
            "tmp" => run.with(format!("--tmpfs={at}")),
            "netns" => {
                assert_eq!(mount["mountPropagation"], "HostToContainer");
                run.with(format!("--volume=/run/netns:{at}:rslave"))
            }
            // The machine's own is no business of a lab.
            "xtables-lock" => {
                let lock = store.path("xtables.lock");
                fs::write(&lock, "").unwrap();
                run.with(format!("--volume={}:{at}", lock.display()))
            }
            "host-proc" => {
                assert_eq!(mount["readOnly"], true);
                run.with(format!("--volume=/proc:{at}:ro"))
            }
            "host-sysctls" => run.with(format!("--volume=/proc/sys/net:{at}")),
            other => panic!("what is {other}?"),
        };
    }
    let mut environment = lab.environment(1);
    // A lab has no API server: its pods come from the plugin alone.
    environment.insert("AMBIDEX_SOURCE".to_owned(), "cni".to_owned());
    for variable in list(described, "env") {
        let name = variable["name"].as_str().unwrap();
        if let (Some(value), false) = (variable["value"].as_str(), environment.contains_key(name)) {
            run = run.with(format!("--env={name}={value}"));
        }
    }
    for (name, value) in &environment {
        run = run.with(format!("--env={name}={value}"));
    }
    run.arguments
        .retain(|argument| !argument.starts_with("--dns-capture"));
    run
}

/// What a daemon in a container wrote.
fn log(store: &Store, name: &str) -> String {
    let done = store.call(&["logs", name]);
    done.stdout + &done.stderr
}

fn agent_is_ready(scene: &Stage) -> bool {
    matches!(scene.lab.ask_agent(1, "/healthz"), Ok((200, _)))
}

/// A lab whose first node's agent and proxy run out of the image.
fn with_containers(scene: &Stage, store: &Store, objects: &Objects) {
    for daemon in [Daemon::Agent, Daemon::Proxy] {
        scene.lab.kill(1, daemon).unwrap();
    }
    for name in ["agent", "proxy"] {
        daemon(store, scene, objects, name).call().with_code(0);
    }
    let ready =
        std::panic::AssertUnwindSafe(|| eventually("ready", SOON, || agent_is_ready(scene)));
    if std::panic::catch_unwind(ready).is_err() {
        panic!(
            "agent:\n{}\nproxy:\n{}",
            log(store, "agent"),
            log(store, "proxy")
        );
    }
}

/// A pod that comes anew is captured by rules that the image's own iptables wrote, talks HBONE through the image's proxy, and
/// everything about it is proven; an undo out of the image leaves nothing.
#[rstest]
fn agent_and_proxy_run_out_of_the_image(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let Some(objects) = manifests_of(variant) else {
        return println!("helm is not here: the manifests of the node capture are not looked at");
    };
    let scene = own(&variant.spec());
    let lab = &scene.lab;
    let store = Store::new();
    with_containers(&scene, &store, &objects);
    lab.del_pod(CLIENT).unwrap();
    scene.recreate(CLIENT);
    let before = scene.dump(CLIENT);
    lab.add_pod(CLIENT).unwrap();
    let mark = scene.mark(2);
    assert_eq!(scene.seen(CLIENT, scene.at(SERVER)), scene.ip(CLIENT));
    let identity = scene.identity(CLIENT);
    scene.access_line(
        mark,
        &[("direction", "inbound"), ("src.identity", &identity)],
    );
    assert_eq!(scene.seen(SERVER, scene.at(CLIENT)), scene.ip(SERVER));
    let inside = |arguments: &[&str]| {
        let line = [&["exec", "agent", "ambidex"][..], arguments].concat();
        store.call(&line)
    };
    let verified = inside(&["verify"]);
    assert_eq!(verified.code, 0, "{verified:?}\n{}", log(&store, "agent"));
    // All tools of the dump are there, and all of them may be used.
    let dumped = inside(&["dump"]).with_code(0);
    assert_eq!(dumped, scene.dump("node1"));

    inside(&["undo", "--node"]).with_code(0);
    assert_eq!(scene.dump(CLIENT), before);
}

/// What the manifests give is needed: without any of it something does not work.
#[test]
fn no_capability_is_given_for_nothing() {
    let Some(objects) = manifests_of(NodeHybrid) else {
        return println!("helm is not here: the manifests of the node capture are not looked at");
    };
    if !all() {
        return;
    }
    let scene = own(&NodeHybrid.spec());
    let store = Store::new();
    let topology = scene.lab.topology();
    let netns = Netns::path_of(&topology.target("node1").unwrap().1);
    let agent = container(pod(&objects, "ambidex-agent"), "agent");
    // The agent's steps, one by one: another namespace's rules, written by either iptables, and a pod found by a process.
    let call = |missing: Option<&str>, program: &str, arguments: &[&str]| {
        let mut run = store
            .run(agent)
            .with("--rm")
            .with(format!("--network=ns:{}", netns.display()))
            .with("--volume=/run/netns:/run/netns:rslave")
            .with("--volume=/proc:/host/proc:ro")
            // As the agent does outside the main namespace.
            .with("--env=XTABLES_LOCKFILE=/proc/self/ns/net")
            .with(format!("--entrypoint={program}"));
        if let Some(missing) = missing {
            run = run.without(missing);
        }
        run.arguments = arguments.iter().map(|a| (*a).to_owned()).collect();
        run.call()
    };
    let pod_netns = Netns::path_of(&topology.target(CLIENT).unwrap().1);
    let pod_netns = pod_netns.to_str().unwrap();
    let by_process = format!("/host/proc/{}/ns/net", std::process::id());
    let cases: [(&str, &str, &[&str]); 4] = [
        (
            "NET_ADMIN",
            "/usr/sbin/iptables-nft",
            &["-t", "nat", "-N", "MINE"],
        ),
        ("NET_RAW", "/usr/sbin/iptables-legacy", &["-t", "nat", "-S"]),
        (
            "SYS_ADMIN",
            "/usr/local/bin/ambidex",
            &["dump", "--netns", pod_netns],
        ),
        (
            "SYS_PTRACE",
            "/usr/local/bin/ambidex",
            &["dump", "--netns", &by_process],
        ),
    ];
    for (capability, program, arguments) in cases {
        let refused = call(Some(capability), program, arguments);
        assert_ne!(refused.code, 0, "without {capability}: {refused:?}");
        call(None, program, arguments).with_code(0);
    }
}

/// The same for the proxy: without one of its capabilities no pod is served.
#[rstest]
fn no_capability_of_the_proxy_is_given_for_nothing(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let Some(objects) = manifests_of(variant) else {
        return println!("helm is not here: the manifests of the node capture are not looked at");
    };
    if !all() {
        return;
    }
    let scene = own(&variant.spec());
    let store = Store::new();
    let proxy = container(pod(&objects, "ambidex-proxy"), "proxy");
    let given = list(&proxy["securityContext"]["capabilities"], "add");
    assert!(!given.is_empty());
    for capability in given {
        let capability = capability.as_str().unwrap();
        for daemon in [Daemon::Proxy, Daemon::Agent] {
            scene.lab.kill(1, daemon).unwrap();
        }
        scene.lab.start(1, Daemon::Agent).unwrap();
        let run = daemon(&store, &scene, &objects, "proxy").without(capability);
        run.call().with_code(0);
        // With it a proxy serves after a second.
        std::thread::sleep(Duration::from_secs(5));
        let refused = scene.attempt(
            CLIENT,
            scene.at(SERVER),
            lab::traffic::Check::Who,
            Duration::from_secs(10),
        );
        assert!(!refused.ok, "without {capability}: {refused:#?}");
        store
            .call(&["rm", "--force", "--time", "0", "proxy"])
            .with_code(0);
    }
}

/// The installer needs nothing but the two directories, and what it installs is the plugin.
#[test]
fn the_installer_runs_out_of_the_image() {
    let store = Store::new();
    let objects = written("kustomize/base/ambidex.yaml");
    let described = container(pod(&objects, "ambidex-agent"), "install-cni");
    let (bin, conf) = (store.path("bin"), store.path("net.d"));
    for directory in [&bin, &conf] {
        fs::create_dir(directory).unwrap();
    }
    let network = r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp"}]}"#;
    fs::write(conf.join("10-pods.conflist"), network).unwrap();
    let mut run = store.run(described).with("--rm").with("--network=none");
    for mount in list(described, "volumeMounts") {
        let at = mount["mountPath"].as_str().unwrap();
        let from = if mount["name"] == "cni-bin" {
            &bin
        } else {
            &conf
        };
        run = run.with(format!("--volume={}:{at}", from.display()));
    }
    for variable in list(described, "env") {
        if let Some(value) = variable["value"].as_str() {
            run = run.with(format!(
                "--env={}={value}",
                variable["name"].as_str().unwrap()
            ));
        }
    }
    run = run.with("--env=POD_NAMESPACE=ambidex-system");
    run.arguments.retain(|argument| argument != "--watch");
    run.call().with_code(0);
    let list_now: Value =
        serde_json::from_slice(&fs::read(conf.join("10-pods.conflist")).unwrap()).unwrap();
    let plugin = &list_now["plugins"][1];
    assert_eq!(plugin["type"], "ambidex-cni", "{list_now}");
    assert_eq!(
        plugin["cni_agent_run_dir"], "/var/run/ambidex",
        "{list_now}"
    );
    assert_eq!(plugin["pod_namespace"], "ambidex-system", "{list_now}");
    let installed = bin.join("ambidex-cni");
    let answer = std::process::Command::new(&installed)
        .env("CNI_COMMAND", "VERSION")
        .output()
        .unwrap();
    assert!(answer.status.success(), "{answer:?}");

    let inspected = store.call(&["image", "inspect", &store.image]).with_code(0);
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    let image = &inspected[0];
    let label = |name: &str| image["Labels"][format!("org.opencontainers.image.{name}")].clone();
    assert_eq!(label("version"), env!("CARGO_PKG_VERSION"));
    assert_eq!(label("licenses"), "Apache-2.0");
    assert!(
        store
            .image
            .ends_with(concat!(":", env!("CARGO_PKG_VERSION")))
    );
}

/// The same files make the same archive, and a plugin that other machines could not run is refused.
#[test]
fn images_are_reproducible() {
    let directory = tempfile::tempdir().unwrap();
    let binaries = Path::new(env!("CARGO_BIN_EXE_ambidex")).parent().unwrap();
    let build = |name: &str, flags: &[&str]| {
        let archive = directory.path().join(name);
        let output = std::process::Command::new(manifests::root().join("deploy/image/build"))
            .arg("--binaries")
            .arg(binaries)
            .arg("--out")
            .arg(&archive)
            .args(flags)
            .env("SOURCE_DATE_EPOCH", "1700000000")
            .output()
            .unwrap();
        (output, archive)
    };
    let flags = ["--no-compression", "--dynamic-plugin"];
    let archives = ["one.tar", "two.tar"].map(|name| {
        let (output, archive) = build(name, &flags);
        assert!(output.status.success(), "{output:?}");
        fs::read(archive).unwrap()
    });
    assert!(archives[0] == archives[1], "two archives differ");
    let (refused, archive) = build("three.tar", &[]);
    assert!(
        !refused.status.success() && !archive.exists(),
        "{refused:?}"
    );
    let told = String::from_utf8(refused.stderr).unwrap();
    assert!(told.contains("ambidex-cni is linked dynamically"), "{told}");
}
