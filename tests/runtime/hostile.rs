//! Calls of the plugin that make no sense: each with the code that the specification has for it.

use lab::standing::Lab;
use serde_json::{Value, json};

use super::{Done, Sandbox, request};

/// Network configurations on standard input.
pub fn inputs(lab: &Lab, sandbox: &Sandbox) {
    let config = sandbox.config(lab);
    let with = |key: &str, value: Value| {
        let mut config = config.clone();
        config[key] = value;
        config.to_string().into_bytes()
    };
    let ips = |value: Value| with("prevResult", json!({"cniVersion": "1.1.0", "ips": value}));
    let ip = |address: &str| ips(json!([{"address": address}]));
    let own = |key: &str, value: Value| with("ambidex", json!({ key: value }));
    let repeated = |text: &str, times: usize| text.repeat(times);
    let inputs: Vec<(Vec<u8>, u64)> = vec![
        (b"".to_vec(), 6),
        (b"null".to_vec(), 6),
        (b"[]".to_vec(), 6),
        (b"{".to_vec(), 6),
        (b"{}".to_vec(), 7),
        (b"{}{}".to_vec(), 6),
        (b"\xff\xfe\x00".to_vec(), 6),
        (b"\xef\xbb\xbf{}".to_vec(), 6),
        (repeated("[", 100_000).into_bytes(), 6),
        (repeated("{\"prevResult\":", 50_000).into_bytes(), 6),
        (vec![b' '; 5 << 20], 6),
        (vec![0; 1 << 20], 6),
        (with("cniVersion", json!("0.1.0")), 1),
        (with("cniVersion", json!("99.0.0")), 1),
        (with("cniVersion", json!("1.0.0\n")), 1),
        (with("cniVersion", json!("")), 7),
        (with("cniVersion", json!(1)), 6),
        (with("name", json!("")), 7),
        (with("name", json!("../../etc")), 7),
        (with("name", json!("a\u{0}b")), 7),
        (with("name", json!(["n"])), 6),
        (with("ambient_enabled", json!("yes")), 6),
        (with("ambient_enabled", Value::Null), 6),
        (with("cni_agent_run_dir", json!(7)), 6),
        (with("cni_agent_run_dir", json!("/nowhere")), 11),
        (with("cni_agent_run_dir", json!("/dev/null")), 11),
        (with("cni_agent_run_dir", json!("a".repeat(5000))), 11),
        (with("cni_agent_run_dir", json!("/\u{0}")), 11),
        (with("exclude_namespaces", json!("x")), 6),
        (with("exclude_namespaces", json!([1])), 6),
        (with("pod_namespace", json!({})), 6),
        (own("other", json!(1)), 6),
        (own("capture", json!("sometimes")), 6),
        (own("capture", json!(true)), 6),
        (own("namespace", json!(5)), 6),
        (with("ambidex", json!("always")), 6),
        (with("prevResult", Value::Null), 7),
        (with("prevResult", json!([])), 7),
        (with("prevResult", json!("result")), 7),
        (ips(Value::Null), 7),
        (ips(json!([])), 7),
        (ips(json!({})), 7),
        (ips(json!([{}])), 7),
        (ips(json!([null])), 7),
        (ips(json!([{"address": 7}])), 7),
        (ip("10.244.1.11"), 7),
        (ip("10.244.1.11/33"), 7),
        (ip("10.244.1.11/-1"), 7),
        (ip("fd00::1/128"), 7),
        (ip("127.0.0.1/8"), 7),
        (ip("0.0.0.0/0"), 7),
        (ip("255.255.255.255/32"), 7),
        (ip("224.0.0.1/4"), 7),
        (ip("10.244.1.77/32"), 7),
        (ip("10.244.1.1/32"), 7),
        (
            ips(json!([{"address": "10.244.1.11/32", "gateway": "x"}])),
            7,
        ),
        (ips(json!([{"address": "10.244.1.11/32", "gateway": 1}])), 7),
        (
            ips(json!([{"address": "10.244.1.11/32", "interface": "eth0"}])),
            7,
        ),
        (
            ips(json!(vec![json!({"address": "10.244.1.11/32"}); 500])),
            7,
        ),
    ];
    assert!(inputs.len() >= 50);
    for (input, code) in &inputs {
        let shown: String = String::from_utf8_lossy(input).chars().take(200).collect();
        refused(&shown, *code, &sandbox.call_with("ADD", input));
    }
}

/// Variables of the environment.
pub fn environments(lab: &Lab, sandbox: &Sandbox) {
    let long = "x".repeat(100_000);
    let environments: [(&str, &str, u64); 16] = [
        ("CNI_COMMAND", "", 4),
        ("CNI_COMMAND", "add", 4),
        ("CNI_COMMAND", "ADD\n", 4),
        ("CNI_CONTAINERID", "", 4),
        ("CNI_CONTAINERID", "../../x", 4),
        ("CNI_CONTAINERID", &long, 7),
        ("CNI_NETNS", "", 4),
        ("CNI_NETNS", "run/netns/x", 7),
        ("CNI_NETNS", "/proc/self/ns/mnt", 7),
        ("CNI_IFNAME", "", 4),
        ("CNI_IFNAME", "eth0/../lo", 4),
        ("CNI_IFNAME", &long, 4),
        ("CNI_ARGS", "K8S_POD_NAME", 4),
        ("CNI_ARGS", "FOO=bar", 4),
        ("CNI_ARGS", "AMBIDEX_CAPTURE=perhaps", 4),
        ("CNI_ARGS", "K8S_POD_NAME=a/../b;K8S_POD_NAMESPACE=c", 7),
    ];
    let input = sandbox.config(lab).to_string();
    for (name, value, code) in environments {
        let mut command = sandbox.command("ADD");
        let done = Done::of(command.env(name, value), input.as_bytes());
        let shown: String = value.chars().take(100).collect();
        refused(&format!("{name}={shown:?}"), code, &done);
    }
}

/// Bodies of events, sent to the agent past the plugin.
pub fn bodies(lab: &Lab, sandbox: &Sandbox) {
    let event = sandbox.event();
    let but = |key: &str, value: Value| {
        let mut event = event.clone();
        event[key] = value;
        event.to_string().into_bytes()
    };
    let node = host_net::netns::Netns::path_of(&lab.topology().node(1).unwrap().netns);
    let proxy = host_net::netns::Netns::path_of(&lab.topology().node(1).unwrap().proxy_netns);
    let address = |ip: &str, mask: &str| json!([{"Interface": null, "Address": {"IP": ip, "Mask": mask}, "Gateway": null}]);
    let bodies: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"null".to_vec(),
        b"[1]".to_vec(),
        b"{".to_vec(),
        b"{}".to_vec(),
        b"\xff".to_vec(),
        b"[".repeat(200_000),
        but("Netns", json!("")),
        but("Netns", json!("run/netns/x")),
        but("Netns", json!("/run/netns/absent")),
        but("Netns", json!("/etc/passwd")),
        but("Netns", json!("/proc/self/ns/mnt")),
        but("Netns", json!("/dev/zero")),
        but("Netns", json!(node)),
        but("Netns", json!(proxy)),
        but("PodName", json!("")),
        but("PodName", json!("x\u{1b}[31m2")),
        but("PodName", json!("x".repeat(300))),
        but("PodNamespace", json!("../../etc")),
        but("PodNamespace", json!("a\nb")),
        but("PodUID", json!("../../../tmp/x")),
        but("PodUID", json!(".hidden")),
        but("PodUID", json!("u".repeat(129))),
        but("PodUID", json!("a b;rm -rf")),
        but("ContainerID", json!("\u{0}")),
        but("ServiceAccount", json!("sa/../other")),
        but("IPs", Value::Null),
        but("IPs", json!("10.0.0.1")),
        but("IPs", address("10.244.1.11", "////")),
        but("IPs", address("0.0.0.0", "/////w==")),
        but("IPs", address("224.0.0.1", "/////w==")),
        but("IPs", address("127.0.0.1", "/////w==")),
        but("IPs", address("10.244.1.1", "/////w==")),
        but("IPs", address("10.244.1.10", "/////w==")),
        b"\"event\"".to_vec(),
        b"7".to_vec(),
        b"\x00\x00\x00\x00".to_vec(),
        b"{\"PodName\":\"a\",\"PodName\":\"b\"}".to_vec(),
        [event.to_string().as_bytes(), b" {}"].concat(),
        "\u{feff}{}".as_bytes().to_vec(),
        event
            .to_string()
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect(),
        but("Netns", json!(7)),
        but("Netns", Value::Null),
        but("Netns", json!("/run/netns/\u{0}")),
        but("Netns", json!("/".repeat(5000))),
        but("Netns", json!("/proc/self/ns/net/..")),
        but("PodName", json!(["a"])),
        but("PodName", json!("-a")),
        but("PodName", json!("pod\u{202e}1")),
        but("PodNamespace", json!("")),
        but("PodNamespace", json!({"name": "a"})),
        but("PodUID", json!(1.5)),
        but("ServiceAccount", json!(true)),
        but("ServiceAccount", json!("a".repeat(254))),
        but("ContainerID", json!("x".repeat(129))),
        but("Network", json!("a/b")),
        but("IfName", json!("eth0 ; reboot")),
        but("IPs", json!({})),
        but("IPs", json!([null])),
        but("IPs", json!([{"Interface": 0}])),
        but("IPs", address("10.244.1.300", "/////w==")),
        but("IPs", address("10.244.1.11", "not base64")),
        but("IPs", address("10.244.1.11", "/wD/AA==")),
        but("IPs", address("255.255.255.255", "/////w==")),
        but(
            "IPs",
            json!(vec![address("10.244.1.11", "/////w==")[0].clone(); 17]),
        ),
    ];
    for body in &bodies {
        let shown: String = String::from_utf8_lossy(body).chars().take(200).collect();
        let (status, text) = request(lab, "pluginevent.sock", "POST /cmdadd", body);
        assert_eq!(status, 400, "{shown}: {text}");
        assert!(
            text.len() > 10 && !text.contains('\u{1b}'),
            "{shown}: {text}"
        );
    }
    assert!(bodies.len() >= 60);
}

#[track_caller]
fn refused(what: &str, code: u64, done: &Done) {
    let error = done.cni_error();
    assert_eq!(error["code"], code, "{what}: {error}");
    let details = error["details"].as_str().unwrap();
    assert!(
        details.len() > 10 && details.len() < 8192 && !details.contains('\u{1b}'),
        "{what}: {error}"
    );
}
