//! The set-up: what stands on a node and in its proxy's namespace once two pods are captured.

use anyhow::{Context, Result, ensure};
use host_net::dump::Dump;
use lab::standing::ScopedLab;
use lab::topology::{Node, NodeFlow};

use crate::suite::{Suite, ambidex_in};

/// Both nodes and both proxies, line by line; what is not listed here is compared with the plans by the agent itself.
pub fn dump(suite: &mut Suite, flow: NodeFlow) -> Result<()> {
    suite.lab(flow)?;
    for index in [1, 2] {
        let (on_node, in_proxy) = {
            let lab = suite.lab(flow)?;
            (
                lab.netns(&format!("node{index}"))?,
                lab.netns(&format!("proxy{index}"))?,
            )
        };
        let (on_node, in_proxy) = (suite.dump(&on_node)?, suite.dump(&in_proxy)?);
        let lab = suite.lab(flow)?;
        let topology = lab.topology();
        let node = topology.node(index).context("no such node")?;
        node_as_designed(node, flow, &on_node).with_context(|| node.name.clone())?;
        proxy_as_designed(node, flow, &in_proxy).with_context(|| node.proxy_name.clone())?;
        no_difference(lab, node)?;
    }
    Ok(())
}

fn node_as_designed(node: &Node, flow: NodeFlow, dump: &Dump) -> Result<()> {
    let (gateway, proxy, veth) = (node.pod_gateway, node.proxy_ip, &node.proxy_veth);
    let captured = || node.pods.iter().filter(|pod| pod.capture.is_some());

    exactly(
        "geneve devices",
        of(&dump.links, "istio"),
        [
            format!("link istioin geneve id 1000 remote {proxy} dstport 6081 mtu 1450 up"),
            format!("link istioout geneve id 1001 remote {proxy} dstport 6081 mtu 1450 up"),
        ],
    )?;
    exactly(
        "the proxy's veth",
        of(&dump.links, &format!("link {veth} ")),
        [format!("link {veth} veth mtu 1500 up")],
    )?;
    exactly(
        "addresses of tunnels",
        of(&dump.addresses, "dev istio"),
        [
            "address 192.168.126.1/30 dev istioin".to_owned(),
            "address 192.168.127.1/30 dev istioout".to_owned(),
        ],
    )?;
    exactly(
        "rules",
        of(&dump.rules, "rule4"),
        [
            "rule4 0: lookup 255 proto 2",
            "rule4 99: fwmark 0x80/0x80 lookup 103 proto 133",
            "rule4 100: fwmark 0x200/0x200 goto 32766 proto 133",
            "rule4 101: fwmark 0x100/0x100 lookup 101 proto 133",
            "rule4 102: fwmark 0x40/0x40 lookup 102 proto 133",
            "rule4 103: lookup 100 proto 133",
            "rule4 32766: lookup 254 proto 2",
            "rule4 32767: lookup 253 proto 2",
        ]
        .map(str::to_owned),
    )?;
    // The outer packets of the tunnels are looked up with the marks of the inner ones: every table leads to the proxy.
    let mut routes: Vec<String> = (100..=103)
        .map(|table| format!("route4 {proxy}/32 dev {veth} table {table} proto 133 scope link"))
        .collect();
    routes.extend([
        "route4 0.0.0.0/0 via 192.168.127.2 dev istioout table 101 proto 133".to_owned(),
        format!("route4 0.0.0.0/0 via {proxy} dev {veth} table 102 proto 133 onlink"),
        "route4 0.0.0.0/0 via 192.168.126.2 dev istioin table 103 proto 133".to_owned(),
    ]);
    routes.extend(captured().map(|pod| {
        let ip = pod.ip;
        format!("route4 {ip}/32 via 192.168.126.2 dev istioin table 100 proto 133 src {gateway}")
    }));
    exactly("routes", of(&dump.routes, "proto 133"), routes)?;
    exactly(
        "members",
        of(&dump.ipsets, " member "),
        captured().flat_map(|pod| {
            ["ztunnel-pods-ips", "ambidex-guarded"].map(|set| {
                let (ip, uid) = (pod.ip, &pod.uid);
                format!("ipset {set} member {ip} comment \"{uid}\"")
            })
        }),
    )?;
    for name in ["mesh-live-pods", "ztunnel-pods-ips", "ambidex-guarded"] {
        let made = of(&dump.ipsets, &format!("ipset {name} hash:ip family inet "));
        ensure!(made.len() == 1, "set {name}: {made:?}");
    }
    let filters = [
        (veth.as_str(), true),
        ("istioin", false),
        ("istioout", false),
    ];
    for (device, always) in filters {
        if always || flow == NodeFlow::Tunnel {
            contains(
                &dump.sysctls,
                &format!("sysctl net/ipv4/conf/{device}/rp_filter = 2"),
            )?;
        }
    }
    all_legacy(dump)
}

fn proxy_as_designed(node: &Node, flow: NodeFlow, dump: &Dump) -> Result<()> {
    let (gateway, proxy) = (node.pod_gateway, node.proxy_ip);
    let tunnel = flow == NodeFlow::Tunnel;
    exactly(
        "geneve devices",
        of(&dump.links, "pistio"),
        [
            format!("link pistioin geneve id 1000 remote {gateway} dstport 6081 mtu 1450 up"),
            format!("link pistioout geneve id 1001 remote {gateway} dstport 6081 mtu 1450 up"),
        ],
    )?;
    contains(&dump.links, "link eth0 veth mtu 1500 up")?;
    exactly(
        "addresses of tunnels",
        of(&dump.addresses, "dev pistio"),
        [
            "address 192.168.126.2/30 dev pistioin".to_owned(),
            "address 192.168.127.2/30 dev pistioout".to_owned(),
        ],
    )?;
    let only = |wanted: bool, line: &str| wanted.then(|| line.to_owned());
    exactly(
        "rules",
        of(&dump.rules, "proto 133"),
        [
            only(true, "rule4 20000: fwmark 0x400/0xfff lookup 100 proto 133"),
            only(
                tunnel,
                "rule4 20001: fwmark 0x401/0xfff lookup 101 proto 133",
            ),
            only(
                tunnel,
                "rule4 20002: fwmark 0x402/0xfff lookup 102 proto 133",
            ),
            only(true, "rule4 20003: fwmark 0x4d3/0xfff lookup 100 proto 133"),
            only(true, "rule4 20004: fwmark 0x404/0xfff lookup 100 proto 133"),
        ]
        .into_iter()
        .flatten(),
    )?;
    let outer = |table| format!("route4 {gateway}/32 dev eth0 table {table} proto 133 scope link");
    exactly(
        "routes",
        of(&dump.routes, "proto 133"),
        [
            only(
                true,
                "route4 local 0.0.0.0/0 dev lo table 100 proto 133 scope host",
            ),
            only(
                tunnel,
                "route4 0.0.0.0/0 via 192.168.127.1 dev pistioout table 101 proto 133",
            ),
            only(
                tunnel,
                "route4 0.0.0.0/0 via 192.168.126.1 dev pistioin table 102 proto 133",
            ),
            only(tunnel, &outer(101)),
            only(tunnel, &outer(102)),
        ]
        .into_iter()
        .flatten(),
    )?;
    let in_chain = |chain: &str, rule: String| format!("iptables-legacy mangle -A {chain} {rule}");
    let tproxy = |input: &str, port: u16, mark: &str| {
        format!("-i {input} -j TPROXY --on-port {port} --on-ip 127.0.0.1 --tproxy-mark {mark}")
    };
    let returned = |input: &str, not_to: &str, protocol: &str| {
        format!("! -d {not_to}/32 -i {input} -p {protocol} -j MARK --set-xmark 0x4d3/0xfff")
    };
    let field = [
        "-j ambidex-PREROUTING".to_owned(),
        tproxy("pistioin -p tcp -m tcp --dport 15008", 15008, "0x400/0xfff"),
        tproxy("pistioout -p tcp", 15001, "0x400/0xfff"),
        tproxy("pistioin -p tcp", 15006, "0x400/0xfff"),
        returned("eth0", &proxy.to_string(), "tcp"),
    ];
    let mut own = vec![
        tproxy("lo -p tcp -m tcp --dport 15008", 15088, "0x404/0xfff"),
        returned("eth0", &proxy.to_string(), "icmp"),
    ];
    if tunnel {
        own.push(returned("pistioin", "192.168.126.2", "icmp"));
        own.push(returned("pistioout", "192.168.127.2", "icmp"));
    }
    // Their order decides, so they are compared in it.
    for (chain, rules) in [("PREROUTING", &field[..]), ("ambidex-PREROUTING", &own)] {
        let rules: Vec<String> = rules
            .iter()
            .map(|rule| in_chain(chain, rule.clone()))
            .collect();
        let found = of(&dump.iptables, &format!("mangle -A {chain} "));
        ensure!(found == rules, "{}", both(chain, &found, &rules));
    }
    for device in ["pistioin", "pistioout"] {
        contains(
            &dump.sysctls,
            &format!("sysctl net/ipv4/conf/{device}/rp_filter = 2"),
        )?;
    }
    all_legacy(dump)
}

/// This kernel has no nf_tables for IP, so anything else would be a sign of rules that do nothing.
fn all_legacy(dump: &Dump) -> Result<()> {
    let other: Vec<&String> = dump
        .iptables
        .iter()
        .filter(|line| {
            !line.starts_with("iptables-legacy ") && !line.starts_with("ip6tables-legacy ")
        })
        .collect();
    ensure!(
        other.is_empty() && dump.nftables.is_empty() && !dump.iptables.is_empty(),
        "want iptables-legacy only: {other:?} {:?}",
        dump.nftables
    );
    Ok(())
}

/// The agent, asked over its socket, finds every object of its plans in the kernel and in order.
fn no_difference(lab: &ScopedLab, node: &Node) -> Result<()> {
    let captured = node.pods.iter().filter(|pod| pod.capture.is_some());
    let pods = captured.map(|pod| format!("{}/{}", pod.namespace, pod.name));
    for subject in pods.chain(["--node".to_owned()]) {
        let asked = ambidex_in(lab, &node.name, &["diff", &subject])?;
        ensure!(
            asked.code == 0 && asked.stdout.is_empty(),
            "diff {subject} on {}: exit code {}\n{}{}",
            node.name,
            asked.code,
            asked.stdout,
            asked.stderr
        );
    }
    Ok(())
}

fn of(lines: &[String], part: &str) -> Vec<String> {
    let lines = lines.iter().filter(|line| line.contains(part));
    lines.cloned().collect()
}

fn exactly(
    what: &str,
    mut found: Vec<String>,
    wanted: impl IntoIterator<Item = String>,
) -> Result<()> {
    let mut wanted: Vec<String> = wanted.into_iter().collect();
    found.sort();
    wanted.sort();
    ensure!(found == wanted, "{}", both(what, &found, &wanted));
    Ok(())
}

fn contains(lines: &[String], wanted: &str) -> Result<()> {
    ensure!(
        lines.iter().any(|line| line == wanted),
        "{}",
        both("dump", lines, &[wanted.to_owned()])
    );
    Ok(())
}

fn both(what: &str, found: &[String], wanted: &[String]) -> String {
    let (found, wanted) = (found.join("\n  "), wanted.join("\n  "));
    format!("{what}: found\n  {found}\nand not\n  {wanted}")
}
