#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;

use serde_json::json;

use super::*;

fn topology(mode: Mode, pods: u8) -> Topology {
    let mut spec = LabSpec::new("t1", mode, Programs::beside("/bin/ambidex".as_ref()));
    spec.pods_per_node = pods;
    spec.validate().unwrap();
    Topology::new(&spec, &BTreeMap::new())
}

#[test]
fn names_and_addresses_are_unique_and_fit_the_kernel() {
    let topology = topology(Mode::Mixed, MOST_PODS);
    let mut netns = BTreeSet::new();
    let mut ips = BTreeSet::new();
    let mut uids = BTreeSet::new();
    for node in &topology.nodes {
        let mut veths = BTreeSet::new();
        for attachment in node.attachments() {
            assert!(attachment.veth.len() <= 15, "{}", attachment.veth);
            assert!(veths.insert(attachment.veth), "{}", attachment.veth);
            assert!(netns.insert(attachment.netns.to_owned()));
            assert!(ips.insert(attachment.ip));
        }
        assert!(netns.insert(node.netns.clone()));
    }
    for (_, pod) in topology.pods() {
        assert!(uids.insert(pod.uid.clone()));
        assert_eq!(pod.container_id.len(), 64);
    }
    netns.insert(topology.outside_netns.clone());
    assert_eq!(netns, topology.netns_names().into_iter().collect());
}

#[test]
fn uid_has_the_form_that_cgroup_paths_are_searched_for_and_changes_with_the_generation() {
    let spec = LabSpec::new("t1", Mode::Node, Programs::beside("/bin/ambidex".as_ref()));
    let first = Topology::new(&spec, &BTreeMap::new());
    let again = Topology::new(&spec, &BTreeMap::from([("pod1-1".to_owned(), 1)]));
    let uid = |topology: &Topology, pod: &str| topology.pod(pod).unwrap().1.uid.clone();
    assert_ne!(uid(&first, "pod1-1"), uid(&again, "pod1-1"));
    assert_eq!(uid(&first, "pod1-2"), uid(&again, "pod1-2"));
    let groups: Vec<usize> = uid(&first, "pod1-1").split('-').map(str::len).collect();
    assert_eq!(groups, [8, 4, 4, 4, 12]);
    let text = uid(&first, "pod1-1");
    assert_eq!(&text[14..15], "8", "version: {text}");
    assert!("89ab".contains(&text[19..20]), "variant: {text}");
}

#[test]
fn first_pods_have_four_identities_and_third_ones_share_with_the_first() {
    let topology = topology(Mode::Node, 4);
    let identity = |pod: &str| {
        let (_, pod) = topology.pod(pod).unwrap();
        format!("{}/{}", pod.namespace, pod.service_account)
    };
    assert_eq!(identity("pod1-1"), "alpha/client");
    assert_eq!(identity("pod1-2"), "beta/server");
    assert_eq!(identity("pod2-1"), "alpha/server");
    assert_eq!(identity("pod2-2"), "beta/client");
    assert_eq!(identity("pod1-3"), identity("pod1-1"));
    assert_eq!(identity("pod2-4"), identity("pod2-2"));
}

#[test]
fn mixed_captures_odd_pods_by_the_node_and_never_the_plain_ones() {
    let topology = topology(Mode::Mixed, 2);
    let capture = |pod: &str| topology.pod(pod).unwrap().1.capture;
    assert_eq!(capture("alpha/pod1-1"), Some(Capture::Node));
    assert_eq!(capture("beta/pod1-2"), Some(Capture::Inpod));
    assert_eq!(capture("plain1"), None);
    assert!(topology.pod("beta/pod1-1").is_none());
}

#[test]
fn targets_are_the_words_of_lab_exec() {
    let topology = topology(Mode::Node, 2);
    assert_eq!(
        topology.target("proxy2"),
        Some((Kind::Proxy, "adx-t1-proxy2".into(), Some(2)))
    );
    assert_eq!(
        topology.target("plain1"),
        Some((Kind::Pod, "adx-t1-plain1".into(), Some(1)))
    );
    assert_eq!(
        topology.target("out"),
        Some((Kind::Outside, "adx-t1-out".into(), None))
    );
    assert_eq!(topology.target("node3"), None);
}

#[test]
fn local_xds_has_the_keys_of_the_field() {
    let mut topology = topology(Mode::Mixed, 2);
    for node in &mut topology.nodes {
        node.pods
            .retain(|pod| pod.name == "pod1-2" || pod.name == "plain2");
    }
    let text = topology.local_xds().to_yaml().unwrap();
    let found: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
    let workload = |name: &str,
                    namespace: &str,
                    account: &str,
                    ip: &str,
                    protocol: &str,
                    node: &str| {
        json!({
            "uid": format!("Kubernetes//Pod/{namespace}/{name}"), "name": name, "namespace": namespace,
            "serviceAccount": account, "workloadIps": [ip], "protocol": protocol, "node": node,
            "clusterId": "Kubernetes", "authorizationPolicies": [], "services": {},
        })
    };
    let mut endpoint = workload("pod1-2", "beta", "server", "10.244.1.11", "HBONE", "node1");
    endpoint["services"] = json!({"beta/echo.beta.svc.cluster.local": {"80": 8080}});
    let expected = json!({
        "workloads": [endpoint, workload("plain2", "alpha", "default", "10.244.2.200", "TCP", "node2")],
        "services": [{
            "name": "echo", "namespace": "beta", "hostname": "echo.beta.svc.cluster.local",
            "vips": ["/10.96.0.10"], "ports": {"80": 8080},
        }],
        "policies": [],
    });
    assert_eq!(found, expected, "{text}");
}

#[test]
fn kube_rules_reach_both_endpoints_with_equal_chance() {
    let topology = topology(Mode::None, 2);
    let rules = topology.kube_rules(&topology.nodes[0]);
    assert!(
        rules.contains("--probability 0.50000000000 -j KUBE-SEP-"),
        "{rules}"
    );
    assert!(
        rules.contains("-j DNAT --to-destination 10.244.1.11:8080"),
        "{rules}"
    );
    assert!(
        rules.contains("-j DNAT --to-destination 10.244.2.10:8080"),
        "{rules}"
    );
    assert_eq!(rules.matches("COMMIT").count(), 2);
    for line in rules.lines().filter(|line| line.starts_with("-A")) {
        let target = line
            .rsplit("-j ")
            .next()
            .unwrap()
            .split(' ')
            .next()
            .unwrap();
        let builtin = ["RETURN", "ACCEPT", "DROP", "MARK", "MASQUERADE", "DNAT"].contains(&target);
        assert!(
            builtin || rules.contains(&format!(":{target} - [0:0]")),
            "no chain {target}: {line}"
        );
    }
}

#[test]
fn words_parse_as_they_are_written() {
    for mode in [Mode::None, Mode::Node, Mode::Inpod, Mode::Mixed] {
        assert_eq!(mode.to_string().parse(), Ok(mode));
    }
    let error = "nod".parse::<Mode>().unwrap_err().to_string();
    assert_eq!(error, "mode \"nod\": want one of none, node, inpod, mixed");
}

#[test]
fn names_that_do_not_fit_are_refused() {
    for name in ["", "toolong", "Lab", "a-b", "a/b", ".."] {
        assert!(spec::validate_name(name).is_err(), "{name}");
    }
    let (first, second) = (LabSpec::unique_name(), LabSpec::unique_name());
    assert_ne!(first, second);
    spec::validate_name(&first).unwrap();
    spec::validate_name(&second).unwrap();
}
