//! What stops a captured pod's packets when a part of the capture is gone: in another table than what it guards, and by
//! another set, so that no single flush takes both away.
//!
//! While the capture is whole, nothing meets these rules. They are about the device that a packet really leaves by, so a
//! lost route or policy rule is covered as well as a lost mark.

use super::*;

/// For packets that the node forwards.
pub(super) fn forward(facts: &HostFacts, flow: Flow) -> Vec<String> {
    let (zip, veth) = (facts.proxy_ip, &facts.proxy_veth);
    let (tunnel_in, tunnel_out) = (TUNNEL_IN.host, TUNNEL_OUT.host);
    let begins = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m set --match-set";
    let mut rules = vec![
        // A connection that begins goes into the tunnel, unless the proxy makes it or it is to the proxy itself: whoever
        // reads the metrics of all proxies may be captured, too.
        format!("! -d {zip}/32 ! -i {veth} ! -o {tunnel_out} {begins} {GUARD_SET} src -j DROP"),
        format!(
            "! -i {veth} ! -o {tunnel_in} {begins} {GUARD_SET} dst -m set ! --match-set {GUARD_SET} src -j DROP"
        ),
        // One that the proxy speaks in with somebody else's address comes from it or goes to it, for life.
        format!("! -i {veth} ! -o {veth} -m connmark --mark {MARK_PROXY} -j DROP"),
    ];
    if flow == Flow::Tunnel {
        rules.push(format!(
            "! -i {tunnel_out} ! -o {tunnel_out} -m connmark --mark {MARK_STAYS_OUT} -j DROP"
        ));
    }
    rules
}
