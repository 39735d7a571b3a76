// The pages are read over loopback; no scope is involved.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::*;
use crate::telemetry::{Direction, Endpoint, Opening, TelemetryOptions};

/// A filter that accepts what does not contain `bad`.
#[derive(Clone)]
struct Filter(Arc<Mutex<String>>);

impl LogControl for Filter {
    fn current(&self) -> String {
        self.0.lock().unwrap().clone()
    }

    fn set(&self, filter: &str) -> Result<(), String> {
        if filter.contains("bad") {
            return Err("invalid filter directive".into());
        }
        *self.0.lock().unwrap() = filter.into();
        Ok(())
    }
}

struct Running {
    admin: SocketAddr,
    metrics: SocketAddr,
    readiness: SocketAddr,
    telemetry: Arc<Telemetry>,
    tasks: Readiness,
    filter: Filter,
    stops: Arc<AtomicUsize>,
    server: AdminServer,
}

fn start() -> Running {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let listeners = AdminListeners::bind(&AdminAddresses {
        admin: any,
        metrics: any,
        readiness: any,
    })
    .unwrap();
    let [admin, metrics, readiness] = [&listeners.admin, &listeners.metrics, &listeners.readiness]
        .map(|listener| listener.local_addr().unwrap());
    let telemetry = Arc::new(Telemetry::new(TelemetryOptions {
        component: "ambidex".into(),
        tag: "1.2.3".into(),
        ..TelemetryOptions::default()
    }));
    let tasks = Readiness::new();
    let filter = Filter(Arc::new(Mutex::new("info".into())));
    let stops = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&stops);
    let pages = Admin::new(Arc::clone(&telemetry), tasks.clone())
        .section("workloads", || json!([{ "uid": "pod-1" }]))
        .section("services", || json!([]))
        .logging(filter.clone())
        .on_shutdown(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        });
    Running {
        admin,
        metrics,
        readiness,
        telemetry,
        tasks,
        filter,
        stops,
        server: serve(pages, listeners).unwrap(),
    }
}

/// Sends `request` as it is and gives (status line, head, body).
fn raw(to: SocketAddr, request: &[u8]) -> (String, String, String) {
    let mut stream = TcpStream::connect(to).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect(&answer);
    let (status, head) = head.split_once("\r\n").unwrap();
    let status = status.strip_prefix("HTTP/1.1 ").unwrap();
    (status.into(), head.to_lowercase(), body.into())
}

fn ask(to: SocketAddr, method: &str, path: &str) -> (String, String, String) {
    raw(
        to,
        format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes(),
    )
}

#[test]
fn readiness_names_what_is_missing() {
    let running = start();
    let listeners = running.tasks.register("listeners");
    let state = running.tasks.register("state manager");
    let (status, _, body) = ask(running.readiness, "GET", "/healthz/ready");
    assert_eq!(status, "500 Internal Server Error");
    assert_eq!(body, "not ready, pending: listeners, state manager\n");
    listeners.done();
    state.done();
    let (status, _, body) = ask(running.readiness, "GET", "/healthz/ready");
    assert_eq!((status.as_str(), body.as_str()), ("200 OK", "ready\n"));
}

#[test]
fn metrics_are_served_under_both_paths() {
    let running = start();
    for path in ["/metrics", "/stats/prometheus"] {
        let (status, head, body) = ask(running.metrics, "GET", path);
        assert_eq!(status, "200 OK");
        assert!(head.contains("content-type: text/plain; version=0.0.4"));
        assert!(body.contains("\nistio_build{component=\"ambidex\",tag=\"1.2.3\"} 1\n"));
        assert!(body.contains("\n# TYPE istio_tcp_connections_opened_total counter\n"));
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/openmetrics-text;version=1.0.0,*/*;q=0.1\r\n\r\n"
        );
        let (status, head, body) = raw(running.metrics, request.as_bytes());
        assert_eq!(status, "200 OK");
        assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"));
        assert!(body.contains("\n# TYPE istio_tcp_connections_opened counter\n"));
        assert!(body.ends_with("# EOF\n"));
    }
}

#[test]
fn config_dump_joins_the_programs_sections_with_ours() {
    let running = start();
    let address = "10.0.0.1:80".parse().unwrap();
    let record = running.telemetry.open(Opening {
        direction: Direction::Outbound,
        capture_mode: "node",
        source: Endpoint::unknown(address),
        destination: Endpoint::unknown(address),
        destination_service: None,
        hbone_addr: None,
        mutual_tls: false,
    });
    record.sent(12);
    let (status, head, body) = ask(running.admin, "GET", "/config_dump?pretty");
    assert_eq!(status, "200 OK");
    assert!(head.contains("content-type: application/json"));
    let dump: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        dump["version"],
        json!({ "component": "ambidex", "version": "1.2.3" })
    );
    assert_eq!(dump["workloads"], json!([{ "uid": "pod-1" }]));
    assert_eq!(dump["services"], json!([]));
    assert_eq!(dump["connections"][0]["sent"], 12);
    assert_eq!(dump["connections"][0]["captureMode"], "node");
    assert_eq!(dump["connections"][0]["direction"], "outbound");
}

#[test]
fn the_log_filter_is_shown_and_set() {
    let running = start();
    let (_, _, body) = ask(running.admin, "GET", "/logging?level=trace");
    assert_eq!(body, "current log level is info\n", "GET changes nothing");
    let (status, _, body) = ask(running.admin, "POST", "/logging?level=debug,access%3doff");
    assert_eq!(status, "200 OK");
    assert_eq!(body, "current log level is debug,access=off\n");
    let (status, _, body) = ask(running.admin, "POST", "/logging?level=bad");
    assert_eq!(status, "400 Bad Request");
    assert_eq!(body, "log filter \"bad\": invalid filter directive\n");
    let (status, _, body) = ask(running.admin, "POST", "/logging");
    assert_eq!(status, "200 OK");
    assert_eq!(body, "current log level is debug,access=off\n");
    let (_, _, body) = ask(running.admin, "POST", "/logging?reset");
    assert_eq!(body, "current log level is reset\n");
    let (_, _, body) = ask(running.admin, "POST", "/logging?reset&level=warn");
    assert_eq!(body, "current log level is warn\n", "the level comes last");
    assert_eq!(running.filter.current(), "warn");
}

#[test]
fn only_post_stops_the_process() {
    let running = start();
    let (status, head, _) = ask(running.admin, "GET", "/quitquitquit");
    assert_eq!(status, "405 Method Not Allowed");
    assert!(head.contains("allow: post"));
    assert_eq!(running.stops.load(Ordering::Relaxed), 0);
    let (status, _, body) = ask(running.admin, "POST", "/quitquitquit");
    assert_eq!(
        (status.as_str(), body.as_str()),
        ("200 OK", "shutting down\n")
    );
    assert_eq!(running.stops.load(Ordering::Relaxed), 1);
}

#[test]
fn each_port_has_its_own_pages() {
    let running = start();
    let (status, _, index) = ask(running.admin, "GET", "/");
    assert_eq!(status, "200 OK");
    assert!(index.contains("/config_dump") && index.contains("/quitquitquit"));
    let (status, _, body) = ask(running.readiness, "POST", "/quitquitquit");
    assert_eq!(status, "404 Not Found");
    assert!(body.contains("/healthz/ready"), "{body}");
    assert_eq!(
        ask(running.metrics, "GET", "/config_dump").0,
        "404 Not Found"
    );
    assert_eq!(ask(running.admin, "GET", "/metrics").0, "404 Not Found");
    assert_eq!(running.stops.load(Ordering::Relaxed), 0);
}

#[test]
fn head_has_the_length_and_no_body() {
    let running = start();
    let (status, head, body) = ask(running.readiness, "HEAD", "/healthz/ready");
    assert_eq!((status.as_str(), body.as_str()), ("200 OK", ""));
    assert!(head.contains("content-length: 6"), "{head}");
}

#[test]
fn bodies_are_ignored_up_to_a_limit_and_heads_are_bounded() {
    let running = start();
    let with_body = |length: usize| {
        let mut request =
            format!("GET /healthz/ready HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n")
                .into_bytes();
        request.resize(request.len() + length, b'x');
        request
    };
    assert_eq!(raw(running.readiness, &with_body(60_000)).0, "200 OK");
    // One byte more than the limit, so that everything sent has been read when the answer comes.
    assert_eq!(
        raw(running.readiness, &with_body(64 * 1024 + 1)).0,
        "413 Payload Too Large"
    );
    let mut endless = b"GET / HTTP/1.1\r\nHost: a\r\nX: ".to_vec();
    endless.resize(16 * 1024, b'x');
    assert!(raw(running.admin, &endless).0.starts_with("431 "));
    assert!(
        raw(running.admin, b"\x16\x03\x01 tls?\r\n\r\n")
            .0
            .starts_with("400 ")
    );
}

#[test]
fn silent_clients_do_not_keep_others_out() {
    let running = start();
    let silent: Vec<_> = (0..CONNECTIONS - 1)
        .map(|_| TcpStream::connect(running.readiness).unwrap())
        .collect();
    assert_eq!(ask(running.readiness, "GET", "/healthz/ready").0, "200 OK");
    // With every place taken, the head timeout makes room.
    let last = TcpStream::connect(running.readiness).unwrap();
    let begun = std::time::Instant::now();
    assert_eq!(ask(running.readiness, "GET", "/healthz/ready").0, "200 OK");
    assert!(begun.elapsed() < HEAD_TIMEOUT * 2);
    drop((silent, last));
}

#[test]
fn a_dropped_server_frees_its_ports() {
    let running = start();
    let address = running.admin;
    drop(running.server);
    assert!(TcpStream::connect(address).is_err());
    TcpListener::bind(address).unwrap();
}

#[test]
fn a_taken_port_is_named() {
    let running = start();
    let error = AdminListeners::bind(&AdminAddresses {
        admin: running.admin,
        metrics: running.admin,
        readiness: running.admin,
    })
    .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(
        error.to_string().contains(&running.admin.to_string()),
        "{error}"
    );
}
