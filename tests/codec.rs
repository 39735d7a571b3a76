//! The programs judged by code that knows nothing of them: protoc's messages and grpc's transport, driven by the programs in
//! tests/codec, play agent, proxy, control plane and CA.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid};
use harness::state::apply_to;
use harness::{ambidex, eventually, own};
use rstest::rstest;
use serde_json::json;

/// Debian's own, which has Debian's modules; another one may come first on the path.
const PYTHON: &str = "/usr/bin/python3";
const GUARDED: &str = "pod2-1";
const CLIENT: &str = "pod1-1";

fn codec(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/codec")
        .join(file)
}

/// Runs a case of one of the programs.
fn run(program: &str, case: &str) {
    let output = Command::new(PYTHON)
        .arg(codec(program))
        .arg(case)
        .env("AMBIDEX", ambidex())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("the codec's tests need Debian's python3 (apt-get install python3)");
    assert!(
        output.status.success(),
        "{program} {case}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The codec tells a proxy about pods.
#[rstest]
fn as_agent(#[values("conversation", "tolerance", "violations", "node_capture")] case: &str) {
    run("agent.py", case);
}

/// The codec is told about pods by an agent.
#[rstest]
fn as_proxy(#[values("inpod", "misbehaviour", "node_capture")] case: &str) {
    run("proxy.py", case);
}

/// A proxy gets its mesh and its certificates from the codec.
#[rstest]
fn as_control_plane(
    #[values(
        "wildcard",
        "plaintext",
        "on_demand",
        "refusal",
        "reconnection",
        "certificates"
    )]
    case: &str,
) {
    run("control.py", case);
}

/// A lab carries traffic by what the codec says: identities, services, a policy that comes and goes.
#[rstest]
fn a_lab_follows_it(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let place = tempfile::tempdir().unwrap();
    let program = place.path().join("ambidex");
    let (serve, real) = (codec("serve.py"), ambidex());
    let (serve, real) = (serve.display(), Path::new(real).display());
    let text = format!(
        "#!/bin/sh\ncase $1 in control) exec env PYTHONDONTWRITEBYTECODE=1 {PYTHON} {serve} \"$@\";; *) exec {real} \"$@\";; esac\n"
    );
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let mut spec = variant.spec();
    spec.control_plane = true;
    spec.programs.ambidex = program;
    let scene = own(&spec);
    let to = scene.at(GUARDED);
    let mark = scene.mark(2);
    assert_eq!(scene.seen(CLIENT, to), scene.ip(CLIENT));
    let identity = scene.identity(CLIENT);
    scene.access_line(
        mark,
        &[("direction", "inbound"), ("src.identity", &identity)],
    );
    let rules = json!([[[{"principals": [{"Suffix": "/ns/alpha/sa/client"}]}]]]);
    let denied = scene.with_state(|state| apply_to(state, GUARDED, "Deny", rules));
    scene.refused(CLIENT, to);
    scene.seen("pod2-2", to);
    // Without it everything goes on, the denial too.
    scene.lab.kill_control().unwrap();
    let connected = |node| scene.metric(node, "ambidex_xds_connected", &[]) == 1.0;
    eventually("both proxies notice", Duration::from_secs(30), || {
        !connected(1) && !connected(2)
    });
    scene.refused(CLIENT, to);
    scene.seen(CLIENT, scene.at("pod2-2"));
    scene.lab.start_control().unwrap();
    eventually("both proxies are back", Duration::from_secs(30), || {
        connected(1) && connected(2)
    });
    drop(denied);
    scene.seen(CLIENT, to);
}
