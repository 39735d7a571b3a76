//! The same TCP congestion control in every namespace, whatever the machine's own is.
//!
//! A namespace may have another default than the machine only where the machine's administrator allows that algorithm to
//! everybody (`net.ipv4.tcp_allowed_congestion_control`), and a lab does not change its machine. Routes may ask for an
//! algorithm all the same; connections take that of the route that they begin with, accepted ones too. Addresses of the
//! namespace itself have routes of the kernel's, which are replaced by routes that ask for it.

use host_net::netns::Netns;
use host_net::sysctl;

/// What every lab has: the default of Linux, so that numbers compare with those of others.
const WANTED: &str = "cubic";
const DEFAULT: &str = "net/ipv4/tcp_congestion_control";
const AVAILABLE: &str = "net/ipv4/tcp_available_congestion_control";

/// The batch with which a namespace is wired so that its connections use cubic; unchanged where nothing is needed or
/// nothing can be done, which results name.
pub fn for_cubic(netns: &str, batch: &str) -> String {
    let Ok(netns) = Netns::open(Netns::path_of(netns)) else {
        return batch.to_owned();
    };
    if sysctl::write(&netns, DEFAULT, WANTED).is_ok() {
        return batch.to_owned();
    }
    let available = sysctl::read(&netns, AVAILABLE).unwrap_or_default();
    // Whoever makes links is a node: no measured connection begins there, and an agent wants its pods' routes plain.
    if !batch.contains("link add ") && available.split(' ').any(|name| name == WANTED) {
        with_routes(batch)
    } else {
        batch.to_owned()
    }
}

fn with_routes(batch: &str) -> String {
    let mut text = String::new();
    // At the end, when the devices are up.
    let mut local = String::new();
    let mut own = |prefix: &str, source: &str, device: &str| {
        local.push_str(&format!(
            "route replace local {prefix} dev {device} table local proto kernel scope host src {source} congctl {WANTED}\n"
        ));
    };
    for line in batch.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["route", "add", ..] => text.push_str(&format!("{line} congctl {WANTED}\n")),
            ["address", "add", address, "dev", device] => {
                let source = address.split('/').next().unwrap_or(address);
                own(source, source, device);
                text.push_str(&format!("{line}\n"));
            }
            ["link", "set", "lo", "up"] => {
                own("127.0.0.0/8", "127.0.0.1", "lo");
                own("127.0.0.1", "127.0.0.1", "lo");
                text.push_str(&format!("{line}\n"));
            }
            _ => text.push_str(&format!("{line}\n")),
        }
    }
    text + &local
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_asks_for_it_also_the_kernels_own() {
        let batch = "link set lo up\naddress add 10.0.0.2/32 dev eth0\nlink set eth0 up\nroute add default via 10.0.0.1 dev eth0\n";
        let text = with_routes(batch);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[3],
            "route add default via 10.0.0.1 dev eth0 congctl cubic"
        );
        assert_eq!(lines.len(), 7);
        assert_eq!(
            lines[6],
            "route replace local 10.0.0.2 dev eth0 table local proto kernel scope host src 10.0.0.2 congctl cubic"
        );
    }
}
