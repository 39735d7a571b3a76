//! What kube-proxy (iptables mode) and the CNI plugin write into a node's tables, as input for `iptables-restore`.
//!
//! A mesh has to live with these rules, so the lab has them in the shape that clusters have: service DNAT with random
//! endpoints, hairpin marks, masquerade by mark, `ctstate INVALID` dropped, pods masqueraded on their way out.

use std::fmt::Write;
use std::net::Ipv4Addr;

use super::{
    APPLICATION_PORT, CLUSTER_CIDR, Node, SERVICE_CIDR, SERVICE_ENDPOINTS, SERVICE_PORT,
    SERVICE_VIP, Topology, digest,
};

/// `namespace/name:port-name`, which kube-proxy puts into its comments.
const PORT_NAME: &str = "beta/echo:http";

impl Topology {
    /// The rules of one node.
    pub fn kube_rules(&self, node: &Node) -> String {
        let endpoints: Vec<Ipv4Addr> = SERVICE_ENDPOINTS
            .iter()
            .filter_map(|name| self.pod(name))
            .map(|(_, pod)| pod.ip)
            .collect();
        format!(
            "*nat\n{}{}COMMIT\n{}",
            service_rules(&endpoints),
            self.masquerade_rules(node),
            FILTER_RULES
        )
    }

    /// The chain carries the lab's name, as the chains of CNI plugins carry that of their network.
    fn masquerade_rules(&self, node: &Node) -> String {
        let chain = format!("CNI-adx-{}", self.lab);
        let pods = &node.pod_cidr;
        format!(
            ":{chain} - [0:0]\n\
             -A POSTROUTING -s {pods} -j {chain}\n\
             -A {chain} -d {CLUSTER_CIDR} -j RETURN\n\
             -A {chain} -d {SERVICE_CIDR} -j RETURN\n\
             -A {chain} -j MASQUERADE\n"
        )
    }
}

const FILTER_RULES: &str = "*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

fn service_rules(endpoints: &[Ipv4Addr]) -> String {
    let service_chain = chain("KUBE-SVC", PORT_NAME);
    let endpoint_chains: Vec<String> = endpoints
        .iter()
        .map(|ip| chain("KUBE-SEP", &format!("{PORT_NAME}/{ip}")))
        .collect();
    let mut text = String::from(
        ":KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n",
    );
    for name in std::iter::once(&service_chain).chain(&endpoint_chains) {
        let _ = writeln!(text, ":{name} - [0:0]");
    }
    text.push_str(concat!(
        "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n",
        "-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n",
        "-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n",
        "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n",
        "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n",
        "-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n",
        "-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully\n",
    ));
    let portal = format!(
        "-d {SERVICE_VIP}/32 -p tcp -m comment --comment \"{PORT_NAME} cluster IP\" -m tcp --dport {SERVICE_PORT}"
    );
    let _ = writeln!(text, "-A KUBE-SERVICES {portal} -j {service_chain}");
    text.push_str(
        "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n",
    );
    let _ = writeln!(
        text,
        "-A {service_chain} ! -s {CLUSTER_CIDR} {portal} -j KUBE-MARK-MASQ"
    );
    for (position, (ip, endpoint_chain)) in endpoints.iter().zip(&endpoint_chains).enumerate() {
        let remaining = endpoints.len() - position;
        let chance = if remaining > 1 {
            format!(
                " -m statistic --mode random --probability {:.11}",
                1.0 / remaining as f64
            )
        } else {
            String::new()
        };
        let comment = format!("-m comment --comment \"{PORT_NAME} -> {ip}:{APPLICATION_PORT}\"");
        let _ = writeln!(
            text,
            "-A {service_chain} {comment}{chance} -j {endpoint_chain}"
        );
    }
    for (ip, endpoint_chain) in endpoints.iter().zip(&endpoint_chains) {
        let comment = format!("-m comment --comment \"{PORT_NAME}\"");
        let _ = writeln!(
            text,
            "-A {endpoint_chain} -s {ip}/32 {comment} -j KUBE-MARK-MASQ"
        );
        let _ = writeln!(
            text,
            "-A {endpoint_chain} -p tcp {comment} -m tcp -j DNAT --to-destination {ip}:{APPLICATION_PORT}"
        );
    }
    text
}

/// `KUBE-SVC-` and 16 characters of base 32, as kube-proxy names its chains (the hash is not the same one).
fn chain(prefix: &str, of: &str) -> String {
    const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let mut bits = digest(of);
    let mut name = format!("{prefix}-");
    for _ in 0..16 {
        name.push(char::from(ALPHABET[(bits & 31) as usize]));
        bits >>= 5;
    }
    name
}
