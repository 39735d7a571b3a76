//! One rule of nftables, from its statements in JSON.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde_json::Value;

use crate::explain::rule::{Masked, Match, Target, Translation};

type Condition = (bool, Match);

/// Its conditions, and what it does then.
pub(super) fn read(parts: &[Value]) -> (Vec<Condition>, Target) {
    let mut matches = Vec::new();
    let mut targets = Vec::new();
    for part in parts {
        let Some((name, content)) = part.as_object().and_then(|it| it.iter().next()) else {
            continue;
        };
        if name == "match" {
            // Conditions behind a statement do not keep it from being done.
            if targets.is_empty() {
                matches.extend(conditions(content));
            } else {
                matches.push((false, Match::Unknown(said(content))));
            }
        } else if !["counter", "log", "comment"].contains(&name.as_str()) {
            targets.push(target(name, content));
        }
    }
    let target = match targets.len() {
        0 => Target::Nothing,
        1 => targets.remove(0),
        _ => Target::Several(targets),
    };
    (matches, target)
}

fn said(value: &Value) -> String {
    format!("nft {value}")
}

/// A condition, with those that it brings along: an address of IPv4 is in no packet of IPv6.
fn conditions(content: &Value) -> Vec<Condition> {
    let (left, right) = (&content["left"], &content["right"]);
    let negated = match content["op"].as_str() {
        Some("==" | "in") => false,
        Some("!=") => true,
        _ => return vec![(false, Match::Unknown(said(content)))],
    };
    let mut all = Vec::new();
    let payload = &left["payload"];
    match payload["protocol"].as_str() {
        Some("ip") => all.push((false, Match::Family(0))),
        Some("ip6") => all.push((false, Match::Family(1))),
        Some(transport @ ("tcp" | "udp")) => {
            all.push((false, Match::Protocol(transport.to_owned())));
        }
        _ => {}
    }
    let found = match payload.is_object() {
        true => of_header(payload, right),
        false => of_packet(left, right),
    };
    all.push((
        negated,
        found.unwrap_or_else(|| Match::Unknown(said(content))),
    ));
    all
}

fn of_header(payload: &Value, right: &Value) -> Option<Match> {
    match payload["field"].as_str()? {
        "saddr" => any(right, &|it| network(it).map(Match::Source)),
        "daddr" => any(right, &|it| network(it).map(Match::Destination)),
        "sport" => ports(right).map(Match::SourcePorts),
        "dport" => ports(right).map(Match::DestinationPorts),
        "protocol" | "nexthdr" => any(right, &|it| Some(Match::Protocol(it.as_str()?.to_owned()))),
        _ => None,
    }
}

fn of_packet(left: &Value, right: &Value) -> Option<Match> {
    let (left, mask) = match left["&"].as_array().map(Vec::as_slice) {
        Some([left, mask]) => (left, Some(mask)),
        Some(_) => return None,
        None => (left, None),
    };
    if left["payload"]["field"] == "flags" && left["payload"]["protocol"] == "tcp" {
        return Some(Match::Flags(flags(mask?)?, flags(right)?));
    }
    let mark = || {
        let mask = match mask {
            Some(mask) => number(mask)?,
            None => u32::MAX,
        };
        let value = number(right)?;
        Some(Masked { value, mask })
    };
    if let Some(key) = left["meta"]["key"].as_str() {
        let text = |it: &Value| it.as_str().map(str::to_owned);
        return match key {
            "mark" => mark().map(Match::Mark),
            "nfproto" => match right.as_str()? {
                "ipv4" => Some(Match::Family(0)),
                "ipv6" => Some(Match::Family(1)),
                _ => None,
            },
            "l4proto" => any(right, &|it| text(it).map(Match::Protocol)),
            "iif" | "iifname" => any(right, &|it| text(it).map(device).map(Match::In)),
            "oif" | "oifname" => any(right, &|it| text(it).map(device).map(Match::Out)),
            _ => None,
        };
    }
    if let Some(key) = left["ct"]["key"].as_str() {
        return match key {
            "mark" => mark().map(Match::ConnectionMark),
            "state" if mask.is_none() => Some(Match::State(flags(right)?)),
            _ => None,
        };
    }
    if left["socket"]["key"] == "transparent" && number(right) == Some(1) {
        return Some(Match::ForTransparentSocket);
    }
    let fib = &left["fib"];
    if fib["result"] == "type" {
        let of = fib["flags"].as_array()?;
        let of_destination = match of.as_slice() {
            [only] if only == "daddr" => true,
            [only] if only == "saddr" => false,
            _ => return None,
        };
        let kind = right.as_str()?.to_uppercase();
        return Some(Match::AddressType(of_destination, kind));
    }
    None
}

/// The end of a name is a star here, and a plus in iptables.
fn device(name: String) -> String {
    match name.strip_suffix('*') {
        Some(prefix) => format!("{prefix}+"),
        None => name,
    }
}

/// One value, or a set of which one has to fit.
fn any(right: &Value, one: &dyn Fn(&Value) -> Option<Match>) -> Option<Match> {
    let Some(set) = right["set"].as_array() else {
        return one(right);
    };
    let all: Option<Vec<Match>> = set.iter().map(one).collect();
    all.map(Match::AnyOf)
}

fn network(value: &Value) -> Option<IpNet> {
    if let Some(text) = value.as_str() {
        return text.parse::<IpAddr>().ok().map(IpNet::from);
    }
    let prefix = &value["prefix"];
    let ip = prefix["addr"].as_str()?.parse().ok()?;
    let length = u8::try_from(prefix["len"].as_u64()?).ok()?;
    IpNet::new(ip, length).ok()
}

fn ports(right: &Value) -> Option<Vec<RangeInclusive<u16>>> {
    let one = |it: &Value| {
        let port = |it: &Value| u16::try_from(it.as_u64()?).ok();
        match it["range"].as_array().map(Vec::as_slice) {
            Some([first, last]) => Some(port(first)?..=port(last)?),
            _ => port(it).map(|port| port..=port),
        }
    };
    match right["set"].as_array() {
        Some(set) => set.iter().map(one).collect(),
        None => one(right).map(|range| vec![range]),
    }
}

/// One flag or several, in capitals as iptables has them.
fn flags(value: &Value) -> Option<Vec<String>> {
    let one = |it: &Value| it.as_str().map(str::to_uppercase);
    match (value.as_array(), value["|"].as_array()) {
        (Some(all), _) | (None, Some(all)) => all.iter().map(one).collect(),
        (None, None) => one(value).map(|flag| vec![flag]),
    }
}

fn number(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

fn target(name: &str, content: &Value) -> Target {
    let chain = || content["target"].as_str().unwrap_or_default().to_owned();
    let port = || u16::try_from(content["port"].as_u64()?).ok();
    let translation = || {
        let ip = content["addr"].as_str()?.parse().ok()?;
        Some(Translation { ip, port: port() })
    };
    let known = match name {
        "accept" => Some(Target::Accept),
        "drop" => Some(Target::Drop),
        "reject" => Some(Target::Reject),
        "return" => Some(Target::Return),
        "jump" => Some(Target::Chain(chain())),
        "goto" => Some(Target::Goto(chain())),
        "notrack" => Some(Target::Untracked),
        "masquerade" => Some(Target::Masquerade),
        "redirect" => port().map(Target::Redirect),
        "dnat" => translation().map(Target::Dnat),
        "snat" => translation().map(Target::Snat),
        "tproxy" if content["addr"].is_null() => port().map(Target::Give),
        "mangle" => mangle(&content["key"], &content["value"]),
        _ => None,
    };
    known.unwrap_or_else(|| Target::Unknown(format!("nft {name} {content}")))
}

/// `KEY set VALUE`, where the value may be a mark under masks.
fn mangle(key: &Value, value: &Value) -> Option<Target> {
    let of_connection = match (key["meta"]["key"].as_str(), key["ct"]["key"].as_str()) {
        (Some("mark"), _) => false,
        (_, Some("mark")) => true,
        (_, Some("zone")) => return Some(Target::Zone(u16::try_from(value.as_u64()?).ok()?)),
        _ => return None,
    };
    let mark = |masked| match of_connection {
        true => Target::ConnectionMark(masked),
        false => Target::Mark(masked),
    };
    if let Some(value) = number(value) {
        let mask = u32::MAX;
        return Some(mark(Masked { value, mask }));
    }
    let pair = |operator: &str| match value[operator].as_array().map(Vec::as_slice) {
        Some([left, right]) => Some((left.clone(), number(right)?)),
        _ => None,
    };
    // Bits that are set are first cleared: what is left of them does not matter.
    let (rest, set) = pair("|").unwrap_or((value.clone(), 0));
    let (of, kept) = match rest["&"].as_array().map(Vec::as_slice) {
        Some([of, kept]) => (of.clone(), number(kept)?),
        _ => (rest, u32::MAX),
    };
    let from_connection = match (of["meta"]["key"].as_str(), of["ct"]["key"].as_str()) {
        (Some("mark"), _) => false,
        (_, Some("mark")) => true,
        _ => return None,
    };
    match (of_connection, from_connection) {
        (to, from) if to == from => Some(mark(Masked {
            value: set,
            mask: !(kept & !set),
        })),
        (false, true) if set == 0 => Some(Target::RestoreMark(u32::MAX, kept)),
        (true, false) if set == 0 => Some(Target::SaveMark(kept, u32::MAX)),
        _ => None,
    }
}
