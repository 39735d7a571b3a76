#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;

use super::*;

/// Runs a shell line inside a namespace; it must succeed.
fn shell(ns: &Netns, line: &str) {
    let output = ns
        .run(|| Command::new("sh").args(["-ec", line]).output())
        .unwrap()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {stderr}");
}

async fn difference(ns: &Netns, before: &Dump) -> Vec<String> {
    before.diff(&dump(ns).await.unwrap())
}

#[tokio::test]
async fn every_kind_of_object_shows_up_and_its_removal_too() {
    let ns = Netns::create_unnamed().unwrap();
    shell(
        &ns,
        "ip link set lo up; ip link add br0 type bridge; ip link set br0 up; ip link add v0 type veth peer name v1; \
         ip link set v0 up; ip link set v1 up; iptables-nft -t nat -N OWN; iptables-nft -t nat -A OWN -j RETURN; \
         echo 0 > /proc/sys/net/ipv4/conf/v0/rp_filter",
    );
    let before = dump(&ns).await.unwrap();
    // What to do, what must be seen, how to undo it.
    let cases = [
        (
            "ip link add x0 type vxlan id 9 remote 10.9.9.9 dstport 6081; ip link set x0 mtu 1400",
            "+link x0 vxlan id 9 remote 10.9.9.9 dstport 6081 mtu 1400 down",
            "ip link del x0",
        ),
        (
            "ip link set v0 master br0",
            "+link v0 veth mtu 1500 up master br0",
            "ip link set v0 nomaster",
        ),
        (
            "ip address add 10.1.0.1/24 dev v0",
            "+address 10.1.0.1/24 dev v0",
            "ip address del 10.1.0.1/24 dev v0",
        ),
        (
            "ip rule add pref 7 from 10.2.0.0/16 fwmark 0x1/0x3 lookup 77",
            "+rule4 7: from 10.2.0.0/16 fwmark 0x1/0x3 lookup 77 proto 0",
            "ip rule del pref 7",
        ),
        (
            "ip -6 rule add pref 8 lookup 78",
            "+rule6 8: lookup 78 proto 0",
            "ip -6 rule del pref 8",
        ),
        (
            "ip route add 10.3.0.0/16 dev v0 table 1000 metric 5",
            "+route4 10.3.0.0/16 dev v0 table 1000 proto 3 scope link metric 5",
            "ip route del 10.3.0.0/16 dev v0 table 1000",
        ),
        (
            "ip -6 route add fd01::/64 dev v0 table 77",
            "+route6 fd01::/64 dev v0 table 77 proto 3 metric 1024",
            "ip -6 route del fd01::/64 dev v0 table 77",
        ),
        (
            "ipset create s0 hash:ip comment; ipset add s0 10.4.0.1 comment 'of a timeout 5'",
            "+ipset s0 member 10.4.0.1 comment \"of a timeout 5\"",
            "ipset destroy s0",
        ),
        (
            "iptables-nft -t nat -A OWN -p tcp -j ACCEPT",
            "+iptables-nft nat -A OWN -p tcp -j ACCEPT",
            "iptables-nft -t nat -D OWN 2",
        ),
        (
            "iptables-nft -t raw -N EMPTY; iptables-nft -t raw -X EMPTY",
            "+nft ip raw",
            "nft delete table ip raw",
        ),
        (
            "ip6tables-nft -t mangle -A PREROUTING -p tcp -j ACCEPT",
            "+nft ip6 mangle chain PREROUTING type filter hook prerouting priority mangle; policy accept;",
            "nft delete table ip6 mangle",
        ),
        (
            "nft add table inet own; nft add chain inet own c; nft add rule inet own c counter accept",
            "+nft inet own | counter accept",
            "nft delete table inet own",
        ),
        (
            "iptables-legacy -t filter -A FORWARD -p udp -j DROP",
            "+iptables-legacy filter -A FORWARD -p udp -j DROP",
            "iptables-legacy -t filter -F",
        ),
        (
            "ip6tables-legacy -t filter -P FORWARD DROP",
            "+ip6tables-legacy filter :FORWARD DROP",
            "ip6tables-legacy -t filter -P FORWARD ACCEPT",
        ),
        (
            "echo 2 > /proc/sys/net/ipv4/conf/v0/rp_filter",
            "+sysctl net/ipv4/conf/v0/rp_filter = 2",
            "echo 0 > /proc/sys/net/ipv4/conf/v0/rp_filter",
        ),
        (
            "echo 1 > /proc/sys/net/ipv4/tcp_fwmark_accept",
            "+sysctl net/ipv4/tcp_fwmark_accept = 1",
            "echo 0 > /proc/sys/net/ipv4/tcp_fwmark_accept",
        ),
        (
            "echo 0 > /proc/sys/net/netfilter/nf_conntrack_tcp_loose",
            "+sysctl net/netfilter/nf_conntrack_tcp_loose = 0",
            "echo 1 > /proc/sys/net/netfilter/nf_conntrack_tcp_loose",
        ),
    ];
    for (make, seen, undo) in cases {
        shell(&ns, make);
        let changed = difference(&ns, &before).await;
        assert!(changed.contains(&seen.to_owned()), "{make}: {changed:#?}");
        shell(&ns, undo);
        assert_eq!(
            difference(&ns, &before).await,
            Vec::<String>::new(),
            "{undo}"
        );
    }
}

#[tokio::test]
async fn reading_makes_no_tables() {
    let ns = Netns::create_unnamed().unwrap();
    let first = dump(&ns).await.unwrap();
    assert_eq!(first.nftables, Vec::<String>::new());
    assert_eq!(first.iptables, Vec::<String>::new());
    let names = ns
        .run(|| std::fs::read_to_string("/proc/thread-self/net/ip_tables_names"))
        .unwrap();
    assert_eq!(names.unwrap_or_default(), "");
    assert_eq!(first, dump(&ns).await.unwrap());
}

#[tokio::test]
async fn the_order_of_rules_matters_and_that_of_sets_and_chains_does_not() {
    let [one, two, three] = [
        "iptables-nft -t nat -N A; iptables-nft -t nat -N B; iptables-nft -t nat -A A -p tcp -j ACCEPT; \
         iptables-nft -t nat -A A -p udp -j ACCEPT; ipset create s hash:ip; ipset add s 10.0.0.1; ipset add s 10.0.0.2",
        "ipset create s hash:ip; ipset add s 10.0.0.2; ipset add s 10.0.0.1; iptables-nft -t nat -N B; \
         iptables-nft -t nat -N A; iptables-nft -t nat -A A -p tcp -j ACCEPT; iptables-nft -t nat -A A -p udp -j ACCEPT",
        "iptables-nft -t nat -N A; iptables-nft -t nat -N B; iptables-nft -t nat -A A -p udp -j ACCEPT; \
         iptables-nft -t nat -A A -p tcp -j ACCEPT; ipset create s hash:ip; ipset add s 10.0.0.1; ipset add s 10.0.0.2",
    ]
    .map(|script| {
        let ns = Netns::create_unnamed().unwrap();
        shell(&ns, script);
        ns
    });
    let first = dump(&one).await.unwrap();
    assert_eq!(difference(&two, &first).await, Vec::<String>::new());
    assert_eq!(difference(&three, &first).await.len(), 2);
}

#[tokio::test]
async fn a_dump_survives_being_stored_and_prints_one_object_per_line() {
    let ns = Netns::create_unnamed().unwrap();
    shell(
        &ns,
        "ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up",
    );
    let taken = dump(&ns).await.unwrap();
    let stored = serde_json::to_string(&taken).unwrap();
    assert_eq!(serde_json::from_str::<Dump>(&stored).unwrap(), taken);
    let text = taken.to_string();
    assert_eq!(
        text.lines().count(),
        taken.sections().into_iter().flatten().count()
    );
    assert!(text.contains("link lo mtu 65536 up\n"), "{text}");
    assert!(
        !text.contains("fe80"),
        "random addresses are left out: {text}"
    );
}

#[test]
fn ipset_lines_lose_what_depends_on_history() {
    let line = |text: &str| filters::ipset_line(text).unwrap();
    assert_eq!(
        line(
            "create s hash:ip family inet hashsize 1024 maxelem 65536 comment bucketsize 12 initval 0x3f7c0210"
        ),
        "ipset s hash:ip family inet maxelem 65536 comment bucketsize 12"
    );
    assert_eq!(
        line("add s 10.0.0.1 timeout 97 packets 3 bytes 180 comment \"x bytes 7\""),
        "ipset s member 10.0.0.1 comment \"x bytes 7\""
    );
}
