//! Lines of the access log, as text and as JSON.

use std::io::Write;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::*;

/// Collects what a subscriber writes.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// How often [`logged`] has something done.
const TIMES_LOGGED: f64 = 3.0;

/// What `work` logs, as text lines and as JSON objects.
fn logged(filter: &str, work: impl Fn()) -> (Vec<String>, Vec<Value>) {
    // A place that logs for the first time while other tests log, too, may miss that there is a subscriber. The next
    // subscriber finds it known.
    let unread = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(std::io::sink)
        .finish();
    tracing::subscriber::with_default(unread, &work);
    let text = Lines::default();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(text.clone())
        .with_ansi(false)
        .without_time()
        .finish();
    tracing::subscriber::with_default(subscriber, &work);
    let json = Lines::default();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(json.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, &work);
    let lines = |lines: Lines| {
        let bytes = std::mem::take(&mut *lines.0.lock().unwrap());
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let json = lines(json)
        .iter()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    (lines(text), json)
}

/// The same line with the number of milliseconds, which is not ours to choose, written as `N`.
fn without_duration(line: &str) -> String {
    let (before, rest) = line.split_once("duration=\"").expect(line);
    let (millis, after) = rest.split_once("ms\"").expect(line);
    millis.parse::<u64>().expect(line);
    format!("{before}duration=\"Nms\"{after}")
}

#[test]
fn a_finished_connection_is_one_line_with_all_keys() {
    let (text, json) = logged("info", || {
        let telemetry = telemetry();
        let record = telemetry.open(opening(Direction::Outbound));
        record.sent(1_000);
        record.received(20);
        record.finish(Ok(()));
    });
    assert_eq!(
        text.iter().map(|l| without_duration(l)).collect::<Vec<_>>(),
        [concat!(
            " INFO access: connection complete src.addr=10.244.1.4:43210 src.workload=\"curl-7656-abc\"",
            " src.namespace=\"default\" src.identity=\"spiffe://cluster.local/ns/default/sa/curl\"",
            " src.cluster=\"Kubernetes\" dst.addr=10.244.2.7:15008 dst.hbone_addr=10.244.2.7:8080",
            " dst.service=\"web.shop.svc.cluster.local\" dst.workload=\"web-5d9-xyz\" dst.namespace=\"shop\"",
            " dst.identity=\"spiffe://cluster.local/ns/shop/sa/web\" dst.cluster=\"Kubernetes\" direction=\"outbound\"",
            " capture_mode=\"inpod\" bytes_sent=1000 bytes_recv=20 duration=\"Nms\"",
        )]
    );
    let [line] = &json[..] else {
        panic!("{json:?}")
    };
    assert_eq!(line["level"], "INFO");
    assert_eq!(line["target"], "access");
    let mut fields = line["fields"].as_object().unwrap().clone();
    assert!(
        fields
            .remove("duration")
            .unwrap()
            .as_str()
            .unwrap()
            .ends_with("ms")
    );
    assert_eq!(
        Value::Object(fields),
        serde_json::json!({
            "message": "connection complete",
            "src.addr": "10.244.1.4:43210",
            "src.workload": "curl-7656-abc",
            "src.namespace": "default",
            "src.identity": "spiffe://cluster.local/ns/default/sa/curl",
            "src.cluster": "Kubernetes",
            "dst.addr": "10.244.2.7:15008",
            "dst.hbone_addr": "10.244.2.7:8080",
            "dst.service": "web.shop.svc.cluster.local",
            "dst.workload": "web-5d9-xyz",
            "dst.namespace": "shop",
            "dst.identity": "spiffe://cluster.local/ns/shop/sa/web",
            "dst.cluster": "Kubernetes",
            "direction": "outbound",
            "capture_mode": "inpod",
            "bytes_sent": 1000,
            "bytes_recv": 20,
        })
    );
}

/// One for each connection that is counted as opened, when it is known where it goes.
#[test]
fn an_opened_connection_is_a_line_at_debug() {
    let run = || {
        let telemetry = telemetry();
        let early = telemetry.open(opening(Direction::Outbound));
        let late = telemetry.open(Opening {
            destination: Endpoint::unknown("10.96.0.1:80".parse().unwrap()),
            destination_service: None,
            ..opening(Direction::Outbound)
        });
        let Opening {
            destination,
            destination_service,
            ..
        } = opening(Direction::Outbound);
        late.set_destination(destination, destination_service, None, true);
        (early, late)
    };
    let (_, json) = logged("debug", || {
        let (early, late) = run();
        early.finish(Ok(()));
        late.finish(Ok(()));
    });
    let messages: Vec<_> = json.iter().map(|line| &line["fields"]["message"]).collect();
    let (opened, complete) = ("connection opened", "connection complete");
    assert_eq!(messages, [opened, opened, complete, complete]);
    for line in &json[..2] {
        assert_eq!(line["level"], "DEBUG");
        assert_eq!(line["target"], "access");
        assert_eq!(line["fields"]["dst.workload"], "web-5d9-xyz");
        assert_eq!(line["fields"]["dst.cluster"], "Kubernetes");
        assert!(line["fields"].get("bytes_sent").is_none());
    }
    let (text, _) = logged("info", || drop(run()));
    assert_eq!(text.len(), 2, "{text:?}");
}

#[test]
fn the_destination_reports_its_own_point_of_view_and_absent_values_have_no_key() {
    let (_, json) = logged("info", || {
        let telemetry = telemetry();
        let record = telemetry.open(Opening {
            source: Endpoint::unknown("10.0.0.9:5555".parse().unwrap()),
            destination_service: None,
            hbone_addr: None,
            mutual_tls: false,
            ..opening(Direction::Inbound)
        });
        record.sent(1_000);
        record.received(20);
        record.finish(Err(ConnectionError::new(
            ResponseFlag::Denied,
            "policy shop/deny-all",
        )));
    });
    let fields = json[0]["fields"].as_object().unwrap();
    assert_eq!(json[0]["level"], "ERROR");
    assert_eq!(
        (&fields["bytes_sent"], &fields["bytes_recv"]),
        (&20.into(), &1_000.into())
    );
    assert_eq!(fields["error"], "policy shop/deny-all");
    let keys: std::collections::BTreeSet<_> = fields.keys().map(String::as_str).collect();
    let expected = [
        "bytes_recv",
        "bytes_sent",
        "capture_mode",
        "direction",
        "dst.addr",
        "dst.cluster",
        "dst.identity",
        "dst.namespace",
        "dst.workload",
        "duration",
        "error",
        "message",
        "src.addr",
    ];
    assert_eq!(keys, expected.into());
}

#[test]
fn a_cancelled_connection_ends_as_aborted() {
    let (text, _) = logged("info", || {
        let telemetry = telemetry();
        drop(telemetry.open(opening(Direction::Outbound)));
    });
    assert_eq!(text.len(), 1);
    assert!(text[0].starts_with("ERROR access: connection complete "));
    assert!(text[0].ends_with(" error=aborted"), "{}", text[0]);
}

#[test]
fn a_refused_connection_is_a_warning_and_counted_as_failed_only() {
    let (client, dst) = ("10.0.0.9:5555", "10.0.0.1:15001");
    let telemetry = telemetry();
    let (text, json) = logged("info", || {
        telemetry.refused(
            Direction::Outbound,
            "node",
            ClientAddr(client.parse().unwrap()),
            Some(OrigDstAddr(dst.parse().unwrap())),
            &Refusal::UnknownOwner("10.0.0.9".parse().unwrap()).into(),
        );
    });
    assert!(text[0].starts_with(" WARN access: connection failed src.addr=10.0.0.9:5555"));
    assert_eq!(json[0]["fields"]["dst.addr"], dst);
    assert!(
        json[0]["fields"]["error"]
            .as_str()
            .unwrap()
            .starts_with("10.0.0.9 is not a pod")
    );
    let samples = tcp(&telemetry);
    let mut found = samples
        .iter()
        .filter(|((name, _), _)| name != "istio_tcp_sockets_open");
    let ((name, labels), value) = found.next().unwrap();
    assert_eq!(
        (name.as_str(), *value),
        ("istio_tcp_connections_failed_total", TIMES_LOGGED)
    );
    assert_eq!(labels.len(), 24);
    assert_eq!(labels["source_workload"], "unknown");
    assert_eq!(labels["capture_mode"], "node");
    assert!(found.next().is_none());
}

#[test]
fn the_access_log_alone_can_be_turned_off() {
    let (text, _) = logged("info,access=off", || {
        let telemetry = telemetry();
        telemetry.open(opening(Direction::Outbound)).finish(Ok(()));
        tracing::info!("something else");
    });
    assert_eq!(text.len(), 1);
    assert!(text[0].contains("something else"));
}
