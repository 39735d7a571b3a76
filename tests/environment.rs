//! The field's environment variables of the proxy: each has its effect, says so when it is wrong, and is a flag too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::{Command, Output};

use rstest::rstest;
use serde_json::{Value, json};

/// Runs a proxy that says what is in force and ends.
fn show_config(environment: &[(&str, &str)], arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ambidex"))
        .args(["proxy", "--local-xds", "/nonexistent", "--show-config"])
        .args(arguments)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

fn in_force(environment: &[(&str, &str)], arguments: &[&str]) -> Value {
    let output = show_config(environment, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{environment:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Variable, flag, a value other than the default, where it shows, as what; and a value that is none.
type Row = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    Value,
    Option<&'static str>,
);

fn rows() -> Vec<Row> {
    vec![
        (
            "TRUST_DOMAIN",
            "--trust-domain",
            "td.example",
            "/trustDomain",
            json!("td.example"),
            None,
        ),
        (
            "CLUSTER_ID",
            "--cluster-id",
            "east",
            "/clusterId",
            json!("east"),
            None,
        ),
        (
            "NETWORK",
            "--network",
            "net1",
            "/network",
            json!("net1"),
            None,
        ),
        (
            "CLUSTER_DOMAIN",
            "--cluster-domain",
            "Example.Test",
            "/dns/clusterDomain",
            json!("example.test"),
            None,
        ),
        (
            "PREFERED_SERVICE_NAMESPACE",
            "--preferred-service-namespace",
            "beta",
            "/dns/preferredServiceNamespace",
            json!("beta"),
            None,
        ),
        (
            "IPV6_ENABLED",
            "--ipv6",
            "false",
            "/dns/ipv6",
            json!(false),
            Some("perhaps"),
        ),
        (
            "ISTIO_META_DNS_CAPTURE",
            "--dns-proxy",
            "false",
            "/dns",
            Value::Null,
            Some("yes!"),
        ),
        (
            "UNSTABLE_ENABLE_SOCKS5",
            "--socks5",
            "true",
            "/socks5",
            json!(true),
            Some("on"),
        ),
        (
            "POOL_MAX_STREAMS_PER_CONNECTION",
            "--pool-max-streams",
            "7",
            "/poolMaxStreamsPerConnection",
            json!(7),
            Some("0"),
        ),
        (
            "AMBIDEX_HALF_OPEN_TIMEOUT",
            "--half-open-timeout",
            "90s",
            "/halfOpenTimeout",
            json!("90s"),
            Some("90"),
        ),
        (
            "POOL_UNUSED_RELEASE_TIMEOUT",
            "--pool-unused-release",
            "1m30s",
            "/poolUnusedReleaseTimeout",
            json!("90s"),
            Some("90"),
        ),
        (
            "KEEPALIVE_ENABLED",
            "--keepalive",
            "false",
            "/keepalive",
            Value::Null,
            Some("2"),
        ),
        (
            "KEEPALIVE_TIME",
            "--keepalive-time",
            "60s",
            "/keepalive/time",
            json!("60s"),
            Some("10ms"),
        ),
        (
            "KEEPALIVE_INTERVAL",
            "--keepalive-interval",
            "30s",
            "/keepalive/interval",
            json!("30s"),
            Some("soon"),
        ),
        (
            "KEEPALIVE_RETRIES",
            "--keepalive-retries",
            "3",
            "/keepalive/retries",
            json!(3),
            Some("-1"),
        ),
        (
            "USER_TIMEOUT_ENABLED",
            "--user-timeout",
            "true",
            "/userTimeout",
            json!("1800s"),
            Some("maybe"),
        ),
        (
            "CONNECTION_TERMINATION_DEADLINE",
            "--termination-deadline",
            "12s",
            "/connectionTerminationDeadline",
            json!("12s"),
            Some("x"),
        ),
        (
            "TERMINATION_GRACE_PERIOD_SECONDS",
            "--termination-grace-period",
            "30",
            "/connectionTerminationDeadline",
            json!("25s"),
            Some("30s"),
        ),
        (
            "SECRET_TTL",
            "--secret-ttl",
            "2h",
            "/secretTtl",
            json!("7200s"),
            Some("forever"),
        ),
        (
            "ZTUNNEL_WORKER_THREADS",
            "--worker-threads",
            "3",
            "/workerThreads",
            json!(3),
            Some("many"),
        ),
        (
            "ENABLE_RESPONSE_BAGGAGE",
            "--response-baggage",
            "true",
            "/responseBaggage",
            json!(true),
            Some("some"),
        ),
        (
            "INPOD_UDS",
            "--zds-socket",
            "/run/elsewhere.sock",
            "/inpodUds",
            json!("/run/elsewhere.sock"),
            None,
        ),
        (
            "ADMIN_ADDR",
            "--admin",
            "127.0.0.1:1",
            "/adminAddr",
            json!("127.0.0.1:1"),
            Some("15000"),
        ),
        (
            "STATS_ADDR",
            "--metrics",
            "127.0.0.1:2",
            "/statsAddr",
            json!("127.0.0.1:2"),
            Some("here"),
        ),
        (
            "READINESS_ADDR",
            "--readiness",
            "127.0.0.1:3",
            "/readinessAddr",
            json!("127.0.0.1:3"),
            Some(":3"),
        ),
        (
            "CA_ADDRESS",
            "--ca-address",
            "ca.example:15",
            "/authority/ca/address",
            json!("https://ca.example:15"),
            Some("ftp://ca.example"),
        ),
        (
            "AMBIDEX_CA_DIR",
            "--ca-dir",
            "/ca",
            "/authority/builtIn",
            json!("/ca"),
            None,
        ),
        (
            "ISTIO_META_CLUSTER_ID",
            "--meta-cluster-id",
            "west",
            "/clusterId",
            json!("west"),
            None,
        ),
        (
            "LOCALHOST_APP_TUNNEL",
            "--localhost-app-tunnel",
            "false",
            "/localhostAppTunnel",
            json!(false),
            Some("maybe"),
        ),
        (
            "AUTHZ_POLICY_INFO_LOGGING",
            "--policy-info-logging",
            "true",
            "/authzPolicyInfoLogging",
            json!(true),
            Some("maybe"),
        ),
        (
            "COMPLIANCE_POLICY",
            "--compliance-policy",
            "pqc",
            "/compliancePolicy",
            json!("pqc"),
            Some("best"),
        ),
        (
            "CRL_PATH",
            "--crl",
            "/etc/crl/ca-crl.pem",
            "/crlPath",
            json!("/etc/crl/ca-crl.pem"),
            None,
        ),
        (
            "AMBIDEX_DEBUG_TLS_KEY_LOG",
            "--debug-tls-key-log",
            "/run/keys.log",
            "/debugTlsKeyLog",
            json!("/run/keys.log"),
            None,
        ),
    ]
}

#[test]
fn each_variable_has_its_effect_and_is_a_flag() {
    let default = in_force(&[], &[]);
    for (variable, flag, value, pointer, want, _) in rows() {
        assert_ne!(
            default.pointer(pointer),
            Some(&want),
            "{variable} is the default"
        );
        let by_variable = in_force(&[(variable, value)], &[]);
        assert_eq!(
            by_variable.pointer(pointer),
            Some(&want),
            "{variable}: {by_variable}"
        );
        let by_flag = in_force(&[], &[flag, value]);
        assert_eq!(by_flag.pointer(pointer), Some(&want), "{flag}: {by_flag}");
    }
}

#[test]
fn a_wrong_value_is_refused_by_the_variables_name() {
    let mut wrong: Vec<_> = rows()
        .into_iter()
        .filter_map(|row| Some((row.0, row.5?)))
        .collect();
    wrong.extend([
        ("PROXY_MODE", "dedicated"),
        ("PROXY_MODE", "none"),
        // What is always so cannot be turned off, and says that.
        ("PACKET_MARK", "1338"),
        ("ENABLE_ORIG_SRC", "false"),
        ("INPOD_PORT_REUSE", "false"),
        ("ZTUNNEL_CPU_LIMIT", "0"),
        ("ZTUNNEL_WORKER_THREADS", "0%"),
        ("ZTUNNEL_WORKER_THREADS", "101%"),
        ("XDS_ON_DEMAND", "perhaps"),
        ("FAKE_CA", "perhaps"),
    ]);
    if !cfg!(feature = "fips") {
        wrong.push(("COMPLIANCE_POLICY", "fips-140-2"));
    }
    for (variable, value) in wrong {
        let output = show_config(&[(variable, value)], &[]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{variable}={value} is accepted");
        assert!(errors.contains(variable), "{variable}={value}: {errors}");
    }
}

/// What a pod's end leaves to its connections.
#[rstest]
#[case("30", "25s")]
#[case("11", "6s")]
#[case("10", "9s")]
#[case("1", "1s")]
fn deadline_of_a_grace_period(#[case] grace: &str, #[case] deadline: &str) {
    let set = [("TERMINATION_GRACE_PERIOD_SECONDS", grace)];
    assert_eq!(
        in_force(&set, &[])["connectionTerminationDeadline"],
        deadline
    );
}

/// Threads of a part of the processors, rounded up, and never one alone.
#[rstest]
#[case("25%", "16", 4)]
#[case("30%", "16", 5)]
#[case("1%", "16", 2)]
#[case("7", "16", 7)]
#[case("100%", "3", 3)]
fn worker_threads(#[case] threads: &str, #[case] limit: &str, #[case] want: u64) {
    let set = [
        ("ZTUNNEL_WORKER_THREADS", threads),
        ("ZTUNNEL_CPU_LIMIT", limit),
    ];
    assert_eq!(in_force(&set, &[])["workerThreads"], want);
    let flags = ["--worker-threads", threads, "--cpu-limit", limit];
    assert_eq!(in_force(&[], &flags)["workerThreads"], want);
    assert_eq!(
        in_force(&[("ZTUNNEL_CPU_LIMIT", limit)], &[])["workerThreads"],
        limit.parse::<u64>().unwrap(),
        "without a number of threads"
    );
}

/// Everything about the connection to the CA, and what the variables of the other connection have to do with it.
#[test]
fn the_ca() {
    let set = [
        ("XDS_ADDRESS", "istiod.example:1"),
        ("ALT_XDS_HOSTNAME", "not.the.ca"),
        ("CA_ROOT_CA", "/roots.pem"),
        ("ALT_CA_HOSTNAME", "ca.example"),
        ("CA_HEADER_FOO", "bar"),
        ("XDS_HEADER_NOT", "here"),
        ("AUTH_TOKEN", "/token"),
        ("CLUSTER_ID", "east"),
    ];
    let with_ca = [&set[..], &[("CA_ADDRESS", "http://ca:2")]].concat();
    let ca = &in_force(&with_ca, &[])["authority"]["ca"];
    let wanted = json!({
        "address": "http://ca:2",
        "rootCert": "/roots.pem",
        "altHostname": "ca.example",
        "token": "/token",
        "clusterId": "east",
        "headers": ["foo"],
    });
    assert_eq!(*ca, wanted);
    let fake = [
        &with_ca[..],
        &[("FAKE_CA", "true"), ("AMBIDEX_CA_DIR", "/ca")],
    ]
    .concat();
    assert_eq!(in_force(&fake, &[])["authority"], json!({"builtIn": "/ca"}));
    // Neither a token nor roots that are given as texts are for those who look at the configuration.
    let texts = [
        ("CA_ADDRESS", "ca:2"),
        ("AUTH_TOKEN", "se.cr.et"),
        ("CA_ROOT_CA", "-----BEGIN CERTIFICATE-----"),
    ];
    let config = in_force(&texts, &[]);
    assert_eq!(config["authority"]["ca"]["token"], "given as a text");
    assert_eq!(config["authority"]["ca"]["rootCert"], "given as a text");
    assert!(!config.to_string().contains("se.cr.et"));
}

/// The longer-standing variables of this proxy win over the field's.
#[test]
fn resolvers_and_precedence() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "nameserver 192.0.2.53\noptions timeout:2\n").unwrap();
    let path = file.path().display().to_string();
    let config = in_force(
        &[
            ("AMBIDEX_RESOLV_CONF", &path),
            ("AMBIDEX_DRAIN_SECONDS", "3"),
            ("CONNECTION_TERMINATION_DEADLINE", "9s"),
        ],
        &[],
    );
    assert_eq!(config["dns"]["upstreams"], json!(["192.0.2.53:53"]));
    assert_eq!(config["dns"]["upstreamTimeout"], "2s");
    assert_eq!(config["connectionTerminationDeadline"], "3s");
}
