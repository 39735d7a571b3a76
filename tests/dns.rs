//! Captured pods ask for names, with `dig`; the resolver behind the proxy is a real one, outside the cluster.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::{Scene, SharedStage, eventually, own, shared_in};
use lab::standing::{Background, Daemon};
use lab::topology::workloads::Service;
use lab::topology::{Families, LabSpec, OUTSIDE, SERVICE_VIP, ipv6};
use rstest::rstest;
use runtime::{Sandbox, ambidex, diff_is_empty, pods};
use serde_json::{Value, json};

/// Longest that a `dig` may take.
const DIG_LIMIT: Duration = Duration::from_secs(30);
/// Asks for names in namespace alpha; the service of every lab is `echo` in beta.
const POD: &str = "pod1-1";
/// A pod in namespace beta.
const OTHER: &str = "pod1-2";

/// A lab whose pods' queries are captured and whose proxies pass on to the resolver outside.
fn spec(variant: Variant) -> LabSpec {
    let mut spec = variant.spec();
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("resolv.conf");
    std::fs::write(&file, format!("nameserver {OUTSIDE}\noptions timeout:2\n")).unwrap();
    let env = &mut spec.daemon_env;
    env.insert("AMBIDEX_RESOLV_CONF".into(), file.display().to_string());
    spec.agent_args.push("--dns-capture".to_owned());
    spec
}

/// The resolver, which knows `example.org`, and that nothing else is under `cluster.local`.
fn resolver(scene: &Scene) -> Background {
    let mut argv: Vec<String> = [
        "dnsmasq",
        "--no-daemon",
        "--user=root",
        "--pid-file=",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--log-queries",
        "--bind-interfaces",
        "--edns-packet-max=4096",
        "--local=/example.org/",
        "--local=/cluster.local/",
        "--host-record=www.example.org,192.0.2.80,2001:db8::80",
        "--txt-record=www.example.org,of the outside",
    ]
    .map(str::to_owned)
    .to_vec();
    argv.push(format!("--listen-address={OUTSIDE}"));
    if scene.lab.topology().families.have_v6() {
        argv.push(format!("--listen-address={}", ipv6::twin(OUTSIDE)));
    }
    argv.extend((1..=60).map(|n| format!("--host-record=many.example.org,198.51.100.{n}")));
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let mut resolver = scene.lab.spawn("out", "dnsmasq", &argv).unwrap();
    resolver
        .wait_for("started", Duration::from_secs(10))
        .unwrap();
    resolver
}

/// The lab of a variant with its resolver, shared by the scenarios that change nothing.
fn shared(variant: Variant) -> (Scene, &'static Background) {
    static STAGES: [OnceLock<SharedStage>; 3] = [const { OnceLock::new() }; 3];
    static RESOLVERS: [OnceLock<Background>; 3] = [const { OnceLock::new() }; 3];
    let scene = shared_in(&STAGES[variant as usize], || spec(variant));
    let resolver = RESOLVERS[variant as usize].get_or_init(|| resolver(&scene));
    (scene, resolver)
}

/// By IPv6: a query to a resolver's IPv6 address is answered from there, for names of the mesh by the proxy and for others by
/// the resolver behind it; one that the proxy does not see is not answered for the mesh.
#[rstest]
fn a_resolver_is_asked_by_ipv6(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let mut spec = spec(variant);
    spec.families = Families::Dual;
    let scene = own(&spec);
    let _resolver = resolver(&scene);
    let server = format!("@{}", ipv6::twin(OUTSIDE));
    let ask = |pod: &str, arguments: &[&str]| {
        let common = ["dig", "-r", &server, "+noall", "+comments", "+answer"];
        let patient = ["+time=10", "+tries=2"];
        let argv = [&common[..], &patient, arguments].concat();
        let done = scene.lab.run(pod, &argv, DIG_LIMIT).unwrap();
        format!("{}{}", done.stdout, done.stderr)
    };
    let service = ipv6::twin(SERVICE_VIP).to_string();
    let name = "echo.beta.svc.cluster.local";
    for transport in ["+notcp", "+tcp"] {
        for (name, kind, wanted) in [
            (name, "AAAA", service.as_str()),
            (name, "A", &SERVICE_VIP.to_string()),
            ("www.example.org", "AAAA", "2001:db8::80"),
        ] {
            let output = ask(POD, &[name, kind, transport]);
            let found = answers(&output);
            let [answer] = &found[..] else {
                panic!("{name} {kind} {transport}: {output}");
            };
            let wanted = format!(" {kind} {wanted}");
            assert!(answer.ends_with(&wanted), "{transport}: {output}");
        }
    }
    let asked = scene.metric(1, "istio_dns_requests_total", &[]);
    assert!(asked >= 6.0, "{asked}");
    // Nobody stands between this one and the resolver.
    let output = ask("plain1", &[name, "AAAA"]);
    assert!(output.contains("NXDOMAIN"), "{output}");
}

/// What `dig` printed: header comments and answers. The server asked is the resolver itself: the pod knows of no proxy.
fn dig(scene: &Scene, pod: &str, arguments: &[&str]) -> String {
    let server = format!("@{OUTSIDE}");
    let mut argv = vec![
        "dig",
        "-r",
        &server,
        "+noall",
        "+comments",
        "+answer",
        "+time=5",
        "+tries=2",
    ];
    argv.extend(arguments);
    let done = scene.lab.run(pod, &argv, DIG_LIMIT).unwrap();
    format!("{}{}", done.stdout, done.stderr)
}

/// The answers without their spacing, sorted.
fn answers(output: &str) -> Vec<String> {
    let mut lines: Vec<String> = output
        .lines()
        .filter(|line| !line.starts_with(';') && line.contains("IN"))
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    lines.sort();
    lines
}

fn flags(output: &str) -> Vec<&str> {
    let line = output.lines().find(|line| line.starts_with(";; flags:"));
    let (_, flags) = line
        .unwrap_or_default()
        .split_once("flags:")
        .unwrap_or_default();
    flags
        .split(';')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect()
}

#[rstest]
fn names_of_the_mesh(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let (scene, _) = shared(variant);
    for (pod, name) in [
        (POD, "echo.beta"),
        (POD, "echo.beta.svc"),
        (POD, "ECHO.beta.svc.cluster.local"),
        (OTHER, "echo"),
    ] {
        for transport in ["+notcp", "+tcp"] {
            let output = dig(&scene, pod, &[name, "A", transport]);
            let want = [format!("{name}. 30 IN A {SERVICE_VIP}")];
            assert_eq!(answers(&output), want, "{pod} {transport}: {output}");
            let flags = flags(&output);
            assert!(flags.contains(&"aa") && flags.contains(&"ra"), "{output}");
        }
    }
    // With the search domain of its namespace behind it, as a resolver asks first.
    let searched = "echo.beta.alpha.svc.cluster.local";
    let output = dig(&scene, POD, &[searched, "A"]);
    let want = [
        format!("echo.beta. 30 IN A {SERVICE_VIP}"),
        format!("{searched}. 30 IN CNAME echo.beta."),
    ];
    assert_eq!(answers(&output), want, "{output}");
    // The name is there, addresses of this family are not. Nor other records, whatever the resolver thinks of the name.
    for kind in ["AAAA", "MX"] {
        let output = dig(&scene, POD, &["echo.beta.svc.cluster.local", kind]);
        assert!(output.contains("status: NOERROR"), "{kind}: {output}");
        assert_eq!(answers(&output), [""; 0], "{kind}: {output}");
    }
    for unknown in ["echo.alpha.svc.cluster.local", "no.example.org"] {
        let output = dig(&scene, POD, &[unknown, "A"]);
        assert!(output.contains("status: NXDOMAIN"), "{unknown}: {output}");
    }
}

#[rstest]
fn names_outside_are_passed_on(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let (scene, resolver) = shared(variant);
    for (transport, kind, want) in [
        ("+notcp", "A", "A 192.0.2.80"),
        ("+tcp", "A", "A 192.0.2.80"),
        ("+notcp", "AAAA", "AAAA 2001:db8::80"),
        ("+tcp", "TXT", "TXT \"of the outside\""),
    ] {
        let output = dig(&scene, POD, &["www.example.org", kind, transport]);
        let answers = answers(&output);
        assert!(
            answers.len() == 1 && answers[0].ends_with(want),
            "{transport} {kind}: {output}"
        );
    }
    let asked = resolver.output();
    for kind in ["A", "AAAA", "TXT"] {
        assert!(
            asked.contains(&format!("query[{kind}] www.example.org")),
            "{asked}"
        );
    }
    // What the mesh knows is not asked of others.
    assert!(!asked.contains("query[A] echo.beta"), "{asked}");
    let counted = |name: &str| scene.metric(1, name, &[("capture_mode", variant.capture())]);
    assert!(counted("istio_dns_requests_total") >= 4.0);
    assert!(counted("istio_dns_upstream_requests_total") >= 4.0);
    assert!(counted("istio_dns_upstream_request_duration_seconds_count") >= 4.0);
}

/// Answers are as large as the client says it can take, and no larger than what passes every path; the rest is by TCP.
#[rstest]
fn size_of_answers(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let (scene, _) = shared(variant);
    let service = |name: &str, vips: u8| Service {
        name: name.to_owned(),
        namespace: "alpha".to_owned(),
        hostname: format!("{name}.alpha.svc.cluster.local"),
        vips: (0..vips).map(|n| format!("/10.96.{vips}.{n}")).collect(),
        ports: [(80, 8080)].into(),
        more: Default::default(),
    };
    let _changed = scene.with_state(|state| {
        state.services.push(service("forty", 40));
        state.services.push(service("hundred", 100));
    });
    for (name, arguments, count) in [
        ("forty.alpha", &["+noedns"][..], None),
        ("forty.alpha", &["+bufsize=600"], None),
        ("forty.alpha", &["+bufsize=1232"], Some(40)),
        ("hundred.alpha", &["+bufsize=1232"], None),
        ("hundred.alpha", &["+bufsize=4096"], None),
        ("hundred.alpha", &["+tcp"], Some(100)),
        ("many.example.org", &["+noedns"], None),
        ("many.example.org", &["+bufsize=1232"], Some(60)),
        ("many.example.org", &["+tcp", "+noedns"], Some(60)),
    ] {
        // Without `+ignore` it would come by TCP by itself.
        let output = dig(&scene, POD, &[&[name, "A", "+ignore"], arguments].concat());
        let cut = flags(&output).contains(&"tc");
        assert_eq!(cut, count.is_none(), "{name} {arguments:?}: {output}");
        if let Some(count) = count {
            assert_eq!(
                answers(&output).len(),
                count,
                "{name} {arguments:?}: {output}"
            );
        }
        let with_edns = output.contains("EDNS: version: 0");
        assert_eq!(with_edns, !arguments.contains(&"+noedns"), "{output}");
    }
    for name in ["hundred.alpha", "many.example.org"] {
        let output = dig(&scene, POD, &[name, "A", "+noedns"]);
        assert!(answers(&output).len() >= 60, "{output}");
    }
    let output = dig(&scene, POD, &["echo.beta", "A", "+edns=1", "+noednsneg"]);
    assert!(output.contains("status: BADVERS"), "{output}");
}

/// What a pod's script prints that sends two queries in one segment over one connection: which one is answered first.
const PIPELINE: &str = r#"
import socket, struct, sys
def query(number, name):
    labels = b"".join(bytes([len(l)]) + l for l in name.encode().split(b".")) + b"\0"
    message = struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 0) + labels + struct.pack(">HH", 1, 1)
    return struct.pack(">H", len(message)) + message
s = socket.create_connection((sys.argv[1], 53), timeout=20)
s.sendall(query(1, "slow.example.org") + query(2, "echo.beta") + query(3, "slow.example.org"))
stream = s.makefile("rb")
for _ in range(3):
    length, = struct.unpack(">H", stream.read(2))
    answer = stream.read(length)
    number, flags, _, answers = struct.unpack(">HHHH", answer[:8])
    print(number, "code", flags & 15, "answers", answers)
"#;

/// A resolver that is silent costs those who asked it their answer, after the waiting time, and nobody else anything.
#[rstest]
fn a_silent_resolver(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let mut spec = spec(variant);
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("silent-resolv.conf");
    let text = format!("nameserver {OUTSIDE}\noptions timeout:2 attempts:1\n");
    std::fs::write(&file, text).unwrap();
    let path = file.display().to_string();
    spec.daemon_env.insert("AMBIDEX_RESOLV_CONF".into(), path);
    let scene = own(&spec);
    for protocol in ["udp", "tcp"] {
        let rule = ["-A", "INPUT", "-p", protocol, "--dport", "53", "-j", "DROP"];
        let argv = [&["iptables"], &rule[..]].concat();
        let done = scene.lab.run("out", &argv, DIG_LIMIT).unwrap();
        assert_eq!(done.code, 0, "{}", done.stderr);
    }
    for transport in ["+notcp", "+tcp"] {
        let once = ["+tries=1", "+time=20", transport, "A"];
        let output = dig(&scene, POD, &[&["www.example.org"], &once[..]].concat());
        assert!(output.contains("status: SERVFAIL"), "{transport}: {output}");
    }
    let argv = ["python3", "-c", PIPELINE, &OUTSIDE.to_string()];
    let done = scene.lab.run(POD, &argv, DIG_LIMIT).unwrap();
    let lines: Vec<&str> = done.stdout.lines().collect();
    let mut late = lines[1..].to_vec();
    late.sort();
    assert_eq!(
        lines[0], "2 code 0 answers 1",
        "{}{}",
        done.stdout, done.stderr
    );
    assert_eq!(late, ["1 code 2 answers 0", "3 code 2 answers 0"]);
    let failures = scene.metric(1, "istio_dns_upstream_failures_total", &[]);
    assert!(failures >= 4.0, "{failures}");
}

/// A pod that is the resolver, or behind its address, is not asked its own questions.
#[rstest]
fn a_resolver_that_is_captured_does_not_ask_itself(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let mut spec = spec(variant);
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("own-resolv.conf");
    std::fs::write(
        &file,
        "nameserver 10.96.7.7\noptions timeout:2 attempts:1\n",
    )
    .unwrap();
    let path = file.display().to_string();
    spec.daemon_env.insert("AMBIDEX_RESOLV_CONF".into(), path);
    let scene = own(&spec);
    let _changed = scene.with_state(|state| {
        state.services.push(Service {
            name: "resolver".to_owned(),
            namespace: "beta".to_owned(),
            hostname: "resolver.beta.svc.cluster.local".to_owned(),
            vips: vec!["/10.96.7.7".to_owned()],
            ports: [(53, 53)].into(),
            more: Default::default(),
        });
        let workload = state
            .workloads
            .iter_mut()
            .find(|w| w.name == OTHER)
            .unwrap();
        let service = "beta/resolver.beta.svc.cluster.local".to_owned();
        workload.services.insert(service, [(53, 53)].into());
    });
    let once = ["+tries=1", "+time=5", "A"];
    let refused = |pod: &str| {
        let output = dig(&scene, pod, &[&["www.example.org"], &once[..]].concat());
        assert!(output.contains("status: SERVFAIL"), "{output}");
    };
    let passed_on = || scene.metric(1, "istio_dns_upstream_requests_total", &[]);
    refused(OTHER);
    assert_eq!(passed_on(), 0.0);
    let mesh = dig(&scene, OTHER, &["echo.beta", "A"]);
    assert_eq!(answers(&mesh).len(), 1, "{mesh}");
    // Somebody else's question is asked of it, and fails because nothing listens there.
    refused(POD);
    assert_eq!(passed_on(), 1.0);
}

/// Without a proxy there is no answer, though the resolver is there; and the kernel objects are exactly the planned ones.
#[rstest]
fn without_a_proxy_nothing_passes(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = own(&spec(variant));
    let resolver = resolver(&scene);
    let found = |pod: &str, name: &str, arguments: &[&str]| {
        let once = ["+tries=1", "+time=1"];
        let output = dig(&scene, pod, &[&[name, "A"], &once, arguments].concat());
        !answers(&output).is_empty()
    };
    assert!(found(POD, "www.example.org", &[]));
    for subject in ["--node", "alpha/pod1-1"] {
        let argv = [harness::ambidex(), "diff", subject];
        let done = scene.lab.run("node1", &argv, DIG_LIMIT).unwrap();
        assert_eq!(done.code, 0, "{subject}: {}{}", done.stdout, done.stderr);
    }
    scene.lab.kill(1, Daemon::Proxy).unwrap();
    for arguments in [&["+notcp"][..], &["+tcp"]] {
        for name in ["many.example.org", "echo.beta"] {
            assert!(!found(POD, name, arguments), "{name} {arguments:?}");
        }
    }
    let asked = resolver.output();
    assert!(!asked.contains("many.example.org from"), "{asked}");
    assert!(
        found("plain1", "www.example.org", &[]),
        "the resolver is there"
    );
    scene.lab.start(1, Daemon::Proxy).unwrap();
    eventually("names are answered again", Duration::from_secs(20), || {
        found(POD, "echo.beta", &[])
    });
}

/// Captures a pod of node 1 again, with these flags.
fn enrol_again(scene: &Scene, name: &str, flags: &str) {
    let sandbox = Sandbox::of(&scene.lab, name);
    let pod = format!("{}/{name}", sandbox.namespace);
    ambidex(&scene.lab, &format!("unenrol {pod} --drain 0s --wait")).with_code(0);
    let (netns, uid, account) = (
        sandbox.netns.display(),
        &sandbox.uid,
        &sandbox.service_account,
    );
    let arguments =
        format!("enrol {pod} --netns {netns} --uid {uid} --service-account {account}{flags}");
    ambidex(&scene.lab, &arguments).with_code(0);
}

/// A pod says itself whether its queries are captured, by UDP and by TCP; others go on as they are.
#[rstest]
#[case::not(true, &[NodeHybrid, NodeTunnel, Inpod])]
#[case::all_the_same(false, &[Inpod])]
fn a_pod_has_its_own_word(#[case] agents: bool, #[case] variants: &[Variant]) {
    const ITSELF: &str = OTHER;
    for variant in variants {
        let mut spec = spec(*variant);
        if !agents {
            spec.agent_args.retain(|flag| flag != "--dns-capture");
        }
        let scene = own(&spec);
        let _resolver = resolver(&scene);
        let asks_the_proxy = |pod: &str, transport: &str| {
            let outside = dig(&scene, pod, &["www.example.org", "A", transport]);
            assert!(
                outside.contains("192.0.2.80"),
                "{variant:?} {pod}: {outside}"
            );
            let output = dig(
                &scene,
                pod,
                &["echo.beta.svc.cluster.local", "A", transport],
            );
            output.contains(&SERVICE_VIP.to_string())
        };
        for transport in ["+notcp", "+tcp"] {
            assert_eq!(asks_the_proxy(ITSELF, transport), agents);
        }
        enrol_again(&scene, ITSELF, &format!(" --dns-capture {}", !agents));
        for transport in ["+notcp", "+tcp"] {
            let what = format!("{variant:?} {transport}");
            assert_eq!(asks_the_proxy(ITSELF, transport), !agents, "{what}");
            assert_eq!(asks_the_proxy(POD, transport), agents, "{what}");
        }
        // Everything is as planned, and the pod leaves nothing behind.
        diff_is_empty(&scene.lab, "--node");
        let sandbox = Sandbox::of(&scene.lab, ITSELF);
        diff_is_empty(&scene.lab, &format!("{}/{ITSELF}", sandbox.namespace));
        enrol_again(&scene, ITSELF, "");
        assert_eq!(asks_the_proxy(ITSELF, "+tcp"), agents, "{variant:?}");
        if variant.is_node() {
            assert!(
                !scene
                    .dump("proxy1")
                    .contains(&format!("dns-exempt {}", scene.ip(ITSELF)))
            );
        }
    }
}

/// The element that the installer writes, as a runtime hands it to the plugin for a pod with these annotations: what it asks
/// for by its capabilities, and nothing else of what the runtime could say.
fn as_the_runtime_calls(scene: &Scene, sandbox: &Sandbox, annotations: &Value) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let (bin, conf) = (dir.path().join("bin"), dir.path().join("net.d"));
    for dir in [&bin, &conf] {
        std::fs::create_dir(dir).unwrap();
    }
    let network = r#"{"name":"net","cniVersion":"1.0.0","plugins":[{"type":"ptp"}]}"#;
    let file = conf.join("10-net.conflist");
    std::fs::write(&file, network).unwrap();
    let (bin, conf) = (bin.display(), conf.display());
    let arguments = format!("cni install --bin-dir {bin} --conf-dir {conf}");
    ambidex(&scene.lab, &arguments).with_code(0);
    let list: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let mut element = list["plugins"][1].clone();
    let capabilities = element.as_object_mut().unwrap().remove("capabilities");
    let said = json!({"portMappings": [], "io.kubernetes.cri.pod-annotations": annotations});
    let mut runtime_config = said.as_object().unwrap().clone();
    runtime_config.retain(|key, _| {
        capabilities
            .as_ref()
            .is_some_and(|asked| asked[key] == true)
    });
    element["runtimeConfig"] = runtime_config.into();
    let config = sandbox.config(&scene.lab);
    for key in ["cniVersion", "name", "prevResult"] {
        element[key] = config[key].clone();
    }
    element
}

/// A pod's annotation gets from the runtime through the installed plugin to the agent, which plans for it and looks for the
/// listener that belongs to it, whatever it captures of others.
#[rstest]
#[case::agent_captures(true)]
#[case::agent_does_not(false)]
fn an_annotation_comes_by_the_runtime(#[case] agents: bool) {
    let mut spec = spec(Inpod);
    if !agents {
        spec.agent_args.retain(|flag| flag != "--dns-capture");
    }
    // Nobody listens for queries; so who is missed is who was expected.
    let off = ("ISTIO_META_DNS_CAPTURE".to_owned(), "false".to_owned());
    spec.daemon_env.extend([off]);
    let scene = own(&spec);
    let sandbox = Sandbox::of(&scene.lab, OTHER);
    let missed = |pod: &str| {
        let said = ambidex(&scene.lab, &format!("verify {pod}"));
        let missed = said.stdout.contains("nobody listens on port 15053");
        assert_eq!(said.code, if missed { 3 } else { 0 }, "{said:?}");
        missed
    };
    for (annotation, own) in [(Some(!agents), !agents), (None, agents)] {
        sandbox.del(&scene.lab);
        let mut annotations = json!({
            "example.org/other": "x",
            "ambient.istio.io/bypass-inbound-capture": agents.to_string(),
            "istio.io/reroute-virtual-interfaces": "br0, br1",
        });
        if let Some(value) = annotation {
            annotations["ambient.istio.io/dns-capture"] = value.to_string().into();
        }
        let call = as_the_runtime_calls(&scene, &sandbox, &annotations);
        sandbox
            .call_with("ADD", call.to_string().as_bytes())
            .with_code(0);
        let pods = pods(&scene.lab);
        let pod = pods.iter().find(|pod| pod["uid"] == sandbox.uid.as_str());
        let pod = pod.unwrap();
        assert_eq!(pod["dns_capture"], json!(annotation));
        assert_eq!(pod["virtual_interfaces"], json!(["br0", "br1"]));
        // Which is not said of a pod that has none of it.
        assert_eq!(pod["bypass_inbound"] == true, agents);
        assert_eq!(missed("beta/pod1-2"), own, "{annotation:?}");
        assert_eq!(missed("alpha/pod1-1"), agents);
    }
}
