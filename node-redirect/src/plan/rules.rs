//! The iptables rules of the node capture, spelled as `iptables-save` prints them.

use std::net::SocketAddr;

use super::*;

const PREROUTING: &str = "ztunnel-PREROUTING";
const INPUT: &str = "ztunnel-INPUT";
const FORWARD: &str = "ztunnel-FORWARD";
const OUTPUT: &str = "ztunnel-OUTPUT";
const POSTROUTING: &str = "ztunnel-POSTROUTING";

// What is not the field's stands in chains of its own, which the field's begin with a jump to: so the order of the two is
// that of one chain, and what is left of each of the field's chains is its listing.
const OWN_PREROUTING: &str = "ambidex-PREROUTING";
const OWN_FORWARD: &str = "ambidex-FORWARD";
const OWN_OUTPUT: &str = "ambidex-OUTPUT";

fn marked(mark: MarkMatch) -> String {
    format!("-m mark --mark {mark}")
}

fn connection_marked(mark: MarkMatch) -> String {
    format!("-m connmark --mark {mark}")
}

fn set_mark(mark: MarkMatch) -> String {
    format!("-j MARK --set-xmark {mark}")
}

fn set_connection_mark(mark: MarkMatch) -> String {
    format!("-j CONNMARK --set-xmark {mark}")
}

/// Types of ICMPv6 by which neighbours and routers are found (RFC 4861): the link's own business.
const NEIGHBOUR_DISCOVERY: std::ops::RangeInclusive<u8> = 133..=137;
/// Types of ICMPv6 that tell of a packet that did not arrive (RFC 4443).
const ERRORS: std::ops::RangeInclusive<u8> = 1..=4;

/// What the same rule is called in a family.
struct Words {
    family: Family,
    /// The proxy's address with its prefix length.
    proxy: String,
    /// The proxy's DNS port.
    dns: String,
    pods: String,
    live: String,
    guarded: String,
    dns_exempt: String,
}

impl Words {
    fn new(family: Family, proxy_ip: IpAddr) -> Self {
        let set = |name| set_of(name, family);
        Self {
            family,
            proxy: IpNet::from(proxy_ip).to_string(),
            dns: SocketAddr::new(proxy_ip, DNS_PORT).to_string(),
            pods: set(PODS_SET),
            live: set(LIVE_PODS_SET),
            guarded: set(GUARD_SET),
            dns_exempt: set(DNS_EXEMPT_SET),
        }
    }

    fn icmp(&self) -> &'static str {
        match self.family {
            Family::V4 => "icmp",
            Family::V6 => "ipv6-icmp",
        }
    }

    /// Before rules that would mark what IPv6 finds its neighbours by, which would be routed anew for it.
    fn neighbours_pass(&self) -> Vec<String> {
        match self.family {
            Family::V4 => Vec::new(),
            Family::V6 => of_types(NEIGHBOUR_DISCOVERY, "-j RETURN"),
        }
    }

    /// The tunnels' outer packets are IPv4 only, and their mark would become the inner one's.
    fn outer_passes(&self, port: u16) -> Option<String> {
        let is_outer = self.family == Family::V4;
        is_outer.then(|| format!("-p udp -m udp --dport {port} -j RETURN"))
    }

    fn tproxy(&self, port: u16, mark: MarkMatch) -> String {
        let loopback = match self.family {
            Family::V4 => IpAddr::from(Ipv4Addr::LOCALHOST),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        };
        format!("-j TPROXY --on-port {port} --on-ip {loopback} --tproxy-mark {mark}")
    }

    /// Leads what ICMP says of a connection to the socket that speaks with somebody else's address.
    fn errors_return(&self, selected: &str) -> Vec<String> {
        let to_returning = set_mark(MARK_RETURN);
        match self.family {
            Family::V4 => vec![format!("{selected} -p icmp {to_returning}")],
            Family::V6 => of_types(ERRORS, &to_returning)
                .into_iter()
                .map(|rule| format!("{selected} {rule}"))
                .collect(),
        }
    }
}

fn of_types(types: std::ops::RangeInclusive<u8>, then: &str) -> Vec<String> {
    types
        .map(|number| format!("-p ipv6-icmp -m icmp6 --icmpv6-type {number} {then}"))
        .collect()
}

fn chain(family: Family, table: Table, name: &str, from: &str, rules: Vec<String>) -> Step {
    let jump = Jump {
        from: from.to_owned(),
        position: Position::First,
    };
    Step::Chain(Chain {
        family,
        table,
        name: name.to_owned(),
        rules,
        jump: Some(jump),
    })
}

/// A chain that only another one leads to.
fn inner_chain(family: Family, table: Table, name: &str, rules: Vec<String>) -> Step {
    Step::Chain(Chain {
        family,
        table,
        name: name.to_owned(),
        rules,
        jump: None,
    })
}

/// The chains on the node.
pub(super) fn host(facts: &HostFacts, family: Family, proxy_ip: IpAddr, flow: Flow) -> Vec<Step> {
    let words = &Words::new(family, proxy_ip);
    let chain = |table, name, from, rules| chain(family, table, name, from, rules);
    let inner_chain = |table, name, rules| inner_chain(family, table, name, rules);
    let when_dns = |rule: String| facts.dns.then_some(rule).into_iter().collect::<Vec<_>>();
    let accept = || vec![format!("{} -j ACCEPT", marked(MARK_OUTBOUND))];
    let to = |own: &str| vec![format!("-j {own}")];
    vec![
        inner_chain(
            Table::Mangle,
            OWN_PREROUTING,
            own_prerouting(facts, words, flow),
        ),
        chain(
            Table::Mangle,
            PREROUTING,
            "PREROUTING",
            [to(OWN_PREROUTING), field_prerouting(facts, words)].concat(),
        ),
        chain(Table::Mangle, INPUT, "INPUT", save_connection_marks()),
        chain(Table::Mangle, FORWARD, "FORWARD", save_connection_marks()),
        inner_chain(Table::Mangle, OWN_OUTPUT, own_output(words, flow)),
        chain(Table::Mangle, OUTPUT, "OUTPUT", to(OWN_OUTPUT)),
        // Empty with the field, too, and in every listing of it.
        chain(Table::Mangle, POSTROUTING, "POSTROUTING", Vec::new()),
        // No rewriting of a service's address before the proxy has seen it, no masquerading towards the proxy, and no
        // rejecting of a service without local endpoints.
        chain(
            Table::Nat,
            PREROUTING,
            "PREROUTING",
            [accept(), when_dns(dns_to_proxy(words))].concat(),
        ),
        chain(
            Table::Nat,
            POSTROUTING,
            "POSTROUTING",
            [accept(), when_dns(dns_keeps_its_source(words))].concat(),
        ),
        inner_chain(
            Table::Filter,
            OWN_FORWARD,
            guard::forward(facts, &words.guarded, &words.proxy, flow),
        ),
        chain(
            Table::Filter,
            FORWARD,
            "FORWARD",
            [to(OWN_FORWARD), accept()].concat(),
        ),
    ]
}

/// Queries by UDP are led to the proxy's own address: a datagram says whom it came from, but not whom it was meant for, and
/// the proxy need not know that. Answers are translated back by conntrack. Queries by TCP are captured as any connection.
fn dns_to_proxy(words: &Words) -> String {
    let Words {
        pods,
        dns_exempt,
        dns,
        ..
    } = words;
    format!(
        "-p udp -m udp --dport 53 -m set --match-set {pods} src -m set ! --match-set {dns_exempt} src -j DNAT --to-destination {dns}"
    )
}

/// The proxy tells pods apart by their address.
fn dns_keeps_its_source(words: &Words) -> String {
    let Words { proxy, pods, .. } = words;
    format!("-d {proxy} -p udp -m udp --dport {DNS_PORT} -m set --match-set {pods} src -j ACCEPT")
}

/// The field's rules, as of 1.20.
fn field_prerouting(facts: &HostFacts, words: &Words) -> Vec<String> {
    let (proxy, veth) = (&words.proxy, &facts.proxy_veth);
    let (tunnel_in, tunnel_out) = (TUNNEL_IN.host, TUNNEL_OUT.host);
    let skip = set_mark(MARK_SKIP);
    let skipped = format!("{} -j RETURN", marked(MARK_SKIP));
    let mut rules = vec![
        // Out of a tunnel: from the proxy, final.
        format!("-i {tunnel_in} {skip}"),
        format!("-i {tunnel_in} -j RETURN"),
        format!("-i {tunnel_out} {skip}"),
        format!("-i {tunnel_out} -j RETURN"),
    ];
    rules.extend(words.outer_passes(facts.port));
    rules.extend([
        format!("{} {skip}", connection_marked(MARK_CONN_SKIP)),
        skipped.clone(),
        // Answers to what the proxy sent with somebody else's address.
        format!(
            "! -i {veth} {} {}",
            connection_marked(MARK_PROXY),
            set_mark(MARK_PROXY_RETURN)
        ),
        format!("{} -j RETURN", marked(MARK_PROXY_RETURN)),
        // From the proxy: with somebody else's address, or its own.
        format!("! -s {proxy} -i {veth} {}", set_mark(MARK_PROXY)),
        skipped.clone(),
        format!("-i {veth} {}", set_mark(MARK_CONN_SKIP)),
        format!("-p udp {}", set_mark(MARK_CONN_SKIP)),
        skipped,
        format!(
            "-p tcp -m set --match-set {} src {}",
            words.pods,
            set_mark(MARK_OUTBOUND)
        ),
    ]);
    rules
}

/// What the field's rules lack, before them: a packet that gets no mark here is theirs, one that is to skip the capture
/// meets their first rule about that, and the marks for connections that stay in a tunnel come first in policy routing.
fn own_prerouting(facts: &HostFacts, words: &Words, flow: Flow) -> Vec<String> {
    let veth = &facts.proxy_veth;
    let (tunnel_in, tunnel_out) = (TUNNEL_IN.host, TUNNEL_OUT.host);
    let skip = set_mark(MARK_SKIP);
    // Masqueraded connections die when their output device changes, so what comes this way stays this way.
    let mut rules = vec![
        format!("-i {tunnel_in} {}", set_connection_mark(MARK_STAYS_IN)),
        format!("-i {tunnel_in} -j RETURN"),
    ];
    if flow == Flow::Tunnel {
        rules.push(format!(
            "-i {tunnel_out} {}",
            set_connection_mark(MARK_STAYS_OUT)
        ));
    }
    rules.push(format!("-i {tunnel_out} -j RETURN"));
    rules.extend(words.outer_passes(facts.port));
    rules.extend([
        format!("{} -j RETURN", connection_marked(MARK_CONN_SKIP)),
        format!(
            "{} {}",
            connection_marked(MARK_STAYS_IN),
            set_mark(MARK_STAYS_IN)
        ),
        format!("{} -j RETURN", marked(MARK_STAYS_IN)),
    ]);
    if flow == Flow::Tunnel {
        rules.extend([
            format!(
                "{} {}",
                connection_marked(MARK_STAYS_OUT),
                set_mark(MARK_OUTBOUND)
            ),
            format!("{} -j RETURN", marked(MARK_OUTBOUND)),
        ]);
    }
    rules.extend([
        format!("-i {veth} -j RETURN"),
        format!("{} -j RETURN", connection_marked(MARK_PROXY)),
        format!("! -p tcp {skip}"),
    ]);
    // Connections older than their pod's capture: conntrack knows them and they carry none of the marks above, or (if
    // conntrack was off when they began) they go on without a SYN.
    let not_syn = format!("-p tcp -m tcp ! {SYN} -m set --match-set");
    rules.extend([
        format!("-p tcp -m conntrack --ctstate RELATED,ESTABLISHED {skip}"),
        format!("{not_syn} {} src {skip}", words.live),
        format!("{not_syn} {} dst {skip}", words.live),
    ]);
    rules
}

/// After routing, because address translation may change the connection before it.
fn save_connection_marks() -> Vec<String> {
    [MARK_CONN_SKIP, MARK_PROXY]
        .map(|mark| {
            format!(
                "{} -j CONNMARK --save-mark --nfmask {:#x} --ctmask {:#x}",
                marked(mark),
                mark.mask,
                mark.mask
            )
        })
        .to_vec()
}

fn own_output(words: &Words, flow: Flow) -> Vec<String> {
    // "Fragmentation needed" for a connection of the proxy is addressed to whose address it speaks with. Lead it to the
    // proxy the way the connection's packets go, or large packets vanish without a trace.
    let mut ways = vec![(MARK_PROXY, MARK_PROXY_RETURN)];
    if flow == Flow::Tunnel {
        ways.push((MARK_STAYS_IN, MARK_STAYS_IN));
        ways.push((MARK_STAYS_OUT, MARK_OUTBOUND));
    }
    let mut rules = words.neighbours_pass();
    for (connection, mark) in ways {
        rules.push(format!(
            "-p {} {} {}",
            words.icmp(),
            connection_marked(connection),
            set_mark(mark)
        ));
        rules.push(format!("{} -j RETURN", marked(mark)));
    }
    // Everything else from the node to a captured pod is direct: probes first of all.
    rules.push(format!(
        "-m set --match-set {} dst {}",
        words.pods,
        set_mark(MARK_SKIP)
    ));
    rules
}

/// The rules in the proxy's namespace: the field's in PREROUTING itself.
pub(super) fn proxy(facts: &ProxyFacts, family: Family, proxy_ip: IpAddr, flow: Flow) -> Vec<Step> {
    let words = &Words::new(family, proxy_ip);
    let (device, proxy) = (&facts.device, &words.proxy);
    let (tunnel_in, tunnel_out) = (TUNNEL_IN.proxy, TUNNEL_OUT.proxy);
    let rules = [
        // Before the rule for all of this tunnel: HBONE has a listener of its own.
        format!(
            "-i {tunnel_in} -p tcp -m tcp --dport {HBONE_PORT} {}",
            words.tproxy(HBONE_PORT, MARK_TPROXY)
        ),
        format!(
            "-i {tunnel_out} -p tcp {}",
            words.tproxy(OUTBOUND_PORT, MARK_TPROXY)
        ),
        format!(
            "-i {tunnel_in} -p tcp {}",
            words.tproxy(INBOUND_PLAINTEXT_PORT, MARK_TPROXY)
        ),
        // For sockets that speak with somebody else's address.
        format!("! -d {proxy} -i {device} -p tcp {}", set_mark(MARK_RETURN)),
    ];
    let rules = rules.into_iter().map(|rule| {
        Step::ChainRule(ChainRule {
            family,
            table: Table::Mangle,
            chain: "PREROUTING".to_owned(),
            rule,
            position: Position::Last,
        })
    });
    let own = chain(
        family,
        Table::Mangle,
        OWN_PREROUTING,
        "PREROUTING",
        own_in_proxy(facts, words, flow),
    );
    std::iter::once(own).chain(rules).collect()
}

fn own_in_proxy(facts: &ProxyFacts, words: &Words, flow: Flow) -> Vec<String> {
    let (device, proxy) = (&facts.device, &words.proxy);
    let mut rules = Vec::new();
    if facts.dns {
        // Before the rule for all of this tunnel.
        rules.push(format!(
            "-i {} -p tcp -m tcp --dport 53 -m set ! --match-set {} src {}",
            TUNNEL_OUT.proxy,
            words.dns_exempt,
            words.tproxy(DNS_PORT, MARK_TPROXY)
        ));
    }
    // From one pod of this node to another: never left this namespace. The mark keeps it here.
    rules.push(format!(
        "-i lo -p tcp -m tcp --dport {HBONE_PORT} {}",
        words.tproxy(SAME_NODE_HBONE_PORT, MARK_SAME_NODE)
    ));
    // What is said about the connections of sockets that speak with somebody else's address.
    rules.extend(words.errors_return(&format!("! -d {proxy} -i {device}")));
    if flow == Flow::Tunnel {
        for tunnel in [TUNNEL_IN, TUNNEL_OUT] {
            let own = match words.family {
                Family::V4 => IpNet::from(IpAddr::from(tunnel.proxy_addr)),
                Family::V6 => IpNet::from(IpAddr::from(tunnel.proxy_addr6)),
            };
            rules.extend(words.errors_return(&format!("! -d {own} -i {}", tunnel.proxy)));
        }
    }
    rules
}
