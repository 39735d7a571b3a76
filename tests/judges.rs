//! The tunnel's TLS and HTTP/2 in the eyes of programs that are not ours: openssl, nghttp, curl, tshark.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "an application of a test, no part of the proxy"
)]

mod harness;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::authority::{Authority, JUDGED_WITHIN, KeyPair, Span, VALID};
use harness::{Scene, SharedStage, Stage, eventually, own, shared_in};
use lab::topology::{LabSpec, lab_dir};
use lab::traffic::Check;
use rstest::rstest;
use serde_json::Value;
use tempfile::TempDir;

/// HTTP/2's preface, an empty SETTINGS frame, and a GOAWAY, after which the server has nothing to wait for: as printf(1)
/// has it.
const HELLO_AND_GOODBYE: &str = concat!(
    r"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    r"\000\000\000\004\000\000\000\000\000",
    r"\000\000\010\007\000\000\000\000\000\000\000\000\000\000\000\000\000"
);
/// Within the server's first frame: type SETTINGS, no flags, stream 0, and the number of the first setting,
/// MAX_CONCURRENT_STREAMS. Nothing that openssl says of its own has these bytes.
const SETTINGS: &str = "\u{4}\0\0\0\0\0\0\u{3}";
/// X25519MLKEM768 (draft-ietf-tls-ecdhe-mlkem, 0x11ec) and x25519 (RFC 8446), as tshark prints them.
const POST_QUANTUM: &str = "4588";
const CLASSICAL: &str = "29";
const PEER: &str = "URI:spiffe://cluster.local/ns/alpha/sa/client";

/// Makes the proxies of a lab write down their secrets.
fn with_key_log(mut spec: LabSpec) -> LabSpec {
    let file = keys(&spec.name).display().to_string();
    let variable = "AMBIDEX_DEBUG_TLS_KEY_LOG".to_owned();
    spec.proxy_env.insert(variable, file);
    spec
}

fn keys(lab: &str) -> PathBuf {
    lab_dir(lab).join("tls-keys.log")
}

fn judged(variant: Variant) -> Scene {
    static STAGES: [OnceLock<SharedStage>; 3] = [const { OnceLock::new() }; 3];
    shared_in(&STAGES[variant as usize], || with_key_log(variant.spec()))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What a program said, whatever its exit code.
fn run(stage: &Stage, argv: &[&str]) -> String {
    let done = stage.lab.run("plain1", argv, JUDGED_WITHIN).unwrap();
    done.stdout + &done.stderr
}

/// Knocks at a pod's port 15008 from the uncaptured pod with `openssl s_client`, and speaks HTTP/2 if it is let in.
fn s_client(stage: &Stage, authority: &Authority, who: Option<&KeyPair>, more: &str) -> String {
    let to = format!("{}:15008", stage.ip("pod2-1"));
    let root = authority.root();
    let mut command = format!(
        "printf '{HELLO_AND_GOODBYE}' | openssl s_client -connect {to} -CAfile {} -ign_eof -showcerts {more}",
        text(&root)
    );
    if let Some(KeyPair { certificate, key }) = who {
        command += &format!(" -cert {} -key {}", text(certificate), text(key));
    }
    run(stage, &["sh", "-c", &command])
}

/// TLS 1.3 with the suite of choice, HTTP/2 by ALPN, and a certificate that names the pod and chains to the mesh's root.
#[rstest]
fn openssl_is_let_in(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = judged(variant);
    let authority = Authority::of(&scene);
    let peer = authority.issue("peer", &[PEER], VALID);
    let said = s_client(&scene, &authority, Some(&peer), "-alpn h2");
    for words in [
        "New, TLSv1.3, Cipher is TLS_AES_256_GCM_SHA384",
        "ALPN protocol: h2",
        "Server Temp Key: X25519, 253 bits",
        "Verify return code: 0 (ok)",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(!said.contains("alert"), "{said}");
    assert!(
        !said.contains("Post-Handshake New Session Ticket"),
        "no session to resume: {said}"
    );
    assert!(said.contains(SETTINGS), "no SETTINGS: {said:?}");
    let certificate = scene.lab.dir().join("seen.pem");
    let begin = said.find("-----BEGIN CERTIFICATE").unwrap();
    fs::write(&certificate, &said[begin..]).unwrap();
    let names = run(
        &scene,
        &[
            "openssl",
            "x509",
            "-in",
            text(&certificate),
            "-noout",
            "-ext",
            "subjectAltName",
        ],
    );
    let identity = format!("URI:{}\n", scene.identity("pod2-1"));
    assert!(names.contains(&identity), "{names}");
}

/// What openssl is told who does not come with the certificate of a workload of this mesh, in TLS 1.3 with HTTP/2.
#[rstest]
#[case::no_certificate(&[], VALID, "-alpn h2", "alert certificate required")]
#[case::tls_1_2(&[PEER], VALID, "-alpn h2 -tls1_2", "alert protocol version")]
#[case::no_suite_in_common(&[PEER], VALID, "-alpn h2 -ciphersuites TLS_CHACHA20_POLY1305_SHA256", "alert handshake failure")]
#[case::no_http2(&[PEER], VALID, "-alpn http/1.1", "alert no application protocol")]
#[case::expired(&[PEER], (-7200, -3600), "-alpn h2", "alert certificate expired")]
#[case::not_yet_valid(&[PEER], (3600, 7200), "-alpn h2", "alert certificate expired")]
#[case::another_trust_domain(&["URI:spiffe://other.example/ns/alpha/sa/client"], VALID, "-alpn h2", "alert certificate unknown")]
#[case::two_identities(&[PEER, "URI:spiffe://cluster.local/ns/beta/sa/client"], VALID, "-alpn h2", "alert certificate unknown")]
#[case::no_identity(&["DNS:pod.example"], VALID, "-alpn h2", "alert certificate unknown")]
fn openssl_is_refused(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] names: &[&str],
    #[case] valid: Span,
    #[case] more: &str,
    #[case] alert: &str,
) {
    let scene = judged(variant);
    let authority = Authority::of(&scene);
    let peer = (!names.is_empty()).then(|| authority.issue("peer", names, valid));
    let mark = scene.mark(2);
    let said = s_client(&scene, &authority, peer.as_ref(), more);
    assert!(said.contains(alert), "{said}");
    assert!(!said.contains(SETTINGS), "it was served: {said:?}");
    let line = [("direction", "inbound"), ("error", "~TLS: ")];
    scene.access_line(mark, &line);
}

/// Two clients with an HTTP/2 of their own: what the server allows, and its answer to a request that is no CONNECT.
#[rstest]
fn nghttp_and_curl_are_answered(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = judged(variant);
    let authority = Authority::of(&scene);
    let peer = authority.issue("peer", &[PEER], VALID);
    let url = format!("https://{}:15008/", scene.ip("pod2-1"));
    let cert = format!("--cert={}", text(&peer.certificate));
    let key = format!("--key={}", text(&peer.key));
    let argv = ["nghttp", "--verbose", "--no-verify-peer", &cert, &key, &url];
    let said = run(&scene, &argv);
    for words in [
        "The negotiated protocol: h2",
        "[SETTINGS_MAX_CONCURRENT_STREAMS(0x03):200]",
        "[SETTINGS_INITIAL_WINDOW_SIZE(0x04):1048576]",
        "[SETTINGS_MAX_FRAME_SIZE(0x05):262144]",
        "[SETTINGS_MAX_HEADER_LIST_SIZE(0x06):65536]",
        ":status: 400",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let (certificate, key) = (text(&peer.certificate), text(&peer.key));
    let said = run(
        &scene,
        &[
            "curl",
            "--silent",
            "--show-error",
            "--http2",
            "--insecure",
            "--cert",
            certificate,
            "--key",
            key,
            "--write-out",
            "HTTP/%{http_version} %{http_code}",
            &url,
        ],
    );
    assert_eq!(said, "HTTP/2 400");
}

/// libcurl as a client of the tunnel: mutual TLS, HTTP/2, CONNECT, and a page of an application behind it; a peer with the
/// wrong trust domain gets none.
#[rstest]
fn curl_fetches_a_page_through_the_tunnel(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = judged(variant);
    let authority = Authority::of(&scene);
    let root = authority.root();
    let page = "behind the tunnel";
    let application = Application::start(&scene, "pod2-1", page);
    let fetch = |name: &str, peer: &str| -> Value {
        let peer = authority.issue(name, &[peer], VALID);
        let said = run(
            &scene,
            &[
                "/usr/bin/python3",
                concat!(env!("CARGO_MANIFEST_DIR"), "/tests/judges/curl_connect.py"),
                text(&judge("pycurl")),
                &format!("https://{}:15008", scene.ip("pod2-1")),
                text(&root),
                text(&peer.certificate),
                text(&peer.key),
                &format!("http://{}:{}/page", scene.ip("pod2-1"), application.port),
            ],
        );
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
    };
    let fetched = fetch("curl-peer", PEER);
    assert_eq!(fetched["error"], Value::Null, "{fetched:#}");
    assert_eq!(fetched["status"], 200);
    assert_eq!(fetched["page"], page);
    let said = fetched["said"].as_str().unwrap();
    for words in ["CONNECT: 'h2' negotiated", "CONNECT Response Status 200"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let refused = fetch("curl-stranger", "URI:spiffe://elsewhere/ns/alpha/sa/client");
    assert_ne!(refused["error"], Value::Null, "{refused:#}");
    assert_eq!(refused["page"], "");
}

/// A pod's program that is told to use the proxy at 127.0.0.1:15080, with an address and with a name of the mesh: its
/// connection is the pod's own, and nothing of it is in the clear between the nodes.
#[test]
fn curl_asks_by_socks5() {
    let mut spec = Inpod.spec();
    let socks5 = ("UNSTABLE_ENABLE_SOCKS5".to_owned(), "true".to_owned());
    spec.proxy_env.extend([socks5]);
    let scene = own(&spec);
    let page = "asked for by SOCKS";
    let application = Application::start(&scene, "pod2-1", page);
    let port = application.port;
    let _state = scene.with_state(|state| {
        state.services[0].ports.insert(port, port);
        for ports in state.workload_mut("pod2-1").unwrap().services.values_mut() {
            ports.insert(port, port);
        }
        // The one endpoint with the application.
        state.workload_mut("pod1-2").unwrap().services.clear();
    });
    let tap = scene.tap("node1", "eth0", &format!("port 15008 or port {port}"));
    let mark = scene.mark(1);
    let client = scene.ip("pod1-1").to_string();
    let curl = |how: &str, host: &str| {
        let url = format!("http://{host}:{port}/page");
        let argv = [
            "curl",
            "-sS",
            "--max-time",
            "60",
            how,
            "127.0.0.1:15080",
            &url,
        ];
        scene.lab.run("pod1-1", &argv, JUDGED_WITHIN).unwrap()
    };
    for (how, host) in [
        ("--socks5", scene.ip("pod2-1").to_string()),
        ("--socks5-hostname", "echo.beta".to_owned()),
        (
            "--socks5-hostname",
            "ECHO.beta.svc.cluster.local.".to_owned(),
        ),
    ] {
        let done = curl(how, &host);
        assert_eq!(done.stdout, page, "{how} {host}: {}", done.stderr);
    }
    let wire = tap.finish();
    wire.assert_encrypted(&[page, "GET /page"]);
    for service in ["", "echo.beta.svc.cluster.local"] {
        let from = format!("~{client}:");
        let mut wanted = vec![("src.addr", from.as_str()), ("direction", "outbound")];
        wanted.extend((!service.is_empty()).then_some(("dst.service", service)));
        let line = scene.access_line(mark, &wanted);
        assert_eq!(
            line["dst.hbone_addr"].as_str().unwrap(),
            format!("{}:{port}", scene.ip("pod2-1"))
        );
    }
    // An answer of the protocol, as curl prints it, and not a connection that ends.
    for (host, answer) in [
        ("no-such-name.invalid", "(4)"),
        ("under_score..dots", "(1)"),
    ] {
        let done = curl("--socks5-hostname", host);
        assert_ne!(done.code, 0, "{host}: {}", done.stdout);
        assert!(done.stderr.contains(answer), "{host}: {}", done.stderr);
    }
}

/// Where `tests/judges/fetch` puts what Debian does not install.
fn judge(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/judges")
        .join(name);
    assert!(
        path.exists(),
        "{} is missing: run `make judges`",
        path.display()
    );
    path
}

/// An HTTP server in a pod, that has one page.
struct Application {
    port: u16,
    process: Child,
    _directory: TempDir,
}

impl Application {
    fn start(stage: &Stage, pod: &str, page: &str) -> Self {
        let directory = TempDir::new().unwrap();
        fs::write(directory.path().join("page"), page).unwrap();
        let port = 8096;
        let netns = stage.lab.netns(pod).unwrap();
        let mut server = Command::new("/usr/bin/python3");
        server
            .args(["-m", "http.server", &port.to_string()])
            .current_dir(directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process = netns.run(|| server.spawn()).unwrap().unwrap();
        eventually("the application listens", JUDGED_WITHIN, || {
            netns
                .run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
                .unwrap()
                .is_err()
        });
        Self {
            port,
            process,
            _directory: directory,
        }
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// tshark reads the packets between the nodes with the proxies' secrets, and sees what the documents say.
#[rstest]
fn tshark_reads_the_tunnel(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = own(&with_key_log(variant.spec()));
    let tap = scene.tap("node1", "eth0", "port 15008");
    let marker = "read by a judge";
    let check = Check::Marker {
        marker: Some(marker.to_owned()),
    };
    let to = scene.at("pod2-1");
    let client = scene.check("pod1-1", to, check).local.unwrap();
    let wire = tap.finish();
    let keys = keys(&scene.lab.name());
    let mode = fs::metadata(&keys).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "the secrets are private");

    let shared = groups(&wire.file);
    assert_eq!(shared, [CLASSICAL, CLASSICAL], "client's and server's");
    let headers = headers(&wire.file, &keys);
    let of = |name: &str| headers.get(name).map(Vec::as_slice).unwrap_or_default();
    assert_eq!(of(":method"), ["CONNECT"], "{headers:?}");
    assert_eq!(of(":authority"), [to.to_string()], "{headers:?}");
    assert_eq!(of(":status"), ["200"], "{headers:?}");
    assert!(of(":path").is_empty() && of(":scheme").is_empty());
    let [baggage] = of("baggage") else {
        panic!("{headers:?}");
    };
    for entry in ["k8s.namespace.name=alpha", "k8s.cluster.name=Kubernetes"] {
        assert!(baggage.contains(entry), "{entry}: {baggage}");
    }
    let forwarded = format!("for=\"{client}\"");
    assert!(
        of("forwarded")[0].starts_with(&forwarded),
        "{forwarded}: {headers:?}"
    );
    assert_eq!(of("traceparent").len(), 1, "{headers:?}");

    let bytes: Vec<u8> = tshark(&wire.file, Some(&keys), "http2.data.data", "http2")
        .iter()
        .flat_map(|hex| unhex(hex))
        .collect();
    let seen = String::from_utf8_lossy(&bytes);
    assert!(seen.matches(marker).count() >= 2, "there and back: {seen}");
    let blind = tshark(&wire.file, None, "http2.headers.method", "http2");
    assert!(blind.is_empty(), "without the secrets: {blind:?}");
}

/// `COMPLIANCE_POLICY=pqc` leaves nothing but the hybrid; who only has classical groups is refused.
#[test]
fn tshark_sees_post_quantum_key_exchange() {
    let mut spec = Inpod.spec();
    let policy = ("COMPLIANCE_POLICY".to_owned(), "pqc".to_owned());
    spec.proxy_env.extend([policy]);
    let scene = own(&spec);
    let tap = scene.tap("node1", "eth0", "port 15008");
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    let wire = tap.finish();
    let shared = groups(&wire.file);
    assert_eq!(
        shared,
        [POST_QUANTUM, POST_QUANTUM],
        "client's and server's"
    );
    let authority = Authority::of(&scene);
    let peer = authority.issue("peer", &[PEER], VALID);
    let said = s_client(&scene, &authority, Some(&peer), "-alpn h2");
    assert!(said.contains("alert handshake failure"), "{said}");
}

/// The groups of the key shares in the order of the packets.
fn groups(packets: &Path) -> Vec<String> {
    let field = "tls.handshake.extensions_key_share_group";
    tshark(packets, None, field, field)
}

/// All header fields of HTTP/2, whoever sent them.
fn headers(packets: &Path, keys: &Path) -> BTreeMap<String, Vec<String>> {
    let column = |field| tshark(packets, Some(keys), field, "http2.type == 1");
    let names = column("http2.header.name");
    let values = column("http2.header.value");
    assert_eq!(names.len(), values.len(), "{names:?} {values:?}");
    let mut headers: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in names.into_iter().zip(values) {
        headers.entry(name).or_default().push(value);
    }
    headers
}

/// All values of a field in the packets that a filter lets pass.
fn tshark(packets: &Path, keys: Option<&Path>, field: &str, filter: &str) -> Vec<String> {
    let mut tshark = Command::new("tshark");
    tshark.args(["-r", text(packets), "-d", "tcp.port==15008,tls"]);
    if let Some(keys) = keys {
        let option = format!("tls.keylog_file:{}", text(keys));
        tshark.args(["-o", &option]);
    }
    // A separator that no header has.
    tshark.args(["-Y", filter, "-T", "fields", "-e", field]);
    tshark.args(["-E", "occurrence=a", "-E", "aggregator=|"]);
    let done = tshark.output().expect("tshark is installed");
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{errors}");
    let lines = String::from_utf8(done.stdout).unwrap();
    let values = lines.lines().flat_map(|line| line.split('|'));
    values
        .filter(|value| !value.is_empty())
        .map(str::to_owned)
        .collect()
}

fn unhex(hex: &str) -> Vec<u8> {
    let digits: String = hex.chars().filter(char::is_ascii_hexdigit).collect();
    let bytes = (0..digits.len()).step_by(2);
    bytes
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
        .collect()
}
