//! The lab's IPv6: every IPv4 address has a twin, and everything that is made for the one is made for the other.
//!
//! A twin is read like its address: `fd00:10:244:1::10` belongs to 10.244.1.10. So the texts that make links, routes and
//! service rules are written once, for IPv4, and translated word by word.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};

use ipnet::Ipv4Net;

/// The IPv6 address of whoever has this IPv4 address.
pub fn twin(ip: Ipv4Addr) -> Ipv6Addr {
    let [a, b, c, d] = ip.octets().map(digits);
    Ipv6Addr::new(0xfd00, a, b, c, 0, 0, 0, d)
}

/// The number whose hexadecimal digits are the decimal ones of `octet`.
fn digits(octet: u8) -> u16 {
    let octet = u16::from(octet);
    ((octet / 100) << 8) | ((octet / 10 % 10) << 4) | (octet % 10)
}

/// The twin of a prefix: what has 32, 24 or 16 bits becomes 128, 64 or 48.
fn twin_net(net: Ipv4Net) -> String {
    let length = match net.prefix_len() {
        0..=8 => 0,
        9..=16 => 48,
        17..=24 => 64,
        _ => 128,
    };
    match length {
        0 => "::/0".to_owned(),
        _ => format!("{}/{length}", twin(net.addr())),
    }
}

fn word(word: &str) -> String {
    if let Ok(ip) = word.parse::<Ipv4Addr>() {
        twin(ip).to_string()
    } else if let Ok(net) = word.parse::<Ipv4Net>() {
        twin_net(net)
    } else if let Ok(at) = word.parse::<SocketAddrV4>() {
        format!("[{}]:{}", twin(*at.ip()), at.port())
    } else {
        word.to_owned()
    }
}

fn words(line: &str) -> String {
    line.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

/// The addresses and routes of an input of `ip -batch`, as IPv6; links are made once.
pub fn batch(v4: &str) -> String {
    let mut text = String::new();
    for line in v4.lines().map(str::trim) {
        if line.starts_with("address add ") {
            // Usable at once, without a second of duplicate address detection.
            text.push_str(&format!("{} nodad\n", words(line)));
        } else if line.starts_with("route add ") {
            let line = line
                .replace(" scope link", "")
                .replace("add default ", "add ::/0 ");
            text.push_str(&format!("{}\n", words(&line)));
        }
    }
    text
}

/// What is left of an input of `ip -batch` without addresses and routes.
pub fn only_links(v4: &str) -> String {
    let is_link = |line: &&str| line.trim().starts_with("link ");
    v4.lines()
        .filter(is_link)
        .map(|line| format!("{}\n", line.trim()))
        .collect()
}

/// An input of `iptables-restore` as one of `ip6tables-restore`.
pub fn rules(v4: &str) -> String {
    v4.lines()
        .map(|line| format!("{}\n", words(line)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_twin_is_read_like_its_address() {
        let twin = |ip: [u8; 4]| super::twin(ip.into()).to_string();
        assert_eq!(twin([10, 244, 1, 10]), "fd00:10:244:1::10");
        assert_eq!(twin([203, 0, 113, 200]), "fd00:203:0:113::200");
    }

    #[test]
    fn batches_and_rules_are_translated() {
        let v4 = "link set eth0 up\naddress add 10.244.1.10/32 dev eth0\n\
                  route add 10.244.1.1/32 dev eth0 scope link\nroute add default via 10.244.1.1 dev eth0\n\
                  route add 10.244.2.0/24 via 172.30.0.2 dev eth0\n";
        assert_eq!(
            batch(v4),
            "address add fd00:10:244:1::10/128 dev eth0 nodad\nroute add fd00:10:244:1::1/128 dev eth0\n\
             route add ::/0 via fd00:10:244:1::1 dev eth0\nroute add fd00:10:244:2::/64 via fd00:172:30::2 dev eth0\n"
        );
        assert_eq!(only_links(v4), "link set eth0 up\n");
        assert_eq!(
            rules("-A X -d 10.96.0.0/16 -p tcp -j DNAT --to-destination 10.244.2.10:8080"),
            "-A X -d fd00:10:96::/48 -p tcp -j DNAT --to-destination [fd00:10:244:2::10]:8080\n"
        );
    }
}
