//! What stops a captured pod's packets when a part of the capture is gone: in another table than what it guards, and by
//! another set, so that no single flush takes both away.
//!
//! While the capture is whole, nothing meets these rules. They are about the device that a packet really leaves by, so a
//! lost route or policy rule is covered as well as a lost mark.

use super::*;

/// For packets that the node forwards; `guarded` is the set of a family and `proxy` the proxy's address in it.
pub(super) fn forward(facts: &HostFacts, guarded: &str, proxy: &str, flow: Flow) -> Vec<String> {
    let veth = &facts.proxy_veth;
    let (tunnel_in, tunnel_out) = (TUNNEL_IN.host, TUNNEL_OUT.host);
    let begins = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m set --match-set";
    let mut rules = vec![
        // A connection that begins goes into the tunnel, unless the proxy makes it or it is to the proxy itself: whoever
        // reads the metrics of all proxies may be captured, too.
        format!("! -d {proxy} ! -i {veth} ! -o {tunnel_out} {begins} {guarded} src -j DROP"),
        format!(
            "! -i {veth} ! -o {tunnel_in} {begins} {guarded} dst -m set ! --match-set {guarded} src -j DROP"
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
