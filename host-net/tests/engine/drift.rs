//! Every object of a plan taken away or changed by hand: inspection names exactly that, applying repairs it.

use host_net::engine::apply;
use host_net::iptables::Variant;

use crate::plans::node;
use crate::stage::Stage;

/// What an operator does, and what an inspection says.
const BY_HAND: &[(&str, &[&str])] = &[
    (
        "ipset del live 10.244.1.5",
        &["entry 10.244.1.5 of ipset live: missing"],
    ),
    (
        "ipset del pods 10.244.1.4",
        &["entry 10.244.1.4 of ipset pods: missing"],
    ),
    (
        "ip addr del 192.168.126.1/30 dev tunin && ip addr add 192.168.126.1/30 dev tunin",
        &[
            "route 10.244.1.4/32 in table 100: missing",
            "route 10.244.1.5/32 in table 100: missing",
        ],
    ),
    (
        "ip rule del pref 100",
        &["ip rule 100 (fwmark 0x200/0x200): missing"],
    ),
    (
        "ip rule del pref 101",
        &["ip rule 101 (fwmark 0x100/0x100): missing"],
    ),
    ("ip rule del pref 103", &["ip rule 103: missing"]),
    (
        "ip route del 10.9.0.2 table 100",
        &["route 10.9.0.2/32 in table 100: missing"],
    ),
    (
        "ip route del default table 101",
        &["route 0.0.0.0/0 in table 101: missing"],
    ),
    (
        "ip route del default table 102",
        &["route 0.0.0.0/0 in table 102: missing"],
    ),
    (
        "ip route del local default table 104",
        &["route 0.0.0.0/0 in table 104: missing"],
    ),
    (
        "ip route del 10.244.1.4 table 100",
        &["route 10.244.1.4/32 in table 100: missing"],
    ),
    (
        "echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter",
        &["sysctl net/ipv4/conf/eth0/rp_filter: different: 1"],
    ),
    (
        "iptables -t nat -D PREROUTING -j own-PRE",
        &["iptables chain own-PRE in table nat: different: no jump from PREROUTING"],
    ),
    (
        "iptables -t nat -I PREROUTING 1 -s 192.0.2.9 -j ACCEPT",
        &[
            "iptables chain own-PRE in table nat: out of order: `-s 192.0.2.9/32 -j ACCEPT` stands before the jump from PREROUTING",
        ],
    ),
    (
        "iptables -t nat -A PREROUTING -j own-PRE",
        &["iptables chain own-PRE in table nat: different: 2 jumps from PREROUTING"],
    ),
    (
        "iptables -t filter -D FORWARD -j own-FWD && iptables -t filter -F own-FWD && iptables -t filter -X own-FWD",
        &["iptables chain own-FWD in table filter: missing"],
    ),
    (
        "iptables -t mangle -D own-PRE 2",
        &[
            "iptables chain own-PRE in table mangle: different: lacks `-m mark --mark 0x200/0x200 -j RETURN`",
        ],
    ),
    (
        "iptables -t mangle -F own-MORE",
        &[
            "iptables chain own-MORE in table mangle: different: lacks `-m set --match-set live src -j RETURN`",
        ],
    ),
    (
        "iptables -t mangle -I own-PRE 1 -s 192.0.2.9 -j ACCEPT",
        &["iptables chain own-PRE in table mangle: 1 foreign rule(s): `-s 192.0.2.9/32 -j ACCEPT`"],
    ),
    (
        "iptables -t mangle -D own-PRE 1 && iptables -t mangle -A own-PRE -i tunin -j MARK --set-xmark 0x200/0x200",
        &[
            "iptables chain own-PRE in table mangle: out of order: rule 1 is `-m mark --mark 0x200/0x200 -j RETURN`",
        ],
    ),
    (
        "iptables -t nat -D OUTPUT 1",
        &[
            "iptables rule `-d 198.51.100.7/32 -p tcp -j ACCEPT` in chain OUTPUT of table nat: missing",
        ],
    ),
    (
        "ip6tables -D ambidex-v6 -i other0 -j DROP",
        &["ip6tables rule `-i other0 -j DROP` in chain ambidex-v6 of table filter: missing"],
    ),
    (
        "ip6tables -D FORWARD -j ambidex-v6",
        &["ip6tables chain ambidex-v6 in table filter: different: no jump from FORWARD"],
    ),
    (
        "ip link del tunout",
        &[
            "vxlan device tunout: missing",
            "address 192.168.127.1/30 on tunout: missing",
            "route 0.0.0.0/0 in table 101: missing",
        ],
    ),
];

async fn inspection_names_what_was_done(variant: Variant) {
    let stage = Stage::new(variant);
    let plan = node();
    let empty = host_net::plan::Plan::empty(&plan.name);
    let before = stage.state().await;
    apply(&stage.place, &empty, &plan, &stage.journal)
        .await
        .unwrap();
    let whole = stage.state().await;
    for (script, expected) in BY_HAND {
        stage.sh(script);
        assert_eq!(stage.findings(&plan).await, *expected, "after {script}");
        apply(&stage.place, &plan, &plan, &stage.journal)
            .await
            .unwrap();
        assert_eq!(stage.findings(&plan).await, [""; 0], "after {script}");
        // What others put before our jump stays, behind it.
        stage.sh("iptables -t nat -D PREROUTING -s 192.0.2.9 -j ACCEPT 2>/dev/null || true");
        assert_eq!(stage.state().await, whole, "after {script}");
    }
    let errors = host_net::engine::remove(&stage.place, &plan, &stage.journal).await;
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(stage.state().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn inspection_names_what_was_done_nft() {
    inspection_names_what_was_done(Variant::Nft).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inspection_names_what_was_done_legacy() {
    inspection_names_what_was_done(Variant::Legacy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_devices_and_sets_are_found_and_made_again() {
    let stage = Stage::new(Variant::Nft);
    let plan = node();
    let empty = host_net::plan::Plan::empty(&plan.name);
    apply(&stage.place, &empty, &plan, &stage.journal)
        .await
        .unwrap();
    let whole = stage.state().await;
    for (script, part) in [
        (
            "ip link set tunin mtu 1400",
            "vxlan device tunin: different",
        ),
        ("ip link set tunout down", "vxlan device tunout: different"),
    ] {
        stage.sh(script);
        let findings = stage.findings(&plan).await;
        assert!(
            findings[0].starts_with(part),
            "after {script}: {findings:?}"
        );
        apply(&stage.place, &plan, &plan, &stage.journal)
            .await
            .unwrap();
        assert_eq!(stage.state().await, whole, "after {script}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn looking_changes_nothing() {
    let stage = Stage::bare(Variant::Nft);
    let before = stage.state().await;
    let plan = node();
    let findings = stage.findings(&plan).await;
    // A sysctl of a device that exists has some value.
    let missing = findings.iter().filter(|f| f.ends_with(": missing")).count();
    assert_eq!(
        (missing, findings.len()),
        (plan.steps.len() - 1, plan.steps.len())
    );
    assert_eq!(stage.state().await, before);
}
