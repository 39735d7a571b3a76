//! Whose certificate is taken, and for how long.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::fs;
use std::sync::{MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::authority::Authority;
use harness::{Scene, SharedStage, Stage, eventually, shared_in};
use lab::topology::lab_dir;
use lab::traffic::{Check, Saw};
use rstest::rstest;
use serde_json::Value;

/// How long proxies may take to read a file again.
const READ_WITHIN: Duration = Duration::from_secs(20);
/// Far longer than it takes to notice that a certificate is revoked: connections stay open that long by themselves.
const OPEN_FOR: Duration = Duration::from_secs(40);

/// A lab whose proxies read revocation lists from a file that is not there in the beginning.
fn guarded(variant: Variant) -> Scene {
    static STAGES: [OnceLock<SharedStage>; 3] = [const { OnceLock::new() }; 3];
    shared_in(&STAGES[variant as usize], || {
        let mut spec = variant.spec();
        let file = lab_dir(&spec.name).join("crl.pem").display().to_string();
        spec.proxy_env.insert("CRL_PATH".to_owned(), file);
        spec
    })
}

/// Serial number of an identity's certificate in a node's proxy.
fn serial(stage: &Stage, node: u8, identity: &str) -> String {
    let page: Value = serde_json::from_str(&stage.page(node, 15000, "/config_dump")).unwrap();
    let certificates = page["certificates"].as_array().unwrap();
    let found = certificates.iter().find(|it| it["identity"] == *identity);
    found.unwrap()["serialNumber"].as_str().unwrap().to_owned()
}

/// Revocation lists that are in force until this is dropped; one test of a lab at a time.
struct Revoked<'a> {
    stage: &'a Stage,
    authority: Authority,
    _alone: MutexGuard<'a, ()>,
}

impl<'a> Revoked<'a> {
    fn none(stage: &'a Stage) -> Self {
        let alone = stage.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        let revoked = Self {
            stage,
            authority: Authority::of(stage),
            _alone: alone,
        };
        revoked.put(&[]);
        revoked
    }

    /// Replaces the lists as a ConfigMap is: at once, by another file.
    fn write(&self, text: &str) {
        let file = self.stage.lab.dir().join("crl.pem");
        let other = file.with_extension("other");
        fs::write(&other, text).unwrap();
        fs::rename(&other, &file).unwrap();
    }

    /// Revokes these serial numbers and no others, and waits until both proxies know.
    fn put(&self, serials: &[String]) {
        self.write(&self.authority.revocation_list(serials));
        for node in [1, 2] {
            eventually("the list is in force", READ_WITHIN, || {
                let count = self
                    .stage
                    .metric(node, "ambidex_crl_revoked_certificates", &[]);
                count == serials.len() as f64
            });
        }
    }
}

impl Drop for Revoked<'_> {
    fn drop(&mut self) {
        self.write("");
    }
}

/// Everything that a revocation does, to the certificate of one end of a connection that stands: the connection ends and
/// another does not; no further connection comes about; a file that is none changes nothing; and an empty list lets the
/// pod in again.
#[rstest]
#[case::of_the_client(1, "pod1-1", ("pod1-2", "pod2-1"), (2, "destination", "inbound"))]
#[case::of_the_server(2, "pod2-1", ("pod1-1", "pod2-2"), (1, "source", "outbound"))]
fn revoked_certificate(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] node: u8,
    #[case] whose: &str,
    #[case] others: (&str, &str),
    #[case] judge: (u8, &str, &str),
) {
    let scene = guarded(variant);
    let revoked = Revoked::none(&scene);
    let (at, reporter, direction) = judge;
    let to = scene.at("pod2-1");
    scene.check("pod1-1", to, Check::Who);
    let serial = serial(&scene, node, &scene.identity(whose));
    let count = |metric: &str| scene.metric(at, metric, &[("reporter", reporter)]);
    let closed = || count("ambidex_crl_closed_tunnels_total");
    let rejected = || count("istio_crl_policy_rejections_total");
    let (closed_before, mark) = (closed(), scene.mark(at));
    std::thread::scope(|scope| {
        let open = |from, to, pause_ms| {
            let check = Check::OneByteWrites {
                count: 200,
                pause_ms,
            };
            let scene = &scene;
            scope.spawn(move || scene.attempt(from, to, check, OPEN_FOR))
        };
        let opened = || {
            let labels = [("reporter", "source")];
            scene.metric(1, "istio_tcp_sockets_open", &labels)
        };
        let before = opened();
        let victim = open("pod1-1", to, 20_000);
        let bystander = open(others.0, scene.at(others.1), 5_000);
        eventually("both are open", READ_WITHIN, || opened() >= before + 2.0);
        revoked.put(std::slice::from_ref(&serial));
        let outcome = victim.join().unwrap();
        assert_eq!(outcome.saw, Some(Saw::Reset), "{outcome:#?}");
        let outcome = bystander.join().unwrap();
        assert!(outcome.ok, "{outcome:#?}");
    });
    let line = [
        ("direction", direction),
        ("src.workload", "pod1-1"),
        ("message", "connection complete"),
        ("error", "~was revoked"),
    ];
    scene.access_line(mark, &line);
    assert!(closed() > closed_before);
    let told = "the certificate of the tunnel's peer was revoked; closing the tunnel";
    let logs = |what: &str| {
        eventually(what, READ_WITHIN, || scene.proxy_log(at).contains(what));
    };
    logs(told);

    let refuses = || {
        let (before, mark) = (rejected(), scene.mark(at));
        scene.refused("pod1-1", to);
        let line = [("direction", direction), ("error", "~Revoked")];
        scene.access_line(mark, &line);
        assert!(rejected() > before);
    };
    refuses();
    let labels = [("response_flags", "CERT_REVOKED"), ("reporter", reporter)];
    assert!(scene.metric(at, "istio_tcp_connections_failed_total", &labels) > 0.0);

    let failed = || scene.metric(at, "ambidex_crl_failed_loads_total", &[]);
    let before = failed();
    revoked.write("-----BEGIN X509 CRL-----\nnot a list\n-----END X509 CRL-----\n");
    eventually("the bad file was read", READ_WITHIN, || failed() > before);
    logs("the revocation lists are not usable: the last good ones stay in force");
    refuses();

    revoked.put(&[]);
    scene.check("pod1-1", to, Check::Who);
}
