//! The captures and their styles, each with a lab of its own, and what is changed by hand in each.

use std::sync::OnceLock;

use lab::topology::{Families, InpodRules};

use crate::harness::{self, Scene, Variant};

use Style::{Nftables, NodeHybrid, NodeTunnel, Redirect, Tproxy};

/// Every capture, and every style of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    NodeHybrid,
    NodeTunnel,
    Redirect,
    Tproxy,
    Nftables,
}

impl Style {
    pub fn is_node(self) -> bool {
        matches!(self, NodeHybrid | NodeTunnel)
    }

    /// As the output names it.
    pub fn name(self) -> &'static str {
        match self {
            NodeHybrid => "node, hybrid",
            NodeTunnel => "node, tunnel",
            Redirect => "inpod, redirect",
            Tproxy => "inpod, tproxy",
            Nftables => "inpod, nftables",
        }
    }
}

/// One lab per style, which every test leaves as it found it. Two of them have IPv6, too.
pub fn scene(style: Style) -> Scene {
    static STAGES: [OnceLock<harness::SharedStage>; 5] = [const { OnceLock::new() }; 5];
    harness::shared_in(&STAGES[style as usize], || {
        let mut spec = match style {
            NodeHybrid => Variant::NodeHybrid.spec(),
            NodeTunnel => Variant::NodeTunnel.spec(),
            Redirect | Tproxy | Nftables => Variant::Inpod.spec(),
        };
        match style {
            NodeTunnel | Redirect => spec.families = Families::Dual,
            Tproxy => spec.inpod_rules = InpodRules::Tproxy,
            Nftables => spec.inpod_rules = InpodRules::Nftables,
            NodeHybrid => {}
        }
        spec
    })
}

/// One thing is changed by hand: the way leaves the planned one there, and says so.
pub struct Damage {
    pub target: &'static str,
    pub breaks: String,
    pub mends: String,
    /// Where the flag is.
    pub flagged: &'static str,
    /// What it says.
    pub says: &'static str,
    pub foreign: bool,
    /// Whether it is IPv6 that does not pass.
    pub ipv6: bool,
}

pub fn damage(target: &'static str, breaks: &str, mends: &str, says: &'static str) -> Damage {
    Damage {
        target,
        breaks: breaks.to_owned(),
        mends: mends.to_owned(),
        flagged: match target {
            "pod1-1" => "pod alpha/pod1-1",
            "pod2-1" => "pod alpha/pod2-1",
            other => other,
        },
        says,
        foreign: false,
        ipv6: false,
    }
}

pub fn damages(style: Style, ip: &str) -> Vec<Damage> {
    let foreign = |it: Damage| Damage {
        foreign: true,
        ..it
    };
    let by_ipv6 = |it: Damage| Damage { ipv6: true, ..it };
    if style == Nftables {
        let rule = "meta l4proto tcp ip daddr != 127.0.0.1 meta mark and 0xfff != 0x539 counter redirect to :15001";
        let handle = "nft -a list chain inet istio-ambient-nat istio-output | sed -n 's/.*:15001 # handle //p'";
        return vec![
            damage(
                "pod1-1",
                &format!("nft delete rule inet istio-ambient-nat istio-output handle $({handle})"),
                &format!("nft add rule inet istio-ambient-nat istio-output {rule}"),
                "redirect to :15001 (this rule is missing)",
            ),
            foreign(damage(
                "pod1-1",
                "nft 'table inet strange { chain c { type filter hook output priority -400; tcp dport 8080 drop; }; }'",
                "nft delete table inet strange",
                "inet istio-ambient-nat istio-output",
            )),
            damage(
                "pod1-1",
                "nft flush chain inet istio-ambient-mangle istio-output",
                "nft add rule inet istio-ambient-mangle istio-output ct mark and 0xfff == 0x111 counter meta mark set ct mark",
                "meta mark set ct mark (this rule is missing)",
            ),
        ];
    }
    if !style.is_node() {
        let redirect = "-p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001";
        let mut all = vec![
            damage(
                "pod1-1",
                &format!("iptables -t nat -D ISTIO_OUTPUT ! -d 127.0.0.1/32 {redirect}"),
                &format!("iptables -t nat -A ISTIO_OUTPUT ! -d 127.0.0.1/32 {redirect}"),
                "REDIRECT --to-ports 15001 (this rule is missing)",
            ),
            foreign(damage(
                "pod1-1",
                "iptables -t nat -I OUTPUT -p tcp -j ACCEPT",
                "iptables -t nat -D OUTPUT -p tcp -j ACCEPT",
                "nat ISTIO_OUTPUT",
            )),
            damage(
                "pod1-1",
                "ip rule del pref 32764",
                "ip rule add pref 32764 fwmark 0x111/0xfff lookup 100 proto 133",
                "this ip rule is missing",
            ),
        ];
        if style == Tproxy {
            let inbound = "ISTIO_PRERT -p tcp -m tcp --dport 15008 -m mark ! --mark 0x539/0xfff -j TPROXY --on-port 15008 --on-ip 0.0.0.0 --tproxy-mark 0x111/0xfff";
            let place = inbound.replacen("ISTIO_PRERT", "ISTIO_PRERT 4", 1);
            all.push(damage(
                "pod2-1",
                &format!("iptables -t mangle -D {inbound}"),
                &format!("iptables -t mangle -I {place}"),
                "TPROXY --on-port 15008 --on-ip 0.0.0.0 --tproxy-mark 0x111/0xfff (this rule is missing)",
            ));
        } else {
            all.push(by_ipv6(damage(
                "pod1-1",
                &format!("ip6tables -t nat -D ISTIO_OUTPUT ! -d ::1/128 {redirect}"),
                &format!("ip6tables -t nat -A ISTIO_OUTPUT ! -d ::1/128 {redirect}"),
                "REDIRECT --to-ports 15001 (this rule is missing)",
            )));
        }
        return all;
    }
    let tproxy =
        "-i pistioout -p tcp -j TPROXY --on-port 15001 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff";
    let mut all = vec![
        damage(
            "proxy1",
            &format!("iptables -t mangle -D PREROUTING {tproxy}"),
            &format!("iptables -t mangle -I PREROUTING 2 {tproxy}"),
            "(this rule is missing)",
        ),
        foreign(damage(
            "node1",
            &format!("iptables -t mangle -I PREROUTING -s {ip} -j ACCEPT"),
            &format!("iptables -t mangle -D PREROUTING -s {ip} -j ACCEPT"),
            "MARK --set-xmark 0x100/0x100",
        )),
        damage(
            "node1",
            &format!(
                "ipset save ztunnel-pods-ips > /run/explain-$$; ipset del ztunnel-pods-ips {ip}; rm /run/explain-$$"
            ),
            &format!(
                "ipset add ztunnel-pods-ips {ip} comment \"$(ipset list ambidex-guarded | grep '^{ip} ' | cut -d'\"' -f2)\""
            ),
            "lacks",
        ),
        damage(
            "node1",
            "ip route del default table 101",
            "ip route add default via 192.168.127.2 dev istioout table 101 proto 133",
            "(this route is missing)",
        ),
        damage(
            "node1",
            "ip rule del pref 101",
            "ip rule add pref 101 fwmark 0x100/0x100 lookup 101 proto 133",
            "this ip rule is missing",
        ),
    ];
    if style == NodeTunnel {
        all.push(by_ipv6(damage(
            "node1",
            "ip -6 rule del pref 101",
            "ip -6 rule add pref 101 fwmark 0x100/0x100 lookup 101 proto 133",
            "this ip rule is missing",
        )));
    }
    all
}
