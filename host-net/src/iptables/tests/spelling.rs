//! Plans spell rules as `iptables-save` prints them, so that what is wanted can be compared with what is there as text.
//! Here the captures' rules are written and read back with both variants.

use super::*;

type Chains = &'static [(Table, &'static str, &'static [&'static str])];

/// The node of a node capture.
const NODE: Chains = &[
    (Table::Filter, "FORWARD", &["-j ztunnel-FORWARD"]),
    (
        Table::Filter,
        "ztunnel-FORWARD",
        &["-m mark --mark 0x100/0x100 -j ACCEPT"],
    ),
    (Table::Mangle, "PREROUTING", &["-j ztunnel-PREROUTING"]),
    (Table::Mangle, "INPUT", &["-j ztunnel-INPUT"]),
    (Table::Mangle, "FORWARD", &["-j ztunnel-FORWARD"]),
    (Table::Mangle, "OUTPUT", &["-j ztunnel-OUTPUT"]),
    (
        Table::Mangle,
        "ztunnel-PREROUTING",
        &[
            "-i istioin -j CONNMARK --set-xmark 0x80/0x80",
            "-i istioin -j MARK --set-xmark 0x200/0x200",
            "-i istioin -j RETURN",
            "-i istioout -j MARK --set-xmark 0x200/0x200",
            "-i istioout -j RETURN",
            "-p udp -m udp --dport 6081 -j RETURN",
            "-m connmark --mark 0x220/0x220 -j MARK --set-xmark 0x200/0x200",
            "-m mark --mark 0x200/0x200 -j RETURN",
            "-m connmark --mark 0x80/0x80 -j MARK --set-xmark 0x80/0x80",
            "-m mark --mark 0x80/0x80 -j RETURN",
            "! -i vethz -m connmark --mark 0x210/0x210 -j MARK --set-xmark 0x40/0x40",
            "-m mark --mark 0x40/0x40 -j RETURN",
            "! -s 10.244.1.2/32 -i vethz -j MARK --set-xmark 0x210/0x210",
            "-m mark --mark 0x200/0x200 -j RETURN",
            "-i vethz -j MARK --set-xmark 0x220/0x220",
            "! -p tcp -j MARK --set-xmark 0x200/0x200",
            "-p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j MARK --set-xmark 0x200/0x200",
            "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m set --match-set mesh-live-pods src -j MARK --set-xmark 0x200/0x200",
            "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m set --match-set mesh-live-pods dst -j MARK --set-xmark 0x200/0x200",
            "-m mark --mark 0x200/0x200 -j RETURN",
            "-p tcp -m set --match-set ztunnel-pods-ips src -j MARK --set-xmark 0x100/0x100",
        ],
    ),
    (
        Table::Mangle,
        "ztunnel-FORWARD",
        &[
            "-m mark --mark 0x220/0x220 -j CONNMARK --save-mark --nfmask 0x220 --ctmask 0x220",
            "-m mark --mark 0x210/0x210 -j CONNMARK --save-mark --nfmask 0x210 --ctmask 0x210",
        ],
    ),
    (
        Table::Mangle,
        "ztunnel-INPUT",
        &[
            "-m mark --mark 0x220/0x220 -j CONNMARK --save-mark --nfmask 0x220 --ctmask 0x220",
            "-m mark --mark 0x210/0x210 -j CONNMARK --save-mark --nfmask 0x210 --ctmask 0x210",
        ],
    ),
    (
        Table::Mangle,
        "ztunnel-OUTPUT",
        &[
            "-p icmp -m connmark --mark 0x210/0x210 -j MARK --set-xmark 0x40/0x40",
            "-m mark --mark 0x40/0x40 -j RETURN",
            "-m set --match-set ztunnel-pods-ips dst -j MARK --set-xmark 0x200/0x200",
        ],
    ),
    (Table::Nat, "PREROUTING", &["-j ztunnel-PREROUTING"]),
    (
        Table::Nat,
        "POSTROUTING",
        &["-j ztunnel-POSTROUTING", "-j ISTIO_POSTRT"],
    ),
    (
        Table::Nat,
        "ztunnel-PREROUTING",
        &["-m mark --mark 0x100/0x100 -j ACCEPT"],
    ),
    (
        Table::Nat,
        "ztunnel-POSTROUTING",
        &["-m mark --mark 0x100/0x100 -j ACCEPT"],
    ),
    // The probe rule of the other capture, on the same host.
    (
        Table::Nat,
        "ISTIO_POSTRT",
        &[
            "-p tcp -m owner --socket-exists -m set --match-set istio-inpod-probes-v4 dst -j SNAT --to-source 169.254.7.127",
        ],
    ),
];

/// The proxy's namespace of a node capture.
const PROXY: Chains = &[(
    Table::Mangle,
    "PREROUTING",
    &[
        "-i pistioin -p tcp -m tcp --dport 15008 -j TPROXY --on-port 15008 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff",
        "-i pistioout -p tcp -j TPROXY --on-port 15001 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff",
        "-i pistioin -p tcp -j TPROXY --on-port 15006 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff",
        "! -d 10.244.1.2/32 -i eth0 -p tcp -j MARK --set-xmark 0x4d3/0xfff",
        "! -d 10.244.1.2/32 -i eth0 -p icmp -j MARK --set-xmark 0x4d3/0xfff",
    ],
)];

/// A pod of an in-pod capture.
const POD: Chains = &[
    (Table::Mangle, "PREROUTING", &["-j ISTIO_PRERT"]),
    (Table::Mangle, "OUTPUT", &["-j ISTIO_OUTPUT"]),
    (
        Table::Mangle,
        "ISTIO_PRERT",
        &["-m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff"],
    ),
    (
        Table::Mangle,
        "ISTIO_OUTPUT",
        &[
            "-m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
        ],
    ),
    (Table::Nat, "PREROUTING", &["-j ISTIO_PRERT"]),
    (Table::Nat, "OUTPUT", &["-j ISTIO_OUTPUT"]),
    (
        Table::Nat,
        "ISTIO_PRERT",
        &[
            "-s 169.254.7.127/32 -p tcp -m tcp -j ACCEPT",
            "! -d 127.0.0.1/32 -p tcp -m tcp ! --dport 15008 --tcp-flags FIN,SYN,RST,ACK SYN -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006",
        ],
    ),
    (
        Table::Nat,
        "ISTIO_OUTPUT",
        &[
            "-d 169.254.7.127/32 -p tcp -m tcp -j ACCEPT",
            "-p tcp -m mark --mark 0x111/0xfff -j ACCEPT",
            "! -d 127.0.0.1/32 -o lo -j ACCEPT",
            "! -d 127.0.0.1/32 -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001",
        ],
    ),
];

/// IPv6 of a captured pod, on the host and in the pod.
const V6: Chains = &[
    (Table::Filter, "FORWARD", &["-j ambidex-v6"]),
    (Table::Filter, "INPUT", &["-j ambidex-v6"]),
    (
        Table::Filter,
        "ambidex-v6",
        &[
            "-i veth1 -j DROP",
            "-o veth1 -j DROP",
            "-i lo -j ACCEPT",
            "-p ipv6-icmp -j ACCEPT",
            "-p tcp -j DROP",
            "-p udp -j DROP",
            "-j DROP",
        ],
    ),
];

fn is_builtin(chain: &str) -> bool {
    chain.chars().all(|c| c.is_ascii_uppercase())
}

fn script(chains: Chains) -> String {
    let mut script = RestoreScript::new();
    for (table, chain, rules) in chains {
        if !is_builtin(chain) {
            script.declare(*table, chain);
        }
        for rule in *rules {
            if is_builtin(chain) {
                script.insert(*table, chain, rule);
            } else {
                script.append(*table, chain, rule);
            }
        }
    }
    script.render().unwrap()
}

fn removal(chains: Chains) -> String {
    let mut script = RestoreScript::new();
    for (table, chain, rules) in chains {
        if is_builtin(chain) {
            rules
                .iter()
                .for_each(|rule| script.remove(*table, chain, rule));
        } else {
            script.flush(*table, chain);
            script.drop_chain(*table, chain);
        }
    }
    script.render().unwrap()
}

fn tables_of(chains: Chains) -> Vec<Table> {
    let mut tables: Vec<Table> = chains.iter().map(|(table, ..)| *table).collect();
    tables.dedup();
    tables
}

fn written_is_read_back(family: Family, chains: Chains) {
    for variant in variants() {
        let netns = Netns::create_unnamed().unwrap();
        shell(
            &netns,
            "ipset create ztunnel-pods-ips hash:ip comment; ipset create mesh-live-pods hash:ip; \
             ipset create istio-inpod-probes-v4 hash:ip comment",
        );
        let iptables = Iptables::both(variant);
        iptables.restore(&netns, family, &script(chains)).unwrap();
        for (table, chain, rules) in chains {
            let saved = iptables.save(&netns, family, *table).unwrap();
            assert_eq!(saved.rules(chain), *rules, "{variant} {chain}");
            assert_eq!(
                saved.is_builtin(chain),
                is_builtin(chain),
                "{variant} {chain}"
            );
        }
        for table in tables_of(chains) {
            let wanted = chains.iter().filter(|(of, ..)| *of == table);
            let saved = iptables.save(&netns, family, table).unwrap();
            let found: usize = saved.chains.iter().map(|(_, rules)| rules.len()).sum();
            assert_eq!(found, wanted.map(|(.., rules)| rules.len()).sum::<usize>());
        }
        iptables.restore(&netns, family, &removal(chains)).unwrap();
        let in_use = tables_in_use(&netns, family).unwrap();
        assert!(
            !in_use.is_empty() && in_use.iter().all(|table| table.trivial),
            "{in_use:?}"
        );
        if variant == Variant::Nft {
            delete_nft_tables(&netns, family, &tables_of(chains)).unwrap();
            assert_eq!(tables_in_use(&netns, family).unwrap(), []);
        }
    }
}

#[test]
fn rules_of_the_node() {
    written_is_read_back(Family::V4, NODE);
}

#[test]
fn rules_of_the_proxy() {
    written_is_read_back(Family::V4, PROXY);
}

#[test]
fn rules_of_a_pod() {
    written_is_read_back(Family::V4, POD);
}

#[test]
fn rules_of_ipv6() {
    written_is_read_back(Family::V6, V6);
}
